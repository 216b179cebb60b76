"""A user's feed, and cursors in it.

The feed is all events of all generations of one user, at the positions 1, 2, 3 … A client that starts without a cursor
wants the events so far of every unfinished generation, and everything from now on. So a cursor has two positions. Up to
``live``, only events of generations that were unfinished there are wanted, and of these, the events up to ``seen`` have
been sent. After ``live``, every event is wanted. Once the earlier events have been sent, both positions are equal and
advance together.

``event_id`` is the id of the event at ``live``. It detects a fabricated cursor, and a log that was restored in an older
state. The name of the feed, in the cursor's text, detects a cursor of another user or another log. A tag at the end of
the text names the session that sent it.

A deleted generation leaves tombstones: entries without an event. A client that has seen the generation's start can no
longer be sent its end, so its cursor becomes unusable. A client that reaches only tombstones never sees the generation
and goes on. ``open_tombstones`` distinguishes the two.
"""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

_POSITION: Final = "(0|[1-9][0-9]{0,14})"
_TOMBSTONES: Final = "((?:-[1-9][0-9]{0,14}){0,100})"
_TEXT: Final = re.compile(
    rf"([a-z0-9]{{1,32}})\.{_POSITION}\.(0|[1-9a-f][0-9a-f]{{0,15}})\.{_POSITION}{_TOMBSTONES}(?:\.([a-z0-9]{{1,32}}))?"
)

#: The pictures of an event without any.
NO_IMAGES: Final[Mapping[str, str]] = MappingProxyType({})


class Logged(NamedTuple):
    """One event in the log, at its position in its user's feed."""

    user_id: str
    position: int
    event_id: int
    generation_id: str
    sequence: int
    name: str
    #: The event's JSON. ``None``: a tombstone, because its generation was deleted.
    event: bytes | None
    #: The positions of its generation's first and terminal events; ``None`` while it runs.
    first: int
    end: int | None
    #: The names of the stored pictures whose URLs are in the event, by its field.
    images: Mapping[str, str] = NO_IMAGES


class Feed(NamedTuple):
    """A slice of one user's feed: one atomic read."""

    #: The entries from the requested position on, oldest first. Purged positions may be missing.
    entries: Sequence[Logged]
    #: The position up to which this read has looked; the next read continues from here.
    upto: int
    #: The newest position of the feed; 0 if it is empty.
    head: int
    #: The highest position that retention has purged.
    floor: int
    #: The id of the event at the requested anchor; ``None`` if the log does not have it.
    anchor_id: int | None
    #: The first positions of deleted generations that began at or before the anchor and ended after it.
    deleted_spans: Collection[int]


def feed_name(epoch: str, user_id: str) -> str:
    """A name that distinguishes one user's feed in one log from every other, in ``[0-9a-f]``."""
    return hashlib.blake2b(f"{epoch}.{user_id}".encode(), digest_size=6).hexdigest()


def zero_id(epoch: str, user_id: str) -> int:
    """The event id at position 0 of a feed, where there is no event: always the same."""
    return int.from_bytes(hashlib.blake2b(f"{epoch}.{user_id}".encode(), digest_size=8).digest()) >> 1


def tag_of(text: object) -> str | None:
    """The tag in a cursor's text; ``None`` if the text is not a cursor, or has no tag."""
    match = _TEXT.fullmatch(text) if isinstance(text, str) else None
    return match and match[6]


class Cursor(NamedTuple):
    """See the module. Immutable; `advanced_past` makes the next one."""

    live: int
    event_id: int
    seen: int
    #: The first positions of deleted generations that span ``live`` and were deleted before the reader got there.
    open_tombstones: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: object, feed: str) -> "Cursor | None":
        """The cursor with this text, as sent by a client; ``None`` if it is not one of the feed with this name."""
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None or match[1] != feed:
            return None
        tombstones = tuple(map(int, match[5].split("-")[1:]))
        cursor = cls(int(match[2]), int(match[3], 16), int(match[4]), tombstones)
        return cursor if cursor.seen <= cursor.live else None

    def text(self, feed: str, tag: str | None = None) -> str:
        """The text for clients, to whom it is opaque."""
        text = f"{feed}.{self.live}.{self.event_id:x}.{self.seen}"
        if self.open_tombstones:
            text = "-".join((text, *map(str, self.open_tombstones)))
        return text if tag is None else f"{text}.{tag}"

    def usable(self, feed: Feed) -> bool:
        """Whether a read anchored at ``live`` shows that no wanted event is lost.

        The floor is compared with ``live`` only: what retention has purged had ended, and up to ``live``
        generations that had ended are not wanted. A deleted generation that ended after ``live`` is wanted
        if the reader has seen its start, and its end can no longer be sent.
        """
        known = set(self.open_tombstones).issuperset(feed.deleted_spans)
        return known and feed.anchor_id == self.event_id and self.live >= feed.floor

    def wants(self, entry: Logged) -> bool:
        """Whether an entry beyond ``seen`` must be sent."""
        return entry.event is not None and (entry.position > self.live or entry.end is None or entry.end > self.live)

    def advanced_past(self, entry: Logged) -> "Cursor":
        """The cursor after this entry."""
        if entry.position <= self.live:
            return self._replace(seen=entry.position)
        tombstones = self.open_tombstones
        if entry.event is None and entry.position == entry.first:
            tombstones = (*tombstones, entry.first)
        if entry.position == entry.end:
            tombstones = tuple(first for first in tombstones if first != entry.first)
        return Cursor(entry.position, entry.event_id, entry.position, tombstones)

    def advance(self, feed: Feed) -> "tuple[list[tuple[Logged, Cursor]], Cursor]":
        """The wanted events of a read after ``seen``, each with the cursor after it, and the cursor after all."""
        cursor, wanted = self, []
        for entry in feed.entries:
            # `wants` is about the cursor before this entry: beyond `live` every event is wanted.
            is_wanted = cursor.wants(entry)
            cursor = cursor.advanced_past(entry)
            if is_wanted:
                wanted.append((entry, cursor))
        # Purged positions have no entry. They are at or below the floor, and so below `live`.
        return wanted, cursor._replace(seen=max(cursor.seen, min(feed.upto, cursor.live)))
