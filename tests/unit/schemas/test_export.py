import json
from collections.abc import Iterator
from typing import Any, cast

import jsonschema
import pytest

from schemas.codec import decode, encode_many
from schemas.examples import EXAMPLES
from schemas.exceptions import ContractError
from schemas.export import asyncapi, json_schema
from schemas.topics import BY_NAME, TOPICS

RECORDS = [topic.name for topic in TOPICS if topic.record]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in cast(dict[str, Any], node).items():
            if name == "$ref":
                yield value
            yield from references(value)
    elif isinstance(node, list):
        for value in cast(list[Any], node):
            yield from references(value)


def resolve(document: dict[str, Any], reference: str) -> Any:
    found: Any = document
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found


@pytest.mark.parametrize("name", RECORDS)
def test_examples_keep_the_exported_schema_and_the_models(name: str) -> None:
    schema = json_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(dict(EXAMPLES[name]))
    (record,) = decode(BY_NAME[name], [json.dumps(EXAMPLES[name]).encode()], [(0, 0)]).records
    assert record is not None
    validator.validate(json.loads(encode_many([record])[0]))


BAD: list[tuple[str, dict[str, Any]]] = [
    ("reviews", {"rating": 6}),
    ("reviews", {"user_id": None}),
    ("reviews", {"item_id": ""}),
    ("reviews", {"event_time": "2026-11-24T10:15:00"}),
    ("behavior", {"event_time": "2026-11-24"}),
    ("behavior", {"action": "stare"}),
    ("behavior", {"quantity": 0}),
    ("score-requests", {"item_ids": []}),
    ("items", {"category": "Guitars"}),
    ("users", {"age": -1}),
    ("score-digests", {"predicted_sum": 1e308}),  # two would sum up to infinity
]


@pytest.mark.parametrize(("name", "change"), BAD)
def test_schema_and_models_refuse_the_same(name: str, change: dict[str, Any]) -> None:
    bad = {**EXAMPLES[name], **change}
    assert not jsonschema.Draft202012Validator(json_schema(name)).is_valid(bad)
    assert decode(BY_NAME[name], [json.dumps(bad).encode()], [(0, 0)]).rejections


def test_schemas_go_by_topic_or_record_name() -> None:
    assert json_schema("reviews") == json_schema("Review")
    with pytest.raises(ContractError, match="reviews, behavior"):
        json_schema("rewiews")
    with pytest.raises(ContractError, match="'journal'"):
        json_schema("journal")


def test_asyncapi_tells_every_topic() -> None:
    document = asyncapi(partitions=12, replication=3, topic_prefix="eu.", servers="a:9092, b:9092")
    assert document["asyncapi"] == "3.0.0"
    assert [server["host"] for server in document["servers"].values()] == ["a:9092", "b:9092"]
    assert list(document["channels"]) == [topic.name for topic in TOPICS]
    channel = document["channels"]["items"]
    binding = channel["bindings"]["kafka"]
    assert channel["address"] == binding["topic"] == "eu.items"
    assert (binding["partitions"], binding["replicas"]) == (12, 3)
    assert binding["topicConfiguration"]["cleanup.policy"] == ["compact"]
    assert document["channels"]["alerts"]["bindings"]["kafka"]["partitions"] == 1
    message = document["components"]["messages"]["Review"]
    assert message["bindings"]["kafka"]["key"]["description"] == "user_id"
    assert "servers" not in asyncapi()


def test_asyncapi_has_the_structure_of_version_3() -> None:
    document = asyncapi()
    assert {"asyncapi", "info", "channels", "operations", "components"} <= document.keys()
    assert {"title", "version"} <= document["info"].keys()
    for reference in references(document):
        assert resolve(document, reference), reference
    for operation in document["operations"].values():
        assert operation["action"] in {"send", "receive"}
        channel = operation["channel"]["$ref"]
        assert resolve(document, channel)["address"]
        for message in operation["messages"]:
            assert message["$ref"].startswith(f"{channel}/messages/")
    assert len(document["operations"]) == len(document["channels"])


@pytest.mark.parametrize("name", RECORDS)
def test_asyncapi_examples_keep_its_payloads(name: str) -> None:
    document = asyncapi()
    (reference,) = references(document["channels"][name])
    message = resolve(document, reference)
    schema = {**message["payload"], "components": document["components"]}
    for example in message["examples"]:
        jsonschema.Draft7Validator(schema).validate(example["payload"])
    nulls = jsonschema.Draft7Validator(schema).is_valid(None)
    marks = name == "dead-letters"  # of letters that were sent again
    assert nulls == (BY_NAME[name].takes_null or marks)
