"""Reads a multipart form as clients really send it, with its files in one temporary file."""

import codecs
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from tempfile import SpooledTemporaryFile
from typing import Final, TypeVar, TypeVarTuple

from fastapi import Request
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from api.rest.bodies import read_body
from domain.errors import Failure

logger = logging.getLogger(__name__)

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")

#: Characters of a content type, as parsing its parameters takes quadratic time, and of a boundary.
_MAX_CONTENT_TYPE: Final = 1_000
_MAX_BOUNDARY: Final = 256
#: Parts of a form, headers of a part and their bytes, and bytes of a text.
_MAX_PARTS: Final = 1_000
_MAX_HEADERS: Final = 8
_MAX_HEAD: Final = 8 * 1024
_MAX_TEXT: Final = 1024 * 1024
#: What may follow a delimiter: the end of the form, or of the line; and a beginning of that, of so many bytes at most.
_AFTER_DELIMITER: Final = re.compile(rb"--|[ \t]*\r\n")
_INCOMPLETE: Final = re.compile(rb"-|[ \t]{0,100}\r?")
_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*", re.DOTALL)
#: The accepted charsets, by Python's names. Others are rare, slow or not for texts.
_CHARSETS: Final = re.compile(r"utf-8|iso8859-[0-9]+|cp125[0-9]")
#: Bytes that distinguish PNG, JPEG and WebP from text: one of them is NUL or not UTF-8.
_START: Final = 8
#: Bytes of one form's files that are kept in memory. Beyond that, all are on disk.
_IN_MEMORY: Final = 256 * 1024

#: Cached, as clients repeat the headers of their parts.
_options: Final = lru_cache(256)(parse_options_header)


