"""What processors count and time, for Prometheus. All metrics are declared here."""

from dataclasses import dataclass
from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

BATCH_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


@dataclass(frozen=True)
class Metrics:
    """The metrics of one process; every processor in it names itself in the `processor` label."""

    registry: CollectorRegistry
    events: Counter  # processor, kind
    batch_seconds: Histogram  # processor, phase
    lag: Gauge  # processor, topic, partition
    dead_letters: Counter  # processor, reason (contract, future)
    predictions: Counter  # kind, tier, model_version
    state_writes: Counter  # processor, outcome
    rebalances: Counter  # processor
    duplicates: Counter  # processor
    disorder: Counter  # processor, kind (late, out_of_order, future)
    misplaced: Counter  # processor
    lost: Counter  # processor, topic, partition
    newcomers: Gauge  # processor, partition
    model: Gauge  # version
    promoted: Gauge
    canary: Gauge  # version
    covered: Gauge


def make_metrics(registry: CollectorRegistry | None = None) -> Metrics:
    """Metrics on `registry`, or on a fresh one that also tells of the process and the platform."""
    if registry is None:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
    counter = partial(Counter, registry=registry)
    gauge = partial(Gauge, registry=registry)
    histogram = partial(Histogram, registry=registry)
    return Metrics(
        registry=registry,
        events=counter("starcast_events", "Events that were processed.", ("processor", "kind")),
        batch_seconds=histogram(
            "starcast_batch_seconds",
            "Seconds that a batch took, by phase.",
            ("processor", "phase"),
            buckets=BATCH_SECONDS,
        ),
        lag=gauge(
            "starcast_lag",
            "Records between a processor's position and the end of its partition.",
            ("processor", "topic", "partition"),
        ),
        dead_letters=counter(
            "starcast_dead_letters",
            "Records that were sent to dead-letters: they break the contract, or say that they "
            "are from the future.",
            ("processor", "reason"),
        ),
        predictions=counter(
            "starcast_predictions",
            "Predicted ratings that were published.",
            ("kind", "tier", "model_version"),
        ),
        state_writes=counter(
            "starcast_state_writes",
            "Keys that were written to the store, and times that it refused an owner (fenced) or "
            "did not answer (failed), by outcome.",
            ("processor", "outcome"),
        ),
        rebalances=counter(
            "starcast_rebalances",
            "Times that partitions were assigned, revoked or lost.",
            ("processor",),
        ),
        duplicates=counter(
            "starcast_duplicates",
            "Records that had been seen before and were not applied again.",
            ("processor",),
        ),
        disorder=counter(
            "starcast_disorder",
            "Events whose time does not fit: long before Kafka took them (late), before an earlier "
            "event of their user (out_of_order), or long after Kafka took them (future: a dead "
            "letter).",
            ("processor", "kind"),
        ),
        misplaced=counter(
            "starcast_misplaced",
            "Records in a partition that is not their user's or item's: their producer took "
            "another key or another partitioner.",
            ("processor",),
        ),
        lost=counter(
            "starcast_lost_records",
            "Records that retention deleted before they were read.",
            ("processor", "topic", "partition"),
        ),
        newcomers=gauge(
            "starcast_newcomers_level_stars",
            "Stars by which newcomers lately rate apart, as far as it is believed: far from 0 in a "
            "storm of reviews.",
            ("processor", "partition"),
        ),
        model=gauge("starcast_model_info", "1 for the model version in service.", ("version",)),
        promoted=gauge(
            "starcast_model_promoted_timestamp_seconds",
            "When the stable version was promoted, seconds since 1970; 0: there is none.",
        ),
        canary=gauge(
            "starcast_canary_share",
            "Share of users whom the version on trial answers; 0: a shadow, which answers nobody.",
            ("version",),
        ),
        covered=gauge(
            "starcast_encoder_covered",
            "Of the items that the encoder in service has read, the share that the encoder of a "
            "version that is to serve has read too; 1: no version waits.",
        ),
    )
