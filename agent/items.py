"""What became of each item of a call, as its caller hears it."""

from agent.runtime.instance import ItemKind, ItemResult
from tierwise.domain.outcome import Outcome
from tierwise.v1 import types_pb2
from tierwise.wire import payload
from tierwise.wire.handover import Handover

# What became of one item, as an error code of tierwise.errors; OK is absent.
CODE_BY_KIND: dict[ItemKind, str] = {
    ItemKind.RAISED: "function_raised",
    ItemKind.OUT_OF_MEMORY: "function_out_of_memory",
    ItemKind.BAD_ARGUMENTS: "invalid_argument",
    ItemKind.BAD_RESULT: "result_rejected",
    ItemKind.RESULT_TOO_LARGE: "result_rejected",
    ItemKind.TIMED_OUT: "function_timed_out",
    ItemKind.WORKER_EXITED: "function_died",
    ItemKind.WORKER_DIED: "function_died",
    ItemKind.CANCELLED: "cancelled",
    ItemKind.NOT_RUN: "unavailable",
    ItemKind.NO_OBJECT: "unavailable",
}

# Ends of which only the message tells.
NAMELESS = frozenset(
    {
        ItemKind.OUT_OF_MEMORY,
        ItemKind.BAD_RESULT,
        ItemKind.RESULT_TOO_LARGE,
        ItemKind.TIMED_OUT,
        ItemKind.WORKER_EXITED,
        ItemKind.WORKER_DIED,
    }
)


def code_of(result: ItemResult) -> str:
    """Return the error code of an item that failed."""
    return result.error_code or CODE_BY_KIND[result.kind]


def told(result: ItemResult, function: str) -> str:
    """Return the message of an item that failed; where no traceback names the function, it does."""
    if result.kind is ItemKind.NOT_RUN:
        return f"not run: {result.message or 'its worker ended in an earlier item'}"
    return f"{function}: {result.message}" if result.kind in NAMELESS else result.message


def item_of(result: ItemResult, function: str, channel: Handover | None = None) -> types_pb2.Item:
    """Return an item as it travels; large arrays go over `channel`, if there is one."""
    if result.kind is ItemKind.OK:
        if not result.attachments:
            return types_pb2.Item(value=result.value)
        return _large_item(result, channel)
    return types_pb2.Item(
        error_code=code_of(result),
        message=told(result, function),
        remote_type=result.error_type,
        remote_traceback=result.remote_traceback,
    )


def with_message(item: types_pb2.Item, outcome: Outcome) -> types_pb2.Item:
    """Return an item with the outcome's message, if it is of the same error."""
    if item.error_code == outcome.error_code and outcome.message:
        item.message = outcome.message
    return item


def _large_item(result: ItemResult, channel: Handover | None) -> types_pb2.Item:
    """Hand the arrays of a result over, or put them back into it."""
    if channel is not None and channel.is_open:
        numbers = [channel.send(file) for file in result.attachments]
        if None not in numbers:
            return types_pb2.Item(value=result.value, attachments=filter(None, numbers))
    try:
        views = [file.view() for file in result.attachments]
        return types_pb2.Item(value=payload.inline(result.value, views))
    except ValueError as error:  # only a worker that was tampered with says such things
        return types_pb2.Item(error_code="result_rejected", message=f"the result is none: {error}")
