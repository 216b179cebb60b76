"""The storage in memory: ``STAGECAST_LOG=memory://``."""

from adapters.memory.leases import MemoryLeases
from adapters.memory.log import MemoryLog
from adapters.memory.quotas import MemoryQuotas
from adapters.memory.sessions import MemorySessions
from domain.ports.storage import Storage, StorageOptions


async def open_storage(url: str, options: StorageOptions) -> Storage:
    """A new storage, which is lost with the process."""
    log = MemoryLog(epoch=options.epoch, credits=options.credits, clock=options.clock, outbox=options.outbox)
    return Storage(
        log=log,
        sessions=MemorySessions(options.retention),
        leases=MemoryLeases(),
        quotas=MemoryQuotas(),
    )
