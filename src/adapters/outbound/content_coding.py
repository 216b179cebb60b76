"""What servers say in ``Content-Encoding``."""

from collections.abc import Iterable
from typing import Final

_ALIASES: Final = {"x-gzip": "gzip", "x-deflate": "deflate", "x-br": "br", "x-zstd": "zstd", "x-compress": "compress"}
#: The content codings that change the bytes: IANA's registry, and two more that servers know.
_COMPRESSIONS: Final = frozenset(
    ("aes128gcm", "br", "bzip2", "compress", "dcb", "dcz", "deflate", "exi", "gzip", "pack200-gzip", "xz", "zstd")
)


def compressions(headers: Iterable[str]) -> list[str]:
    """The compressions that these headers name, in the order in which they were applied.

    Storage services and frameworks also put there what is no compression: a charset, ``base64``, ``aws-chunked``,
    ``none``. The bytes are then sent as they are.
    """
    names = (name.partition(";")[0].strip(' \t"').lower() for header in headers for name in header.split(","))
    return [name for name in (_ALIASES.get(name, name) for name in names) if name in _COMPRESSIONS]
