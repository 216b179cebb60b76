"""The web page, and the files it is made of."""

from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

_FOLDER: Final = Path(__file__).parent / "static"

#: An update of the service is an update of the page: browsers ask each time, and mostly hear that nothing has changed.
_ASK: Final = {"Cache-Control": "no-cache"}


class _Files(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_ASK)
        return response


async def _page(_: Request) -> Response:
    return FileResponse(_FOLDER / "index.html", headers=_ASK)


def install(app: FastAPI) -> None:
    """Serve the page at ``/``, and its files below ``/static``."""
    app.add_route("/", _page, include_in_schema=False)
    app.mount("/static", _Files(directory=_FOLDER), name="static")
