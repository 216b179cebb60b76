"""Reads a multipart form as clients really send it, with its files in one temporary file."""

import codecs
import logging
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from tempfile import SpooledTemporaryFile
from typing import Final

from fastapi import Request
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from api.rest.bodies import limited
from domain.errors import Failure

logger = logging.getLogger(__name__)

#: Characters. A boundary has at most 70, and parsing the header's parameters takes quadratic time.
_MAX_CONTENT_TYPE: Final = 1_000
#: How Starlette's errors for a form beyond its limits begin.
_TOO_LARGE: Final = ("Too many", "Part exceeded")
#: The accepted charsets, by Python's names. Others are rare, slow or not for texts.
_CHARSETS: Final = re.compile(r"utf-8|iso8859-[0-9]+|cp125[0-9]")
#: Bytes that distinguish PNG, JPEG and WebP from text: one of them is NUL or not UTF-8.
_HEAD: Final = 8
#: Bytes of one form's files that are kept in memory. Beyond that, all are on disk.
_IN_MEMORY: Final = 256 * 1024


@asynccontextmanager
async def multipart(request: Request, texts: Collection[str], limit: int, sentence: str) -> AsyncIterator[FormData]:
    """The request's form, of at most `limit` bytes. Its files can be read until the end of the context.

    `texts`: the fields that are texts, whatever the headers of their parts say.

    Raises:
        HTTPException: 400, 413, 415: the body is not a form, or is beyond a limit.
        Failure: ``storage_failed``: the disk is full.
    """
    content_type = request.headers.get("content-type", "")
    if len(content_type) > _MAX_CONTENT_TYPE:
        raise HTTPException(400, "The content type is too long.")
    media_type, options = parse_options_header(content_type)
    if media_type != b"multipart/form-data":
        raise HTTPException(415, "The content type must be multipart/form-data.")
    if b"boundary" not in options:
        raise HTTPException(400, "The content type has no boundary. Let the HTTP client set this header.")
    with _Spool() as spool:
        try:
            form = await _Parser(limited(request, limit, sentence), options, texts, spool).parse()
        except MultiPartException as error:
            raise HTTPException(413 if error.message.startswith(_TOO_LARGE) else 400, error.message) from None
        except OSError as error:
            logger.error("an upload cannot be kept: %s", error.strerror)
            raise Failure("storage_failed") from None
        yield form


def is_file(part: object) -> bool:
    """Whether a field's value is a file. Many clients send files without a name: then the content decides."""
    if not isinstance(part, UploadFile):
        return False
    head = part.file.read(_HEAD)
    part.file.seek(0)
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return bool(part.filename) or "\0" in text


def is_empty(value: str | UploadFile) -> bool:
    """Whether a field counts as not given: an empty text, or a file input in which nothing was chosen."""
    return value == "" if isinstance(value, str) else not (value.filename or value.size)


class _Parser(MultiPartParser):
    """Starlette's parser, made tolerant.

    The field decides whether a part is a file, as its headers differ between clients. Texts are decoded by their own
    charset, and JSON strings are unwrapped, as some clients send every value as `application/json`. What precedes the
    first boundary is skipped, and an incomplete form is refused.
    """

    def __init__(
        self, request: Request, options: Mapping[bytes, bytes], texts: Collection[str], spool: "_Spool"
    ) -> None:
        super().__init__(request.headers, self._whole(request.stream()))
        self._spool = spool
        # Turns the preamble into a first part, behind which the library finds the first boundary.
        self._preamble = b"--%b\r\n\r\n\r\n" % options[b"boundary"]
        self._in_preamble = True
        self._form_charset = _codec(options.get(b"charset") or b"utf-8")
        self._texts = {name.encode() for name in texts}
        self._json = self._ended = False

    def on_headers_finished(self) -> None:
        if self._in_preamble:
            return
        part = self._current_part
        _, options = parse_options_header(part.content_disposition)
        headers = dict(part.item_headers)
        if headers.get(b"content-transfer-encoding", b"binary").strip().lower() not in (b"7bit", b"8bit", b"binary"):
            raise HTTPException(415, "The parts of a form must be sent as they are, without a transfer encoding.")
        media_type, parameters = parse_options_header(headers.get(b"content-type"))
        self._json = media_type == b"application/json"
        if options.get(b"name") in self._texts:
            part.content_disposition = b"form-data; name=%b" % options[b"name"]
            charset = parameters.get(b"charset")
            self._charset = _codec(charset) if charset else self._form_charset
        elif b"filename" not in options:
            # At the front, where an error in the rest cannot hide it.
            part.content_disposition = b'form-data; filename="";' + (part.content_disposition or b"").partition(b";")[2]
        super().on_headers_finished()
        if part.file is not None:
            part.file.file.close()
            part.file.file = _SpooledPart(self._spool)  # type: ignore[assignment]  # has all methods that are used

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_preamble:
            super().on_part_data(data, start, end)

    def on_part_end(self) -> None:
        if self._in_preamble:
            self._in_preamble = False
            return
        super().on_part_end()
        name, value = self.items[-1]
        if self._json and isinstance(value, str):
            self.items[-1] = name, _unwrapped(value)

    def on_end(self) -> None:
        self._ended = True

    async def _whole(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        yield self._preamble
        async for chunk in stream:
            yield chunk
        if not self._ended:
            raise MultiPartException("The form is not complete.")


def _codec(charset: bytes) -> str:
    try:
        name = codecs.lookup(charset.decode("ascii")).name.replace("ascii", "utf-8")
    except (LookupError, ValueError):
        name = ""
    if not _CHARSETS.fullmatch(name):
        raise HTTPException(415, "The texts of a form must be in UTF-8, ISO-8859 or a Windows code page.")
    return name


def _unwrapped(text: str) -> str:
    """The value of a JSON string; any other text as it is."""
    try:
        value = from_json(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


class _Spool(SpooledTemporaryFile[bytes]):
    """All files of one form, one after the other, so that they use one descriptor."""

    on_disk = False

    def __init__(self) -> None:
        super().__init__(_IN_MEMORY)

    def rollover(self) -> None:
        super().rollover()
        self.on_disk = True


class _SpooledPart:
    """One of them as a file, which is written before the next one."""

    def __init__(self, spool: _Spool) -> None:
        self._spool = spool
        self._start = self._size = self._at = 0

    @property
    def _rolled(self) -> bool:
        """Whether it is on disk: `starlette.datastructures.UploadFile` then uses it in a thread."""
        return self._spool.on_disk

    def write(self, data: bytes) -> int:
        end = self._spool.seek(0, os.SEEK_END)
        self._start = self._start if self._size else end
        self._size += self._spool.write(data)
        self._at = self._size
        return len(data)

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._at
        self._spool.seek(self._start + self._at)
        data = self._spool.read(min(size, left) if size >= 0 else left)
        self._at += len(data)
        return data

    def seek(self, offset: int) -> int:
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at
