"""Logs: one line an event on stderr, JSON for machines, readable on a terminal, times in UTC."""

import logging
import sys
from typing import Literal, TextIO

import orjson
import structlog
from pydantic import BaseModel, Field
from stamina.instrumentation import RetryDetails, set_on_retry_hooks
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

Level = Literal["debug", "info", "warning", "error"]

# Libraries that tell at "info" what only their own authors want to know.
_TALKATIVE = (
    "aiokafka",
    "apscheduler",
    "asyncio",
    "faust",
    "fsspec",
    "httpcore",
    "httpx",
    "lenskit",
    "matplotlib",
    "mode",
    "transformers",
    "urllib3",
    "uvicorn",
    "watchfiles",
)


class LogConfig(BaseModel):
    """What is logged, and in which form."""

    level: Level = Field(default="info", description="debug, info, warning or error")
    format: Literal["auto", "json", "text"] = Field(
        default="auto", description="auto: text on a terminal, else JSON lines"
    )


def configure(config: LogConfig, stream: TextIO | None = None) -> None:
    """Sets up structlog and, through it, all that libraries log. A second call replaces the first.

    `stream` is stderr unless given.
    """
    output = stream or sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        _add_logger,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(config, output),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(config.level.upper())
    quiet = max(logging.WARNING, root.level) if config.level != "debug" else logging.INFO
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(quiet)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    set_on_retry_hooks([_tell_retry])


def _tell_retry(details: RetryDetails) -> None:
    """What failed and is tried again, for people; one that goes on failing is raised in the end.

    stamina's own line names a function of ours and its arguments, and nothing that anybody can do.
    """
    structlog.get_logger("stamina").info(
        "tries again", reason=str(details.caused_by), seconds=round(details.wait_for, 2)
    )


def _renderers(config: LogConfig, stream: TextIO) -> list[Processor]:
    """Traces are told without the values of variables, which may be passwords or reviews."""
    terminal = stream.isatty()
    if config.format == "text" or (config.format == "auto" and terminal):
        trace = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=trace)]
    return [
        structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
        structlog.processors.JSONRenderer(serializer=_to_json),
    ]


def _to_json(event: EventDict, **_: object) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def _add_logger(logger: WrappedLogger, _: str, event: EventDict) -> EventDict:
    """The logger's name, where it has one of its own."""
    record = event.get("_record")
    name = record.name if record is not None else getattr(logger, "name", None)
    if name and name != "root":
        event["logger"] = name
    return event
