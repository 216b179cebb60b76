"""The commands beside ``serve``, as an operator meets them: what they print, and their exit codes.

Each command, and each way to end, is seen in a process of its own; what differs in its arguments alone, in this one.
"""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

import jwt
import pytest
import pytest_asyncio
from aiohttp import web

from api.settings import describe_settings
from domain.errors import Failure
from support.command_line import COMMANDS, MODULE, SERVE, Run, other_server, run_main, stagecast
from support.documents import ROOT
from support.doubles import ScriptedEditor, raises
from support.guarded import MISSING, SECRET, SERVICE, ask, guarded, token
from support.harness import JSON, Running, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: Only its length is wrong.
TOO_SHORT: Final = "hunter2-" * 3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with guarded(tmp_path_factory.mktemp("images")) as service:
        yield service


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("images")) as service:
        yield service


@pytest.fixture
def nowhere() -> Iterator[str]:
    """Where nobody listens. The port is kept, so that no other process comes to listen there."""
    with socket.socket() as kept:
        kept.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{kept.getsockname()[1]}"


# --- help ------------------------------------------------------------------------------------------------


async def test_help_lists_every_command() -> None:
    done = await stagecast("--help")
    assert (done.code, done.errors) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^ +{command}  +\S", done.output, re.MULTILINE), command


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("serve", ["--port", "--host", "--jwks-url", "--credits", "--allow-open"]),
        (
            "token",
            [
                "userId",
                "--service",
                "--ttl",
                *(f"--jwt-{name}" for name in ("audience", "issuer", "user-claim")),
            ],
        ),
        ("credit", ["userId", "amount", "--url", "--token"]),
        ("replay", ["generationId", "--url", "--user", "--token"]),
    ],
)
async def test_help_of_a_command_describes_each_argument(command: str, arguments: list[str]) -> None:
    done = await run_main(command, "--help")
    assert (done.code, done.errors) == (0, "")
    assert done.output.startswith(f"usage: stagecast {command} ")
    for argument in arguments:
        # Its name, its value if it takes one, and words, on this line or on the next.
        assert re.search(rf"^  {argument}( [A-Z]+)?\s+\w+", done.output, re.MULTILINE), argument


async def test_the_settings_page_names_the_commands_that_call_a_service() -> None:
    commands = re.findall(r"^    ([a-z]+) ", (await run_main("--help")).output, re.MULTILINE)
    calling = {name for name in commands if "--url URL" in (await run_main(name, "--help")).output}
    sentence = (ROOT / "docs/settings.md").read_text().partition(" call a running service.")[0].rpartition("\n\n")[2]
    assert set(re.findall("`(?:stagecast )?([a-z]+)`", sentence)) == calling


async def test_help_of_list_says_which_statuses_need_a_service_token() -> None:
    text = " ".join((await run_main("list", "--help")).output.split())
    assert "only those that are active or finished; with a service token also those at this status" in text


async def test_help_shows_defaults_and_no_configured_values() -> None:
    done = await run_main("token", "--help", STAGECAST_JWT_SECRET=SECRET, STAGECAST_JWT_AUDIENCE="somebody")
    assert SECRET not in done.output
    assert "somebody" not in done.output
    assert "3600" in done.output


async def test_help_of_the_demo_shows_its_own_defaults() -> None:
    done = await run_main("demo", "--help")
    assert done.output.count("Default: local") == 2
    assert "OPENAI_API_KEY" not in done.output


async def test_help_of_serve_is_grouped_by_topic_and_names_the_secrets() -> None:
    done = await run_main("serve", "--help")
    topics = re.findall(r"^([A-Z][a-z ]+):$", done.output, re.MULTILINE)
    assert topics == list(dict.fromkeys(setting.topic for setting in describe_settings()))
    for argument in ("--port PORT", "--drain SECONDS", "--webhook-url URL", "--images PATH"):
        assert re.search(rf"^  {argument}  ", done.output, re.MULTILINE), argument
    for secret in ("STAGECAST_JWT_SECRET", "STAGECAST_WEBHOOK_SECRET", "OPENAI_API_KEY", "REPLICATE_API_TOKEN"):
        assert secret in done.output


async def test_the_version_is_printed() -> None:
    assert await stagecast("--version") == (0, f"stagecast {metadata.version('stagecast')}\n", "")


