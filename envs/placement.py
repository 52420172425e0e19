"""`tierwise/Placement-v0`: where does the next request run?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.simulator import Question, Simulator
from envs.world import World, make_world
from tierwise.cost.objective import DEFAULT_OBJECTIVE
from tierwise.domain.decision import NotPlaced, Placed
from tierwise.domain.ids import PolicyId, RequestId
from tierwise.domain.outcome import Outcome
from tierwise.placement import signals
from tierwise.placement.features import BOUND, CANDIDATES_MAX, FEATURES, GAP_MAX, encode, gaps
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.ranking import Ranking, rank

GAP, VALID = len(FEATURES), len(FEATURES) + 1
COLUMNS = len(FEATURES) + 2
COST_S_MAX = 30.0  # of one request, so that one outlier does not drown an episode
FOLLOWING = (15, 60)
SAVED_MAX = (
    20.0  # mean costs that one request can earn or lose, so that few do not drown the others
)
POLICY_ID = PolicyId("environment@1")

Observation = NDArray[np.float32]
Mask = NDArray[np.bool_]
Prices = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Settled:
    """A request that has ended, in mean costs of a request under the base score.

    Attributes:
        decision: Number of the decision that placed it, the last one if it was refused in between;
            None if it had no choice.
        saved: Its cost under the base score minus its cost, within ±20.
        cost: Its cost, at most 20.
    """

    decision: int | None
    saved: float
    cost: float


class Episode:
    """One trace being decided step by step; shared by the single and the batched environment.

    What each request would have cost under the tuned base score is simulated first. Rewards are
    relative to that: so a hard world weighs no more than an easy one, and what the trace itself
    does to the costs cancels out (input-dependent baseline: Mao et al., ICLR 2019).
    """

    def __init__(
        self,
        world: World,
        seed: int,
        base_s: Mapping[RequestId, float] | None = None,
        prices: Prices | None = None,
    ) -> None:
        """Start a trace.

        Args:
            world: The cluster and its workload.
            seed: Of the simulation.
            base_s: What each request costs under the base score; None simulates that first.
            prices: Of `placement.signals`, shape (15,), to learn on top of; they are in the gap.
        """
        self._prices = prices
        if base_s is None:
            heuristic = Simulator(world, seed).run(EarliestCompletion())
            base_s = {outcome.request_id: _cost_s(outcome) for outcome in heuristic}
        self._world, self._seed, self._base_s = world, seed, base_s
        self._mean_s = sum(self._base_s.values()) / max(1, len(self._base_s)) or 1.0
        self._simulator = Simulator(world, seed)
        names = [name for name, _, _ in self._simulator.schedule.planned()]
        self._places = {
            name: place for place, name in enumerate(names[: len(world.trace.arrivals)])
        }
        self._place = 0  # in the trace, of the latest arrival that was asked about
        relative = [self._relative(name) for name in self._places]
        self._summed = np.concatenate([[0.0], np.cumsum(relative)])
        self._paid_count = 0
        self._decision_count = 0
        self._decided: dict[RequestId, int] = {}  # by which decision each open request was placed
        self._question: Question | None = None
        self._ranking: Ranking | None = None
        self.invalid_count = 0
        self.cost_s = 0.0

    def again(self) -> "Episode":
        """Return the same trace from its start; the base score is not simulated anew."""
        return Episode(self._world, self._seed, self._base_s, self._prices)

    def advance(self) -> bool:
        """Run to the next decision with a choice; return False when the trace has ended."""
        simulator = self._simulator
        while (question := simulator.next_question()) is not None:
            found = rank(question.ask.view, question.ask.request, candidates_max=CANDIDATES_MAX)
            if isinstance(found, NotPlaced):
                simulator.answer(found, POLICY_ID)
                continue
            if len(found.scores) == 1:
                simulator.answer(self._order(found, 0), POLICY_ID)
                continue
            self._question, self._ranking = question, found
            return True
        return False

    def observe(self, out: Observation) -> None:
        """Write the open decision into `out`, shape (16, ≥ 26), zero-padded.

        After the features come the base score's gap to the best one ÷ deadline (with the prices,
        if there are any), and 1 for valid.
        """
        assert self._question is not None and self._ranking is not None
        ask, ranking = self._question.ask, self._ranking
        k = len(ranking.scores)
        out[k:] = 0.0
        out[:k, :GAP] = encode(ask.view, ask.request, ranking.estimates, ranking.scores)
        gap = gaps(ranking.scores, ask.request.deadline_s)
        if self._prices is not None:
            gap += signals.encode(ask.view, ask.request, ranking.estimates) @ self._prices
            gap = np.minimum(gap - gap.min(), GAP_MAX)
        out[:k, GAP] = gap
        out[:k, VALID] = 1.0

    def decide(self, action: int) -> None:
        """Place the open request on the candidate in row `action`."""
        assert self._ranking is not None
        if not 0 <= action < len(self._ranking.scores):
            self.invalid_count += 1
            action = int(self._ranking.scores.argmin())
        assert self._question is not None
        self._decided[self._question.ask.request.request_id] = self._decision_count
        self._decision_count += 1
        self._simulator.answer(self._order(self._ranking, action), POLICY_ID)

    def collect(self) -> float:
        """Return by how much the requests that ended since the last call beat the base score.

        That is the sum of (cost under the base score − cost) ÷ mean cost under the base score.
        """
        return sum(settled.saved for settled in self.settle())

    def settle(self) -> list[Settled]:
        """Return the requests that ended since the last call."""
        outcomes = self._simulator.outcomes
        settled: list[Settled] = []
        for outcome in outcomes[self._paid_count :]:
            cost_s = _cost_s(outcome)
            self.cost_s += cost_s
            saved = (self._base_s.get(outcome.request_id, cost_s) - cost_s) / self._mean_s
            settled.append(
                Settled(
                    decision=self._decided.pop(outcome.request_id, None),
                    saved=min(max(saved, -SAVED_MAX), SAVED_MAX),
                    cost=min(cost_s / self._mean_s, SAVED_MAX),
                )
            )
        self._paid_count = len(outcomes)
        return settled

    def hindsight(self) -> tuple[float, ...]:
        """Return what no policy can know of the open request, but its judge may; 4 numbers.

        That is its cost under the base score ÷ the mean (at most 20), the log of that mean, and the
        same costs of the next 15 and 60 arrivals on average: a critic that sees them knows how
        hard this trace is here and now, whatever the policy does (input-driven baseline: Mao et
        al., ICLR 2019).
        """
        assert self._question is not None
        name = self._question.ask.request.request_id
        self._place = self._places.get(name, self._place)
        return (
            self._relative(name),
            math.log(self._mean_s),
            *(self._following(count) for count in FOLLOWING),
        )

    def _relative(self, name: RequestId) -> float:
        return min(self._base_s.get(name, self._mean_s) / self._mean_s, SAVED_MAX)

    def _following(self, count: int) -> float:
        """Return the mean relative cost of the next arrivals, 0 at the end of the trace."""
        first = self._place + 1
        last = min(first + count, len(self._summed) - 1)
        return float(self._summed[last] - self._summed[first]) / count if last > first else 0.0

    @property
    def gain(self) -> float:
        """Return 1 − cost ÷ cost under the base score, of the requests that have ended."""
        return 1.0 - self.cost_s / max(1e-9, self._mean_s * self._paid_count)

    @property
    def candidate_count(self) -> int:
        """Return how many of the 16 actions are valid."""
        return 0 if self._ranking is None else len(self._ranking.scores)

    @property
    def ended_count(self) -> int:
        """Return how many requests have ended."""
        return self._paid_count

    def _order(self, ranking: Ranking, first: int) -> Placed:
        """Put the chosen candidate first and the others behind it by base score."""
        rows = ranking.estimates.candidates
        rest = [i for i in np.argsort(ranking.scores, kind="stable").tolist() if i != first]
        return Placed(node_ids=tuple(rows[i].node.node_id for i in (first, *rest)))


def _cost_s(outcome: Outcome) -> float:
    return min(DEFAULT_OBJECTIVE.cost_s(outcome), COST_S_MAX)


class PlacementEnv(gymnasium.Env[Observation, np.int64]):
    """Place requests on edge, fog and cloud nodes, at minimal cost.

    ### Description
    A simulated cluster serves a trace. Nodes and scheduler are the production state machines; each
    step is one decision that the agent of the user's edge node would take live.

    ### Action Space
    `Discrete(16)`: the candidate to run on, in the order of the observation's rows. An invalid
    action is replaced by the base score's choice and counted in `info["invalid_count"]`;
    `action_masks()` tells which are valid.

    ### Observation Space
    `Box(shape=(16, 26))`, float32: per candidate the 24 features of `placement.features`, the gap
    of its base score to the best ÷ deadline, and 1 if the row is valid.

    ### Rewards
    For each request that ended since the last decision: what the objective (`cost.objective`) made
    of it under the tuned base score minus what it makes of it now, each at most 30
    second-equivalents, ÷ the mean under the base score; within ±20. The base score itself earns 0.

    ### Starting State
    A fresh world of the preset, drawn from the seed; nothing is warm.

    ### Episode End
    Truncation when the trace has ended and every request has its end: the task itself never ends.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - so does gymnasium

    def __init__(self, preset: str = "random", request_count: int = 400) -> None:
        """Make the environment.

        Args:
            preset: A world of `envs.world`, or "random".
            request_count: Requests per episode.
        """
        self._preset = preset
        self._request_count = request_count
        self.observation_space = spaces.Box(
            -BOUND, GAP_MAX, shape=(CANDIDATES_MAX, COLUMNS), dtype=np.float32
        )
        self.action_space = spaces.Discrete(CANDIDATES_MAX)
        self._episode: Episode | None = None
        self._observation = np.zeros((CANDIDATES_MAX, COLUMNS), dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start a new world; `options={"world_seed": n}` chooses it exactly."""
        super().reset(seed=seed)
        world_seed = (options or {}).get("world_seed")
        if world_seed is None:
            world_seed = int(self.np_random.integers(2**31))
        self._episode = new_episode(self._preset, world_seed, self._request_count)
        self._episode.observe(self._observation)
        return self._observation.copy(), self._info()

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Place one request and run on to the next decision."""
        assert self._episode is not None, "call reset first"
        self._episode.decide(int(action))
        is_over = not self._episode.advance()
        reward = self._episode.collect()
        if not is_over:
            self._episode.observe(self._observation)
        return self._observation.copy(), reward, False, is_over, self._info()

    def action_masks(self) -> Mask:
        """Return which actions are valid now, shape (16,), bool."""
        mask: Mask = self._observation[:, VALID] > 0.0
        return mask

    def _info(self) -> dict[str, Any]:
        assert self._episode is not None
        return {
            "invalid_count": self._episode.invalid_count,
            "ended_count": self._episode.ended_count,
            "cost_s": self._episode.cost_s,
            "gain": self._episode.gain,
        }


def new_episode(
    preset: str, world_seed: int, request_count: int, prices: Prices | None = None
) -> Episode:
    """Return an episode that stands at its first decision.

    Worlds without any choice (all requests have one candidate) are passed over.
    """
    for offset in range(100):
        seed = world_seed + offset
        world = make_world(preset, seed, request_count=request_count)
        episode = Episode(world, seed, prices=prices)
        if episode.advance():
            return episode
    raise ValueError(f"100 worlds of preset {preset!r} in a row hold no decision")
