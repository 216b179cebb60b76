"""Calls to a running service, from the command line."""

from typing import TYPE_CHECKING, Any

from api.settings import masked

if TYPE_CHECKING:
    import httpx2


class Unavailable(Exception):
    """A port, a store or a service is not available. The text is one sentence."""


def not_stagecast(url: str) -> Unavailable:
    """The error for an address where no Stagecast service answers."""
    return Unavailable(f"no Stagecast service answers on {masked(url)}; choose another with --url or STAGECAST_URL.")


class Refused(Exception):
    """The service refused. The text is one sentence."""


class Forbidden(Refused):
    """The service refused because the token is not that of a service."""


def request(
    method: str, url: str, path: str, token: str | None, *, user: str | None = None, json: Any = None
) -> dict[str, Any]:
    """Send a request and return the JSON object of the response.

    Raises:
        Unavailable: no Stagecast service answers at this URL.
        Refused: the response is an error.
    """
    import httpx2  # --help and serve do not need it.

    try:
        with connect(token, user, timeout=30) as http:
            return content_of(http.request(method, url.rstrip("/") + path, json=json), url)
    except (httpx2.HTTPError, httpx2.InvalidURL):
        raise not_stagecast(url) from None


def connect(token: str | None, user: str | None, timeout: Any) -> "httpx2.Client":
    """Return an HTTP client with this token, acting for this user."""
    import httpx2

    headers = {b"Authorization": f"Bearer {token}".encode()} if token else {}
    if user is not None:
        headers[b"X-User-Id"] = user.encode(errors="replace")
    # The token is sent instead of a password in the URL, which would take its place.
    auth = (lambda request: request) if token else None
    return httpx2.Client(trust_env=False, timeout=timeout, headers=headers, auth=auth)


def content_of(response: "httpx2.Response", url: str) -> dict[str, Any]:
    """Return the JSON object of a response.

    Raises:
        Unavailable: it is not one of Stagecast.
        Refused: it is an error.
    """
    try:
        content = response.json()
    except ValueError:
        raise not_stagecast(url) from None
    if not isinstance(content, dict):
        raise not_stagecast(url)
    if not response.is_success:
        refused = Forbidden if response.status_code == 403 else Refused
        raise refused(str(content.get("detail", f"the service answered {response.status_code}")))
    return content