@pytest.mark.parametrize("arguments", [("token", "--help"), ("token", "ada"), ()])
async def test_the_module_can_be_run_as_the_command(arguments: tuple[str, ...]) -> None:
    assert await stagecast(*arguments, program=MODULE) == await stagecast(*arguments) == await run_main(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("token",),
        ("token", "ada", "--ttl", "soon"),
        ("credit", "ada"),
        ("credit", "ada", "1.5"),
        ("replay", MISSING, "--nonsense"),
    ],
)
async def test_wrong_arguments_end_with_2_and_the_usage(arguments: tuple[str, ...]) -> None:
    done = await run_main(*arguments, STAGECAST_JWT_SECRET=SECRET)
    assert (done.code, done.output) == (2, "")
    assert done.errors.startswith("usage: stagecast ")
    assert SECRET not in done.errors


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        (("hunter2",), "argument command: invalid choice (choose from"),
        (("--token", "hunter2", "credit", "ada", "1"), "argument command: invalid choice (choose from"),
        (("credit", "ada", "hunter2"), "argument amount: invalid int value\n"),
        (("credit", "ada", 'it\'s "hunter2"'), "argument amount: invalid int value\n"),
        (("token", "ada", "--ttl", "hunter2"), "argument --ttl: invalid float value\n"),
        (("serve", "--allow-open=hunter2"), "argument --allow-open: ignored explicit argument\n"),
        (("credit", "ada", "1", "--tok=hunter2"), "unrecognized arguments: --tok\n"),
    ],
)
async def test_an_invalid_argument_is_not_printed(arguments: tuple[str, ...], sent: str) -> None:
    done = await run_main(*arguments)
    assert done.code == 2
    assert sent in done.errors
    assert "hunter2" not in done.errors


# --- token -----------------------------------------------------------------------------------------------


async def test_a_token_is_printed_on_one_line_and_accepted_by_the_service(service: Running) -> None:
    done = await stagecast("token", "ada", STAGECAST_JWT_SECRET=SECRET)
    assert (done.code, done.errors) == (0, "")
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", done.output)
    claims = jwt.decode(done.output.strip(), SECRET, ["HS256"])
    assert set(claims) == {"sub", "iat", "exp"}
    assert claims["sub"] == "ada"
    assert 3600 <= claims["exp"] - claims["iat"] <= 3601
    assert (await ask(service, done.output.strip())).json() == {"userId": "ada", "credit": 100}
    refused = await ask(service, done.output.strip(), headers={"X-User-Id": "ada"})
    assert refused.json()["code"] == "forbidden"


async def test_a_service_token_acts_for_any_user(service: Running) -> None:
    done = await run_main("token", "backend", "--service", "--ttl", "60", STAGECAST_JWT_SECRET=SECRET)
    claims = jwt.decode(done.output.strip(), SECRET, ["HS256"])
    assert claims["scope"] == "stagecast:service"
    assert 60 <= claims["exp"] - claims["iat"] <= 61
    answer = await ask(service, done.output.strip(), headers={"X-User-Id": "ada"})
    assert answer.json()["userId"] == "ada"


async def test_a_token_expires_after_its_ttl(service: Running) -> None:
    bearer = (await run_main("token", "ada", "--ttl", "0.1", STAGECAST_JWT_SECRET=SECRET)).output.strip()
    async with asyncio.timeout(20):
        while (answer := await ask(service, bearer)).status_code == 200:
            await asyncio.sleep(0.05)
    assert answer.json()["code"] == "token_expired"


@pytest.mark.parametrize("user", ["123", "Zoë 😀", "a/b", "x" * 128])
async def test_a_token_can_be_issued_for_any_user_id(service: Running, user: str) -> None:
    done = await run_main("token", user, STAGECAST_JWT_SECRET=SECRET)
    assert (await ask(service, done.output.strip())).json()["userId"] == user


