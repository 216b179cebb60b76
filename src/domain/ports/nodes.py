"""The nodes that share a storage, as one of them sees the others."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Load:
    """The clients of a node."""

    id: str
    sockets: int
    streams: int


class Nodes(Protocol):
    """This node, and those that live beside it. An outage of the storage ends none of them."""

    #: How many sockets and streams this node has, to be set by it.
    load: Callable[[], tuple[int, int]]

    @property
    def id(self) -> str:
        """Of this node: six hexadecimal digits, new at each start."""

    @property
    def secret(self) -> str:
        """What all nodes of the storage know, and nobody else."""

    @property
    def time(self) -> float:
        """Seconds, by a clock that all nodes share."""

    @property
    def others(self) -> Collection[str]:
        """The ids of the other nodes that live."""

    @property
    def loads(self) -> Sequence[Load]:
        """The clients of each node that lives: of this one now, of others a moment ago."""

    async def address(self, node: str) -> str | None:
        """``host:port`` at which another node is reached. ``None``: it has ended, or never existed.

        Looks again if the node is unknown: it may have started a moment ago.
        """
