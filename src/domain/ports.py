"""What the domain needs of the world: one Protocol per thing, and the records that pass through it.

Every adapter of a port passes the port's contract suite in ``tests/``.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, Protocol

from domain.feed import Cursor, Feed, Logged
from domain.identity import Identity
from domain.orders import Options
from domain.stages import Kind

# --- the event log ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """What the first append of a generation carries besides its event."""

    kind: Kind
    #: JSON of `domain.orders.Order`.
    order: bytes
    #: The caller's Idempotency-Key and the fingerprint of the whole request.
    key: str | None
    fingerprint: str
    #: How many unfinished generations this user may have, this one included.
    max_unfinished: int


@dataclass(frozen=True, slots=True)
class Append:
    """One event on its way into the log."""

    user_id: str
    generation_id: str
    #: The sequence this event is to get: one more than the last event in the log.
    sequence: int
    #: Random, below 2**63, drawn once per event. A retry carries the same one and is recognised by it.
    event_id: int
    #: JSON of `domain.events.Event`, without ``credit``.
    event: bytes
    #: The Socket.IO event that carries it.
    name: str
    at: datetime
    #: The change of the user's balance: -1, 0 or 1. ``None``: the event does not show the balance.
    credit: int | None = None
    terminal: bool = False
    start: Start | None = None
    #: The log refuses the append later than this.
    not_after: datetime | None = None
    #: The provider that works in this stage is free, so the work may be repeated after a crash.
    free: bool = False


class Gap(NamedTuple):
    """The follower missed entries: whoever follows must read the log again."""


class History(NamedTuple):
    """One generation as the log has it: one atomic read."""

    user_id: str
    generation_id: str
    kind: Kind
    #: JSON of `domain.orders.Order`.
    order: bytes
    events: Sequence[Logged]
    #: `Append.free` of the last event, unless `mark_paid` has withdrawn it.
    free: bool


class Begun(NamedTuple):
    """What an idempotency key stands for."""

    generation_id: str
    fingerprint: str


class Standing(NamedTuple):
    """What a user has left for starts."""

    #: ``None`` where the log keeps no balances.
    credit: int | None
    #: How many generations of this user are unfinished.
    unfinished: int


class Session(NamedTuple):
    """What a socket that comes back is restored to."""

    identity: Identity
    #: Where the session began: what a client that has seen no event yet goes on from.
    base: Cursor
    #: The newest position of the feed when it began.
    head: int
    #: Marks the cursors up to there that it was sent, where its client may remember others.
    tag: str | None


Deliver = Callable[[Logged | Gap], None]


class EventLog(Protocol):
    """The one place where a generation moves, and the ledger of credits.

    Every method may raise `LogUnavailable`. `append` is one atomic step over everything it checks and
    changes: it happens whole or not at all.
    """

    @property
    def epoch(self) -> str:
        """Names this log's past, in ``[a-z0-9]``: it changes when the log has lost what it held."""

    @property
    def durable(self) -> bool:
        """Whether what was appended is still there after this process."""

    async def append(self, entry: Append) -> Logged:
        """Add the event, move the balance, and note the idempotency key.

        An append whose own event id already stands at its sequence has succeeded before: it returns
        that entry and changes nothing. Checked in this order:

        Raises:
            LogUnavailable: also where it is later than `entry.not_after`.
            AlreadyStarted, IdempotencyMismatch: the key has begun a generation before.
            Conflict: `entry.sequence` is not the next one, or the generation has ended.
            TooManyGenerations: the user already has `max_unfinished`.
            InsufficientCredit: the balance would fall below zero.
        """

    async def mark_paid(self, generation_id: str) -> None:
        """From now on the present stage of this generation may cost money: withdraw `Append.free` of its last event."""

    async def begun(self, user_id: str, key: str) -> Begun | None:
        """What this user began with this idempotency key."""

    async def generation(self, generation_id: str) -> History | None:
        """All events of one generation, in order of sequence."""

    async def generations(
        self, user_id: str, *, active: bool | None = None, before: int | None = None, limit: int
    ) -> Sequence[History]:
        """This user's generations, newest first.

        `active` keeps only unfinished (True) or finished (False) ones; `before`, only those whose first
        event lies before that position.
        """

    async def unfinished(self) -> Sequence[History]:
        """Every unfinished generation of every user, oldest first."""

    async def set_aside(self, generation_id: str) -> bool:
        """Whether it counts as deleted since it cannot be read. What belongs to it is kept until retention ends."""

    async def examine(self) -> None:
        """Check, a little at a time, all that was stored before, so that what is damaged counts as deleted."""

    async def finished_before(self, moment: datetime, limit: int) -> Sequence[str]:
        """Ids of generations that ended before `moment`, those that ended first first.

        Deleted ones too, of which the places are left.
        """

    async def head_cursor(self, user_id: str) -> Cursor:
        """The cursor at the feed's head: after it come the events so far of unfinished generations, and new events."""

    async def feed(self, user_id: str, *, after: int, anchor: int, limit: int) -> Feed:
        """At most `limit` entries with a position above `after`, and what a cursor at `anchor` is compared with."""

    def follow(self, deliver: Deliver) -> AbstractAsyncContextManager[None]:
        """Deliver every entry appended from now on, in order of position per user, or `Gap`.

        `deliver` must not block. What it raises is logged and undoes nothing.
        """

    async def credit(self, user_id: str) -> int | None:
        """The user's balance; ``None`` where this log keeps no balances."""

    async def standing(self, user_id: str) -> Standing:
        """What a start by this user is checked against: one atomic read."""

    async def grant(self, user_id: str, amount: int, *, key: str | None, at: datetime, until: datetime) -> int:
        """Change the user's balance by `amount`, to 0 at the least, and return it.

        A key used again by this user before `until` returns the balance that it had brought then.

        Raises:
            IdempotencyMismatch: it was used with another amount.
            CreditsOff: this log keeps no balances.
        """

    async def remove(self, generation_id: str, *, retention: bool) -> bool:
        """Remove a finished generation whole: history, order, idempotency key. Return whether it was there.

        `retention` raises the feed's floor to its last position, which forgets its places too. Without
        it they stay known, as empty places, until the floor passes them.

        Raises:
            NotFinished: it still runs.
        """

    async def undelivered(self, limit: int) -> Sequence[Logged]:
        """Terminal events that are yet to be told to the webhook, those that came first first.

        Always none where the log was opened without an outbox. What is removed is not told any more.
        """

    async def delivered(self, generation_id: str) -> None:
        """The terminal event of this generation has been told."""

    async def probe(self) -> None:
        """Commit one row and read it, to find out whether the log can take an append. Raises `LogUnavailable`."""

    async def close(self) -> None:
        """Let go of what it holds. Nothing is asked of it any more."""


