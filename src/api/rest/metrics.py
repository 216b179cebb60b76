"""``GET /metrics``: what this node counts, in Prometheus' text format.

Nothing is counted for this: the parts of the service keep plain numbers, which are read when somebody asks.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import accumulate, chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.rest.problems import problem
from domain.errors import FAILURE_CODES, LogUnavailable
from domain.histogram import Histogram
from domain.stages import FLOWS

if TYPE_CHECKING:
    from api.service import Service

_ENDS: Final = [(kind, code) for kind in FLOWS for code in ("completed", *FAILURE_CODES)]


async def render(service: "Service") -> Response:
    """The metrics of this node."""
    try:
        waiting = (await service.leases.count()).waiting
    except LogUnavailable:
        waiting = None
    families = chain(ProcessCollector(registry=None).collect(), _families(service, waiting))
    return Response(generate_latest(SimpleNamespace(collect=lambda: families)), media_type=CONTENT_TYPE_LATEST)


def _families(service: "Service", waiting: int | None) -> Iterator[Metric]:
    runner, recorder, sockets, streams = service.runner, service.recorder, service.sockets.eio, service.streams
    names = {"editor": service.settings.editor, "face_swapper": service.settings.face_swap}
    calls: Counter[tuple[str, str]] = Counter()
    for (provider, result), count in runner.provider_calls.items():
        calls[names[provider], result] += count
    attempts = service.webhooks.attempts if service.webhooks else {}

    yield _counts("generations", "Generations that have ended", recorder.ends, ("kind", "code"), _ENDS)
    yield GaugeMetricFamily("stagecast_running", "Generations that this node works on", runner.running)
    if waiting is not None:
        yield GaugeMetricFamily("stagecast_waiting", "Generations that wait for a worker, on all nodes", waiting)
    yield _seconds("queue", "Seconds from the start of a generation until its work began", {(): runner.queue_seconds})
    yield _seconds("stage", "Seconds that a stage took", runner.stage_seconds, ("kind", "status"))
    yield _seconds("append", "Seconds that the log took for an append", {(): recorder.append_seconds})
    yield GaugeMetricFamily("stagecast_sockets", "Open Socket.IO connections", len(sockets.sockets))
    yield GaugeMetricFamily("stagecast_streams", "Open event streams", len(streams.open))
    yield CounterMetricFamily("stagecast_events_sent", "Events sent to clients", service.hub.events_sent)
    came_back, recoveries = "Clients that came back with a position", service.feed_sessions.recoveries
    yield _counts("recoveries", came_back, recoveries, ("result",), ["recovered", "lost"])
    slow = sockets.slow_readers + streams.slow_readers
    yield CounterMetricFamily("stagecast_slow_readers", "Clients disconnected because they did not read", slow)
    yield _counts("webhook_attempts", "Webhooks sent", attempts, ("result",), ["delivered", "failed"])
    yield _counts("provider_calls", "Calls of a provider", calls, ("provider", "result"))
    yield _counts("refused", "HTTP requests that were refused", service.refused, ("code",))
    yield GaugeMetricFamily("stagecast_loop_lag_seconds", "How late the event loop is", service.lag.seconds)
    yield GaugeMetricFamily("stagecast_log_age_seconds", "Seconds since the log was last read", service.storage.age())


def _counts(
    name: str, text: str, counts: Mapping[Any, int], labels: tuple[str, ...], known: list[Any] | None = None
) -> Metric:
    """A counter with labels; `known` are the values that are there from the start, with 0."""
    family = CounterMetricFamily(f"stagecast_{name}", text, labels=labels)
    for values, count in {**dict.fromkeys(known or (), 0), **counts}.items():
        family.add_metric([values] if isinstance(values, str) else list(values), count)
    return family


def _seconds(name: str, text: str, histograms: Mapping[Any, Histogram], labels: tuple[str, ...] = ()) -> Metric:
    family = HistogramMetricFamily(f"stagecast_{name}_seconds", text, labels=labels)
    for values, histogram in histograms.items():
        bounds = [*map(str, histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family.add_metric(list(values), buckets, histogram.sum)
    return family


class MetricsAddress:
    """Serves the metrics, and nothing else, without a token on connections to a port of their own."""

    def __init__(self, app: ASGIApp, port: int | None, metrics: Callable[[], Awaitable[Response]]) -> None:
        """`port`: ``None`` if there is none. Everything else is for `app`."""
        self._app = app
        self._port = port
        self._metrics = metrics

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer one request or connection."""
        if self._port is None or (scope.get("server") or ("", None))[1] != self._port:
            return self._app(scope, receive, send)
        return self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"] == "/metrics":
            response = await self._metrics()
        else:
            response = problem("not_found", "Only /metrics is here.")
        await response(scope, receive, send)
