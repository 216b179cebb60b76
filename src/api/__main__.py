"""The command line: ``stagecast``."""

import argparse
import errno
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from api import logs
from api.settings import Settings, SettingsError, describe_settings, load_settings

_OK: Final = 0
_WRONG_SETTINGS: Final = 2
_UNAVAILABLE: Final = 3


class Unavailable(Exception):
    """Something that the service needs of this machine cannot be had. Its text is one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 where settings are wrong, 3 where the port is taken."""
    parsed = _parser().parse_args(arguments)
    overrides = {name: value for name, value in vars(parsed).items() if name != "run" and value is not None}
    try:
        parsed.run(overrides)
    except SettingsError as error:
        print(f"stagecast: {error}", file=sys.stderr)
        return _WRONG_SETTINGS
    except Unavailable as error:
        print(f"stagecast: {error}", file=sys.stderr)
        return _UNAVAILABLE
    return _OK


def serve(overrides: Mapping[str, Any]) -> None:
    """``stagecast serve``: run the service until it is told to stop."""
    settings = load_settings(overrides)
    _make_folder(settings)
    listener = _listen(settings)
    if settings.port == 0:
        settings = load_settings({**overrides, "port": listener.getsockname()[1]})
    from api.app import create_server  # A second of imports, which --help and wrong settings do not wait for.

    logs.configure()
    server = create_server(settings, ready=lambda: print(_welcome(settings), flush=True))
    server.run(sockets=[listener])


def _make_folder(settings: Settings) -> None:
    try:
        settings.images.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise SettingsError("STAGECAST_IMAGES must be a folder that can be written.") from None
    if not os.access(settings.images, os.W_OK | os.X_OK):
        raise SettingsError("STAGECAST_IMAGES must be a folder that can be written.")


def _listen(settings: Settings) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Unavailable(f"port {settings.port} is taken; choose another with --port.") from None
        raise Unavailable(f"cannot listen on {settings.host} port {settings.port}: {error.strerror}.") from None


def _welcome(settings: Settings) -> str:
    reach = "anybody who reaches it" if settings.allow_open else "anybody on this machine"
    return (
        f"Stagecast is ready on {settings.public_url} (open mode: {reach} may act for any user; "
        f"editor: {settings.editor}, an offline preview; face swap: {settings.face_swap}, an offline preview)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stagecast",
        description="Live progress of AI image jobs on every device of a user, with nothing missed.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "serve",
        help="run the service",
        description="Run the service until SIGTERM (work is finished first) or SIGINT (at once).",
        epilog="Each setting is also an environment variable or a line in .env: --local-seconds is "
        "STAGECAST_LOCAL_SECONDS. Flags come before variables, variables before .env.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=100),
    )
    command.set_defaults(run=serve)
    for setting in describe_settings():
        text = f"{setting.description} Default: {setting.default}".replace("%", "%%")
        if setting.flag == "--allow-open":
            command.add_argument(setting.flag, action="store_const", const=True, help=text)
        else:
            command.add_argument(setting.flag, metavar="VALUE", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
