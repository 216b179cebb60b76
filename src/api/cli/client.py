"""A running service, as the command line calls it."""

from typing import Any

from api.settings import masked


class Unavailable(Exception):
    """Something that is needed cannot be had. Its text is one sentence."""


def nobody(url: str) -> Unavailable:
    """What answers there, if anything does, is no Stagecast service."""
    return Unavailable(f"no Stagecast service answers on {masked(url)}; choose another with --url or STAGECAST_URL.")


class Refused(Exception):
    """The service did not do it. Its text is one sentence."""


def request(
    method: str, url: str, path: str, token: str | None, *, user: str | None = None, json: Any = None
) -> dict[str, Any]:
    """The service's answer.

    Raises:
        Unavailable: no Stagecast service answers there.
        Refused: it says no.
    """
    import httpx2  # Not needed, and not waited for, by --help and serve.

    headers: list[tuple[bytes, bytes]] = []
    if token:
        headers.append((b"Authorization", f"Bearer {token}".encode()))
    if user is not None:
        headers.append((b"X-User-Id", user.encode(errors="replace")))
    try:
        with httpx2.Client(trust_env=False, timeout=30) as http:
            # The token is sent instead of a password in the URL, which would take its place.
            auth = (lambda request: request) if token else None
            answer = http.request(method, url.rstrip("/") + path, headers=headers, json=json, auth=auth)
            content = answer.json()
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError):
        raise nobody(url) from None
    if not isinstance(content, dict):
        raise nobody(url)
    if not answer.is_success:
        raise Refused(str(content.get("detail", f"the service answered {answer.status_code}")))
    return content