class SessionStore(Protocol):
    """Sessions by their ``pid``, kept as long as retention after they were last touched, where the log is kept."""

    async def save(self, pid: str, session: Session, *, at: datetime) -> None:
        """Keep the session, in place of an earlier one."""

    async def load(self, pid: str, *, at: datetime) -> Session | None:
        """The session of this pid, if it is still there."""

    async def touch(self, pids: Collection[str], *, at: datetime) -> None:
        """These are in use."""

    async def end(self, pid: str) -> None:
        """Forget the session."""


# --- pictures --------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """An encoded image."""

    data: bytes
    #: ``image/png``, ``image/jpeg`` or ``image/webp``.
    media_type: str


class ImageStore(Protocol):
    """Keeps pictures. A name tells which generation its picture belongs to, and cannot be guessed."""

    async def save(self, generation_id: str, picture: Picture) -> str:
        """Store the picture whole or not at all, and return its name: the id, ``-``, 128 random bits, a suffix.

        Raises:
            Failure: ``storage_failed``.
        """

    async def load(self, name: str) -> Picture | None:
        """The picture of this name; ``None`` where there is none."""

    async def size(self, name: str) -> int:
        """How many bytes the picture of this name has; 0 where there is none."""

    async def discard(self, name: str) -> None:
        """Remove one picture, if it is there."""

    async def remove(self, generation_id: str) -> None:
        """Remove all pictures of one generation."""

    async def names(self, *, older_than: datetime) -> dict[str, list[str]]:
        """The names of the pictures stored before that moment, by generation id.

        Those that may belong to another log than the present one are left out.
        """

    async def close(self) -> None:
        """Let go of what it holds. Nothing is asked of it any more."""

    async def probe(self) -> None:
        """Store 4 kB and remove them again, to find out whether a picture can be stored.

        Raises:
            Failure: ``storage_failed``.
        """


