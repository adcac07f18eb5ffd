"""The command line as a whole: what it prints, and the exit codes that scripts rely on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from confluent_kafka import KafkaError, KafkaException
from typer.testing import CliRunner

from model import bundle, registry
from schemas.exceptions import StarcastError
from schemas.topics import TOPICS
from starcast import __version__
from starcast.commands.context import check_output, fail
from starcast.doctor import EVERY_SHOP, Finding
from starcast.main import app, main
from starcast.settings import load
from streams.embedded import HOST, Endpoints, free_port
from streams.producer import Sent
from streams.run import PROCESSORS
from tests.unit.model import bundles
from trainer import search
from trainer.exceptions import TrainerError
from trainer.retrain import Retrained

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("STARCAST_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["starcast", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_version_and_help() -> None:
    assert RUNNER.invoke(app, ["--version"]).output == f"starcast {__version__}\n"
    shown = RUNNER.invoke(app, ["--help"]).output
    for command in (
        "run", "topics", "produce", "consume", "import", "train", "retrain", "evaluate", "models",
        "doctor", "dead-letters", "config", "asyncapi", "schema", "demo", "backfill",
        "verify-replay", "explain",
    ):  # fmt: skip
        assert command in shown


@pytest.mark.parametrize("arguments", [["nope"], ["produce"], ["produce", "no-such-file"]])
def test_wrong_usage_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, *arguments) == 2


def test_an_expected_error_is_one_message_and_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STARCAST_KAFKA__PARTITIONS", "0")
    assert run_main(monkeypatch, "config") == 1
    printed = capsys.readouterr()
    assert "STARCAST_KAFKA__PARTITIONS" in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_an_error_of_the_system_is_one_message_and_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(ENOSPC, "No space left on device", "/data/out")

    monkeypatch.setattr("starcast.commands.contract.asyncapi_document", full)
    assert run_main(monkeypatch, "asyncapi") == 1
    assert capsys.readouterr().err.startswith("No space left on device: /data/out. Check ")


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (KafkaError._TIMED_OUT, "Kafka failed meanwhile: no answer. Run the command again."),
        (KafkaError._INVALID_ARG, "Kafka client: no answer. Options come from kafka.options"),
    ],
)
def test_a_broker_that_goes_away_meanwhile_is_told_without_a_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, advice: str
) -> None:
    """`state`, `consume` and others ask it again and again; any answer may be the last."""

    def gone(*_: object) -> None:
        raise KafkaException(KafkaError(code, "no answer"))

    monkeypatch.setattr("starcast.commands.state.check_topics", lambda _: None)
    monkeypatch.setattr("streams.rebuild.rebuild", gone)
    assert run_main(monkeypatch, "state", "rebuild") == 1
    said = capsys.readouterr().err
    assert advice in said
    assert "Traceback" not in said


@pytest.mark.parametrize("written", ["not JSON", "[]"])
def test_what_is_no_evaluation_is_refused_before_a_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    written: str,
) -> None:
    (tmp_path / "shop.jsonl").touch()
    (tmp_path / "bad.json").write_text(written)
    assert run_main(monkeypatch, "train", "shop.jsonl", "--evaluation", "bad.json") == 1
    assert capsys.readouterr().err.startswith("bad.json is no")


def test_a_bug_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("x")

    monkeypatch.setattr("starcast.commands.contract.asyncapi_document", broken)
    monkeypatch.setattr(sys, "argv", ["starcast", "asyncapi"])
    with pytest.raises(KeyError):
        main()


@pytest.mark.parametrize(
    ("named", "wanted"), [([], None), (["none"], ()), (["bias", "svd"], ["bias", "svd"])]
)
def test_peers_of_an_evaluation_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: list[str], wanted: object
) -> None:
    asked: list[object] = []

    def evaluate(*_: object, peers: object, **__: object) -> None:
        asked.append(peers)
        raise StarcastError("asked")

    monkeypatch.setattr("trainer.evaluate.evaluate", evaluate)
    monkeypatch.setattr("trainer.data.from_file", lambda path: path)
    (tmp_path / "shop.jsonl").touch()
    options = [option for name in named for option in ("--peers", name)]
    assert run_main(monkeypatch, "evaluate", "--events", "shop.jsonl", *options) == 1
    assert asked == [wanted]


@pytest.mark.parametrize(("delivered", "how"), [(5, "--skip 7"), (0, "")])
def test_a_backfill_that_fails_says_where_to_go_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    delivered: int,
    how: str,
) -> None:
    def failing(_: Any, __: Any, ___: Any, on_sent: Any, *____: Any) -> Sent:
        on_sent(Sent(delivered=Counter({"reviews": delivered})))
        raise StarcastError("the archive is full")

    (tmp_path / "shop.jsonl").touch()
    monkeypatch.setattr("starcast.commands.running.reach", lambda _: None)
    monkeypatch.setattr("starcast.backfill.backfill", failing)
    assert run_main(monkeypatch, "backfill", "shop.jsonl", "--skip", "2") == 1
    said = capsys.readouterr().err
    assert "the archive is full" in said
    assert ("--skip" in said) == bool(how)
    assert how in said


@pytest.mark.parametrize("option", [("--peers", "bias"), ("--ablations",)])
def test_what_fits_models_does_not_go_with_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...]
) -> None:
    (tmp_path / "shop.jsonl").touch()
    asked = ("evaluate", "--events", "shop.jsonl", "--model", "stable", *option)
    assert run_main(monkeypatch, *asked) == 2


@pytest.mark.parametrize("command", ["retrain", "evaluate", "search", "compress"])
def test_what_processes_do_not_share_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = tmp_path / "history.jsonl"
    history.touch()
    arguments = {"retrain": [], "evaluate": ["--events", str(history)], "search": ["rating"]}
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = RUNNER.invoke(app, [command, *arguments.get(command, [])])
    assert found.exit_code == 1
    assert f"starcast {command} is not shared among processes" in found.stderr.replace("\n", " ")


def test_names_of_settings_are_whole() -> None:
    names = [row["name"] for row in json.loads(RUNNER.invoke(app, ["config", "--json"]).stdout)]
    printed = RUNNER.invoke(app, ["config"]).stdout
    assert [name for name in names if name not in printed] == []
    assert "…" not in printed


def test_config_prints_every_setting_with_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARCAST_REDIS__URL", "redis://u:hunter2@h:1")
    (tmp_path / "starcast.toml").write_text("[kafka]\npartitions = 3\n")
    result = RUNNER.invoke(app, ["config", "--json"])
    rows = {row["name"]: row for row in json.loads(result.output)}
    assert rows["kafka.partitions"]["shown"] == "3"
    assert rows["kafka.partitions"]["source"].endswith("starcast.toml")
    assert rows["kafka.partitions"]["description"]
    assert rows["redis.url"]["shown"] == "redis://u:******@h:1"
    assert "hunter2" not in result.output
    changed = RUNNER.invoke(app, ["config", "--json", "--changed"])
    assert {row["name"] for row in json.loads(changed.output)} == {"kafka.partitions", "redis.url"}


def test_config_takes_another_file(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("[web]\nport = 1\n")
    result = RUNNER.invoke(app, ["--config", "other.toml", "config", "--json", "--changed"])
    assert [row["name"] for row in json.loads(result.output)] == ["web.port"]


def test_asyncapi_and_schema(tmp_path: Path) -> None:
    document = json.loads(RUNNER.invoke(app, ["asyncapi"]).output)
    assert document["asyncapi"].startswith("3.")
    assert document["info"]["version"] == __version__
    assert RUNNER.invoke(app, ["asyncapi", "--out", "deep/asyncapi.json"]).exit_code == 0
    assert json.loads((tmp_path / "deep" / "asyncapi.json").read_text()) == document
    listed = RUNNER.invoke(app, ["schema"]).output
    assert all(topic.name in listed for topic in TOPICS)
    schema = json.loads(RUNNER.invoke(app, ["schema", "reviews"]).output)
    assert "rating" in json.dumps(schema)


def test_asyncapi_tells_topics_and_servers_as_settings_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STARCAST_KAFKA__TOPIC_PREFIX", "eu.")
    monkeypatch.setenv("STARCAST_KAFKA__PARTITIONS", "12")
    monkeypatch.setenv("STARCAST_KAFKA__OPTIONS__SECURITY_PROTOCOL", "SASL_SSL")
    document = json.loads(RUNNER.invoke(app, ["asyncapi"]).output)
    reviews = document["channels"]["reviews"]
    assert reviews["address"] == "eu.reviews"
    assert reviews["bindings"]["kafka"]["partitions"] == 12
    server = {"host": "127.0.0.1:9092", "protocol": "kafka-secure"}
    assert document["servers"] == {"kafka-0": server}


def test_an_unknown_record_is_an_expected_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "schema", "nope") == 1
    assert "nope" in capsys.readouterr().err


def test_sample_writes_a_record_file(tmp_path: Path) -> None:
    arguments = ["sample", "--out", "shop.jsonl", "--events", "50", "--users", "5", "--items", "4"]
    assert RUNNER.invoke(app, arguments).exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "shop.jsonl").read_text().splitlines()]
    assert len(lines) == 59
    assert {line["topic"] for line in lines} == {"users", "items", "reviews", "behavior"}


READERS = [
    ["import", "amazon", "in.jsonl", "--out"],
    ["evaluate", "--events", "in.jsonl", "--json"],
    ["search", "rating", "in.jsonl", "--out"],
    ["compress", "in.jsonl", "--json"],
    ["demo", "--once", "--events", "in.jsonl", "--json"],
]


@pytest.mark.parametrize(
    ("command", "out"),
    [
        (command, out)
        for command in (["sample", "--out"], ["asyncapi", "--out"], *READERS)
        for out in ("folder", "in.jsonl/out", "/proc/out")
    ]
    + [(command, out) for command in READERS for out in ("in.jsonl", "link")],
)
def test_what_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], out: str
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("worked")

    for name in (
        "starcast.commands.training.settings_of",
        "starcast.commands.running.settings_of",
        "starcast.importers.import_amazon",
        "starcast.shop.shop",
    ):
        monkeypatch.setattr(name, work)
    (tmp_path / "folder").mkdir()
    (tmp_path / "in.jsonl").write_text("kept")
    (tmp_path / "link").symlink_to("in.jsonl")
    assert run_main(monkeypatch, *command, out) == 2
    assert (tmp_path / "in.jsonl").read_text() == "kept"


def test_an_address_is_not_taken_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "sample", "--out", "s3://bucket/shop.jsonl") == 2
    assert "s3" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_plot_does_not_take_the_place_of_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "shop.jsonl"
    events.touch()
    out = str(tmp_path / "figures.svg")
    assert run_main(monkeypatch, "evaluate", "--events", str(events), "--json", out) == 2
    assert run_main(monkeypatch, "search", "rating", str(events), "--out", out) == 2
    assert not Path(out).exists()


def test_the_folder_of_an_output_is_made(tmp_path: Path) -> None:
    check_output(tmp_path / "deep" / "out.json", tmp_path / "missing.jsonl")
    assert list((tmp_path / "deep").iterdir()) == []


def test_no_broker_is_told_in_a_line_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("streams.clients.REACH_SECONDS", 0.5)
    address = f"{HOST}:{free_port()}"
    monkeypatch.setenv("STARCAST_KAFKA__BOOTSTRAP_SERVERS", address)
    for command in (["topics", "show"], ["consume"], ["dead-letters", "list"]):
        assert run_main(monkeypatch, *command) == 1
        printed = capsys.readouterr().err
        assert address in printed
        assert "Traceback" not in printed


def test_a_processor_that_does_not_exist_is_told_before_the_broker_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STARCAST_KAFKA__BOOTSTRAP_SERVERS", f"{HOST}:{free_port()}")
    for command in ("run", "doctor"):
        assert run_main(monkeypatch, command, "scorer", "nosuch") == 2
        assert "There is no processor nosuch." in capsys.readouterr().err


def test_doctor_looks_for_the_processors_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def examine(_: object, named: list[str]) -> list[Finding]:
        asked.append(named)
        return []

    monkeypatch.setattr("starcast.doctor.examine", examine)
    assert run_main(monkeypatch, "doctor", "texts", "scorer") == 0
    assert run_main(monkeypatch, "doctor") == 0
    assert asked == [["texts", "scorer"], []]
    shown = RUNNER.invoke(app, ["doctor", "--help"]).output
    assert all(name in shown for name in (*EVERY_SHOP, *PROCESSORS))


def test_produce_takes_one_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f.jsonl").write_text("")
    assert run_main(monkeypatch, "produce", "f.jsonl", "--rate", "1", "--speed", "1") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rate", "9"],
        ["--json", "out.json"],
        ["--once", "--events", "f.jsonl", "--port", "9"],
        ["--once", "--events", "f.jsonl", "--seed", "0"],
    ],
)
def test_a_demo_refuses_options_of_the_other_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("starcast.demo.embedded", lambda folder: pytest.fail("started"))
    (tmp_path / "f.jsonl").touch()
    assert run_main(monkeypatch, "demo", *arguments) == 2


@pytest.mark.parametrize("mode", [[], ["--once", "--events", "f.jsonl"]])
def test_a_demos_children_have_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: list[str]
) -> None:
    def start_child(*given: Any) -> None:
        *_, environment = given
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir("/")
        found = load()
        assert (found.kafka.topic_prefix, found.log.level) == ("mine.", "error")
        raise StarcastError("asked")

    monkeypatch.setattr(
        "starcast.demo.embedded", lambda folder: nullcontext(Endpoints("127.0.0.1:1", "redis://r"))
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # a demo that fails leaves its folder
    monkeypatch.setattr("starcast.demo.apply_topics", lambda kafka: None)
    monkeypatch.setattr("starcast.workers.start_child", start_child)
    (tmp_path / "f.jsonl").touch()
    (tmp_path / "my.toml").write_text("[kafka]\ntopic_prefix = 'mine.'\n")
    arguments = ["--config", "my.toml", "--log-level", "error", "demo", *mode]
    result = RUNNER.invoke(app, arguments)
    assert str(result.exception) == "asked"


@pytest.mark.parametrize("asked", ["list", "rollback", "end-canary"])
def test_a_password_of_the_models_folder_is_not_told(
    asked: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STARCAST_MODELS__URL", "memory://bob:hunter2@host/models")
    run_main(monkeypatch, "models", asked)
    told = "".join(capfd.readouterr())
    assert "bob:******@host/models" in told
    assert "hunter2" not in told


def test_models_of_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STARCAST_MODELS__URL", str(tmp_path / "models"))
    assert run_main(monkeypatch, "models", "list") == 0
    assert "no bundle" in capsys.readouterr().err
    assert run_main(monkeypatch, "models", "rollback") == 1
    assert "nothing to roll back to" in capsys.readouterr().err
    assert run_main(monkeypatch, "models", "promote", "20260101T000000-00000000") == 1


def test_a_version_that_serves_and_is_gone_is_listed_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path / "models")
    monkeypatch.setenv("STARCAST_MODELS__URL", url)
    written = bundles.write(url)
    registry.promote(url, written.version, written.sha256, "a test", "good")
    assert run_main(monkeypatch, "models", "list") == 0
    assert not capsys.readouterr().err
    shutil.rmtree(tmp_path / "models" / written.version)
    assert run_main(monkeypatch, "models", "list") == 0
    told = capsys.readouterr()
    assert re.search(rf"{written.version} +stable", told.out)
    assert f"{written.version} is not there any more" in told.err


def test_nothing_is_rolled_back_to_what_cannot_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path / "models")
    monkeypatch.setenv("STARCAST_MODELS__URL", url)
    for seed in range(2):
        written = bundles.write(url, seed)
        registry.promote(url, written.version, written.sha256, "a test", "to see")
    before = registry.read(url)
    (tmp_path / "models" / before.history[0].version / "network.safetensors").unlink()
    assert run_main(monkeypatch, "models", "rollback") == 1
    told = capsys.readouterr().err
    assert "network.safetensors is missing" in told
    assert "starcast models promote VERSION" in told.replace("\n", " ")
    assert registry.read(url) == before


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "starcast", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout == f"starcast {__version__}\n"


def test_an_interrupt_while_it_is_imported_leaves_no_trace() -> None:
    code = """