class Spool:
    """A temporary file for all files of one form, one after the other, so that they use one descriptor."""

    def __init__(self) -> None:
        self._file = SpooledTemporaryFile[bytes](_IN_MEMORY)
        #: In bytes.
        self.size = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    async def append(self, data: bytes) -> None:
        """Add to the last file."""
        self.size += len(data)
        await self._run(self._file.write, data)

    async def read(self, start: int, size: int) -> bytes:
        """This part of the file. Nothing is appended after that."""

        def read() -> bytes:
            self._file.seek(start)
            return self._file.read(size)

        return await self._run(read)

    async def _run(self, function: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
        """Call it, in a thread if the file is on disk."""
        return await run_in_threadpool(function, *arguments) if self.size > _IN_MEMORY else function(*arguments)


class FormFile:
    """A part that is not one of the known texts. It implements `domain.workflow.Upload`."""

    def __init__(self, filename: bytes, spool: Spool) -> None:
        self._named = bool(filename)
        self._spool = spool
        self._at = spool.size
        self._start = b""
        self.size = 0

    async def append(self, data: bytes) -> None:
        """Add to its content."""
        self._start += data[: _START - len(self._start)]
        self.size += len(data)
        await self._spool.append(data)

    async def read(self) -> bytes:
        """Its content, once the form is complete."""
        return await self._spool.read(self._at, self.size)

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

    async def append(self, data: bytes) -> None:
        """Add to its content."""
        self._content += data
        if len(self._content) > _MAX_TEXT:
            raise HTTPException(413, "A text of the form may have 1 MB at most.")

    def __str__(self) -> str:
        text = _decoded(bytes(self._content), self._charset)
        return _unwrapped(text) if self._json else text


async def read_multipart(
    request: Request, spool: Spool, texts: Collection[str], limit: int, sentence: str
) -> dict[str, list[str | FormFile]]:
    """The values of the request's form, of at most `limit` bytes, by field. Its files are in the `spool`.

    `texts`: the fields that are texts, whatever the headers of their parts say.

    Raises:
        HTTPException: 400, 413, 415: the body is not a form, or is beyond a limit.
        Failure: ``storage_failed``: the disk is full.
    """
    content_type = request.headers.get("content-type", "")
    if len(content_type) > _MAX_CONTENT_TYPE:
        raise HTTPException(400, "The content type is too long.")
    media_type, options = _options(content_type)
    if media_type != b"multipart/form-data":
        raise HTTPException(415, "The content type must be multipart/form-data.")
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= _MAX_BOUNDARY:
        raise HTTPException(400, "The content type has no usable boundary. Let the HTTP client set this header.")
    charset = _codec(options.get(b"charset") or b"utf-8")
    splitter = _Splitter(boundary)
    parts: list[tuple[str, _Text | FormFile]] = []
    try:
        async for chunk in read_body(request, limit, sentence):
            for is_head, data in splitter.feed(chunk):
                if not is_head:
                    await parts[-1][1].append(data)
                elif len(parts) < _MAX_PARTS:
                    parts.append(_part(data, spool, texts, charset))
                else:
                    raise HTTPException(413, "The form has too many fields.")
    except OSError as error:
        logger.error("an upload cannot be kept: %s", error.strerror)
        raise Failure("storage_failed") from None
    if not splitter.ended:
        raise HTTPException(400, "The form is not complete.")
    form = defaultdict[str, list[str | FormFile]](list)
    for name, part in parts:
        form[name].append(part if isinstance(part, FormFile) else str(part))
    return form


class _Splitter:
    """Splits a form into parts. What precedes the first delimiter or follows the end is skipped.

    python-multipart takes four times as long for a small form, and does not skip what precedes it.
    """

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        #: What has not been split yet. The first delimiter needs no line break before it.
        self._rest = b"\r\n"
        self._in_preamble, self._in_head = True, False
        #: Whether the end of the form was found.
        self.ended = False

    def feed(self, chunk: bytes) -> Iterator[tuple[bool, bytes]]:
        """What this chunk completes: the head of a part, as ``True`` and its lines, or ``False`` and some content.

        Raises `HTTPException`: a head is too long.
        """
        data = self._rest + chunk
        at = 0
        while not self.ended:
            if self._in_head:
                end = data.find(b"\r\n\r\n", at)
                if (end if end >= 0 else len(data)) - at > _MAX_HEAD:
                    raise HTTPException(400, "A part of the form has too long headers.")
                if end < 0:
                    break
                yield True, data[at:end]
                at, self._in_head = end + 4, False
                continue
            # Without a delimiter, its beginning may be at the end of the data.
            found, after = self._find_delimiter(data, at)
            if at < found and not self._in_preamble:
                yield False, data[at:found]
            at = found
            if after is None:
                break
            self.ended = after[0] == b"--"
            # A head begins with the line break of its delimiter, so that its end is found also without headers.
            at, self._in_head, self._in_preamble = after.end() - 2, True, False
        self._rest = data[at:]

    def _find_delimiter(self, data: bytes, at: int) -> tuple[int, re.Match[bytes] | None]:
        """Where the content ends for now, and what follows the delimiter there, if it is known."""
        size = len(self._delimiter)
        found = data.find(self._delimiter, at)
        while found >= 0:
            after = _AFTER_DELIMITER.match(data, found + size)
            if after or _INCOMPLETE.fullmatch(data, found + size):
                return found, after
            found = data.find(self._delimiter, found + size)
        return max(at, len(data) - size + 1), None


def _part(head: bytes, spool: Spool, texts: Collection[str], charset: str) -> tuple[str, _Text | FormFile]:
    """The name and the still empty content of the part with these headers."""
    lines = head.split(b"\r\n")[1:]
    matches = [match for line in lines if (match := _HEADER.fullmatch(line))]
    if len(matches) < len(lines) or len(lines) > _MAX_HEADERS:
        raise HTTPException(400, "A part of the form has headers that are not valid, or more than 8 of them.")
    headers = {match[1].lower(): match[2] for match in matches}
    _, options = _options(headers.get(b"content-disposition"))
    if b"name" not in options:
        raise HTTPException(400, "A part of the form names no field.")
    if headers.get(b"content-transfer-encoding", b"binary").lower() not in (b"7bit", b"8bit", b"binary"):
        raise HTTPException(415, "The parts of a form must be sent as they are, without a transfer encoding.")
    name = _decoded(options[b"name"], charset)
    if name not in texts:
        return name, FormFile(options.get(b"filename", b""), spool)
    media_type, parameters = _options(headers.get(b"content-type"))
    own_charset = parameters.get(b"charset")
    return name, _Text(_codec(own_charset) if own_charset else charset, media_type == b"application/json")


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
    try:
        value = from_json(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text
