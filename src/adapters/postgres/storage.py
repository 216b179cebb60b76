"""The storage in PostgreSQL: ``STAGECAST_LOG=postgresql://…``. Needs the extra ``postgres``."""

import asyncio
import contextlib
import logging

from adapters.postgres import database as postgres
from adapters.postgres.database import Database
from adapters.postgres.leases import PostgresLeases
from adapters.postgres.log import PostgresLog
from adapters.postgres.nodes import Nodes
from adapters.postgres.quotas import PostgresQuotas
from adapters.postgres.sessions import PostgresSessions
from adapters.postgres.tail import JOINED, Tail
from domain.errors import LogUnavailable
from domain.ports.storage import Examined, Storage, StorageOptions, StorageRefused

logger = logging.getLogger(__name__)


async def open_storage(url: str, options: StorageOptions) -> Storage:
    """The storage in the database of this URL. Raises `StorageRefused`."""
    database = await Database.open(url, epoch=options.epoch)
    listener = database if options.direct is None else await database.directly(options.direct)
    if listener.pooled:
        logger.warning(
            "notifications do not pass the pooler of PostgreSQL: events of other nodes arrive up to 250 ms later;"
            " STAGECAST_LOG_DIRECT may be a URL past it"
        )
    local = f"[{database.local_host}]" if ":" in database.local_host else database.local_host
    address = f"{local}{options.address}" if options.address.startswith(":") else options.address
    try:
        secret = await database.fetchval("SELECT secret FROM stagecast.log")
        nodes = Nodes(database, address, secret)
        await nodes.beat()  # Before it claims anything.
    except LogUnavailable:
        await database.close()
        raise StorageRefused("The log cannot be opened: it does not take a heartbeat.") from None
    tail = Tail(listener, database.node)
    tail.channels[JOINED] = nodes.beat_soon
    database.notify(JOINED)
    leases = PostgresLeases(database, nodes, tail)
    quotas = PostgresQuotas(database)
    log = PostgresLog(database, tail, nodes, credits=options.credits, clock=options.clock, outbox=options.outbox)

    async def has_other_nodes() -> bool:
        try:
            return await nodes.have_others()
        except LogUnavailable:
            raise StorageRefused("The log cannot be opened: it does not answer.") from None

    async def close() -> None:
        with contextlib.suppress(LogUnavailable):
            await nodes.leave()
        await database.close()

    return Storage(
        log=log,
        sessions=PostgresSessions(database, options.retention),
        leases=leases,
        background={"tail": tail.run, "heartbeat": nodes.run, "lines": leases.run, "devices": quotas.run},
        nodes=nodes,
        quotas=quotas,
        age=tail.age,
        has_other_nodes=has_other_nodes,
        close=close,
    )


def examine(url: str) -> Examined:
    """Read the epoch and nothing else: the server looks for damage itself. Raises `StorageRefused`."""
    return Examined(epoch=asyncio.run(postgres.read_epoch(url)))


def migrate(url: str, epoch: str, *, only_print: bool) -> str:
    """Bring the schema to the present version, and say so; or only return the SQL that does, empty if there is none.

    `epoch`: of a new log. Raises `StorageRefused`.
    """
    script = asyncio.run(postgres.migrate(url, epoch, only_print=only_print))
    if only_print:
        return script
    return f"The schema has version {len(postgres.SCHEMA)}{', as before' if not script else ''}."