async def test_a_token_follows_the_settings_of_the_service(tmp_path: Path) -> None:
    settings = {"jwt_audience": "stagecast", "jwt_issuer": "us", "jwt_user_claim": "uid"}
    backend = token("", uid="backend", aud="stagecast", iss="us", scope="stagecast:service")
    variables: JSON = {f"STAGECAST_{name.upper()}": value for name, value in settings.items()}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    async with guarded(tmp_path / "images", backend, **settings) as service:
        for done in (
            await run_main("token", "ada", STAGECAST_JWT_SECRET=SECRET, **variables),
            await run_main("token", "ada", *flags, STAGECAST_JWT_SECRET=SECRET),
        ):
            assert (await ask(service, done.output.strip())).json()["userId"] == "ada"
        other = await run_main("token", "ada", STAGECAST_JWT_SECRET=SECRET)
        assert (await ask(service, other.output.strip())).json()["code"] == "invalid_token"


async def test_the_secret_can_be_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"STAGECAST_JWT_SECRET={SECRET}\n")
    done = await run_main("token", "ada", folder=tmp_path)
    assert jwt.decode(done.output.strip(), SECRET, ["HS256"])["sub"] == "ada"


async def test_without_a_secret_no_token_is_issued() -> None:
    assert "STAGECAST_JWT_SECRET" in (await run_main("token", "ada")).sentence(2)
    published = await run_main("token", "ada", STAGECAST_JWKS_URL="https://login.example/keys")
    assert "STAGECAST_JWT_SECRET" in published.sentence(2)


@pytest.mark.parametrize("user", ["", "x" * 129, "a\nb", b"\xff"])
async def test_a_token_is_not_issued_for_an_invalid_user_id(user: str | bytes) -> None:
    assert "user id" in (await run_main("token", user, STAGECAST_JWT_SECRET=SECRET)).sentence(2)


@pytest.mark.parametrize(
    "ttl",
    ["0", "-1", "nan", "1e12", "inf", "-inf", "1e20"],
)
async def test_a_token_ttl_must_be_positive_and_bounded(ttl: str) -> None:
    done = await run_main("token", "ada", f"--ttl={ttl}", STAGECAST_JWT_SECRET=SECRET)
    assert "--ttl" in done.sentence(2)


@pytest.mark.parametrize("command", [SERVE, ("token", "ada")], ids=["serve", "token"])
class TestInvalidSecret:
    """Is refused, and never repeated."""

    async def test_a_short_secret_is_refused(self, command: tuple[str, ...], tmp_path: Path) -> None:
        (tmp_path / ".env").write_text(f"STAGECAST_JWT_SECRET={TOO_SHORT}\n")
        for done in (
            await run_main(*command, folder=tmp_path),
            await run_main(*command, STAGECAST_JWT_SECRET=TOO_SHORT),
        ):
            assert "STAGECAST_JWT_SECRET must be a secret of at least 32 bytes." in done.sentence(2)
            assert "hunter2" not in done.errors

    async def test_a_secret_besides_published_keys_is_refused(self, command: tuple[str, ...]) -> None:
        both: JSON = {"STAGECAST_JWT_SECRET": SECRET, "STAGECAST_JWKS_URL": "https://login.example/keys"}
        done = await run_main(*command, **both)
        assert "STAGECAST_JWKS_URL" in done.sentence(2)
        assert SECRET not in done.errors

    async def test_a_misspelt_variable_is_refused(self, command: tuple[str, ...], tmp_path: Path) -> None:
        (tmp_path / ".env").write_text(f"STAGECAST_JWT_SECRTE={SECRET}\n")
        for done in (
            await run_main(*command, STAGECAST_JWT_SECRTE=SECRET),
            await run_main(*command, folder=tmp_path),
        ):
            assert "STAGECAST_JWT_SECRTE is not a setting; did you mean STAGECAST_JWT_SECRET?" in done.sentence(2)
            assert SECRET not in done.errors

    @pytest.mark.parametrize("flag", ["--jwt-secret", "--jwt_secret", "--jwt", "--webhook-secret", "--openai-api-key"])
    async def test_a_secret_given_by_flag_is_refused(self, command: tuple[str, ...], flag: str) -> None:
        for given in ([f"{flag}={SECRET}"], [flag, SECRET], [flag, f"-{SECRET}"]):
            done = await run_main(*command, *given)
            assert done.code == 2
            assert f"unrecognized arguments: {flag}" in done.errors
            assert SECRET not in done.errors


