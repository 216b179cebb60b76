"""Sends webhooks as specified by https://www.standardwebhooks.com: POST, signed with HMAC-SHA256."""

import asyncio
import base64
import hashlib
import hmac
import ssl
from contextlib import aclosing, suppress
from typing import Final

import httpx2

from adapters.outbound.calls import bounded, retry_after, ssl_context
from domain.ports.system import Clock
from domain.webhooks import NotDelivered

#: Seconds and bytes for which the response's body is read and discarded.
_LINGER: Final = 0.5
_MAX_BODY: Final = 16 * 1024


class WebhookSender:
    """`domain.webhooks.Poster` over HTTP, with a new connection for each message."""

    def __init__(
        self, url: str, secret: str | None, *, clock: Clock, timeout: float = 15, trust: ssl.SSLContext | None = None
    ) -> None:
        """`secret`: ``whsec_`` and base64; ``None``: messages are not signed. `timeout`: seconds for an attempt, until
        the head of the response.

        Raises:
            ValueError: the URL or the secret is not valid.
        """
        try:
            self._url = httpx2.URL(url)
        except httpx2.InvalidURL:
            raise ValueError("The webhook URL is not valid.") from None
        self._headers = {
            "Content-Type": "application/json",
            "User-Agent": "stagecast",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        if self._url.userinfo:
            basic = base64.b64encode(f"{self._url.username}:{self._url.password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {basic}"
        self._key = None if secret is None else base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        self._clock = clock
        self._timeout = timeout
        self._trust = trust or ssl_context()

    async def post(self, message_id: str, body: bytes) -> None:
        timestamp = str(int(self._clock().timestamp()))
        headers = {**self._headers, "webhook-id": message_id, "webhook-timestamp": timestamp}
        if self._key is not None:
            content = f"{message_id}.{timestamp}.".encode() + body
            signature = hmac.digest(self._key, content, hashlib.sha256)
            headers["webhook-signature"] = f"v1,{base64.b64encode(signature).decode()}"
        request = httpx2.Request("POST", self._url, headers=headers, content=body)
        # Not an `AsyncClient`: it follows redirects, keeps cookies, and logs the whole URL.
        async with httpx2.AsyncHTTPTransport(verify=self._trust, trust_env=False) as transport:
            try:
                async with asyncio.timeout(self._timeout):
                    response = await transport.handle_async_request(request)
            except (httpx2.HTTPError, OSError) as error:
                raise NotDelivered(f"no answer ({type(error).__name__})") from None
            # Read a short body, so that the receiver does not see its connection reset while it writes.
            with suppress(TimeoutError, httpx2.HTTPError):
                async with asyncio.timeout(_LINGER), aclosing(bounded(response.aiter_raw(), _MAX_BODY)) as chunks:
                    async for _ in chunks:
                        pass
            await response.aclose()
        status = response.status_code
        if not response.is_success:
            after = retry_after(response.headers.get("retry-after", "")) if status in (429, 503) else None
            raise NotDelivered(f"answered with {status}", after=after, gone=status == 410)
