"""The table of stages and their legal transitions.

A generation is in one stage, whose name is its ``status``. A row of `FLOWS` has everything about its stage: how it is
entered, what may follow, the fields of its events, its effect on the credit, and who does its work. Four rules of
`moves` complete the rows:

1. A generation starts in the pseudo-stage `INITIAL`, from which only the first row can be reached.
2. ``failed`` may follow every row that is not terminal.
3. A row with a ``provider`` may follow itself with a higher percentage, below that of every stage that may follow.
4. A guard must hold. `GUARDS` describes the guards; they are methods of `domain.generation.Generation`.

The `transitions` machines, ``GET /stages`` and the diagrams in ``docs/state-diagrams`` are derived from this table.
``docs/extending.md`` shows how a stage is added.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Final, Literal, NamedTuple

Kind = Literal["edit", "generate"]
#: Who does the work of a stage: `domain.ports.providers.ImageEditor` or `domain.ports.providers.FaceSwapper`.
Provider = Literal["editor", "face_swapper"]

INITIAL: Final = "begin"
STARTED: Final = "started"
FAILED: Final = "failed"


class Guard(NamedTuple):
    """The condition of a move in words, and the field of the event that decides, if one does, with its requirement."""

    condition: str
    field: str | None = None
    requirement: str = ""


GUARDS: Final[Mapping[str, Guard]] = {
    "face_swap_requested": Guard("a face swap was asked for"),
    "face_swap_not_requested": Guard("no face swap was asked for"),
    "face_swap_made": Guard("the face swap succeeded"),
    "face_swap_failed": Guard(
        "the face swap failed, the edit is kept", "face_swap_error", "This says why there is no picture with the face"
    ),
    "progress_rises": Guard(
        "a provider reports higher progress", "progress", "This has to rise, and to stay below that of the next stage"
    ),
}


@dataclass(frozen=True, slots=True)
class Via:
    """How a stage is reached from the one before it."""

    #: The key in `GUARDS` of the condition.
    guard: str | None = None
    #: Replaces the message of the stage.
    message: str | None = None
    #: Fields that the event may have beside those of the stage.
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of the table."""

    #: Percentage on entering. ``None``: as reached so far.
    progress: int | None
    message: str
    next: Mapping[str, Via] = field(default_factory=dict)
    #: Fields of `domain.events.Event` that an event of this stage may bring. URLs that are known already are repeated.
    fields: tuple[str, ...] = ()
    #: What entering the stage adds to the owner's balance. ``None``: the event has no ``credit``.
    credit: int | None = None
    #: The method of `domain.runner`'s job that does the work of the stage and returns the fields it found.
    step: str | None = None
    #: The provider that works in this stage and may repeat it to report progress. Unless it is free, its work is never
    #: repeated after a crash.
    provider: Provider | None = None

    @property
    def repeats(self) -> bool:
        """Whether the stage may follow itself."""
        return self.provider is not None

    @property
    def terminal(self) -> bool:
        """Whether no stage may follow."""
        return not self.next


_EDIT: Final = ("composition_url", "preview_url", "edited_image_url")
_EDITED: Final = ("composition_url", "edited_image_url")
_GENERATE: Final = ("composition_url", "preview_url")
_GENERATED: Final = ("composition_url", "generated_image_url")
_SWAPPED: Final = ("face_swap_url",)
_ENDED: Final = ("error", "code")

FLOWS: Final[Mapping[Kind, Mapping[str, Stage]]] = {
    "edit": {
        "started": Stage(0, "Image editing started...", {"composition": Via()}, ("input_image",), credit=-1),
        "composition": Stage(20, "Composing images...", {"composition_completed": Via()}, _EDIT, step="compose"),
        "composition_completed": Stage(
            40, "Image composition completed, starting OpenAI editing...", {"openai_editing": Via()}, _EDIT
        ),
        "openai_editing": Stage(
            60,
            "OpenAI image editing started...",
            {"openai_editing_completed": Via()},
            _EDIT,
            step="edit",
            provider="editor",
        ),
        "openai_editing_completed": Stage(
            80,
            "OpenAI image editing completed successfully!",
            {"face_swap": Via("face_swap_requested"), "completed": Via("face_swap_not_requested")},
            _EDIT,
        ),
        "face_swap": Stage(
            85,
            "Applying face swap...",
            {
                "face_swap_completed": Via("face_swap_made", fields=_SWAPPED),
                "completed": Via(
                    "face_swap_failed", "Image editing completed, but the face swap failed.", ("face_swap_error",)
                ),
            },
            _EDIT,
            step="swap_face",
            provider="face_swapper",
        ),
        "face_swap_completed": Stage(
            95, "Face swap completed successfully!", {"completed": Via(fields=_SWAPPED)}, _EDIT
        ),
        "completed": Stage(100, "Image editing completed successfully!", {}, _EDITED, credit=0),
        "failed": Stage(None, "Image editing failed!", {}, _ENDED, credit=1),
    },
    "generate": {
        "started": Stage(0, "Image generation started...", {"composition": Via()}, ("input_image",), credit=-1),
        "composition": Stage(20, "Composing images...", {"composition_completed": Via()}, _GENERATE, step="compose"),
        "composition_completed": Stage(
            40, "Image composition completed, starting AI generation...", {"ai_generation": Via()}, _GENERATE
        ),
        "ai_generation": Stage(
            60, "AI image generation started...", {"completed": Via()}, _GENERATE, step="generate", provider="editor"
        ),
        "completed": Stage(100, "Image generation completed successfully!", {}, _GENERATED, credit=0),
        "failed": Stage(None, "Image generation failed!", {}, _ENDED, credit=1),
    },
}


class Move(NamedTuple):
    """One legal step of a flow."""

    source: str
    status: str
    via: Via


def moves(kind: Kind) -> Iterator[Move]:
    """Every legal move of a flow, in the order of the table."""
    flow = FLOWS[kind]
    yield Move(INITIAL, next(iter(flow)), Via())
    for source, stage in flow.items():
        if stage.repeats:
            yield Move(source, source, Via("progress_rises"))
        for status, via in stage.next.items():
            yield Move(source, status, via)
        if not stage.terminal:
            yield Move(source, FAILED, Via())


@cache
def ceiling(kind: Kind, status: str) -> int:
    """The percentage below which a repeat of this stage must stay."""
    flow = FLOWS[kind]
    return min(flow[after].progress or 0 for after in flow[status].next)
