"""The use cases: what a user asks for, and what is in the log afterwards."""

import asyncio
import re
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest

from adapters.memory.quotas import MemoryQuotas
from adapters.sqlite.log import SqliteLog
from domain.errors import (
    Draining,
    Failure,
    IdempotencyMismatch,
    InsufficientCredit,
    InvalidImage,
    LogUnavailable,
    NotFinished,
    NotFound,
    QueueFull,
    Refusal,
    TooManyGenerations,
)
from domain.events import timestamp
from domain.feed import Logged
from domain.generation import Snapshot
from domain.ports.log import Append, History, IdempotencyRecord
from domain.rehydrate import generation_of
from domain.requests import GenerationRequest
from domain.stages import Kind
from support.builders import NOON, EventRecorder, SteppableClock, statuses, temporary_database
from support.doubles import (
    FACE_URL,
    FlakyLog,
    ForwardingLog,
    InMemoryBackend,
    InMemoryUpload,
    Pause,
    ScriptedEditor,
    StartArguments,
    fails,
    start_arguments,
    swap_arguments,
)

# --- starting --------------------------------------------------------------------------------------------


async def test_an_accepted_start_is_in_the_log_and_in_the_queue() -> None:
    backend = InMemoryBackend()
    begun = await backend.start()
    assert (begun.status, begun.sequence, begun.progress, begun.user_id) == ("started", 1, 0, "ada")
    assert await backend.statuses(begun) == ["started"]
    assert (await backend.leases.count()).waiting == 1
    assert await backend.workflow.snapshot("ada", begun.generation_id) == begun


@pytest.mark.parametrize(("kind", "prefix"), [("edit", "edit"), ("generate", "gen")])
async def test_an_id_tells_kind_and_time_and_cannot_be_guessed(kind: Kind, prefix: str) -> None:
    backend = InMemoryBackend()
    begun = await backend.start(start_arguments(kind))
    milliseconds = int(NOON.timestamp() * 1000)
    assert re.fullmatch(rf"{prefix}_{milliseconds}_[a-z0-9]{{16}}", begun.generation_id)


async def test_the_first_event_shows_the_image_url_the_metadata_and_the_balance() -> None:
    backend = InMemoryBackend()
    begun = await backend.start(start_arguments(image_urls=(FACE_URL, "http://pictures.test/2.png"), shop="izmir"))
    [event] = await backend.events(begun)
    assert event["inputImage"] == FACE_URL
    assert event["metadata"] == {"shop": "izmir"}
    assert event["credit"] == 9
    assert list(event)[-1] == "credit"


async def test_a_refused_image_says_which_and_nothing_is_left() -> None:
    backend = InMemoryBackend()
    with pytest.raises(InvalidImage) as refusal:
        await backend.start(
            start_arguments(uploads=[InMemoryUpload(b"one"), InMemoryUpload(b"bad"), InMemoryUpload(b"two")])
        )
    assert refusal.value.index == 1
    assert backend.images.kept == {}
    assert await backend.memory.generations("ada", limit=1) == []
    assert await backend.workflow.credit("ada") == 10


async def test_an_upload_that_cannot_be_stored_starts_nothing() -> None:
    backend = InMemoryBackend()
    backend.images.refused = {b"two"}
    with pytest.raises(Failure) as failure:
        await backend.start()
    assert failure.value.code == "storage_failed"
    assert backend.images.kept == {}
    assert (await backend.leases.count()).waiting == 0


async def test_without_credit_no_image_is_decoded() -> None:
    backend = InMemoryBackend(credits=0)
    with pytest.raises(InsufficientCredit):
        await backend.start()
    assert backend.images.saved == []


async def test_of_two_starts_with_credit_for_one_one_is_accepted() -> None:
    backend = InMemoryBackend(credits=1, line=ForwardingLog)
    results = await asyncio.gather(backend.start(), backend.start(), return_exceptions=True)
    assert {type(result) for result in results} == {Snapshot, InsufficientCredit}
    assert await backend.workflow.credit("ada") == 0
    assert len(backend.images.kept) == 2


