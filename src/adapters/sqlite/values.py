"""How values are stored in the durable log."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def is_text(value: str) -> bool:
    """Whether SQLite can store the text: it has no lone surrogate, as JSON strings may."""
    return re.search("[\ud800-\udfff]", value) is None


def microseconds(moment: datetime) -> int:
    """Microseconds since 1970, as times are stored."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def moment(microseconds: int) -> datetime:
    """The time that is stored as this number of microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=microseconds)