import sys
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from starcast.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_help_needs_no_torch() -> None:
    code = "import sys, starcast.main; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    assert done.returncode == 0


@pytest.mark.parametrize("command", ["train", "compress"])
def test_a_stable_bundle_that_cannot_be_served_keeps_nobody_from_training(
    command: str, tmp_path: Path
) -> None:
    """After an update its refusal says to train again, which then goes on to read the file."""
    registry.promote(str(tmp_path / "models"), "20261124T101500-1a2b3c4d", "ab", "a test", "")
    (tmp_path / "few.jsonl").write_text(
        '{"topic":"reviews","value":{"event_id":"e","user_id":"u","item_id":"i",'
        '"event_time":"2026-11-24T10:15:00Z","rating":4.0}}\n'
    )
    environment = {"STARCAST_MODELS__URL": str(tmp_path / "models")}
    environment["STARCAST_MODELS__ENCODER"] = "none"
    found = RUNNER.invoke(app, [command, str(tmp_path / "few.jsonl")], env=environment)
    assert isinstance(found.exception, TrainerError)
    assert "only 1 rated reviews" in str(found.exception)


def test_errors_do_not_steer_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As it may stand in the name of a file, or in the registry."""
    fail("no file \x1b[2J here")
    assert r"no file \x1b[2J here" in capsys.readouterr().err


def test_sigterm_ends_a_command_that_waits_for_a_broker() -> None:
    """By a handler: a container's first process is not ended by a signal that it leaves alone."""
    command = [sys.executable, "-m", "starcast", "run", "items", "--wait", "60"]
    nowhere = {"STARCAST_KAFKA__BOOTSTRAP_SERVERS": f"{HOST}:{free_port()}"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | nowhere) as process:
        assert process.stderr is not None
        assert b"No Kafka broker answers" in process.stderr.readline()
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM


