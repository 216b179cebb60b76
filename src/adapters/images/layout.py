"""How image stores name what they store, and mark it with the log that needs it."""

import json
import re
import secrets
from typing import Final, NamedTuple

from domain.ports.images import ImagesRefused, Picture

_SUFFIXES: Final = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
MEDIA_TYPES: Final = {suffix: media_type for media_type, suffix in _SUFFIXES.items()}

# Bounded by the limit of file systems for names.
ID: Final = re.compile(r"[a-z]{1,16}_[0-9]{1,20}_[a-z0-9]{1,64}")
#: The name of a picture; with a width, that of its thumbnail.
NAME: Final = re.compile(rf"({ID.pattern})-[0-9a-f]{{32}}\.({'|'.join(MEDIA_TYPES)})(\.[0-9]{{1,4}}\.webp)?")
#: What `ImageStore.probe` writes.
PROBED: Final = bytes(4096)


def new_name(generation_id: str, picture: Picture) -> str:
    """The name of a new picture. Raises ValueError: the id cannot name a folder."""
    if not ID.fullmatch(generation_id):
        raise ValueError(f"{generation_id!r} cannot name a folder")
    return f"{generation_id}-{secrets.token_hex(16)}.{_SUFFIXES[picture.media_type]}"


def media_type(name: str) -> str:
    """The media type of the picture of this name."""
    return MEDIA_TYPES[name.rpartition(".")[2]]


class Mark(NamedTuple):
    """The mark: a file with a line of JSON that names the log of the pictures."""

    #: The kind of the log.
    log: str
    epoch: str | None

    def __bytes__(self) -> bytes:
        return json.dumps(self._asdict()).encode() + b"\n"

    def check(self, found: bytes, place: str) -> None:
        """Compare with the mark that was found, if any. A memory log's is stale: that log ended with its process.

        Raises:
            ImagesRefused: it is that of another durable log, or damaged. `place` begins the message.
        """
        line, _, _ = found.partition(b"\n")
        way_out = f"use another one, or remove {MARK} from it if no log needs its pictures"
        try:
            log, epoch = (json.loads(line)[key] for key in ("log", "epoch")) if line else ("memory", "")
        except (ValueError, TypeError, KeyError):
            raise ImagesRefused(f"{place} cannot be used: its mark is damaged; {way_out}.") from None
        if log != "memory" and (log, epoch) != self:
            raise ImagesRefused(f"{place} belongs to another log; {way_out}.")


#: The name of the file.
MARK: Final = ".stagecast"
