"""What clients say over Socket.IO, and what it does."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError
from pydantic.alias_generators import to_camel

from api.auth import InvalidUserId, user_id
from domain.errors import Refusal
from domain.feed import Cursor
from domain.workflow import Workflow

Answer = tuple[Mapping[str, Any], Callable[[], None]]
_Model = TypeVar("_Model", bound=BaseModel)


class BadRequest(Refusal):
    """The argument of this event is not what it should be."""

    code = "bad_request"


class Unauthenticated(Refusal):
    """Send authenticate first."""

    code = "unauthenticated"


class Device(Protocol):
    """A socket that is shown one user's feed."""

    user_id: str
    resumed: bool

    @property
    def cursor(self) -> str:
        """Where it is."""

    def start(self) -> None:
        """Begin to send."""

    def replay(self, generation_id: str, after: int | None) -> None:
        """Send events of one generation again, or those never sent."""

    def close(self) -> None:
        """Send nothing more."""


class Connection(Protocol):
    """A client."""

    device: Any
    #: Whether its client can recover: it then takes each event's cursor as a further argument.
    recovery: bool

    @property
    def outbox(self) -> Any:
        """Where what is sent to it waits."""

    @property
    def gone(self) -> bool:
        """Whether it has left."""


class Projection(Protocol):
    """Shows feeds on devices."""

    def attach(self, user_id: str, outbox: Any, cursor: Cursor, *, resumed: bool, inline: bool) -> Device:
        """A device at this place of this user's feed."""


class _Argument(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel)


class _Authenticate(_Argument):
    user_id: Any = None
    cursor: Any = None
    recovery: bool = True


class _Subscribe(_Argument):
    generation_id: StrictStr
    after: Annotated[StrictInt, Field(ge=0)] | None = None


class Sockets:
    """The handlers."""

    def __init__(self, workflow: Workflow, projection: Projection) -> None:
        self._workflow = workflow
        self._projection = projection
        self.events = {
            "authenticate": self.authenticate,
            "subscribe_to_generation": self.subscribe_to_generation,
        }

    async def greet(self, connection: Connection, auth: Any) -> Answer:
        """The handshake: whom it names is authenticated; one that names nobody authenticates nobody."""
        connection.recovery = not (isinstance(auth, dict) and auth.get("recovery") is False)
        try:
            return await self.authenticate(connection, auth)
        except BadRequest:
            return {}, lambda: None

    async def authenticate(self, connection: Connection, argument: Any) -> Answer:
        """``{userId, cursor?, recovery?}``: the socket belongs to this user, and is shown this user's feed."""
        said = _read(_Authenticate, argument)
        try:
            user = user_id(said.user_id)
        except InvalidUserId as error:
            raise BadRequest from error
        device: Device | None = connection.device
        if device is not None and device.user_id == user:
            return self._welcome(device, await self._generations(user)), lambda: None
        cursor, resumed = await self._workflow.cursor(user, said.cursor)
        generations = await self._generations(user)
        if connection.gone:
            return {}, lambda: None
        if device is not None:
            device.close()
        inline = not (said.recovery and connection.recovery)
        joined = self._projection.attach(user, connection.outbox, cursor, resumed=resumed, inline=inline)
        connection.device = joined
        return self._welcome(joined, generations), joined.start

    async def subscribe_to_generation(self, connection: Connection, argument: Any) -> Answer:
        """``{generationId, after?}``: replay one generation to this socket."""
        said = _read(_Subscribe, argument)
        device: Device | None = connection.device
        if device is None:
            raise Unauthenticated
        snapshot = await self._workflow.snapshot(device.user_id, said.generation_id)
        ack = {"ok": True, **snapshot.model_dump(by_alias=True, exclude_none=True)}
        return ack, lambda: device.replay(said.generation_id, said.after)

    def _welcome(self, device: Device, generations: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "ok": True,
            "userId": device.user_id,
            "cursor": device.cursor,
            "recovered": device.resumed,
            "generations": generations,
        }

    async def _generations(self, user: str) -> list[dict[str, Any]]:
        recent = await self._workflow.recent(user)
        return [snapshot.model_dump(by_alias=True, exclude_none=True) for snapshot in recent]


def _read(model: type[_Model], argument: Any) -> _Model:
    try:
        return model.model_validate(argument)
    except ValidationError:
        raise BadRequest from None
