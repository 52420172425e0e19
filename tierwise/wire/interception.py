"""How server interceptors wrap handlers of all four kinds."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the stubs only
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"
Behaviour = Callable[[Any, Any], Any]  # a servicer's method: (request or iterator, context)


def wrapped(handler: Handler, wrap: Callable[[Behaviour], Behaviour]) -> Handler:
    """Return the handler with its behaviour replaced by `wrap` of it."""
    kind = (
        f"{'stream' if handler.request_streaming else 'unary'}_"
        f"{'stream' if handler.response_streaming else 'unary'}"
    )
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    made: Handler = make(
        wrap(getattr(handler, kind)),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return made


async def answer(behaviour: Behaviour, request: Any, context: Any) -> Any:
    """Await a behaviour, be it a coroutine or an async generator of responses."""
    answered = behaviour(request, context)
    if hasattr(answered, "__aiter__"):
        async with aclosing(answered) as responses:
            async for response in responses:
                await context.write(response)
        return None
    return await answered
