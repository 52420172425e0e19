"""Dense networks in a flat vector: softmax regression and multilayer perceptrons. Pure.

A *layout* says which part of a vector is what: the shapes of its parameters in order, such as
`[[32, 64], [32], [10, 32], [10]]`, or `{"name": …, "shape": …}` in place of a shape. Each layer is
a matrix followed by a bias, or not. Matrices are (outputs, inputs), as PyTorch keeps them, or
(inputs, outputs), as scikit-learn and Keras do; which one is read off the shapes if they settle it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierwise.functions.fl.geometry import Float

PARTS_MAX = 10_000
ORDERS = ("out_in", "in_out")
Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One parameter tensor: elements `start` to `stop` of the vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


def parts(layout: Any, parameter_count: int) -> list[Part]:
    """Return the tensors of a layout.

    Raises:
        ValueError: It is no layout, or does not cover `parameter_count` elements exactly.
    """
    if not isinstance(layout, (list, tuple)) or not 1 <= len(layout) <= PARTS_MAX:
        raise ValueError(
            "a layout is a list of the shapes of all parameters in order, such as "
            f"[[10, 64], [10]]; not {str(layout)[:80]}. Give `layout`, or put it into the round's "
            "metadata"
        )
    found: list[Part] = []
    start = 0
    for place, entry in enumerate(layout):
        name, shape = f"part {place}", entry
        if isinstance(entry, dict):
            name, shape = str(entry.get("name", name)), entry.get("shape")
        if not isinstance(shape, (list, tuple)) or not all(
            type(size) is int and size >= 1 for size in shape
        ):
            raise ValueError(f"layout[{place}] is no shape: give positive sizes such as [10, 64]")
        stop = start + math.prod(shape)
        found.append(Part(name=name, shape=tuple(shape), start=start, stop=stop))
        start = stop
    if start != parameter_count:
        raise ValueError(
            f"the layout has {start} elements and the round's vectors {parameter_count}: the "
            "shapes of all parameters are needed, in the order in which they were made flat"
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Dense layers, each a matrix, perhaps a bias, and whether the matrix is (outputs, inputs)."""

    layers: tuple[tuple[Part, Part | None], ...]
    is_out_in: bool
    activation: str

    @classmethod
    def of(cls, layout: Any, parameter_count: int, order: str, activation: str) -> "Network":
        """Return the network that a layout describes.

        Args:
            layout: See the module.
            parameter_count: Length of the vector.
            order: "out_in", "in_out", or "auto".
            activation: Of hidden layers: "relu", "tanh" or "logistic".

        Raises:
            ValueError: It is no dense network, or its shapes fit both orders or none.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"`activation` is one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        if order not in (*ORDERS, "auto"):
            raise ValueError(f"`order` is auto, {' or '.join(ORDERS)}, not {order!r}")
        layers: list[tuple[Part, Part | None]] = []
        for part in parts(layout, parameter_count):
            if len(part.shape) == 2:
                layers.append((part, None))
            elif len(part.shape) == 1 and layers and layers[-1][1] is None:
                layers[-1] = (layers[-1][0], part)
            else:
                raise ValueError(
                    f"{part.name} of shape {list(part.shape)} is neither the matrix of a dense "
                    "layer nor its bias: only dense networks can be run here"
                )
        fitting = [each for each in ORDERS if _fits(layers, each == "out_in")]
        if order == "auto" and len(fitting) == 2:
            raise ValueError("the shapes fit both orders: say `order`, out_in (PyTorch) or in_out")
        chosen = fitting[0] if order == "auto" and fitting else order
        if chosen not in fitting:
            raise ValueError("the layers do not follow from one another: check the layout's shapes")
        return cls(layers=tuple(layers), is_out_in=chosen == "out_in", activation=activation)

    @property
    def input_count(self) -> int:
        """Return how many numbers one input has."""
        return self.layers[0][0].shape[1 if self.is_out_in else 0]

    @property
    def output_count(self) -> int:
        """Return how many numbers one output has."""
        return self.layers[-1][0].shape[0 if self.is_out_in else 1]

    @property
    def neuron_count(self) -> int:
        """Return how many neurons there are, outputs among them."""
        return sum(matrix.shape[0 if self.is_out_in else 1] for matrix, _ in self.layers)

    def run(self, vector: Array, inputs: Array) -> tuple[Array, list[Array]]:
        """Return logits, shape (n, outputs), and the hidden layers' activations, (n, width) each.

        Args:
            vector: All parameters, shape (P,).
            inputs: Shape (n, inputs).
        """
        hidden: list[Array] = []
        values = inputs
        for place, (matrix, bias) in enumerate(self.layers):
            weights = vector[matrix.start : matrix.stop].reshape(matrix.shape)
            values = values @ (weights.T if self.is_out_in else weights)
            if bias is not None:
                values = values + vector[bias.start : bias.stop]
            if place + 1 < len(self.layers):
                values = _activated(values, self.activation)
                hidden.append(values)
        return values, hidden


def probabilities(logits: Array) -> Float:
    """Return chances of classes, shape (n, outputs): softmax; of one output, logistic, (n, 2)."""
    raised = np.asarray(logits, dtype=np.float64)
    if raised.shape[1] == 1:
        raised = np.concatenate([np.zeros_like(raised), raised], axis=1)
    raised = np.exp(raised - raised.max(axis=1, keepdims=True))
    found: Float = raised / raised.sum(axis=1, keepdims=True)
    return found


def scored(chances: Float, labels: NDArray[np.intp]) -> tuple[float, float]:
    """Return accuracy, and mean cross entropy in nats (chances below 1e-12 count as that)."""
    of_label = chances[np.arange(len(labels)), labels]
    accuracy = float((chances.argmax(axis=1) == labels).mean())
    return accuracy, float(-np.log(np.maximum(of_label, 1e-12)).mean())


ACTIVATIONS = ("relu", "tanh", "logistic")


def _activated(values: Array, name: str) -> Array:
    if name == "relu":
        return np.maximum(values, np.float32(0.0))
    if name == "tanh":
        return np.asarray(np.tanh(values))
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * values)), dtype=values.dtype)


def _fits(layers: Sequence[tuple[Part, Part | None]], is_out_in: bool) -> bool:
    out, inside = (0, 1) if is_out_in else (1, 0)
    follow = all(
        before[0].shape[out] == after[0].shape[inside] for before, after in pairwise(layers)
    )
    return follow and all(
        bias is None or bias.shape[0] == matrix.shape[out] for matrix, bias in layers
    )
