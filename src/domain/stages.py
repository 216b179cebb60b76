"""Which moves are legal: the one table that says so.

Theory of operation
-------------------
A generation is in exactly one stage; the stage's name is its ``status``. `FLOWS` has one row per stage:
the percentage and the message with which the stage is entered, and the stages that may follow it. A row
whose ``next`` is empty is terminal.

Four rules complete the rows, and stand only in `moves`:

1. A generation begins in the pseudo-stage `BEGIN`, from which only the first row can be reached.
2. ``failed`` may follow every row that is not terminal, so it is written in none of them.
3. A row with a ``provider`` may follow itself while that works, if the percentage rises and stays
   below that of every stage that may follow.
4. A move with a guard is legal only where the guard holds. Guards are named here, and are methods of
   `domain.generation.Generation`.

Everything else about stages is derived from this table: the `transitions` machines that decide,
``GET /stages``, and the diagrams in ``docs/state-diagrams``. To change what a generation may do, change
the table; nothing else knows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

Kind = Literal["edit", "generate"]
#: Who does the work of a stage: `domain.ports.ImageEditor` or `domain.ports.FaceSwapper`.
Provider = Literal["editor", "face_swapper"]

BEGIN: Final = "begin"
FAILED: Final = "failed"

GUARDS: Final[Mapping[str, str]] = {
    "face_swap_asked": "a face swap was asked for",
    "face_swap_not_asked": "no face swap was asked for",
    "face_swap_made": "the face swap succeeded",
    "face_swap_failed": "the face swap failed, the edit is kept",
    "progress_rises": "a provider reports higher progress",
}


@dataclass(frozen=True, slots=True)
class Via:
    """How a stage is reached from the one before it: on which condition, and with which message of its own."""

    guard: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """One row: what is said on entering the stage, and what may follow it."""

    #: Percentage on entering. ``None``: as reached so far.
    progress: int | None
    message: str
    next: Mapping[str, Via] = field(default_factory=dict)
    #: The provider that works in this stage. It may report progress by repeating the stage. Unless it is free, its work
    #: is never done a second time.
    provider: Provider | None = None

    @property
    def repeats(self) -> bool:
        """Whether it may follow itself."""
        return self.provider is not None

    @property
    def terminal(self) -> bool:
        """Whether nothing may follow."""
        return not self.next


Flow = Mapping[str, Stage]

FLOWS: Final[Mapping[Kind, Flow]] = {
    "edit": {
        "started": Stage(0, "Image editing started...", {"composition": Via()}),
        "composition": Stage(20, "Composing images...", {"composition_completed": Via()}),
        "composition_completed": Stage(
            40, "Image composition completed, starting OpenAI editing...", {"openai_editing": Via()}
        ),
        "openai_editing": Stage(
            60, "OpenAI image editing started...", {"openai_editing_completed": Via()}, provider="editor"
        ),
        "openai_editing_completed": Stage(
            80,
            "OpenAI image editing completed successfully!",
            {"face_swap": Via("face_swap_asked"), "completed": Via("face_swap_not_asked")},
        ),
        "face_swap": Stage(
            85,
            "Applying face swap...",
            {
                "face_swap_completed": Via("face_swap_made"),
                "completed": Via("face_swap_failed", "Image editing completed, but the face swap failed."),
            },
            provider="face_swapper",
        ),
        "face_swap_completed": Stage(95, "Face swap completed successfully!", {"completed": Via()}),
        "completed": Stage(100, "Image editing completed successfully!"),
        "failed": Stage(None, "Image editing failed!"),
    },
    "generate": {
        "started": Stage(0, "Image generation started...", {"composition": Via()}),
        "composition": Stage(20, "Composing images...", {"composition_completed": Via()}),
        "composition_completed": Stage(
            40, "Image composition completed, starting AI generation...", {"ai_generation": Via()}
        ),
        "ai_generation": Stage(60, "AI image generation started...", {"completed": Via()}, provider="editor"),
        "completed": Stage(100, "Image generation completed successfully!"),
        "failed": Stage(None, "Image generation failed!"),
    },
}


class Move(NamedTuple):
    """One legal step of a flow."""

    source: str
    status: str
    via: Via


def moves(kind: Kind) -> Iterator[Move]:
    """Every legal move of a flow, in the order of the table: the rows and the four rules."""
    flow = FLOWS[kind]
    yield Move(BEGIN, next(iter(flow)), Via())
    for source, stage in flow.items():
        if stage.repeats:
            yield Move(source, source, Via("progress_rises"))
        for status, via in stage.next.items():
            yield Move(source, status, via)
        if not stage.terminal:
            yield Move(source, FAILED, Via())


def ceiling(kind: Kind, status: str) -> int:
    """The percentage that a repeat of this stage has to stay below."""
    flow = FLOWS[kind]
    return min(flow[after].progress or 0 for after in flow[status].next)
