"""The storage in a SQLite file: ``STAGECAST_LOG=sqlite:///path``."""

import asyncio
from pathlib import Path
from typing import Final

from adapters.memory.leases import MemoryLeases
from adapters.memory.quotas import MemoryQuotas
from adapters.sqlite import files
from adapters.sqlite.database import Database
from adapters.sqlite.log import SqliteLog
from adapters.sqlite.sessions import SqliteSessions
from domain.ports.storage import Examined, Storage, StorageOptions

_SCHEME: Final = "sqlite:///"


async def open_storage(url: str, options: StorageOptions) -> Storage:
    """The storage in the file of this URL. Raises `StorageRefused`."""
    opened = await asyncio.to_thread(Database, Path(url.removeprefix(_SCHEME)), epoch=options.epoch)
    log = SqliteLog(opened, credits=options.credits, clock=options.clock, outbox=options.outbox)
    return Storage(
        log=log,
        sessions=SqliteSessions(opened, options.retention),
        leases=MemoryLeases(),  # One process has the file.
        quotas=MemoryQuotas(),
        examine=log.examine,
        close=opened.close,
    )


def examine(url: str) -> Examined:
    """Look for damage without changing anything; a service may have the file open. Raises `StorageRefused`."""
    return files.examine(Path(url.removeprefix(_SCHEME)))
