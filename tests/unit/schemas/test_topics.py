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
