import pytest

from schemas.topics import BY_NAME, LARGEST_MESSAGE, TOPICS, USUAL_MESSAGE


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(TOPICS)


def test_topics_of_a_user_meet_in_one_partition_number() -> None:
    for name in ("reviews", "behavior", "text-features", "journal", "predicted-ratings"):
        assert BY_NAME[name].partitions(8) == 8
    assert BY_NAME["dead-letters"].partitions(8) == 1


def test_configuration_is_as_kafka_names_it() -> None:
    items = BY_NAME["items"].config()
    assert items["cleanup.policy"] == "compact"
    assert items["retention.ms"] == "-1"
    assert BY_NAME["score-requests"].config()["retention.ms"] == "86400000"


DAY = 86_400_000


@pytest.mark.parametrize(
    ("name", "retention", "differs"),
    [
        ("journal", 7 * DAY, False),
        ("journal", 6 * DAY, True),
        ("journal", 30 * DAY, False),  # an operator's, whose archiver is down
        ("journal", -1, False),
        ("items", -1, False),
        ("items", 30 * DAY, True),
    ],
)
def test_a_longer_retention_is_left_alone(name: str, retention: int, differs: bool) -> None:
    topic = BY_NAME[name]
    found = {**topic.config(), "retention.ms": str(retention), "min.insync.replicas": "2"}
    wanted = topic.config()["retention.ms"]
    expected = {"retention.ms": (str(retention), wanted)} if differs else {}
    assert topic.differences(found) == expected


def test_what_a_broker_does_not_tell_is_no_difference() -> None:
    found = {"max.message.bytes": "9000000", "compression.type": "snappy"}
    wanted = ("9000000", str(USUAL_MESSAGE))
    assert BY_NAME["reviews"].differences(found) == {"max.message.bytes": wanted}


@pytest.mark.parametrize("name", ["reviews", "behavior", "score-requests", "text-features"])
def test_what_is_scored_is_dated_by_the_broker(name: str) -> None:
    """Deadlines, events from the future and the order among topics hang on one clock."""
    assert BY_NAME[name].config()["message.timestamp.type"] == "LogAppendTime"


def test_what_others_write_cannot_be_packed_without_bounds() -> None:
    packed = {topic.name for topic in TOPICS if topic.config()["compression.type"] == "snappy"}
    assert packed == {"reviews", "behavior", "score-requests", "items", "users"}


def test_a_dead_letter_holds_the_largest_message_in_base64() -> None:
    assert USUAL_MESSAGE * 4 / 3 * 2 < LARGEST_MESSAGE  # key and value, and room for the rest
    assert BY_NAME["dead-letters"].config()["max.message.bytes"] == str(LARGEST_MESSAGE)
