"""Serves the web page and its static files, compressed, and under names that change with their content."""

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Final

import brotli
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from api.settings import Settings

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
_MODULES: Final = '<script src="/static/app.js" type="module"></script>'
_PRELOAD: Final = '<link rel="modulepreload" href="/static/{}">'
#: What is shown before the scripts have loaded: the form, or where a token is needed, the form that asks for it.
_FIRST: Final = {False: '<main id="work" hidden>', True: '<main id="sign-in" hidden>'}

_TYPES: Final = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
_COMPRESSIBLE: Final = ("text/", "image/svg+xml")
#: The best coding first. Brotli's higher qualities save a few percent more, in a multiple of the time.
_CODINGS: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "br": lambda data: bytes(brotli.compress(data, quality=5)),
    "gzip": lambda data: gzip.compress(data, mtime=0),
}

#: Browsers revalidate each time, so that the page is as new as the service. A path with the version never changes.
_REVALIDATED: Final = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
_IMMUTABLE: Final = {**_REVALIDATED, "Cache-Control": "public, max-age=31536000, immutable"}

_HOST: Final = re.compile(r"[A-Za-z0-9.-]+(:[0-9]+)?|\[[0-9A-Fa-f:.]+\](:[0-9]+)?")
_VERSION: Final = re.compile(r"v-[0-9a-f]{16}(?=/)")
_ACCEPTED: Final = re.compile(r"([\w-]+)\s*(?:;\s*q=([0-9.]+))?")
_LANGUAGE: Final = re.compile(r"(?:^|,)\s*([a-z]{2})")
_IMPORT: Final = re.compile(r'^(?:import|export|\}).* from "\./([\w.-]+)";$', re.MULTILINE)
_TEXTS: Final = re.compile(r"^const (en|tr) = \{$(.*?)^\};$", re.MULTILINE | re.DOTALL)
_TEXT: Final = re.compile(r'^  (\w+):\s+"((?:[^"\\]|\\.)*)"(?=,)', re.MULTILINE)
#: Of scripts and style sheets: comments that are lines of their own.
_COMMENT: Final = re.compile(r"^ *(?:/\*(?:[^*]|\*(?!/))*\*/|// .*)\n", re.MULTILINE)
_PLACE: Final = re.compile(r'data-(text|placeholder)="(\w+)"([^>]*>)')


@cache
def _compressed(data: bytes, coding: str) -> bytes:
    return _CODINGS[coding](data)


class _File:
    """A file that is sent as a whole: compressed if it is text, and if the client accepts that."""

    def __init__(self, data: bytes, media_type: str) -> None:
        self.data = data
        self.media_type = media_type
        self.tag = hashlib.sha256(data).hexdigest()[:16]

    def response(self, request: Request, headers: Mapping[str, str]) -> Response:
        """The response to a GET, with these headers and those that follow from the content."""
        data, tag, coding = self.data, self.tag, self._coding(request)
        headers = {"Vary": "Accept-Encoding", **headers}
        if coding is not None:
            data, tag = _compressed(data, coding), f"{tag}-{coding}"
            headers["Content-Encoding"] = coding
        headers["ETag"] = f'"{tag}"'
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=self.media_type)

    def _coding(self, request: Request) -> str | None:
        if not self.media_type.startswith(_COMPRESSIBLE):
            return None
        found = _ACCEPTED.findall(request.headers.get("accept-encoding", "").lower())
        accepted = {name for name, weight in found if not weight or weight.strip("0.")}
        return next((coding for coding in _CODINGS if coding in accepted), None)


def render(page: str, *, guarded: bool, own_client: bool, face: str = "", openai: bool = False) -> str:
    """The page, adapted to this service.

    Args:
        page: the text of ``index.html``.
        guarded: whether callers need a token.
        own_client: whether the service has the official Socket.IO client.
        face: the URL of a sample face.
        openai: whether the editor is OpenAI's, whom the stages name.
    """
    page = page.replace(_NO_FACE, f'data-face="{escape(face)}"', 1)
    page = page.replace(_NO_EDITOR, 'data-editor="openai"', 1) if openai else page
    page = page.replace(_OPEN, _GUARDED, 1) if guarded else page
    page = page.replace(_FIRST[guarded], _FIRST[guarded].replace(" hidden", ""), 1)
    return page if own_client else page.replace(_OWN_CLIENT, _CDN_CLIENT, 1)


