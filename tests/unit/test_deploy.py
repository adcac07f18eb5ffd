"""The files that deploy Starcast are whole: compose, images, Prometheus, Grafana."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft201909Validator
from packaging.requirements import Requirement
from prometheus_client import CollectorRegistry

from schemas.topics import TOPICS
from streams.metrics import make_metrics

ROOT = Path(__file__).parents[2]
PROCESSORS = {
    "scorer",
    "answers",
    "items",
    "catalog",
    "texts",
    "archiver",
    "insights",
    "dashboard",
}
OURS = PROCESSORS | {"trainer", "topics"}
ONE_SHOT = {"topics"}


def read_yaml(path: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return read_yaml("docker-compose.yml")


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    return compose["services"]


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    [group] = read_yaml("deploy/rules.yml")["groups"]
    return group["rules"]


def test_compose_keeps_the_specification(compose: dict[str, Any]) -> None:
    # The schema of the Compose Specification as docker-compose 1.29.2 (Apache-2.0) ships it in its
    # package; the project's name came to the specification later.
    specification = json.loads((ROOT / "tests/unit/compose_spec.json").read_text())
    specification["properties"]["name"] = {"type": "string"}
    validator = Draft201909Validator(specification)
    assert [error.message for error in validator.iter_errors(compose)] == []
    wrong = {**compose, "services": {"scorer": {"image": "starcast", "restarts": "always"}}}
    assert "restarts" in "".join(error.message for error in validator.iter_errors(wrong))


def test_the_image_has_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    lock = (ROOT / "deploy/requirements.txt").read_text()
    locked = re.findall(r"^([\w-]+)==", lock, re.MULTILINE)
    assert {Requirement(each).name for each in wanted} <= set(locked)


def test_every_processor_has_a_service(services: dict[str, Any]) -> None:
    assert {*OURS, "kafka", "valkey", "prometheus", "grafana"} == set(services)
    for name in PROCESSORS:
        assert services[name]["command"] == ["run", name]
    assert services["topics"]["command"] == ["topics", "apply"]
    assert services["trainer"]["command"] == ["retrain", "--every", "6h", "--keep", "20"]


def test_every_service_is_watched_limited_and_restarted(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}, name
        limits = service["deploy"]["resources"]["limits"]
        assert set(limits) == {"cpus", "memory"}, name
        assert service["restart"] == ("on-failure" if name in ONE_SHOT else "unless-stopped"), name
        assert ("test" in service["healthcheck"]) == (name not in ONE_SHOT), name


def test_every_volume_is_declared_and_used(compose: dict[str, Any]) -> None:
    mounts = [
        str(mount).partition(":")[0]
        for service in compose["services"].values()
        for mount in service.get("volumes", [])
    ]
    named = {mount for mount in mounts if not mount.startswith(".")}
    assert named == set(compose["volumes"])
    for mount in set(mounts) - named:
        assert (ROOT / mount).exists(), mount


def test_services_wait_only_for_what_can_come(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for other, when in service.get("depends_on", {}).items():
            ends = when["condition"] == "service_completed_successfully"
            assert ends == (other in ONE_SHOT), f"{name} waits for {other}"


def test_our_services_know_every_server(services: dict[str, Any]) -> None:
    for name in OURS:
        environment = services[name]["environment"]
        assert environment["STARCAST_KAFKA__BOOTSTRAP_SERVERS"] == "kafka:9092"
        assert environment["STARCAST_REDIS__URL"] == "redis://valkey:6379/0"
        for setting in ("ARCHIVE", "MODELS"):
            folder = environment[f"STARCAST_{setting}__URL"]
            mounted = {mount.partition(":")[2] for mount in services[name]["volumes"]}
            assert folder in mounted


def test_ports_are_open_on_loopback_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_a_gpu_is_given_to_services_that_are_there() -> None:
    with_gpu = read_yaml("deploy/cuda.yml")
    assert set(with_gpu["services"]) <= OURS
    specification = json.loads((ROOT / "tests/unit/compose_spec.json").read_text())
    assert [
        error.message for error in Draft201909Validator(specification).iter_errors(with_gpu)
    ] == []


def test_the_store_keeps_what_it_is_given(services: dict[str, Any]) -> None:
    command = services["valkey"]["command"]
    limit = services["valkey"]["deploy"]["resources"]["limits"]["memory"]
    full = command[command.index("--maxmemory") + 1]
    # Rewriting its file takes more: a copy of what changes meanwhile.
    assert int(full.removesuffix("mb")) <= 0.75 * 1024 * int(limit.removesuffix("G"))
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
    assert command[command.index("--appendonly") + 1] == "yes"


def test_images_are_built_from_what_is_there(services: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    targets = re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE)
    assert {"cpu", "cuda"} <= set(targets)
    for copied in re.findall(r"^COPY (?!--from)(\S+) ", dockerfile, re.MULTILINE):
        assert (ROOT / copied).exists(), copied
    runtime = dockerfile.partition("AS runtime")[2]
    assert re.search(r"^USER starcast$", runtime, re.MULTILINE)
    assert services["scorer"]["build"]["target"] == "${STARCAST_TARGET:-cpu}"


def test_images_hold_the_locked_versions_without_the_tools_of_developers() -> None:
    locked, in_images = (
        set(re.findall(r"^[a-z]\S+==\S+", (ROOT / path).read_text(), re.MULTILINE))
        for path in ("requirements.txt", "deploy/requirements.txt")
    )
    assert in_images < locked
    assert not any(line.startswith(("pytest", "ruff", "pyright")) for line in in_images)


def test_prometheus_scrapes_every_processor() -> None:
    processors, dashboard = read_yaml("deploy/prometheus.yml")["scrape_configs"]
    [lookup] = processors["dns_sd_configs"]
    assert set(lookup["names"]) == PROCESSORS - {"dashboard"}
    assert lookup["port"] == 9100
    [static] = dashboard["static_configs"]
    assert static["targets"] == ["dashboard:8080"]
    # What the rules tell a processor by.
    [named] = processors["relabel_configs"]
    assert named == {"source_labels": ["__meta_dns_name"], "target_label": "service"}
    assert static["labels"] == {"service": "dashboard"}


def test_prometheus_reads_the_rules(services: dict[str, Any]) -> None:
    assert read_yaml("deploy/prometheus.yml")["rule_files"] == ["rules.yml"]
    mounts = services["prometheus"]["volumes"]
    for file in ("prometheus.yml", "rules.yml"):
        assert f"./deploy/{file}:/etc/prometheus/{file}:ro" in mounts
    assert "`deploy/rules.yml`" in (ROOT / "docs/operate.md").read_text()


def test_rules_ask_only_for_series_that_there_are(rules: list[dict[str, Any]]) -> None:
    scraped = {"up": {"job", "service", "instance"}}
    recorded = {rule["record"]: {"processor"} for rule in rules if "record" in rule}
    known = {**scraped, **recorded}
    for metric in metrics():
        known |= {name: set(metric._labelnames) for name in names_of(metric)}
    for rule in rules:
        asked = re.findall(r"\b(up\b|starcast[\w:]+)(?:\{([^}]*)\})?", rule["expr"])
        assert asked, rule
        for name, matchers in asked:
            assert name in known, rule
            assert set(re.findall(r"(\w+)=", matchers)) <= known[name], rule
        labels = set[str]().union(*(known[name] for name, _ in asked))
        grouped = re.findall(r"by \(([^)]*)\)", rule["expr"])
        by = {label.strip() for each in grouped for label in each.split(",")}
        assert by <= labels, rule
        kept = by if re.match(r"\w+ by|(sum|avg|max|abs)\(", rule["expr"]) else labels
        told = re.findall(r"\$labels\.(\w+)", str(rule.get("annotations")))
        assert set(told) <= kept, rule


def test_rules_name_only_jobs_and_processors_that_there_are(rules: list[dict[str, Any]]) -> None:
    jobs = {each["job_name"] for each in read_yaml("deploy/prometheus.yml")["scrape_configs"]}
    for label, there in (
        ("job", jobs),
        ("processor", PROCESSORS),
        ("topic", {each.name for each in TOPICS}),
    ):
        matched = [
            name
            for rule in rules
            for names in re.findall(label + r'=~?"([^"]*)"', rule["expr"])
            for name in names.split("|")
        ]
        assert matched
        assert set(matched) <= there


def test_each_alert_says_what_and_what_to_do(rules: list[dict[str, Any]]) -> None:
    alerts = [rule for rule in rules if "record" not in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}, rule
        assert rule["labels"]["severity"] in ("warning", "critical"), rule
        assert set(rule["annotations"]) == {"summary", "description"}, rule
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m")), rule
        assert rule["expr"].count("(") == rule["expr"].count(")"), rule


def test_grafana_queries_only_metrics_that_there_are() -> None:
    board = json.loads((ROOT / "deploy/grafana/dashboards/starcast.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queried = {name for query in queries for name in re.findall(r"starcast_\w+", query)}
    assert queried
    assert queried <= sample_names()


def test_grafana_queries_only_labels_that_there_are() -> None:
    known = {"le", *(label for metric in metrics() for label in metric._labelnames)}
    board = json.loads((ROOT / "deploy/grafana/dashboards/starcast.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
            shown = re.findall(r"{{(\w+)}}", target["legendFormat"])
            by = {label.strip() for labels in grouped for label in labels.split(",")}
            assert by <= known, panel["title"]
            assert set(shown) <= by, panel["title"]


def test_grafana_counts_each_event_once() -> None:
    # An event makes rows of the archiver, item updates and digests, which count as events of these.
    board = json.loads((ROOT / "deploy/grafana/dashboards/starcast.json").read_text())
    [panel] = [panel for panel in board["panels"] if panel["title"] == "Events a second"]
    [target] = panel["targets"]
    assert 'starcast_events_total{processor="scorer"}' in target["expr"]


def test_grafana_finds_its_source_and_its_boards(services: dict[str, Any]) -> None:
    [source] = read_yaml("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    [provider] = read_yaml("deploy/grafana/provisioning/dashboards/starcast.yml")["providers"]
    board = json.loads((ROOT / "deploy/grafana/dashboards/starcast.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    mounted = [mount.split(":")[1] for mount in services["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounted


def metrics() -> list[Any]:
    made = make_metrics(CollectorRegistry())
    return [value for name, value in vars(made).items() if name != "registry"]


def names_of(metric: Any) -> list[str]:
    """The series names that a metric can have, whether or not they have a value yet."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    return [metric._name + suffix for suffix in suffixes[type(metric).__name__.lower()]]


def sample_names() -> set[str]:
    """All series names that our metrics can have."""
    return {name for metric in metrics() for name in names_of(metric)}
