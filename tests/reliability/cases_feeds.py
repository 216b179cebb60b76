"""The cases of frames, cursors, retention, and a killed memory log."""

import asyncio
import contextlib
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from typing import Final

from reliability.cases import Trial, case, caught_up, check, flowing
from support.case_server import HostProcess, ServedService
from support.deployment import files_in, free_port
from support.processes import together
from support.wire import Wire, frame, hang_up

#: What a client may be answered with where it does not get what it asks for.
_CODES: Final = {"unauthenticated", "invalid_token", "token_expired", "user_mismatch"} | {
    *("bad_request", "not_found", "unavailable")
}

_GOOD: Final = (
    '42{id}["authenticate",{"userId":"mallory"}]',
    '42{id}["authenticate",{"userId":"mallory","cursor":"7c6b789e7e26.1.1.1","recovery":false}]',
    '42{id}["subscribe_to_generation",{"generationId":"edit_1_0000000000000000","after":0}]',
)

_ODD: Final = (
    *("42[]", "42{}", "42", "42[7]", "42[", "40", "41", "43", "44{}", "45-", "48", "4", "", "x", "0{}", "1", "5", "6"),
    *('42{id}["connect",{}]', '42{id}["disconnect",1]', '42{id}["*",{}]', '42{id}["__proto__",{}]', "2probe"),
    *('42{id}["authenticate"]', '42{id}["authenticate",1,2,3]', '42{id}["authenticate",null]', '42{id}["",{}]'),
    *('42/admin,{id}["authenticate",{"userId":"ada"}]', "40/admin,", "41/admin,", "43/admin,7[]", "461-1[{}]"),
    *('451-["x",{"_placeholder":true,"num":0}]', '42{id}["message",{}]', '42{id}["authenticate",{"userId":[]}]'),
)

_LONG: Final = (
    *('42["authenticate",{"userId":' + "[" * 20_000, "42" + "[" * 30_000, '42["x",' + '{"a":' * 8_000),
    *('42{id}["authenticate",{"userId":"' + "a" * 60_000 + '"}]', "42" + "9" * 4_000 + '["x"]', "42" + "9" * 50_000),
)

_JUNK: Final = '[]{}",:0123456789-/eEtfn\\\x1e\x00é🎭 '


