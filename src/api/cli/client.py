"""Calls to a running service, from the command line."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from api.settings import load_remote
from domain.identity import user_id

if TYPE_CHECKING:
    import httpx2

#: Seconds without a byte after which a connection counts as broken; a stream has a comment every 15.
_SILENCE: Final = 40.0


class Unavailable(Exception):
    """A port, a store or a service is not available. The text is one sentence."""


class Refused(Exception):
    """The service refused. The text is one sentence."""


@contextmanager
def connect(remote: Mapping[str, Any], *, user: str | None = None) -> Iterator["httpx2.Client"]:
    """An HTTP client for the service of these options, acting for this user. Read its responses within the context.

    Raises:
        SettingsError, InvalidUserId: an option is not valid.
        Unavailable: no service answers, or what answers is not Stagecast.
    """
    import httpx2  # --help and serve do not need it.

    service = load_remote(remote)
    headers = {} if user is None else {b"X-User-Id": user_id(user).encode()}
    if service.token:
        headers[b"Authorization"] = f"Bearer {service.token}".encode()
    # The token is sent instead of a password in the URL, which would take its place.
    auth = (lambda request: request) if service.token else None
    timeout = httpx2.Timeout(30, read=_SILENCE)
    try:
        with httpx2.Client(base_url=service.url, trust_env=False, timeout=timeout, headers=headers, auth=auth) as http:
            yield http
    except (httpx2.HTTPError, httpx2.InvalidURL, KeyError, TypeError, ValueError):
        # Without a password, and without a query, which may have a token.
        address = re.split("[?#]", re.sub("(?s)//.*@", "//***@", service.url))[0]
        sentence = f"no Stagecast service answers on {address}; choose another with --url or STAGECAST_URL."
        raise Unavailable(sentence) from None


def content_of(response: "httpx2.Response") -> Any:
    """Return the JSON of a response.

    Raises:
        Refused: it is an error of the service.
        KeyError, TypeError, ValueError: it is not one of Stagecast.
    """
    content = response.json()
    if not response.is_success:
        raise Refused(str(content["detail"]))
    return content
