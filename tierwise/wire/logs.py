"""Logging of daemons: one JSON object per line on standard output."""

import logging
import sys

import structlog

from tierwise.errors import InvalidArgument

LEVELS = ("debug", "info", "warning", "error")


def configure_logs(level: str) -> None:
    """Set up structlog for a daemon.

    Raises:
        InvalidArgument: `level` is none of debug, info, warning, error.
    """
    if level not in LEVELS:
        raise InvalidArgument(f"log_level = {level!r}: use one of {', '.join(LEVELS)}")
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stdout),
        cache_logger_on_first_use=True,
    )
