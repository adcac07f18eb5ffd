from prometheus_client import CollectorRegistry, generate_latest

from streams.metrics import make_metrics


def test_names_are_those_of_the_dashboards_and_rules_that_read_them() -> None:
    metrics = make_metrics(CollectorRegistry())
    metrics.events.labels("scorer", "review").inc(3)
    metrics.batch_seconds.labels("scorer", "decode").observe(0.002)
    metrics.lag.labels("scorer", "reviews", "0").set(7)
    metrics.dead_letters.labels("scorer", "contract").inc()
    metrics.predictions.labels("interaction", "full", "a").inc()
    metrics.state_writes.labels("scorer", "written").inc()
    metrics.rebalances.labels("scorer").inc()
    metrics.duplicates.labels("scorer").inc()
    metrics.disorder.labels("scorer", "late").inc(2)
    text = generate_latest(metrics.registry).decode()
    for line in (
        'starcast_events_total{kind="review",processor="scorer"} 3.0',
        'starcast_batch_seconds_bucket{le="0.0025",phase="decode",processor="scorer"} 1.0',
        'starcast_lag{partition="0",processor="scorer",topic="reviews"} 7.0',
        'starcast_dead_letters_total{processor="scorer",reason="contract"} 1.0',
        'starcast_predictions_total{kind="interaction",model_version="a",tier="full"} 1.0',
        'starcast_state_writes_total{outcome="written",processor="scorer"} 1.0',
        'starcast_rebalances_total{processor="scorer"} 1.0',
        'starcast_duplicates_total{processor="scorer"} 1.0',
        'starcast_disorder_total{kind="late",processor="scorer"} 2.0',
    ):
        assert line in text


def test_two_processes_metrics_do_not_meet() -> None:
    one, other = make_metrics(), make_metrics()
    one.rebalances.labels("scorer").inc()
    assert b'starcast_rebalances_total{processor="scorer"}' not in generate_latest(other.registry)
    assert b"process_resident_memory_bytes" in generate_latest(other.registry)
