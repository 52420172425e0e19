"""What questions on vectors are given, checked: arrays, facts, layouts, inputs, labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierwise.functions.fl.geometry import Index
from tierwise.functions.fl.networks import Array, Network

INPUTS_MAX = 50_000_000  # numbers in the inputs of one question
LABELS_MAX = 1_000_000
Facts = Mapping[str, Any]

NETWORK = {
    "layout": "shapes of all parameters in order; the round's metadata `layout` if not given",
    "activation": "of hidden layers: relu, tanh or logistic",
    "order": "of matrices: out_in (PyTorch), in_out, or auto",
}
INPUTS = "array or list of shape (n, inputs)"
LABELS = "class of each input"


def vector_of(vector: Array | None, name: str) -> Array:
    """Return a vector that must be there.

    Raises:
        ValueError: It is not.
    """
    if vector is None:
        raise ValueError(f"the round has no {name}: ask of a round that has")
    return vector


def rows_in(matrix: Array | None, facts: Facts) -> tuple[Index, list[str]]:
    """Return the rows that count, and their clients.

    Raises:
        ValueError: There is none.
    """
    clients, is_in = facts["clients"], facts["is_in"]
    if matrix is None or not any(is_in):
        raise ValueError(f"no update counts in round {facts['round']}: ask of another round")
    rows = np.flatnonzero(np.array(is_in))
    return rows, [clients[row] for row in rows]


def layout_of(facts: Facts, layout: list[Any] | None) -> Any:
    """Return the layout that was given, else the round's."""
    return layout if layout is not None else facts["round_metadata"].get("layout")


def network_of(facts: Facts, layout: list[Any] | None, activation: str, order: str) -> Network:
    """Return the network of a layout, see `Network.of`."""
    return Network.of(layout_of(facts, layout), facts["parameter_count"], order, activation)


def inputs_for(inputs: Any, network: Network) -> Array:
    """Return inputs as float32, shape (n, width).

    Raises:
        ValueError: They are not numbers, too many, or do not fit the network.
    """
    try:
        found = np.asarray(inputs, dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError("`inputs` is an array, or a list of equally long lists of numbers") from (
            None
        )
    if found.ndim == 1 and len(found) == network.input_count:
        found = found[None, :]
    if found.ndim != 2 or found.shape[1] != network.input_count or len(found) == 0:
        raise ValueError(
            f"`inputs` has shape {list(found.shape)}, and the network takes (n, "
            f"{network.input_count})"
        )
    if found.size > INPUTS_MAX:
        raise ValueError(f"`inputs` has {found.size} numbers, the limit is {INPUTS_MAX}: split it")
    if not np.isfinite(found).all():
        raise ValueError("`inputs` has numbers that are not finite: leave those rows out")
    return found


def labels_for(labels: Sequence[int] | NDArray[Any], count: int, network: Network) -> Index:
    """Return classes, shape (n,).

    Raises:
        ValueError: They are no classes of the network, or not one for each input.
    """
    found = np.asarray(labels)
    classes = max(network.output_count, 2)
    if found.shape != (count,) or found.dtype.kind not in "iu" or count > LABELS_MAX:
        raise ValueError(
            f"`labels` is a whole number for each of the {count} inputs (at most {LABELS_MAX})"
        )
    if not ((found >= 0) & (found < classes)).all():
        raise ValueError(f"`labels` are classes from 0 to {classes - 1}")
    return found.astype(np.intp)
