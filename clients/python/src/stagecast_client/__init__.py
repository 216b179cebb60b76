"""A client of Stagecast: starts AI image jobs, and follows them through lost connections.

>>> from stagecast_client import GenerationFailed, Stagecast
>>> stagecast = Stagecast("http://localhost:3000", user_id=123)
>>> done = stagecast.run("edit", prompt="a red hat", images=["photo.jpg"])
>>> done.status, done.progress, done.edited_image_url is not None
('completed', 100, True)

`run` starts a generation, calls `on_progress` with each change, and returns the finished generation:

>>> def show(generation):
...     print(f"{generation.progress}% {generation.status}")
>>> done = stagecast.run("generate", prompt="a quiet sea", images=["photo.jpg"], on_progress=show)
0% started
20% composition
40% composition_completed
60% ai_generation
100% completed

`start` returns at once. `watch` and `events` follow one generation, or without an id all of the user's:

>>> started = stagecast.start("edit", prompt="a red hat", images=["photo.jpg"])
>>> [event.sequence for event in stagecast.events(started.generation_id)]
[1, 2, 3, 4, 5, 6]
>>> [generation.status for generation in stagecast.watch(started.generation_id)]
['completed']

What the service refuses is a `StagecastError` with a stable code; a generation that fails is a `GenerationFailed`:

>>> stagecast.run("edit", prompt="", images=["photo.jpg"])
Traceback (most recent call last):
    ...
stagecast_client.errors.StagecastError: prompt: ...
>>> stagecast.cancel(started.generation_id)
'already_finished'
>>> stagecast.delete(started.generation_id)
>>> [generation.kind for generation in stagecast.list(limit=2)]
['generate', 'edit']
>>> stagecast.close()

`AsyncStagecast` is the same with asyncio.
"""

from stagecast_client.clients import AsyncStagecast, Stagecast
from stagecast_client.errors import GenerationFailed, HistoryLost, StagecastError
from stagecast_client.models import Account, Event, FaceSwapError, Generation, Input, Options, TransitionFields

__all__ = [
    "Account",
    "AsyncStagecast",
    "Event",
    "FaceSwapError",
    "Generation",
    "GenerationFailed",
    "HistoryLost",
    "Input",
    "Options",
    "Stagecast",
    "StagecastError",
    "TransitionFields",
]
