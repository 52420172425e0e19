"""Errors ⇄ gRPC status and items: one table for both directions, in `tierwise.errors`."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import msgspec
import structlog

from tierwise.errors import (
    STATUS_BY_CODE,
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    PermissionDenied,
    TierwiseError,
    Unauthenticated,
    Unavailable,
    error_from_code,
)
from tierwise.v1 import types_pb2

log = structlog.get_logger()

DETAIL_KEY = "tierwise-error-bin"
TRACEBACK_MAX = 16_384
MESSAGE_MAX = 4_096

# What a status means when the other side was not ours, or could not add details.
_ERROR_BY_STATUS: dict[grpc.StatusCode, type[TierwiseError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: PayloadTooLarge,
}


def status_of(error: TierwiseError) -> grpc.StatusCode:
    """Return the gRPC status of an error."""
    return grpc.StatusCode[STATUS_BY_CODE[error.code]]


async def abort(context: Any, error: TierwiseError) -> None:
    """End an RPC with `error`: status, message, and details in the trailing metadata."""
    detail = {
        "code": error.code,
        "remote_type": error.remote_type[:200],
        "remote_traceback": error.remote_traceback[-TRACEBACK_MAX // 4 :],  # metadata is small
        "retry_after_s": error.retry_after_s,
    }
    metadata = ((DETAIL_KEY, msgspec.json.encode(detail)),)
    await context.abort(status_of(error), error.message[:MESSAGE_MAX], metadata)


def error_from_rpc(error: grpc.RpcError) -> TierwiseError:
    """Return what an RPC failed with; a status that we did not send maps to the nearest error."""
    if not isinstance(error, grpc.aio.AioRpcError | grpc.Call):
        return TierwiseError(str(error))
    message = error.details() or str(error.code())
    for key, value in error.trailing_metadata() or ():
        if key == DETAIL_KEY:
            try:
                detail = msgspec.json.decode(value)
                return error_from_code(
                    str(detail["code"]),
                    message,
                    remote_type=str(detail["remote_type"]),
                    remote_traceback=str(detail["remote_traceback"]),
                    retry_after_s=detail["retry_after_s"],
                )
            except (msgspec.DecodeError, KeyError, TypeError):
                break
    kind = _ERROR_BY_STATUS.get(error.code(), TierwiseError)
    if kind is Unavailable and ("Socket closed" in message or "handshake" in message.lower()):
        message += (
            " — the other side may have refused this certificate (expired, revoked or of another "
            "cluster); `tierwise doctor` tells which"
        )
    return kind(message)


def item_from_error(error: TierwiseError) -> types_pb2.Item:
    """Return the error as the result of one item."""
    return types_pb2.Item(
        error_code=error.code,
        message=error.message[:MESSAGE_MAX],
        remote_type=error.remote_type,
        remote_traceback=error.remote_traceback[-TRACEBACK_MAX:],
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


def _is_end_of_stream(error: BaseException) -> bool:
    """Return whether an exception only says that the RPC, or its server, has ended."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_end_of_stream(inner) for inner in error.exceptions)
    return isinstance(error, grpc.RpcError | grpc.aio.BaseError | grpc.aio.AbortError)


Handler = grpc.RpcMethodHandler
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns errors raised by servicers into statuses; a bug becomes UNKNOWN and is logged."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Wrap the handler of one RPC."""
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/tierwise."):
            return handler
        if handler.response_streaming:
            kind = "stream_stream" if handler.request_streaming else "unary_stream"
        else:
            kind = "stream_unary" if handler.request_streaming else "unary_unary"
        inner = getattr(handler, kind)

        async def guarded(request: Any, context: Any) -> Any:
            try:
                return await inner(request, context)
            except TierwiseError as error:
                await abort(context, error)
            except Exception as error:
                if _is_end_of_stream(error):
                    raise
                log.exception("rpc.crashed", method=method)
                await context.abort(grpc.StatusCode.UNKNOWN, "internal error; see the server's log")

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        wrapped: Handler = make(
            guarded,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return wrapped
