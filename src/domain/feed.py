"""A user's feed, and cursors in it.

The feed is all events of all the user's generations, at positions 1, 2, 3 … A cursor is a place in it, and what
of the past is still to come. Somebody who attaches without a past wants two things: the events so far of what still
runs, and everything from now on. So a cursor has two places. Up to ``live`` only generations that had not ended by
then are wanted, and of those, events up to ``seen`` have been sent; after ``live`` everything is wanted. Once the past
has been sent both places are one, and move together.

``event_id`` is the id of the event at ``live``. It recognises a cursor that was made up, and a log that came back in an
older state; the name of the feed, in the cursor's text, recognises one of another user or of another log. A tag at the
text's end tells which session sent it.

A generation may be deleted. Who was told that it runs cannot be told any more that it ended, and has to look anew; who
comes to its first event only after that never hears of it, and goes on. ``untold`` tells the one from the other.
"""

import hashlib
import re
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

_PLACE: Final = "(0|[1-9][0-9]{0,14})"
_UNTOLD: Final = "((?:-[1-9][0-9]{0,14}){0,100})"
_TEXT: Final = re.compile(
    rf"([a-z0-9]{{1,32}})\.{_PLACE}\.(0|[1-9a-f][0-9a-f]{{0,15}})\.{_PLACE}{_UNTOLD}(?:\.([a-z0-9]{{1,32}}))?"
)


class Logged(NamedTuple):
    """One event in the log, at its position in its user's feed."""

    user_id: str
    position: int
    event_id: int
    generation_id: str
    sequence: int
    name: str
    #: The event's JSON. ``None``: its generation was deleted, only the place remains.
    event: bytes | None
    #: The positions of its generation's first and terminal events; ``None`` while it runs.
    first: int
    end: int | None


class Feed(NamedTuple):
    """A stretch of one user's feed: one atomic read."""

    #: What the log has from the place asked for on, oldest first. Purged positions may be missing.
    entries: Sequence[Logged]
    #: The place up to which this read has looked; the next one goes on from here.
    upto: int
    #: The newest position of the feed; 0 where there is none.
    head: int
    #: The highest position that retention has purged.
    floor: int
    #: The id of the event at the anchor asked for; ``None`` where the log cannot tell.
    anchor_id: int | None
    #: The first positions of deleted generations that began at or before the anchor and ended after it.
    severed: Collection[int]


def feed_name(epoch: str, user_id: str) -> str:
    """Tells one user's feed in one log from every other, in ``[0-9a-f]``."""
    return hashlib.blake2b(f"{epoch}.{user_id}".encode(), digest_size=6).hexdigest()


def zero_id(epoch: str, user_id: str) -> int:
    """The event id at position 0 of a feed, where there is no event: the same whenever it is asked for."""
    return int.from_bytes(hashlib.blake2b(f"{epoch}.{user_id}".encode(), digest_size=8).digest()) >> 1


def tag_of(text: object) -> str | None:
    """The tag of the session that a cursor was sent in; ``None`` where it is none, or has none."""
    match = _TEXT.fullmatch(text) if isinstance(text, str) else None
    return match and match[6]


class Cursor(NamedTuple):
    """See the module. Immutable; `past` makes the next one."""

    live: int
    event_id: int
    seen: int
    #: The first positions of generations that span ``live``, and were deleted when the reader came there.
    untold: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: object, feed: str) -> "Cursor | None":
        """The cursor that a client gave back; ``None`` where it is not one of the feed of this name."""
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None or match[1] != feed:
            return None
        untold = tuple(map(int, match[5].split("-")[1:]))
        cursor = cls(int(match[2]), int(match[3], 16), int(match[4]), untold)
        return cursor if cursor.seen <= cursor.live else None

    def text(self, feed: str, tag: str | None = None) -> str:
        """What clients are given: opaque to them."""
        text = "-".join((f"{feed}.{self.live}.{self.event_id:x}.{self.seen}", *map(str, self.untold)))
        return text if tag is None else f"{text}.{tag}"

    def usable(self, feed: Feed) -> bool:
        """Whether a read anchored at ``live`` shows that nothing wanted has been lost.

        Retention (`floor`) counts against ``live`` only: what was purged had ended, and up to ``live``
        what had ended by then is not wanted. A deleted generation that ended after ``live`` is wanted
        where the reader knows of it, and its end can no longer be told.
        """
        return feed.anchor_id == self.event_id and self.live >= feed.floor and set(self.untold).issuperset(feed.severed)

    def wants(self, entry: Logged) -> bool:
        """Whether an entry beyond ``seen`` is to be sent."""
        return entry.event is not None and (entry.position > self.live or entry.end is None or entry.end > self.live)

    def past(self, entry: Logged) -> "Cursor":
        """The cursor behind this entry."""
        if entry.position <= self.live:
            return self._replace(seen=entry.position)
        untold = self.untold
        if entry.event is None and entry.position == entry.first:
            untold = (*untold, entry.first)
        if entry.position == entry.end:
            untold = tuple(first for first in untold if first != entry.first)
        return Cursor(entry.position, entry.event_id, entry.position, untold)

    def advance(self, feed: Feed) -> "tuple[list[tuple[Logged, Cursor]], Cursor]":
        """The wanted events of a read after ``seen``, each with the cursor behind it, and the cursor behind all."""
        cursor, wanted = self, []
        for entry in feed.entries:
            # `wants` asks where the reader stood before this entry: beyond `live` every event is wanted.
            is_wanted = cursor.wants(entry)
            cursor = cursor.past(entry)
            if is_wanted:
                wanted.append((entry, cursor))
        # Purged positions have no entry. They lie at or below the floor, and so below `live`.
        return wanted, cursor._replace(seen=max(cursor.seen, min(feed.upto, cursor.live)))
