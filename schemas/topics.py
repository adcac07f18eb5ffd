"""The one table of topics. Commands, AsyncAPI, the archive and the docs are made from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from math import inf
from typing import Literal

from schemas import records
from schemas.records import Record

FOREVER = timedelta(milliseconds=-1)  # Kafka's retention.ms of -1
USUAL_MESSAGE = 1_048_588  # bytes; Kafka's own default of max.message.bytes
LARGEST_MESSAGE = 4 * 1024 * 1024  # bytes; producers' message.max.bytes must allow it


@dataclass(frozen=True)
class Topic:
    """One topic of the contract.

    `keyed` topics have `partitions` as set when the cluster was made (settings), all the same, so
    that all that is said of one user, or of one item, lies in one partition number. The others
    have one partition. `journal` values are Arrow, all others JSON of `record`. A null value
    deletes what is known of its key in compacted topics and in those that say so.
    """

    name: str
    key: str
    record: type[Record] | None
    meaning: str
    keyed: bool = True
    cleanup: Literal["delete", "compact"] = "delete"
    retention: timedelta = timedelta(days=7)
    timestamp: Literal["CreateTime", "LogAppendTime"] = "CreateTime"
    largest_message: int = USUAL_MESSAGE  # bytes
    forgets: bool = False  # a null value erases its key's user from the states
    transactional: bool = False  # written by our own transactions, whose ends have offsets too
    after: str | None = None  # of whose records its own tell: who works on both has those first
    # How brokers pack what comes. Snappy makes at most 21 bytes of one: a batch of 5 KB that is
    # 150 MB of zeros, which no client would unpack, is over `max.message.bytes` then, and refused.
    compression: Literal["producer", "snappy"] = "producer"

    @property
    def takes_null(self) -> bool:
        """Whether a null value says something."""
        return self.forgets or self.cleanup == "compact"

    def partitions(self, keyed: int) -> int:
        """Its partitions, where keyed topics have `keyed`."""
        return keyed if self.keyed else 1

    def config(self) -> dict[str, str]:
        """The topic's configuration as Kafka names it."""
        return {
            "cleanup.policy": self.cleanup,
            "retention.ms": str(int(self.retention / timedelta(milliseconds=1))),
            "message.timestamp.type": self.timestamp,
            "max.message.bytes": str(self.largest_message),
            "compression.type": self.compression,
        }

    def differences(self, found: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """Setting → (as found, as wanted) of what a topic has otherwise.

        A longer retention is none: to take it back would delete what somebody wants to keep.
        """
        return {
            name: (found[name], wanted)
            for name, wanted in self.config().items()
            if found.get(name, wanted) != wanted
            and not (name == "retention.ms" and _retained(found[name]) > _retained(wanted))
        }


def _retained(milliseconds: str) -> float:
    """What `retention.ms` says, in milliseconds."""
    return inf if int(milliseconds) < 0 else int(milliseconds)


TOPICS: tuple[Topic, ...] = (
    Topic(
        "reviews",
        "user_id",
        records.Review,
        "Reviews, with stars, words or both; a null value erases the user.",
        timestamp="LogAppendTime",
        forgets=True,
        compression="snappy",
    ),
    Topic(
        "behavior",
        "user_id",
        records.Behavior,
        "What shoppers do with items; a null value erases the user.",
        timestamp="LogAppendTime",
        forgets=True,
        compression="snappy",
    ),
    Topic(
        "score-requests",
        "user_id",
        records.ScoreRequest,
        "Items to be scored and ranked for a user.",
        retention=timedelta(days=1),
        timestamp="LogAppendTime",
        compression="snappy",
    ),
    Topic(
        "items",
        "item_id",
        records.Item,
        "What is known of items; a null value deletes.",
        cleanup="compact",
        retention=FOREVER,
        compression="snappy",
    ),
    Topic(
        "users",
        "user_id",
        records.User,
        "What is known of users; a null value deletes.",
        cleanup="compact",
        retention=FOREVER,
        compression="snappy",
    ),
    Topic(
        "predicted-ratings",
        "user_id",
        records.PredictedRating,
        "Predicted ratings.",
        transactional=True,
    ),
    Topic(
        "journal",
        "user partition",
        None,
        "Each applied event in order, with its feature row: the truth behind the store.",
        transactional=True,
    ),
    Topic(
        "text-features",
        "user_id",
        records.TextFeatures,
        "What review texts say of their stars; a null value erases the user.",
        timestamp="LogAppendTime",
        forgets=True,
        after="reviews",
        transactional=True,
    ),
    Topic(
        "item-updates",
        "item_id",
        records.ItemUpdate,
        "What one batch did to one item.",
        transactional=True,
    ),
    Topic(
        "score-digests",
        "worker",
        records.ScoreDigest,
        "What workers scored.",
        keyed=False,
        transactional=True,
    ),
    Topic("alerts", "rule", records.Alert, "Thresholds that were crossed.", keyed=False),
    Topic(
        "model-updates",
        "version",
        records.ModelUpdate,
        "A nudge that the registry has changed.",
        keyed=False,
        cleanup="compact",
        retention=FOREVER,
    ),
    Topic(
        "dead-letters",
        "source topic",
        records.DeadLetter,
        "Records that could not be used, with their bytes.",
        keyed=False,
        retention=timedelta(days=30),
        largest_message=LARGEST_MESSAGE,  # a usual message in base64, and what is said of it
        transactional=True,
    ),
)

BY_NAME: dict[str, Topic] = {topic.name: topic for topic in TOPICS}
