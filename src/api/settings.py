"""Settings: flags, then environment variables with the prefix ``STAGECAST_``, then ``.env``. Nothing else reads them.

Each field of `Settings` is the only declaration of a setting. ``--help``, ``docs/settings.md`` and the error for an
invalid value are made from its type, its `Allowed` and the text below it.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Final, Literal, NamedTuple, NoReturn, Self, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from api import setting_types as types
from api.loopback import is_loopback
from api.setting_types import Allowed

PREFIX: Final = "STAGECAST_"
#: Hosts that stand for every address of this machine.
_EVERY_ADDRESS: Final = ("0.0.0.0", "::", "0")  # noqa: S104 - it is compared, not listened on
#: Settings of `Remote` only.
_REMOTE: Final = ("url", "token")


class SettingsError(Exception):
    """A setting is not valid. The text is one sentence that names the variable and what is allowed."""


_Model = TypeVar("_Model", bound=BaseSettings)
_inconsistent: Final = partial(PydanticCustomError, "inconsistent")


class _Sources(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_ignore_empty=True,
        dotenv_filtering="match_prefix",
        frozen=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )


class Remote(_Sources):
    """The running service that a command calls. Make it with `load_remote`."""

    model_config = SettingsConfigDict(extra="ignore")

    port: types.Port = 3000
    url: types.ServiceUrl
    token: Annotated[
        str | None, Field(repr=False, pattern=r"^[!-~]+$"), Allowed("a token without spaces and line ends", "JWT")
    ] = None


class Settings(_Sources):
    """The configuration of one service. Make it with `load_settings`."""

    model_config = SettingsConfigDict(extra="forbid")

    host: Annotated[str, Field(min_length=1), Allowed("a host name or an IP address", "HOST")] = "127.0.0.1"
    """The address to listen on."""
    port: types.Port = 3000
    """The port to listen on; 0 takes any free one."""
    allow_open: Annotated[bool, Allowed("true or false", "")] = False
    """Listen beyond this machine in open mode, where anybody may act for any user."""
    public_url: types.BaseUrl
    """The base of image URLs. If it has a path, every route is served with and without it."""
    keep_alive: types.PositiveSeconds = 80
    """Seconds for which an idle HTTP connection is kept. Set it higher than the value of the proxy in front."""
    metrics_address: types.Address = None
    """Another address and port at which the metrics are served, without a token."""
    log_level: types.Level = "info"
    """The least level of the lines that are logged to standard error: debug, info, warning or error."""
    log_format: Annotated[Literal["text", "json"], Allowed('"text" or "json"', "FORMAT")] = "text"
    """How they are written: as text, or as one JSON object per line."""

    log: types.Log = "memory://"
    """Where the event log is stored: in memory, or durably in a file, sqlite:///path, or for any number of nodes in
    PostgreSQL, postgresql://user@host/database. Passwords: PGPASSWORD or ~/.pgpass keep them out of the arguments."""
    log_direct: types.Postgres = None
    """Another URL of the PostgreSQL of the log, past a pooler, at which this node listens for the events of others."""
    node_address: types.NodeAddress = None
    """host:port at which other nodes of the same PostgreSQL reach this one. If unset, STAGECAST_HOST and the port; if
    that host is every address, such as 0.0.0.0, the address from which this node reaches PostgreSQL."""
    images: types.Images = "./var/images"
    """Where images are stored: in a folder, or in a bucket of S3 or a compatible service, s3://bucket/prefix."""
    shared_images: Annotated[bool, Allowed("true or false", "")] = False
    """The image folder is shared by all nodes."""

    jwt_secret: types.JwtSecret = None
    """The secret of HS256 tokens, 32 bytes or more. Tokens must have an expiry time (exp). Without this secret and a
    JWKS URL the service is in open mode."""
    jwks_url: types.Url = None
    """Where the public keys of RS256 and ES256 tokens are published (JWKS)."""
    jwt_audience: types.Name = None
    """The audience (aud) that tokens must have. If unset, tokens with an audience are rejected."""
    jwt_issuer: types.Name = None
    """The issuer (iss) that tokens must have."""
    jwt_user_claim: Annotated[str, Field(min_length=1), Allowed("the name of a claim", "NAME")] = "sub"
    """The claim of a token that holds the user id."""

    credits: Annotated[
        Annotated[int, Field(ge=0, le=1_000_000_000_000)] | None,
        types.Off,
        Allowed('a whole number from 0 to a million million, or "off"', "NUMBER"),
    ] = 100
    """A new user's balance; "off" keeps no balances."""
    retention: types.PositiveSeconds = 86400
    """Seconds for which a finished generation's history and images are kept."""

    cors_origins: types.Origins = ()
    """Further origins from which browsers may call, separated by commas. `null`, other schemes
    (`capacitor://localhost`) and patterns (`https://*.preview.example.com`, where `*` is one label or a part of it) are
    possible. Always allowed: the same origin, that of the public URL, and in open mode those on this machine."""
    allowed_hosts: types.Hosts = ()
    """Further host names by which the service may be called, separated by commas."""
    trusted_proxies: types.Networks = ()
    """Networks of the proxies whose `X-Forwarded-*` headers are used, separated by commas."""

    openai_api_key: Annotated[types.Secret, Field(validation_alias="OPENAI_API_KEY"), Allowed("a key", "KEY")] = None
    """The key of OpenAI's API."""
    openai_base_url: Annotated[types.Url, Field(validation_alias="OPENAI_BASE_URL")] = None
    """The base URL of another service that implements OpenAI's API."""
    openai_model: Annotated[str | None, Allowed("a name", "NAME", "gpt-image-2.5-flare")] = None
    """OpenAI's model."""
    editor: Annotated[str, *types.provider("an editor", "openai", "OPENAI_API_KEY")]
    """The editor that makes the images: openai, local (an offline preview), or your own as package.module:factory."""
    replicate_api_token: Annotated[
        types.Secret, Field(validation_alias="REPLICATE_API_TOKEN"), Allowed("a token", "KEY")
    ] = None
    """The token of Replicate's API."""
    replicate_model: Annotated[
        str | None, Allowed("owner/name or owner/name:version", "NAME", "cdingram/face-swap")
    ] = None
    """Replicate's model, as owner/name or owner/name:version."""
    face_swap: Annotated[str, *types.provider("a face swap", "replicate", "REPLICATE_API_TOKEN")]
    """The face swap: replicate, local (an offline preview), or your own as package.module:factory."""
    local_seconds: types.Seconds = 3
    """Minimum seconds of each offline AI stage, so that a person can watch; 0: no wait and no repeats."""
    fetch_allow: types.Networks = ()
    """Networks from which image URLs may be fetched although they are not public, for development."""

    max_running: types.Count = 8
    """How many generations are worked on at once. Those that fetch image URLs do not count: four times as many may do
    so, two of each user."""
    max_per_user: types.Count = 20
    """How many unfinished generations a user may have."""
    max_waiting: types.Count = 200
    """How many generations may wait in total."""
    starts_per_minute: types.CountOrOff = 600
    """How many starts per minute are accepted from a user; "off": no limit."""
    max_stored_per_user: types.BytesOrOff = 2_000_000_000
    """Bytes of stored images beyond which a user's starts are rejected; "off": no limit."""
    max_lag_ms: Annotated[
        Annotated[float, Field(gt=0, le=types.CENTURY)] | None,
        types.Off,
        Allowed('a number of milliseconds over 0, or "off"', "MILLISECONDS"),
    ] = 250
    """Milliseconds of event-loop lag beyond which starts are rejected as overload; "off": no limit."""
    deadline: types.PositiveSeconds = 600
    """Seconds of work, waiting excluded, after which a generation is stopped."""
    drain: types.Seconds = 25
    """Seconds that a shutdown waits for running work."""
    max_connections: types.Descriptors = None
    """How many connections there may be in total; never more than the file descriptors of the process less 64. A new
    connection beyond it replaces an idle one, or is closed."""
    max_connections_per_address: types.CountOrOff = None
    """How many connections a client address may have; behind `STAGECAST_TRUSTED_PROXIES` the forwarded address counts.
    Connections beyond it are closed."""
    max_sockets_per_user: types.CountOrOff = None
    """How many authenticated sockets and event streams a user may have. Those beyond it are closed."""

    webhook_url: types.Url = None
    """Where the end of every generation is reported, by the Standard Webhooks scheme."""
    webhook_secret: types.WebhookSecret = None
    """The secret that webhooks are signed with: whsec_ and 24 to 64 random bytes in base64."""

    @property
    def open_mode(self) -> bool:
        """Whether anybody may act for any user, because no key is configured to verify tokens with."""
        return self.jwt_secret is None and self.jwks_url is None

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins from which browsers may call, besides the one that they call; with that of the public URL."""
        public = urlsplit(self.public_url)
        return (*self.cors_origins, f"{public.scheme}://{public.netloc}".lower())

    @property
    def path_prefix(self) -> str:
        """The path of the public URL, with which every route is served too; empty if it has none."""
        return urlsplit(self.public_url).path

    @property
    def announced_address(self) -> str:
        """``host:port`` of this node for others; ``:port`` if its address is that from which the log is reached."""
        host = "" if self.host in _EVERY_ADDRESS else f"[{self.host}]" if ":" in self.host else self.host
        return self.node_address or f"{host}:{self.port}"

    @property
    def metrics_port(self) -> int | None:
        """The port of the metrics' own address, if there is one."""
        return None if self.metrics_address is None else int(self.metrics_address.rpartition(":")[2])

    @model_validator(mode="before")
    @classmethod
    def _without_remote(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Ignore the settings in ``.env`` that are for commands that call a service."""
        return {name: value for name, value in given.items() if name not in _REMOTE}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.editor == "openai" and not self.openai_api_key:
            raise _inconsistent("OPENAI_API_KEY must be set where STAGECAST_EDITOR is openai.")
        if self.face_swap == "replicate" and not self.replicate_api_token:
            raise _inconsistent("REPLICATE_API_TOKEN must be set where STAGECAST_FACE_SWAP is replicate.")
        if self.jwt_secret is not None and self.jwks_url is not None:
            raise _inconsistent("STAGECAST_JWT_SECRET must not be set with STAGECAST_JWKS_URL: tokens have one key.")
        if self.open_mode and not self.allow_open and not is_loopback(self.host.lower()):
            raise _inconsistent(
                "STAGECAST_HOST must be a loopback address, since anybody may act for any user without a key; "
                "set STAGECAST_JWT_SECRET or STAGECAST_JWKS_URL, or give --allow-open."
            )
        if 0 != self.port == self.metrics_port:
            raise _inconsistent("STAGECAST_METRICS_ADDRESS must have another port.")
        return self


#: All settings.
_NAMES: Final = (*Settings.model_fields, *_REMOTE)
#: The topics of the settings, each by its first field.
_TOPICS: Final = {
    "host": "Address",
    "log": "Storage",
    "jwt_secret": "Tokens",
    "credits": "Credit and retention",
    "cors_origins": "Origins and host names",
    "openai_api_key": "Providers",
    "max_running": "Limits",
    "webhook_url": "Webhooks",
}


class Setting(NamedTuple):
    """One setting, as documented."""

    topic: str
    #: None for secrets, which every user of the machine could read in the arguments, and for OpenAI's own variables.
    flag: str | None
    placeholder: str
    variable: str
    default: str
    description: str


def describe_settings() -> Iterator[Setting]:
    """Every setting, in the order of the fields: for ``--help`` and the docs."""
    topic = ""
    for name, field in Settings.model_fields.items():
        topic = _TOPICS.get(name, topic)
        allowed = _allowed(field)
        default = allowed.default if field.default_factory or field.default in (None, ()) else str(field.default)
        default = "false" if field.default is False else default
        hidden = field.validation_alias or SecretStr in get_args(field.annotation)
        flag = None if hidden else f"--{name.replace('_', '-')}"
        description = " ".join((field.description or "").split())
        yield Setting(topic, flag, allowed.placeholder, _variable(name), default, description)


def load_settings(overrides: Mapping[str, Any]) -> Settings:
    """The settings. `overrides`, by field name, take precedence over all sources. An empty value counts as not set.

    Raises:
        SettingsError: a value is not valid, or a variable with the prefix is unknown.
    """
    return _load(Settings, overrides)


def load_remote(overrides: Mapping[str, Any]) -> Remote:
    """The service to call, from the same sources. Raises `SettingsError`."""
    return _load(Remote, overrides)


def _load(model: type[_Model], overrides: Mapping[str, Any]) -> _Model:
    known = {_variable(name) for name in _NAMES}
    for variable in map(str.upper, os.environ):
        if variable.startswith(PREFIX) and variable not in known:
            _refuse_unknown(variable)
    try:
        return model(**{name: value for name, value in overrides.items() if value != ""})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    except (OSError, UnicodeDecodeError):
        raise SettingsError(".env must be a readable text file in UTF-8.") from None
    if not first["loc"]:
        raise SettingsError(first["msg"])
    given = str(first["loc"][0])
    name = next((name for name in model.model_fields if given in (name, _variable(name))), None)
    if name is None:
        _refuse_unknown(_variable(given))
    raise SettingsError(f"{_variable(name)} must be {_allowed(model.model_fields[name]).text}.")


def _allowed(field: FieldInfo) -> Allowed:
    return next(item for item in reversed(field.metadata) if isinstance(item, Allowed))


def _refuse_unknown(variable: str) -> NoReturn:
    similar = difflib.get_close_matches(variable.removeprefix(PREFIX).lower(), _NAMES, n=1)
    hint = f"; did you mean {_variable(similar[0])}?" if similar else "."
    raise SettingsError(f"{variable} is not a setting{hint}")


def _variable(name: str) -> str:
    field = Settings.model_fields.get(name)
    alias = field and field.validation_alias
    return alias if isinstance(alias, str) else f"{PREFIX}{name.upper()}"
