"""Serves the pages and their static files, compressed, and under names that change with their content."""

import gzip
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from string import Template
from typing import Final

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from api.settings import Settings

#: The pages and their static files.
FOLDER: Final = Path(__file__).parent / "static"

#: The official Socket.IO client, if npm has installed it (`make run`) or the wheel contains it.
_CLIENT: Final = "vendor/socket.io.min.js"
_OWN_CLIENT: Final = f'<script src="/static/{_CLIENT}" defer></script>'

#: The client from the CDN otherwise, with the hash that the browser checks.
CDN: Final = "https://cdn.socket.io/4.8.3/socket.io.min.js"
_INTEGRITY: Final = "sha384-kzavj5fiMwLKzzD1f8S7TeoVIEi7uKHvbTA3ueZkrzYq75pNQUiUi6Dy98Q3fxb0"
_CDN_CLIENT: Final = (
    f'<template id="client"><script src="{CDN}" integrity="{_INTEGRITY}" crossorigin="anonymous"></script></template>'
)

_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".webp": "image/webp"}
_COMPRESSIBLE: Final = ("text/", "image/svg+xml")

#: Browsers revalidate each time, so that the page is as new as the service. A path with the version never changes.
_REVALIDATED: Final = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
_IMMUTABLE: Final = {**_REVALIDATED, "Cache-Control": "public, max-age=31536000, immutable"}

_POLICY: Final = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; style-src 'self'"
_DOCS_POLICY: Final = f"{_POLICY}; script-src 'self'; img-src 'self' data:; connect-src 'self'"

_HOST: Final = re.compile(r"[A-Za-z0-9.-]+(:[0-9]+)?|\[[0-9A-Fa-f:.]+\](:[0-9]+)?")
_VERSION: Final = re.compile(r"v-[0-9a-f]{16}/")
#: In ``Accept-Encoding``: gzip, without q=0.
_GZIP: Final = re.compile(r"(?:^|,)\s*gzip\s*(?:$|,|;(?!\s*q=0(?:\.0*)?\s*(?:,|$)))", re.IGNORECASE)
_LANGUAGE: Final = re.compile(r"(?:^|,)\s*([a-z]{2})")
_TEXTS: Final = re.compile(r"^const (en|tr) = \{$(.*?)^\};$", re.MULTILINE | re.DOTALL)
_TEXT: Final = re.compile(r'^  (\w+):\s+"((?:[^"\\]|\\.)*)"(?=,)', re.MULTILINE)
_PLACE: Final = re.compile(r'data-(text|placeholder)="(\w+)"([^>]*>)')
#: Of scripts and style sheets: comments that are lines of their own.
_COMMENT: Final = re.compile(rb"^ *(?:/\*(?:[^*]|\*(?!/))*\*/|// .*)\n", re.MULTILINE)


class _File:
    """A file that is sent as a whole: compressed if it is text, and if the client accepts that."""

    def __init__(self, data: bytes, media_type: str) -> None:
        self._data = data
        self._media_type = media_type
        self.tag = hashlib.sha256(data).hexdigest()[:16]

    @cached_property
    def _compressed(self) -> bytes:
        return gzip.compress(self._data, mtime=0)

    def response(self, request: Request, headers: Mapping[str, str]) -> Response:
        """The response to a GET, with these headers and those that follow from the content."""
        data = self._data
        headers = {"Vary": "Accept-Encoding", "ETag": f'"{self.tag}"', **headers}
        if self._media_type.startswith(_COMPRESSIBLE) and _GZIP.search(request.headers.get("accept-encoding", "")):
            data = self._compressed
            headers |= {"Content-Encoding": "gzip", "ETag": f'"{self.tag}-gzip"'}
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=self._media_type)


def render(page: str, settings: Settings, *, own_client: bool) -> str:
    """The text of ``index.html``, adapted to this service. `own_client`: the service has the Socket.IO client."""
    return Template(page).substitute(
        callers="anybody" if settings.open_mode else "token",
        face=escape(f"{settings.public_url}/static/samples/face.webp"),
        editor="openai" if settings.editor == "openai" else "",
        client=_OWN_CLIENT if own_client else _CDN_CLIENT,
        # What is shown before the scripts have loaded: the form, or where a token is needed, the form that asks for it.
        sign_in=" hidden" if settings.open_mode else "",
        work="" if settings.open_mode else " hidden",
    )


