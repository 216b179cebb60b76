"""The registry with every case in it: each module registers its own when it is imported."""

from reliability import (
    cases_admission,
    cases_connections,
    cases_disk_and_clock,
    cases_feeds,
    cases_kills,
    cases_limits,
    cases_nodes,
    cases_stops,
    cases_storage,
    cases_streams,
    cases_supervision,
)
from reliability.cases import CASES

__all__ = [
    "CASES",
    "cases_admission",
    "cases_connections",
    "cases_disk_and_clock",
    "cases_feeds",
    "cases_kills",
    "cases_limits",
    "cases_nodes",
    "cases_stops",
    "cases_storage",
    "cases_streams",
    "cases_supervision",
]
