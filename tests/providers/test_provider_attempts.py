"""When a paid call is retried, the failure for each error, and what is logged."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Final

import httpx2
import pytest

from adapters.outbound.calls import retry_after
from adapters.providers.attempts import PROMPT, Declined, answered, attempt, broken, log_problem
from domain.errors import Failure, FailureCode
from domain.ports.images import Picture
from support.doubles import advance_time

BUSY: Final = "provider_rate_limited"
AWAY: Final = "provider_unavailable"


class Calls:
    """A call that raises these errors in turn, and then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.count = 0

    async def __call__(self) -> str:
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


class Reports:
    def __init__(self, act: Callable[[], Awaitable[object]] | None = None) -> None:
        self.fractions: list[float] = []
        self.messages: list[str] = []
        self._act = act

    async def __call__(self, fraction: float, message: str, preview: Picture | None = None) -> None:
        assert preview is None
        self.fractions.append(fraction)
        self.messages.append(message)
        if self._act is not None:
            await self._act()


async def failing(calls: Callable[[], Awaitable[str]], reports: Reports, *, within: float = 60) -> Failure:
    with pytest.raises(Failure) as caught:
        await attempt(calls, reports, within=within, backoff=0.01)
    return caught.value


# --- retries --------------------------------------------------------------------------------------------


async def test_successful_call_is_made_once_without_reports() -> None:
    calls, reports = Calls(), Reports()
    assert await attempt(calls, reports, within=60) == "done"
    assert (calls.count, reports.messages) == (1, [])


async def test_declined_call_is_retried_and_each_wait_is_reported() -> None:
    calls, reports = Calls(Declined(BUSY), Declined(BUSY, after=0.02), Declined(AWAY)), Reports()
    assert await attempt(calls, reports, within=60, backoff=0.01) == "done"
    assert calls.count == 4
    assert reports.messages == [
        "The image service is busy; trying again in 1 s.",
        "The image service is busy; trying again in 1 s.",
        "The image service cannot be reached; trying again in 1 s.",
    ]
    # Each wait is visible in a stage of ten percent, and leaves most of it for the work.
    shown = [int(10 * fraction) for fraction in reports.fractions]
    assert shown == sorted({*shown})
    assert shown[0] >= 1
    assert shown[-1] < 5


async def test_four_declined_calls_raise_the_last_failure() -> None:
    calls, reports = Calls(*[Declined(AWAY)] * 3, *[Declined(BUSY)] * 9), Reports()
    assert (await failing(calls, reports)).code == BUSY
    assert (calls.count, len(reports.messages)) == (4, 3)


async def test_retry_waits_at_least_for_retry_after() -> None:
    passed = asyncio.Event()
    calls = Calls(Declined(BUSY, after=0.1))

    async def call() -> str:
        assert calls.count == 0 or passed.is_set()
        return await calls()

    asyncio.get_running_loop().call_later(0.1, passed.set)
    assert await attempt(call, Reports(), within=60, backoff=0.001) == "done"


@pytest.mark.parametrize("header", ["", "soon", "nan", "inf", "Mon, 01 Jan 2026 00:00:00 +99999999999999"])
def test_a_retry_after_that_names_no_moment_is_ignored(header: str) -> None:
    assert retry_after(header) is None


async def test_backoff_is_random_up_to_a_bound_that_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[tuple[float, float]] = []

    def drawn(low: float, high: float) -> float:
        bounds.append((low, high))
        return low

    monkeypatch.setattr("random.uniform", drawn)
    await attempt(Calls(*[Declined(BUSY)] * 3), Reports(), within=60, backoff=2)
    assert bounds == [(0, 2), (0, 4), (0, 8)]


@pytest.mark.parametrize(("after", "within"), [(10, 5), (5, 5), (61, 1000)])
async def test_no_retry_if_the_wait_is_too_long(after: float, within: float) -> None:
    calls, reports = Calls(Declined(BUSY, after=after)), Reports()
    assert (await failing(calls, reports, within=within)).code == BUSY
    assert (calls.count, reports.messages) == (1, [])


