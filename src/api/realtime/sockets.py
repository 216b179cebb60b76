"""What clients say over Socket.IO, and what it does."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError
from pydantic.alias_generators import to_camel

from api.auth import Authenticator, UserMismatch
from domain.errors import LogUnavailable, Refusal
from domain.events import timestamp
from domain.feed_sessions import Attachments, Beginning
from domain.identity import Identity, InvalidUserId, Unauthenticated, user_id
from domain.workflow import Workflow

logger = logging.getLogger(__name__)

Answer = tuple[Mapping[str, Any], Callable[[], None]]
_Model = TypeVar("_Model", bound=BaseModel)


class BadRequest(Refusal):
    """The argument of this event is not what it should be."""

    code = "bad_request"


class Nobody(Refusal):
    """This socket belongs to nobody yet: authenticate first."""

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
    #: Who it has proved to be.
    identity: Identity | None
    #: Whether its client can recover: it then takes each event's cursor as a further argument.
    recovery: bool
    #: The session that its client may take up again; ``None``: none.
    pid: str | None
    #: How far its client had come in a session that cannot be taken up again.
    offset: object

    @property
    def outbox(self) -> Any:
        """Where what is sent to it waits."""

    @property
    def gone(self) -> bool:
        """Whether it has left."""


class Projection(Protocol):
    """Shows feeds on devices."""

    def attach(self, user_id: str, outbox: Any, beginning: Beginning, *, inline: bool) -> Device:
        """A device at this place of this user's feed."""

    def devices(self, user_id: str) -> int:
        """How many devices this user has."""


class _Argument(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel)


class _Authenticate(_Argument):
    user_id: Any = None
    token: Any = None
    cursor: Any = None
    recovery: StrictBool = True


class _Subscribe(_Argument):
    generation_id: StrictStr
    after: Annotated[StrictInt, Field(ge=0)] | None = None