@pytest.mark.parametrize(("run", "command"), [(stagecast, ("serve", "--port", "0")), (run_main, ("token", "ada"))])
async def test_a_public_key_is_refused_as_secret_and_not_printed(
    run: Run, command: tuple[str, ...], tmp_path: Path
) -> None:
    pem = f"-----BEGIN PUBLIC KEY-----\n{'A' * 64}\n-----END PUBLIC KEY-----"
    done = await run(*command, folder=tmp_path, STAGECAST_JWT_SECRET=pem)
    assert "STAGECAST_JWT_SECRET" in done.sentence(2)
    assert "AAAA" not in done.errors


# --- credit ----------------------------------------------------------------------------------------------


async def test_credit_is_granted_and_the_balance_printed(service: Running, eve: str) -> None:
    for run, amount, left in ((stagecast, "5", 105), (run_main, "-30", 75), (run_main, "-1000", 0)):
        done = await run("credit", eve, amount, "--url", service.url, "--token", SERVICE)
        assert done == (0, f"{eve}: {left}\n", "")
    assert (await service.get("/me", eve))["credit"] == 0


@pytest.mark.parametrize("user", ["a/b", "x/credit", "%2F", "a?b#c", "-", "..", "."])
async def test_credit_can_be_granted_to_any_user(opened: Running, user: str) -> None:
    assert await run_main("credit", "--url", opened.url, user, "1") == (0, f"{user}: 101\n", "")


async def test_credit_can_be_granted_to_user_ids_of_any_characters(opened: Running) -> None:
    assert await stagecast("credit", "--url", opened.url, "Zoë 😀", "1") == (0, "Zoë 😀: 101\n", "")
    assert await run_main("credit", "--url", opened.url, "Zoë 😀", "1") == (0, "Zoë 😀: 102\n", "")


async def test_the_address_may_end_in_a_slash(opened: Running, eve: str) -> None:
    assert await run_main("credit", eve, "1", "--url", f"{opened.url}/") == (0, f"{eve}: 101\n", "")


@pytest.mark.parametrize("bearer", [None, "nonsense", token("eve"), token("eve", exp=1)])
async def test_without_a_service_token_it_is_refused_with_1(service: Running, bearer: str | None) -> None:
    given = [] if bearer is None else ["--token", bearer]
    run = stagecast if bearer == "nonsense" else run_main
    refused = (await run("credit", "eve", "5", "--url", service.url, *given)).sentence(1)
    assert bearer is None or bearer not in refused
    assert (await service.get("/me", "eve"))["credit"] == 100


async def test_a_refusal_by_the_service_is_printed_with_its_detail(opened: Running, tmp_path: Path) -> None:
    assert "amount" in (await run_main("credit", "eve", "10000000000", "--url", opened.url)).sentence(1)
    async with running(tmp_path / "other", credits=None) as service:
        assert "balances" in (await run_main("credit", "eve", "1", "--url", service.url)).sentence(1)


async def test_a_user_id_that_is_not_utf_8_is_refused(opened: Running) -> None:
    for run, user in ((stagecast, b"\xff"), (run_main, b"\xff"), (run_main, "x" * 129), (run_main, "")):
        assert "user id" in (await run("credit", user, "1", "--url", opened.url)).sentence(2)


# --- replay ----------------------------------------------------------------------------------------------


async def finished(service: Running, user: str) -> str:
    generation_id = await service.start(user)
    await service.service.leases.drain()
    return generation_id


async def test_replay_prints_one_line_for_each_event(service: Running, eve: str) -> None:
    generation_id = await finished(service, eve)
    done = await stagecast("replay", generation_id, "--url", service.url, "--token", token(eve))
    assert (done.code, done.errors) == (0, "")
    lines = done.output.splitlines()
    events = await service.events(generation_id, eve)
    assert len(lines) == len(events) == 6
    for line, event in zip(lines, events, strict=True):
        for word in (event["occurredAt"], f"{event['progress']} %", event["status"], event["message"]):
            assert word in line


async def test_replay_prints_why_a_generation_failed(tmp_path: Path) -> None:
    overrides = {"editor": ScriptedEditor(raises(Failure("provider_rejected")))}
    async with running(tmp_path, overrides=overrides) as service:
        generation_id = await finished(service, "ada")
        done = await run_main("replay", generation_id, "--url", service.url, "--user", "ada")
        assert done.code == 0
        assert "The image service declined this request. (provider_rejected)" in done.output.splitlines()[-1]


