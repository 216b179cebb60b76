"""What can go wrong, each with a stable code.

Two families. A `Refusal` answers a request that could not be done; nothing has happened. A `Failure` ends
a generation: its code and sentence go into the event log and to the owner's devices, so they never hold
a provider's words, a path or a key.
"""

from typing import ClassVar, Final, Literal, get_args

FailureCode = Literal[
    "invalid_image",
    "image_fetch_failed",
    "provider_rejected",
    "provider_rate_limited",
    "provider_unavailable",
    "provider_timeout",
    "storage_failed",
    "cancelled",
    "interrupted",
    "deadline_exceeded",
    "internal",
]

FAILURE_CODES: Final[tuple[FailureCode, ...]] = get_args(FailureCode)

#: What a person reads, and whether trying the same again can help.
_FAILURES: Final[dict[FailureCode, tuple[str, bool]]] = {
    "invalid_image": ("One of the images could not be read.", False),
    "image_fetch_failed": ("One of the image URLs could not be fetched.", True),
    "provider_rejected": ("The image service declined this request.", False),
    "provider_rate_limited": ("The image service is busy. Please try again in a moment.", True),
    "provider_unavailable": ("The image service is not available right now. Please try again.", True),
    "provider_timeout": ("The image service took too long to answer. Please try again.", True),
    "storage_failed": ("The image could not be stored. Please try again.", True),
    "cancelled": ("The generation was cancelled.", True),
    "interrupted": ("The service stopped while working on this. Please try again.", True),
    "deadline_exceeded": ("The generation took too long and was stopped. Please try again.", True),
    "internal": ("Something went wrong on our side. Please try again.", True),
}


class Failure(Exception):
    """A generation cannot go on. `sentence` is fit to show to its owner."""

    def __init__(self, code: FailureCode, sentence: str | None = None, *, retryable: bool | None = None) -> None:
        default_sentence, default_retryable = _FAILURES[code]
        self.code: FailureCode = code
        self.sentence = sentence or default_sentence
        self.retryable = default_retryable if retryable is None else retryable
        super().__init__(f"{code}: {self.sentence}")


class Refusal(Exception):
    """The request was refused."""

    code: ClassVar[str] = "refused"
    #: Seconds after which another try is worth while, where that is known.
    retry_after: int | None = None

    def __str__(self) -> str:
        """The sentence for people: the docstring of the kind."""
        return (type(self).__doc__ or "").strip()


class NotFound(Refusal):
    """There is no such generation."""

    code = "not_found"


class NotFinished(Refusal):
    """The generation is still running. Cancel it first."""

    code = "not_finished"


class IllegalTransition(Refusal):
    """This status may not follow the present one."""

    code = "illegal_transition"

    def __init__(self, present: str, proposed: str, allowed: tuple[str, ...]) -> None:
        super().__init__(present, proposed, allowed)
        self.present = present
        self.proposed = proposed
        #: The statuses that may follow the present one.
        self.allowed = allowed


class InvalidEventField(IllegalTransition):
    """This status may follow, but not with this."""

    code = "invalid_request"

    def __init__(self, present: str, proposed: str, allowed: tuple[str, ...], field: str, reason: str) -> None:
        super().__init__(present, proposed, allowed)
        #: Its name in `domain.events.Event`, and what is wrong with it, as a sentence for people.
        self.field = field
        self.reason = reason


class NotExternal(Refusal):
    """The service does the work of this generation itself."""

    code = "not_external"


class Conflict(Refusal):
    """The generation has moved on in the meantime."""

    code = "conflict"

    def __init__(self, proposed: int, actual: int) -> None:
        super().__init__(proposed, actual)
        #: The sequence that the event was to get.
        self.proposed = proposed
        #: The sequence of the last event in the log; 0 where there is none.
        self.actual = actual


class IdempotencyMismatch(Refusal):
    """This Idempotency-Key was used before with a different request."""

    code = "idempotency_mismatch"


class AlreadyStarted(Refusal):
    """This Idempotency-Key has started a generation before, with the same request."""

    code = "already_started"

    def __init__(self, generation_id: str) -> None:
        super().__init__(generation_id)
        self.generation_id = generation_id


class InsufficientCredit(Refusal):
    """There is no credit left to start a generation."""

    code = "insufficient_credit"


class CreditsOff(Refusal):
    """No balances are kept here."""

    code = "credits_off"


class TooManyGenerations(Refusal):
    """You have too many unfinished generations. Wait for one to finish."""

    code = "too_many_generations"


class TooManyStarts(Refusal):
    """You have started too many generations within a minute. Please wait a moment."""

    code = "too_many_starts"

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class StorageLimit(Refusal):
    """Your images take up too much room. Delete generations, or wait until older ones expire."""

    code = "storage_limit"


class Overloaded(Refusal):
    """The service is overloaded. Please try again shortly."""

    code = "overloaded"


class QueueFull(Refusal):
    """The service is busy. Please try again shortly."""

    code = "queue_full"


class Draining(Refusal):
    """The service is about to stop and takes no new work. Please try again shortly."""

    code = "draining"


class LogUnavailable(Refusal):
    """The event log does not answer. Please try again shortly."""

    code = "log_unavailable"


class ImageRefusal(Refusal):
    """The image was refused."""

    #: Which of several images it was, from 0.
    index: int = 0


class InvalidImage(ImageRefusal):
    """The image could not be read."""

    code = "invalid_image"


class UnsupportedImageType(ImageRefusal):
    """Only PNG, JPEG and WebP images are supported."""

    code = "unsupported_image_type"


class ImageTooLarge(ImageRefusal):
    """The image has too many pixels: 25 megapixels at most."""

    code = "image_too_large"