@case(
    14,
    "{frames} frames: reserved names, wrong arguments, other namespaces, deep JSON, and mutants of all; {large} of "
    "17 MB; {floods} floods of binary frames",
    "closed or a typed nack; memory at most +10 MB; tables empty, no path or traceback in any answer",
    quick={"frames": 180, "large": 3, "floods": 1},
    long={"frames": 10_000, "large": 40, "floods": 20},
)
async def frames_that_make_no_sense(trial: Trial, frames: int, large: int, floods: int) -> None:
    chance = random.Random(14)
    odd = [each.replace("{id}", "7") for each in _ODD + _LONG]
    odd += [_mutant(chance) for _ in range(frames - len(odd))]
    async with trial.serve() as served:
        neighbour = await served.wire("ada")
        await together(lambda _: _throw(served, _GOOD[0]), frames // 10, at_once=16)
        before = await served.figures(reset=True)
        async with flowing(served, "ada", rate=50, count=max(10, frames // 100)):
            thrown = await together(lambda n: _throw(served, odd[n]), len(odd), at_once=16)
            await together(lambda n: _throw_large(served, n), large, at_once=4)
            await together(lambda _: _pour_binary(served), floods, at_once=4)
        after = await served.until(lambda figures: figures.devices == 1)
        nacks = 0
        for wire in thrown:
            assert not wire.disconnected_by_server
            sent = repr((wire.acks, wire.refused, wire.notices))
            assert not any(word in sent for word in ("Traceback", str(trial.folder), "/src/")), sent
            for ack in wire.acks.values():
                nacks += ack["ok"] is not True
                assert ack["ok"] is True or (set(ack) == {"ok", "code", "message"} and ack["code"] in _CODES), ack
        trial.report("sockets closed", sum(not wire.survived for wire in thrown))
        trial.report("typed nacks", nacks)
        trial.at_most("memory", ((await served.figures(reset=True)).rss - before.rss) / 1_000, 10, "MB")
        trial.at_most("memory at its peak", (after.peak - before.rss) / 1_000, 10, "MB")
        trial.report("lag of the event loop", after.lag * 1_000, "ms")
        await check(served, [neighbour])


def _mutant(chance: random.Random) -> str:
    """A good frame, or an odd one, with something put in, left out or doubled."""
    text = chance.choice(_GOOD + _ODD).replace("{id}", str(chance.randrange(1_000)))
    for _ in range(chance.randint(1, 4)):
        at, end = sorted((chance.randrange(len(text) + 1), min(len(text), chance.randrange(len(text) + 8))))
        junk = "".join(chance.choices(_JUNK, k=chance.randrange(6)))
        text = chance.choice((text[:at] + junk + text[at:], text[:at] + text[end:], text[:end] + text[at:]))
    return text


async def _throw(served: ServedService, text: str) -> Wire:
    """Send a frame, as text or as binary, and then a good one: either that is answered, or the socket is closed."""
    wire = await served.wire("mallory")
    wire.send(text.encode() if len(text) % 20 == 7 else text, '42777777["authenticate",{"userId":"mallory"}]')
    with contextlib.suppress(ConnectionResetError):
        await wire.until_asked(777_777)
        wire.survived = True
    await hang_up([wire])
    return wire


async def _throw_large(served: ServedService, number: int) -> None:
    """17 MB: in one frame, text or binary, in many pieces, or in a polling request."""
    data = bytes(17_000_000)
    if number % 4 == 3:
        opening = await served.http.get("/socket.io/?EIO=4&transport=polling")
        sid = json.loads(opening.text[1:])["sid"]
        answer = await served.http.post(f"/socket.io/?EIO=4&transport=polling&sid={sid}", content=data)
        assert answer.status_code in (400, 413)
        assert len(answer.text) < 100, answer.text
        return
    wire = await served.wire("mallory")
    if number % 4 == 2:
        wire.write(frame(bytes(60_000), opcode=1, final=False), *[frame(bytes(60_000), opcode=0, final=False)] * 280)
    else:
        wire.write(frame(data, opcode=1 + number % 2))
    await wire.until_gone()


async def _pour_binary(served: ServedService) -> None:
    """Binary frames without end, announced as attachments."""
    wire = await served.wire("mallory")
    while not wire.gone.is_set():
        # No more than the line takes: what the server does not read would pile up in here.
        if wire.transport.get_write_buffer_size() < 1_000_000:
            wire.send('451-["authenticate",{"_placeholder":true,"num":0}]', *[bytes(60_000)] * 20)
        await asyncio.sleep(0.001)


@case(
    16,
    "from each of {events} cursors a socket attaches, and some without one, while the events flow",
    "no gap, no duplicate at the seam",
    quick={"events": 200, "rate": 250},
    long={"events": 1_000, "rate": 20},
)
async def attach_from_every_cursor(trial: Trial, events: int, rate: float) -> None:
    chance = random.Random(16)
    async with trial.serve(sockets=events) as served:
        reference = await served.wire("ada")
        beginning = reference.notices[0][1]["cursor"]

        async def flow() -> None:
            for _ in range(events // 10 - 1):
                await served.flood("ada", 10, filler=100, rate=rate)
            # Who comes without a cursor is told of what still runs or comes: it must not come after all of it.
            await asyncio.wait(comers[19::20])
            await served.flood("ada", 10, filler=100, rate=rate)

        async def attach(place: int) -> Wire:
            # Some come at the head, and some have a stretch to read first; all while more comes.
            await reference.until_received(min(place + chance.choice((0, 0, 1, 5, 40)), events - 10), 600)
            if place % 20 == 19:
                return await served.wire("ada")  # It wants what still runs, and what comes.
            wire = await served.wire("ada", cursor=reference.cursor_after(place) if place else beginning)
            assert wire.notices[0][1]["recovered"] is True
            return wire

        comers = [asyncio.create_task(attach(place)) for place in range(events - 10)]
        _, wires = await asyncio.gather(flow(), asyncio.gather(*comers))
        feed = await served.feed("ada", beginning)
        assert len(feed) == events
        for place, wire in enumerate([reference, *wires], -1):
            if place % 20 == 19:
                await wire.until_end_of(feed[-1]["generationId"])
                place = events - len(wire.received)
            await wire.until_received(events - max(place, 0))
            assert wire.events == feed[max(place, 0) :], f"a gap or a duplicate after the cursor at {place}"
        trial.report("sockets", len(wires))
        trial.report("events sent", sum(len(wire.received) for wire in wires))
        await check(served, [reference, *wires])


@case(
    23,
    "{rate} real generations a second for {seconds} s, kept {retention} s; meanwhile readers stop in mid-replay until "
    "what they replay is removed",
    "memory and disk flat; a replay has an honest end, never a hole",
    quick={"seconds": 2, "retention": 0.4, "rate": 4},
    long={"seconds": 240, "retention": 4, "rate": 4},
)
async def retention_under_load(trial: Trial, seconds: float, retention: float, rate: float) -> None:
    async with trial.serve(retention=retention, credits="off", max_per_user=1_000) as served:
        began = time.monotonic()
        samples, endings, started = list[tuple[float, int]](), list[str](), 0

        async def load() -> None:
            nonlocal started
            while time.monotonic() < began + seconds:
                await served.start(f"user-{started % 7}", ("edit", "generate")[started % 2])
                started += 1
                await asyncio.sleep(began + started / rate - time.monotonic())

        async def look() -> None:
            while time.monotonic() < began + seconds or len(samples) < 3:
                samples.append(((await served.figures()).rss / 1_000, len(files_in(trial.images))))
                await asyncio.sleep(seconds / 200)

        async def replay() -> None:
            while time.monotonic() < began + seconds or not set(endings) - {_TOO_LATE}:
                endings.append(await _replay_what_is_removed(served, f"reader-{len(endings)}"))

        await asyncio.gather(load(), look(), replay())
        await served.until_idle()
        async with asyncio.timeout(30 + 2 * retention):
            for user in set(served.owners.values()):
                while (await served.get("/generations", user))["generations"]:
                    await asyncio.sleep(0.05)
            while files_in(trial.images):
                await asyncio.sleep(0.05)
        third = len(samples) // 3
        parts = samples[third : 2 * third], samples[2 * third :]
        memory = [statistics.fmean(rss for rss, _ in part) for part in parts]
        files = [statistics.fmean(files for _, files in part) for part in parts]
        trial.report("generations", started)
        trial.report("memory, middle and last third", f"{memory[0]:.1f} and {memory[1]:.1f} MB")
        trial.at_most("last / middle", memory[1] / memory[0], 1.05, time=True)
        trial.report("files, middle and last third", f"{files[0]:.1f} and {files[1]:.1f}")
        trial.at_most("last / middle of the files", files[1] / max(files[0], 1), 1.25, time=True)
        for ending in sorted(set(endings)):
            trial.report(f"replays {ending}", endings.count(ending))
        await served.until(lambda figures: figures.idle)


#: How a replay ends that has not come to its middle.
_TOO_LATE: Final = "for which it was too late"


async def _replay_what_is_removed(served: ServedService, user: str) -> str:
    """Stop reading in the middle of a replay until retention has removed what is replayed. How it ended."""
    first = await served.wire(user)
    cursor = first.notices[0][1]["cursor"]
    await hang_up([first])
    generation_id, _ = await served.flood(user, 600, filler=2_000)
    wire = await served.wire(user, narrow=True, cursor=cursor)
    with contextlib.suppress(ConnectionResetError):
        await wire.until_received(20 if wire.notices[0][1]["recovered"] else 0)
    if len(wire.received) < 20:
        # On a machine that is slow. Nothing but the removal is an excuse.
        assert (await served.get_response(f"/generations/{generation_id}", user)).status_code == 404
        await hang_up([wire])
        return _TOO_LATE
    wire.transport.pause_reading()
    async with asyncio.timeout(60):
        while (await served.get_response(f"/generations/{generation_id}", user)).status_code != 404:
            await asyncio.sleep(0.05)
    wire.transport.resume_reading()
    with contextlib.suppress(ConnectionResetError):
        await wire.until_received(600)
    assert [event["sequence"] for event in wire.events] == list(range(1, len(wire.received) + 1)), "a hole"
    assert not wire.disconnected_by_server
    if len(wire.received) == 600:
        await hang_up([wire])
        return "read to the end"
    again = await served.wire(user, cursor=wire.cursor_after(len(wire.received)))
    assert again.notices[0][1]["recovered"] is False
    assert again.notices[0][1]["generations"] == []
    await hang_up([wire, again])
    return "told that the past is gone"


@case(
    24,
    "a socket that missed {events} events comes back and reads {pace} kB/s while more come; who takes nothing for "
    "{stall} s is cut",
    "recovered, everything once, never cut while it moves",
    quick={"events": 1_500, "pace": 2_000, "stall": 0.8},
    long={"events": 5_000, "pace": 300, "stall": 5},
)
async def slow_reader(trial: Trial, events: int, pace: float, stall: float) -> None:
    async with trial.serve() as served:
        first = await served.wire("ada")
        beginning = first.notices[0][1]["cursor"]
        await served.flood("ada", 5)
        await first.until_received(5)
        await hang_up([first])
        await served.until(lambda figures: figures.idle)
        for _ in range(10):
            await served.flood("ada", events // 10, filler=1_900)
        await served.stall(stall)
        before = await served.figures(reset=True)
        began = time.monotonic()
        async with flowing(served, "ada", rate=10):
            slow = await _sip(served, first, pace, 5 + events, stall)
            took = time.monotonic() - began
        feed = await served.feed("ada", beginning)
        slow = await _sip(served, slow, pace, len(feed), stall)
        assert slow.events == feed
        trial.report("events, each once", len(feed))
        trial.report("read for", f"{took:.1f} s, {took / stall:.1f} × that time")
        trial.at_most("memory", ((await served.figures()).peak - before.rss) / 1_000, 10, "MB")
        await check(served, [slow])


async def _sip(served: ServedService, wire: Wire, pace: float, count: int, stall: float) -> Wire:
    """Read so many kB a second, a little at a time, until it was sent so many events: this socket, or its successor.

    One that is gone comes back. While it reads, only that nothing was read for long, since this process was not given
    any time, is an excuse for cutting it.
    """
    longest, last = math.inf if wire.gone.is_set() else 0.0, time.monotonic()
    while len(wire.received) < count:
        if wire.gone.is_set():
            assert longest > stall / 2, "cut while it moved"
            longest, last = 0.0, time.monotonic()
            wire = await served.reconnect(wire, narrow=True)
        taken = wire.taken
        wire.transport.resume_reading()
        while wire.taken == taken and not wire.gone.is_set():
            await asyncio.sleep(0.001)
        wire.transport.pause_reading()
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
        await asyncio.sleep((wire.taken - taken) / pace / 1_000)
    wire.transport.resume_reading()
    return wire


@case(
    25,
    "{rounds} times the server is killed (SIGKILL) in the middle of {generations} generations, and another started on "
    "the same folder, with a log in memory",
    "every image that no event names is gone; every cursor and session says recovered: false",
    quick={"rounds": 1, "generations": 6},
    long={"rounds": 10, "generations": 16},
)
async def killed_with_a_log_in_memory(trial: Trial, rounds: int, generations: int) -> None:
    left, asked = list[int](), 0
    trial.images.mkdir()
    strangers = trial.images / "readme.txt"
    strangers.write_text("none of ours")
    for number in range(rounds):
        async with HostProcess.start() as victim, victim.serve(trial.images, port=free_port()) as served:
            wires = [await served.wire("ada") for _ in range(3)]
            for _ in range(2):
                await asyncio.gather(*(served.start("ada") for _ in range(generations // 2)))
                await caught_up(wires, 6 * (generations // 2))
            await caught_up(wires, 6 * (generations // 2) + 1 + number % 6)  # Others are in the midst of it.
            await victim.kill()
            trial.check_logged(victim)
        left.append(len(files_in(trial.images)) - 1)
        assert left[-1] > 0, "there was nothing to be removed"
        async with trial.serve(port=served.port) as served:
            assert files_in(trial.images) == [strangers]
            returns = await _nothing_is_recovered(served, wires)
            asked += len(returns)
            generation_id = await served.start("ada")
            await caught_up(returns, 6)
            assert all({event["generationId"] for event in wire.events} == {generation_id} for wire in returns)
            await check(served, returns)
    trial.report("images left by the killed", " ".join(map(str, left)))
    trial.report("of those, left now", 0)
    trial.report("cursors and sessions, none recovered", asked)


async def _nothing_is_recovered(served: ServedService, wires: Sequence[Wire]) -> list[Wire]:
    """The sockets that come back with every cursor and every session that these have had."""
    cursors = {wire.notices[0][1]["cursor"] for wire in wires}
    cursors |= {wire.cursor_after(place) for wire in wires for place in range(1, len(wire.received) + 1)}
    returns = []
    for cursor in cursors:
        page = await served.get(f"/events?after={cursor}", "ada")
        assert (page["recovered"], page["generations"]) == (False, [])
        returns.append(await served.wire("ada", cursor=cursor))
    for wire in wires:
        returns.append(await served.wire("ada", **wire.offset))
        assert returns[-1].pid != wire.pid
    assert not any(wire.notices[0][1]["recovered"] for wire in returns)
    return returns