async def test_a_service_token_replays_for_its_user(service: Running, eve: str) -> None:
    generation_id = await finished(service, eve)
    asked = ["replay", generation_id, "--url", service.url, "--token"]
    assert len((await run_main(*asked, SERVICE, "--user", eve)).output.splitlines()) == 6
    (await run_main(*asked, SERVICE)).sentence(1)
    (await run_main(*asked, token(eve), "--user", eve)).sentence(1)


async def test_replay_of_another_users_generation_looks_like_a_missing_one(service: Running, eve: str) -> None:
    generation_id = await finished(service, eve)
    rest = ["--url", service.url, "--token", token("bob")]
    missing = await run_main("replay", MISSING, *rest)
    assert "There is no such generation." in missing.sentence(1)
    assert await run_main("replay", generation_id, *rest) == missing
    (await run_main("replay", "../../me", *rest)).sentence(1)


async def test_replay_without_a_token_is_refused(service: Running) -> None:
    assert "token" in (await run_main("replay", MISSING, "--url", service.url)).sentence(1)


async def test_in_open_mode_the_user_is_demo_unless_named(opened: Running) -> None:
    generation_id = await finished(opened, "demo")
    assert (await run_main("replay", generation_id, "--url", opened.url)).code == 0
    assert (await run_main("replay", generation_id, "--url", opened.url, "--user", "ada")).code == 1


async def test_replay_for_any_user(opened: Running) -> None:
    done = await run_main("replay", MISSING, "--url", opened.url, "--user", "Zoë")
    assert "There is no such generation." in done.sentence(1)


# --- which service ---------------------------------------------------------------------------------------


async def test_commands_read_the_service_url_from_variables(service: Running, eve: str) -> None:
    variables: JSON = {"STAGECAST_URL": service.url, "STAGECAST_TOKEN": SERVICE}
    assert await stagecast("credit", eve, "1", **variables) == (0, f"{eve}: 101\n", "")
    generation_id = await finished(service, eve)
    assert (await run_main("replay", generation_id, "--user", eve, **variables)).code == 0


async def test_a_service_is_found_by_its_port(opened: Running, eve: str) -> None:
    unset: JSON = {"STAGECAST_URL": "", "STAGECAST_TOKEN": ""}
    for empty in ({}, unset):
        done = await run_main("credit", eve, "0", STAGECAST_PORT=str(opened.port), **empty)
        assert done == (0, f"{eve}: 100\n", "")
    done = await run_main("credit", eve, "0", "--url", "", "--token", "", STAGECAST_PORT=str(opened.port))
    assert done == (0, f"{eve}: 100\n", "")


