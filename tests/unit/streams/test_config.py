import pytest
from confluent_kafka import Consumer
from pydantic import ValidationError

from streams.clients import client_config
from streams.config import KafkaConfig, ScorerConfig
from streams.fetching import fetching


def test_no_time_is_longer_than_the_kafka_client_takes() -> None:
    kafka, scorer = KafkaConfig(session_timeout_ms=300_000), ScorerConfig(linger_ms=600_000)
    options = {
        "group.id": "g",
        "session.timeout.ms": kafka.session_timeout_ms,
        **fetching(scorer.linger_ms / 1_000, partitions=24),
    }
    Consumer(client_config(kafka, **options)).close()
    with pytest.raises(ValidationError, match="session_timeout_ms"):
        KafkaConfig(session_timeout_ms=300_001)
    with pytest.raises(ValidationError, match="linger_ms"):
        ScorerConfig(linger_ms=600_001)