async def test_a_full_queue_refuses_starts_once_those_that_are_about_to_join_have_joined() -> None:
    backend = InMemoryBackend(max_waiting=3, line=ForwardingLog)
    gate = asyncio.Event()
    files = [InMemoryUpload(b"x", gate) for _ in range(3)]
    starting = [asyncio.create_task(backend.start(start_arguments(uploads=[file]))) for file in files]
    for file in files:
        await file.awaited.wait()
    fourth = asyncio.create_task(backend.start())
    done, _ = await asyncio.wait([fourth], timeout=0.05)
    assert not done
    gate.set()
    await asyncio.gather(*starting)
    with pytest.raises(QueueFull):
        await fourth
    with pytest.raises(QueueFull):
        await backend.start(user_id="bob")
    assert (await backend.leases.count()).waiting == 3


async def test_racing_starts_respect_the_limit_of_unfinished_generations_per_user() -> None:
    backend = InMemoryBackend(max_per_user=2, line=ForwardingLog)
    results = await asyncio.gather(*(backend.start() for _ in range(8)), return_exceptions=True)
    assert [type(result) for result in results].count(Snapshot) == 2
    assert [type(result) for result in results].count(TooManyGenerations) == 6
    await backend.start(user_id="bob")
    assert len(backend.images.kept) == 6


async def test_while_draining_only_known_idempotency_keys_are_answered() -> None:
    backend = InMemoryBackend()
    begun = await backend.start(key="k")
    backend.workflow.draining = True
    with pytest.raises(Draining):
        await backend.start()
    assert await backend.start(key="k") == begun


# --- idempotency -----------------------------------------------------------------------------------------


async def test_a_key_used_again_returns_the_generation_as_it_is_now() -> None:
    backend = InMemoryBackend()
    async with backend.open():
        begun = await backend.start(key="k")
        await backend.settled()
        again = await backend.start(key="k")
        assert (again.generation_id, again.status) == (begun.generation_id, "completed")
        assert len(backend.editor.calls) == 1
        await backend.check()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(start_arguments(prompt="a blue hat"), id="prompt"),
        pytest.param(start_arguments("generate"), id="kind"),
        pytest.param(start_arguments(uploads=[InMemoryUpload(b"two"), InMemoryUpload(b"one")]), id="order of files"),
        pytest.param(start_arguments(uploads=[InMemoryUpload(b"onetwo")]), id="boundaries of files"),
        pytest.param(start_arguments(uploads=[InMemoryUpload(b"one"), InMemoryUpload(b"tw0")]), id="content of a file"),
        pytest.param(start_arguments(image_urls=(FACE_URL,)), id="urls"),
        pytest.param(start_arguments(note="x"), id="metadata"),
    ],
)
async def test_a_key_used_for_another_request_is_a_mismatch(other: StartArguments) -> None:
    backend = InMemoryBackend()
    await backend.start(key="k")
    kept = dict(backend.images.kept)
    with pytest.raises(IdempotencyMismatch):
        await backend.start(other, key="k")
    assert backend.images.kept == kept
    assert await backend.workflow.credit("ada") == 9


async def test_a_key_used_with_an_earlier_version_is_still_recognised() -> None:
    backend = InMemoryBackend()
    wanted = start_arguments(uploads=[InMemoryUpload(b"one")], image_urls=(FACE_URL,), face_swap=True, shop="izmir")
    begun = await backend.start(wanted, key="k")
    known = await backend.memory.find_by_idempotency_key("ada", "k")
    assert known is not None
    # As stored by the version of schema 3.
    assert known.fingerprint == "e3dbba360e945bc30d55bf3f0aa2765f32dcae34b8afbd4bb7108bb8e314ffc5"
    assert (await backend.start(wanted, key="k")).generation_id == begun.generation_id


async def test_a_stored_request_of_a_later_version_is_read_without_what_it_added() -> None:
    stored = b'{"prompt":"a red hat","options":{"quality":"low","style":"oil"},"face":1,"images":["a"]}'
    request = GenerationRequest.decode(stored)
    assert (request.prompt, request.options.quality, request.images) == ("a red hat", "low", ("a",))


