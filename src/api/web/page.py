"""Serves the web page and its static files."""

import re
from html import escape
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

#: `index.html` and its static files.
FOLDER: Final = Path(__file__).parent / "static"

#: The official Socket.IO client, if npm has installed it (`make run`) or the wheel contains it.
_CLIENT: Final = "vendor/socket.io.min.js"

#: The client from the CDN otherwise, with the hash that the browser checks.
CDN: Final = "https://cdn.socket.io/4.8.3/socket.io.min.js"
_INTEGRITY: Final = "sha384-kzavj5fiMwLKzzD1f8S7TeoVIEi7uKHvbTA3ueZkrzYq75pNQUiUi6Dy98Q3fxb0"

#: Parts of `index.html`, and what replaces them.
_OWN_CLIENT: Final = f'<script src="/static/{_CLIENT}" defer></script>'
_CDN_CLIENT: Final = (
    f'<template id="client"><script src="{CDN}" integrity="{_INTEGRITY}" crossorigin="anonymous"></script></template>'
)
_OPEN: Final = 'data-callers="anybody"'
_GUARDED: Final = 'data-callers="token"'
_NO_FACE: Final = 'data-face=""'
_NO_EDITOR: Final = 'data-editor=""'

#: Browsers revalidate each time, so that the page is as new as the service.
_FILES: Final = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}

_HOST: Final = re.compile(r"[A-Za-z0-9.-]+(:[0-9]+)?|\[[0-9A-Fa-f:.]+\](:[0-9]+)?")


class _Files(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_FILES)
        return response


def render(
    page: str, *, guarded: bool, own_client: bool, face: str = "", openai: bool = False, prefix: str = ""
) -> str:
    """The page, adapted to this service.

    Args:
        page: the text of ``index.html``.
        guarded: whether callers need a token.
        own_client: whether the service has the official Socket.IO client.
        face: the URL of a sample face.
        openai: whether the editor is OpenAI's, whom the stages name.
        prefix: the path that every path of the service begins with.
    """
    page = page.replace(_NO_FACE, f'data-face="{escape(face)}"', 1)
    if openai:
        page = page.replace(_NO_EDITOR, 'data-editor="openai"', 1)
    if guarded:
        page = page.replace(_OPEN, _GUARDED, 1)
    if not own_client:
        page = page.replace(_OWN_CLIENT, _CDN_CLIENT, 1)
    return page.replace('="/', f'="{escape(prefix)}/')


def policy(host: str, *, own_client: bool) -> str:
    """The page's Content-Security-Policy.

    Images come from ``/images`` of the page's own origin, whatever host name the public URL has; `blob:` are those
    that the user has chosen. Trusted Types prevent that text becomes a script or HTML.
    """
    # Some browsers do not count an origin's WebSockets as 'self'.
    sockets = f" ws://{host} wss://{host}" if _HOST.fullmatch(host) else ""
    return "; ".join((
        "default-src 'none'",
        f"script-src 'self'{'' if own_client else f' {CDN}'}",
        "style-src 'self'",
        "img-src 'self' blob:",
        f"connect-src 'self'{sockets}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ))  # fmt: skip


def install(app: FastAPI, public_url: str, *, openai: bool) -> None:
    """Serve the page at ``/`` and its files below ``/static``. The sample face has the public URL."""
    face = f"{public_url}/static/samples/face.webp"

    async def page(request: Request) -> Response:
        own_client = (FOLDER / _CLIENT).is_file()
        guarded = not request.app.state.authenticator.open_mode
        text = (FOLDER / "index.html").read_text("utf-8")
        prefix = request.scope["root_path"]
        text = render(text, guarded=guarded, own_client=own_client, face=face, openai=openai, prefix=prefix)
        security = {
            "Content-Security-Policy": policy(request.headers.get("host", ""), own_client=own_client),
            "Referrer-Policy": "no-referrer",
        }
        return HTMLResponse(text, headers={**_FILES, **security})

    app.add_route("/", page, include_in_schema=False)
    app.mount("/static", _Files(directory=FOLDER), name="static")
