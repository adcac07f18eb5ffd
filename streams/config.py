"""Settings of the stream processors; `starcast config` prints them."""

from typing import Literal

from pydantic import BaseModel, Field, SecretStr

from schemas.spans import Days, Seconds

POLL_MILLISECONDS = 300_000  # librdkafka's max.poll.interval.ms, where a shop sets no other


class KafkaConfig(BaseModel):
    """How to reach Kafka, and under which names."""

    bootstrap_servers: str = Field(
        default="127.0.0.1:9092", description="host:port, comma separated"
    )
    group_id: str = Field(default="starcast", description="prefix of our consumer groups")
    topic_prefix: str = Field(default="", description="put before every topic's name")
    partitions: int = Field(default=8, ge=1, le=4096, description="of keyed topics, fixed at birth")
    replication: int = Field(default=1, ge=1, le=16, description="replication factor of new topics")
    exactly_once: bool = Field(default=True, description="one transaction for outputs and offsets")
    group_protocol: str = Field(
        default="classic",
        pattern="^(classic|consumer)$",
        description="classic, or consumer (KIP-848)",
    )
    session_timeout_ms: int = Field(
        default=6_000,
        ge=1_000,
        le=POLL_MILLISECONDS,  # which may not be shorter
        description="a silent worker loses its partitions after this",
    )
    options: dict[str, str] = Field(
        default_factory=dict[str, str],
        repr=False,  # may hold passwords
        description="any librdkafka option: STARCAST_KAFKA__OPTIONS__SECURITY_PROTOCOL=SSL",
    )


class RedisConfig(BaseModel):
    """How to reach Redis or Valkey."""

    url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"),
        description="redis://, rediss://, unix:// or redis[s]+sentinel://HOST:PORT,HOST:PORT/NAME",
    )
    cluster: bool = Field(default=False, description="the URL names a node of a Redis Cluster")
    key_prefix: str = Field(default="starcast", description="put before every key")


class ArchiveConfig(BaseModel):
    """Where the archived topics lie."""

    url: str = Field(default=".starcast/archive", description="a folder or an object store URL")
    options: dict[str, SecretStr] = Field(
        default_factory=dict[str, SecretStr], description="storage options, as deltalake names them"
    )
    flush_seconds: Seconds = Field(
        default=5.0, gt=0, description="longest wait before rows are committed"
    )
    flush_rows: int = Field(default=20_000, ge=1, description="most rows in one commit")
    compact_every: int = Field(
        default=100, ge=2, description="commits between two compactions of a table"
    )

    @property
    def storage_options(self) -> dict[str, str]:
        """The options as deltalake takes them, secrets told."""
        return {name: value.get_secret_value() for name, value in self.options.items()}


class ModelsConfig(BaseModel):
    """Where bundles and the registry lie, and which text encoder a first bundle starts from."""

    url: str = Field(default=".starcast/models", description="a folder or an object store URL")
    encoder: str = Field(
        default="auto",
        description="a Hugging Face directory, which says in sentence_bert_config.json at how many "
        "tokens texts are cut (256 if it does not); auto: the packaged MiniLM; none: no texts",
    )
    device: str = Field(default="auto", description="auto, cpu or cuda")
    poll_seconds: Seconds = Field(
        default=2.0, gt=0, description="how often the registry is looked at"
    )
    encoder_wait_seconds: Seconds = Field(
        default=21_600,
        ge=0,
        description="a version with another encoder serves once that has read all items, or after "
        "so long; 0: at once",
    )
    threads: int = Field(
        default=1,
        ge=0,
        description="torch threads a process: more help texts alone, on idle cores; 0: all cores",
    )


class StatesConfig(BaseModel):
    """How long states live, and how many a worker keeps at hand."""

    expire_after_days: Days = Field(
        default=0, ge=0, description="drop states this long after their last event; 0: never"
    )
    cache_users: int = Field(
        default=200_000, ge=0, description="user states a worker keeps in memory"
    )


class ScorerConfig(BaseModel):
    """The scorer's micro-batches."""

    batch_events: int = Field(
        default=2_000,
        ge=1,
        le=100_000,
        description="most events in a transaction; of a worker of more than 16 partitions more in "
        "proportion, up to four times as many, though not above 8,000",
    )
    linger_ms: int = Field(
        default=20,
        ge=0,
        le=600_000,  # brokers wait for the half: librdkafka's longest fetch.wait.max.ms
        description="longest wait for a fuller batch when no transaction is under way",
    )
    latency_target_ms: int = Field(
        default=0,
        ge=0,
        description="transactions shrink so that an event is predicted within this; 0: never",
    )
    digest_seconds: Seconds = Field(default=1.0, gt=0, description="window of one score digest")
    longest_future_seconds: Seconds = Field(
        default=86_400, gt=0, description="an event further in the future is a dead letter"
    )


class TextsConfig(BaseModel):
    """The text lane."""

    token_budget: int = Field(default=4_096, ge=64, description="tokens in one micro-batch")
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="of the encoder's products on a GPU; on a CPU always fp32"
    )
    age_limit_days: Days = Field(default=0, ge=0, description="older texts are skipped; 0: none is")
    batch_texts: int = Field(default=64, ge=1, description="most texts in a transaction")


class InsightsConfig(BaseModel):
    """Sliding windows and the thresholds of alerts."""

    window_seconds: Seconds = Field(default=60, gt=0, description="length of a sliding window")
    step_seconds: Seconds = Field(default=5, gt=0, description="a window is written this often")
    grace_seconds: Seconds = Field(
        default=2, ge=0, description="a step stays open this long for digests that come late"
    )
    keep_windows: int = Field(default=720, ge=1, description="windows kept for the dashboard")
    top: int = Field(default=10, ge=1, le=100, description="most items listed in a window")
    highest_rmse: float = Field(
        default=1.5, gt=0, description="alert above this root mean squared error"
    )
    least_rated: int = Field(default=50, ge=1, description="fewest rated events for an error alert")
    highest_lag: int = Field(
        default=100_000, ge=1, description="alert above this many events of lag"
    )
    largest_drift: float = Field(
        default=0.75, gt=0, description="alert when mean predicted and true rating differ by more"
    )
    worse_canary: float = Field(
        default=3.0,
        gt=0,
        description="alert when a canary's mean absolute error is this many standard errors "
        "above stable's",
    )
    clear_ratio: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="an alert may come again once below this part of its threshold",
    )


class WebConfig(BaseModel):
    """The dashboard, and each processor's health and metrics."""

    host: str = Field(default="127.0.0.1", description="address that the dashboard listens on")
    port: int = Field(
        default=8080, ge=0, le=65535, description="the dashboard's port; 0: any free one"
    )
    hosts: str = Field(
        default="",
        pattern=r"^[^*\s]*$",
        description="names by which browsers may ask for the dashboard beside this machine's own, "
        "comma separated; empty: none where it listens to this machine alone, else any",
    )
    metrics_host: str = Field(default="127.0.0.1", description="address of health and metrics")
    metrics_port: int = Field(
        default=9100,
        ge=0,
        le=65535,
        description="port of health and metrics of processors; 0: none",
    )