async def test_twenty_parallel_starts_with_one_key_are_one_generation() -> None:
    backend = InMemoryBackend(line=ForwardingLog)
    begun = await asyncio.gather(*(backend.start(key="k") for _ in range(20)))
    assert len({snapshot.generation_id for snapshot in begun}) == 1
    assert await backend.workflow.credit("ada") == 9
    assert (await backend.leases.count()).waiting == 1
    assert len(backend.images.kept) == 2


async def test_racing_starts_with_one_key_and_the_last_credit_are_one_generation() -> None:
    backend = InMemoryBackend(credits=1, line=ForwardingLog)

    async def late(turns: int) -> Snapshot:
        for _ in range(turns):
            await asyncio.sleep(0)
        return await backend.start(start_arguments(uploads=[]), key="k")

    begun = await asyncio.gather(*map(late, range(20)))
    assert len({snapshot.generation_id for snapshot in begun}) == 1


async def test_racing_starts_with_one_key_and_two_requests_are_one_generation_and_a_mismatch() -> None:
    backend = InMemoryBackend(line=ForwardingLog)
    results = await asyncio.gather(
        backend.start(start_arguments(prompt="one"), key="k"),
        backend.start(start_arguments(prompt="two"), key="k"),
        return_exceptions=True,
    )
    assert {type(result) for result in results} == {Snapshot, IdempotencyMismatch}
    assert len(backend.images.kept) == 2


# --- a caller that goes away, a log that does not answer ----------------------------------------------------


async def test_a_start_that_the_log_never_received_is_refused_and_leaves_nothing() -> None:
    backend = InMemoryBackend(line=lambda log: FlakyLog(log, ["before"] * 10))
    with pytest.raises(LogUnavailable):
        await backend.start()
    async with asyncio.timeout(20):
        while backend.images.kept:
            await asyncio.sleep(0)
    assert (await backend.leases.count()).waiting == 0
    assert await backend.memory.generations("ada", limit=1) == []


async def test_a_start_whose_reply_was_lost_runs_or_was_never_made() -> None:
    """Either the caller got a 202 and it is done, or a 503 and there is nothing, or what there is ends refunded."""
    backend = InMemoryBackend(line=lambda log: FlakyLog(log, ["after"]))
    async with backend.open():
        try:
            await backend.start()
        except LogUnavailable:
            assert await backend.memory.generations("ada", limit=1) == []
        await backend.settled()
        await backend.check()


async def test_a_start_that_is_committed_after_its_503_runs_with_its_pictures() -> None:
    arrived = asyncio.Event()

    class Watched(ForwardingLog):
        async def append(self, entry: Append) -> Logged:
            arrived.set()
            return await super().append(entry)

    async with temporary_database() as database:
        clock = SteppableClock()
        log = SqliteLog(database, credits=10, clock=clock)
        backend = InMemoryBackend(line=lambda _: Watched(log), clock=clock)
        async with backend.open(), asyncio.timeout(20):
            # The start and what holds the disk up are written in one transaction, after what comes first.
            first, disk = threading.Event(), threading.Event()
            writing = [asyncio.create_task(database.write(lambda _: first.wait(20)))]
            starting = asyncio.create_task(backend.start(key="k"))
            await arrived.wait()
            await asyncio.sleep(0)  # It is passed on a moment later.
            await asyncio.sleep(0)
            writing.append(asyncio.create_task(database.write(lambda _: disk.wait(20))))
            await asyncio.sleep(0)
            first.set()
            with pytest.raises(LogUnavailable):
                await starting
            assert await log.generations("ada", limit=1) == []
            disk.set()
            await asyncio.gather(*writing)
            while not (histories := await log.generations("ada", active=False, limit=1)):
                await asyncio.sleep(0.01)
            assert statuses(histories[0])[-1] == "completed"
            assert (await backend.start(key="k")).generation_id == histories[0].generation_id
            assert {name.rpartition("-")[0] for name in backend.images.kept} == {histories[0].generation_id}


