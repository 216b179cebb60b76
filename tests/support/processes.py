"""The limits of this machine, signals of processes, and many things at a time."""

import asyncio
import os
import re
import resource
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class NoRoom(Exception):
    """This machine does not allow as many open files as are needed."""


def allow_sockets(count: int | None) -> None:
    """Let this process open so many sockets; ``None``: as many as it may. Raises `NoRoom`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = hard if count is None else count + 200
    if resource.RLIM_INFINITY not in (needed, hard) and needed > hard:
        raise NoRoom(f"{needed} open files are needed, and the hard limit (ulimit -Hn) is {hard}")
    if soft != resource.RLIM_INFINITY and (needed == resource.RLIM_INFINITY or needed > soft):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


async def until_handled(pid: int, number: signal.Signals) -> None:
    """Wait until this process handles this signal. (By Linux's /proc.)"""
    async with asyncio.timeout(60):
        while not _handled(pid) >> (number - 1) & 1:
            await asyncio.sleep(0.005)


async def until_decoding(pid: int) -> None:
    """Wait until this process has begun to decode an image, on a thread of low priority. (By Linux's /proc.)"""
    async with asyncio.timeout(60):
        while 10 not in _nicenesses(pid):
            await asyncio.sleep(0.005)


def _nicenesses(pid: int) -> list[int]:
    return [os.getpriority(os.PRIO_PROCESS, int(each.name)) for each in Path(f"/proc/{pid}/task").iterdir()]


def _handled(pid: int) -> int:
    [mask] = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return int(mask, 16)


async def together(make: Callable[[int], Awaitable[T]], count: int, *, at_once: int = 64) -> list[T]:
    """What `make` makes of 0, 1, 2 …, so many of them at a time."""
    turns = asyncio.Semaphore(at_once)

    async def one(number: int) -> T:
        async with turns:
            return await make(number)

    return await asyncio.gather(*(one(number) for number in range(count)))
