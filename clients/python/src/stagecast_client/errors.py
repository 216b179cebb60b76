"""What the client raises."""

import copyreg
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stagecast_client.models import Generation


class StagecastError(Exception):
    """The service refused a request, or did not answer: `code` is then ``network`` and `status` 0.

    `code` is stable, for programs; the text is a sentence for people. `field` is the form field that was refused, and
    `retry_after` the seconds after which the same request may succeed.
    """

    def __init__(
        self, code: str, detail: str, *, status: int = 0, field: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.status = status
        self.field = field
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """With all attributes, so that it passes from one process to another."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    @property
    def temporary(self) -> bool:
        """Whether the service did not answer, or cannot take the request now."""
        return self.code == "network" or self.status in (502, 503, 504)


class HistoryLost(StagecastError):
    """The events after the last cursor are gone, as after the restart of a service with its log in memory.

    `list` returns what the service has now; `events` without a cursor goes on from there.
    """

    def __init__(self) -> None:
        super().__init__("history_lost", "The service no longer has the events after this cursor.")


class GenerationFailed(StagecastError):
    """A generation failed: `code` and `message` say why, `retryable` whether another attempt may succeed."""

    def __init__(self, generation: "Generation") -> None:
        super().__init__(generation.code or "internal", generation.error or generation.message)
        self.generation = generation
        self.message = self.detail
        self.retryable = bool(generation.retryable)
