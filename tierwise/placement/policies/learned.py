"""The learned policy: a residual on the base score, as a NumPy forward pass.

    logit(c) = −β·score(c) ÷ deadline + λ·f(c, context)
    h(c) = relu(W2·relu(W1·x(c)))     context = mean(h) ‖ max(h)     f = w4·relu(W3·[h(c), context])

One network serves all candidates, so any number of nodes is fine and their order does not matter.
λ = 0 is the pure heuristic. Files are `.npz` without pickles, plus a JSON card.
"""

import io
import math
import zipfile
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tierwise.cost.estimate import Float
from tierwise.domain.decision import Decision, NotPlaced
from tierwise.domain.ids import PolicyId, is_name
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.errors import InvalidArgument, NotFound
from tierwise.placement.features import CANDIDATES_MAX, FEATURES, SCHEMA, encode
from tierwise.placement.ranking import Ranking, rank
from tierwise.placement.score import ScoreWeights

Float32 = NDArray[np.float32]
FILE_BYTES_MAX = 8 << 20
HIDDEN_MAX = 512
RANGE_MARGIN = 0.5  # of a column's trained range, on both sides


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

    def forward(self, features: Float32) -> Float32:
        """Return the residual f of each candidate, shape (k,), for features of shape (k, F)."""
        hidden = np.maximum(features @ self.w1 + self.b1, 0.0)
        hidden = np.maximum(hidden @ self.w2 + self.b2, 0.0)
        width = hidden.shape[1]
        # The context is the same for all candidates: its share of the layer is computed once.
        shared = hidden.mean(axis=0) @ self.w3[width : 2 * width]
        shared = shared + hidden.max(axis=0) @ self.w3[2 * width :] + self.b3
        out = np.maximum(hidden @ self.w3[:width] + shared, 0.0)
        residual: Float32 = out @ self.w4 + self.b4
        return residual


class Card(msgspec.Struct, kw_only=True, frozen=True):
    """What a policy file says of itself."""

    name: str
    version: int
    schema: int
    beta: float
    lam: float
    score: dict[str, float]
    low: list[float]  # per feature, what was seen in training
    high: list[float]
    command: str = ""
    seed: int = 0
    commit: str = ""
    data: str = ""
    evaluation: dict[str, Any] = msgspec.field(default_factory=dict)


@dataclass(slots=True)
class LearnedPolicy:
    """Decides by the largest logit; falls back to the base score when it should not be trusted."""

    network: Network
    card: Card
    policy_id: PolicyId = field(init=False)
    _weights: ScoreWeights = field(init=False)
    _low: Float32 = field(init=False)
    _high: Float32 = field(init=False)

    def __post_init__(self) -> None:
        """Prepare what every decision needs."""
        self.policy_id = PolicyId(f"{self.card.name}@{self.card.version}")
        self._weights = ScoreWeights(**self.card.score)
        low = np.array(self.card.low, dtype=np.float32)
        high = np.array(self.card.high, dtype=np.float32)
        margin = RANGE_MARGIN * (high - low) + 1e-3
        self._low, self._high = low - margin, high + margin

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the candidates by falling logit, or by rising base score with the reason why."""
        ranking = rank(view, request, self._weights, candidates_max=CANDIDATES_MAX)
        if isinstance(ranking, NotPlaced):
            return ranking
        if len(ranking.scores) == 1:
            return ranking.placed(self.policy_id, np.zeros(1, dtype=np.intp))
        features = encode(view, request, ranking.estimates, ranking.scores)
        if (features < self._low).any() or (features > self._high).any():
            outside = (features < self._low) | (features > self._high)
            column = FEATURES[int(outside.any(axis=0).argmax())]
            return self._fall_back(ranking, f"{column} is outside the trained range")
        residuals = self.network.forward(features).astype(np.float64)
        if not np.isfinite(residuals).all():
            return self._fall_back(ranking, "the network gave no finite number")
        logits = self.logits(ranking.scores, residuals, request.deadline_s)
        order = np.argsort(-logits, kind="stable")
        return ranking.placed(
            self.policy_id,
            order,
            residuals=self.card.lam * residuals,
            propensities=_softmax(logits),
        )

    def logits(self, scores: Float, residuals: Float, deadline_s: float) -> Float:
        """Return −β·(score − best) ÷ deadline + λ·residual, shape (k,)."""
        gap = (scores - scores.min()) / max(deadline_s, 1e-3)
        return np.asarray(-self.card.beta * gap + self.card.lam * residuals, dtype=np.float64)

    def _fall_back(self, ranking: Ranking, why: str) -> Decision:
        order = np.argsort(ranking.scores, kind="stable")
        return ranking.placed(self.policy_id, order, fallback=why)


def save(network: Network, card: Card) -> tuple[bytes, bytes]:
    """Return (npz, JSON card)."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{f.name: getattr(network, f.name) for f in fields(Network)})
    return buffer.getvalue(), msgspec.json.format(msgspec.json.encode(card), indent=2)


