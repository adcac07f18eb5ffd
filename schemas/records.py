"""Every record of the contract (the table in DESIGN), as pydantic models.

Values are JSON in UTF-8 and times are RFC 3339 with an offset. Unknown fields are left out, never
an error, so that a producer may be ahead of us. An absent field and an explicit `null` of an
optional field mean the same (`docs/decisions/0002-contract.md`).
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)  # from which times are counted, as Kafka does
EARLIEST_TIME = datetime(1990, 1, 1, tzinfo=UTC)  # no shop's log starts before the web
LATEST_TIME = datetime(2100, 1, 1, tzinfo=UTC)  # a clock in microseconds read as milliseconds
LONGEST_TEXT = 65_536  # characters; longer ones are dumps, not reviews
LONGEST_ID = 256  # characters
MOST_ITEMS = 1_000  # items in one score request
LARGEST = 2**63 - 1  # whole number; columns of the archive hold none above it

_TIME_EXPECTED = (
    "Input should be an RFC 3339 time with an offset, from 1990 to 2100, as 2026-11-24T10:15:00Z"
)
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
RFC3339 = (
    "(?:1989|199[0-9]|20[0-9]{2}|2100)-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
    rf"[Tt ]{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:[Zz]|[+-]{_CLOCK})"
)
NO_NUL = r"^[^\x00]*$"  # legal JSON, but ends a string for C libraries, terminals and columns


class _Rfc3339:
    """An aware time written as an RFC 3339 string; numbers are refused.

    The whole check runs inside pydantic's core: a Python validator would cost more than the rest
    of a record.
    """

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        text = core_schema.str_schema(strict=True, pattern=f"^{RFC3339}$")
        time = core_schema.datetime_schema(
            tz_constraint="aware",
            ge=EARLIEST_TIME,
            le=LATEST_TIME,
            microseconds_precision="truncate",
        )
        instance = core_schema.datetime_schema(
            tz_constraint="aware", ge=EARLIEST_TIME, le=LATEST_TIME, strict=True
        )
        # Decoded JSON arrives as strings, and that choice is tried first; our own code builds
        # records from datetimes.
        return core_schema.union_schema(
            [core_schema.chain_schema([text, time]), instance],
            mode="left_to_right",
            custom_error_type="time",
            custom_error_message=_TIME_EXPECTED,
            serialization=core_schema.plain_serializer_function_ser_schema(
                format_time, when_used="json", return_schema=core_schema.str_schema()
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {
            "type": "string",
            "format": "date-time",
            "pattern": f"^{RFC3339}$",  # few validators look at a format
            "description": "RFC 3339 with an offset, from 1990 to 2100; no leap second",
        }


@dataclass(frozen=True)
class Whole:
    """A whole number between limits. `200.0` is one, as JSON Schema has it; `"200"` is none."""

    least: int
    most: int

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        number = core_schema.union_schema(
            [core_schema.int_schema(strict=True), core_schema.float_schema(strict=True)],
            mode="left_to_right",
            custom_error_type="int_type",
        )
        return core_schema.chain_schema(
            [number, core_schema.int_schema(ge=self.least, le=self.most)]
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": "integer", "minimum": self.least, "maximum": self.most}


def format_time(time: datetime) -> str:
    """RFC 3339 in UTC with milliseconds. Columns of times leave a fraction of zero out."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Time = Annotated[datetime, _Rfc3339]
