"""Stores pictures in a bucket: ``STAGECAST_IMAGES=s3://bucket/prefix``. Needs the extra ``s3``.

Credentials, region and endpoint are those of the AWS environment variables, or of the machine's role.
"""

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple, Self

import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError
from obstore.store import S3Store

from adapters.images.layout import ID, MARK, NAME, PROBED, Mark, media_type, new_name
from domain.errors import Failure
from domain.ports.images import ImagesRefused, Picture

logger = logging.getLogger(__name__)

#: Pictures sent or fetched at the same time. More connections would only make each of them slower.
_TRANSFERS: Final = 32
#: Seconds for one of them, with the wait for its turn.
_LIMIT: Final = 60
#: ``timeout`` is that of a request as a whole. Plain HTTP is used only if the URL of the endpoint says so.
_CLIENT: Final[Any] = {"timeout": timedelta(seconds=30), "connect_timeout": timedelta(seconds=3), "allow_http": True}
_BACKOFF: Final = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2}
#: A request that is answered with 5xx or 429, or not at all, is sent again, but not later than ``retry_timeout``.
_RETRIES: Final[Any] = {"max_retries": 4, "retry_timeout": timedelta(seconds=20), "backoff": _BACKOFF}
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
#: What is said of an error, by what is found in its text.
_REASONS: Final = {
    r"//169\.254\.": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set, and the machine has no role",
    r"<Code>(\w{1,100})</Code>": "the service answers {}",
    r"status code: (\d{3})": "the service answers {}",
    "redirect": "AWS_REGION is not the region of the bucket",
    "HTTP error": "the service cannot be reached",
}
#: The key under which nodes store a probe, and remove it again.
_PROBE: Final = ".probe"
_ALWAYS: Final = datetime.min.replace(tzinfo=UTC)


class _Object(NamedTuple):
    #: ``None``: there is no object with this key.
    data: bytes | None = None
    e_tag: str | None = None
    stored: datetime = _ALWAYS


