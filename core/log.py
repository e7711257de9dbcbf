"""Logs: one structlog event per committed transition, JSON in a rotated file, readable on a terminal.

An event is rendered once per output and handed to its handler as it is: structlog's way through logging and
its formatters cost six times as much, and a job has five events.
"""

import logging
import logging.handlers
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

FILE_BYTES = 20 * 1024 * 1024
FILES_KEPT = 5

_SHARED: Sequence[Processor] = (
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
)


def configure(role: str, log_dir: Path | None, level: str) -> FilteringBoundLogger:
    """Send events to stderr and, as JSON lines, to ``log_dir/role.log``; return the role's logger.

    On a terminal stderr is for people, elsewhere it is JSON as well.
    """
    json = structlog.processors.JSONRenderer()
    terminal = structlog.dev.ConsoleRenderer(colors=True) if sys.stderr.isatty() else json
    outputs: list[tuple[logging.Handler, Processor]] = [(logging.StreamHandler(sys.stderr), terminal)]
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
        # A worker may share the folder with others: each line is one write, and rotation keeps what it moved.
        file = logging.handlers.RotatingFileHandler(
            log_dir / f"{role}.log", maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8"
        )
        outputs.append((file, json))
    for handler, renderer in outputs:
        handler.setFormatter(_Formatter(foreign_pre_chain=_SHARED, processors=[_without_meta, renderer]))
    logging.basicConfig(level=level, handlers=[handler for handler, _ in outputs], force=True)
    for chatty in ("asyncio", "aiohttp", "redis"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Its pool warns of a server that is away with a traceback at every try; the roles say so in one line.
    logging.getLogger("asyncpg").setLevel(logging.ERROR)
    structlog.configure(
        processors=[*_SHARED, _Outputs(outputs)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    logger: FilteringBoundLogger = structlog.get_logger().bind(role=role)
    return logger


class _Outputs:
    """The last processor: renders for each output and writes."""

    def __init__(self, outputs: Sequence[tuple[logging.Handler, Processor]]) -> None:
        self._outputs = outputs

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        rendered: dict[int, Any] = {}
        for handler, renderer in self._outputs:
            text = rendered.get(id(renderer))
            if text is None:
                text = rendered[id(renderer)] = renderer(logger, method, dict(event))
            handler.handle(logging.makeLogRecord({"msg": text, "rendered": True}))
        raise structlog.DropEvent


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """For what comes through logging, from libraries; what is rendered already stays as it is."""

    def format(self, record: logging.LogRecord) -> str:
        return str(record.msg) if record.__dict__.get("rendered") else super().format(record)


_without_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