Identifier = Annotated[str, Field(strict=True, min_length=1, max_length=LONGEST_ID, pattern=NO_NUL)]
Text = Annotated[str, Field(strict=True, max_length=LONGEST_TEXT)]  # "" is none
Stars = Annotated[float, Field(strict=True, ge=1, le=5, allow_inf_nan=False)]
Price = Annotated[float, Field(strict=True, ge=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Whole(0, LARGEST)]
Difference = Annotated[int, Whole(-(2**31), 2**31 - 1)]  # `model` holds them in 32 bits
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Sum = Annotated[float, Field(strict=True, ge=0, le=1e21)]  # of up to LARGEST stars or errors
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Distribution = Annotated[list[Share], Field(min_length=5, max_length=5)]
Interval = Annotated[list[Real], Field(min_length=2, max_length=2)]

Action = Literal["view", "click", "wishlist", "share", "cart", "remove_from_cart", "purchase"]
Kind = Literal["interaction", "review", "request"]
Tier = Literal["global", "item_text", "item_state", "user_state", "full"]
Stage = Literal["stable", "canary", "shadow", "retired"]
Role = Literal["stable", "canary", "shadow"]


class Record(BaseModel):
    """The base of all records: unknown fields left out, values never changed after decoding."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Source(Record):
    """The position of an input record in Kafka."""

    topic: str
    partition: Count
    offset: Count


class Review(Record):
    """A shopper's review of an item; it may carry stars, words, or both."""

    event_id: Identifier
    user_id: Identifier
    item_id: Identifier
    event_time: Time
    rating: Stars | None = None
    title: Text | None = None
    text: Text | None = None


class Behavior(Record):
    """One thing that a shopper did with an item."""

    event_id: Identifier
    user_id: Identifier
    item_id: Identifier
    event_time: Time
    action: Action
    price: Price | None = None
    quantity: Annotated[float, Field(strict=True, gt=0, le=1e6, allow_inf_nan=False)] | None = None
    session_id: Identifier | None = None


class ScoreRequest(Record):
    """Items to be scored and ranked for a user; expired `deadline_ms` after they reached Kafka."""

    request_id: Identifier
    user_id: Identifier
    item_ids: Annotated[list[Identifier], Field(min_length=1, max_length=MOST_ITEMS)]
    event_time: Time
    deadline_ms: Annotated[int, Whole(1, 3_600_000)] | None = None


class Item(Record):
    """What is known of an item. The category is a path, widest first."""

    item_id: Identifier
    event_time: Time
    title: Text | None = None
    brand: Identifier | None = None
    category: Annotated[list[Identifier], Field(max_length=16)] | None = None
    price: Price | None = None
    description: Text | None = None


class User(Record):
    """What is known of a user beside their events."""

    user_id: Identifier
    event_time: Time
    gender: Identifier | None = None
    age: Annotated[float, Field(strict=True, ge=0, le=150, allow_inf_nan=False)] | None = None
    region: Identifier | None = None


class PredictedRating(Record):
    """A predicted rating: of an interaction, of a review's text, or of a requested item.

    Of a request that expired, nothing was predicted: there is neither rating nor model.
    """

    event_id: Identifier | None = None
    request_id: Identifier | None = None
    user_id: Identifier
    item_id: Identifier
    event_time: Time
    predicted_at: Time
    kind: Kind
    rating: Stars | None = None
    distribution: Distribution | None = None
    interval: Interval | None = None
    tier: Tier | None = None  # absent when predicted from the review's own text
    model_version: str | None = None
    source: Source
    seq: Count | None = None  # interaction: position in the user partition's row of predictions
    rank: Count | None = None  # request: 1 is the best of `of` items
    of: Count | None = None
    status: Literal["ok", "expired"] | None = None


class TextFeatures(Record):
    """What a review's text says of its stars, for the user's state."""

    event_id: Identifier
    user_id: Identifier
    item_id: Identifier
    event_time: Time
    distribution: Distribution
    encoder: str


class UpdateSource(Record):
    """The span of input records that an item update sums up."""

    topic: str
    partition: Count
    first_offset: Count
    last_offset: Count


class ItemUpdate(Record):
    """What one batch did to one item. Sums are differences: an edited review replaces its stars."""

    item_id: Identifier
    source: UpdateSource
    counts: dict[str, Difference]  # by action, "review" among them
    rating_count: Difference = 0
    rating_sum: Real = 0.0
    rating_square_sum: Real = 0.0
    rating_histogram: Annotated[list[Difference], Field(min_length=5, max_length=5)] = [0] * 5
    price_count: Difference = 0
    price_log_sum: Real = 0.0
    sessions: Difference = 0
    first_event_time: Time
    last_event_time: Time


class ErrorSums(Record):
    """Sums over predictions whose true rating was seen."""

    count: Count = 0
    squared: Sum = 0.0
    absolute: Sum = 0.0
    rating: Sum = 0.0  # true
    predicted: Sum = 0.0


class ScoreDigest(Record):
    """What one worker scored in one window with one model in one role."""

    worker: str
    digest_id: str
    window_start: Time
    window_end: Time
    model_version: str
    role: Role = "stable"  # a shadow's predictions were published nowhere
    tried_since: Time | None = None  # of a version on trial
    kinds: dict[str, Count]
    tiers: dict[str, Count]
    actions: dict[str, Count]
    stars: Annotated[list[Count], Field(min_length=5, max_length=5)]  # predicted, rounded
    predicted_sum: Sum
    errors: ErrorSums
    errors_by_tier: dict[str, ErrorSums]
    top_items: dict[str, Count]
    lag: Count
    latency_ms: str | None = None  # a KLL sketch of event to prediction, base64


class Alert(Record):
    """A threshold in settings that a window crossed."""

    alert_id: str
    rule: str
    severity: Literal["info", "warning", "critical"]
    window_start: Time
    window_end: Time
    value: Real
    threshold: Real
    subject: str
    text: str


class ModelUpdate(Record):
    """A nudge: the registry has changed. The registry is the truth."""

    version: str
    sha256: str
    stage: Stage
    share: Share
    at: Time
    by: str
    reason: str


class Header(Record):
    """One Kafka header of a dead letter, its value in base64."""

    key: str
    value: str | None = None


class DeadLetter(Record):
    """A record that could not be decoded, validated or scored, with all needed to send it again."""

    key: str | None = None  # base64
    value: str | None = None  # base64
    headers: list[Header] = []
    source: Source
    processor: str
    reason: str
    field: str | None = None
    first_failed_at: Time
    attempts: Annotated[int, Whole(1, LARGEST)] = 1
