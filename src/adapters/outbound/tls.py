"""Whom this process believes when it calls others over TLS."""

import ssl
from functools import cache

import httpx2


@cache
def authorities() -> ssl.SSLContext:
    """For verifying servers: the authorities that come with httpx2, or those of `SSL_CERT_FILE`, `SSL_CERT_DIR`.

    They are read once, since that takes 50 ms. Nothing may be changed in the context: all share it.
    """
    return httpx2.create_ssl_context()
