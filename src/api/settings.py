"""Settings: flags, then environment variables with the prefix ``STAGECAST_``, then ``.env``. Nothing else reads them.

Each field says in one place what it means and what it may be; ``--help``, the docs and the sentence that refuses a
wrong value are made from that.
"""

import base64
import difflib
import os
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, NoReturn, Self, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from api.loopback import is_loopback

PREFIX: Final = "STAGECAST_"
#: Settings of `Remote` alone.
_REMOTE: Final = ("url", "token")

#: ``*`` stands for one label of a host name or a part of it; the last two labels have none.
_ORIGIN: Final = re.compile(
    r"null|file://|"
    r"[a-z][a-z0-9+.-]*://((?:(?:[a-z0-9_*-]+\.)+[a-z0-9_-]+\.)?[a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?"
)
_PATH: Final = re.compile(r"(/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~!$&'()*+,;=:@-]+)*")
_HOST: Final = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")


class SettingsError(Exception):
    """A setting is wrong. Its text is one sentence that names the variable and what is allowed."""


class Allowed(NamedTuple):
    """What a setting may be, to follow "must be", and what stands for its value in ``--help``."""

    text: str
    placeholder: str


def _off(value: object) -> object:
    return None if value == "off" else value


def _list(value: object) -> object:
    """``"A, b,"`` is ``("a", "b")``: host names and origins know no case."""
    return (
        tuple(item for part in value.lower().split(",") if (item := part.strip())) if isinstance(value, str) else value
    )


def _origins(values: tuple[str, ...]) -> tuple[str, ...]:
    if not all(_ORIGIN.fullmatch(value) for value in values):
        raise ValueError
    return values


def _hosts(values: tuple[str, ...]) -> tuple[str, ...]:
    if not all(_HOST.fullmatch(value) for value in values):
        raise ValueError
    return values


def _long_enough(value: SecretStr | None) -> SecretStr | None:
    if value is not None and len(value.get_secret_value().encode()) < 32:
        raise ValueError
    return value


def _url(value: str | None) -> str | None:
    parts = urlsplit(value or "")
    if value is not None and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ValueError
    return value


def _base_url(value: str) -> str:
    parts = urlsplit(value)
    if _url(value) is None or parts.query or parts.fragment or "*" in parts.netloc:
        raise ValueError
    if not _PATH.fullmatch(parts.path.rstrip("/")):
        raise ValueError
    return value.rstrip("/")


#: Descriptors of the process that are kept for all else than clients' connections.
OTHER_DESCRIPTORS: Final = 64
_SQLITE: Final = "sqlite:///"
#: The defaults that are not those of the fields.
_COMPUTED: Final = {
    "public_url": "http://localhost:<port>",
    "max_connections": f"descriptors - {OTHER_DESCRIPTORS}",
    "max_connections_per_address": "off",
    "max_sockets_per_user": "off",
    "openai_model": "gpt-image-2.5-flare",
    "replicate_model": "cdingram/face-swap",
    "editor": "openai if OPENAI_API_KEY is set, else local",
    "face_swap": "replicate if REPLICATE_API_TOKEN is set, else local",
}
_CENTURY: Final = 3_155_760_000
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
_Port = Annotated[int, Field(ge=0, le=65535), Allowed("a whole number from 0 to 65535", "PORT")]
_Seconds = Annotated[float, Field(ge=0, le=_CENTURY), Allowed("a number of seconds, 0 or more", "SECONDS")]
_SomeSeconds = Annotated[float, Field(gt=0, le=_CENTURY), Allowed("a number of seconds over 0", "SECONDS")]
_Count = Annotated[int, Field(ge=1), Allowed("a whole number, 1 or more", "NUMBER")]
_CountOrOff = Annotated[
    Annotated[int, Field(ge=1)] | None, BeforeValidator(_off), Allowed('a whole number, 1 or more, or "off"', "NUMBER")
]


def _log(value: str) -> str:
    if value != "memory://" and not (value.startswith(_SQLITE) and value.removeprefix(_SQLITE)):
        raise ValueError
    return value


def _folder(value: object) -> object:
    if isinstance(value, str) and "://" in value:
        raise ValueError
    return value


def _webhook_secret(value: SecretStr | None) -> SecretStr | None:
    if value is not None:
        kind, _, encoded = value.get_secret_value().partition("_")
        padded = encoded.rstrip("=") + "=" * (-len(encoded.rstrip("=")) % 4)
        if kind != "whsec" or not 24 <= len(base64.b64decode(padded, validate=True)) <= 64:
            raise ValueError
    return value


#: What makes a provider of the operator's own: ``package.module:factory``.
_FACTORY: Final = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"


def _max_connections() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # The hard one: `serve` raises the other to it.
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(limit - OTHER_DESCRIPTORS, 1)


