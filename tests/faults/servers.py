"""Servers that fail: three Kafka brokers, a store with replica and sentinels, a store cluster.

Workers reach all of them through a proxy; the harness itself goes round it.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.faults.kafka import KafkaCluster
from tests.faults.proxy import Proxy
from tests.faults.stores import ClusterStore, SentinelStore


@dataclass
class Servers:
    """All of them."""

    proxy: Proxy
    kafka: KafkaCluster
    sentinel: SentinelStore
    cluster: ClusterStore
    stack: ExitStack

    def close(self) -> None:
        self.stack.close()


def start_servers(folder: Path) -> Servers:
    """Start all servers, with their data and logs in `folder`."""
    stack = ExitStack()
    try:
        proxy = Proxy()
        stack.callback(proxy.close)
        kafka = KafkaCluster(folder / "kafka", proxy)
        stack.callback(kafka.close)
        sentinel = SentinelStore(folder / "sentinel", proxy)
        stack.callback(sentinel.close)
        cluster = ClusterStore(folder / "cluster", proxy)
        stack.callback(cluster.close)
        return Servers(proxy, kafka, sentinel, cluster, stack)
    except BaseException:
        stack.close()
        raise
