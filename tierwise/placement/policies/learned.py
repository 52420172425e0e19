"""The learned policy: a residual on the base score, with a wide and a deep part.

    logit(c) = −β·(score(c) − best) ÷ deadline + λ·(f(c, context) − β·Σ price·signal(c))

Wide: a price for each signal (`placement.signals`), so that the policy may weigh the base score's
terms otherwise and knows what a request takes from others. Deep: a network on top, where the
prices leave something to gain; if it has learnt nothing it is not asked. (The shape is that of
Cheng et al., Wide & Deep Learning for Recommender Systems, 2016.)

λ = 0 is the pure heuristic. With a temperature above 0 the node is drawn from the softmax of the
logits: agents that decide on the same stale view then do not all run to the same node, and the
logged propensities are true. Where the network should not be trusted, the base score decides: that
is, where a candidate looks like none in training. What only the request says (how often its
function is called, its deadline, its size) is held to the trained range instead: it shifts all
candidates alike, and a function that is called ten times as often is still a busy function.
"""

import math
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from tierwise.cost.estimate import Float
from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.errors import NotFound
from tierwise.placement import signals
from tierwise.placement.features import BOUND, CANDIDATES_MAX, COMMON, FEATURES, encode, gaps
from tierwise.placement.network import Float32
from tierwise.placement.network import Network as Network
from tierwise.placement.network import initial as initial
from tierwise.placement.ranking import Ranking, rank_or_place, softmax
from tierwise.placement.score import ScoreWeights
from tierwise.placement.weights import Card as Card
from tierwise.placement.weights import Price as Price
from tierwise.placement.weights import pack, unpack_network
from tierwise.placement.weights import unpack_card as unpack_card

_FREE = Price(weight=0.0, low=0.0, high=signals.BOUND)
RANGE_MARGIN = 0.5  # of a column's trained range, on both sides
DECIMALS = 4  # of a residual: equal rows may differ in the last bits, by the machine's algebra


@dataclass(slots=True)
class LearnedPolicy:
    """Decides by logits; falls back to the base score when it should not be trusted."""

    network: Network
    card: Card
    policy_id: PolicyId = field(init=False)
    _weights: ScoreWeights = field(init=False)
    _low: Float32 = field(init=False)
    _high: Float32 = field(init=False)
    _common: tuple[Float32, Float32] = field(init=False)
    _is_deep: bool = field(init=False)
    _prices: Float | None = field(init=False)
    _signal_low: Float = field(init=False)
    _signal_high: Float = field(init=False)

    def __post_init__(self) -> None:
        """Prepare what every decision needs."""
        self.policy_id = PolicyId(f"{self.card.name}@{self.card.version}")
        self._weights = ScoreWeights(**self.card.score)
        low = np.clip(self.card.low, -BOUND, BOUND)
        high = np.clip(self.card.high, -BOUND, BOUND)
        self._common = low[COMMON].astype(np.float32), high[COMMON].astype(np.float32)
        margin = RANGE_MARGIN * (high - low) + 1e-3
        self._low = (low - margin).astype(np.float32)
        self._high = (high + margin).astype(np.float32)
        self._is_deep = not self.network.is_zero
        prices = [self.card.prices.get(name, _FREE) for name in signals.SIGNALS]
        self._prices = None
        if any(price.weight for price in prices):
            self._prices = np.array([price.weight for price in prices])
        low, high = np.array([(price.low, price.high) for price in prices]).T
        margin = RANGE_MARGIN * (high - low) + 1e-3
        self._signal_low, self._signal_high = low - margin, high + margin

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the candidates by falling logit, or by rising base score with the reason why.

        With a temperature the order is drawn (Gumbel-max), and propensities are the odds of being
        first. Equal logits go by base score, then by view order.
        """
        ranking = rank_or_place(
            self.policy_id, view, request, self._weights, candidates_max=CANDIDATES_MAX
        )
        if not isinstance(ranking, Ranking):
            return ranking
        residuals = np.zeros(len(ranking.scores))
        with np.errstate(over="ignore", invalid="ignore"):  # the sum below tells
            if self._prices is not None:
                seen = signals.encode(view, request, ranking.estimates)
                outside = (seen < self._signal_low) | (seen > self._signal_high)
                if np.logical_or.reduce(outside, axis=None):
                    return self._fall_back(ranking, _outside(signals.SIGNALS, outside))
                residuals -= self.card.beta * (seen @ self._prices)
            if self._is_deep:
                features = encode(view, request, ranking.estimates, ranking.scores)
                common = features[:, COMMON]
                np.maximum(common, self._common[0], out=common)
                np.minimum(common, self._common[1], out=common)
                outside = (features < self._low) | (features > self._high)
                if np.logical_or.reduce(outside, axis=None):
                    return self._fall_back(ranking, _outside(FEATURES, outside))
                residuals += self.network.forward(features)
            residuals = (self.card.lam * residuals).round(DECIMALS)
            logits = self.logits(ranking.scores, residuals, request.deadline_s)
        if not math.isfinite(np.add.reduce(logits)):
            return self._fall_back(ranking, "the network gave no finite number")
        propensities = None
        if self.card.temperature > 0.0:
            logits = logits / self.card.temperature
            propensities = softmax(logits)
            logits = logits + rng.gumbel(size=len(logits))
        return ranking.placed(
            self.policy_id,
            np.lexsort((ranking.scores, -logits)),
            residuals=residuals,
            propensities=propensities,
        )

    def logits(self, scores: Float, residuals: Float, deadline_s: float) -> Float:
        """Return −β·gap + residual (λ and the prices are in it already), shape (k,)."""
        logits: Float = residuals - self.card.beta * gaps(scores, deadline_s)
        return logits

    def _fall_back(self, ranking: Ranking, why: str) -> Decision:
        return ranking.placed(self.policy_id, ranking.by_score(), fallback=why)


def _outside(names: tuple[str, ...], outside: NDArray[np.bool_]) -> str:
    return f"{names[int(outside.any(axis=0).argmax())]} is outside the trained range"


def save(network: Network, card: Card) -> tuple[bytes, bytes]:
    """Return (npz, JSON card), which `load` takes."""
    return pack(network, card)


def load(weights: bytes, card: bytes) -> LearnedPolicy:
    """Return the policy in a file and its card; nothing in either is ever executed.

    Raises:
        InvalidArgument: Wrong size, format, schema, names, shapes, ranges or non-finite numbers.
    """
    about = unpack_card(card)
    return LearnedPolicy(unpack_network(weights), about)


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
