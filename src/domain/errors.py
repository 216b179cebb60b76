"""Errors, each with a stable code.

A `Refusal` answers a request, which has changed nothing. A `Failure` ends a generation: its code and sentence go into
the log and to the owner's devices, so they never contain a provider's text, a path or a key.
"""

from typing import Any, ClassVar, Final, Literal, get_args

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

#: The default sentence for the owner, and whether a retry can succeed.
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
    """A generation cannot go on. `sentence` is shown to its owner."""

    def __init__(self, code: FailureCode, sentence: str | None = None, *, retryable: bool | None = None) -> None:
        default_sentence, default_retryable = _FAILURES[code]
        self.code: FailureCode = code
        self.sentence = sentence or default_sentence
        self.retryable = default_retryable if retryable is None else retryable
        super().__init__(f"{code}: {self.sentence}")

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the event that ends a generation with it."""
        return {"error": self.sentence, "code": self.code, "retryable": self.retryable}


class Refusal(Exception):
    """The request was refused."""

    code: ClassVar[str] = "refused"
    #: Seconds after which a retry may succeed, if that is known.
    retry_after: int | None = None

    def __init_subclass__(cls, code: str | None = None) -> None:
        cls.code = code or cls.code

    def __str__(self) -> str:
        """The sentence for users: the docstring of the class."""
        return (type(self).__doc__ or "").strip()


class NotFound(Refusal, code="not_found"):
    """There is no such generation."""


class NotFinished(Refusal, code="not_finished"):
    """The generation is still running. Cancel it first."""


class IllegalTransition(Refusal, code="illegal_transition"):
    """This status may not follow the present one."""

    def __init__(self, allowed: tuple[str, ...] = ()) -> None:
        super().__init__(allowed)
        #: The statuses that may follow the present one.
        self.allowed = allowed


class InvalidEventField(IllegalTransition, code="invalid_request"):
    """This status may follow, but not with this."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__()
        #: Its name in `domain.events.Event`, and what is wrong with it, as a sentence for people.
        self.field = field
        self.reason = reason


class NotExternal(Refusal, code="not_external"):
    """The service does the work of this generation itself."""


class Conflict(Refusal, code="conflict"):
    """The generation has moved on in the meantime."""


class IdempotencyMismatch(Refusal, code="idempotency_mismatch"):
    """This Idempotency-Key was used before with a different request."""


class AlreadyStarted(Refusal, code="already_started"):
    """This Idempotency-Key has started a generation before, with the same request."""

    def __init__(self, generation_id: str) -> None:
        super().__init__(generation_id)
        self.generation_id = generation_id


class InsufficientCredit(Refusal, code="insufficient_credit"):
    """There is no credit left to start a generation."""


class CreditsOff(Refusal, code="credits_off"):
    """No balances are kept here."""


class TooManyGenerations(Refusal, code="too_many_generations"):
    """You have too many unfinished generations. Wait for one to finish."""


class TooManyStarts(Refusal, code="too_many_starts"):
    """You have started too many generations within a minute. Please wait a moment."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class StorageLimit(Refusal, code="storage_limit"):
    """Your images take up too much room. Delete generations, or wait until older ones expire."""


class Overloaded(Refusal, code="overloaded"):
    """The service is overloaded. Please try again shortly."""


class QueueFull(Refusal, code="queue_full"):
    """The service is busy. Please try again shortly."""


class Draining(Refusal, code="draining"):
    """The service is about to stop and takes no new work. Please try again shortly."""


class LogUnavailable(Refusal, code="log_unavailable"):
    """The event log does not answer. Please try again shortly."""


class ImageRefusal(Refusal):
    """The image was refused."""

    #: The field of the request, and which of its images it was, from 0.
    field: ClassVar[str] = "images"

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.index = index


class InvalidImage(ImageRefusal, code="invalid_image"):
    """The image could not be read."""


class UnsupportedImageType(ImageRefusal, code="unsupported_image_type"):
    """Only PNG, JPEG and WebP images are supported."""


class ImageTooLarge(ImageRefusal, code="image_too_large"):
    """The image has too many pixels: 25 megapixels at most."""


class UnknownImage(ImageRefusal, code="unknown_image"):
    """There is no such image among those of your generations."""

    field = "imageNames"
