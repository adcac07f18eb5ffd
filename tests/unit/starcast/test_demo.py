"""What the demo takes from settings, and what it does not."""

import json
from pathlib import Path

from pydantic import SecretStr

from starcast.demo import _Answer, _summarise, embedded_settings
from starcast.settings import Settings, variables
from streams.config import KafkaConfig, RedisConfig, WebConfig
from streams.embedded import Endpoints
from streams.insights import broker_credentials
from streams.producer import Outgoing


def test_the_demo_reaches_its_own_servers_whatever_a_shops_servers_are(tmp_path: Path) -> None:
    shop = Settings(
        kafka=KafkaConfig(
            bootstrap_servers="kafka:9093",
            partitions=64,
            group_protocol="consumer",
            options={"security.protocol": "SASL_SSL", "sasl.oauthbearer.method": "oidc"},
        ),
        redis=RedisConfig(url=SecretStr("redis://store:6379/0"), cluster=True),
    )
    shop.models.encoder, shop.web.port = "none", 8081
    shop.trainer.tracking.mlflow_uri = "https://mlflow"
    shop.trainer.tracking.wandb_project = "shop"
    own = embedded_settings(shop, Endpoints("127.0.0.1:1", "redis://127.0.0.1:2/0"), tmp_path)
    said = variables(own)  # which its processes get
    assert said["STARCAST_KAFKA__BOOTSTRAP_SERVERS"] == "127.0.0.1:1"
    assert said["STARCAST_KAFKA__GROUP_PROTOCOL"] == "classic"
    assert said["STARCAST_KAFKA__EXACTLY_ONCE"] == "false"
    assert said["STARCAST_KAFKA__OPTIONS__SECURITY_PROTOCOL"] == "PLAINTEXT"
    assert broker_credentials(own.kafka) is None  # of insights, which has no OAUTHBEARER
    assert said["STARCAST_REDIS__URL"] == "redis://127.0.0.1:2/0"
    assert said["STARCAST_REDIS__CLUSTER"] == "false"
    assert said["STARCAST_ARCHIVE__URL"] == str(tmp_path / "archive")
    # Not left out: a process would take them from the shop's settings file.
    assert said["STARCAST_TRAINER__TRACKING__MLFLOW_URI"] == ""
    assert said["STARCAST_TRAINER__TRACKING__WANDB_PROJECT"] == ""
    assert said["STARCAST_TRAINER__TRACKING__FOLDER"] == str(tmp_path / "runs")
    assert (own.models.encoder, own.web.port) == ("none", 8081)
    assert shop.kafka.bootstrap_servers == "kafka:9093"


def test_any_free_port_is_one_that_can_be_told(tmp_path: Path) -> None:
    shop = Settings(web=WebConfig(port=0))
    own = embedded_settings(shop, Endpoints("127.0.0.1:1", "redis://127.0.0.1:2/0"), tmp_path)
    assert own.web.port > 0


def review(number: int, stars: float) -> Outgoing:
    value = {"event_id": f"r-{number}", "user_id": "u", "item_id": "i", "rating": stars}
    return Outgoing("reviews", b"u", json.dumps(value).encode())


def answer(offset: int, number: int, rating: float) -> _Answer:
    return _Answer(("reviews", 0, offset), f"r-{number}", rating, "ladder")


def test_a_dead_letter_of_an_item_hides_no_event_that_is_lost() -> None:
    records = [Outgoing("items", b"i", b"{}"), *(review(number, 4) for number in range(3))]
    letters = [("items", 0, 0), ("reviews", 0, 1)]
    summary = _summarise(records, [1, 2, 3], 2, [answer(0, 0, 4)], letters)
    assert (summary.events, summary.predictions, summary.dead_letters) == (3, 1, 2)
    assert summary.lost == 1


def test_an_event_that_was_read_by_two_processors_has_two_letters_and_is_one() -> None:
    letters = [("reviews", 0, 0), ("reviews", 0, 0)]
    assert _summarise([review(0, 4), review(1, 4)], [0, 1], 1, [], letters).lost == 1


def test_a_review_that_is_there_twice_is_measured_before_its_rating_is_known() -> None:
    records = [review(0, 5), review(1, 2), review(1, 2)]
    answers = [answer(0, 0, 4), answer(1, 1, 4), answer(2, 1, 2)]
    summary = _summarise(records, [0, 1, 2], 1, answers, [])
    assert summary.rmse["model"] == 2
    assert (summary.lost, summary.duplicated) == (0, 0)
