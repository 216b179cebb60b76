"""HTTP: what a request costs, beside a bare FastAPI route that parses and answers the same."""

import json
import sys
from collections.abc import Callable, Mapping
from http.client import HTTPConnection
from itertools import count
from typing import Any, Final

from benchmarks import peers
from benchmarks.measuring import BenchmarkError, Process, Row, Size, alternating, attempt, cores

STAGECAST: Final = "Stagecast"
BARE: Final = "bare FastAPI"
#: The rows by route, with their goals.
ROUTES: Final = {
    "GET …/events of eight events": 0.9,
    "POST …/transitions": 1.5,
    "start without images": 1.4,
}
HISTORY, TRANSITION, START = ROUTES
#: Requests in one measurement, and before it.
REQUESTS: Final = 1_200
WARM_UP: Final = 50

_BOUNDARY: Final = "boundary"
_FORM: Final = (
    f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--{_BOUNDARY}--\r\n'.encode()
)
_FORM_TYPE: Final = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
_JSON_TYPE: Final = {"Content-Type": "application/json"}
#: The statuses of a generation; each is reported by a request.
_STEPS: Final = ("composition", "composition_completed", "openai_editing")


class Client:
    """One kept connection."""

    def __init__(self, port: int) -> None:
        self._http = HTTPConnection("127.0.0.1", port, timeout=10)

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """The answer's JSON. Raises `BenchmarkError` if it is an error."""
        try:
            self._http.request(method, path, body, dict(headers or {}))
            response = self._http.getresponse()
            text = response.read()
        except OSError as error:
            raise BenchmarkError(f"{method} {path} was not answered: {error!r}") from None
        if response.status >= 300:
            raise BenchmarkError(f"{method} {path} was answered with {response.status}: {text[:200]!r}")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def start(self, user: str) -> str:
        """Start a generation whose work is reported from outside, and return its id."""
        answer = self.send("POST", "/generations/edit?runner=external", _FORM, {**_FORM_TYPE, "X-User-Id": user})
        return str(answer["generationId"])

    def report(self, user: str, generation_id: str, **transition: object) -> None:
        """Report a transition of this generation."""
        path, body = f"/generations/{generation_id}/transitions", json.dumps(transition).encode()
        self.send("POST", path, body, {**_JSON_TYPE, "X-User-Id": user})


def of_stagecast(client: Client, requests: int) -> dict[str, Callable[[], object]]:
    """The requests to Stagecast. Each user starts few generations, as there is a limit per minute."""
    numbers = count()
    watched = client.start("reader")
    for step in _STEPS:
        client.report("reader", watched, status=step)
    for progress in range(61, 65):
        client.report("reader", watched, status=_STEPS[-1], progress=progress)
    users = [f"u{number}" for number in range(requests // len(_STEPS) + 1)]
    reports = iter(
        [(user, generation_id, step) for user in users for generation_id in [client.start(user)] for step in _STEPS]
    )

    def report() -> None:
        user, generation_id, step = next(reports)
        client.report(user, generation_id, status=step)

    return {
        HISTORY: lambda: client.send("GET", f"/generations/{watched}/events", None, {"X-User-Id": "reader"}),
        TRANSITION: report,
        START: lambda: client.start(f"s{next(numbers)}"),
    }


def of_bare(client: Client) -> dict[str, Callable[[], object]]:
    """The requests to the bare routes, of the same size."""
    body, user = json.dumps({"status": _STEPS[0]}).encode(), {"X-User-Id": "reader"}
    return {
        HISTORY: lambda: client.send("GET", "/events", None, user),
        TRANSITION: lambda: client.send("POST", "/transitions", body, {**_JSON_TYPE, **user}),
        START: lambda: client.send("POST", "/start?runner=external", _FORM, {**_FORM_TYPE, **user}),
    }


def measure(name: str, size: Size) -> dict[str, float]:
    """The CPU time of one request to each route, in µs. Raises `BenchmarkError`."""
    requests = size.count(REQUESTS)
    if name == STAGECAST:
        server = Process([sys.executable, "-m", "benchmarks.servers.product", "1"], [cores()[0]])
    else:
        server = Process([peers.python(), "-m", "benchmarks.servers.fastapi_peer"], [cores()[0]])
    with server:
        client = Client(server.answer(60)["port"])
        routes = of_stagecast(client, requests + WARM_UP) if name == STAGECAST else of_bare(client)
        found = {}
        for route, send in routes.items():
            for _ in range(WARM_UP):
                send()
            before = server.cpu()
            for _ in range(requests):
                send()
            found[route] = (server.cpu() - before) / requests
        return found


def run(size: Size) -> list[Row]:
    """All rows. Raises `BenchmarkError`."""
    values: dict[tuple[str, str], list[float]] = {}
    for _, names in alternating((STAGECAST, BARE), size):
        for name in names:
            for route, value in attempt(measure, name, size).items():
                values.setdefault((name, route), []).append(value)
    return [
        Row(
            figure=route,
            unit="µs CPU",
            values=values[STAGECAST, route],
            peer=BARE,
            peer_values=values[BARE, route],
            at_most=goal,
        )
        for route, goal in ROUTES.items()
    ]
