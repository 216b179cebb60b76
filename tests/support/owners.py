"""Users who do all kinds of things at random with a service that may be killed, and what has to hold for them then."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from domain.events import Event
from domain.requests import GenerationRequest
from domain.stages import FLOWS
from support.builders import fold
from support.deployment import ENDS, ReconnectingDevice, RequestedGeneration, RetryingClient
from support.node import Browser
from support.openai_server import OpenAIServer, completed, partial, stream
from support.openai_server import picture as drawing
from support.pictures import GREEN, solid
from support.provider_faults import Answer, Origin, Request, raw, then, whole
from support.wire import JSON

CREDITS: Final = 1_000_000
#: The stages of the paid editor. The face swap is the free one.
PAID: Final = ("openai_editing", "ai_generation")
#: What an external pipeline reports, one after the other.
_REPORTS: Final[Sequence[JSON]] = (
    {"status": "composition"},
    {"status": "composition_completed"},
    {"status": "ai_generation"},
    {"status": "ai_generation", "progress": 80, "message": "Nearly there."},
    {"status": "completed", "generatedImageUrl": "https://pictures.test/a.png"},
)


class Provider:
    """Draws for OpenAI, in its own time, and counts what each prompt has cost."""

    def __init__(self, server: OpenAIServer) -> None:
        self._server = server
        self._respond = server.origin.respond
        self._chance = random.Random(4)
        self._drawing = drawing("64x96")
        self.calls = Counter[str]()
        server.origin.respond = self

    def __call__(self, request: Request) -> Answer:
        self._respond(request)
        # What is not needed any more would fill the memory.
        self._server.origin.requests.clear()
        prompt = self._server.calls.pop().fields["prompt"]
        self.calls[prompt.rpartition("\n")[2]] += 1
        first, second = self._pause(), self._pause()
        return then(first, stream(partial(0, self._drawing)), second, raw(completed(self._drawing)))

    def _pause(self) -> Answer:
        seconds = self._chance.uniform(0, 0.25)

        async def pause(_: asyncio.StreamWriter) -> None:
            await asyncio.sleep(seconds)

        return pause


class Owner:
    """A user with two devices, who does all kinds of things at random until it is over."""

    def __init__(
        self, name: str, caller: RetryingClient, phone: ReconnectingDevice, browser: Browser, face: str
    ) -> None:
        self.name = name
        self.phone = phone
        self.browser = browser
        self.over = False
        #: By key, as are the grants.
        self.orders: dict[str, RequestedGeneration] = {}
        self.grants: dict[str, int] = {}
        #: Whose deletion was asked for, and how they had ended.
        self.deleted: dict[str, str] = {}
        #: What was answered to external pipelines.
        self.acknowledged: list[JSON] = []
        #: What it is at, and has to be there until that is done.
        self._busy: list[str] = []
        self._caller = caller
        self._face = face
        self._chance = random.Random(name)

    @property
    def started(self) -> set[str]:
        """What was answered with 202."""
        return {each.generation_id for each in self.orders.values() if each.generation_id}

    def ended(self) -> dict[str, str]:
        """How those ended of whose end both devices know."""
        both = [
            {event["generationId"]: event["status"] for event in events if event["status"] in ENDS}
            for events in (self.phone.events, self.received)
        ]
        return {each: status for each, status in both[0].items() if each in both[1]}

    @property
    def received(self) -> list[JSON]:
        """What the official client was sent."""
        return [event for _, event in self.browser.events]

    async def live(self, pause: float) -> None:
        deeds: Sequence[Callable[[], Awaitable[None]]] = (
            self._start,
            self._report,
            self._cancel,
            self._delete,
            self._grant,
        )
        while not self.over:
            await asyncio.sleep(self._chance.uniform(0, 2 * pause))
            [deed] = self._chance.choices(deeds, (60, 10, 8, 8, 10))
            await deed()

    async def _start(self) -> None:
        if len(self.started) - len(self.ended()) < 3:
            kind = self._chance.choice(("edit", "edit", "generate"))
            swap = kind == "edit" and self._chance.random() < 0.6
            await self._order(kind, {"imageUrls": json.dumps([self._face])} if swap else {}, external=False)

    async def _order(self, kind: str, fields: JSON, *, external: bool) -> str:
        order = RequestedGeneration(f"{self.name} {len(self.orders)}", kind, fields, external)
        self.orders[order.key] = order
        return await order.start(self._caller, self.name)

    async def _report(self) -> None:
        """Do the work of a generation, and report it; give up now and then."""
        generation_id = await self._order("generate", {}, external=True)
        path = f"/generations/{generation_id}/transitions"
        with self._at(generation_id):
            for sequence, report in enumerate(_REPORTS, 2):
                if self._chance.random() < 0.05:
                    report = {"status": "failed", "error": "It broke."}
                answer = await self._caller.ask("POST", path, self.name, json={**report, "sequence": sequence})
                assert answer.status_code == 200, answer.text
                self.acknowledged.append(answer.json())
                if report["status"] in ENDS:
                    return

    async def _cancel(self) -> None:
        own = {each.generation_id for each in self.orders.values() if not each.external and each.generation_id}
        if left := sorted(own - set(self.ended())):
            generation_id = self._chance.choice(left)
            with self._at(generation_id):
                answer = await self._caller.ask("POST", f"/generations/{generation_id}/cancel", self.name)
                assert answer.json()["outcome"] in ("cancelled", "already_finished"), answer.text

    @contextmanager
    def _at(self, generation_id: str) -> Iterator[None]:
        self._busy.append(generation_id)
        try:
            yield
        finally:
            self._busy.remove(generation_id)

    async def _delete(self) -> None:
        # What is deleted before its answer has come would be started, or asked for, in vain.
        free = self.started - set(self.deleted) - set(self._busy)
        ended = {each: status for each, status in self.ended().items() if each in free}
        if ended:
            generation_id = self._chance.choice(sorted(ended))
            self.deleted[generation_id] = ended[generation_id]
            answer = await self._caller.ask("DELETE", f"/generations/{generation_id}", self.name)
            assert answer.status_code in (204, 404), answer.text  # 404: it was made, and its answer was lost.

    async def _grant(self) -> None:
        key = f"grant {len(self.grants)}"
        self.grants[key] = self._chance.randint(1, 9)
        path, amount = f"/users/{self.name}/credit", {"amount": self.grants[key]}
        answer = await self._caller.ask("POST", path, self.name, key=key, json=amount)
        assert answer.status_code == 200, answer.text


def face_site() -> Origin:
    """Serves a face, after a delay."""
    data, chance = solid(GREEN).data, random.Random(4)

    async def pause(_: asyncio.StreamWriter) -> None:
        await asyncio.sleep(chance.uniform(0, 0.1))

    return Origin(lambda _: then(pause, whole(data, media_type="image/png")))


def returns_of(browser: Browser) -> list[bool]:
    """Of each connection but the first, whether it was recovered."""
    return [line["recovered"] for line in browser.on("connect")[1:]]


async def check_owner(owner: Owner, caller: RetryingClient, calls: Mapping[str, int]) -> None:
    """I1 to I7 for a user, by HTTP and by what the devices were sent."""
    name, gone = owner.name, set(owner.deleted)
    feed = await caller.feed(name, owner.phone.beginning)
    # Of what is deleted both knew the end before.
    await owner.phone.until(lambda: len(_but(owner.phone.events, gone)) >= len(feed))
    await owner.browser.until(lambda: len(_but(owner.received, gone)) >= len(feed))
    assert all(returns_of(owner.browser)), "the official client was not recovered"
    assert _but(owner.phone.events, gone) == feed, "a device was sent something else"
    assert owner.received == owner.phone.events
    snapshots = {each["generationId"]: each for each in await caller.generations(name)}
    assert set(snapshots) == owner.started - gone, "not what was answered with 202"
    kept = Counter(owner.deleted.values())["completed"]
    for order in owner.orders.values():
        if order.generation_id in gone:
            continue
        history = [event for event in feed if event["generationId"] == order.generation_id]
        assert await caller.events(order.generation_id, name) == history
        assert [event["sequence"] for event in history] == list(range(1, len(history) + 1))
        assert [event["status"] in ENDS for event in history] == [False] * (len(history) - 1) + [True]
        progress = [event["progress"] for event in history]
        assert progress == sorted(progress)
        flow = FLOWS["edit" if order.kind == "edit" else "generate"]
        entered = [event["status"] for event in history if event["message"] == flow[event["status"]].message]
        assert len(entered) == len(set(entered)), "a stage was entered twice"
        assert history[-1].get("faceSwapError", {}).get("code") != "interrupted", "free work was not repeated"
        assert _fold(order, name, history) == {**snapshots[order.generation_id], "expiresAt": None}
        kept += history[-1]["status"] == "completed"
        stages = {event["status"] for event in history}
        paid = stages & {"openai_editing", "ai_generation"} and not order.external
        assert calls.get(order.key, 0) <= bool(paid), "paid for twice"
        if stages & {"openai_editing_completed", "completed"} and not order.external:
            assert calls[order.key] == 1
        assert await order.start(caller, name) == order.generation_id
    assert (await caller.get("/me", name))["credit"] == CREDITS + sum(owner.grants.values()) - kept
    assert len(await caller.generations(name)) == len(snapshots)
    await _check_cursors(owner, caller)


def _but(events: Iterable[JSON], gone: Collection[str]) -> list[JSON]:
    return [event for event in events if event["generationId"] not in gone]


def _fold(order: RequestedGeneration, user: str, history: Sequence[JSON]) -> JSON:
    request = GenerationRequest(prompt=order.key, face_swap="imageUrls" in order.fields)
    events = [Event.model_validate(event) for event in history]
    kind = history[0]["kind"]
    whole = fold(order.generation_id, kind, user, request, events)
    return {**whole.snapshot().model_dump(by_alias=True, exclude_none=True), "expiresAt": None}


async def _check_cursors(owner: Owner, caller: RetryingClient) -> None:
    """The cursors of all lives are good, but where a deletion took an end away that they had yet to be told of."""
    events, wire = owner.phone.events, owner.phone.wire
    for place in random.Random(owner.name).sample(range(1, len(events) + 1), min(20, len(events))):
        begun = {event["generationId"] for event in events[:place] if event["status"] not in ENDS}
        ended = {event["generationId"] for event in events[:place] if event["status"] in ENDS}
        if not (begun - ended) & set(owner.deleted):
            rest = await caller.feed(owner.name, wire.cursor_after(place))
            assert rest == _but(events[place:], owner.deleted)
