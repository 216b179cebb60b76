"""Handles the events that clients send over Socket.IO."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError
from pydantic.alias_generators import to_camel

from api.auth import Authenticator, UserMismatch
from api.wiring import Answer, Connection, Handler
from domain.delivery import Hub
from domain.device import Device
from domain.errors import LogUnavailable, Refusal
from domain.events import Wire, timestamp
from domain.feed_sessions import FeedSessions, StartPosition
from domain.generation import Snapshot
from domain.identity import Identity, InvalidUserId, Unauthenticated, user_id
from domain.workflow import Workflow

_NOTHING: Answer = ({}, lambda: None)
_Model = TypeVar("_Model", bound=BaseModel)


class BadRequest(Refusal, code="bad_request"):
    """The argument of this event is invalid."""


class NotAuthenticated(Refusal, code="unauthenticated"):
    """This socket is not authenticated yet. Send authenticate first."""


class _Argument(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel)


class Authenticate(_Argument):
    """Binds the socket to a user."""

    user_id: Annotated[Any, Field(description="text or an integer; with a token, that of its user")] = None
    token: Annotated[Any, Field(description="a JWT, if the service has a key configured")] = None
    cursor: Annotated[Any, Field(description="where to go on")] = None
    recovery: Annotated[StrictBool, Field(description="false: each event has its cursor as a key")] = True


class Subscribe(_Argument):
    """Replays one generation."""

    generation_id: StrictStr
    after: Annotated[StrictInt, Field(ge=0)] | None = None


class Welcome(Wire):
    """The answer to `authenticate`, and the first event after a handshake and of the feed's stream."""

    ok: Literal[True]
    user_id: str
    cursor: str
    recovered: Annotated[bool, Field(description="whether the cursor was usable: only the events after it follow")]
    generations: list[Snapshot]
    expires_at: str | None = None


