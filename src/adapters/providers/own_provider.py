"""Editors and face swaps of the operator's own, which the settings name as ``package.module:factory``.

Their code is not ours: whatever it raises, returns or reports, the generation ends with a code of the contract, and
neither clients nor the log get more than the type of an exception and a line number.
"""

import asyncio
import inspect
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from operator import attrgetter
from typing import Any, ClassVar

from adapters.images.threads import ImageThreads
from adapters.providers.pictures import Unusable, usable
from domain.errors import Failure, Refusal
from domain.events import FaceSwapError
from domain.orders import Options
from domain.ports import Picture, Report

logger = logging.getLogger(__name__)


class UnfitProvider(Exception):
    """The factory makes no such provider. Its text is the reason, as a part of a sentence."""


class _Own:
    #: What the port's methods are called, and how many arguments they take.
    methods: ClassVar[Sequence[tuple[str, int]]]

    def __init__(self, name: str, threads: ImageThreads) -> None:
        """Make the provider. Raises `UnfitProvider`."""
        self._name = name
        self._module, _, factory = name.partition(":")
        self._threads = threads
        if "" not in sys.path:
            sys.path.append("")  # The current directory. What is installed comes first.
        step = f"importing {self._module}"
        try:
            module = import_module(self._module)
            step = f"looking for {factory} in {self._module}"
            make = attrgetter(factory)(module)
            step = f"calling {name}"
            self._provider = make()
            if inspect.iscoroutine(self._provider):
                self._provider.close()  # Or Python warns that nobody awaits it.
            step = f"looking at what {name} returned"
            self._check()
        except UnfitProvider:
            raise
        except BaseException as error:
            raise UnfitProvider(f"{step} failed with {self._what(error)}") from None

    def _check(self) -> None:
        returned = f"{self._name} returned an object of the type {type(self._provider).__name__}"
        free = getattr(self._provider, "free", None)
        if not isinstance(free, bool):
            raise UnfitProvider(f"{returned}, which has no attribute free that is True or False")
        self.free = free
        for method, count in self.methods:
            function = getattr(self._provider, method, None)
            if not callable(function) or _is_blocking(inspect.unwrap(function)):
                raise UnfitProvider(f"{returned}, which has no async method {method}")
            try:
                inspect.signature(function).bind(*range(count))
            except TypeError:
                raise UnfitProvider(f"{returned}, whose method {method} does not take {count} arguments") from None

    async def _work(self, method: str, *arguments: Any, report: Report) -> Picture:
        """One call. Its reports are made one after the other, and none after it has returned."""
        reporting, over = asyncio.Lock(), False
        refusal: Refusal | None = None

        async def report_next(fraction: float, message: str, preview: Picture | None = None) -> None:
            nonlocal refusal
            async with reporting:
                if not over:
                    try:
                        await report(fraction, message, preview)
                    except Refusal as refused:  # The log's answer, which is for the runner.
                        refusal = refused
                        raise

        try:
            picture = await getattr(self._provider, method)(*arguments, report_next)
            if not isinstance(picture, Picture) or not isinstance(picture.data, bytes):
                raise Unusable(f"an object of the type {type(picture).__name__}")
            return await self._threads.run(usable, picture.data)
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Unusable as unusable:
            logger.warning("%s returned no picture: %s", self._name, unusable)
            raise Failure("provider_unavailable") from None
        except BaseException as error:
            if refusal is not None:
                raise refusal from None
            if isinstance(error, Failure) and _is_fit(error):
                raise
            logger.error("%s: %s", self._name, self._what(error))
            raise Failure("internal") from None
        finally:
            async with reporting:
                over = True

    def _what(self, error: BaseException) -> str:
        """What was raised: its type, and the line of the module. Its text may hold anything."""
        line = error.lineno if isinstance(error, SyntaxError) else None
        traceback = error.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_globals.get("__name__") == self._module:
                line = traceback.tb_lineno
            traceback = traceback.tb_next
        name = type(error).__name__
        return name if line is None else f"{name} in line {line} of {self._module}"


def _is_blocking(function: object) -> bool:
    """Whether it is a function of Python that is not declared with ``async def``."""
    plain = inspect.isfunction(function) or inspect.ismethod(function)
    return plain and not inspect.iscoroutinefunction(function)


def _is_fit(failure: Failure) -> bool:
    """Whether it is one of a provider's, and can be told to clients."""
    try:
        FaceSwapError(code=failure.code, message=failure.sentence)
    except ValueError:
        return False
    return failure.code.startswith("provider_") and isinstance(failure.retryable, bool)


class OwnEditor(_Own):
    """`domain.ports.ImageEditor` around an implementation of it."""

    methods = (("edit", 4), ("generate", 4))

    async def edit(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        return await self._work("edit", sheet, prompt, options, report=report)

    async def generate(self, sheet: Picture, prompt: str, options: Options, report: Report) -> Picture:
        return await self._work("generate", sheet, prompt, options, report=report)


class OwnFaceSwap(_Own):
    """`domain.ports.FaceSwapper` around an implementation of it."""

    methods = (("swap", 3),)

    async def swap(self, picture: Picture, face: Picture, report: Report) -> Picture:
        return await self._work("swap", picture, face, report=report)
