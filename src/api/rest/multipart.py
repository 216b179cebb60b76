"""Reads a multipart form as clients really send it, with its files in one temporary file."""

import codecs
import logging
import re
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from functools import lru_cache, partial
from tempfile import SpooledTemporaryFile
from typing import Final

from fastapi import Request
from pydantic_core import from_json
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from api.rest import headers
from api.rest.bodies import read_body
from domain.errors import Failure

logger = logging.getLogger(__name__)

#: Semicolons in a header, as parsing its parameters takes quadratic time.
_MAX_PARAMETERS: Final = 100
#: Parts of a form, and bytes of all its texts.
_MAX_PARTS: Final = 1_000
_MAX_TEXTS: Final = 1024 * 1024
#: The accepted charsets, by Python's names. Others are rare, slow or not for texts.
_CHARSETS: Final = re.compile(r"utf-8|iso8859-[0-9]+|cp125[0-9]")
#: Bytes that distinguish PNG, JPEG and WebP from text: one of them is NUL or not UTF-8.
_START: Final = 8
#: Bytes of one form's files that are kept in memory. Beyond that, all are on disk.
_IN_MEMORY: Final = 256 * 1024

#: A temporary file for all files of one form, one after the other, so that they use one descriptor.
spool: Final = partial(SpooledTemporaryFile[bytes], _IN_MEMORY)


class FormFile:
    """A part that is not one of the known texts. It implements `domain.workflow.Upload`."""

    def __init__(self, filename: bytes, files: SpooledTemporaryFile[bytes]) -> None:
        self._named = bool(filename)
        self._files = files
        self._at = files.tell()
        self._start = b""
        self.size = 0

    def append(self, data: bytes) -> None:
        """Add to its content, before the next file begins."""
        self._start += data[: _START - len(self._start)]
        self.size += self._files.write(data)

    async def read(self) -> bytes:
        """Its content, once the form is complete."""
        return await run_in_threadpool(self._read)

    def _read(self) -> bytes:
        self._files.seek(self._at)
        return self._files.read(self.size)

    @property
    def is_file(self) -> bool:
        """Whether it is a file and no text. Many clients send files without a name: then the content decides."""
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(self._start)
        except UnicodeDecodeError:
            return True
        return self._named or "\0" in text

    @property
    def is_empty(self) -> bool:
        """Whether it is a file input in which nothing was chosen."""
        return not (self._named or self.size)


class _Text:
    """A part that is a text. Some clients send every value as JSON."""

    def __init__(self, charset: str, json: bool) -> None:
        self._charset = charset
        self._json = json
        self._content = bytearray()

    def append(self, data: bytes) -> None:
        """Add to its content."""
        self._content += data

    def __str__(self) -> str:
        text = _decoded(bytes(self._content), self._charset)
        return _unwrapped(text) if self._json else text


async def read_multipart(
    request: Request, files: SpooledTemporaryFile[bytes], texts: Collection[str], limit: int, sentence: str
) -> dict[str, list[str | FormFile]]:
    """The values of the request's form, of at most `limit` bytes, by field. The content of its files is in `files`.

    `texts`: the fields that are texts, whatever the headers of their parts say.

    Raises:
        HTTPException: 400, 413, 415: the body is not a form, or is beyond a limit.
        Failure: ``storage_failed``: the disk is full.
    """
    media_type, options = _options(headers.value(request.scope, b"content-type").encode("latin-1"))
    if media_type != b"multipart/form-data":
        raise HTTPException(415, "The content type must be multipart/form-data.")
    if not options.get(b"boundary"):
        raise HTTPException(400, "The content type has no boundary. Let the HTTP client set this header.")
    parts = _Parts(files, texts, _codec(options.get(b"charset") or b"utf-8"))
    try:
        parser = parts.parser(options[b"boundary"])
        async for chunk in read_body(request, limit, sentence):
            if files.tell() + len(chunk) > _IN_MEMORY:
                await run_in_threadpool(parser.write, chunk)
            else:
                parser.write(chunk)
    except FormParserError:
        detail = "The form has a delimiter or header that is not valid or too long, or a part with more than 8 headers."
        raise HTTPException(400, detail) from None
    except OSError as error:
        logger.error("an upload cannot be kept: %s", error.strerror)
        raise Failure("storage_failed") from None
    if parser.state != MultipartState.END:
        raise HTTPException(400, "The form is not complete.")
    form = defaultdict[str, list[str | FormFile]](list)
    for name, part in parts.found:
        form[name].append(part if isinstance(part, FormFile) else str(part))
    return form


class _Parts:
    """The parts of a form that its parser has found so far."""

    def __init__(self, files: SpooledTemporaryFile[bytes], texts: Collection[str], charset: str) -> None:
        self._files = files
        self._texts = texts
        self._charset = charset
        #: Of the next part; and the name and the value of its next header, which may arrive in pieces.
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = b""
        self._text_size = 0
        self.found: list[tuple[str, _Text | FormFile]] = []

    def parser(self, boundary: bytes) -> MultipartParser:
        """A parser of a form with this boundary, which adds the parts."""
        parser = MultipartParser(boundary)
        # So what precedes the first delimiter is the content of a part that nobody reads.
        parser.write(b"--%b\r\n\r\n\r\n" % boundary)
        parser.callbacks = {
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
        }
        return parser

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._name.lower()] = self._value.strip()
        self._name = self._value = b""

    def _on_headers_finished(self) -> None:
        given, self._headers = self._headers, {}
        if len(self.found) == _MAX_PARTS:
            raise HTTPException(413, "The form has too many fields.")
        _, options = _options(given.get(b"content-disposition", b""))
        if b"name" not in options:
            raise HTTPException(400, "A part of the form names no field.")
        if given.get(b"content-transfer-encoding", b"binary").lower() not in (b"7bit", b"8bit", b"binary"):
            raise HTTPException(415, "The parts of a form must be sent as they are, without a transfer encoding.")
        name = _decoded(options[b"name"], self._charset)
        part: _Text | FormFile
        if name in self._texts:
            media_type, parameters = _options(given.get(b"content-type", b""))
            charset = parameters.get(b"charset")
            part = _Text(_codec(charset) if charset else self._charset, media_type == b"application/json")
        else:
            part = FormFile(options.get(b"filename", b""), self._files)
        self.found.append((name, part))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if not self.found:
            return
        _, part = self.found[-1]
        if isinstance(part, _Text):
            self._text_size += end - start
            if self._text_size > _MAX_TEXTS:
                raise HTTPException(413, "The texts of the form may have 1 MB at most.")
        part.append(data[start:end])


@lru_cache(256)  # Clients repeat the headers of their parts.
def _options(header: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """The value of a header, and its parameters."""
    if header.count(b";") > _MAX_PARAMETERS:
        raise HTTPException(400, "A header has too many parameters.")
    return parse_options_header(header)


@lru_cache(256)
def _codec(charset: bytes) -> str:
    try:
        name = codecs.lookup(charset.decode("ascii")).name.replace("ascii", "utf-8")
    except (LookupError, ValueError):
        name = ""
    if not _CHARSETS.fullmatch(name):
        raise HTTPException(415, "The texts of a form must be in UTF-8, ISO-8859 or a Windows code page.")
    return name


def _decoded(data: bytes, charset: str) -> str:
    """The text; bytes that are not in its charset are read as Latin-1."""
    try:
        return data.decode(charset)
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _unwrapped(text: str) -> str:
    """The value of a JSON string; any other text as it is."""
    if text.lstrip().startswith('"'):
        with suppress(ValueError):
            return str(from_json(text))
    return text
