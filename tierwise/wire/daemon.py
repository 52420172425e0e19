"""What every daemon does first: log JSON to standard output, and end with a parent that asked."""

import ctypes
import logging
import os
import signal
import sys

import structlog
import structlog.tracebacks

from tierwise.errors import InvalidArgument

PARENT_VARIABLE = "TIERWISE_PARENT"  # pid of a process whose end should end the daemon
PR_SET_PDEATHSIG = 1
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
            structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
            ),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stdout),
        cache_logger_on_first_use=True,
    )


def follow_parent() -> None:
    """If a local cluster started this daemon, have the kernel stop it when that process ends."""
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != int(parent):
            sys.exit("the process that started this daemon has ended")