async def test_a_key_whose_generation_is_removed_meanwhile_starts_a_new_one() -> None:
    class Removing(ForwardingLog):
        armed = False

        async def find_by_idempotency_key(self, user_id: str, key: str) -> IdempotencyRecord | None:
            known = await super().find_by_idempotency_key(user_id, key)
            if known is not None and self.armed:
                await self.inner.remove(known.generation_id, retention=False)
            return known

    backend = InMemoryBackend(line=Removing)
    async with backend.open():
        first = await backend.start(key="k")
        await backend.settled()
        assert isinstance(backend.log, Removing)
        backend.log.armed = True
        again = await backend.start(key="k")
        assert again.status == "started"
        assert again.generation_id != first.generation_id


# --- cancel ----------------------------------------------------------------------------------------------


async def test_a_waiting_generation_is_cancelled_at_once_and_never_run() -> None:
    backend = InMemoryBackend()
    begun = await backend.start()
    assert await backend.cancel(begun) == "cancelled"
    event = (await backend.events(begun))[-1]
    assert (event["status"], event["code"], event["failedStage"]) == ("failed", "cancelled", "started")
    assert event["credit"] == 10
    assert await backend.cancel(begun) == "already_finished"
    async with backend.open():
        await backend.settled()
    assert backend.composer.calls == []
    await backend.check()


async def test_two_cancels_at_once_are_one_end_and_one_refund() -> None:
    backend = InMemoryBackend(line=ForwardingLog)
    begun = await backend.start()
    outcomes = await asyncio.gather(backend.cancel(begun), backend.cancel(begun))
    assert sorted(outcomes) == ["already_finished", "cancelled"]
    assert await backend.statuses(begun) == ["started", "failed"]
    assert await backend.workflow.credit("ada") == 10


async def test_a_cancel_that_is_overtaken_ends_the_generation_where_it_is_then() -> None:
    backend = InMemoryBackend(line=ForwardingLog)
    begun = await backend.start()
    recorder = EventRecorder(backend.memory, backend.clock)
    started = generation_of(await backend.workflow.history("ada", begun.generation_id))
    assert isinstance(backend.log, ForwardingLog)
    backend.log.overtake = lambda: recorder.move(started, "composition")
    assert await backend.cancel(begun) == "cancelled"
    assert await backend.statuses(begun) == ["started", "composition", "failed"]


async def test_a_cancel_that_is_overtaken_by_the_end_comes_too_late() -> None:
    backend = InMemoryBackend(line=ForwardingLog)
    begun = await backend.start()
    recorder = EventRecorder(backend.memory, backend.clock)
    started = generation_of(await backend.workflow.history("ada", begun.generation_id))
    assert isinstance(backend.log, ForwardingLog)
    backend.log.overtake = lambda: recorder.finish(started)
    assert await backend.cancel(begun) == "already_finished"
    assert (await backend.statuses(begun))[-1] == "completed"
    assert await backend.workflow.credit("ada") == 9


# --- other people's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["cancel", "delete", "history", "snapshot"])
async def test_another_users_generation_looks_like_an_unknown_one(use: str) -> None:
    backend = InMemoryBackend()
    begun = await backend.start()
    for user_id, generation_id in (("bob", begun.generation_id), ("ada", "edit_1_unknown")):
        with pytest.raises(NotFound):
            await getattr(backend.workflow, use)(user_id, generation_id)
    assert await backend.statuses(begun) == ["started"]


# --- delete ----------------------------------------------------------------------------------------------


async def test_deleting_removes_history_and_pictures_at_once() -> None:
    backend = InMemoryBackend()
    async with backend.open():
        gone, kept = await backend.make(), await backend.make()
    with_both = len(backend.images.kept)
    await backend.workflow.delete("ada", gone.generation_id)
    assert len(backend.images.kept) == with_both // 2
    assert not [name for name in backend.images.kept if name.startswith(gone.generation_id)]
    with pytest.raises(NotFound):
        await backend.workflow.snapshot("ada", gone.generation_id)
    with pytest.raises(NotFound):
        await backend.workflow.delete("ada", gone.generation_id)
    assert await backend.workflow.snapshot("ada", kept.generation_id) == kept
    assert await backend.workflow.credit("ada") == 8


