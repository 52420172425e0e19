"""User code in rounds: it sees arrays in its own shapes, the rounds see one flat vector.

`as_client` and `as_judge` wrap a function when it is deployed; both travel to the worker with it.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shapes = Sequence[tuple[int, ...]]
Arrays = list[NDArray[np.float32]]
Vector = NDArray[np.float32]


def flat(arrays: Sequence[Any], shapes: Shapes) -> Vector:
    """Return arrays as one vector, float32, in order.

    Raises:
        ValueError: They are not of these shapes; the message names the first that is not.
    """
    found = [np.asarray(array) for array in arrays]
    if len(found) != len(shapes):
        raise ValueError(f"there are {len(found)} arrays, and the model has {len(shapes)}")
    for index, (array, shape) in enumerate(zip(found, shapes, strict=True)):
        if array.shape != tuple(shape):
            raise ValueError(f"array {index} has shape {array.shape}, the model's {tuple(shape)}")
    if not found:
        raise ValueError("a model has at least one array")
    vector: Vector = np.concatenate([array.reshape(-1) for array in found]).astype(np.float32)
    return vector


def shaped(vector: Vector, shapes: Shapes) -> Arrays:
    """Return a vector as arrays that may be changed, as `flat` took them.

    Raises:
        ValueError: Its length is another.
    """
    sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
    if vector.ndim != 1 or len(vector) != sum(sizes):
        raise ValueError(f"the model has {sum(sizes)} parameters, the vector {vector.shape}")
    own = np.array(vector, dtype=np.float32)
    ends = np.cumsum(sizes)[:-1].tolist()
    return [part.reshape(shape) for part, shape in zip(np.split(own, ends), shapes, strict=True)]


def as_client(function: Callable[..., Any], shapes: Shapes) -> Callable[..., Any]:
    """Return what nodes run for `function(arrays, config) -> (arrays, example_count, metrics)`.

    `config` has what the job says, and `client`, `round` and `data` of this call. The seconds that
    it took are among the metrics, as `duration_s`.
    """

    def client(arrays: Sequence[Vector], arguments: dict[str, Any]) -> tuple[Vector, Any]:
        names = ("client", "round", "data")
        config = {**arguments["config"], **{name: arguments[name] for name in names}}
        started_s = time.perf_counter()
        result = function(shaped(arrays[0], shapes), config)
        duration_s = time.perf_counter() - started_s
        if not isinstance(result, tuple | list) or len(result) != 3:
            raise TypeError(
                "a client returns three things: its arrays, how many examples it has learnt from, "
                f"and a dict of metrics; this one returned {type(result).__name__}"
            )
        trained, count, metrics = result
        if not isinstance(metrics, dict):
            raise TypeError(f"metrics are a dict, not {type(metrics).__name__}")
        facts = {"duration_s": duration_s, **_plain(metrics), "example_count": float(count)}
        return flat(trained, shapes), facts

    return client


def as_judge(function: Callable[..., Any], shapes: Shapes) -> Callable[..., Any]:
    """Return what the root runs for `function(arrays, config) -> metrics`."""

    def judge(arrays: Sequence[Vector], arguments: dict[str, Any]) -> dict[str, Any]:
        config = {**arguments["config"], "round": arguments["round"]}
        metrics = function(shaped(arrays[0], shapes), config)
        if not isinstance(metrics, dict):
            raise TypeError(f"an evaluation returns a dict, not {type(metrics).__name__}")
        return _plain(metrics)

    return judge


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return metrics with NumPy's numbers as Python's."""
    return {
        str(name): value.item() if isinstance(value, np.generic) else value
        for name, value in metrics.items()
    }
