"""Workloads after Azure Functions: what functions are like and when they are called. Simulated.

The figures come from `orcbench` (Hancock et al., "OrcBench: A Representative Serverless Benchmark",
IEEE CLOUD 2022): 25 clusters of functions fitted on the public trace of Azure Functions 2019
(Shahrad et al., "Serverless in the Wild", USENIX ATC 2020). Each cluster has the quantiles of three
things: calls per minute as the reciprocal of one gap between calls, mean run time in ms, memory in
MB. They are read from the installed package; nothing of it is copied here.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from envs.arrivals import Times
from envs.traces import APPLICATION_SHARE, Behaviour
from tierwise.domain.function import FunctionProfile, FunctionSpec, Priority
from tierwise.errors import FailedPrecondition

MODEL_COUNT_MAX = 1_000
RUN_S = (0.005, 3.0)  # some 15 % of the functions run longer: batch work, cut to 3 s
MEMORY_MIB = (64, 512)  # the smallest edge has 512
# Medians of AWS Lambda by language: Rust, Go, Python, Node.js, Java (lambda-perf, 2026-06).
COLD_S = (0.027, 0.053, 0.095, 0.160, 0.260)
RUN_SIGMA = 0.3  # orcbench draws each run from a normal whose σ is 30 % of the mean


@dataclass(frozen=True, slots=True)
class Cluster:
    """One fitted cluster of functions; the arrays are quantiles at evenly spaced levels."""

    size: int  # functions of the trace that it stands for
    gap_s: NDArray[np.float64]  # between two calls of one function
    run_s: NDArray[np.float64]
    memory_mib: NDArray[np.float64]


@lru_cache(maxsize=1)
def clusters() -> tuple[Cluster, ...]:
    """Return the fitted clusters, in the order of their names.

    Raises:
        FailedPrecondition: orcbench is not installed.
    """
    try:
        from orcbench.internals.run import load_models
    except ImportError:
        raise FailedPrecondition(
            "workloads after Azure Functions need orcbench: pip install 'tierwise[azure]', or "
            "pip install --no-deps 'orcbench>=0.1.4,<0.2' to keep a NumPy of 2 or newer"
        ) from None
    models = {model.name: model for model in load_models()}
    names = sorted(models, key=lambda name: int(name.split("-")[0]))
    return tuple(
        Cluster(
            size=int(models[name].weight),
            gap_s=60.0 / np.array(models[name].inverse_invocation_ecdf, dtype=np.float64),
            run_s=np.array(models[name].inverse_cpu_ecdf, dtype=np.float64) / 1e3,
            memory_mib=np.array(models[name].inverse_memory_ecdf, dtype=np.float64),
        )
        for name in names[:MODEL_COUNT_MAX]
    )


def draw_workload(
    rng: np.random.Generator, function_count: int, request_count: int, demand_cpus: float
) -> tuple[list[Behaviour], Times, NDArray[np.int64]]:
    """Draw functions and their calls.

    A function's cluster is drawn by the square root of the cluster's size, for one of them holds
    87 % of the functions. Its calls are a renewal process with the cluster's gaps, in equilibrium
    at the start; the hottest function is slowed to the rate of all others together. All times are
    then stretched by one factor, so that the mean run times of the calls, summed and divided by
    the time of the last call, are `demand_cpus`: bursts and the functions' relative rates stay as
    they were fitted, the mean load is the one that was asked for.

    Args:
        rng: Source of everything random here.
        function_count: ≥ 1.
        request_count: ≥ 1.
        demand_cpus: CPU seconds asked per second, at speed 1.0.

    Returns:
        Functions; times, shape (request_count,), ascending; the function of each call, as index.

    Raises:
        FailedPrecondition: orcbench is not installed.
    """
    known = clusters()
    share = np.sqrt([cluster.size for cluster in known])
    picks = rng.choice(len(known), size=function_count, p=share / share.sum())
    chosen = [known[int(pick)] for pick in picks]
    rates = np.array([1.0 / cluster.gap_s.mean() for cluster in chosen])
    hottest = int(rates.argmax())
    others = float(rates.sum() - rates[hottest])
    slowed = np.ones(function_count)
    if 0.0 < others < rates[hottest]:
        slowed[hottest] = rates[hottest] / others
    behaviours = [
        _behaviour(rng, index, cluster, float(rates[index] / slowed[index]))
        for index, cluster in enumerate(chosen)
    ]
    calls = [
        _renewal(rng, cluster.gap_s * slowed[index], request_count)
        for index, cluster in enumerate(chosen)
    ]
    times = np.concatenate(calls)
    functions = np.repeat(np.arange(function_count), request_count)
    first = np.argsort(times, kind="stable")[:request_count]
    times, functions = times[first], functions[first]
    work_s = sum(behaviours[i].profile.run_s for i in functions.tolist())
    return behaviours, times * (work_s / demand_cpus / max(times[-1], 1e-9)), functions


def _renewal(rng: np.random.Generator, gap_s: NDArray[np.float64], count: int) -> Times:
    """Return the first calls of a renewal process that has run for ever.

    The gap that time zero falls into is longer than others: its length weighs its probability.
    """
    gaps = rng.choice(gap_s, size=count)
    gaps[0] = rng.choice(gap_s, p=gap_s / gap_s.sum()) * rng.random()
    return np.cumsum(gaps)


def _behaviour(rng: np.random.Generator, index: int, cluster: Cluster, rate: float) -> Behaviour:
    """Draw one function; what the trace does not tell is drawn as for other workloads."""
    run_s = float(np.clip(rng.choice(cluster.run_s), *RUN_S))
    cold_s = float(rng.choice(COLD_S)) * float(rng.lognormal(0.0, 0.3))
    spec = FunctionSpec(
        namespace="azure",
        name=f"f{index}",
        version=1,
        code_digest="simulated",
        memory_mib=int(np.clip(rng.choice(cluster.memory_mib), *MEMORY_MIB)),
        deadline_s=0.1 + run_s * float(rng.uniform(2.0, 6.0)),
        timeout_s=60.0,
        priority=Priority(1 + int(rng.choice(4, p=APPLICATION_SHARE))),
        keep_alive_s=float(rng.choice((30.0, 120.0, 600.0))),
    )
    return Behaviour(
        spec=spec,
        profile=FunctionProfile(
            run_s=run_s,
            cold_start_s=cold_s,
            response_bytes=int(np.clip(rng.lognormal(np.log(2_000), 1.0), 100, 200_000)),
        ),
        request_bytes=int(np.clip(rng.lognormal(np.log(20_000), 1.5), 200, 2_000_000)),
        run_sigma=RUN_SIGMA,
        popularity=rate,
    )