def test_old_versions_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path / "models")
    monkeypatch.setenv("STARCAST_MODELS__URL", url)
    for seed in range(3):
        bundles.write(url, seed)
    assert run_main(monkeypatch, "models", "prune", "--keep", "0") == 2
    assert run_main(monkeypatch, "models", "prune", "--keep", "1") == 0
    left = bundle.versions(url)
    told = capsys.readouterr().out
    assert told == f"{3 - len(left)} versions are deleted, {len(left)} are left.\n"
    assert len(left) == 1


def test_retrain_deletes_old_versions_when_it_has_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned: list[int] = []
    verdict = SimpleNamespace(version="20260101T000000-00000000")
    done = Retrained(cast(Any, verdict), False, "", "worse")
    monkeypatch.setattr("trainer.retrain.retrain_once", lambda *_, **__: done)
    monkeypatch.setattr("trainer.assess.summary", lambda _: "")
    monkeypatch.setattr(bundle, "prune", lambda url, keep: pruned.append(keep))
    assert RUNNER.invoke(app, ["retrain"]).exit_code == 0
    assert RUNNER.invoke(app, ["retrain", "--keep", "7"]).exit_code == 0
    assert pruned == [7]


def test_what_another_has_rolled_back_meanwhile_is_not_rolled_back_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path / "models")
    monkeypatch.setenv("STARCAST_MODELS__URL", url)
    versions = [bundles.write(url, seed) for seed in range(3)]
    for written in versions:
        registry.promote(url, written.version, written.sha256, "a test", "to see")
    load = bundle.load

    def slow(*given: Any) -> Any:
        registry.rollback(url, "another", "worse")
        return load(*given)

    monkeypatch.setattr(bundle, "load", slow)
    assert run_main(monkeypatch, "models", "rollback") == 1
    told = capsys.readouterr().err.replace("\n", " ")
    assert f"{versions[1].version} is stable now" in told
    after = registry.read(url).stable
    assert after is not None
    assert after.version == versions[1].version


def test_settings_that_were_found_are_not_to_take_the_place_of_those_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = search.Searched({"fit.learning_rate": 0.002}, 0.9, 0.91, 2, {})
    monkeypatch.setattr(search, "search", lambda *_, **__: found)
    (tmp_path / "shop.jsonl").touch()
    monkeypatch.setattr("trainer.data.from_file", lambda path: None)
    told = RUNNER.invoke(app, ["search", "rating", "shop.jsonl"]).stderr
    assert "starcast --config searched.toml train" in told
    (tmp_path / "starcast.toml").write_text("[models]\nurl = 'mine'\n")
    told = RUNNER.invoke(app, ["search", "rating", "shop.jsonl"]).stderr
    assert "add its lines to starcast.toml" in " ".join(told.split())
