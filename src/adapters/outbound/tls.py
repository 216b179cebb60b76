"""TLS verification of the servers that this process calls."""

import ssl
from functools import cache

import httpx2


@cache
def ssl_context() -> ssl.SSLContext:
    """The shared context with httpx2's certificate authorities, or those in `SSL_CERT_FILE` and `SSL_CERT_DIR`.

    Cached, because loading takes 50 ms. Do not modify it.
    """
    return httpx2.create_ssl_context()
