"""What `api.app` stores in ``app.state`` for the routes."""

from typing import Annotated

from fastapi import Depends, Request

from domain.feed_sessions import FeedSessions
from domain.ports.images import ImageStore
from domain.workflow import Workflow


async def _workflow(request: Request) -> Workflow:
    workflow: Workflow = request.app.state.workflow
    return workflow


async def _feed_sessions(request: Request) -> FeedSessions:
    feed_sessions: FeedSessions = request.app.state.feed_sessions
    return feed_sessions


async def _images(request: Request) -> ImageStore:
    images: ImageStore = request.app.state.images
    return images


UseCases = Annotated[Workflow, Depends(_workflow)]
Feeds = Annotated[FeedSessions, Depends(_feed_sessions)]
Images = Annotated[ImageStore, Depends(_images)]
