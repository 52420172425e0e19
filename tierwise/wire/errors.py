"""Errors ⇄ gRPC status and items: one table for both directions, in `tierwise.errors`."""

import errno
from typing import Any

import grpc
import msgspec
import structlog

from tierwise.errors import (
    STATUS_BY_CODE,
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    TierwiseError,
    Unauthenticated,
    Unavailable,
    error_from_code,
)
from tierwise.v1 import types_pb2
from tierwise.wire import checks
from tierwise.wire.interception import Behaviour, Continuation, Handler, answer, wrapped

log = structlog.get_logger()

FULL_DISK_RETRY_S = 5.0
DETAIL_KEY = "tierwise-error-bin"
TYPE_LENGTH_MAX = 200
MESSAGE_LENGTH_MAX = 4_096
TRACEBACK_LENGTH_MAX = 16_384
# gRPC refuses trailers of more than 8 KiB by default, whoever the client is; text that is not
# ASCII takes three times its bytes in the message and 4/3 in the detail.
STATUS_MESSAGE_BYTES_MAX = 1_800
STATUS_TRACEBACK_BYTES_MAX = 2_400

# What a status means when it came without our detail: from gRPC itself or a foreign server.
_ERROR_BY_STATUS: dict[grpc.StatusCode, type[TierwiseError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.UNIMPLEMENTED: FailedPrecondition,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.ABORTED: Unavailable,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}

# gRPC's own words for a failed handshake, lower case, and what they mean to the user. A server
# that refuses our certificate only closes the connection.
_HANDSHAKE_HINTS: tuple[tuple[str, str], ...] = (
    (
        "hostname verification",
        "another node answers at this address than the one that was asked for",
    ),
    (
        "certificate_verify_failed",
        "its certificate has expired or is of another cluster: this context belongs to another "
        "certificate authority",
    ),
    (
        "socket closed",
        "it may have refused this side's certificate (missing, expired, revoked or of another "
        "certificate authority), or have just ended",
    ),
    (
        "handshake failed",
        "TLS failed: what listens there may be no tierwise port, or a certificate is missing, "
        "expired, revoked or of another certificate authority",
    ),
)


class _Detail(msgspec.Struct, array_like=True):
    """What rides in the trailing metadata beside status and message."""

    code: str
    remote_type: str = ""
    remote_traceback: str = ""
    retry_after_s: float | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Detail).decode


def status_of(error: TierwiseError) -> grpc.StatusCode:
    """Return the gRPC status of an error."""
    return grpc.StatusCode[STATUS_BY_CODE[error.code]]


async def abort(context: Any, error: TierwiseError) -> None:
    """End an RPC with `error`: status, message, and details in the trailing metadata.

    Raises:
        grpc.aio.AbortError: Always; that is how gRPC ends a handler.
    """
    detail = _Detail(
        code=error.code,
        remote_type=checks.clean(error.remote_type, TYPE_LENGTH_MAX),
        remote_traceback=_last_bytes(error.remote_traceback, STATUS_TRACEBACK_BYTES_MAX),
        retry_after_s=error.retry_after_s,
    )
    message = _fitting(error.message)
    await context.abort(status_of(error), message, ((DETAIL_KEY, _encode(detail)),))


def error_from_rpc(error: grpc.RpcError) -> TierwiseError:
    """Return what an RPC failed with; a status that we did not send maps to the nearest error."""
    if not isinstance(error, grpc.aio.AioRpcError | grpc.Call):
        return TierwiseError(str(error))
    status, message = error.code(), error.details() or str(error.code())
    for key, value in error.trailing_metadata() or ():
        if key == DETAIL_KEY and isinstance(value, bytes):
            try:
                detail = _decode(value)
            except msgspec.DecodeError:
                break
            return error_from_code(
                detail.code,
                message,
                remote_type=detail.remote_type,
                remote_traceback=detail.remote_traceback,
                retry_after_s=detail.retry_after_s,
            )
    lower = message.lower()
    if status is grpc.StatusCode.UNAVAILABLE:
        for words, meaning in _HANDSHAKE_HINTS:
            if words in lower:
                message += f" — {meaning}; `tierwise doctor` tells more"
                break
    elif status is grpc.StatusCode.UNIMPLEMENTED:
        message += " — the other side may run another version of tierwise"
    elif status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in lower:
        return PayloadTooLarge(f"{message} — send less at once, or store it and pass a reference")
    return _ERROR_BY_STATUS.get(status, TierwiseError)(message)


