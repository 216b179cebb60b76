"""S3 as moto serves it over HTTP, with faults on request."""

import logging
import secrets
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.request import Request, urlopen

import pytest

KEY_ID: Final = "AKIAVERYPUBLICKEYID"
SECRET: Final = "a-secret-access-key-that-is-never-logged"

#: How S3 reports an error; it quotes the access key.
_ERROR: Final = f"<?xml version='1.0'?><Error><Code>{{}}</Code><AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId></Error>"


@dataclass
class S3:
    """A server."""

    endpoint: str = ""
    #: How many of the next requests with this method fail, with which status and code of S3.
    faults: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    #: No request is answered while this is not set.
    answering: threading.Event = field(default_factory=threading.Event)
    #: Method and path of each request.
    requests: list[tuple[str, str]] = field(default_factory=list)

    def bucket(self) -> str:
        """The URL of a new bucket and prefix."""
        name = f"bucket-{secrets.token_hex(4)}"
        urlopen(Request(f"{self.endpoint}/{name}", method="PUT"), timeout=10).close()
        return f"s3://{name}/a/prefix"

    @property
    def variables(self) -> dict[str, str]:
        """What a client needs in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def fail(self, method: str, status: str, code: str, times: int = sys.maxsize) -> None:
        self.faults[method] = (times, status, code)

    def calm(self) -> None:
        """End all faults, and forget the requests."""
        self.faults.clear()
        self.requests.clear()
        self.answering.set()

    def fault(self, method: str, path: str) -> tuple[str, str] | None:
        """The status and the code with which this request fails."""
        self.requests.append((method, path))
        self.answering.wait(30)
        times, status, code = self.faults.get(method, (0, "", ""))
        if times < 1:
            return None
        self.faults[method] = (times - 1, status, code)
        return status, code


@contextmanager
def serving_s3() -> Iterator[S3]:
    """Skips the test where moto is not installed."""
    pytest.importorskip("moto", reason="moto is not installed: the image store in S3 is not tested")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto, s3 = DomainDispatcherApplication(create_backend_app), S3()

    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        fault = s3.fault(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if fault is None:
            answer: Iterable[bytes] = moto(environ, start_response)
            return answer
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(fault[0], [("Content-Type", "application/xml")])
        return [_ERROR.format(fault[1]).encode()]

    server = make_server("127.0.0.1", 0, serve, threaded=True)
    s3.endpoint = f"http://127.0.0.1:{server.server_port}"
    s3.answering.set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        s3.answering.set()
        server.shutdown()
        thread.join()
        server.server_close()
