"""Which host names lead to this machine only."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a lower-case host name or IP address, without port and brackets, is this machine's own."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
