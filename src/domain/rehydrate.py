"""From the log's records to the domain's objects."""

import contextlib
from datetime import datetime
from typing import Final

from domain.events import decode
from domain.generation import Generation
from domain.ports.log import History
from domain.requests import GenerationRequest
from domain.stages import FLOWS, STARTED

#: What is raised if a stored request or event cannot be read.
UNREADABLE: Final = (ValueError, LookupError, TypeError)


def request_of(history: History) -> GenerationRequest:
    """The generation's request. Raises `UNREADABLE`."""
    return GenerationRequest.decode(history.request)


def is_external(history: History) -> bool:
    """Whether the owner's own pipeline does the work; False if the request cannot be read."""
    try:
        return request_of(history).external
    except UNREADABLE:
        return False


def readable_part_of(history: History) -> Generation:
    """As much of the generation as can be read: enough to end it."""
    generation = Generation(history.generation_id, history.kind, history.user_id, GenerationRequest(prompt="-"))
    generation.status = STARTED  # As every first event has it.
    with contextlib.suppress(*UNREADABLE):
        generation.request = request_of(history)
    for entry in history.events:
        with contextlib.suppress(*UNREADABLE):
            generation = generation.after(decode(entry.event or b""), entry.images)
        generation.sequence = entry.sequence
    return generation


def generation_of(history: History) -> Generation:
    """The fold of the generation's events. Raises `UNREADABLE`.

    An event repeats what was known before it, apart from a failure, so the first and the last two make the same fold.
    """
    entries = history.events if len(history.events) <= 3 else [history.events[0], *history.events[-2:]]
    generation = Generation(history.generation_id, history.kind, history.user_id, request_of(history))
    for entry in entries:
        generation = generation.after(decode(entry.event or b""), entry.images)
    return generation


def was_interrupted(history: History) -> bool:
    """Whether the work of its present stage may have been paid for before, so that it is not repeated."""
    try:
        generation = generation_of(history)
    except UNREADABLE:
        return False
    return FLOWS[generation.kind][generation.status].provider is not None and not history.free


def seconds_worked(history: History) -> float:
    """Seconds of work in the log: from leaving ``started`` to the last event.

    Without ``composition`` if it fetches URLs, as the log does not show how long it then waited for a worker.
    """
    first = 2 if request_of(history).image_urls else 1
    times = [
        datetime.fromisoformat(decode(entry.event).occurred_at)
        for entry in (*history.events[first : first + 1], history.events[-1])
        if entry.event is not None
    ]
    return (times[1] - times[0]).total_seconds() if len(times) == 2 else 0.0
