"""Calls to a running service, from the command line."""

from typing import Any

from api.settings import masked


class Unavailable(Exception):
    """A port, a store or a service is not available. The text is one sentence."""


def not_stagecast(url: str) -> Unavailable:
    """The error for an address where no Stagecast service answers."""
    return Unavailable(f"no Stagecast service answers on {masked(url)}; choose another with --url or STAGECAST_URL.")


class Refused(Exception):
    """The service refused. The text is one sentence."""


def request(
    method: str, url: str, path: str, token: str | None, *, user: str | None = None, json: Any = None
) -> dict[str, Any]:
    """Send a request and return the JSON object of the response.

    Raises:
        Unavailable: no Stagecast service answers at this URL.
        Refused: the response is an error.
    """
    import httpx2  # --help and serve do not need it.

    headers = {b"Authorization": f"Bearer {token}".encode()} if token else {}
    if user is not None:
        headers[b"X-User-Id"] = user.encode(errors="replace")
    try:
        with httpx2.Client(trust_env=False, timeout=30) as http:
            # The token is sent instead of a password in the URL, which would take its place.
            auth = (lambda request: request) if token else None
            answer = http.request(method, url.rstrip("/") + path, headers=headers, json=json, auth=auth)
            content = answer.json()
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError):
        raise not_stagecast(url) from None
    if not isinstance(content, dict):
        raise not_stagecast(url)
    if not answer.is_success:
        raise Refused(str(content.get("detail", f"the service answered {answer.status_code}")))
    return content
