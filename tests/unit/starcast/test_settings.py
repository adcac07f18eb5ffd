import os
from collections.abc import Iterator
from math import inf, nan
from pathlib import Path

import pytest
from pydantic import BaseModel, SecretStr, ValidationError

from schemas.urls import HIDDEN, hide_password
from starcast.settings import (
    Settings,
    SettingsError,
    load,
    load_with_sources,
    variables,
)
from streams.config import KafkaConfig, RedisConfig


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("STARCAST_"):
            monkeypatch.delenv(name)


def write(folder: Path, toml: str = "", env: str = "") -> Path:
    if toml:
        (folder / "starcast.toml").write_text(toml)
    if env:
        (folder / ".env").write_text(env)
    return folder


def test_defaults_without_any_source(tmp_path: Path) -> None:
    settings, rows = load_with_sources(folder=tmp_path)
    assert settings.kafka.bootstrap_servers == "127.0.0.1:9092"
    assert {row.source for row in rows} == {"default"}


def test_environment_wins_over_dotenv_over_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path,
        toml="[kafka]\npartitions = 2\ngroup_id = 'toml'\ntopic_prefix = 'toml.'\n",
        env="STARCAST_KAFKA__PARTITIONS=3\nSTARCAST_KAFKA__GROUP_ID=dotenv\nOTHER=1\n",
    )
    monkeypatch.setenv("STARCAST_KAFKA__PARTITIONS", "4")
    settings, rows = load_with_sources(folder=tmp_path)
    assert settings.kafka.partitions == 4
    assert settings.kafka.group_id == "dotenv"
    assert settings.kafka.topic_prefix == "toml."
    sources = {row.name: row.source for row in rows}
    assert sources["kafka.partitions"] == "environment variable STARCAST_KAFKA__PARTITIONS"
    assert sources["kafka.group_id"] == f"{tmp_path / '.env'}: STARCAST_KAFKA__GROUP_ID"
    assert sources["kafka.topic_prefix"] == str(tmp_path / "starcast.toml")
    assert sources["kafka.replication"] == "default"


def test_a_dotenv_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes("STARCAST_KAFKA__GROUP_ID=Straße\n".encode("latin-1"))
    with pytest.raises(SettingsError, match=r"\.env is not in UTF-8"):
        load(folder=tmp_path)


def test_config_variable_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "other.toml"
    file.write_text("[web]\nport = 1\n")
    monkeypatch.setenv("STARCAST_CONFIG", str(file))
    assert load(folder=tmp_path).web.port == 1
    monkeypatch.setenv("STARCAST_CONFIG", "")
    assert load(folder=tmp_path) == Settings()
    monkeypatch.setenv("STARCAST_CONFIG", str(tmp_path / "missing.toml"))
    with pytest.raises(SettingsError, match=r"no settings file .*missing\.toml"):
        load(folder=tmp_path)


@pytest.mark.parametrize(
    "toml",
    [
        '[kafka.options]\nsecurity.protocol = "SSL"\n',
        '[kafka.options]\n"security.protocol" = "SSL"\n',
        '[kafka.options]\nSECURITY_PROTOCOL = "SSL"\n',
    ],
)
def test_librdkafka_options_in_toml(tmp_path: Path, toml: str) -> None:
    assert load(folder=write(tmp_path, toml)).kafka.options == {"security.protocol": "SSL"}


