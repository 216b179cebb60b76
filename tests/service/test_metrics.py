"""``GET /metrics``: what Prometheus scrapes, with the numbers that really happened."""

from pathlib import Path
from typing import Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from domain.errors import LogUnavailable
from domain.histogram import Histogram
from domain.ports.leases import Counts
from support.doubles import ScriptedEditor
from support.guarded import SECRET, SERVICE, ask, guarded, token
from support.harness import Running, running
from support.http_app import assert_problem
from support.postgres import fresh_database
from support.serve_process import patient, serving

#: Each metric: its type, and its labels.
METRICS: Final = {
    "stagecast_generations_total": ("counter", {"kind", "code"}),
    "stagecast_running": ("gauge", set()),
    "stagecast_waiting": ("gauge", set()),
    "stagecast_queue_seconds": ("histogram", set()),
    "stagecast_stage_seconds": ("histogram", {"kind", "status"}),
    "stagecast_append_seconds": ("histogram", set()),
    "stagecast_sockets": ("gauge", set()),
    "stagecast_streams": ("gauge", set()),
    "stagecast_events_sent_total": ("counter", set()),
    "stagecast_recoveries_total": ("counter", {"result"}),
    "stagecast_slow_readers_total": ("counter", set()),
    "stagecast_webhook_attempts_total": ("counter", {"result"}),
    "stagecast_provider_calls_total": ("counter", {"provider", "result"}),
    "stagecast_refused_total": ("counter", {"code"}),
    "stagecast_loop_lag_seconds": ("gauge", set()),
    "stagecast_log_age_seconds": ("gauge", set()),
}


async def scrape(service: Running) -> dict[str, float]:
    """The samples by their name and labels, as Prometheus writes them."""
    answer = await service.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return samples(answer.text)


def samples(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


async def test_each_metric_has_its_name_type_and_labels(tmp_path: Path) -> None:
    async with running(tmp_path, overrides={"editor": ScriptedEditor()}) as service, service.phone("ada") as phone:
        await phone.until_over(await service.start())
        await service.http.get("/nowhere")
        text = (await service.http.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels)
    assert {name: each for name, each in found.items() if name.startswith("stagecast_")} == METRICS
    assert "process_resident_memory_bytes" in found
    assert "ada" not in text


async def test_the_numbers_are_what_happened(tmp_path: Path) -> None:
    async with running(tmp_path, credits=2) as service:
        before = await scrape(service)
        assert before['stagecast_generations_total{code="completed",kind="edit"}'] == 0
        async with service.phone("ada") as one, service.phone("ada") as two:
            edit, generate = await service.start(), await service.start(kind="generate")
            for phone in (one, two):
                await phone.until_over(edit, generate)
            assert (await service.post("ada", "edit")).status_code == 402
            assert (await service.http.get("/nowhere?a=b")).status_code == 404
            cursor = one.cursors[-1]
            async with service.http.stream("GET", "/events", headers={"Accept": "text/event-stream"}):
                during = await scrape(service)
        async with service.phone("ada", cursor=cursor, userId="ada"), service.phone(userId="ada", cursor="none"):
            await service.until(lambda: service.service.feed_sessions.recoveries.total() == 2)
        after = await scrape(service)
    assert (during["stagecast_sockets"], during["stagecast_streams"]) == (2, 1)
    assert after["stagecast_streams"] == 0
    for kind in ("edit", "generate"):
        assert after[f'stagecast_generations_total{{code="completed",kind="{kind}"}}'] == 1
        assert after[f'stagecast_generations_total{{code="cancelled",kind="{kind}"}}'] == 0
        assert after[f'stagecast_stage_seconds_count{{kind="{kind}",status="started"}}'] == 1
        assert after[f'stagecast_stage_seconds_count{{kind="{kind}",status="composition"}}'] == 1
        assert f'stagecast_stage_seconds_count{{kind="{kind}",status="completed"}}' not in after
    assert after["stagecast_queue_seconds_count"] == 2
    assert after["stagecast_append_seconds_count"] == 6 + 5
    assert after["stagecast_events_sent_total"] == 2 * (6 + 5)
    assert after['stagecast_recoveries_total{result="recovered"}'] == 1
    assert after['stagecast_recoveries_total{result="lost"}'] == 1
    assert after['stagecast_provider_calls_total{provider="local",result="ok"}'] == 2
    assert after['stagecast_refused_total{code="insufficient_credit"}'] == 1
    assert after['stagecast_refused_total{code="not_found"}'] == 1
    assert (after["stagecast_running"], after["stagecast_waiting"], after["stagecast_log_age_seconds"]) == (0, 0, 0)
    assert 0 <= after["stagecast_loop_lag_seconds"] < 60


async def test_with_a_key_only_a_service_may_scrape(tmp_path: Path) -> None:
    async with guarded(tmp_path) as service:
        assert_problem(await ask(service, None, "/metrics"), 401, "unauthenticated")
        assert_problem(await ask(service, token(), "/metrics"), 403, "forbidden")
        assert (await ask(service, SERVICE, "/metrics")).status_code == 200
        assert (await ask(service, SERVICE, "/metrics", "HEAD")).content == b""


async def test_another_address_serves_the_metrics_without_a_token_and_nothing_else(tmp_path: Path) -> None:
    flags = ("--log-level", "info", "--metrics-address", "127.0.0.1:0")
    async with serving(tmp_path, *flags, STAGECAST_JWT_SECRET=SECRET) as service, patient() as http:
        [port] = [port for port in listening_ports(service.process.pid) if not service.url.endswith(f":{port}")]
        own = f"http://127.0.0.1:{port}"
        answer = await http.get(f"{own}/metrics")
        assert "stagecast_running 0.0" in answer.text
        assert (await http.head(f"{own}/metrics")).status_code == 200
        for method, path in (("GET", "/me"), ("GET", "/"), ("POST", "/metrics"), ("GET", "/health/live")):
            assert_problem(await http.request(method, f"{own}{path}"), 404, "not_found")
        handshake = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        handshake["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
        assert (await http.get(f"{own}/socket.io/?EIO=4&transport=websocket", headers=handshake)).status_code == 404
        assert (await http.get(f"{service.url}/metrics")).status_code == 401


def listening_ports(pid: int) -> set[int]:
    """The TCP ports at which this process listens, by Linux."""
    sockets = {path.readlink().name for path in Path(f"/proc/{pid}/fd").iterdir() if "socket" in str(path.readlink())}
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


async def test_where_the_log_does_not_answer_everything_but_the_line_is_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unavailable() -> Counts:
        raise LogUnavailable

    async with fresh_database() as url, running(tmp_path, log=url) as service:
        found = await scrape(service)
        assert 0 <= found["stagecast_log_age_seconds"] < 5
        monkeypatch.setattr(service.service.leases, "count", unavailable)
        assert (await scrape(service)).keys() == found.keys() - {"stagecast_waiting"}


@pytest.mark.parametrize(("seconds", "counts"), [(0.5, [1, 0, 0]), (1, [1, 0, 0]), (1.5, [0, 1, 0]), (10, [0, 0, 1])])
def test_a_histogram_counts_up_to_and_including_each_bound(seconds: float, counts: list[int]) -> None:
    histogram = Histogram((1, 2))
    histogram.observe(seconds)
    assert (histogram.counts, histogram.sum) == (counts, seconds)