@dataclass(frozen=True)
class Sockets:
    """The handlers. Each returns the ack and a function to call once the ack is queued."""

    workflow: Workflow
    hub: Hub
    authenticator: Authenticator
    feed_sessions: FeedSessions
    new_pid: Callable[[], str]

    @property
    def events(self) -> Mapping[str, Handler]:
        """The handlers by event."""
        return {"authenticate": self.authenticate, "subscribe_to_generation": self.subscribe_to_generation}

    async def on_connect(self, connection: Connection, auth: Any) -> Answer:
        """Handle the handshake: resume its session, or authenticate its user.

        If its parts contradict each other, the answer is an error and the socket stays unauthenticated.

        Raises:
            InvalidToken, TokenExpired: the handshake is rejected. No other error rejects it.
            LogUnavailable, KeysUnavailable: the token or the session cannot be checked now.
        """
        fields = auth if isinstance(auth, dict) else {}
        connection.recovery = fields.get("recovery") is not False
        user, proof, invalid = fields.get("userId"), None, None
        try:
            proof = await self.authenticator.of_socket(user, fields.get("token"), None)
        except Unauthenticated:
            pass  # Without credentials the socket connects unauthenticated.
        except (InvalidUserId, UserMismatch) as error:
            invalid = None if user is None else error
        if connection.recovery:
            pid, connection.offset = fields.get("pid"), fields.get("offset")
            resumed = None
            if isinstance(pid, str) and invalid is None:
                resumed = await self.feed_sessions.resume(pid, connection.offset, _claimed_user(user), proof)
            if resumed is not None:
                connection.pid = pid
                welcome = proof is not None
                return await self._join(connection, *resumed, recovery=True, welcome=welcome, replaces=True)
            connection.pid = self.new_pid()
        if invalid is not None:
            code = BadRequest.code if isinstance(invalid, InvalidUserId) else invalid.code
            return {"ok": False, "code": code, "message": str(invalid)}, lambda: None
        if proof is None:
            return _NOTHING
        return await self._open(connection, proof, fields.get("cursor"), recovery=connection.recovery)

    async def authenticate(self, connection: Connection, argument: Any) -> Answer:
        """``{userId, token?, cursor?, recovery?}``: bind the socket to this user and send the user's feed."""
        fields = _parse(Authenticate, argument)
        try:
            identity = await self.authenticator.of_socket(fields.user_id, fields.token, connection.identity)
        except InvalidUserId as error:
            raise BadRequest from error
        device = connection.device
        if device is None or device.user_id != identity.user_id:
            recovery = fields.recovery and connection.recovery
            return await self._open(connection, identity, fields.cursor, recovery=recovery)
        generations = await self.workflow.recent(identity.user_id)
        if not fields.recovery:
            device.encode_with(connection.encoder(recovery=False))
            if connection.pid is not None:
                await self.feed_sessions.close(connection.pid, permanent=True)
        elif connection.pid is not None and identity != connection.identity:
            await self.feed_sessions.renew(connection.pid, identity)
        connection.identity = identity
        return welcome_of(device, identity, generations), lambda: None

    async def on_disconnect(self, connection: Connection, permanent: bool) -> None:
        """The connection has ended; `permanent` if the client sent a DISCONNECT."""
        if connection.pid is not None and connection.identity is not None:
            with contextlib.suppress(LogUnavailable):
                await self.feed_sessions.close(connection.pid, permanent=permanent)

    async def _open(self, connection: Connection, identity: Identity, cursor: object, *, recovery: bool) -> Answer:
        text = connection.offset if cursor is None else cursor
        fresh = connection.device is not None or None not in (connection.offset, cursor)
        start = await self.feed_sessions.open(identity, text, fresh=fresh)
        return await self._join(connection, identity, start, recovery=recovery)

    async def _join(
        self, connection: Connection, identity: Identity, start: StartPosition,
        *, recovery: bool, welcome: bool = True, replaces: bool = False,
    ) -> Answer:  # fmt: skip
        """`replaces`: this socket replaces another one of its user, which is closed."""
        user = identity.user_id
        generations = await self.workflow.recent(user) if welcome else []
        # The session is written last: a failure before it changes nothing.
        if connection.pid is not None:
            if recovery:
                await self.feed_sessions.save(connection.pid, identity, start)
            else:
                await self.feed_sessions.close(connection.pid, permanent=True)
        if not await self.hub.admit(user, replaces=replaces):
            connection.socket.buffer.abort()
            return _NOTHING
        if connection.socket.gone:  # A device can no longer be made for it.
            self.hub.leave(user)
            return _NOTHING
        if connection.device is not None:
            connection.device.close()
        device = self.hub.join(user, connection.socket.buffer, connection.encoder(recovery=recovery), start)
        connection.device, connection.identity, connection.offset = device, identity, None
        return welcome_of(device, identity, generations) if welcome else {}, device.start

    async def subscribe_to_generation(self, connection: Connection, argument: Any) -> Answer:
        """``{generationId, after?}``: replay one generation to this socket."""
        fields = _parse(Subscribe, argument)
        device = connection.device
        if device is None:
            raise NotAuthenticated
        snapshot = await self.workflow.snapshot(device.user_id, fields.generation_id)
        ack = {"ok": True, **snapshot.model_dump(by_alias=True, exclude_none=True, exclude={"input"})}
        return ack, lambda: device.replay(fields.generation_id, fields.after)


def welcome_of(device: Device[Any], identity: Identity, generations: Sequence[Snapshot]) -> dict[str, Any]:
    """What a client is sent before its events: the answer to `authenticate`, and the first event of a feed stream."""
    return Welcome(
        ok=True,
        user_id=device.user_id,
        cursor=device.cursor,
        recovered=device.resumed,
        generations=list(generations),
        expires_at=None if identity.expires_at is None else timestamp(identity.expires_at),
    ).model_dump(by_alias=True, exclude_none=True)


def _claimed_user(user: object) -> str | None:
    """The user that a handshake names, if it does; ``""`` if that is not a valid user id."""
    try:
        return None if user is None else user_id(user)
    except InvalidUserId:
        return ""


def _parse(model: type[_Model], argument: Any) -> _Model:
    try:
        return model.model_validate(argument)
    except ValidationError:
        raise BadRequest from None