def test_librdkafka_options_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path,
        toml='[kafka.options]\nsecurity.protocol = "SSL"\nsocket.keepalive.enable = true\n',
    )
    monkeypatch.setenv("STARCAST_KAFKA__OPTIONS__SECURITY_PROTOCOL", "SASL_SSL")
    monkeypatch.setenv("STARCAST_KAFKA__OPTIONS__ENABLE_SSL_CERTIFICATE_VERIFICATION", "false")
    assert load(folder=tmp_path).kafka.options == {
        "security.protocol": "SASL_SSL",
        "socket.keepalive.enable": "true",
        "enable.ssl.certificate.verification": "false",
    }


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("KAFKA__PARTITIONS", "0", ["kafka.partitions", "value 0", "greater than or equal to 1"]),
        ("KAFKA__PARTITIONS", "many", ["value many", "valid integer"]),
        ("REDIS__CLUSTER", "perhaps", ["redis.cluster", "valid boolean"]),
        ("LOG__LEVEL", "loud", ["log.level", "'debug', 'info', 'warning' or 'error'"]),
        ("KAFKA__PARTITION", "1", ["no setting kafka.partition", "mean kafka.partitions"]),
        ("KAFAK__PARTITIONS", "1", ["no setting kafak", "mean kafka"]),
        ("KAFKA", "1", ["kafka", "group of settings", "bootstrap_servers"]),
        ("TRAINER__BASELINES", "[x", ["begins like JSON"]),
        ("REDIS__URL__HOST", "x", ["redis.url", "valid string"]),
        ("ARCHIVE", "s3://shop", ["variable STARCAST_ARCHIVE takes", "JSON"]),
        (
            "TRAINER__TEXT__FINE_TUNE__AUGMENT__WAYS",
            "delete",
            ["variable STARCAST_TRAINER__TEXT__FINE_TUNE__AUGMENT__WAYS takes", "JSON"],
        ),
    ],
)
def test_a_wrong_variable_is_named_with_what_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: list[str]
) -> None:
    monkeypatch.setenv(f"STARCAST_{name}", value)
    with pytest.raises(SettingsError) as caught:
        load(folder=tmp_path)
    assert "environment variable STARCAST_" in str(caught.value)
    for part in told:
        assert part in str(caught.value)


def test_all_wrong_values_are_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, "[kafka]\npartitions = 0\n[web]\nport = -1\n")
    with pytest.raises(SettingsError) as caught:
        load(folder=tmp_path)
    assert "kafka.partitions" in str(caught.value)
    assert "web.port" in str(caught.value)
    assert str(tmp_path / "starcast.toml") in str(caught.value)


@pytest.mark.parametrize("toml", ["[kafka\n", "[kafka]\npartition = 1\n", "[nothing]\nx = 1\n"])
def test_a_bad_file_is_refused(tmp_path: Path, toml: str) -> None:
    with pytest.raises(SettingsError, match=r"starcast\.toml"):
        load(folder=write(tmp_path, toml))


def test_secrets_are_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hunter2"
    write(
        tmp_path,
        f'[redis]\nurl = "redis://bob:{secret}@h:1/0"\n'
        f'[archive.options]\naws_secret_access_key = "{secret}"\n'
        f'[kafka.options]\nsasl.password = "{secret}"\nsasl.username = "bob"\n',
    )
    monkeypatch.setenv("STARCAST_KAFKA__OPTIONS__SSL_KEY_PASSWORD", secret)
    monkeypatch.setenv("STARCAST_MODELS__URL", f"sftp://bob:{secret}@h/models")
    monkeypatch.setenv("STARCAST_TRAINER__TRACKING__MLFLOW_URI", f"http://bob:{secret}@h")
    settings, rows = load_with_sources(folder=tmp_path)
    shown = {row.name: row.shown for row in rows}
    assert shown["kafka.options.sasl.password"] == HIDDEN
    assert shown["kafka.options.ssl.key.password"] == HIDDEN
    assert shown["kafka.options.sasl.username"] == "bob"
    assert shown["archive.options.aws_secret_access_key"] == HIDDEN
    assert shown["redis.url"] == f"redis://bob:{HIDDEN}@h:1/0"
    for text in (str(settings), repr(settings), repr(settings.kafka), str(rows)):
        assert secret not in text
    assert settings.redis.url.get_secret_value() == f"redis://bob:{secret}@h:1/0"