def item_from_error(error: TierwiseError) -> types_pb2.Item:
    """Return the error as the result of one item."""
    return types_pb2.Item(
        error_code=error.code,
        message=checks.clean(error.message, MESSAGE_LENGTH_MAX),
        remote_type=checks.clean(error.remote_type, TYPE_LENGTH_MAX),
        remote_traceback=_last_bytes(error.remote_traceback, TRACEBACK_LENGTH_MAX),
        retry_after_s=error.retry_after_s or 0.0,
    )


def error_from_item(item: types_pb2.Item) -> TierwiseError | None:
    """Return the error in an item, or None if it holds a value."""
    if not item.error_code:
        return None
    return error_from_code(
        item.error_code,
        item.message,
        remote_type=item.remote_type,
        remote_traceback=item.remote_traceback,
        retry_after_s=item.retry_after_s or None,
    )


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns errors raised by servicers into statuses; a bug becomes UNKNOWN and is logged."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """Wrap the handler of one RPC."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or not method.startswith("/tierwise."):
            return handler

        def guard(behaviour: Behaviour) -> Behaviour:
            async def guarded(request: Any, context: Any) -> Any:
                try:
                    return await answer(behaviour, request, context)
                except Exception as error:
                    await _end(context, error, method)

            return guarded

        return wrapped(handler, guard)


async def _end(context: Any, error: Exception, method: str) -> None:
    """End an RPC that raised: with our error if it is one, as the end of a stream, or as a bug."""
    ours = _first_of(TierwiseError, error) or _full_disk(error)
    if ours is not None:
        await abort(context, ours)
    elif _is_end_of_stream(error):
        raise error
    else:
        log.error("rpc.crashed", method=method, exc_info=error)
        await context.abort(grpc.StatusCode.UNKNOWN, "internal error; see the server's log")


def _full_disk(error: BaseException) -> TierwiseError | None:
    """Return what a full disk is to a caller: nobody's bug, and nothing was done."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("disk.full", cause=str(error))
        return Unavailable(
            f"no space is left on the server ({error.strerror}); nothing was stored: its operator "
            "must free some",
            retry_after_s=FULL_DISK_RETRY_S,
        )
    return None


def _first_of(kind: type[TierwiseError], error: BaseException) -> TierwiseError | None:
    """Return the error, or the first of the kind in a group that holds nothing worse.

    Task groups wrap what their tasks raise. A group that holds a bug as well is a bug.
    """
    if isinstance(error, kind):
        return error
    if isinstance(error, BaseExceptionGroup):
        ours, others = error.split(kind)
        if ours is not None and (others is None or _is_end_of_stream(others)):
            return next(leaf for inner in ours.exceptions if (leaf := _first_of(kind, inner)))
    return None


def _is_end_of_stream(error: BaseException) -> bool:
    """Return whether an exception only says that the RPC, or its server, has ended."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_end_of_stream(inner) for inner in error.exceptions)
    return isinstance(error, grpc.RpcError | grpc.aio.BaseError | grpc.aio.AbortError)


def _fitting(message: str) -> str:
    """Return as much of a message as a trailer may hold; gRPC percent-encodes it."""
    message = checks.clean(message, MESSAGE_LENGTH_MAX)
    if _encoded_length(message) <= STATUS_MESSAGE_BYTES_MAX:
        return message
    low, high = 0, len(message)
    while low < high:  # the longest beginning that fits
        middle = (low + high + 1) // 2
        if _encoded_length(message[:middle]) <= STATUS_MESSAGE_BYTES_MAX:
            low = middle
        else:
            high = middle - 1
    return message[:low] + "…"


def _encoded_length(message: str) -> int:
    """Return the bytes of a percent-encoded message: printable ASCII but '%' stays as it is."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in message.encode())


def _last_bytes(text: str, bytes_max: int) -> str:
    """Return the end of a traceback, where the cause is, in at most so many bytes of UTF-8."""
    return text.encode("utf-8", "replace")[-bytes_max:].decode("utf-8", "ignore")
