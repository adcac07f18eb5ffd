"""What the demo takes from settings, and what it does not."""

from pathlib import Path

from pydantic import SecretStr

from starcast.demo import embedded_settings
from starcast.settings import Settings, variables
from streams.config import KafkaConfig, RedisConfig
from streams.embedded import Endpoints
from streams.insights import broker_credentials


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