def test_secrets_are_not_shown_in_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARCAST_KAFKA", '{"options": {"sasl.password": "hunter2"')
    with pytest.raises(SettingsError) as caught:
        load(folder=tmp_path)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:pw@h/0", f"redis://:{HIDDEN}@h/0"),
        ("redis://u:p/a@b:c@h/0", f"redis://u:{HIDDEN}@h/0"),
        ("sftp://u:p@h/models", f"sftp://u:{HIDDEN}@h/models"),
        ("redis+sentinel://a:1,b:2/shop", "redis+sentinel://a:1,b:2/shop"),
        ("rediss://u:p@h:1/2", f"rediss://u:{HIDDEN}@h:1/2"),
        ("unix:///tmp/s?password=x&db=1", f"unix:///tmp/s?password={HIDDEN}&db=1"),
    ],
)
def test_hide_password(url: str, shown: str) -> None:
    assert hide_password(url) == shown


def test_settings_from_parts_read_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARCAST_KAFKA__PARTITIONS", "77")
    settings = Settings(
        kafka=KafkaConfig(partitions=3), redis=RedisConfig(url=SecretStr("redis://x"))
    )
    assert settings.kafka.partitions == 3
    assert Settings().kafka.partitions == 8


def test_a_process_has_the_settings_that_its_variables_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.model_validate(
        {
            "kafka": {"topic_prefix": "eu.", "options": {"sasl.password": "a b"}},
            "redis": {"url": "redis://:secret@h:1/0", "cluster": True},
            "archive": {"options": {"aws_region": "x"}},
            "trainer": {"fit": {"sizes": {"dropout": 0.25}}, "tracking": {"mlflow_uri": "x"}},
        }
    )
    settings.trainer.text.fine_tune.augment.ways = ("swap", "shift")
    monkeypatch.setenv("STARCAST_KAFKA__PARTITIONS", "77")
    (tmp_path / "starcast.toml").write_text(
        "[scorer]\nlinger_ms = 7\n[kafka.options]\ndebug = 'all'\n[trainer.text.fine_tune]\n"
        "dropout = 0.5\n"  # which is none in the settings, as options are not there
    )
    assert load(folder=tmp_path) != settings
    for name, value in variables(settings).items():
        monkeypatch.setenv(name, value)
    assert load(folder=tmp_path) == settings


def test_one_underscore_for_two_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARCAST_KAFKA_PORT", "tcp://10.0.0.1:9092")  # as Kubernetes makes them
    assert load(folder=tmp_path) == load(folder=tmp_path)
    monkeypatch.setenv("STARCAST_KAFKA_TOPIC_PREFIX", "trial.")
    with pytest.raises(SettingsError, match="Did you mean STARCAST_KAFKA__TOPIC_PREFIX"):
        load(folder=tmp_path)
    monkeypatch.delenv("STARCAST_KAFKA_TOPIC_PREFIX")
    (tmp_path / ".env").write_text("STARCAST_REDIS_URL=redis://store\n")
    with pytest.raises(SettingsError, match=r"\.env: STARCAST_REDIS_URL.* STARCAST_REDIS__URL"):
        load(folder=tmp_path)


def test_what_kubernetes_makes_for_a_service_named_starcast_web_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(folder=tmp_path)
    monkeypatch.setenv("STARCAST_WEB_PORT", "tcp://10.0.0.1:8080")
    assert load(folder=tmp_path) == expected
    monkeypatch.setenv("STARCAST_WEB_PORT", "8081")
    with pytest.raises(SettingsError, match="Did you mean STARCAST_WEB__PORT"):
        load(folder=tmp_path)


def test_the_settings_file_is_not_named_in_dotenv(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("STARCAST_CONFIG=prod.toml\n")
    with pytest.raises(SettingsError, match="of the environment alone"):
        load(folder=tmp_path)


def spans(model: type[BaseModel]) -> Iterator[tuple[type[BaseModel], str]]:
    """Each setting that is a length of time, and where it stands."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from spans(kind)
        elif name.endswith(("_seconds", "_days")) and kind is float:
            yield model, name


@pytest.mark.parametrize(("model", "name"), list(spans(Settings)))
def test_every_length_of_time_has_an_end(model: type[BaseModel], name: str) -> None:
    model.model_validate({name: 86_400 if name.endswith("_seconds") else 3_650})
    for wrong in (inf, nan):
        with pytest.raises(ValidationError, match=name):
            model.model_validate({name: wrong})
