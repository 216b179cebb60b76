"""Webhooks by the Standard Webhooks scheme, https://www.standardwebhooks.com: POST, signed with HMAC-SHA256."""

import asyncio
import base64
import hashlib
import hmac
import ssl
from contextlib import aclosing, suppress
from typing import Final

import httpx2

from adapters.outbound.retry_after import retry_after
from adapters.outbound.tls import authorities
from domain.ports import Clock
from domain.webhooks import NotDelivered

#: Of an answer's body, for the sake of who sends it: nobody reads it. In seconds, and in bytes.
_LINGER: Final = 0.5
_MOST_BODY: Final = 16 * 1024


class WebhookSender:
    """`domain.webhooks.Poster` over HTTP. Each message has a connection of its own, and nothing outlives it."""

    def __init__(
        self, url: str, secret: str | None, *, clock: Clock, timeout: float = 15, trust: ssl.SSLContext | None = None
    ) -> None:
        """`secret`: ``whsec_`` and base64; without one nothing is signed. `timeout`: seconds for an attempt, until
        the answer's head is there.

        Raises:
            ValueError: the URL or the secret is none.
        """
        try:
            self._url = httpx2.URL(url)
        except httpx2.InvalidURL:
            raise ValueError("This is no URL for webhooks.") from None
        self._headers = {
            "Content-Type": "application/json",
            "User-Agent": "stagecast",
            "Accept-Encoding": "identity",
            "Connection": "close",
            **_authorization(self._url),
        }
        self._key = None if secret is None else base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        self._clock = clock
        self._timeout = timeout
        self._trust = trust or authorities()

    async def post(self, message_id: str, body: bytes) -> None:
        headers = {**self._headers, **self._told(message_id, body)}
        # No client: that one follows, remembers, and logs the whole URL.
        async with httpx2.AsyncHTTPTransport(verify=self._trust, trust_env=False) as way:
            try:
                async with asyncio.timeout(self._timeout):
                    answer = await way.handle_async_request(
                        httpx2.Request("POST", self._url, headers=headers, content=body)
                    )
            except (httpx2.HTTPError, OSError) as error:
                raise NotDelivered(f"no answer ({type(error).__name__})") from None
            await _let_finish(answer)
        if not answer.is_success:
            asked = retry_after(answer.headers.get("retry-after", "")) if answer.status_code in (429, 503) else None
            gone = answer.status_code == 410
            raise NotDelivered(f"answered with {answer.status_code}", after=asked, gone=gone)

    def _told(self, message_id: str, body: bytes) -> dict[str, str]:
        """The headers of one attempt: which message this is, when, and the proof that it is ours."""
        told = {"webhook-id": message_id, "webhook-timestamp": str(int(self._clock().timestamp()))}
        if self._key is not None:
            content = b"%b.%b.%b" % (message_id.encode(), told["webhook-timestamp"].encode(), body)
            proof = hmac.digest(self._key, content, hashlib.sha256)
            told["webhook-signature"] = f"v1,{base64.b64encode(proof).decode()}"
        return told


def _authorization(url: httpx2.URL) -> dict[str, str]:
    """Who the URL says is calling."""
    if not url.userinfo:
        return {}
    return {"Authorization": f"Basic {base64.b64encode(f'{url.username}:{url.password}'.encode()).decode()}"}


async def _let_finish(answer: httpx2.Response) -> None:
    """Take a little of the body, so that who sends no more is not cut off."""
    taken = 0
    with suppress(TimeoutError, httpx2.HTTPError):
        async with asyncio.timeout(_LINGER), aclosing(answer.aiter_raw()) as pieces:
            async for piece in pieces:
                taken += len(piece)
                if taken > _MOST_BODY:
                    break
    await answer.aclose()
