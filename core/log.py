"""Logs: one structlog event per committed transition, JSON in a rotated file, readable on a terminal.

A job has five events, so an event is rendered once and written by one call for each output: structlog's way through
logging, its formatters and its handlers costs thirty times as much. What libraries say goes that way.
"""

import functools
import json
import logging
import logging.handlers
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

FILE_BYTES = 20 * 1024 * 1024
FILES_KEPT = 5

Write = Callable[[str], None]
Renderer = Callable[[WrappedLogger, str, EventDict], str]

_encode = json.JSONEncoder(default=str).encode


@functools.lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _stamp(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The time in UTC. A second's text is made once: structlog's own stamp costs four times as much."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    event["timestamp"] = f"{_second(seconds)}.{nanoseconds // 1000:06d}Z"
    return event


_SHARED: Sequence[Processor] = (
    structlog.contextvars.merge_contextvars,  # of a request: its id
    structlog.processors.add_log_level,
    _stamp,
    structlog.processors.format_exc_info,
)


def configure(role: str, log_dir: Path | None, level: str) -> FilteringBoundLogger:
    """Send events to stderr and, as JSON lines, to ``log_dir/role.log``; return the role's logger.

    On a terminal stderr is for people, elsewhere it is JSON as well.
    """
    terminal = structlog.dev.ConsoleRenderer(colors=True) if sys.stderr.isatty() else _as_json
    outputs: list[tuple[logging.Handler, Write, Renderer]] = [
        (logging.StreamHandler(sys.stderr), _to_stderr, terminal),
    ]
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
        file = _File(log_dir / f"{role}.log", maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8")
        outputs.append((file, file.write, _as_json))
    for handler, _, renderer in outputs:
        processors: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
        handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=_SHARED, processors=processors))
    logging.basicConfig(level=level, handlers=[handler for handler, _, _ in outputs], force=True)
    for chatty in ("asyncio", "aiohttp", "redis"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Its pool warns of a server that is away with a traceback at every try; the roles say so in one line.
    logging.getLogger("asyncpg").setLevel(logging.ERROR)
    structlog.configure(
        processors=[*_SHARED, _Outputs([(write, renderer) for _, write, renderer in outputs])],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    logger: FilteringBoundLogger = structlog.get_logger().bind(role=role)
    return logger


class _Outputs:
    """The last processor: renders, once for all outputs that want it alike, and writes."""

    def __init__(self, outputs: Sequence[tuple[Write, Renderer]]) -> None:
        self._outputs = outputs

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        rendered: dict[Renderer, str] = {}
        for write, renderer in self._outputs:
            if renderer not in rendered:
                rendered[renderer] = f"{renderer(logger, method, dict(event))}\n"
            with suppress(OSError):  # a full disk, a reader that is gone: the work goes on
                write(rendered[renderer])
        raise structlog.DropEvent


class _File(logging.handlers.RotatingFileHandler):
    """A rotated file whose size is known by where its last line ended, not asked for before each.

    Other workers may write to the same file: each line is one write at its end, and a rotation keeps what it moved.
    """

    def write(self, line: str) -> None:
        """Append a line, rotating before it where it would grow too large."""
        data = line.encode(errors="backslashreplace")
        if os.lseek(self._descriptor(), 0, os.SEEK_CUR) + len(data) > self.maxBytes:
            self.doRollover()
        os.write(self._descriptor(), data)

    def _descriptor(self) -> int:
        assert self.stream is not None  # it is opened at once, and again by a rotation
        return self.stream.fileno()


def _as_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    return _encode(event)


def _to_stderr(line: str) -> None:
    sys.stderr.write(line)
    sys.stderr.flush()