def without_comments(code: bytes) -> bytes:
    """A script or style sheet, shorter by a fifth when compressed."""
    return _COMMENT.sub(b"", code)


def plain_texts() -> dict[str, dict[str, str]]:
    """The page's texts without parameters, by language and key."""
    return {
        language: {key: json.loads(f'"{text}"') for key, text in _TEXT.findall(texts)}
        for language, texts in _TEXTS.findall((FOLDER / "texts.js").read_text("utf-8"))
    }


def in_language(page: str, language: str, texts: Mapping[str, str]) -> str:
    """The page with its texts, so that they are shown before the scripts have loaded."""

    def fill(place: re.Match[str]) -> str:
        kind, key, rest = place.groups()
        text = escape(texts[key])
        return place[0] + text if kind == "text" else f'placeholder="{text}" data-placeholder="{key}"{rest}'

    return _PLACE.sub(fill, page).replace('<html lang="en"', f'<html lang="{language}"', 1)


def policy(host: str, *, own_client: bool) -> str:
    """The page's Content-Security-Policy.

    Images come from ``/images`` of the page's own origin, whatever host name the public URL has; `blob:` are those
    that the user has chosen. Trusted Types prevent that text becomes a script or HTML.
    """
    # Some browsers do not count an origin's WebSockets as 'self'.
    sockets = f" ws://{host} wss://{host}" if _HOST.fullmatch(host) else ""
    sources = f"script-src 'self'{'' if own_client else f' {CDN}'}; img-src 'self' blob:; connect-src 'self'{sockets}"
    return f"{_POLICY}; {sources}; require-trusted-types-for 'script'; trusted-types 'none'"


def install(app: FastAPI, settings: Settings) -> None:
    """Serve the page at ``/``, the operator's at ``/admin``, OpenAPI's at ``/docs``, and files below ``/static``.

    A path with the version, which is a hash of all files, may be kept for ever. The pages use such paths. The same path
    with another version, which another node may have named, and the path without one have to be revalidated.
    """
    files: dict[str, _File] = {}
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix in _TYPES:
            name, data = path.relative_to(FOLDER).as_posix(), path.read_bytes()
            own_code = path.suffix in (".css", ".js") and not name.startswith("vendor/")
            files[name] = _File(without_comments(data) if own_code else data, _TYPES[path.suffix])
    tags = "".join(name + file.tag for name, file in files.items())
    version = f"v-{hashlib.sha256(tags.encode()).hexdigest()[:16]}/"
    own_client = _CLIENT in files

    def read(name: str) -> str:
        return (FOLDER / name).read_text("utf-8")

    def placed(page: str) -> _File:
        page = page.replace('="/static/', f'="/static/{version}').replace('="/', f'="{escape(settings.path_prefix)}/')
        return _File(page.encode(), "text/html")

    index = render(read("index.html"), settings, own_client=own_client)
    pages = {language: placed(in_language(index, language, texts)) for language, texts in plain_texts().items()}
    admin_page, docs_page = placed(read("admin.html")), placed(read("docs.html"))

    def respond(request: Request, page: _File, policy: str, **headers: str) -> Response:
        security = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
        return page.response(request, {**_REVALIDATED, **security, **headers})

    def app_policy(request: Request) -> str:
        return policy(request.headers.get("host", ""), own_client=own_client)

    async def page(request: Request) -> Response:
        wanted = _LANGUAGE.findall(request.headers.get("accept-language", "").lower())
        language = next((each for each in wanted if each in pages), "en")
        return respond(request, pages[language], app_policy(request), Vary="Accept-Encoding, Accept-Language")

    async def admin(request: Request) -> Response:
        return respond(request, admin_page, app_policy(request))

    async def docs(request: Request) -> Response:
        return respond(request, docs_page, _DOCS_POLICY)

    async def static(request: Request) -> Response:
        named = _VERSION.match(request.path_params["path"])
        file = files.get(request.path_params["path"][named.end() if named else 0 :])
        if file is None:
            raise HTTPException(404)
        return file.response(request, _IMMUTABLE if named and named[0] == version else _REVALIDATED)

    for route, endpoint in {"/": page, "/admin": admin, "/docs": docs, "/static/{path:path}": static}.items():
        app.add_route(route, endpoint, include_in_schema=False)
