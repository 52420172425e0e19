"""From what one live run showed to the parameters of a simulated world. Pure NumPy.

A call's latency split says how long it waited, moved and ran; the nodes' declared speeds and links
say what of that a world explains already. What is left are the parameters of `Overheads`:

    run       = call_s + (median · exp(sigma · z) + run_s) ÷ speed
    transfer  = link there and back + 2 × message_s
    cold      = median · factor ÷ speed

What needs no fitting is set as the daemons have it: views go out every VIEW_INTERVAL_S, and calls
teach profiles with the next heartbeat of their owner.

Medians and absolute deviations are used where a crowded machine leaves outliers (Huber, "Robust
Estimation of a Location Parameter", 1964); the outliers themselves come back as `run_s`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from envs.overheads import Overheads, Spread
from envs.traces import Behaviour
from envs.world import World
from tierwise.domain.ids import FunctionId, RequestId
from tierwise.domain.outcome import Outcome, OutcomeState

Float = NDArray[np.float64]

VIEW_INTERVAL_S = 0.2  # of scheduler.inventory, which this room does not load: it opens sockets
CALLS_MIN = 8  # of a function, to say anything about it
CALL_STEPS = 40  # of the search for call_s
SIGMA_PER_MAD = 1.4826  # of a normal distribution
ROUNDS = 30  # of reweighting, for least absolute deviations


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What was found. Functions that were called too rarely are missing.

    Attributes:
        behaviours: Functions with their fitted run time (median at speed 1.0), its noise, cold
            start and response size.
        overheads: What the platform adds.
        run_count: Calls that the run times come from.
        forward_count: Calls that `message_s` comes from.
        cold_count: Calls that the cold starts come from.
    """

    behaviours: Mapping[FunctionId, Behaviour]
    overheads: Overheads
    run_count: int
    forward_count: int
    cold_count: int


def calibrated(world: World, fit: Fit) -> World:
    """Return the world with everything that was fitted."""
    trace = replace(world.trace, behaviours={**world.trace.behaviours, **fit.behaviours})
    return replace(world, trace=trace, overheads=fit.overheads)


def fit(
    world: World,
    outcomes: Sequence[Outcome],
    draws: Mapping[RequestId, float] | None = None,
) -> Fit:
    """Fit a world to the outcomes of one live run.

    Args:
        world: Nodes with their declared speeds, links, and the functions' declarations.
        outcomes: As the nodes that owned the calls tell them.
        draws: The standard normal draws behind the calls' run times if they were replayed from a
            seeded trace. Without them all spread of a function's run times is its own noise.

    Raises:
        ValueError: No function was called often enough.
    """
    nodes = {node.node_id: node for node in world.nodes}
    good = [o for o in outcomes if o.state is OutcomeState.OK and o.node_id in nodes]
    groups: dict[FunctionId, list[Outcome]] = {}
    for outcome in good:
        if outcome.function_id in world.trace.behaviours:
            groups.setdefault(outcome.function_id, []).append(outcome)
    groups = {key: group for key, group in groups.items() if len(group) >= CALLS_MIN}
    if not groups:
        raise ValueError(f"{len(good)} good calls: fit a run with {CALLS_MIN} calls of a function")
    samples = {
        key: _Sample(
            run_s=np.array([o.latency.run_s / max(1, o.item_count) for o in group]),
            speed=np.array([nodes[o.node_id].speed for o in group if o.node_id is not None]),
            z=None if draws is None else np.array([draws[o.request_id] for o in group]),
        )
        for key, group in groups.items()
    }
    call_s = _call_s(list(samples.values()))
    curves = {key: sample.curve(call_s) for key, sample in samples.items()}
    added = Spread()
    if draws is not None:
        added = Spread.of(
            np.concatenate([s.added_s(call_s, curves[k]) for k, s in samples.items()])
        )
    cold_s, factors = _cold(world, good)
    messages = _messages_s(world, good)
    behaviours = {
        key: replace(
            world.trace.behaviours[key],
            run_sigma=curves[key].sigma,
            profile=replace(
                world.trace.behaviours[key].profile,
                run_s=curves[key].median_s,
                cold_start_s=cold_s.get(key, world.trace.behaviours[key].profile.cold_start_s),
                response_bytes=round(
                    float(np.mean([o.response_bytes / max(1, o.item_count) for o in group]))
                ),
            ),
        )
        for key, group in groups.items()
    }
    overheads = replace(
        world.overheads,
        call_s=call_s,
        run_s=added,
        message_s=Spread.of(messages),
        cold=Spread.of(factors),
        view_interval_s=VIEW_INTERVAL_S,
        reports_late=True,
    )
    return Fit(
        behaviours=behaviours,
        overheads=overheads,
        run_count=sum(map(len, groups.values())),
        forward_count=len(messages),
        cold_count=len(factors),
    )


# -- run times ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Curve:
    """Run time at speed 1.0: median · exp(sigma · z); `loss` is the mean absolute log error."""

    median_s: float
    sigma: float
    loss: float


