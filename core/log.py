"""Logs: one structlog event per committed transition, JSON in a rotated file, readable on a terminal."""

import logging
import logging.handlers
import sys
from pathlib import Path

import structlog

FILE_BYTES = 20 * 1024 * 1024
FILES_KEPT = 5


def configure(role: str, log_dir: Path | None, level: str) -> structlog.stdlib.BoundLogger:
    """Send events to stderr and, as JSON lines, to ``log_dir/role.log``; return the role's logger."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    terminal = sys.stderr.isatty()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].setFormatter(_formatter(structlog.dev.ConsoleRenderer(colors=terminal), shared))
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
        # A worker may share the folder with others: each line is one write, and rotation keeps what it moved.
        file = logging.handlers.RotatingFileHandler(
            log_dir / f"{role}.log", maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8"
        )
        file.setFormatter(_formatter(structlog.processors.JSONRenderer(), shared))
        handlers.append(file)
    logging.basicConfig(level=level, handlers=handlers, force=True)
    for chatty in ("asyncio", "aiohttp", "redis"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    logger: structlog.stdlib.BoundLogger = structlog.get_logger().bind(role=role)
    return logger


def _formatter(
    renderer: structlog.types.Processor, shared: list[structlog.types.Processor]
) -> structlog.stdlib.ProcessorFormatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