async def test_flags_override_variables_which_override_the_file(
    service: Running, eve: str, nowhere: str, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(f"STAGECAST_URL={nowhere}\nSTAGECAST_TOKEN={SERVICE}\nSTAGECAST_CREDITS=7\n")
    assert nowhere in (await run_main("credit", eve, "1", folder=tmp_path)).sentence(3)
    done = await run_main("credit", eve, "1", folder=tmp_path, STAGECAST_URL=service.url)
    assert done == (0, f"{eve}: 101\n", "")
    flags = ["--url", service.url, "--token", SERVICE]
    done = await run_main("credit", eve, "1", *flags, STAGECAST_URL=nowhere, STAGECAST_TOKEN="nonsense")
    assert done == (0, f"{eve}: 102\n", "")


async def test_other_commands_ignore_the_service_and_its_token(tmp_path: Path) -> None:
    variables: JSON = {"STAGECAST_URL": "nonsense", "STAGECAST_TOKEN": "x"}
    (tmp_path / ".env").write_text("STAGECAST_URL=nonsense\nSTAGECAST_TOKEN=x\n")
    for given in (variables, {}):
        assert (await run_main("token", "ada", folder=tmp_path, STAGECAST_JWT_SECRET=SECRET, **given)).code == 0
        assert "STAGECAST_IMAGES" in (await run_main(*SERVE, folder=tmp_path, **given)).sentence(2)


async def test_every_command_refuses_an_invalid_or_unknown_setting(eve: str, tmp_path: Path) -> None:
    for command in (("credit", eve, "1"), ("replay", MISSING)):
        (tmp_path / ".env").write_text("STAGECAST_URL\n")
        assert "STAGECAST_URL must be" in (await run_main(*command, folder=tmp_path)).sentence(2)
        assert "STAGECAST_PORT must be" in (await run_main(*command, STAGECAST_PORT="many")).sentence(2)
        assert "did you mean STAGECAST_URL?" in (await run_main(*command, STAGECAST_URLS="x")).sentence(2)


@pytest.mark.parametrize("given", ["hunter2\r", "hunter2\nhunter2", "hunter2 hunter2", "hünter2"])
async def test_a_token_that_is_no_valid_header_is_refused_and_not_printed(
    service: Running, eve: str, given: str
) -> None:
    for done in (
        await run_main("credit", eve, "1", STAGECAST_URL=service.url, STAGECAST_TOKEN=given),
        await run_main("credit", eve, "1", "--url", service.url, "--token", given),
    ):
        assert "STAGECAST_TOKEN must be a token" in done.sentence(2)
        assert "nter2" not in done.errors


async def test_the_token_is_sent_even_if_the_url_has_a_password(service: Running, eve: str) -> None:
    url = service.url.replace("://", "://ada:hunter2@")
    assert await run_main("credit", eve, "1", "--url", url, "--token", SERVICE) == (0, f"{eve}: 101\n", "")


@pytest.mark.parametrize(
    "given",
    [
        "http://ada:hunter2@127.0.0.1:1",
        "http://ada:hunt/er2@127.0.0.1:1",
        "http://hunter2@127.0.0.1:1",
        "http://ada:p@hunter2@127.0.0.1:1",
        "http://ada:hunter2@127.0.0.1:1/\n@",
    ],
)
async def test_passwords_in_urls_are_masked(given: str) -> None:
    done = await run_main("credit", "eve", "1", "--url", given)
    assert "hunt" not in done.sentence(3)
    assert "***@" in done.errors


@pytest.mark.parametrize(
    "given",
    ["localhost:4200", "nonsense", "ftp://localhost", "http://[::1", "ada:hunter2@127.0.0.1:1", "http:/hunter2@h"],
)
async def test_a_url_without_http_or_https_is_refused(given: str) -> None:
    for done in (
        await run_main("list", STAGECAST_URL=given),
        await run_main("replay", MISSING, "--url", given),
    ):
        assert "STAGECAST_URL must be an http or https URL." in done.sentence(2)
        assert given not in done.errors


async def test_the_query_of_a_url_is_in_no_message() -> None:
    done = await run_main("list", "--url", "http://127.0.0.1:9/?token=hunter2#hunter2", STAGECAST_TOKEN="t")
    assert "hunter2" not in done.sentence(3)


@pytest.mark.parametrize("command", [("credit", "eve", "5"), ("replay", MISSING)], ids=["credit", "replay"])
class TestServiceUnreachable:
    """Ends with 3, and one sentence."""

    async def test_an_unreachable_address_is_reported(self, command: tuple[str, ...], nowhere: str) -> None:
        assert nowhere in (await stagecast(*command, "--url", nowhere, "--token", SERVICE)).sentence(3)

    @pytest.mark.parametrize("answer", ["hello", "[]", "{}", '{"events": [{}]}'])
    async def test_a_server_that_is_not_stagecast_is_reported(self, command: tuple[str, ...], answer: str) -> None:
        async def serve(_: web.Request) -> web.Response:
            return web.Response(text=answer, content_type="application/json")

        async with other_server(serve) as url:
            (await run_main(*command, "--url", url)).sentence(3)


async def test_the_token_is_sent_to_no_proxy_and_no_redirect_target(service: Running, nowhere: str, eve: str) -> None:
    """Neither the environment's proxy nor a redirect gets it."""
    done = await stagecast(
        "credit", eve, "1", "--url", service.url, "--token", SERVICE, HTTP_PROXY=nowhere, ALL_PROXY=nowhere
    )
    assert done == (0, f"{eve}: 101\n", "")
    heard = []

    async def redirect(request: web.Request) -> web.Response:
        heard.append(request.path)
        return web.Response(status=307, headers={"Location": f"{service.url}{request.path}"})

    async with other_server(redirect) as other:
        (await run_main("credit", eve, "1", "--url", other, "--token", SERVICE)).sentence(3)
    assert heard == [f"/users/{eve}/credit"]
    assert (await service.get("/me", eve))["credit"] == 101
