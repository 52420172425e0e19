"""A small queue model of the cluster, to try a decision in several sampled futures at once.

Nodes are first-in-first-out queues with as many servers as CPUs; each knows which functions it
holds warm and evicts when its memory is full. Requests arrive at the edges as Poisson processes
with the learnt rates, run for the learnt means times lognormal noise, and go where the base score
sends them. All of it is what the viewer believes: nothing here knows the real future.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierwise.cost.estimate import Float, predict_wait_s
from tierwise.cost.objective import DEFAULT_OBJECTIVE
from tierwise.cost.profiles import RATE_WINDOW_S
from tierwise.domain.function import FunctionProfile, Priority
from tierwise.domain.ids import FunctionId
from tierwise.domain.prices import PriceTable
from tierwise.domain.topology import LinkTable, Node, Tier
from tierwise.domain.view import ClusterView, NodeView
from tierwise.placement.score import ScoreWeights

Index = NDArray[np.intp]

FUNCTIONS_MAX = 16  # that arrive in a sampled future, the most frequent ones
CPUS_MAX = 8  # servers of one node that are told apart
NOISE = 0.25  # sigma of a run's lognormal noise
SECONDS_MAX = 1e6  # beyond this a belief says no more than "never"
SPREAD_MIN_S = 1.0  # a rate is never told from less time
UNSEEN_MAX_S = 5.0  # of an old reading: what is older has been served


@dataclass(frozen=True, slots=True)
class Habit:
    """What requests of one function are like."""

    deadline_s: float
    urgency: float  # priority ÷ NORMAL
    memory_mib: float
    request_bytes: float


class Ground:
    """What is fixed of the modelled nodes, n of them: paths, speeds, prices."""

    def __init__(self, links: LinkTable, nodes: tuple[Node, ...], prices: PriceTable) -> None:
        """Look everything up once; nodes and links change rarely, decisions are many."""
        self.links = links
        self.prices = prices
        self.nodes = nodes
        self.place = {node.node_id: i for i, node in enumerate(nodes)}
        found = [[links.between(a, b) for b in nodes] for a in nodes]
        # One way in seconds, and seconds per byte, both (n, n): row origin, column target.
        self.delay_s = _finite([[x.rtt_s / 2 + x.jitter_s / 2 for x in row] for row in found])
        self.s_per_byte = _finite([[1.0 / x.bandwidth_bytes_per_s for x in row] for row in found])
        self.speed = np.array([node.speed for node in nodes])
        self.cpus = np.array([min(CPUS_MAX, max(1, int(n.capacity.cpus))) for n in nodes])
        self.room = self.speed * self.cpus
        by_node = [prices.by_tier[node.tier] for node in nodes]
        self.usd_per_mib_s = np.array([p.usd_per_gb_s for p in by_node]) / 1024.0
        self.usd_per_call = np.array([p.usd_per_request for p in by_node])
        gate = [
            [prices.moved_usd(a.tier, b.tier, 1.0) * (a is not b) for b in nodes] for a in nodes
        ]
        self.usd_per_byte = np.array(gate)  # (n, n): row source, column target
        edges = [i for i, node in enumerate(nodes) if node.tier is Tier.EDGE]
        self.origins = np.array(edges or range(len(nodes)))


def total_rate(profiles: Sequence[FunctionProfile]) -> float:
    """Return calls per second over the cluster.

    A profile's rate has decayed by its window and begins at 0, so it says too little at first.
    Under a constant rate λ for T seconds it is λ(1 − exp(−T/window)), and the count is λT: the
    quotient of the two tells T, and the count then tells λ.
    """
    count = sum(p.call_count for p in profiles)
    rate = sum(p.rate_per_s for p in profiles)
    if count <= 0 or not 0.0 < rate < SECONDS_MAX:
        return 0.0
    quotient = min(1.0, rate * RATE_WINDOW_S / count)
    windows = float(np.interp(-quotient, -_QUOTIENTS, _WINDOWS))
    return max(rate, count / max(SPREAD_MIN_S, windows * RATE_WINDOW_S))


_WINDOWS = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 200)])
_QUOTIENTS = np.concatenate([[1.0], -np.expm1(-_WINDOWS[1:]) / _WINDOWS[1:]])


@dataclass(frozen=True, slots=True)
class First:
    """The decision to be tried, in one row per candidate, all of shape (w,).

    `node` are places in the model's nodes; the others are the terms of `cost.estimate`.
    """

    node: Index
    transfer_s: Float
    cold_start_s: Float
    run_s: Float
    return_s: Float
    displaced_s: Float
    money_usd: Float
    function: FunctionId
    deadline_s: float
    urgency: float


class Model:
    """The cluster as a viewer believes it to be, ready to be lived through."""

    def __init__(
        self,
        view: ClusterView,
        rows: Sequence[NodeView],
        ground: Ground,
        habits: Mapping[FunctionId, Habit],
        weights: ScoreWeights,
    ) -> None:
        """Set up beliefs.

        Args:
            view: What is known.
            rows: Its nodes that are modelled, n of them.
            ground: What is fixed of these nodes.
            habits: What is known of requests; the functions that are in it arrive.
            weights: Of the base score, which decides what follows.
        """
        self._ground = ground
        self._weights = weights
        known = [(f, view.profile(f)) for f in habits]
        known.sort(key=lambda pair: -pair[1].rate_per_s)
        known = known[:FUNCTIONS_MAX]
        self.functions = {f: i for i, (f, _) in enumerate(known)}
        profiles = [p for _, p in known]
        mine = [habits[f] for f, _ in known]
        self.rate = total_rate(list(view.profiles.values()))
        share = np.array([max(0.0, p.rate_per_s) for p in profiles]) + 1e-9
        self._share = np.cumsum(share / share.sum())
        self._run_s = _finite([p.run_s for p in profiles])
        self._cold_s = _finite([p.cold_start_s for p in profiles])
        self._response = _finite([p.response_bytes for p in profiles])
        self._deadline_s = _finite([h.deadline_s for h in mine])
        self._urgency = np.array([h.urgency for h in mine])
        self._memory = np.array([h.memory_mib for h in mine])
        self._bytes = _finite([h.request_bytes for h in mine])
        self._evicted_first = np.argsort(share * self._cold_s, kind="stable")
        self._age_s = _finite([max(0.0, view.now_s - row.received_at_s) for row in rows])
        readings = [row.reading for row in rows]
        self._wait_s = _finite([predict_wait_s(row, view.now_s, Priority.NORMAL) for row in rows])
        self._busy = ground.cpus - np.array([min(float(CPUS_MAX), r.free.cpus) for r in readings])
        self._free_mib = _finite([r.free.memory_mib for r in readings])
        self._price = _finite([r.eviction_price_s_per_mib for r in readings])
        self._warm = np.zeros((len(known), len(rows)), dtype=np.bool_)
        for place, reading in enumerate(readings):
            for function, count in reading.warm.items():
                if count > 0 and function in self.functions:
                    self._warm[self.functions[function], place] = True

    def costs(
        self, first: First, rng: np.random.Generator, *, samples: int, horizon: int, hidden: float
    ) -> Float:
        """Return what each candidate leads to in each future, shape (w, samples).

        That is summed over this request and the next `horizon` ones: the objective, with cold
        starts and evictions charged as the base score charges them, for much of what they bring
        or cost comes later. A future is the same for every candidate (common random numbers), so
        only differences count.

        Args:
            first: The decision.
            rng: Of the futures.
            samples: How many futures.
            horizon: How many requests arrive in each.
            hidden: Share of the cluster's traffic that may have reached a node since its reading.
        """
        lanes = self._lanes(len(first.node), samples, self._servers(rng, samples, hidden))
        noise = np.exp(NOISE * rng.standard_normal((horizon + 1, samples)))
        costs = self._place_first(lanes, first, noise[-1])
        if self.rate > 0.0 and horizon > 0:
            costs += self._follow(lanes, noise[:-1], rng)
        return costs

    def _lanes(self, width: int, samples: int, servers: Float) -> "_Lanes":
        warm = np.empty((width, samples, *self._warm.shape), dtype=np.bool_)
        warm[:] = self._warm
        free_mib = np.empty((width, samples, len(self._free_mib)))
        free_mib[:] = self._free_mib
        w, s = np.arange(width)[:, None], np.arange(samples)
        return _Lanes(w, s, np.stack([servers] * width), warm, free_mib)

    def _place_first(self, lanes: "_Lanes", first: First, noise: Float) -> Float:
        """Place the request itself on each candidate; return what that costs, shape (w, s)."""
        objective, weights = DEFAULT_OBJECTIVE, self._weights
        place = first.node[:, None] + np.zeros_like(lanes.w + lanes.s)
        begin_s = np.maximum(lanes.slots[lanes.w, lanes.s, place, 0], first.transfer_s[:, None])
        end_s = begin_s + first.cold_start_s[:, None] + first.run_s[:, None] * noise
        latency_s = end_s + first.return_s[:, None]
        price = objective.per_usd_s * first.money_usd + weights.displaced * first.displaced_s
        price -= (1.0 - weights.cold_start) * first.cold_start_s
        costs: Float = latency_s + price[:, None]
        costs += objective.per_miss_s * first.urgency * (latency_s > first.deadline_s)
        lanes.occupy(place, end_s)
        if first.function in self.functions:
            self._start(lanes, np.full(len(lanes.s), self.functions[first.function]), place)
        return costs

    def _follow(self, lanes: "_Lanes", noise: Float, rng: np.random.Generator) -> Float:
        """Let requests arrive and go by base score; return what they cost, shape (w, s).

        Args:
            lanes: The queues, which change.
            noise: Factors of run times, shape (horizon, samples).
            rng: Of arrivals.
        """
        objective, weights, ground = DEFAULT_OBJECTIVE, self._weights, self._ground
        horizon, samples = noise.shape
        w, s, slots, warm = lanes.w, lanes.s, lanes.slots, lanes.warm
        costs = np.zeros((len(w), samples))
        # All terms at once, of shape (horizon, samples) and (…, n).
        at_s = np.cumsum(rng.exponential(1.0 / self.rate, (horizon, samples)), axis=0)
        kind = np.searchsorted(self._share, rng.random((horizon, samples)))
        kind = np.minimum(kind, len(self._share) - 1)
        origin = ground.origins[rng.integers(len(ground.origins), size=(horizon, samples))]
        delay_s, s_per_byte = ground.delay_s[origin], ground.s_per_byte[origin]
        sent, answered = self._bytes[kind][..., None], self._response[kind][..., None]
        go_s, back_s = delay_s + sent * s_per_byte, delay_s + answered * s_per_byte
        run_s = self._run_s[kind][..., None] / ground.speed
        memory = self._memory[kind][..., None]
        usd = run_s * memory * ground.usd_per_mib_s + ground.usd_per_call
        usd += sent * ground.usd_per_byte[origin] + answered * ground.usd_per_byte.T[origin]
        cold_s = self._cold_s[kind][..., None] / ground.speed
        displaced_s = np.maximum(memory - self._free_mib, 0.0) * self._price
        cold_price = weights.cold_start * cold_s + weights.displaced * displaced_s
        fixed_s = go_s + run_s + back_s
        fixed_price = fixed_s + weights.per_usd_s * usd
        deadline_s, urgency = self._deadline_s[kind], self._urgency[kind]
        slack_s = deadline_s[..., None] - fixed_s
        late_price = (weights.per_late_s * urgency)[..., None]
        ready_s = at_s[..., None] + go_s
        run_s = run_s * noise[..., None]
        fixed_cost = back_s - at_s[..., None] + objective.per_usd_s * usd
        start_price = cold_price - cold_s  # a cold start is in part an investment
        miss_cost = objective.per_miss_s * urgency
        limit_s = deadline_s[..., None] - back_s + at_s[..., None]
        for step in range(horizon):
            number = kind[step]
            is_cold = ~warm[:, s, number]
            free_s = slots[..., 0]
            wait_s = np.maximum(free_s - at_s[step][:, None], 0.0)
            late_s = np.maximum(wait_s + is_cold * cold_s[step] - slack_s[step], 0.0)
            score = wait_s + fixed_price[step] + is_cold * cold_price[step]
            score += late_s * late_price[step]
            place = score.argmin(axis=2)
            end_s = np.maximum(free_s[w, s, place], ready_s[step][s, place])
            starts = is_cold[w, s, place]
            end_s += starts * cold_s[step][s, place] + run_s[step][s, place]
            costs += end_s + fixed_cost[step][s, place]
            costs += miss_cost[step] * (end_s > limit_s[step][s, place])
            lanes.occupy(place, end_s)
            if starts.any():
                costs += starts * start_price[step][s, place]
                self._start(lanes, number, place)
        # What is still queued delays those that come later: rate × share × backlog² ÷ 2.
        left_s = np.maximum(slots[..., 0] - at_s[-1][:, None], 0.0)
        costs += 0.5 * self.rate * (left_s * left_s) @ (ground.room / ground.room.sum())
        return costs

    def _servers(self, rng: np.random.Generator, samples: int, hidden: float) -> Float:
        """Return when each server comes free, rising, shape (samples, n, servers)."""
        ground = self._ground
        count = int(ground.cpus.max())
        server = np.arange(count)
        mean_s = float(np.diff(self._share, prepend=0.0) @ self._run_s) / ground.speed
        cpus = ground.cpus[:, None]
        # A backlog is work ÷ CPUs; some servers are done before the others.
        spread = 2.0 * self._wait_s[:, None] * (server + 0.5) / cpus
        is_busy = server >= cpus - self._busy[:, None]
        left_s = mean_s[:, None] * rng.random((samples, len(cpus), count))
        left_s = np.maximum(left_s - self._age_s[:, None], 0.0) * is_busy
        slots = np.maximum(np.where(self._wait_s[:, None] > 0.0, spread, 0.0), left_s)
        if hidden > 0.0 and self.rate > 0.0:
            share = ground.room / ground.room.sum()
            unseen = hidden * self.rate * np.minimum(self._age_s, UNSEEN_MAX_S) * share
            extra = rng.poisson(np.minimum(unseen, 1e3), (samples, len(unseen)))
            slots = slots + (extra * mean_s / ground.cpus)[..., None]
        slots = np.where(server < cpus, slots, np.inf)
        slots.sort(axis=-1)
        return slots

    def _start(self, lanes: "_Lanes", number: Index, place: Index) -> None:
        """Make function `number[s]` warm on `place[w, s]`; the cheapest other one may go."""
        w, s, warm, free_mib = lanes.w, lanes.s, lanes.warm, lanes.free_mib
        is_new = ~warm[w, s, number, place]
        warm[w, s, number, place] = True
        free_mib[w, s, place] -= is_new * self._memory[number]
        is_full = is_new & (free_mib[w, s, place] < 0.0)
        if is_full.any():
            at_w, at_s = np.nonzero(is_full)
            node = place[at_w, at_s]
            held = warm[at_w, at_s, :, node]
            held[np.arange(len(at_w)), number[at_s]] = False
            held = held[:, self._evicted_first]
            has_any = held.any(axis=1)
            victim = self._evicted_first[held.argmax(axis=1)]
            at_w, at_s, node, victim = (each[has_any] for each in (at_w, at_s, node, victim))
            warm[at_w, at_s, victim, node] = False
            free_mib[at_w, at_s, node] += self._memory[victim]


@dataclass(frozen=True, slots=True)
class _Lanes:
    """The state of n nodes in w × s parallel lives; it changes in place.

    `w` and `s` index lanes, of shape (w, 1) and (s,). `slots` are the times at which servers come
    free, rising, (w, s, n, servers); `warm` is (w, s, functions, n), `free_mib` (w, s, n).
    """

    w: Index
    s: Index
    slots: Float
    warm: NDArray[np.bool_]
    free_mib: Float

    def occupy(self, place: Index, end_s: Float) -> None:
        """Let the server that comes free first be busy until `end_s`; both of shape (w, s)."""
        servers = self.slots[self.w, self.s, place]
        servers[..., 0] = end_s
        servers.sort(axis=-1)
        self.slots[self.w, self.s, place] = servers


def _finite(values: object) -> Float:
    """Return an array within 0 … SECONDS_MAX, whatever was believed."""
    array = np.array(values, dtype=np.float64)
    return np.fmax(np.fmin(array, SECONDS_MAX), 0.0)  # fmin, unlike minimum, takes NaN for large
