"""What the composition root has put into ``app.state``, for the routes."""

from typing import Annotated

from fastapi import Depends, Request

from domain.feed_sessions import Attachments
from domain.ports import ImageStore
from domain.workflow import Workflow


async def _workflow(request: Request) -> Workflow:
    workflow: Workflow = request.app.state.workflow
    return workflow


async def _attachments(request: Request) -> Attachments:
    attachments: Attachments = request.app.state.attachments
    return attachments


async def _images(request: Request) -> ImageStore:
    images: ImageStore = request.app.state.images
    return images


UseCases = Annotated[Workflow, Depends(_workflow)]
Feeds = Annotated[Attachments, Depends(_attachments)]
Images = Annotated[ImageStore, Depends(_images)]
