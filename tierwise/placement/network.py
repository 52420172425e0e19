"""The network of the learned policy: pure NumPy, so that an agent needs no ML framework.

    h(c) = relu(W2·relu(W1·x(c)))     context = mean(h) ‖ max(h)     f = w4·relu(W3·[h(c), context])

One network serves all candidates, so any number of nodes is fine and their order does not matter.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from tierwise.placement.features import FEATURES

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Weights, float32. F = 24 features, H hidden units; matrices are (inputs, outputs)."""

    w1: Float32  # (F, H)
    b1: Float32  # (H,)
    w2: Float32  # (H, H)
    b2: Float32  # (H,)
    w3: Float32  # (3H, H)
    b3: Float32  # (H,)
    w4: Float32  # (H,)
    b4: Float32  # ()

    @property
    def is_zero(self) -> bool:
        """Return whether the residual is 0 whatever the features are."""
        return not (self.w4.any() or self.b4.any())

    def arrays(self) -> dict[str, Float32]:
        """Return the weights by name, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def forward(self, features: Float32) -> Float32:
        """Return the residual f of each candidate, shape (k,), for features (k, F), k ≥ 1."""
        hidden = _relu(features @ self.w1, self.b1)
        hidden = _relu(hidden @ self.w2, self.b2)
        k, width = hidden.shape
        # The context is the same for all candidates: its share of the layer is computed once.
        context = np.empty(2 * width, dtype=np.float32)
        np.add.reduce(hidden, axis=0, out=context[:width])
        context[:width] /= k
        np.maximum.reduce(hidden, axis=0, out=context[width:])
        shared = context @ self.w3[width:]
        shared += self.b3
        residual: Float32 = _relu(hidden @ self.w3[:width], shared) @ self.w4
        residual += self.b4
        return residual


def initial(hidden: int, rng: np.random.Generator) -> Network:
    """Return the network that training starts from: random layers, but a residual of exactly 0.

    Layers before a ReLU are drawn from N(0, 2/inputs) (He et al., ICCV 2015); the last is zero.
    """

    def layer(inputs: int) -> Float32:
        return (rng.standard_normal((inputs, hidden)) * math.sqrt(2.0 / inputs)).astype(np.float32)

    def zeros(*shape: int) -> Float32:
        return np.zeros(shape, dtype=np.float32)

    return Network(
        w1=layer(len(FEATURES)),
        b1=zeros(hidden),
        w2=layer(hidden),
        b2=zeros(hidden),
        w3=layer(3 * hidden),
        b3=zeros(hidden),
        w4=zeros(hidden),
        b4=zeros(),
    )


def _relu(layer: Float32, bias: Float32) -> Float32:
    """Return relu(layer + bias), in place."""
    layer += bias
    return np.maximum(layer, 0.0, out=layer)