class S3Images:
    """`domain.ports.images.ImageStore` with an object per picture: ``<prefix>/<generation id>/<name>``.

    A picture is stored by one request, so that it is whole or not there, and no parts of it are left behind. Objects
    with other keys are neither served nor removed. A bucket has no locks: of two memory logs the later one takes it
    over, and the earlier one then fails its probe and sweeps nothing.
    """

    def __init__(self, url: str, mark: Mark) -> None:
        self._bucket = _connect(url)
        self._mark = mark
        self._transfers = asyncio.Semaphore(_TRANSFERS)
        #: Pictures stored before `_since` are never reported as removable, those stored before `_claimed` always.
        self._since = self._claimed = _ALWAYS

    @classmethod
    async def open(cls, url: str, *, log: str, epoch: str) -> Self:
        """Claim the bucket and prefix for the log of this kind and epoch. Raises `ImagesRefused`."""
        with _refusing(place := f"The image bucket {url}"):
            store = cls(url, Mark(log, epoch))
            await store._claim(place)
            await store._probe()  # The mark may have been there already.
        return store

    @staticmethod
    def examine(url: str, *, log: str, epoch: str | None) -> None:
        """Check without changes whether the bucket could be claimed. Raises `ImagesRefused`."""
        with _refusing(place := f"The image bucket {url}"):
            mark = b""
            # Not by asyncio: obstore's threads then abort a process that exits at once, half of the time.
            with _unless_absent():
                mark = bytes(obstore.get(_connect(url), MARK).bytes())
            Mark(log, epoch).check(mark, place)

    async def close(self) -> None:
        pass

    async def save(self, generation_id: str, picture: Picture, name: str | None = None) -> str:
        name = name or new_name(generation_id, picture)
        with _failing("a picture of %s cannot be stored", generation_id):
            async with asyncio.timeout(_LIMIT), self._transfers:
                key, kind = f"{generation_id}/{name}", {"Content-Type": picture.media_type}
                await obstore.put_async(self._bucket, key, picture.data, attributes=kind, use_multipart=False)
        return name

    async def load(self, name: str) -> Picture | None:
        if match := NAME.fullmatch(name):
            with _failing("a picture of %s cannot be read", match[1]):
                async with asyncio.timeout(_LIMIT), self._transfers:
                    data = (await _read(self._bucket, f"{match[1]}/{name}")).data
                    return None if data is None else Picture(data, media_type(name))
        return None

    async def size(self, name: str) -> int:
        if match := NAME.fullmatch(name):
            with _failing("a picture of %s cannot be read", match[1]), contextlib.suppress(FileNotFoundError):
                return (await obstore.head_async(self._bucket, f"{match[1]}/{name}"))["size"]
        return 0

    async def discard(self, name: str) -> None:
        if match := NAME.fullmatch(name):
            with contextlib.suppress(Failure), _failing("a picture of %s cannot be removed", match[1]):
                await obstore.delete_async(self._bucket, f"{match[1]}/{name}")

    async def remove(self, generation_id: str) -> None:
        if ID.fullmatch(generation_id):
            with contextlib.suppress(Failure), _failing("the pictures of %s cannot be removed", generation_id):
                found = await obstore.list(self._bucket, generation_id).collect_async()
                await obstore.delete_async(self._bucket, [each["path"] for each in found])

    async def names(self, *, older_than: datetime) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        with _failing("the bucket cannot be listed"):
            await self._check_mark()
            async for page in obstore.list(self._bucket, chunk_size=1_000):
                for each in page:
                    generation_id, _, name = each["path"].rpartition("/")
                    if not self._since <= each["last_modified"] < max(older_than, self._claimed):
                        continue
                    if (match := NAME.fullmatch(name)) and match[1] == generation_id:
                        found.setdefault(generation_id, []).append(name)
        return found

    async def probe(self) -> None:
        with _failing("no picture can be stored"):
            await self._check_mark()
            await self._probe()

    async def _probe(self) -> None:
        await obstore.put_async(self._bucket, _PROBE, PROBED, use_multipart=False)
        await obstore.delete_async(self._bucket, _PROBE)

    async def _claim(self, place: str) -> None:
        while (found := await _read(self._bucket, MARK)).data != bytes(self._mark):
            self._mark.check(found.data or b"", place)
            # Of several nodes that start at the same time, one writes the mark, and the others find it.
            with contextlib.suppress(AlreadyExistsError, PreconditionError):
                mode: Any = "create" if found.data is None else {"e_tag": found.e_tag}
                await obstore.put_async(self._bucket, MARK, bytes(self._mark), mode=mode)
                stored = (await _read(self._bucket, MARK)).stored
                # What a memory log has stored is of no use. Without a mark, nobody knows whose pictures they are.
                self._since, self._claimed = (_ALWAYS, stored) if found.data else (stored, _ALWAYS)

    async def _check_mark(self) -> None:
        if (await _read(self._bucket, MARK)).data != bytes(self._mark):
            raise ImagesRefused("another log has claimed the bucket, or its mark was removed")


def _connect(url: str) -> S3Store:
    if not all(re.match("https?://", os.environ.get(name) or "http://") for name in _ENDPOINTS):  # It would panic.
        raise ImagesRefused("AWS_ENDPOINT_URL must be an http or https URL.")
    # Not every compatible service has requests that remove several objects.
    return S3Store.from_url(url, disable_bulk_delete=True, client_options=_CLIENT, retry_config=_RETRIES)


async def _read(bucket: S3Store, key: str) -> _Object:
    with _unless_absent():
        found = await obstore.get_async(bucket, key)
        return _Object(bytes(await found.bytes_async()), found.meta["e_tag"], found.meta["last_modified"])
    return _Object()


@contextlib.contextmanager
def _unless_absent() -> Iterator[None]:
    """Suppress the error that there is no such object. Another one says that there is no such bucket."""
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise


def _reason(error: Exception) -> str:
    """Why a request failed, without the text of the error, which may quote access keys and addresses."""
    if isinstance(error, ImagesRefused):
        return str(error)
    found = ((re.search(pattern, str(error)), reason) for pattern, reason in _REASONS.items())
    return next((reason.format(*match.groups()) for match, reason in found if match), type(error).__name__)


@contextlib.contextmanager
def _failing(what: str, *of: str) -> Iterator[None]:
    """Turn what a request raises into `Failure`, and log the reason."""
    try:
        yield
    except Exception as error:  # obstore's errors have no common base.
        reason = _reason(error)
        logger.error(f"{what}: %s", *of, reason, extra={"repeat_key": (what, reason)})
        raise Failure("storage_failed") from None


@contextlib.contextmanager
def _refusing(place: str) -> Iterator[None]:
    try:
        yield
    except ImagesRefused:
        raise
    except Exception as error:
        raise ImagesRefused(f"{place} cannot be used: {_reason(error)}.") from None