class Sockets:
    """The handlers."""

    def __init__(
        self,
        workflow: Workflow,
        projection: Projection,
        authenticator: Authenticator,
        attachments: Attachments,
        new_pid: Callable[[], str],
        max_per_user: int | None = None,
    ) -> None:
        self._workflow = workflow
        self._projection = projection
        self._authenticator = authenticator
        self._attachments = attachments
        self._new_pid = new_pid
        self._max_per_user = max_per_user
        self.events = {
            "authenticate": self.authenticate,
            "subscribe_to_generation": self.subscribe_to_generation,
        }

    async def greet(self, connection: Connection, auth: Any) -> Answer:
        """The handshake: whom it names is authenticated, and a session that it takes up again goes on.

        Where what it says of itself does not hold together, it is told so, and nobody is authenticated.

        Raises:
            InvalidToken, TokenExpired: it is refused. Nothing else refuses it.
            LogUnavailable, KeysUnavailable: nothing can be said.
        """
        said = auth if isinstance(auth, dict) else {}
        connection.recovery = said.get("recovery") is not False
        user, proof, wrong = said.get("userId"), None, None
        try:
            proof = await self._authenticator.of_socket(user, said.get("token"), None)
        except Unauthenticated:
            pass  # It proves nothing, and authenticates nobody.
        except (InvalidUserId, UserMismatch) as error:
            wrong = None if user is None else error
        if connection.recovery:
            pid, connection.offset = said.get("pid"), said.get("offset")
            recovered = None
            if isinstance(pid, str) and wrong is None:
                recovered = await self._attachments.recover(pid, connection.offset, _named(user), proof)
            if recovered is not None:
                connection.pid = pid
                welcome = proof is not None
                return await self._enter(connection, *recovered, recovery=True, welcome=welcome, replaces=True)
            connection.pid = self._new_pid()
        if wrong is not None:
            code = BadRequest.code if isinstance(wrong, InvalidUserId) else wrong.code
            return {"ok": False, "code": code, "message": str(wrong)}, lambda: None
        if proof is None:
            return {}, lambda: None
        return await self._begin(connection, proof, said.get("cursor"), recovery=connection.recovery)

    async def authenticate(self, connection: Connection, argument: Any) -> Answer:
        """``{userId, token?, cursor?, recovery?}``: the socket belongs to this user, and is shown this user's feed."""
        said = _read(_Authenticate, argument)
        try:
            identity = await self._authenticator.of_socket(said.user_id, said.token, connection.identity)
        except InvalidUserId as error:
            raise BadRequest from error
        device: Device | None = connection.device
        if device is None or device.user_id != identity.user_id:
            recovery = said.recovery and connection.recovery
            return await self._begin(connection, identity, said.cursor, recovery=recovery)
        generations = await self._generations(identity.user_id)
        if connection.pid is not None and identity != connection.identity:
            await self._attachments.renew(connection.pid, identity)
        connection.identity = identity
        return self._welcome(device, identity, generations), lambda: None

    async def left(self, connection: Connection, for_good: bool) -> None:
        """A connection has ended; `for_good`: its client said that it does not come back."""
        if connection.pid is not None and connection.identity is not None:
            with contextlib.suppress(LogUnavailable):
                await self._attachments.leave(connection.pid, for_good=for_good)

    async def _begin(self, connection: Connection, identity: Identity, cursor: object, *, recovery: bool) -> Answer:
        text = connection.offset if cursor is None else cursor
        anew = connection.device is not None or None not in (connection.offset, cursor)
        beginning = await self._attachments.begin(identity, text, anew=anew)
        return await self._enter(connection, identity, beginning, recovery=recovery)

    async def _enter(
        self,
        connection: Connection,
        identity: Identity,
        beginning: Beginning,
        *,
        recovery: bool,
        welcome: bool = True,
        replaces: bool = False,
    ) -> Answer:
        """`replaces`: another socket is closed for this one, if it is not closed yet."""
        user = identity.user_id
        generations = await self._generations(user) if welcome else []
        # The session comes last: whatever fails before has changed nothing.
        if connection.pid is not None:
            if recovery:
                await self._attachments.keep(connection.pid, identity, beginning)
            else:
                await self._attachments.leave(connection.pid, for_good=True)
        if self._max_per_user is not None and self._projection.devices(user) - replaces >= self._max_per_user:
            logger.warning("a socket is closed: the limit of sockets per user is reached")
            connection.outbox.abort()
            return {}, lambda: None
        if connection.gone:
            return {}, lambda: None
        if connection.device is not None:
            connection.device.close()
        device = self._projection.attach(user, connection.outbox, beginning, inline=not recovery)
        connection.device, connection.identity, connection.offset = device, identity, None
        return self._welcome(device, identity, generations) if welcome else {}, device.start

    async def subscribe_to_generation(self, connection: Connection, argument: Any) -> Answer:
        """``{generationId, after?}``: replay one generation to this socket."""
        said = _read(_Subscribe, argument)
        device: Device | None = connection.device
        if device is None:
            raise Nobody
        snapshot = await self._workflow.snapshot(device.user_id, said.generation_id)
        ack = {"ok": True, **snapshot.model_dump(by_alias=True, exclude_none=True)}
        return ack, lambda: device.replay(said.generation_id, said.after)

    def _welcome(self, device: Device, identity: Identity, generations: list[dict[str, Any]]) -> dict[str, Any]:
        until = {} if identity.expires_at is None else {"expiresAt": timestamp(identity.expires_at)}
        return {
            "ok": True,
            "userId": device.user_id,
            "cursor": device.cursor,
            "recovered": device.resumed,
            "generations": generations,
            **until,
        }

    async def _generations(self, user: str) -> list[dict[str, Any]]:
        recent = await self._workflow.recent(user)
        return [snapshot.model_dump(by_alias=True, exclude_none=True) for snapshot in recent]


def _named(user: object) -> str | None:
    """The user whom a handshake names; ``""`` where there can be no such one."""
    try:
        return None if user is None else user_id(user)
    except InvalidUserId:
        return ""


def _read(model: type[_Model], argument: Any) -> _Model:
    try:
        return model.model_validate(argument)
    except ValidationError:
        raise BadRequest from None