@pytest.mark.parametrize("error", [Failure("provider_rejected"), Failure("provider_rate_limited"), KeyError("odd")])
async def test_other_exceptions_are_raised_after_one_call(error: Exception) -> None:
    calls, reports = Calls(error), Reports()
    with pytest.raises(type(error)) as caught:
        await attempt(calls, reports, within=60)
    assert (caught.value, calls.count, reports.messages) == (error, 1, [])


async def test_time_limit_covers_all_calls_and_cancels_the_last() -> None:
    calls, begun, aborted = Calls(Declined(BUSY)), asyncio.Event(), asyncio.Event()

    async def call() -> str:
        if calls.count == 0:
            await advance_time(30)
        await calls()
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            aborted.set()
        return "late"

    failure = asyncio.create_task(failing(call, Reports(), within=60))
    await begun.wait()
    await advance_time(30)
    assert ((await failure).code, calls.count, aborted.is_set()) == ("provider_timeout", 2, True)


async def test_cancelling_during_a_wait_makes_no_further_call() -> None:
    waiting = asyncio.Event()

    async def tell() -> None:
        waiting.set()

    calls = Calls(Declined(BUSY, after=30))
    task = asyncio.create_task(attempt(calls, Reports(tell), within=60))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls.count == 1


async def test_exception_from_a_report_prevents_the_next_call() -> None:
    async def refuse() -> None:
        raise KeyError("the generation has moved on")

    calls = Calls(Declined(BUSY))
    with pytest.raises(KeyError):
        await attempt(calls, Reports(refuse), within=60, backoff=0.01)
    assert calls.count == 1


# --- failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (302, "provider_unavailable", True),
        (400, "provider_rejected", False),
        (401, "provider_rejected", False),
        (404, "provider_rejected", False),
        (409, "provider_rejected", True),
        (413, "provider_rejected", False),
        (422, "provider_rejected", False),
        (500, "provider_unavailable", True),
        (502, "provider_unavailable", True),
        (503, "provider_unavailable", True),
    ],
)
def test_http_status_has_its_code_and_is_not_declined(status: int, code: FailureCode, retryable: bool) -> None:
    failure = answered(status, {})
    assert not isinstance(failure, Declined)
    assert (failure.code, failure.retryable) == (code, retryable)


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_authentication_errors_are_addressed_to_the_operator(status: int) -> None:
    failure = answered(status, {"retry-after": "1"})
    assert not isinstance(failure, Declined)
    assert "Please tell whoever runs it." in failure.sentence


@pytest.mark.parametrize(("status", "code"), [(429, "provider_rate_limited"), (503, "provider_unavailable")])
def test_response_with_retry_after_is_declined(status: int, code: FailureCode) -> None:
    declined = answered(status, httpx2.Headers({"Retry-After": "2.5"}))
    assert isinstance(declined, Declined)
    assert (declined.code, declined.retryable, declined.after) == (code, True, 2.5)


def test_retry_after_may_be_a_date() -> None:
    then = datetime.now(UTC) + timedelta(seconds=100)
    declined = answered(503, {"retry-after": format_datetime(then, usegmt=True)})
    assert isinstance(declined, Declined)
    assert declined.after is not None
    assert 0 < declined.after <= 100


@pytest.mark.parametrize("odd", ["", "soon", "nan", "inf", "1e999", "Mon, 99 Nov 2026 99:00:00 GMT"])
def test_malformed_retry_after_is_ignored(odd: str) -> None:
    busy = answered(429, {"retry-after": odd})
    assert isinstance(busy, Declined)
    assert busy.after is None
    assert not isinstance(answered(503, {"retry-after": odd}), Declined)


