"""What operators see of all users' generations, and of all nodes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Final

from pydantic import Field

from domain.events import Wire
from domain.ports.leases import Leases
from domain.ports.nodes import Load, Nodes
from domain.ports.overview import Filter
from domain.ports.overview import Overview as Reads
from domain.ports.system import Clock
from domain.rehydrate import readable_part_of
from domain.workflow import Page, Workflow

_FAILURES_OF: Final = timedelta(hours=1)
#: The id of a node that has its storage to itself.
_ALONE: Final = "local"


class Numbers(Wire):
    """The service as a whole. All numbers but those of a node are over all nodes."""

    nodes: Sequence[Load]
    sockets: int
    streams: int
    running: int
    waiting: int
    failures: Annotated[Mapping[str, int], Field(description="generations that failed in the last hour, by code")]


@dataclass(eq=False)
class Overview:
    """What operators read."""

    reads: Reads
    leases: Leases
    nodes: Nodes | None
    workflow: Workflow
    clock: Clock
    #: How many sockets and streams this node has.
    load: Callable[[], tuple[int, int]]

    def __post_init__(self) -> None:
        if self.nodes is not None:
            self.nodes.load = self.load

    async def numbers(self) -> Numbers:
        """Over all nodes. Raises `LogUnavailable`."""
        nodes = [Load(_ALONE, *self.load())] if self.nodes is None else self.nodes.loads
        counts = await self.leases.count()
        failures = await self.reads.failures(self.clock() - _FAILURES_OF)
        return Numbers(
            nodes=nodes,
            sockets=sum(node.sockets for node in nodes),
            streams=sum(node.streams for node in nodes),
            running=counts.held,
            waiting=counts.waiting,
            failures=failures,
        )

    async def page(self, wanted: Filter, *, before: int | None, limit: int) -> Page:
        """Generations of all users, newest first; of one that cannot be read, what can. Raises `LogUnavailable`."""
        found = await self.reads.listing(wanted, before=before, limit=limit)
        return Page(await self.workflow.show([*map(readable_part_of, found.histories)]), found.next)
