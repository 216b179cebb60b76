"""From the log's records to the domain's objects."""

from domain.events import decode
from domain.generation import Generation
from domain.orders import Order
from domain.ports import History


def order_of(history: History) -> Order:
    """What was ordered."""
    return Order.model_validate_json(history.order)


def generation_of(history: History) -> Generation:
    """The generation as these events have made it."""
    events = (decode(entry.event) for entry in history.events if entry.event is not None)
    return Generation.fold(history.generation_id, history.kind, history.user_id, order_of(history), events)
