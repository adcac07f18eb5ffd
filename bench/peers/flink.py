"""PyFlink's Table API: a vectorised function between two Kafka tables, exactly-once.

The Python DataStream API has a KafkaSource too, but it hands over values without topic, partition
and offset, which the work needs; the table connector, the same source and sink underneath, gives
them as metadata columns. A pandas function gets an Arrow batch of rows, and Flink ends all batches
before a checkpoint's barrier, so offsets, predictions and their transaction agree. Events that a
ProcessFunction gathers in a list would be outside the checkpoint.

User states are in Redis. The job runs in Flink's own mini cluster with parallelism 1, its function
in a thread of the client, as PyFlink has it without a cluster; all processes are measured. A
bundle is one Arrow batch, so that a call begins when all before is with the sink, as `Pace` takes
it. Larger bundles let the JVM encode ahead while Python works; of four and of ten batches they
seemed to take less time, but a run then leaves out what the JVM does before and after. Tried too:
a worker process of its own, which fails (PyFlink puts another `print` in place of Python's there,
with which numba does not import), and a checkpoint a second (batches of 1,333 to 1,412 events,
since each ends one early). Thread mode is not tried: Python is called there for each row.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import orjson
import pandas as pd
from pyflink.table import (  # pyright: ignore[reportMissingImports]
    DataTypes,
    EnvironmentSettings,
    Schema,
    TableDescriptor,
    TableEnvironment,
)
from pyflink.table.udf import (  # pyright: ignore[reportMissingImports]
    FunctionContext,
    ScalarFunction,
    udf,
)

from bench.peers.work import Arrival, Processes, Settings, Work, read_settings, show
from streams.memory import settle

CHECKPOINT_MS = 5_000  # a transaction each: predictions can be read no sooner
GATHER_MS = 5_000  # an event waits no longer than this for a fuller batch
TRANSACTION_MS = 60_000  # the broker takes no more; Flink would ask for an hour
ARRIVAL = ("topic", "partition", "offset", "value")


class Score(ScalarFunction):  # pyright: ignore[reportUntypedBaseClass]
    """The work on a batch; writes the figures to a file once all events have come."""

    def __init__(self, settings: Settings, client: int, figures: str) -> None:
        self._settings = settings
        self._client = client  # the process that has started all others
        self._figures = figures

    def open(self, function_context: FunctionContext) -> None:
        """Load the model where the function runs."""
        self._work = Work(self._settings, Processes(self._client))
        settle()

    def eval(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Keys and values of predictions."""
        columns = (rows.iloc[:, at] for at in range(len(ARRIVAL)))
        predictions = self._work.score([Arrival(*row) for row in zip(*columns, strict=True)])
        if self._work.done:
            Path(self._figures).write_bytes(orjson.dumps(self._work.figures(["apache-flink"])))
        return pd.DataFrame(
            {
                "key": [each.key for each in predictions],
                "value": [each.value for each in predictions],
            }
        )


def run(settings: Settings, figures: Path) -> None:
    """Score until all events have come: the source ends where its topics end."""
    environment = TableEnvironment.create(EnvironmentSettings.in_streaming_mode())
    for key, value in options(settings).items():
        environment.get_config().set(key, value)
    score = udf(
        Score(settings, os.getpid(), str(figures)),
        result_type=DataTypes.ROW(
            [DataTypes.FIELD("key", DataTypes.BYTES()), DataTypes.FIELD("value", DataTypes.BYTES())]
        ),
        func_type="pandas",
    )
    events = environment.from_descriptor(source(settings))
    events.map(score).execute_insert(sink(settings)).wait()


def options(settings: Settings) -> dict[str, str]:
    """Flink's own settings."""
    jars = (Path(sys.prefix) / "jars").glob("*.jar")
    return {
        "pipeline.jars": ";".join(jar.as_uri() for jar in jars),
        "parallelism.default": "1",
        "python.executable": sys.executable,
        "python.client.executable": sys.executable,
        "python.fn-execution.arrow.batch.size": str(settings.batch),
        "python.fn-execution.bundle.size": str(settings.batch),
        "python.fn-execution.bundle.time": str(GATHER_MS),
        "execution.checkpointing.mode": "EXACTLY_ONCE",
        "execution.checkpointing.interval": f"{CHECKPOINT_MS} ms",
        "restart-strategy.type": "none",  # a job that fails has failed
    }


def source(settings: Settings) -> TableDescriptor:
    """The events, each with where it lay."""
    columns = (
        Schema.new_builder()
        .column_by_metadata("topic", DataTypes.STRING(), is_virtual=True)
        .column_by_metadata("partition", DataTypes.INT(), is_virtual=True)
        .column_by_metadata("offset", DataTypes.BIGINT(), is_virtual=True)
        .column("value", DataTypes.BYTES())
    )
    return descriptor(
        columns,
        {
            "topic": ";".join(settings.inputs),
            "properties.bootstrap.servers": settings.bootstrap,
            "properties.group.id": settings.prefix,
            "properties.isolation.level": "read_committed",
            "properties.max.poll.records": str(settings.batch),
            "scan.startup.mode": "earliest-offset",
            "scan.bounded.mode": "latest-offset",
            "format": "raw",
        },
    )


def sink(settings: Settings) -> TableDescriptor:
    """The predictions, in a transaction for each checkpoint."""
    columns = (
        Schema.new_builder().column("key", DataTypes.BYTES()).column("value", DataTypes.BYTES())
    )
    return descriptor(
        columns,
        {
            "topic": settings.output,
            "properties.bootstrap.servers": settings.bootstrap,
            "properties.transaction.timeout.ms": str(TRANSACTION_MS),
            "properties.compression.type": "lz4",
            "properties.linger.ms": "5",
            "sink.delivery-guarantee": "exactly-once",
            "sink.transactional-id-prefix": settings.prefix,
            "key.format": "raw",
            "key.fields": "key",
            "value.format": "raw",
            "value.fields-include": "EXCEPT_KEY",
        },
    )


def descriptor(columns: Schema.Builder, options: dict[str, str]) -> TableDescriptor:
    """A table in Kafka."""
    table = TableDescriptor.for_connector("kafka").schema(columns.build())
    for key, value in options.items():
        table.option(key, value)
    return table.build()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run over the events that wait; figures as JSON, last on stdout."""
    settings = read_settings("flink", arguments)
    with tempfile.TemporaryDirectory(prefix="starcast-flink-") as folder:
        os.environ["FLINK_LOG_DIR"] = folder
        figures = Path(folder) / "figures.json"
        run(settings, figures)
        show(orjson.loads(figures.read_bytes()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