def _editor(known: dict[str, Any]) -> str:
    return "openai" if known.get("openai_api_key") else "local"


def _face_swap(known: dict[str, Any]) -> str:
    return "replicate" if known.get("replicate_api_token") else "local"


_Model = TypeVar("_Model", bound=BaseSettings)


class _Sources(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_ignore_empty=True,
        dotenv_filtering="match_prefix",
        frozen=True,
        populate_by_name=True,
    )


class Remote(_Sources):
    """The running service that a command calls. Make it with `load_remote`."""

    model_config = SettingsConfigDict(extra="ignore")

    port: _Port = 3000
    url: Annotated[
        str,
        Field(default_factory=lambda data: f"http://localhost:{data['port']}"),
        Allowed("an http or https URL", "URL"),
    ]
    token: Annotated[
        str | None, Field(repr=False, pattern=r"^[!-~]+$"), Allowed("a token without spaces and line ends", "JWT")
    ] = None


class Settings(_Sources):
    """How one service is set up. Make it with `load_settings`."""

    model_config = SettingsConfigDict(extra="forbid")

    host: Annotated[
        str,
        Field(min_length=1, description="The address to listen on."),
        Allowed("a host name or an IP address", "HOST"),
    ] = "127.0.0.1"
    port: Annotated[_Port, Field(description="The port to listen on; 0 takes any free one.")] = 3000
    allow_open: Annotated[
        bool,
        Field(description="Listen beyond this machine although anybody may then act for any user."),
        Allowed("true or false", ""),
    ] = False
    public_url: Annotated[
        str,
        AfterValidator(_base_url),
        Field(
            default_factory=lambda data: f"http://localhost:{data['port']}",
            description="The base of image URLs. If it has a path, every route is served with and without it.",
        ),
        Allowed("an http or https URL without query and fragment, and without percent signs in its path", "URL"),
    ]
    keep_alive: Annotated[
        _SomeSeconds,
        Field(description="Seconds for which an idle HTTP connection is kept; more than the proxy in front keeps it."),
    ] = 80
    log: Annotated[
        str,
        AfterValidator(_log),
        Field(description="Where the event log is kept: in memory, or for good in a file, sqlite:///path."),
        Allowed('"memory://" or "sqlite:///" and the path of a file', "URL"),
    ] = "memory://"
    images: Annotated[
        Path,
        BeforeValidator(_folder),
        Field(description="The folder in which images are kept."),
        Allowed("the path of a folder", "PATH"),
    ] = Path("./var/images")
    jwt_secret: Annotated[
        SecretStr | None,
        AfterValidator(_long_enough),
        Field(
            description="The secret of HS256 tokens, 32 bytes or more; each has to say when it ends (exp). Without it "
            "and a JWKS URL: open mode."
        ),
        Allowed("a secret of at least 32 bytes", "SECRET"),
    ] = None
    jwks_url: Annotated[
        str | None,
        AfterValidator(_url),
        Field(description="Where the public keys of RS256 and ES256 tokens are published (JWKS)."),
        Allowed("an http or https URL", "URL"),
    ] = None
    jwt_audience: Annotated[
        str | None,
        Field(
            min_length=1,
            description="The audience (aud) that tokens must be for; unset: a token that names any is refused.",
        ),
        Allowed("a name, or unset", "NAME"),
    ] = None
    jwt_issuer: Annotated[
        str | None,
        Field(min_length=1, description="The issuer (iss) that tokens must be from."),
        Allowed("a name, or unset", "NAME"),
    ] = None
    jwt_user_claim: Annotated[
        str,
        Field(min_length=1, description="The claim of a token that names the user."),
        Allowed("the name of a claim", "NAME"),
    ] = "sub"
    credits: Annotated[
        Annotated[int, Field(ge=0, le=1_000_000_000_000)] | None,
        BeforeValidator(_off),
        Field(description='A new user\'s balance; "off" keeps no balances.'),
        Allowed('a whole number from 0 to a million million, or "off"', "NUMBER"),
    ] = 100
    retention: Annotated[
        _SomeSeconds,
        Field(description="Seconds for which a finished generation's history and images are kept."),
    ] = 86400
    cors_origins: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_list),
        AfterValidator(_origins),
        Field(
            description="Further origins from which browsers may call, separated by commas: also `null`, other schemes "
            "(`capacitor://localhost`) and patterns (`https://*.preview.example.com`: `*` is one label or a part of "
            "it). Always allowed: the same origin, that of the public URL, and in open mode those on this machine."
        ),
        Allowed(
            "origins such as https://app.example.com, separated by commas, with * only before the last two labels",
            "ORIGINS",
        ),
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_list),
        AfterValidator(_hosts),
        Field(description="Further host names by which the service may be called, separated by commas."),
        Allowed("host names without ports, separated by commas", "HOSTS"),
    ] = ()
    trusted_proxies: Annotated[
        tuple[IPv4Network | IPv6Network, ...],
        NoDecode,
        BeforeValidator(_list),
        Field(description="Networks of the proxies whose `X-Forwarded-*` headers count, separated by commas."),
        Allowed("networks such as 10.0.0.0/8, separated by commas", "NETWORKS"),
    ] = ()
    openai_api_key: Annotated[
        SecretStr | None,
        Field(validation_alias="OPENAI_API_KEY", description="The key of OpenAI's API."),
        Allowed("a key", "KEY"),
    ] = None
    openai_base_url: Annotated[
        str | None,
        AfterValidator(_url),
        Field(validation_alias="OPENAI_BASE_URL", description="Another place where OpenAI's API is spoken."),
        Allowed("an http or https URL", "URL"),
    ] = None
    openai_model: Annotated[
        str | None,
        Field(description="OpenAI's model."),
        Allowed("a name", "NAME"),
    ] = None
    editor: Annotated[
        str,
        Field(
            default_factory=_editor,
            pattern=f"^(local|openai|{_FACTORY})$",
            description="Which editor makes the pictures: openai, local (an offline preview), or one of your own as "
            "package.module:factory.",
        ),
        Allowed('"local", "openai" or a factory of an editor as package.module:factory', "NAME"),
    ]
    replicate_api_token: Annotated[
        SecretStr | None,
        Field(validation_alias="REPLICATE_API_TOKEN", description="The token of Replicate's API."),
        Allowed("a token", "KEY"),
    ] = None
    replicate_model: Annotated[
        str | None,
        Field(description="Replicate's model, as owner/name or owner/name:version."),
        Allowed("owner/name or owner/name:version", "NAME"),
    ] = None
    face_swap: Annotated[
        str,
        Field(
            default_factory=_face_swap,
            pattern=f"^(local|replicate|{_FACTORY})$",
            description="Which face swap is used: replicate, local (an offline preview), or one of your own as "
            "package.module:factory.",
        ),
        Allowed('"local", "replicate" or a factory of a face swap as package.module:factory', "NAME"),
    ]
    local_seconds: Annotated[
        _Seconds,
        Field(description="Seconds that the offline AI stages last at least, to be watched; 0: no wait, no repeats."),
    ] = 3
    fetch_allow: Annotated[
        tuple[IPv4Network | IPv6Network, ...],
        NoDecode,
        BeforeValidator(_list),
        Field(description="Networks from which image URLs may be fetched although not public, for development."),
        Allowed("networks such as 127.0.0.0/8, separated by commas", "NETWORKS"),
    ] = ()
    max_running: Annotated[
        _Count,
        Field(
            description="How many generations are worked on at once. Those that fetch image URLs do not count: four "
            "times as many may do so, two of each user."
        ),
    ] = 8
    max_per_user: Annotated[_Count, Field(description="How many unfinished generations a user may have.")] = 20
    max_waiting: Annotated[_Count, Field(description="How many generations may wait in all.")] = 200
    starts_per_minute: Annotated[
        _Count | None,
        BeforeValidator(_off),
        Field(description='How many starts per minute are accepted of a user; "off": any number.'),
        Allowed('a whole number, 1 or more, or "off"', "NUMBER"),
    ] = 600
    max_stored_per_user: Annotated[
        _Count | None,
        BeforeValidator(_off),
        Field(description='Bytes of stored images beyond which a user\'s starts are refused; "off": no limit.'),
        Allowed('a whole number, 1 or more, or "off"', "BYTES"),
    ] = 2_000_000_000
    max_lag_ms: Annotated[
        Annotated[float, Field(gt=0, le=_CENTURY)] | None,
        BeforeValidator(_off),
        Field(description='Milliseconds of event-loop lag beyond which starts are refused as overload; "off": never.'),
        Allowed('a number of milliseconds over 0, or "off"', "MILLISECONDS"),
    ] = 250
    deadline: Annotated[
        _SomeSeconds, Field(description="Seconds of work, waiting excluded, after which a generation is stopped.")
    ] = 600
    drain: Annotated[
        _Seconds, Field(description="Seconds for which running work is awaited after the signal to stop.")
    ] = 25
    max_connections: Annotated[
        _Count,
        Field(
            default_factory=_max_connections,
            description="How many connections there may be in all; never more than the descriptors of the process "
            "less 64. A new one then takes the place of an idle one, or is closed.",
        ),
    ]
    max_connections_per_address: Annotated[
        _CountOrOff,
        Field(
            description="How many connections a client address may have; behind `STAGECAST_TRUSTED_PROXIES` the "
            "forwarded one. Those beyond it are closed."
        ),
    ] = None
    max_sockets_per_user: Annotated[
        _CountOrOff,
        Field(description="How many authenticated sockets a user may have. Those beyond it are closed."),
    ] = None
    webhook_url: Annotated[
        str | None,
        AfterValidator(_url),
        Field(description="Where the end of every generation is told, by the Standard Webhooks scheme."),
        Allowed("an http or https URL", "URL"),
    ] = None
    webhook_secret: Annotated[
        SecretStr | None,
        AfterValidator(_webhook_secret),
        Field(description="What webhooks are signed with: whsec_ and 24 to 64 random bytes in base64."),
        Allowed("whsec_ and 24 to 64 bytes in base64", "SECRET"),
    ] = None

    @property
    def open_mode(self) -> bool:
        """Whether anybody may act for any user: no key is configured that tokens could be checked with."""
        return self.jwt_secret is None and self.jwks_url is None

    @property
    def origins(self) -> tuple[str, ...]:
        """From where browsers may call, besides the origin that they call: it may be known by another name here."""
        public = urlsplit(self.public_url)
        return (*self.cors_origins, f"{public.scheme}://{public.netloc.rpartition('@')[2]}".lower())

    @property
    def path_prefix(self) -> str:
        """The path of the public URL, with which every route is served too; empty if it has none."""
        return urlsplit(self.public_url).path

    @model_validator(mode="before")
    @classmethod
    def _without_remote(cls, given: dict[str, Any]) -> dict[str, Any]:
        """What commands that call a service are told in ``.env`` is not for the service."""
        return {name: value for name, value in given.items() if name not in _REMOTE}

    @model_validator(mode="after")
    def _provided(self) -> Self:
        if self.editor == "openai" and self.openai_api_key is None:
            raise PydanticCustomError("key", "OPENAI_API_KEY must be set where STAGECAST_EDITOR is openai.")
        if self.face_swap == "replicate" and self.replicate_api_token is None:
            raise PydanticCustomError("key", "REPLICATE_API_TOKEN must be set where STAGECAST_FACE_SWAP is replicate.")
        return self

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.jwt_secret is not None and self.jwks_url is not None:
            raise PydanticCustomError(
                "keys", "STAGECAST_JWT_SECRET must not be set together with STAGECAST_JWKS_URL: tokens have one key."
            )
        return self

    @model_validator(mode="after")
    def _open_on_loopback_only(self) -> Self:
        if self.open_mode and not self.allow_open and not is_loopback(self.host.lower()):
            raise PydanticCustomError(
                "open",
                "STAGECAST_HOST must be a loopback address, since anybody may act for any user without a key; "
                "set STAGECAST_JWT_SECRET or STAGECAST_JWKS_URL, or give --allow-open.",
            )
        return self


