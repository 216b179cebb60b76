"""The parts of the service that routes use, as dependencies; `api.app` stores it in ``app.state``."""

from typing import Annotated, Any

from fastapi import Depends, Request

from api.sse.streams import EventStreams
from domain.feed_sessions import FeedSessions
from domain.overview import Overview
from domain.stage_times import StageTimes
from domain.thumbnails import Thumbnails
from domain.workflow import Workflow


def _state(name: str) -> Any:
    def get(request: Request) -> Any:
        return getattr(request.app.state.service, name)

    return Depends(get)


Times = Annotated[StageTimes, _state("stage_times")]
UseCases = Annotated[Workflow, _state("workflow")]
Overviews = Annotated[Overview, _state("overview")]
Feeds = Annotated[FeedSessions, _state("feed_sessions")]
Streams = Annotated[EventStreams, _state("streams")]
Images = Annotated[Thumbnails, _state("thumbnails")]