@pytest.mark.parametrize("past", ["-5", "Mon, 23 Nov 2020 12:00:00 GMT", "Mon, 23 Nov 2020 12:00:00 -0000"])
def test_retry_after_in_the_past_is_zero(past: str) -> None:
    busy = answered(429, {"retry-after": past})
    assert isinstance(busy, Declined)
    assert busy.after == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (httpx2.ReadTimeout("slow"), "provider_timeout"),
        (httpx2.ConnectTimeout("slow"), "provider_timeout"),
        (httpx2.ReadError("reset"), "provider_unavailable"),
        (httpx2.WriteError("reset"), "provider_unavailable"),
        (httpx2.RemoteProtocolError("odd"), "provider_unavailable"),
        (None, "provider_unavailable"),
    ],
)
def test_broken_connection_is_not_declined_as_the_request_may_have_arrived(
    error: Exception | None, code: FailureCode
) -> None:
    failure = broken(error)
    assert not isinstance(failure, Declined)
    assert (failure.code, failure.retryable) == (code, True)


def test_connect_error_is_declined() -> None:
    declined = broken(httpx2.ConnectError("refused"))
    assert isinstance(declined, Declined)
    assert (declined.code, declined.after) == ("provider_unavailable", None)


# --- logging ---------------------------------------------------------------------------------------------

KEY = "a8f0e6c2d4b1-secret"


def logged(caplog: pytest.LogCaptureFixture, words: object, what: object = "400", request_id: str | None = None) -> str:
    log_problem("openai", what, words, request_id=request_id, secret=KEY)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    return record.getMessage()


def test_log_has_the_provider_message_and_request_id(caplog: pytest.LogCaptureFixture) -> None:
    line = logged(caplog, "Rate limit reached for images per minute", "429 RateLimitError", "req_12ab")
    assert line == "openai: '429 RateLimitError' (request 'req_12ab'): 'Rate limit reached for images per minute'"


def test_logged_messages_are_escaped_and_truncated(caplog: pytest.LogCaptureFixture) -> None:
    line = logged(
        caplog, "one\r\n2026-11-22 CRITICAL forged\x1b[31m\u2028\u202e" + "long " * 100_000, "4\n00", "r\x00q"
    )
    assert line.isprintable()
    assert line.isascii()
    assert len(line) < 700


@pytest.mark.parametrize(
    "words",
    [
        f"Incorrect key: {KEY}.",
        f"{KEY}{KEY}",
        {"headers": {"Authorization": f"Bearer {KEY}"}},
        "Incorrect API key provided: sk-proj-ab***********c2d4b1-secret. You can find",
        "Token r8_c2d4b1-secret was refused",
        "BEARER c2d4b1-secret",
        "x" * 490 + KEY,
        "x" * 990 + KEY,
        KEY * 10_000,
        "sk-c2d4b1, " * 10_000,
    ],
)
def test_no_part_of_a_key_is_logged(caplog: pytest.LogCaptureFixture, words: object) -> None:
    line = logged(caplog, words, f"key {KEY}", KEY)
    assert "c2d4b1" not in line
    assert "a8f0e6" not in line


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("A cat with a red hat", "Rejected: 'a CAT with a red hat' is not allowed"),
        ("My neighbour Jane Doe, naked", 'the input "…neighbour Jane D…" was refused'),
        ("Kadın için şapka", 'body: {"prompt": "Kad\\u0131n i\\u00e7in \\u015fapka"}'),
        ("hats", "no hats today"),
    ],
)
def test_a_message_that_repeats_the_prompt_is_not_logged(
    caplog: pytest.LogCaptureFixture, prompt: str, message: str
) -> None:
    mine = PROMPT.set(prompt)
    try:
        assert logged(caplog, message) == "openai: '400' (request 'None'): '[it quotes the prompt]'"
    finally:
        PROMPT.reset(mine)


def test_a_message_without_the_prompt_is_logged_without_addresses(caplog: pytest.LogCaptureFixture) -> None:
    mine = PROMPT.set("x")
    try:
        line = logged(caplog, "no text at https://cdn.example/a.png?sig=secret or data:image/png;base64,AAAA, sorry")
        assert line == "openai: '400' (request 'None'): 'no text at [url] or [url] sorry'"
    finally:
        PROMPT.reset(mine)
