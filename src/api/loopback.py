"""Host names: how they are written, and which of them lead to this machine only."""

import ipaddress
import re
from functools import lru_cache
from typing import Final

#: A lower-case host with an optional port: an IPv6 address, another name, the port.
HOST: Final = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::([0-9]*))?")


@lru_cache(maxsize=4096)
def is_loopback(host: str) -> bool:
    """Whether a lower-case host name or IP address, without port and brackets, is this machine's own."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
