"""What a shop of any size would need, computed from what was measured on one machine.

Nothing here is measured: it multiplies measured costs by rates, and says what it assumes. Machines
run scorers, broker and store alone; items, catalog, texts, answers, archiver and insights come on
top, as does whatever a network between machines costs.
"""

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from schemas.exceptions import StarcastError

DAY_SECONDS = 86_400
MONTH_HOURS = 730
MOST_PARTITIONS = 4_096  # that settings allow
LABEL = "computed, not measured"


@dataclass(frozen=True)
class Measured:
    """What one event and one user cost here."""

    worker_us: float  # processor time an event
    kafka_us: float  # without replicas
    store_us: float
    kafka_bytes: float  # an event leaves in Kafka's logs, one replica
    user_bytes: float  # in the store
    worker_mb: float


@dataclass(frozen=True)
class Wanted:
    """The shop, and how its machines are run."""

    users: float
    events_per_second: float
    utilization: float = 0.5  # of a core: the rest is for peaks, and for the work of one that died
    store_copies: int = 2  # a primary and a replica
    kafka_copies: int = 3
    retention_days: float = 7.0  # as the table of topics has it
    partitions_a_worker: int = 2  # so that a fleet can grow by half and still be even
    machine_cores: int = 32
    machine_gb: float = 128.0
    core_hour: float | None = None  # price, in any currency
    gb_month: float | None = None  # price of disk


@dataclass(frozen=True)
class Needed:
    """What that takes."""

    workers: int
    worker_cores: float
    kafka_cores: float
    store_cores: float
    store_primaries: int  # a store computes on one core
    store_gb: float  # all copies
    memory_gb: float  # of store and workers
    partitions: int
    kafka_disk_tb: float  # all copies
    machines: int
    cost_a_month: float | None

    def figures(self, measured: Measured, wanted: Wanted) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "label": LABEL,
            "measured": asdict(measured),
            "assumed": asdict(wanted),
            "assumptions": assumptions(wanted),
            **asdict(self),
        }


def extrapolate(measured: Measured, wanted: Wanted) -> Needed:
    """Cores from processor time an event, memory from bytes a user; machines, what needs more.

    Raises StarcastError when that takes more partitions than there may be.
    """
    events = wanted.events_per_second

    def cores(microseconds: float, copies: int = 1) -> float:
        return events * microseconds * copies / 1e6 / wanted.utilization

    workers = ceil(cores(measured.worker_us))
    primaries = ceil(cores(measured.store_us))
    store_cores = float(primaries * wanted.store_copies)
    kafka_cores = cores(measured.kafka_us, wanted.kafka_copies)
    total = workers + kafka_cores + store_cores
    store_gb = wanted.users * measured.user_bytes * wanted.store_copies / 1e9
    memory_gb = store_gb + workers * measured.worker_mb * 2**20 / 1e9
    partitions = power_of_two(workers * wanted.partitions_a_worker)
    if partitions > MOST_PARTITIONS:
        raise StarcastError(
            f"{workers:,} workers need {partitions:,} partitions, and settings allow "
            f"{MOST_PARTITIONS:,}: compute a shop for each of several groups of users."
        )
    seconds = wanted.retention_days * DAY_SECONDS
    disk = events * measured.kafka_bytes * seconds * wanted.kafka_copies / 1e12
    machines = max(ceil(total / wanted.machine_cores), ceil(memory_gb / wanted.machine_gb))
    cost = None
    if wanted.core_hour is not None:
        cost = machines * wanted.machine_cores * MONTH_HOURS * wanted.core_hour
        cost += disk * 1_000 * (wanted.gb_month or 0.0)
    return Needed(
        workers,
        cores(measured.worker_us),
        kafka_cores,
        store_cores,
        primaries,
        store_gb,
        memory_gb,
        partitions,
        disk,
        machines,
        cost,
    )


def power_of_two(least: int) -> int:
    """The lowest power of two that is not below `least`."""
    return 1 << max(least - 1, 0).bit_length()


def assumptions(wanted: Wanted) -> list[str]:
    """What must hold for the numbers to hold."""
    return [
        "cost an event is what it was here: same mix of events, transactions full, "
        f"{wanted.partitions_a_worker} partitions a worker",
        f"cores are busy for {wanted.utilization:.0%}; a core elsewhere is as fast as one here",
        f"each of Kafka's {wanted.kafka_copies} replicas costs as much processor as the leader",
        "what Kafka's leaders spend to take the shop's events in is not counted",
        "replicas of the store cost as much processor and memory as the primary",
        "partitions and slots are even: no user and no item has a large share of all events",
        "items, vectors and attributes are small beside users' states",
        "scorers, Kafka and store alone; a network that carries it",
        f"at most {MOST_PARTITIONS:,} partitions: settings allow no more",
        f"cost a month = machines × {wanted.machine_cores} cores × {MONTH_HOURS} hours × price of "
        "a core hour + GB of Kafka's disk × price of a GB a month",
    ]
