"""What an append is checked against: one pure function, which every storage calls with what it has read."""

from typing import NamedTuple

from domain import errors
from domain.events import with_credit
from domain.ports.log import Append, IdempotencyRecord
from domain.ports.system import Clock


class Known(NamedTuple):
    """What the storage has before an append, read in the same atomic step."""

    #: Whether there is a generation with this id, or a tombstone of one.
    exists: bool = False
    ended: bool = False
    #: The sequence of the generation's last event; 0 without one, and for tombstones.
    sequence: int = 0
    #: The id of the event at the sequence of the append, if there is one.
    event_id: int | None = None
    #: What the idempotency key of the append stands for.
    idempotency_record: IdempotencyRecord | None = None
    #: How many unfinished generations the user has.
    unfinished: int = 0
    #: The user's balance; ``None`` if none has been kept.
    credit: int | None = None
    #: Whether the generation's start took a credit.
    reserved: bool = False


class Accepted(NamedTuple):
    """What the append stores."""

    #: With the balance, where it shows one.
    event: bytes
    #: The user's balance after it; ``None`` if none is kept.
    credit: int | None
    #: Whether the generation's start took a credit.
    reserved: bool


def decide(entry: Append, known: Known, *, credits: int | None, clock: Clock) -> Accepted | None:
    """Whether the append is accepted; ``None`` if the log already has this event. `credits`: a new user's balance.

    Raises in this order:
        LogUnavailable: it is too late.
        IdempotencyMismatch, AlreadyStarted, Conflict, TooManyGenerations, InsufficientCredit
    """
    start = entry.start
    if known.event_id == entry.event_id:
        return None
    if entry.not_after is not None and clock() > entry.not_after:
        raise errors.LogUnavailable
    if start is not None and known.idempotency_record is not None:
        if known.idempotency_record.fingerprint != start.fingerprint:
            raise errors.IdempotencyMismatch
        raise errors.AlreadyStarted(known.idempotency_record.generation_id)
    # Tombstones keep the id of a deleted generation taken.
    if entry.sequence != known.sequence + 1 or known.exists == (start is not None) or known.ended:
        raise errors.Conflict
    if start is not None and known.unfinished >= start.max_unfinished:
        raise errors.TooManyGenerations
    # A generation that started while no balances were kept has reserved nothing, and gets no refund.
    reserved = known.reserved if start is None else credits is not None
    credit = credits if known.credit is None else known.credit
    if entry.credit is None or credit is None:
        return Accepted(entry.event, credit, reserved)
    credit += entry.credit if reserved else 0
    if credit < 0:
        raise errors.InsufficientCredit
    return Accepted(entry.event if credits is None else with_credit(entry.event, credit), credit, reserved)
