"""What the exported schemas take the scorer's decoder takes, and what they refuse it refuses.

Beyond the schemas, in words alone: JSON is of RFC 8259 in UTF-8, and a day exists.
"""

import json
import math
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import decode
from schemas.columns import decode_columns
from schemas.examples import EXAMPLES
from schemas.export import json_schema
from schemas.records import NO_NUL
from schemas.topics import BY_NAME, TOPICS
from tests.faults.spoiling import WRONG

RECORDS = [topic.name for topic in TOPICS if topic.record]
COLUMNS = ("reviews", "behavior", "text-features")  # of which the scorer makes columns
Schema = Mapping[str, Any]


def drawn(schema: Schema, definitions: Schema) -> st.SearchStrategy[Any]:
    """JSON that a schema of ours takes."""

    def inner(found: Schema) -> st.SearchStrategy[Any]:
        return drawn(found, definitions)

    if "$ref" in schema:
        return inner(definitions[schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return st.one_of(*map(inner, schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    makers: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
        "null": st.none,
        "string": lambda: _text(schema),
        "integer": lambda: _whole(schema),
        "number": lambda: _number(schema),
        "array": lambda: st.lists(
            inner(schema["items"]),
            min_size=schema.get("minItems", 0),
            max_size=min(schema.get("maxItems", 6), 6),
        ),
        "object": lambda: (
            st.fixed_dictionaries(
                {name: inner(schema["properties"][name]) for name in schema["required"]},
                optional={
                    name: inner(each)
                    for name, each in schema["properties"].items()
                    if name not in schema["required"]
                },
            )
            if "required" in schema
            else st.dictionaries(
                _text({}), inner(schema.get("additionalProperties", {"type": "null"})), max_size=3
            )
        ),
    }
    return makers[schema["type"]]()


def _text(schema: Schema) -> st.SearchStrategy[str]:
    if schema.get("format") == "date-time":
        return st.from_regex(schema["pattern"], fullmatch=True).map(_on_a_day)
    bare = "\0" if schema.get("pattern") == NO_NUL else ""
    signs = st.characters(codec="utf-8", exclude_characters=bare)
    least, most = schema.get("minLength", 0), schema.get("maxLength", 20)
    return st.text(signs, min_size=least, max_size=min(most, 20)) | st.just("🎸" * most)


def _whole(schema: Schema) -> st.SearchStrategy[float]:
    # A float of 2^63 - 1 is 2^63: this far, and no further, each whole number is one.
    exact = st.integers(max(schema["minimum"], -(2**53)), min(schema["maximum"], 2**53))
    return st.integers(schema["minimum"], schema["maximum"]) | exact.map(float)


def _number(schema: Schema) -> st.SearchStrategy[float]:
    least = schema.get("exclusiveMinimum", schema.get("minimum", -1e300))
    most = schema.get("maximum", 1e300)
    above = "exclusiveMinimum" in schema
    return st.floats(least, most, exclude_min=above) | st.integers(
        math.ceil(least) + above, math.floor(most)
    )


def _on_a_day(time: str) -> str:
    """The same, on another day where this is none: too many are, to leave them out."""
    return time if _is_day(time) else f"2026-11-24{time[10:]}"


def _is_day(time: str) -> bool:
    """Whether a time that has the form is one, from 1990 to 2100."""
    try:
        found = datetime.fromisoformat(time.upper())
    except ValueError:
        return False
    return 631_152_000 <= found.timestamp() <= 4_102_444_800


@cache
def valid(topic: str) -> Callable[[Any], bool]:
    return jsonschema.Draft202012Validator(json_schema(topic)).is_valid


def taken(topic: str, value: Any) -> bool:
    data = [json.dumps(value).encode()]
    found = not decode(BY_NAME[topic], data, [(0, 0)]).rejections
    record = BY_NAME[topic].record
    if topic in COLUMNS and record is not None:
        assert found or decode_columns(record, data) is None
    return found


@cache
def values(topic: str) -> st.SearchStrategy[Any]:
    schema = json_schema(topic)
    return drawn(schema, schema.get("$defs", {}))


@given(st.data(), st.sampled_from(RECORDS))
def test_what_schemas_take_is_taken(data: st.DataObject, topic: str) -> None:
    value = data.draw(values(topic))
    assert valid(topic)(value)
    assert taken(topic, value)


def _json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:  # no number, or half a character
        return False
    return True


ODD = [
    *filter(_json, WRONG),
    *(1.0, 1.5, 2**31, 2.0**31, 2.0**63, 2**64, 1e22, -0.0, 5e-324, "200", "é" * 256, "é" * 257),
    *("x" * 65_536, "x" * 65_537, "a\n", ["a"] * 17, [0] * 5, [1.0] * 5, [0.5, 1.5], [None]),
    *({"": 1}, {"a": 1.0}, {"a": 1.5}, {"a": "1"}, {"a": True}, {"a": None}),
    *(f"2026-11-24{clock}" for clock in ("T23:59:60Z", "T24:00:00Z", "T10:60:00Z", "t10:15:00z")),
    *(f"2026-11-24T10:15:00{zone}" for zone in ("+99:00", "+24:00", "+23:59", "-00:00", "+0530")),
    *(f"2026-11-24T10:15:00.{part}Z" for part in ("1", "123456789", "1234567890", "")),
    *(f"{day}T10:15:00Z" for day in ("2026-00-01", "2026-01-32", "２026-11-24", "58000-01-01")),
    *("1988-01-01T00:00:00Z", "2101-01-01T00:00:00Z", "2026-11-24T10:15:00", "2026-11-24 10:15Z"),
]  # fmt: skip


@pytest.mark.parametrize("topic", RECORDS)
def test_odd_fields_are_taken_or_refused_by_both(topic: str) -> None:
    example = dict(EXAMPLES[topic])
    for good in [example, example | {"unknown": 1}]:
        assert valid(topic)(good)
        assert taken(topic, good)
    for name in [*example, *_nested(topic)]:
        for odd in ODD:
            changed = _with(example, name, odd)
            assert valid(topic)(changed) == taken(topic, changed), (name, odd)
        changed = _with(example, name, ...)
        assert valid(topic)(changed) == taken(topic, changed), name


def _nested(topic: str) -> list[str]:
    return [
        f"{outer}.{name}"
        for outer, value in EXAMPLES[topic].items()
        if isinstance(value, dict)
        for name in value  # pyright: ignore[reportUnknownVariableType]
    ]


def _with(example: Mapping[str, Any], path: str, odd: Any) -> dict[str, Any]:
    """The example with another value at a path, or, of `...`, with none."""
    name, _, rest = path.partition(".")
    value = _with(example[name], rest, odd) if rest else odd
    left = {key: each for key, each in example.items() if key != name}
    return left if value is ... else left | {name: value}
