"""What calls to other servers share: TLS, ``Retry-After``, ``Content-Encoding``, and bodies of limited size."""

import math
import ssl
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Final

import httpx2

#: The content codings that change the bytes: IANA's registry, plus bzip2 and xz, which servers use too.
_COMPRESSIONS: Final = frozenset(
    ("aes128gcm", "br", "bzip2", "compress", "dcb", "dcz", "deflate", "exi", "gzip", "pack200-gzip", "xz", "zstd")
)


@cache
def ssl_context() -> ssl.SSLContext:
    """The shared context with httpx2's certificate authorities, or those in `SSL_CERT_FILE` and `SSL_CERT_DIR`.

    Cached, because loading takes 50 ms. Do not modify it.
    """
    return httpx2.create_ssl_context()


class TooLarge(httpx2.DecodingError):
    """A body has more bytes than allowed."""


async def bounded(chunks: AsyncGenerator[bytes], limit: int) -> AsyncGenerator[bytes]:
    """The chunks of a body. Raises `TooLarge` beyond `limit` bytes."""
    remaining = limit
    async with aclosing(chunks):
        async for chunk in chunks:
            remaining -= len(chunk)
            if remaining < 0:
                raise TooLarge(f"larger than {limit} bytes")
            yield chunk


def compressions(headers: Iterable[str]) -> list[str]:
    """The compressions named in ``Content-Encoding`` headers, in the order in which they were applied.

    Other tokens are ignored: storage services and frameworks also send a charset, ``base64``, ``aws-chunked`` or
    ``none``, and leave the bytes unchanged.
    """
    names = (name.partition(";")[0].strip(' \t"').lower() for header in headers for name in header.split(","))
    return [name for name in (name.removeprefix("x-") for name in names) if name in _COMPRESSIONS]


def retry_after(header: str) -> float | None:
    """Seconds from now, at least 0, from a number of seconds or an HTTP date; ``None`` if it is neither."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            at = parsedate_to_datetime(header)
        except (ValueError, OverflowError):
            return None
        seconds = (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