@dataclass(frozen=True, slots=True)
class _Sample:
    """The runs of one function, shape (n,) each."""

    run_s: Float
    speed: Float
    z: Float | None

    def curve(self, call_s: float) -> _Curve:
        """Fit the curve to what the runs took beyond `call_s`."""
        y = np.log(np.maximum(1e-6, self.run_s - call_s) * self.speed)
        if self.z is None:
            middle = float(np.median(y))
            deviation = float(np.median(np.abs(y - middle)))
            return _Curve(float(np.exp(middle)), SIGMA_PER_MAD * deviation, deviation)
        intercept, slope = least_absolute(self.z, y)
        loss = float(np.mean(np.abs(y - intercept - slope * self.z)))
        return _Curve(float(np.exp(intercept)), max(0.0, slope), loss)

    def added_s(self, call_s: float, curve: _Curve) -> Float:
        """Return what the runs took beyond the curve, at speed 1.0."""
        assert self.z is not None, "without draws the curve explains nothing"
        own_s = curve.median_s * np.exp(curve.sigma * self.z)
        beyond_s: Float = (self.run_s - call_s) * self.speed - own_s
        return beyond_s


def _call_s(samples: Sequence[_Sample]) -> float:
    """Return the part of a run that does not scale with speed: the one that lines up the nodes.

    Only functions that ran at two speeds can tell; if none did it is 0.
    """
    telling = [sample for sample in samples if len(set(sample.speed.tolist())) > 1]
    if not telling:
        return 0.0
    highest_s = min(float(sample.run_s.min()) for sample in telling)
    tries = np.linspace(0.0, 0.9 * highest_s, CALL_STEPS)
    losses = [
        sum(len(sample.run_s) * sample.curve(float(call_s)).loss for sample in telling)
        for call_s in tries
    ]
    return float(tries[int(np.argmin(losses))])


def least_absolute(x: Float, y: Float) -> tuple[float, float]:
    """Return intercept and slope of the line of least absolute deviations, by reweighting."""
    weights = np.ones_like(x)
    intercept = slope = 0.0
    for _ in range(ROUNDS):
        total = weights.sum()
        x_mean, y_mean = (weights * x).sum() / total, (weights * y).sum() / total
        width = (weights * (x - x_mean) ** 2).sum()
        slope = float((weights * (x - x_mean) * (y - y_mean)).sum() / width) if width > 0 else 0.0
        intercept = float(y_mean - slope * x_mean)
        weights = 1.0 / np.maximum(1e-4, np.abs(y - intercept - slope * x))
    return intercept, slope


# -- messages and cold starts -------------------------------------------------------------------


def _messages_s(world: World, outcomes: Sequence[Outcome]) -> Float:
    """Return what one message took beyond its link, shape (calls forwarded at once,).

    A call shows the sum of two messages. Each gets half of the mean, and the spread that two
    independent draws need to have the sum's: deviations ÷ √2. The link with the least jitter tells,
    if a fair share of the calls took it.
    """
    nodes = {node.node_id: node for node in world.nodes}
    found: dict[float, list[float]] = {}
    for outcome in outcomes:
        if outcome.node_id in (None, outcome.origin) or outcome.tried:
            continue
        here, there = nodes[outcome.origin], nodes[outcome.node_id]  # type: ignore[index]
        out, back = world.links.between(here, there), world.links.between(there, here)
        link_s = out.transfer_s(outcome.request_bytes) + back.transfer_s(outcome.response_bytes)
        jitter_s = out.jitter_s + back.jitter_s
        moved_s = outcome.latency.transfer_s + outcome.latency.return_s
        found.setdefault(jitter_s, []).append(moved_s - link_s - jitter_s / 2.0)
    total = sum(map(len, found.values()))
    steadiest = sorted(key for key, values in found.items() if len(values) >= 0.2 * total)
    if not steadiest:
        return np.array([])
    sums = np.array(found[steadiest[0]])
    halves: Float = sums.mean() / 2.0 + (sums - sums.mean()) / np.sqrt(2.0)
    return halves


def _cold(world: World, outcomes: Sequence[Outcome]) -> tuple[dict[FunctionId, float], Float]:
    """Return cold starts at speed 1.0 (medians, one for all if few), and factors on these."""
    speeds = {node.node_id: node.speed for node in world.nodes}
    seen: dict[FunctionId, list[float]] = {}
    for outcome in outcomes:
        if outcome.is_cold and outcome.latency.cold_start_s > 0.0 and outcome.node_id is not None:
            cold_s = outcome.latency.cold_start_s * speeds[outcome.node_id]
            seen.setdefault(outcome.function_id, []).append(cold_s)
    everything = np.array([value for values in seen.values() for value in values])
    if len(everything) == 0:
        return {}, everything
    middle = float(np.median(everything))
    medians = {
        key: float(np.median(seen[key])) if len(seen.get(key, ())) >= CALLS_MIN else middle
        for key in world.trace.behaviours
    }
    factors = [value / medians.get(key, middle) for key, values in seen.items() for value in values]
    return medians, np.array(factors)