def load(weights: bytes, card: bytes) -> LearnedPolicy:
    """Return the policy in a file and its card; nothing in either is ever executed.

    Raises:
        InvalidArgument: Wrong size, format, schema, names, shapes or non-finite numbers.
    """
    try:
        about = msgspec.json.decode(card, type=Card)
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"the policy's card is not valid: {error}") from None
    if about.schema != SCHEMA:
        raise InvalidArgument(
            f"the policy was trained for feature schema {about.schema}, this is schema {SCHEMA}: "
            "train it again"
        )
    numbers = [about.beta, about.lam, *about.low, *about.high, *about.score.values()]
    known = {f.name for f in fields(ScoreWeights)}
    if not is_name(about.name) or about.version < 1:
        raise InvalidArgument("the card needs a name (a-z, 0-9, '-') and a version from 1")
    if not all(map(math.isfinite, numbers)) or set(about.score) - known:
        raise InvalidArgument("the card holds non-finite numbers or unknown score weights")
    if not len(about.low) == len(about.high) == len(FEATURES):
        raise InvalidArgument(f"the card's feature range must have {len(FEATURES)} columns")
    return LearnedPolicy(_network(weights), about)


def _network(weights: bytes) -> Network:
    if len(weights) > FILE_BYTES_MAX:
        raise InvalidArgument(f"the policy file has {len(weights)} bytes; at most {FILE_BYTES_MAX}")
    names = [f.name for f in fields(Network)]
    try:
        with zipfile.ZipFile(io.BytesIO(weights)) as archive:
            inside = {info.filename: info.file_size for info in archive.infolist()}
        if sorted(inside) != sorted(f"{name}.npy" for name in names):
            raise InvalidArgument(f"the policy file must hold exactly the arrays {', '.join(names)}")
        if sum(inside.values()) > FILE_BYTES_MAX:  # before anything is inflated
            raise InvalidArgument(f"the policy inflates beyond {FILE_BYTES_MAX} bytes")
        with np.load(io.BytesIO(weights), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in names}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError) as error:
        raise InvalidArgument(
            f"this is no policy file (an .npz without pickled objects): {error}"
        ) from None
    inputs, hidden = (*arrays["w1"].shape, 0, 0)[:2]
    shapes = {
        "w1": (len(FEATURES), hidden),
        "b1": (hidden,),
        "w2": (hidden, hidden),
        "b2": (hidden,),
        "w3": (3 * hidden, hidden),
        "b3": (hidden,),
        "w4": (hidden,),
        "b4": (),
    }
    if not 1 <= hidden <= HIDDEN_MAX or inputs != len(FEATURES):
        raise InvalidArgument(f"w1 must have {len(FEATURES)} rows and 1 to {HIDDEN_MAX} columns")
    for name, shape in shapes.items():
        array = arrays[name]
        if array.dtype != np.float32 or array.shape != shape:
            raise InvalidArgument(
                f"{name} is {array.dtype}{array.shape}; it must be float32{shape}"
            )
        if not np.isfinite(array).all():
            raise InvalidArgument(f"{name} holds numbers that are not finite")
    return Network(**arrays)


def from_package() -> LearnedPolicy:
    """Return the policy that ships with tierwise.

    Raises:
        NotFound: This installation has none.
    """
    return load(_package_file("shipped.npz"), package_card())


def package_card() -> bytes:
    """Return the card of the shipped policy.

    Raises:
        NotFound: This installation has none.
    """
    return _package_file("shipped.json")


def _package_file(name: str) -> bytes:
    try:
        return resources.files("tierwise.placement.policies").joinpath(name).read_bytes()
    except FileNotFoundError:
        raise NotFound("this installation ships no trained policy; use ect") from None


def _softmax(logits: Float) -> Float:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum(), dtype=np.float64)
