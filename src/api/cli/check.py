"""``stagecast check``: the settings in effect, and what is damaged in the stores. Nothing is changed."""

import re
from collections.abc import Iterator
from typing import Final

from pydantic import SecretStr

from api.cli.client import Refused
from api.settings import Settings, describe_settings
from api.wiring import examine_stores

_MASK: Final = "********"
#: In a URL: what stands before the host, and the values of parameters that are named like a secret.
_USER_INFO: Final = re.compile(r"(?<=://)([^/?#:@]*(?=:))?[^/?#]*@")
_PARAMETER: Final = re.compile(r"([?&][^=&#]*(?:pass|pwd|token|key|secret|sig)[^=&#]*=)[^&#]*", re.IGNORECASE)


def run(settings: Settings) -> None:
    """Print the settings, and examine the stores.

    Raises:
        Refused: something is damaged. It has been printed.
        SettingsError, StorageRefused, ImagesRefused: as `examine_stores`.
    """
    print(*_effective(settings), sep="\n")
    damage = examine_stores(settings)
    print(*damage or ["No damage was found."], sep="\n")
    if damage:
        raise Refused(f"damage was found: {len(damage)} {'findings' if len(damage) > 1 else 'finding'}.")


def _effective(settings: Settings) -> Iterator[str]:
    described = list(describe_settings())
    width = max(len(setting.variable) for setting in described)
    for setting, name in zip(described, Settings.model_fields, strict=True):
        value = getattr(settings, name)
        if value is None:  # The default where None is it, else what turns the setting off.
            value = setting.default if Settings.model_fields[name].default is None else "off"
        yield f"{setting.variable:<{width}}  {_shown(value)}"


def _shown(value: object) -> str:
    """The value as text, without its secrets."""
    match value:
        case SecretStr():
            return _MASK
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.15g}"
        case tuple():
            return ",".join(map(_shown, value)) or "none"
        case _:
            text = _USER_INFO.sub(lambda found: f"{found[1]}:{_MASK}@" if found[1] else f"{_MASK}@", str(value))
            return _PARAMETER.sub(rf"\1{_MASK}", text)
