"""Settings: where they come from, and how a wrong one is refused."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from api.settings import Settings, SettingsError, describe_settings, load_settings


@pytest.fixture(autouse=True)
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No `.env`, and none of our variables."""
    monkeypatch.chdir(tmp_path)
    for setting in describe_settings():
        monkeypatch.delenv(setting.variable, raising=False)
    return tmp_path


def refusal(**overrides: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(overrides)
    assert caught.value.__cause__ is None
    return str(caught.value)


def test_the_defaults_match_the_contract() -> None:
    settings = load_settings({})
    assert (settings.host, settings.port, settings.public_url) == ("127.0.0.1", 3000, "http://localhost:3000")
    assert (settings.log, settings.images, settings.credits) == ("memory://", "./var/images", 100)
    assert (settings.retention, settings.deadline, settings.drain, settings.local_seconds) == (86400, 600, 25, 3)
    assert (settings.max_running, settings.max_per_user, settings.max_waiting) == (8, 20, 200)
    assert (settings.cors_origins, settings.allowed_hosts, settings.allow_open) == ((), (), False)


def test_flags_override_the_environment_which_overrides_the_file(
    empty_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_place / ".env").write_text("STAGECAST_PORT=1\nSTAGECAST_CREDITS=1\nSTAGECAST_DRAIN=1\nOPENAI_API_KEY=x\n")
    monkeypatch.setenv("STAGECAST_PORT", "2")
    monkeypatch.setenv("STAGECAST_CREDITS", "2")
    settings = load_settings({"port": "3"})
    assert (settings.port, settings.credits, settings.drain) == (3, 2, 1)


def test_the_public_url_follows_the_port_unless_given() -> None:
    assert load_settings({"port": 8080}).public_url == "http://localhost:8080"
    assert load_settings({"public_url": "https://pictures.example.com/"}).public_url == "https://pictures.example.com"


@pytest.mark.parametrize("user", ["ada@", "ada:hunter2@", "ada:p%40ss@"])
def test_the_public_url_is_published_without_user_name_and_password(user: str) -> None:
    assert load_settings({"public_url": f"https://{user}example.com:8443/a"}).public_url == "https://example.com:8443/a"


@pytest.mark.parametrize(
    "origin",
    [
        *("null", "file://", "capacitor://localhost", "chrome-extension://abcdef", "http://[::1]:8080"),
        *("https://*.preview.example.com", "https://*-team.example.org:8443", "https://*.*.example.com"),
    ],
)
def test_origins_may_be_of_any_scheme_and_patterns(origin: str) -> None:
    assert load_settings({"cors_origins": origin}).cors_origins == (origin,)


@pytest.mark.parametrize(
    ("url", "prefix"),
    [("https://example.com", ""), ("https://example.com/", ""), ("https://example.com/a/b-c_~@1/", "/a/b-c_~@1")],
)
def test_the_path_of_the_public_url_is_a_prefix(url: str, prefix: str) -> None:
    assert load_settings({"public_url": url}).path_prefix == prefix


def test_balances_can_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGECAST_CREDITS", "off")
    assert load_settings({}).credits is None


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGECAST_CORS_ORIGINS", "https://App.example.com, http://10.0.0.1:8080,")
    monkeypatch.setenv("STAGECAST_ALLOWED_HOSTS", "")
    monkeypatch.setenv("STAGECAST_TRUSTED_PROXIES", "10.0.0.0/8, 192.0.2.1,fd00::/8")
    settings = load_settings({})
    assert [str(network) for network in settings.trusted_proxies] == ["10.0.0.0/8", "192.0.2.1/32", "fd00::/8"]
    assert settings.cors_origins == ("https://app.example.com", "http://10.0.0.1:8080")
    assert settings.allowed_hosts == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "many"),
        ("port", "65536"),
        ("public_url", "ftp://localhost"),
        ("public_url", "http://[broken"),
        ("log", "mongodb://user:secret@host"),
        ("images", "s3://"),
        ("images", "s3://b"),
        ("images", "s3://key:secret@bucket/prefix"),
        ("images", "s3://Bucket/prefix"),
        ("images", "s3://bucket//prefix"),
        ("images", "s3://bucket/../prefix"),
        ("images", "s3://bucket/a?region=x"),
        ("images", "gs://bucket/prefix"),
        *(("node_address", value) for value in ("10.0.0.1", ":3000", "10.0.0.1:0", "10.0.0.1:65536", "a b:1")),
        *(
            ("node_address", value)
            for value in ("http://10.0.0.1:3000", "::1:3000", "user@host:1", "host:1/x", "host:+1")
        ),
        ("credits", "-1"),
        ("credits", "Off course"),
        ("retention", "0"),
        ("retention", "nan"),
        ("cors_origins", "*"),
        ("cors_origins", "https://app.example.com/path"),
        ("cors_origins", "https://app.example.com,*"),
        ("cors_origins", "https://*"),
        ("cors_origins", "https://*.com"),
        ("cors_origins", "https://app.*.com"),
        ("cors_origins", "https://app.example.*"),
        ("cors_origins", "http://10.0.0.*"),
        ("cors_origins", "http://*.example.com/x"),
        ("cors_origins", "*://a.example.com"),
        ("cors_origins", "chrome-extension://*"),
        ("cors_origins", "app.example.com"),
        ("cors_origins", "capacitor:"),
        ("trusted_proxies", "*"),
        ("trusted_proxies", "proxy.example.com"),
        ("trusted_proxies", "10.0.0.1/8"),
        ("trusted_proxies", "10.0.0.0/8, 10.0.0.0/33"),
        ("public_url", "https://example.com/a%20b"),
        ("public_url", "https://example.com/a//b"),
        ("public_url", "https://example.com/../a"),
        ("public_url", "https://example.com/a/."),
        ("public_url", "https://*.example.com"),
        ("allowed_hosts", "example.com:80"),
        ("editor", "magic"),
        ("face_swap", "magic"),
        ("local_seconds", "-1"),
        ("local_seconds", "inf"),
        ("max_running", "0"),
        ("max_per_user", "1.5"),
        ("deadline", "0"),
        ("drain", "soon"),
        ("allow_open", "perhaps"),
    ],
)
def test_an_invalid_value_is_refused_with_the_variable_and_without_the_value(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"STAGECAST_{name.upper()}", value)
    sentence = refusal()
    assert sentence.startswith(f"STAGECAST_{name.upper()} must be ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "secret" not in sentence


def test_an_empty_value_counts_as_not_set(empty_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = load_settings({})
    variables = [setting.variable for setting in describe_settings()]
    (empty_place / ".env").write_text("".join(f"{variable}=\n" for variable in variables))
    assert load_settings({}) == defaults
    for variable in variables:
        monkeypatch.setenv(variable, "")
    assert load_settings({}) == defaults
    assert load_settings(dict.fromkeys(Settings.model_fields, "")) == defaults
    (empty_place / ".env").write_text("STAGECAST_PORT=1\n")
    assert load_settings({"port": ""}).port == 1


def test_an_unknown_variable_is_refused_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGECAST_PROT", "3000")
    assert refusal() == "STAGECAST_PROT is not a setting; did you mean STAGECAST_PORT?"


def test_an_unknown_variable_is_refused_in_the_file(empty_place: Path) -> None:
    (empty_place / ".env").write_text("STAGECAST_ZZZZZZ=hunter2\n")
    assert refusal() == "STAGECAST_ZZZZZZ is not a setting."


def test_an_unreadable_file_is_refused(empty_place: Path) -> None:
    (empty_place / ".env").write_bytes(b"STAGECAST_LOG=\xff\xfe")
    assert refusal() == ".env must be a readable text file in UTF-8."


def test_open_mode_listens_on_loopback_only_unless_allowed() -> None:
    assert "--allow-open" in refusal(host="0.0.0.0")
    assert load_settings({"host": "0.0.0.0", "allow_open": True}).host == "0.0.0.0"
    for host in ("localhost", "127.0.0.2", "::1", "LOCALHOST"):
        assert load_settings({"host": host}).host == host


@pytest.mark.parametrize(
    ("host", "given", "announced"),
    [
        ("127.0.0.1", None, "127.0.0.1:7"),
        ("10.0.0.1", None, "10.0.0.1:7"),
        ("fd00::1", None, "[fd00::1]:7"),
        ("node-1.internal", None, "node-1.internal:7"),
        ("0.0.0.0", None, ":7"),
        ("::", None, ":7"),
        ("0.0.0.0", "Node-1.internal:3000", "node-1.internal:3000"),
        ("::", "[FD00::1]:65535", "[fd00::1]:65535"),
    ],
)
def test_the_address_of_a_node_follows_its_host_unless_given(host: str, given: str | None, announced: str) -> None:
    settings = load_settings({"host": host, "port": 7, "node_address": given or "", "allow_open": True})
    assert settings.announced_address == announced


def test_every_setting_is_described() -> None:
    described = {setting.variable: setting for setting in describe_settings()}
    assert len(described) == len(Settings.model_fields)
    assert all(setting.description.endswith(".") for setting in described.values())
    assert described["STAGECAST_PUBLIC_URL"].default == "http://localhost:<port>"
    assert described["STAGECAST_MAX_PER_USER"].flag == "--max-per-user"
    assert described["STAGECAST_CORS_ORIGINS"].default == "none"


def test_settings_are_frozen() -> None:
    settings = load_settings({})
    with pytest.raises(ValidationError):
        setattr(settings, "port", 1)  # noqa: B010 - mypy knows that it cannot be assigned


def test_the_log_is_in_memory_or_in_a_file() -> None:
    assert load_settings({}).log == "memory://"
    for log in ("sqlite:///var/log.db", "sqlite:////srv/log.db"):
        assert load_settings({"log": log}).log == log
    for log in ("sqlite://", "sqlite:///", "sqlite:path", "postgres://x", "memory"):
        assert refusal(log=log).startswith("STAGECAST_LOG must be ")


@pytest.mark.parametrize(
    ("field", "key", "provider"),
    [("editor", "OPENAI_API_KEY", "openai"), ("face_swap", "REPLICATE_API_TOKEN", "replicate")],
)
def test_a_provider_is_used_where_there_is_a_key_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, field: str, key: str, provider: str
) -> None:
    assert getattr(load_settings({}), field) == "local"
    assert refusal(**{field: provider}) == f"{key} must be set where STAGECAST_{field.upper()} is {provider}."
    monkeypatch.setenv(key, "")
    assert getattr(load_settings({}), field) == "local"
    monkeypatch.setenv(key, "a-key")
    assert getattr(load_settings({}), field) == provider
    assert getattr(load_settings({field: "local"}), field) == "local"
    assert "a-key" not in repr(load_settings({}))
    monkeypatch.delenv(key)
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text(f"{key}=a-key\nANOTHER=1\n")
    assert getattr(load_settings({}), field) == provider


def test_secrets_have_no_flags() -> None:
    secret = {setting.variable for setting in describe_settings() if setting.flag is None}
    assert secret == {
        "STAGECAST_JWT_SECRET",
        "STAGECAST_WEBHOOK_SECRET",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "REPLICATE_API_TOKEN",
    }


def test_a_webhook_secret_must_have_the_standard_form() -> None:
    good = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    secret = load_settings({"webhook_secret": good}).webhook_secret
    assert secret is not None
    assert secret.get_secret_value() == good
    for bad in ("whsec_", "whsec_AAAA", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_not base 64 not base 64 not ba"):
        assert refusal(webhook_secret=bad).startswith("STAGECAST_WEBHOOK_SECRET must be ")


def test_the_help_of_settings_is_ascii() -> None:
    for setting in describe_settings():
        assert all(str(text).isascii() for text in setting), setting
