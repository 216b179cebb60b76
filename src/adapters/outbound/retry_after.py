"""Parses ``Retry-After`` headers."""

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def retry_after(header: str) -> float | None:
    """Seconds from now, at least 0, from a number of seconds or an HTTP date; ``None`` if it is neither."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            at = parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
