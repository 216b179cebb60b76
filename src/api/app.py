"""The ASGI application, and the server that runs it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from importlib import metadata

from fastapi import FastAPI
from starlette.types import ASGIApp

from api.rest import accounts, feed, generations, info, metrics, operations, problems, transitions
from api.rest.bodies import BodyTimeout
from api.rest.head import HeadAsGet
from api.rest.origin_guard import OriginGuard
from api.rest.proxies import ForwardedHeaders
from api.rest.request_log import RequestLog
from api.service import Service
from api.settings import SettingsError
from api.sse import routes as sse
from api.sse.streams import StreamLayer
from api.web import page
from api.wiring import ClientLimit, Parts, Server, connection_table


def create_service(parts: Parts) -> tuple[Service, ASGIApp]:
    """Build the service and its ASGI application.

    Raises:
        SettingsError: the path of the public URL begins like a route.
    """
    settings, service = parts.settings, Service(parts)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.startup()
        try:
            yield
        finally:
            force = asyncio.Event()
            force.set()
            await service.shutdown(force)

    http = FastAPI(
        title="Stagecast",
        version=metadata.version("stagecast"),
        summary=metadata.metadata("stagecast")["Summary"],
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        routes=[
            route
            for part in (sse, generations, transitions, feed, accounts, info, operations)
            for route in part.router.routes
        ],
    )
    http.state.service = service
    page.install(http, settings)
    routes = problems.Problems(http)
    hosts = None if settings.allow_open else settings.allowed_hosts
    prefix = settings.path_prefix
    paths = ["/socket.io", *(str(getattr(route, "path", "")) for route in http.routes)]
    if prefix and prefix.split("/")[1] in {path.split("/")[1] for path in paths}:
        raise SettingsError(
            "STAGECAST_PUBLIC_URL must not have a path that begins like one of the service, such as /images."
        )
    everything = service.sockets.app(HeadAsGet(StreamLayer(routes)), f"{prefix}/socket.io")
    guard = OriginGuard(BodyTimeout(everything), open_mode=settings.open_mode, origins=settings.origins, hosts=hosts)
    outside = ForwardedHeaders(ClientLimit(guard), settings.trusted_proxies, prefix)
    everywhere = metrics.MetricsAddress(outside, settings.metrics_port, partial(metrics.render, service))
    return service, service.sockets.eio.for_nodes(RequestLog(everywhere, routes.template, service.refused))


def create_server(parts: Parts, ready: Callable[[], None] = lambda: None) -> Server:
    """The service on uvicorn, with SIGTERM and SIGINT handled. `ready` is called once it accepts connections."""
    service, app = create_service(parts)
    return Server(app, service.shutdown, ready, parts.settings.keep_alive, connection_table(parts.settings))