async def test_a_running_generation_cannot_be_deleted() -> None:
    backend = InMemoryBackend()
    begun = await backend.start()
    with pytest.raises(NotFinished):
        await backend.workflow.delete("ada", begun.generation_id)
    assert await backend.statuses(begun) == ["started"]
    assert len(backend.images.kept) == 2


# --- reading -----------------------------------------------------------------------------------------------


async def test_a_finished_generation_says_when_it_expires_and_a_running_one_does_not() -> None:
    backend = InMemoryBackend()
    async with backend.open():
        done = await backend.make()
    assert done.expires_at == timestamp(NOON + timedelta(days=1))
    assert (await backend.start()).expires_at is None


async def test_pages_lead_from_the_newest_to_the_oldest() -> None:
    backend = InMemoryBackend()
    begun = [await backend.start() for _ in range(5)]
    await backend.cancel(begun[2])
    newest_first = [snapshot.generation_id for snapshot in reversed(begun)]
    for limit in (1, 2, 4, 5, 6):
        sent: list[str] = []
        before: int | None = None
        while True:
            page = await backend.workflow.page("ada", active=None, before=before, limit=limit)
            assert 1 <= len(page.generations) <= limit
            sent += [snapshot.generation_id for snapshot in page.generations]
            before = page.next
            if before is None:
                break
        assert sent == newest_first
    finished = await backend.workflow.page("ada", active=False, before=None, limit=10)
    assert [snapshot.generation_id for snapshot in finished.generations] == [begun[2].generation_id]
    active = await backend.workflow.page("ada", active=True, before=None, limit=10)
    assert len(active.generations) == 4


async def test_recent_has_all_running_and_the_last_twenty_ended_generations() -> None:
    backend = InMemoryBackend(credits=None, max_per_user=1_000)
    oldest = await backend.start()
    for _ in range(25):
        await backend.cancel(await backend.start())
    newest = await backend.start()
    recent = await backend.workflow.recent("ada")
    ids = [snapshot.generation_id for snapshot in recent]
    assert (ids[0], ids[-1], len(ids)) == (newest.generation_id, oldest.generation_id, 22)
    assert ids == sorted(ids, reverse=True)


async def test_recent_has_a_generation_once_that_ends_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = InMemoryBackend()
    begun, log = await backend.start(), backend.workflow.log
    generations = log.generations

    async def read_and_end(user_id: str, *, active: bool | None = None, **page: Any) -> Sequence[History]:
        found = await generations(user_id, active=active, **page)
        monkeypatch.undo()
        await backend.cancel(begun)
        return found

    monkeypatch.setattr(log, "generations", read_and_end)
    recent = await backend.workflow.recent("ada")
    assert [(each.generation_id, each.status) for each in recent] == [(begun.generation_id, "failed")]


async def test_without_balances_no_start_is_refused_for_credit() -> None:
    backend = InMemoryBackend(credits=None)
    async with backend.open():
        done = await backend.make()
    assert await backend.workflow.credit("ada") is None
    assert not [event for event in await backend.events(done) if "credit" in event]


async def test_every_refusal_has_a_code_and_a_sentence_of_its_own() -> None:
    kinds = [kind for kind in Refusal.__subclasses__() if kind.__module__ == "domain.errors"]
    codes = [kind.code for kind in kinds if kind.__name__ != "ImageRefusal"]
    assert len(set(codes)) == len(codes)
    assert all(str(kind.__new__(kind)).endswith(".") for kind in kinds)


async def test_a_cancelled_generation_in_the_queue_blocks_no_other() -> None:
    pause = Pause()
    backend = InMemoryBackend(max_running=1, editor=ScriptedEditor(pause))
    async with backend.open():
        first = await backend.start()
        await pause.reached.wait()
        second, third = await backend.start(), await backend.start(swap_arguments())
        assert await backend.cancel(second) == "cancelled"
        pause.released.set()
        await backend.settled()
        assert [(await backend.statuses(one))[-1] for one in (first, second, third)] == [
            "completed",
            "failed",
            "completed",
        ]
        await backend.check()


