"""Editors and face swaps supplied by the operator, which the settings name as ``package.module:factory``.

Whatever this code raises, returns or reports, the generation ends with a documented code, and clients and the log get
at most the type of an exception and a line number.
"""

import asyncio
import inspect
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from operator import attrgetter
from traceback import walk_tb
from typing import Any, ClassVar

from adapters.images.codec import Unreadable
from adapters.images.threads import ImageThreads
from adapters.providers.pictures import usable
from domain.errors import Failure, Refusal
from domain.events import FaceSwapError
from domain.ports.images import Picture
from domain.ports.providers import Report
from domain.requests import Options

logger = logging.getLogger(__name__)


class UnfitProvider(ValueError):
    """The factory does not make a valid provider. The message is the reason, as part of a sentence."""


class _Own:
    #: The port's methods, and how many arguments each takes.
    methods: ClassVar[Sequence[str]]
    arguments: ClassVar[int]
    free: bool

    def __init__(self, name: str, threads: ImageThreads) -> None:
        """Import and call the factory. Raises `UnfitProvider`."""
        self._name = name
        self._module, _, factory = name.partition(":")
        self._threads = threads
        if "" not in sys.path:
            sys.path.append("")  # The current directory, after installed packages.
        try:
            self._provider = attrgetter(factory)(import_module(self._module))()
            if inspect.iscoroutine(self._provider):
                self._provider.close()  # Or Python warns that it was never awaited.
            self.free = getattr(self._provider, "free", None)  # type: ignore[assignment]
            is_fit = isinstance(self.free, bool) and all(map(self._has, self.methods))
        except BaseException as error:
            raise UnfitProvider(f"{name} failed with {self._describe(error)}") from None
        if not is_fit:
            raise UnfitProvider(
                f"{name} returned an object of the type {type(self._provider).__name__}; it needs free (True or False) "
                f"and, with {self.arguments} arguments, async {' and '.join(self.methods)}"
            )

    def _has(self, method: str) -> bool:
        """Whether the provider has this async method, for the right number of arguments."""
        function = getattr(self._provider, method, None)
        try:
            inspect.signature(function).bind(*range(self.arguments))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return False
        return inspect.iscoroutinefunction(inspect.unwrap(function))  # type: ignore[arg-type]

    async def _work(self, method: str, *arguments: Any, report: Report) -> Picture:
        """Call the method. Its reports are serialised, and ignored once it has returned."""
        reporting, over = asyncio.Lock(), False
        refusal: Refusal | None = None

        async def report_next(fraction: float, message: str, preview: Picture | None = None) -> None:
            nonlocal refusal
            async with reporting:
                if not over:
                    try:
                        await report(fraction, message, preview)
                    except Refusal as refused:  # From the log, for the runner.
                        refusal = refused
                        raise

        try:
            picture = await getattr(self._provider, method)(*arguments, report_next)
            if not isinstance(picture, Picture) or not isinstance(picture.data, bytes):
                raise Unreadable(f"an object of the type {type(picture).__name__}")
            return await self._threads.run(usable, picture.data)
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Unreadable as unreadable:
            logger.warning("%s returned no picture: %s", self._name, unreadable)
            raise Failure("provider_unavailable") from None
        except BaseException as error:
            if refusal is not None:
                raise refusal from None
            if isinstance(error, Failure) and _is_fit(error):
                logger.warning("%s: %s failed with %s", self._name, method, error.code)
                raise
            logger.error("%s: %s", self._name, self._describe(error))
            raise Failure("internal") from None
        finally:
            async with reporting:
                over = True

    def _describe(self, error: BaseException) -> str:
        """The exception's type and the line in the module, without its message, which may contain secrets."""
        line = error.lineno if isinstance(error, SyntaxError) else None
        for frame, number in walk_tb(error.__traceback__):
            if frame.f_globals.get("__name__") == self._module:
                line = number
        name = type(error).__name__
        return name if line is None else f"{name} in line {line} of {self._module}"


def _is_fit(failure: Failure) -> bool:
    """Whether it has a provider's code, and can be sent to clients."""
    try:
        FaceSwapError(code=failure.code, message=failure.sentence)
    except ValueError:
        return False
    return failure.code.startswith("provider_") and isinstance(failure.retryable, bool)


class OwnEditor(_Own):
    """`domain.ports.providers.ImageEditor` around the operator's implementation."""

    methods, arguments = ("edit", "generate"), 4

    async def edit(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        return await self._work("edit", sheet, prompt, options, report=report)

    async def generate(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        return await self._work("generate", sheet, prompt, options, report=report)


class OwnFaceSwap(_Own):
    """`domain.ports.providers.FaceSwapper` around the operator's implementation."""

    methods, arguments = ("swap",), 3

    async def swap(self, picture: Picture, face: Picture, report: Report) -> Picture:
        return await self._work("swap", picture, face, report=report)