class Setting(NamedTuple):
    """One setting as told to people."""

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
        default = _COMPUTED.get(name) or _text(field.default)
        hidden = field.validation_alias or SecretStr in get_args(field.annotation)
        flag = None if hidden else f"--{name.replace('_', '-')}"
        yield Setting(topic, flag, _allowed(field).placeholder, _variable(name), default, field.description or "")


def load_settings(overrides: Mapping[str, Any]) -> Settings:
    """The settings, with `overrides`, by field name, before everything else. An empty value counts as not set.

    Raises:
        SettingsError: a value is wrong, or a variable with our prefix is unknown.
    """
    return _load(Settings, overrides)


def load_remote(overrides: Mapping[str, Any]) -> Remote:
    """The service to call, from the same sources. Raises `SettingsError`."""
    return _load(Remote, overrides)


def masked(url: str) -> str:
    """The URL for people to read: without its user name and password. It need not be a valid one."""
    return re.sub(r"^([a-z][a-z0-9+.-]*:/*)?.*@", r"\1***@", url, flags=re.IGNORECASE | re.DOTALL)


def _load(model: type[_Model], overrides: Mapping[str, Any]) -> _Model:
    known = {_variable(name) for name in (*Settings.model_fields, *_REMOTE)}
    for variable in os.environ:
        if variable.upper().startswith(PREFIX) and variable.upper() not in known:
            _refuse_unknown(variable.upper())
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
    return next(item for item in field.metadata if isinstance(item, Allowed))


def _refuse_unknown(variable: str) -> NoReturn:
    names = (*Settings.model_fields, *_REMOTE)
    similar = difflib.get_close_matches(variable.removeprefix(PREFIX).lower(), names, n=1)
    hint = f"; did you mean {_variable(similar[0])}?" if similar else "."
    raise SettingsError(f"{variable} is not a setting{hint}")


def _variable(name: str) -> str:
    field = Settings.model_fields.get(name)
    alias = field and field.validation_alias
    return alias if isinstance(alias, str) else f"{PREFIX}{name.upper()}"


def _text(default: object) -> str:
    match default:
        case bool():
            return str(default).lower()
        case () | None:
            return "none"
        case _:
            return str(default)
