"""Models made for one client of the round's models. Pure."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tierwise.functions.fl.geometry import Float, shares

Vector = NDArray[np.float32]


def accuracy_weights(accuracies: Float, sharpness: float = 1.0) -> Float:
    """Return weights ∝ max(accuracy, 0)^sharpness with the sum 1, shape (K,).

    What each client's model scores on the data it is to serve, as the weights of a weighted average
    (McMahan et al., AISTATS 2017, Alg. 1, with accuracies in the place of counts). Equal weights if
    nobody is ever right.
    """
    return shares(np.power(np.maximum(accuracies, 0.0), sharpness))


def attentive_weights(distances_squared: Float, client: int, scale: float) -> Float:
    """Return exp(−‖w_i − w_j‖² ÷ σ), made to sum to 1, shape (K,): those who are alike help.

    The attention of FedAMP (Huang et al., AAAI 2021, section 3, A(x) = 1 − e^(−x÷σ)), with the own
    model in it like the others.
    """
    raised: Float = np.exp(-distances_squared[client] / scale)
    return raised / float(raised.sum())


def fomo_weights(losses: Float, loss_before: float, distances: Float) -> Float:
    """Return FedFomo's weights for one client, with the sum 1, shape (K,).

    w_n ∝ max(0, (L_i(θ_i) − L_i(θ_n)) ÷ ‖θ_n − θ_i‖): how much n's model lowers i's loss, by the
    way to it. Zhang, Sapra, Fidler, Yeung and Alvarez, ICLR 2021, section 3 (the weights, and their
    clipping at 0). All 0 if no model is better than the one before.

    Args:
        losses: Of each model on the data of client i.
        loss_before: Of i's own model of the round before, θ_i.
        distances: ‖θ_n − θ_i‖ of each model.
    """
    gains = np.maximum(loss_before - losses, 0.0)
    is_away = distances > 0.0
    raised: Float = np.where(is_away, gains / np.where(is_away, distances, 1.0), 0.0)
    total = float(raised.sum())
    return raised / total if total > 0.0 else np.zeros(len(raised))


def ditto_step(
    personal: ArrayLike,
    gradient: ArrayLike,
    shared: ArrayLike,
    *,
    pull: float,
    learning_rate: float,
) -> Float:
    """Return v − η·(∇F(v) + λ·(v − w)): one step of a personal model towards its own data.

    Ditto (Li, Hu, Beirami and Smith, ICML 2021, Alg. 1): v is the client's own, w the shared model,
    λ = `pull`. Arrays of one shape.
    """
    own = np.asarray(personal, dtype=np.float64)
    slope = np.asarray(gradient, dtype=np.float64)
    return own - learning_rate * (slope + pull * (own - np.asarray(shared, dtype=np.float64)))


def ditto_mean(update: ArrayLike, shared: ArrayLike, *, pull: float) -> Vector:
    """Return (u + λ·w) ÷ (1 + λ): Ditto's personal model, if the update solved the client's part.

    The minimum of ½‖v − u‖² + λ÷2·‖v − w‖², that is, Ditto's objective (same paper, section 3) for
    a client whose loss is quadratic around its update u: λ = 0 is the client's own model, λ → ∞ the
    shared one. Where ditto_step ends, if it is repeated with the gradient v − u.
    """
    own, other = np.asarray(update, dtype=np.float32), np.asarray(shared, dtype=np.float32)
    share = pull / (1.0 + pull)
    return np.asarray(own + np.float32(share) * (other - own), dtype=np.float32)
