"""From the log's records to the domain's objects."""

from domain.events import decode
from domain.generation import Generation
from domain.orders import Order
from domain.ports import History


def order_of(history: History) -> Order:
    """What was ordered."""
    return Order.model_validate_json(history.order)


def generation_of(history: History) -> Generation:
    """The generation as these events have made it.

    Each event between carries what was known by then, so the first and the last two are the fold of them all.
    """
    entries = history.events if len(history.events) <= 3 else [history.events[0], *history.events[-2:]]
    events = (decode(entry.event) for entry in entries if entry.event is not None)
    return Generation.fold(history.generation_id, history.kind, history.user_id, order_of(history), events)
