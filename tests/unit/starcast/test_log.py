import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Literal

import pytest
import stamina
import structlog
from stamina.instrumentation import set_on_retry_hooks

from starcast.log import LogConfig, configure


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()
    set_on_retry_hooks(None)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    configure(LogConfig(), stream)
    structlog.get_logger("streams.x").info("hello", count=3)
    (line,) = lines(stream)
    assert line["event"] == "hello"
    assert line["count"] == 3
    assert line["level"] == "info"
    assert line["logger"] == "streams.x"
    time = datetime.fromisoformat(str(line["timestamp"]))
    assert time.utcoffset() == timedelta(0)


def test_logs_of_libraries_have_the_same_form() -> None:
    stream = io.StringIO()
    configure(LogConfig(), stream)
    logging.getLogger("somelib").warning("count is %d", 3)
    (line,) = lines(stream)
    assert line["event"] == "count is 3"
    assert line["logger"] == "somelib"


def test_what_is_tried_again_is_told_to_people() -> None:
    stream = io.StringIO()
    configure(LogConfig(), stream)
    for attempt in stamina.retry_context(on=ValueError, wait_initial=0, wait_jitter=0):
        with attempt:
            if attempt.num < 2:
                raise ValueError("Nobody answers at kafka:9092.")
    (line,) = lines(stream)
    assert line["event"] == "tries again"
    assert line["reason"] == "Nobody answers at kafka:9092."
    assert line["level"] == "info"
    assert not {"callable", "args", "kwargs"} & line.keys()


def test_levels() -> None:
    stream = io.StringIO()
    configure(LogConfig(level="warning"), stream)
    structlog.get_logger().info("no")
    structlog.get_logger().warning("yes")
    configure(LogConfig(), stream)
    logging.getLogger("faust.worker").info("no")
    structlog.get_logger("lenskit.basic.bias").info("no")  # hundreds of lines for each peer tuned
    configure(LogConfig(level="debug"), stream)
    structlog.get_logger().debug("yes")
    assert [line["event"] for line in lines(stream)] == ["yes", "yes"]


def test_an_exception_is_one_line() -> None:
    stream = io.StringIO()
    configure(LogConfig(), stream)
    try:
        raise ValueError("odd")
    except ValueError:
        structlog.get_logger().exception("failed")
    (line,) = lines(stream)
    assert "odd" in json.dumps(line["exception"])


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_trace_tells_no_values_of_variables(form: Literal["json", "text"]) -> None:
    def connect(password: str) -> None:
        raise ValueError("odd")

    stream = io.StringIO()
    configure(LogConfig(format=form), stream)
    try:
        connect("".join(["hunter", "2"]))
    except ValueError:
        logging.getLogger("aiokafka").exception("failed")
    assert "odd" in stream.getvalue()
    assert "test_log.py" in stream.getvalue()
    assert "hunter2" not in stream.getvalue()


def test_text_for_people() -> None:
    stream = io.StringIO()
    configure(LogConfig(format="text"), stream)
    structlog.get_logger().info("hello", count=3)
    assert "hello" in stream.getvalue()
    assert "count=3" in stream.getvalue()
    assert not stream.getvalue().startswith("{")
