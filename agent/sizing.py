"""How much memory a call gets, where its function leaves that to its input. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tierwise.domain.ids import FunctionId
from tierwise.domain.request import Request
from tierwise.domain.sizing import Sizing
from tierwise.wire.measures import largest


def sized(
    request: Request, arguments: Sequence[bytes], sizings: Mapping[FunctionId, Sizing]
) -> Request:
    """Return the request with the measures of its input and the memory that this needs.

    What is declared stays if the function's memory is declared, or if nothing is known yet.

    Args:
        request: As it came to this node, the first.
        arguments: One blob per item.
        sizings: What the scheduler has learnt.
    """
    request = replace(request, measures=largest(arguments))
    sizing = sizings.get(request.function_id) if request.spec.is_memory_auto else None
    memory_mib = sizing.memory_mib(request.measures) if sizing is not None else None
    return request if memory_mib is None else request.with_memory(memory_mib)
