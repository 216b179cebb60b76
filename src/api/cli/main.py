"""The commands of ``stagecast``, and their arguments."""

import argparse
import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal, NoReturn
from urllib.parse import quote

from api import logs
from api.cli.client import Refused, Unavailable, connect, content_of
from api.loopback import is_loopback
from api.settings import Setting, Settings, SettingsError, describe_settings, load_settings
from domain.identity import InvalidUserId, user_id
from domain.ports.images import ImagesRefused
from domain.ports.storage import StorageRefused
from domain.stages import FLOWS

_EXIT_CODES: Final[dict[type[Exception], int]] = {
    Refused: 1, InvalidUserId: 2, SettingsError: 2, Unavailable: 3, StorageRefused: 3, ImagesRefused: 3
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: success; 1: the service refused, or the output cannot be written; 2: settings or arguments are not valid; 3: the
    port, a store or the service is not available; 130: interrupted; 141: the reader of the output has closed it.
    """
    try:
        try:
            given = vars(_parser().parse_args(arguments))
            given.pop("run")(**given)
        finally:
            print(end="", flush=True)
    except tuple(_EXIT_CODES) as error:
        print(f"stagecast: {error}", file=sys.stderr)
        return next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        _discard_output()
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        print(f"stagecast: {error.filename or 'the output'}: {error.strerror}.", file=sys.stderr)
        return 1
    return 0


def _discard_output() -> None:
    """Drop what cannot be written to standard output, or Python tries again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def serve(**overrides: Any) -> None:
    """Run the service until SIGTERM (running work is finished first) or SIGINT (immediately)."""
    settings = load_settings(overrides)
    _raise_descriptor_limit()
    _make_folder(settings)
    listeners = [_listen(settings.host, settings.port, "--port or STAGECAST_PORT")]
    if settings.metrics_address is not None:
        host, _, port = settings.metrics_address.rpartition(":")
        where = "--metrics-address or STAGECAST_METRICS_ADDRESS"
        listeners.append(_listen(host.strip("[]"), int(port), where))
        overrides["metrics_address"] = f"{host}:{listeners[1].getsockname()[1]}"
    settings = load_settings({**overrides, "port": listeners[0].getsockname()[1]})
    announced = (settings.node_address or "localhost:").rpartition(":")[0].strip("[]")
    if is_loopback(listeners[0].getsockname()[0]) and not is_loopback(announced):
        raise SettingsError(
            "STAGECAST_NODE_ADDRESS must be a loopback address where STAGECAST_HOST is one: nobody else reaches it."
        )
    # These imports take a second: --help and errors in settings do not wait for them.
    from api.app import create_server
    from api.wiring import collect_less, run, wire

    logs.configure(settings.log_level, as_json=settings.log_format == "json")

    def ready() -> None:
        collect_less()
        try:
            print(welcome(settings), flush=True)
        except OSError:  # The service works without it.
            _discard_output()

    async def serve() -> None:
        await create_server(await wire(settings), ready).serve(sockets=listeners)

    run(serve)


def demo(folder: Path, **overrides: Any) -> None:
    """Run one edit of sample pictures on a service of its own, and store the result in a folder.

    The client uses HTTP and Socket.IO. Nothing leaves this machine unless another editor or face swap is chosen.
    """
    from api.cli.demo import demo_settings, run

    settings = demo_settings(overrides)
    with _listen(settings.host, settings.port, "--port") as listener:
        run(settings, listener, folder)


def check(**overrides: Any) -> None:
    """Validate the settings and every store, print the settings in effect, and list what is damaged.

    Secrets are masked. Nothing is changed; a service may be running. Exit code 0: no damage; 1: damage was found; 2: a
    setting is not valid; 3: a store cannot be opened.
    """
    settings = load_settings(overrides)
    from api.cli.check import run

    run(settings)


def migrate(print_only: bool, **overrides: Any) -> None:
    """Bring the schema of the log in PostgreSQL to the version of this Stagecast.

    The service does so itself when it starts, unless its role may not.
    """
    settings = load_settings(overrides)
    if not settings.log.startswith("postgresql://"):
        raise SettingsError("STAGECAST_LOG must be a postgresql:// URL: other logs are migrated when they are opened.")
    from api.wiring import migrate

    print(migrate(settings, only_print=print_only), end="" if print_only else "\n")


def _raise_descriptor_limit() -> None:
    """Raise the soft limit of open files and connections to the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS allows less than it reports.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _make_folder(settings: Settings) -> None:
    if "://" in settings.images:
        return
    folder = Path(settings.images)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK) or not folder.is_dir():
        raise SettingsError("STAGECAST_IMAGES must be a folder that can be read and written.")


def _listen(host: str, port: int, setting: str) -> socket.socket:
    """Listen. `setting`: with what another port is chosen. Raises `Unavailable`."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Unavailable(f"port {port} is taken; choose another with {setting}.") from None
        raise Unavailable(f"cannot listen on {host} port {port}: {error.strerror}.") from None


def welcome(settings: Settings) -> str:
    """What is printed once the service is ready."""
    who = "anybody who reaches it" if settings.allow_open else "anybody on this machine"
    reach = f"open mode: {who} may act for any user" if settings.open_mode else "by token"
    editor, face_swap = (
        "local, an offline preview" if name == "local" else name for name in (settings.editor, settings.face_swap)
    )
    return f"Stagecast is ready on {settings.public_url} ({reach}; editor: {editor}; face swap: {face_swap})"


def token(userId: str, service: bool, ttl: float, **overrides: Any) -> None:  # noqa: N803 (as --help shows it)
    """Print a JWT for a user, signed with STAGECAST_JWT_SECRET."""
    settings = load_settings(overrides)
    if settings.jwt_secret is None:
        raise SettingsError("STAGECAST_JWT_SECRET must be set: tokens are made with it.")
    from api.wiring import issue_token

    try:
        print(issue_token(settings, userId, service=service, ttl=timedelta(seconds=ttl)))
    except (ValueError, OverflowError):
        raise SettingsError("--ttl must be a number of seconds over 0, and not thousands of years.") from None


def credit(userId: str, amount: int, **remote: Any) -> None:  # noqa: N803
    """Change a user's balance on a running service and print it. It does not fall below 0."""
    path = f"/users/{_segment(user_id(userId))}/credit"
    with connect(remote) as http:
        account = content_of(http.post(path, json={"amount": amount}))
        print(f"{account['userId']}: {account['credit']}")


def list_(user: str | None, kind: str | None, status: str | None, limit: int, as_json: bool, **remote: Any) -> None:
    """Print generations of a running service, newest first: of all users with a service token, else your own."""
    from api.cli.display import event_line

    given = {"user": user, "kind": kind, "status": status, "limit": limit}
    given = {name: value for name, value in given.items() if value is not None}
    with connect(remote, user=user) as http:
        response = http.get("/admin/generations", params=given)
        if response.status_code == 403:
            response = http.get("/generations", params=given)
        for each in content_of(response)["generations"]:
            if kind in (None, each["kind"]):  # A user's own are not filtered by the service.
                beginning = f"{each['createdAt']}  {each['generationId']}  {each['userId']}  "
                print(json.dumps(each) if as_json else event_line(each, beginning))


def cancel(generationId: str, user: str | None, **remote: Any) -> None:  # noqa: N803
    """End a generation on a running service, unless it has ended, and refund its credit."""
    segment, owner = _segment(generationId), list[tuple[bytes, bytes]]()
    with connect(remote, user=user) as http:
        if user is None:
            with contextlib.suppress(Refused):  # Only a service has to find the owner.
                page = content_of(http.get(f"/admin/generations?id={segment}"))
                owner = [(b"X-User-Id", each["userId"].encode()) for each in page["generations"]]
        print(content_of(http.post(f"/generations/{segment}/cancel", headers=owner))["outcome"])


def replay(generationId: str, user: str | None, as_json: bool, **remote: Any) -> None:  # noqa: N803
    """Print the events of a generation from a running service."""
    from api.cli.display import event_line

    with connect(remote, user=user) as http:
        for item in content_of(http.get(f"/generations/{_segment(generationId)}/events"))["events"]:
            print(json.dumps(item) if as_json else event_line(item["data"], f"{item['data']['occurredAt']}  "))


def watch(generationId: str | None, user: str | None, **remote: Any) -> None:  # noqa: N803
    """Show the progress of a generation on a running service until it has ended.

    Without an id, show that of all of a user's generations, until interrupted. Exit code 1: the generation failed.
    """
    from api.cli.watch import run

    with connect(remote, user=user) as http:
        run(http, "" if generationId is None else f"/generations/{_segment(generationId)}")


def _segment(text: str) -> str:
    """Any text as one segment of a path. Dots are quoted too: clients resolve ``..``."""
    return quote(text, safe="", errors="replace").replace(".", "%2E")


class _Parser(argparse.ArgumentParser):
    """Never repeats a value in an error: it may be a secret in the wrong place."""

    def print_help(self, file: Any = None) -> None:
        """Unlike argparse's, fails if the output cannot be written, however long the help is."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        known, _, unknown = message.partition(": ")
        if known == "unrecognized arguments":
            flags = [word.partition("=")[0] for word in unknown.split() if word.startswith("--")]
            message = f"{known}: {' '.join(flags)}"
        super().error(re.sub(r":? (['\"]).*?\1(?= \(choose|$)", "", message, flags=re.DOTALL))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stagecast",
        description="Live progress of AI image jobs on every device of a user, with nothing missed.",
        epilog="Run a command with --help for its options.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"stagecast {metadata.version('stagecast')}")
    settings = list(describe_settings())
    width = min(shutil.get_terminal_size().columns, 100)
    formatter: Any = partial(argparse.HelpFormatter, max_help_position=28, width=width)
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(
        run: Callable[..., None], text: str, shown: Iterable[Setting] = (), remote: Literal["owner", "service", ""] = ""
    ) -> argparse.ArgumentParser:
        """Add a command, described by the docstring of its function, with flags for these settings.

        `remote`: with whose token it calls a service, if it calls one.
        """
        command: argparse.ArgumentParser = commands.add_parser(
            run.__name__.rstrip("_"), help=text, description=run.__doc__, allow_abbrev=False, formatter_class=formatter
        )
        command.set_defaults(run=run)
        _add_settings(command, shown)
        if remote:
            _add_remote(command, of_owner=remote == "owner")
        return command

    command = add(serve, "run the service", settings)
    command.epilog = (
        "Each setting is also an environment variable or a line in .env: --local-seconds is STAGECAST_LOCAL_SECONDS. "
        "Flags come before variables, variables before .env. An empty value counts as not set. These have no flag: "
        f"{', '.join(setting.variable for setting in settings if setting.flag is None)}."
    )

    own = {"--port": "any free one", "--editor": "local", "--face-swap": "local"}
    shown = [setting for setting in settings if setting.flag in {*own, "--local-seconds"}]
    shown = [setting._replace(default=own.get(setting.flag or "", setting.default)) for setting in shown]
    argument = add(demo, "run one edit and watch it", shown).add_argument
    argument("--folder", type=Path, default="var/demo", metavar="PATH", help="where the pictures are stored (var/demo)")

    add(check, "validate the settings and the stores", settings)

    shown = [setting for setting in settings if setting.variable == "STAGECAST_LOG"]
    argument = add(migrate, "migrate the schema of the log in PostgreSQL", shown).add_argument
    text = "print the SQL that does it, for another role to run, and change nothing"
    argument("--print", action="store_true", dest="print_only", help=text)

    shown = [setting for setting in settings if setting.variable.startswith("STAGECAST_JWT_")]
    argument = add(token, "make a token for a user", shown).add_argument
    argument("userId", help="the user that the token is for")
    argument("--service", action="store_true", help="the token may act for any user (scope stagecast:service)")
    argument("--ttl", type=float, default=3600, metavar="SECONDS", help="seconds until the token expires (3600)")

    argument = add(credit, "change a user's balance", remote="service").add_argument
    argument("userId", help="the user")
    argument("amount", type=int, help="the credits to add; a negative number takes them away")

    argument = add(list_, "print generations", remote="service").add_argument
    argument("--user", metavar="ID", help="only those of this user")
    argument("--kind", choices=tuple(FLOWS), help="only those of this kind")
    statuses = "only those that are active or finished; with a service token also those at this status"
    argument("--status", metavar="STATUS", help=statuses)
    argument("--limit", type=int, default=20, metavar="NUMBER", help="at most so many, up to 100 (20)")
    argument("--json", action="store_true", dest="as_json", help="one JSON object per line")

    add(cancel, "end a generation", remote="owner").add_argument("generationId", help="the generation")

    argument = add(replay, "print the events of a generation", remote="owner").add_argument
    argument("generationId", help="the generation")
    argument("--json", action="store_true", dest="as_json", help="one JSON object per line")

    argument = add(watch, "show live progress", remote="owner").add_argument
    argument("generationId", nargs="?", help="the generation; default: all")
    return parser


def _add_settings(command: argparse.ArgumentParser, settings: Iterable[Setting]) -> None:
    for topic, group in groupby(settings, key=lambda setting: setting.topic):
        arguments = command.add_argument_group(topic)
        for setting in group:
            if setting.flag is None:
                continue
            text = f"{setting.description} Default: {setting.default}".replace("%", "%%")
            value: Any = {"metavar": setting.placeholder} if setting.placeholder else {"action": "store_true"}
            # A flag that is not given has no attribute, so that the environment decides.
            arguments.add_argument(setting.flag, **value, default=argparse.SUPPRESS, help=text)


def _add_remote(command: argparse.ArgumentParser, *, of_owner: bool) -> None:
    """Add the options of a command that calls a service; `of_owner`: it may be called with a token of the owner."""
    if of_owner:
        text = "the owner: in open mode (default: demo), or with a service token"
        command.add_argument("--user", metavar="ID", help=text)
    arguments = command.add_argument_group("Service")
    where = "the address of the service; default: STAGECAST_URL, else http://localhost and STAGECAST_PORT"
    arguments.add_argument("--url", metavar="URL", default=argparse.SUPPRESS, help=where)
    token = "a token of the owner, or a service token" if of_owner else "a service token"
    text = f"{token}; not needed in open mode; default: STAGECAST_TOKEN"
    arguments.add_argument("--token", metavar="JWT", default=argparse.SUPPRESS, help=text)