#: What a stranger sent, or what reads it as often as asked.
Content = bytes | Callable[[], Awaitable[bytes]]


async def read(content: Content) -> bytes:
    """What the stranger sent."""
    return content if isinstance(content, bytes) else await content()


class ImageIntake(Protocol):
    """Turns what a stranger sent into a picture of ours."""

    async def admit(self, content: Content) -> Picture:
        """Decode within limits, turn by EXIF, and encode again without anything else that came along.

        Raises:
            UnsupportedImageType, ImageTooLarge, InvalidImage
        """


class ImageFetcher(Protocol):
    """Fetches a user's image URL."""

    async def fetch(self, url: str) -> Picture:
        """The picture behind the URL, admitted by the intake.

        Raises:
            Failure: ``image_fetch_failed``.
        """


#: Loads one stored picture, as often as asked.
Load = Callable[[], Awaitable[Picture]]


class Composer(Protocol):
    """Lays pictures out on one sheet."""

    async def compose(self, pictures: Sequence[Load]) -> Picture:
        """One A4 sheet with all pictures, each whole, in the order given.

        Raises:
            Failure: ``invalid_image``, and as `Load`.
        """


#: How a provider tells where it stands: the fraction of its work done, a message, and a preview if it has one.
Report = Callable[[float, str, Picture | None], Awaitable[None]]


class ImageEditor(Protocol):
    """The AI stage: makes a picture from the sheet and the prompt. One attempt per call."""

    @property
    def free(self) -> bool:
        """Whether its work costs nothing. Free work is repeated after a crash; work that may be paid for never is."""

    async def edit(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        """The edited picture.

        Raises:
            Failure: with one of the ``provider_`` codes.
        """

    async def generate(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        """A new picture after the sheet. Raises as `edit`."""


class FaceSwapper(Protocol):
    """Puts a face into a finished picture. One attempt per call."""

    @property
    def free(self) -> bool:
        """As `ImageEditor.free`."""

    async def swap(self, picture: Picture, face: Picture, report: Report) -> Picture:
        """The picture with the face.

        Raises:
            Failure: with one of the ``provider_`` codes.
        """


# --- work ------------------------------------------------------------------------------------------------


class WorkQueue(Protocol):
    """Who works on which generation. Fair between users: nobody's many jobs delay another's first."""

    @property
    def waiting(self) -> int:
        """How many generations nobody works on yet."""

    @property
    def held(self) -> int:
        """How many generations are worked on."""

    async def offer(self, user_id: str, generation_id: str, *, fetching: bool = False) -> None:
        """Put a generation in line: in that of work, or in that of those whose image URLs are to be fetched first."""

    async def withdraw(self, generation_id: str) -> bool:
        """Take a generation out of the line. False: it does not wait there."""

    async def claim(self, *, fetching: bool = False) -> str:
        """Wait for the next generation in this line, and hold it.

        Of one user only so many are held at once from the line of those to be fetched for. One that is held from there,
        and claimed from the line of work meanwhile, is held for work.

        For ever in one process; where several share a line, for a while (a lease), unless it is renewed.
        """

    async def renew(self, generation_ids: Collection[str]) -> Collection[str]:
        """Hold these for another while. Return those of them that are no longer held: somebody else has them."""

    async def release(self, generation_id: str) -> None:
        """Let go of a generation that is held."""

    async def settled(self) -> None:
        """Wait until nothing waits and nothing is held."""


# --- time and chance -------------------------------------------------------------------------------------

Clock = Callable[[], datetime]


class Entropy(Protocol):
    """Where randomness comes from."""

    def token(self) -> str:
        """16 characters of ``[a-z0-9]``: over 80 random bits."""

    def event_id(self) -> int:
        """63 random bits."""
