"""From the log's records to the domain's objects."""

import contextlib
from typing import Final

from domain.events import decode
from domain.generation import Generation
from domain.ports.log import History
from domain.requests import Order

#: What is raised where a stored order or event is not what was stored.
UNREADABLE: Final = (ValueError, LookupError, TypeError)


def order_of(history: History) -> Order:
    """What was ordered."""
    return Order.model_validate_json(history.order)


def is_external(history: History) -> bool:
    """Whether the user's own pipeline does the work; not where that cannot be read."""
    try:
        return order_of(history).external
    except UNREADABLE:
        return False


def readable_part_of(history: History) -> Generation:
    """The generation as far as its order and its events can be read, so that it can be ended."""
    generation = Generation(history.generation_id, history.kind, history.user_id, Order(prompt="-"))
    for entry in history.events:
        with contextlib.suppress(*UNREADABLE):
            generation.apply(decode(entry.event or b""))
        generation.sequence = entry.sequence
    return generation


def generation_of(history: History) -> Generation:
    """The generation as these events have made it.

    Each event between carries what was known by then, so the first and the last two are the fold of them all.
    """
    entries = history.events if len(history.events) <= 3 else [history.events[0], *history.events[-2:]]
    events = (decode(entry.event) for entry in entries if entry.event is not None)
    return Generation.fold(history.generation_id, history.kind, history.user_id, order_of(history), events)
