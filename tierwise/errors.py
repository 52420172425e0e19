"""Every error a caller can meet, grouped by what the caller can do next.

    TierwiseError
    ├── CallerError            change the request, then send it again
    │   ├── InvalidArgument        a field is wrong; the message names it
    │   ├── PayloadTooLarge        send less, or store it and pass a reference
    │   ├── NotFound               no such function, call, node or policy
    │   ├── AlreadyExists          the name is taken with other content
    │   ├── FailedPrecondition     right request, wrong moment; the message says what is missing
    │   ├── Infeasible             no node of this cluster can ever run it; a reason per node
    │   └── PermissionDenied       the certificate does not carry this right
    ├── Unauthenticated        get a certificate or a fresh token
    ├── RetryLater             send the same request again after `retry_after_s`
    │   ├── Overloaded             every queue that could take it is full
    │   ├── Unplaceable            no node may run it now, one could later; a reason per node
    │   └── Unavailable            the other side could not be reached
    ├── BudgetExceeded         raise the budget, or wait until its day is over
    ├── DeadlineExceeded       allow more time, or ask for less
    ├── Cancelled              somebody asked for it
    └── FunctionError          the function itself failed; read its traceback
        ├── FunctionRaised         an exception in user code
        ├── FunctionTimedOut       it ran longer than its timeout and was killed
        ├── FunctionOutOfMemory    it grew past its memory and was killed
        ├── FunctionDied           its process ended: exit, signal
        ├── ResultRejected         its result cannot travel (type or size)
        └── StartFailed            its code or environment could not be loaded

A bug in tierwise is none of these: it stays `UNKNOWN` and is logged with its traceback.
"""

from typing import ClassVar


class TierwiseError(Exception):
    """Base of all errors that tierwise raises on purpose."""

    code: ClassVar[str] = "internal"

    def __init__(
        self,
        message: str,
        *,
        remote_type: str = "",
        remote_traceback: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remote_type = remote_type
        self.remote_traceback = remote_traceback
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        if self.remote_traceback:
            return f"{self.message}\n\n--- remote traceback ---\n{self.remote_traceback.rstrip()}"
        return self.message


class CallerError(TierwiseError):
    """The request cannot succeed as it is."""

    code = "invalid_argument"


class InvalidArgument(CallerError):
    """A field of the request is wrong."""

    code = "invalid_argument"


class PayloadTooLarge(CallerError):
    """The arguments or a message exceed the bound that the message names."""

    code = "payload_too_large"


class NotFound(CallerError):
    """The named thing does not exist."""

    code = "not_found"


class AlreadyExists(CallerError):
    """The name or key is in use with other content."""

    code = "already_exists"


class FailedPrecondition(CallerError):
    """The system is not in the state that the request needs."""

    code = "failed_precondition"


class Infeasible(CallerError):
    """No node could run the request, however long one waits: it asks for what none has."""

    code = "infeasible"


class PermissionDenied(CallerError):
    """The caller's identity does not carry this right."""

    code = "permission_denied"


class Unauthenticated(TierwiseError):
    """There is no valid certificate or token."""

    code = "unauthenticated"


class RetryLater(TierwiseError):
    """The same request may succeed later."""

    code = "unavailable"


class Overloaded(RetryLater):
    """Every queue that could take the request is full."""

    code = "overloaded"


class Unplaceable(RetryLater):
    """No node may run the request now, but one could later."""

    code = "unplaceable"


class Unavailable(RetryLater):
    """The other side could not be reached."""

    code = "unavailable"


class BudgetExceeded(TierwiseError):
    """The namespace or function has spent its budget of the day; `retry_after_s` is its end."""

    code = "budget_exceeded"


class DeadlineExceeded(TierwiseError):
    """The time allowed was over before there was a result."""

    code = "deadline_exceeded"


class Cancelled(TierwiseError):
    """The call was cancelled."""

    code = "cancelled"


class FunctionError(TierwiseError):
    """The function itself failed."""

    code = "function_raised"


class FunctionRaised(FunctionError):
    """User code raised; `remote_type` and `remote_traceback` say where."""

    code = "function_raised"


class FunctionTimedOut(FunctionError):
    """The function ran longer than its timeout and was killed."""

    code = "function_timed_out"


class FunctionOutOfMemory(FunctionError):
    """The function grew past its memory limit."""

    code = "function_out_of_memory"


class FunctionDied(FunctionError):
    """The function's process ended before it returned."""

    code = "function_died"


class ResultRejected(FunctionError):
    """The result has a type or size that cannot travel."""

    code = "result_rejected"


class StartFailed(FunctionError):
    """The function's code or environment could not be loaded."""

    code = "start_failed"


# The one table from error code to gRPC status name. `wire.errors` turns names into codes.
STATUS_BY_CODE: dict[str, str] = {
    "internal": "INTERNAL",
    "invalid_argument": "INVALID_ARGUMENT",
    "payload_too_large": "INVALID_ARGUMENT",
    "not_found": "NOT_FOUND",
    "already_exists": "ALREADY_EXISTS",
    "failed_precondition": "FAILED_PRECONDITION",
    "infeasible": "FAILED_PRECONDITION",
    "permission_denied": "PERMISSION_DENIED",
    "unauthenticated": "UNAUTHENTICATED",
    "overloaded": "RESOURCE_EXHAUSTED",
    "unplaceable": "UNAVAILABLE",
    "unavailable": "UNAVAILABLE",
    "budget_exceeded": "RESOURCE_EXHAUSTED",
    "deadline_exceeded": "DEADLINE_EXCEEDED",
    "cancelled": "CANCELLED",
    "function_raised": "ABORTED",
    "function_timed_out": "ABORTED",
    "function_out_of_memory": "ABORTED",
    "function_died": "ABORTED",
    "result_rejected": "ABORTED",
    "start_failed": "ABORTED",
}


def _tree(root: type[TierwiseError]) -> list[type[TierwiseError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


# The most specific class of each code: leaves come after the groups that share their code.
ERROR_BY_CODE: dict[str, type[TierwiseError]] = {cls.code: cls for cls in _tree(TierwiseError)}


def error_from_code(
    code: str,
    message: str,
    *,
    remote_type: str = "",
    remote_traceback: str = "",
    retry_after_s: float | None = None,
) -> TierwiseError:
    """Return the exception for a `code` from the wire; unknown codes give the base class."""
    return ERROR_BY_CODE.get(code, TierwiseError)(
        message,
        remote_type=remote_type,
        remote_traceback=remote_traceback,
        retry_after_s=retry_after_s,
    )
