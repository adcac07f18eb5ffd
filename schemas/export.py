"""The contract for other languages and tools: JSON Schema of each record, and AsyncAPI 3."""

from typing import Any

from schemas.examples import EXAMPLES
from schemas.exceptions import ContractError
from schemas.topics import TOPICS, Topic

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REFERENCES = "#/components/schemas/{model}"
_READ = {"reviews", "behavior", "score-requests", "items", "users"}  # what others produce


def json_schema(name: str) -> dict[str, Any]:
    """JSON Schema of the values of a topic, or of a record by its name (`reviews`, `Review`).

    Raises ContractError for an unknown name and for the journal, whose values are Arrow.
    """
    models = {topic.name: topic.record for topic in TOPICS if topic.record}
    models |= {model.__name__: model for model in models.values()}
    if name not in models:
        raise ContractError(
            f"no JSON record is called {name[:60]!a}; the topics with one are "
            + ", ".join(topic.name for topic in TOPICS if topic.record)
        )
    return {"$schema": DIALECT, **models[name].model_json_schema()}


def asyncapi(
    version: str = "1.0.0",
    partitions: int = 8,
    replication: int = 1,
    topic_prefix: str = "",
    servers: str = "",
    secure: bool = False,
) -> dict[str, Any]:
    """The AsyncAPI 3.0 document of all topics, as set up with these settings.

    `servers` are Kafka's bootstrap servers, comma separated; none are named when it is empty.
    They are spoken to by TLS where they are `secure`.
    """
    hosts = [host.strip() for host in servers.split(",") if host.strip()]
    document: dict[str, Any] = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Starcast",
            "version": version,
            "description": "Shop events in, predicted star ratings out.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {
            topic.name: _channel(topic, partitions, replication, topic_prefix) for topic in TOPICS
        },
        "operations": {
            ("receive" if topic.name in _READ else "send") + "-" + topic.name: {
                "action": "receive" if topic.name in _READ else "send",
                "channel": {"$ref": f"#/channels/{topic.name}"},
                "summary": topic.meaning,
                "messages": [{"$ref": f"#/channels/{topic.name}/messages/{_message_name(topic)}"}],
            }
            for topic in TOPICS
        },
        "components": {
            "messages": {_message_name(topic): _message(topic) for topic in TOPICS},
            "schemas": _schemas(),
        },
    }
    if hosts:
        document["servers"] = {
            f"kafka-{index}": {"host": host, "protocol": "kafka-secure" if secure else "kafka"}
            for index, host in enumerate(hosts)
        }
    return document


def _channel(topic: Topic, partitions: int, replication: int, prefix: str) -> dict[str, Any]:
    config = topic.config()
    return {
        "address": prefix + topic.name,
        "description": topic.meaning,
        "messages": {
            _message_name(topic): {"$ref": f"#/components/messages/{_message_name(topic)}"}
        },
        "bindings": {
            "kafka": {
                "topic": prefix + topic.name,
                "partitions": topic.partitions(partitions),
                "replicas": replication,
                # The names that the Kafka binding defines; the rest is told in an extension.
                "topicConfiguration": {
                    "cleanup.policy": [config["cleanup.policy"]],
                    "retention.ms": int(config["retention.ms"]),
                    "max.message.bytes": int(config["max.message.bytes"]),
                },
                "x-message.timestamp.type": config["message.timestamp.type"],
                "x-compression.type": config["compression.type"],
                "bindingVersion": "0.5.0",
            }
        },
    }


def _message_name(topic: Topic) -> str:
    return topic.record.__name__ if topic.record else "Journal"


def _message(topic: Topic) -> dict[str, Any]:
    message: dict[str, Any] = {
        "name": _message_name(topic),
        "summary": topic.meaning,
        "bindings": {
            "kafka": {
                "key": {"type": "string", "description": topic.key},
                "bindingVersion": "0.5.0",
            }
        },
    }
    if topic.record is None:
        return message | {
            "contentType": "application/vnd.apache.arrow.stream",
            "payload": {
                "type": "string",
                "format": "binary",
                "description": "Two Arrow IPC streams, as schemas/journal.py tells.",
            },
        }
    payload: dict[str, Any] = {"$ref": _REFERENCES.format(model=_message_name(topic))}
    if said := _null(topic):
        payload = {"oneOf": [payload, {"type": "null", "description": said}]}
    return message | {
        "contentType": "application/json",
        "payload": payload,
        "examples": [{"name": topic.name, "payload": dict(EXAMPLES[topic.name])}],
    }


def _null(topic: Topic) -> str:
    """What a null value of a topic says; empty where there are none."""
    if topic.name == "dead-letters":
        return "The letter at the position in the header starcast-redriven was sent again."
    if topic.takes_null:
        return "Erases the user." if topic.forgets else "Deletes the key."
    return ""


def _schemas() -> dict[str, Any]:
    """Each record once, and what records share once."""
    schemas: dict[str, Any] = {}
    for topic in TOPICS:
        if topic.record is not None:
            found = topic.record.model_json_schema(ref_template=_REFERENCES)
            schemas |= found.pop("$defs", {})
            schemas[topic.record.__name__] = found
    return dict(sorted(schemas.items()))
