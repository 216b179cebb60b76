"""Parses ``Content-Encoding`` headers."""

from collections.abc import Iterable
from typing import Final

_ALIASES: Final = {"x-gzip": "gzip", "x-deflate": "deflate", "x-br": "br", "x-zstd": "zstd", "x-compress": "compress"}
#: The content codings that change the bytes: IANA's registry, plus bzip2 and xz, which servers use too.
_COMPRESSIONS: Final = frozenset(
    ("aes128gcm", "br", "bzip2", "compress", "dcb", "dcz", "deflate", "exi", "gzip", "pack200-gzip", "xz", "zstd")
)


def compressions(headers: Iterable[str]) -> list[str]:
    """The compressions named in these headers, in the order in which they were applied.

    Other tokens are ignored: storage services and frameworks also send a charset, ``base64``, ``aws-chunked`` or
    ``none``, and leave the bytes unchanged.
    """
    names = (name.partition(";")[0].strip(' \t"').lower() for header in headers for name in header.split(","))
    return [name for name in (_ALIASES.get(name, name) for name in names) if name in _COMPRESSIONS]