def imported_by(module: str) -> list[str]:
    """This module and all that it imports, directly or not."""
    found = [module]
    for name in found:
        imported = _IMPORT.findall((FOLDER / name).read_text("utf-8"))
        found += [each for each in imported if each not in found]
    return found


def without_comments(code: bytes) -> bytes:
    """A script or style sheet, shorter by a fifth when compressed."""
    return _COMMENT.sub("", code.decode()).encode()


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


def closed_policy(sources: str) -> str:
    """A Content-Security-Policy that allows only these sources and the service's style sheets."""
    closed = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"{closed}; style-src 'self'; {sources}"


def policy(host: str, *, own_client: bool) -> str:
    """The page's Content-Security-Policy.

    Images come from ``/images`` of the page's own origin, whatever host name the public URL has; `blob:` are those
    that the user has chosen. Trusted Types prevent that text becomes a script or HTML.
    """
    # Some browsers do not count an origin's WebSockets as 'self'.
    sockets = f" ws://{host} wss://{host}" if _HOST.fullmatch(host) else ""
    sources = f"script-src 'self'{'' if own_client else f' {CDN}'}; img-src 'self' blob:; connect-src 'self'{sockets}"
    return closed_policy(f"{sources}; require-trusted-types-for 'script'; trusted-types 'none'")


def install(app: FastAPI, settings: Settings) -> Callable[[str], str]:
    """Serve the page at ``/``, the operator's at ``/admin``, and their files below ``/static``.

    A path with the version, which is a hash of all files, may be kept for ever. The page uses such paths. The same path
    with another version, which another node may have named, and the path without one have to be revalidated.

    Returns a function that gives the paths in a page the version and the service's prefix.
    """
    paths = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in _TYPES]
    plain = {path.relative_to(FOLDER).as_posix(): _File(path.read_bytes(), _TYPES[path.suffix]) for path in paths}
    own_client = _CLIENT in plain
    short = {
        name: _File(without_comments(file.data), file.media_type)
        for name, file in plain.items()
        if name.endswith((".css", ".js")) and not name.startswith("vendor/")
    }
    files = {**plain, **short}
    tags = "".join(name + file.tag for name, file in files.items())
    version = f"v-{hashlib.sha256(tags.encode()).hexdigest()[:16]}"
    index = render(
        (FOLDER / "index.html").read_text("utf-8"),
        guarded=not settings.open_mode,
        own_client=own_client,
        face=f"{settings.public_url}/static/samples/face.webp",
        openai=settings.editor == "openai",
    )
    index = index.replace(_MODULES, "\n  ".join([_MODULES, *map(_PRELOAD.format, imported_by("app.js")[1:])]), 1)

    def placed(page: str) -> str:
        return page.replace('="/static/', f'="/static/{version}/').replace('="/', f'="{escape(settings.path_prefix)}/')

    pages = {
        language: _File(in_language(placed(index), language, texts).encode(), _TYPES[".html"])
        for language, texts in plain_texts().items()
    }
    admin_page = _File(placed((FOLDER / "admin.html").read_text("utf-8")).encode(), _TYPES[".html"])

    def respond(request: Request, page: _File, vary: str) -> Response:
        policies = {
            "Content-Security-Policy": policy(request.headers.get("host", ""), own_client=own_client),
            "Referrer-Policy": "no-referrer",
            "Vary": vary,
        }
        return page.response(request, {**_REVALIDATED, **policies})

    async def page(request: Request) -> Response:
        wanted = _LANGUAGE.findall(request.headers.get("accept-language", "").lower())
        language = next((each for each in wanted if each in pages), "en")
        return respond(request, pages[language], "Accept-Encoding, Accept-Language")

    async def admin(request: Request) -> Response:
        return respond(request, admin_page, "Accept-Encoding")

    async def static(request: Request) -> Response:
        path = request.path_params["path"]
        named = _VERSION.match(path)
        name = path[named.end() + 1 :] if named else path
        file = (files if named else plain).get(name)
        if file is None:
            raise HTTPException(404)
        headers = _IMMUTABLE if named and named[0] == version else _REVALIDATED
        if "range" in request.headers and file is plain[name]:
            headers = {**headers, "Vary": "Accept-Encoding", "ETag": f'"{file.tag}"'}
            return FileResponse(FOLDER / name, headers=headers, media_type=file.media_type)
        return file.response(request, headers)

    app.add_route("/", page, include_in_schema=False)
    app.add_route("/admin", admin, include_in_schema=False)
    app.add_route("/static/{path:path}", static, include_in_schema=False)
    return placed
