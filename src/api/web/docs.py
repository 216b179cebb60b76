"""Serves ``/docs`` and ``/asyncapi.json``.

``/docs`` is a plain list of the operations. Swagger UI replaces it where npm has brought that.
"""

from collections.abc import Callable
from functools import cache
from html import escape
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from api.asyncapi import document
from api.settings import Settings
from api.web.page import FOLDER, closed_policy

_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": closed_policy("script-src 'self'; img-src 'self' data:; connect-src 'self'"),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_VIEWER: Final = """
<link rel="stylesheet" href="/static/vendor/swagger-ui.css">
<script src="/static/vendor/swagger-ui-bundle.js" defer></script>
<script src="/static/docs.js" defer></script>"""
_PAGE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Stagecast: HTTP operations</title>
<link rel="icon" href="/static/icon.svg">{viewer}
<main id="docs" data-openapi="/openapi.json">
<h1>HTTP operations</h1>
<p>In full: <a href="/openapi.json">OpenAPI</a>. The events: <a href="/asyncapi.json">AsyncAPI</a>.</p>
<ul>{operations}</ul>
</main>
</html>"""


def page(openapi: dict[str, Any], *, viewer: bool) -> str:
    """The page, with paths as without a prefix."""
    operations = "\n".join(
        f"<li><code>{method.upper()} {escape(path)}</code> {escape(operation['description'].splitlines()[0])}</li>"
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    )
    return _PAGE.format(operations=operations, viewer=_VIEWER if viewer else "")


def install(app: FastAPI, settings: Settings, placed: Callable[[str], str]) -> None:
    """Serve both. `placed` gives the paths in a page the service's prefix, and those of files their version."""
    viewer = (FOLDER / "vendor/swagger-ui-bundle.js").is_file()
    text = cache(lambda: placed(page(app.openapi(), viewer=viewer)))
    events = cache(lambda: document(app.version, settings.public_url))

    async def docs(_: Request) -> Response:
        return HTMLResponse(text(), headers=_HEADERS)

    async def asyncapi(_: Request) -> Response:
        return JSONResponse(events())

    app.add_route("/docs", docs, include_in_schema=False)
    app.add_route("/asyncapi.json", asyncapi, include_in_schema=False)