async def test_a_cancellation_in_the_log_is_told_although_the_queue_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = InMemoryBackend()

    async def unavailable(generation_id: str) -> bool:
        raise LogUnavailable

    begun = await backend.start()
    monkeypatch.setattr(backend.workflow.leases, "withdraw", unavailable)
    assert await backend.cancel(begun) == "cancelled"
    assert (await backend.statuses(begun))[-1] == "failed"
    async with backend.open():  # Whoever claims it finds that it has ended.
        await backend.make()
        await backend.check()


async def test_a_cancelled_waiting_generation_makes_room_in_the_queue() -> None:
    backend = InMemoryBackend(max_waiting=1)
    await backend.cancel(await backend.start())
    await backend.start()


async def test_a_failed_generation_gives_the_credit_back_for_the_next() -> None:
    backend = InMemoryBackend(credits=1, editor=ScriptedEditor(fails("provider_rejected")))
    async with backend.open():
        for _ in range(3):
            assert (await backend.make()).status == "failed"
        await backend.check()


# --- what cannot be read, and counts that fail -------------------------------------------------------------


async def test_a_generation_of_which_nothing_can_be_read_is_listed_and_can_be_cancelled() -> None:
    backend = InMemoryBackend()
    start, _ = EventRecorder(backend.memory).prepare_start()
    await backend.memory.append(start._replace(event=b'{"generationId": broken', credit=None))
    generation_id = start.generation_id
    assert [each.generation_id for each in await backend.workflow.recent("ada")] == [generation_id]
    page = await backend.workflow.page("ada", active=None, before=None, limit=5)
    assert [each.status for each in page.generations] == ["started"]
    assert await backend.workflow.cancel("ada", generation_id) == "cancelled"
    assert (await backend.memory.standing("ada")).unfinished == 0
    assert [each.code for each in await backend.workflow.recent("ada")] == ["cancelled"]


class UncountableQuotas(MemoryQuotas):
    async def forget_stored(self, generation_id: str) -> None:
        raise LogUnavailable


@pytest.mark.parametrize("whole", [False, True])
async def test_pictures_are_removed_although_their_bytes_cannot_be_discounted(whole: bool) -> None:
    backend = InMemoryBackend()
    async with backend.open():
        begun = await backend.make()
        assert backend.images.kept
        backend.stored.quotas = UncountableQuotas()
        if whole:
            await backend.workflow.remove_user("ada")
        else:
            await backend.workflow.delete("ada", begun.generation_id)
    assert not backend.images.kept
    assert await backend.memory.generation(begun.generation_id) is None


async def test_a_deletion_that_the_log_did_not_answer_can_be_repeated() -> None:
    backend = InMemoryBackend()
    async with backend.open():
        begun = await backend.make()
        remove = backend.memory.remove

        async def unavailable(generation_id: str, *, retention: bool) -> bool:
            backend.memory.remove = remove  # type: ignore[method-assign]
            raise LogUnavailable

        backend.memory.remove = unavailable  # type: ignore[method-assign]
        with pytest.raises(LogUnavailable):
            await backend.workflow.delete("ada", begun.generation_id)
        await backend.workflow.delete("ada", begun.generation_id)
    assert not backend.images.kept
    assert await backend.memory.generation(begun.generation_id) is None


async def test_a_request_that_is_received_while_the_service_drains_and_then_closes_is_refused() -> None:
    backend = InMemoryBackend()
    receiving, cleaned_up = asyncio.Event(), asyncio.Event()

    async def receive() -> None:
        with await backend.workflow.arriving("ada", None):
            try:
                receiving.set()
                await asyncio.get_running_loop().create_future()
            finally:
                await cleaned_up.wait()

    request = asyncio.create_task(receive())
    await receiving.wait()
    backend.workflow.drain()
    await asyncio.sleep(0)
    await backend.workflow.close()
    cleaned_up.set()
    with pytest.raises(Draining):
        await request
