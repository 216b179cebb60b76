"""Settings: flags, then environment variables with the prefix ``STAGECAST_``, then ``.env``. Nothing else reads them.

Each field says in one place what it means and what it may be; ``--help``, the docs and the sentence that refuses a
wrong value are made from that.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, NoReturn, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from api.loopback import is_loopback

PREFIX: Final = "STAGECAST_"

_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_HOST: Final = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")


class SettingsError(Exception):
    """A setting is wrong. Its text is one sentence that names the variable and what is allowed."""


class Allowed(NamedTuple):
    """What a setting may be, to follow "must be"."""

    text: str


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
    if _url(value) is None or parts.query or parts.fragment:
        raise ValueError
    return value.rstrip("/")


_CENTURY: Final = 3_155_760_000
_Seconds = Annotated[float, Field(ge=0, le=_CENTURY), Allowed("a number of seconds, 0 or more")]
_SomeSeconds = Annotated[float, Field(gt=0, le=_CENTURY), Allowed("a number of seconds over 0")]
_Count = Annotated[int, Field(ge=1), Allowed("a whole number, 1 or more")]
_Local = Annotated[Literal["local"], Allowed('"local"')]


class Settings(BaseSettings):
    """How one service is set up. Make it with `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", dotenv_filtering="match_prefix", extra="forbid", frozen=True
    )

    host: Annotated[
        str,
        Field(min_length=1, description="The address to listen on."),
        Allowed("a host name or an IP address"),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Field(ge=0, le=65535, description="The port to listen on; 0 takes any free one."),
        Allowed("a whole number from 0 to 65535"),
    ] = 3000
    allow_open: Annotated[
        bool,
        Field(description="Listen beyond this machine although anybody may then act for any user."),
        Allowed("true or false"),
    ] = False
    public_url: Annotated[
        str,
        AfterValidator(_base_url),
        Field(
            default_factory=lambda data: f"http://localhost:{data['port']}",
            description="The base of image URLs.",
        ),
        Allowed("an http or https URL without query and fragment"),
    ]
    log: Annotated[
        Literal["memory://"],
        Field(description="Where the event log is kept."),
        Allowed('"memory://"'),
    ] = "memory://"
    images: Annotated[
        Path,
        Field(description="The folder in which images are kept."),
        Allowed("the path of a folder"),
    ] = Path("./var/images")
    jwt_secret: Annotated[
        SecretStr | None,
        AfterValidator(_long_enough),
        Field(description="The secret of HS256 tokens: 32 bytes or more. Without it and a JWKS URL: open mode."),
        Allowed("a secret of at least 32 bytes"),
    ] = None
    jwks_url: Annotated[
        str | None,
        AfterValidator(_url),
        Field(description="Where the public keys of RS256 and ES256 tokens are published (JWKS)."),
        Allowed("an http or https URL"),
    ] = None
    jwt_audience: Annotated[
        str | None,
        Field(
            min_length=1,
            description="The audience (aud) that tokens must be for; unset: a token that names any is refused.",
        ),
        Allowed("a name, or unset"),
    ] = None
    jwt_issuer: Annotated[
        str | None,
        Field(min_length=1, description="The issuer (iss) that tokens must be from."),
        Allowed("a name, or unset"),
    ] = None
    jwt_user_claim: Annotated[
        str,
        Field(min_length=1, description="The claim of a token that names the user."),
        Allowed("the name of a claim"),
    ] = "sub"
    credits: Annotated[
        Annotated[int, Field(ge=0)] | None,
        BeforeValidator(_off),
        Field(description='A new user\'s balance; "off" keeps no balances.'),
        Allowed('a whole number, 0 or more, or "off"'),
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
        Field(description="Further origins from which browsers may call, separated by commas."),
        Allowed("origins such as https://app.example.com, separated by commas"),
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_list),
        AfterValidator(_hosts),
        Field(description="Further host names by which the service may be called, separated by commas."),
        Allowed("host names without ports, separated by commas"),
    ] = ()
    editor: Annotated[_Local, Field(description="Which editor makes the pictures.")] = "local"
    face_swap: Annotated[_Local, Field(description="Which face swapper is used.")] = "local"
    local_seconds: Annotated[
        _Seconds,
        Field(description="Seconds that the offline AI stages last at least, to be watched; 0: no wait, no repeats."),
    ] = 3
    max_running: Annotated[_Count, Field(description="How many generations are worked on at once.")] = 8
    max_per_user: Annotated[_Count, Field(description="How many unfinished generations a user may have.")] = 20
    max_waiting: Annotated[_Count, Field(description="How many generations may wait in all.")] = 200
    fetch_allow: Annotated[
        tuple[IPv4Network | IPv6Network, ...],
        NoDecode,
        BeforeValidator(_list),
        Field(description="Networks from which image URLs may be fetched although not public, for development."),
        Allowed("networks such as 127.0.0.0/8, separated by commas"),
    ] = ()
    deadline: Annotated[_SomeSeconds, Field(description="Seconds of work after which a generation is stopped.")] = 600
    drain: Annotated[
        _Seconds, Field(description="Seconds for which running work is awaited after the signal to stop.")
    ] = 25

    @property
    def open_mode(self) -> bool:
        """Whether anybody may act for any user: no key is configured that tokens could be checked with."""
        return self.jwt_secret is None and self.jwks_url is None

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

    flag: str
    variable: str
    default: str
    description: str


def describe_settings() -> Iterator[Setting]:
    """Every setting, in the order of the fields: for ``--help`` and the docs."""
    for name, field in Settings.model_fields.items():
        default = "http://localhost:<port>" if name == "public_url" else _text(field.default)
        yield Setting(f"--{name.replace('_', '-')}", _variable(name), default, field.description or "")


def load_settings(overrides: Mapping[str, Any]) -> Settings:
    """The settings, with `overrides`, by field name, before everything else.

    Raises:
        SettingsError: a value is wrong, or a variable with our prefix is unknown.
    """
    for variable in os.environ:
        if variable.upper().startswith(PREFIX) and variable[len(PREFIX) :].lower() not in Settings.model_fields:
            _refuse_unknown(variable.upper())
    try:
        return Settings(**overrides)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    except (OSError, UnicodeDecodeError):
        raise SettingsError(".env must be a readable text file in UTF-8.") from None
    if not first["loc"]:
        raise SettingsError(first["msg"])
    name = str(first["loc"][0])
    if name not in Settings.model_fields:
        _refuse_unknown(_variable(name))
    allowed = next(item for item in Settings.model_fields[name].metadata if isinstance(item, Allowed))
    raise SettingsError(f"{_variable(name)} must be {allowed.text}.")


def _refuse_unknown(variable: str) -> NoReturn:
    similar = difflib.get_close_matches(variable.removeprefix(PREFIX).lower(), Settings.model_fields, n=1)
    hint = f"; did you mean {_variable(similar[0])}?" if similar else "."
    raise SettingsError(f"{variable} is not a setting{hint}")


def _variable(name: str) -> str:
    return f"{PREFIX}{name.upper()}"


def _text(default: object) -> str:
    match default:
        case bool():
            return str(default).lower()
        case () | None:
            return "none"
        case _:
            return str(default)
