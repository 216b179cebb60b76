"""The types of settings: how a value is parsed and checked, and what is allowed, in words."""

import base64
import re
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

#: File descriptors of the process that are kept for everything except clients' connections.
OTHER_DESCRIPTORS: Final = 64
_POSTGRES: Final = r"postgresql://(?s:.*)"
_S3: Final = r"s3://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/(?!\.{1,2}(/|$))[A-Za-z0-9!_.*'()=-]+)*/?"
#: ``*`` stands for one label of a host name or a part of it; the last two labels have none.
_ORIGIN: Final = (
    r"null|file://|"
    r"[a-z][a-z0-9+.-]*://((?:(?:[a-z0-9_*-]+\.)+[a-z0-9_-]+\.)?[a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?"
)
_PATH: Final = re.compile(r"(/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~!$&'()*+,;=:@-]+)*")
_ADDRESS: Final = r"([a-z0-9._-]+|\[[0-9a-f:.]+\]):[0-9]{1,5}"
#: A provider of the operator's own: ``package.module:factory``.
_FACTORY: Final = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"
CENTURY: Final = 3_155_760_000  # seconds


class Allowed(NamedTuple):
    """What a setting may be."""

    #: Follows "must be".
    text: str
    #: Stands for the value in ``--help``; empty for a switch.
    placeholder: str
    #: The default, in words, of a field that has none of its own.
    default: str = "none"


def _valid(is_valid: Callable[[Any], object]) -> AfterValidator:
    """A check of a value that is set."""

    def check(value: Any) -> Any:
        if value is not None and not is_valid(value):
            raise ValueError
        return value

    return AfterValidator(check)


def _is_url(value: str) -> bool:
    parts = urlsplit(value)
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _base_url(value: str) -> str:
    parts = urlsplit(value)
    path_valid = _PATH.fullmatch(parts.path.rstrip("/"))
    if not _is_url(value) or parts.query or parts.fragment or "*" in parts.netloc or not path_valid:
        raise ValueError
    # Everybody sees it: without user name and password.
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")


def _is_address(value: str) -> bool:
    return re.fullmatch(_ADDRESS, value) is not None and int(value.rpartition(":")[2]) < 2**16


def _is_jwt_secret(value: SecretStr) -> bool:
    return len(value.get_secret_value().encode()) >= 32


def _is_webhook_secret(value: SecretStr) -> bool:
    kind, _, encoded = value.get_secret_value().partition("_")
    padded = encoded.rstrip("=") + "=" * (-len(encoded.rstrip("=")) % 4)
    return kind == "whsec" and 24 <= len(base64.b64decode(padded, validate=True)) <= 64


def _split(value: object) -> object:
    """``"A, b,"`` becomes ``("a", "b")``, because host names and origins are case-insensitive."""
    return tuple(filter(None, map(str.strip, value.lower().split(",")))) if isinstance(value, str) else value


def provider(what: str, online: str, key: str) -> tuple[Any, ...]:
    """A choice of providers: the online one by default if its key is set."""
    return (
        Field(
            default_factory=lambda known: online if known.get(key.lower()) else "local",
            pattern=f"^(local|{online}|{_FACTORY})$",
        ),
        Allowed(
            f'"local", "{online}" or a factory of {what} as package.module:factory',
            "NAME",
            f"{online} if {key} is set, else local",
        ),
    )


def _default_url(known: dict[str, Any]) -> str:
    return f"http://localhost:{known['port']}"


_List = (NoDecode, BeforeValidator(_split))
#: Reads "off" as None.
Off: Final = BeforeValidator(lambda value: None if value == "off" else value)
_LowerCase: Final = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)

Port = Annotated[int, Field(ge=0, le=65535), Allowed("a whole number from 0 to 65535", "PORT")]
Seconds = Annotated[float, Field(ge=0, le=CENTURY), Allowed("a number of seconds, 0 or more", "SECONDS")]
PositiveSeconds = Annotated[float, Field(gt=0, le=CENTURY), Allowed("a number of seconds over 0", "SECONDS")]
Count = Annotated[int, Field(ge=1), Allowed("a whole number, 1 or more", "NUMBER")]
_COUNT_OR_OFF: Final = 'a whole number, 1 or more, or "off"'
CountOrOff = Annotated[Annotated[int, Field(ge=1)] | None, Off, Allowed(_COUNT_OR_OFF, "NUMBER", "off")]
BytesOrOff = Annotated[CountOrOff, Allowed(_COUNT_OR_OFF, "BYTES", "off")]
Descriptors = Annotated[
    Annotated[int, Field(ge=1)] | None,
    Allowed("a whole number, 1 or more", "NUMBER", f"descriptors - {OTHER_DESCRIPTORS}"),
]

Level = Annotated[
    Literal["debug", "info", "warning", "error"],
    _LowerCase,
    Allowed('"debug", "info", "warning" or "error"', "LEVEL"),
]
Address = Annotated[
    str | None, _LowerCase, _valid(_is_address), Allowed("an address and a port such as 127.0.0.1:9090", "ADDRESS")
]

Name = Annotated[str | None, Field(min_length=1), Allowed("a name, or unset", "NAME")]
Secret = SecretStr | None
JwtSecret = Annotated[Secret, _valid(_is_jwt_secret), Allowed("a secret of at least 32 bytes", "SECRET")]
WebhookSecret = Annotated[Secret, _valid(_is_webhook_secret), Allowed("whsec_ and 24 to 64 bytes in base64", "SECRET")]
Log = Annotated[
    str,
    Field(pattern=rf"^(memory://|sqlite:///(?s:.+)|{_POSTGRES})$"),
    Allowed('"memory://", "sqlite:///" and the path of a file, or "postgresql://" and a database', "URL"),
]
Postgres = Annotated[str | None, Field(pattern=f"^{_POSTGRES}$"), Allowed('"postgresql://" and a database', "URL")]
NodeAddress = Annotated[
    str | None,
    _LowerCase,
    _valid(lambda value: _is_address(value) and not re.search(":0+$", value)),
    Allowed("a host and a port, host:port", "HOST:PORT", "STAGECAST_HOST and the port"),
]
Images = Annotated[
    str,
    BeforeValidator(str),
    _valid(lambda value: "://" not in value or re.fullmatch(_S3, value)),
    Allowed('the path of a folder, or "s3://", the name of a bucket, and a prefix', "PATH"),
]

Url = Annotated[str | None, _valid(_is_url), Allowed("an http or https URL", "URL")]
ServiceUrl = Annotated[
    str, _valid(_is_url), Field(default_factory=_default_url), Allowed("an http or https URL", "URL")
]
BaseUrl = Annotated[
    str,
    AfterValidator(_base_url),
    Field(default_factory=_default_url),
    Allowed(
        "an http or https URL without query and fragment, and without percent signs in its path",
        "URL",
        "http://localhost:<port>",
    ),
]
Origins = Annotated[
    tuple[Annotated[str, Field(pattern=f"^({_ORIGIN})$")], ...],
    *_List,
    Allowed(
        "origins such as https://app.example.com, separated by commas, with * only before the last two labels",
        "ORIGINS",
    ),
]
_Host = Annotated[str, Field(pattern=r"^([a-z0-9._-]+|[0-9a-f:.]+)$")]
Hosts = Annotated[tuple[_Host, ...], *_List, Allowed("host names without ports, separated by commas", "HOSTS")]
Networks = Annotated[
    tuple[IPv4Network | IPv6Network, ...],
    *_List,
    Allowed("networks such as 10.0.0.0/8, separated by commas", "NETWORKS"),
]
