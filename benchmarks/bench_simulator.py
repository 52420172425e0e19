"""How many placement decisions does the simulator carry out per second, on one core?

    python -m benchmarks.bench_simulator

Each world is run by the tuned base score, once with the machines and the policy, once more with
the encoding that training needs. CPU time of this process counts, so that neighbours do not.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy starts its threads
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import time

import numpy as np

from benchmarks.report import at_least, make_table, show, spread
from envs.placement import PlacementEnv
from envs.simulator import Simulator
from envs.world import PRESETS, make_world
from tierwise.placement.policies.ect import EarliestCompletion

WORLDS = 8  # per preset
REQUESTS = 600
ROUNDS = 5
TARGET_PER_S = 10_000


def simulate(preset: str, seed: int) -> tuple[int, float]:
    """Return decisions and the CPU seconds that they took, the world's making left out."""
    world = make_world(preset, seed, request_count=REQUESTS)
    start_s = time.process_time()
    simulator = Simulator(world, seed)
    simulator.run(EarliestCompletion())
    return simulator.decision_count, time.process_time() - start_s


def step_environment(preset: str, seed: int) -> tuple[int, float]:
    """Return steps of the gymnasium environment and their CPU seconds."""
    environment = PlacementEnv(preset, REQUESTS)
    observation, _ = environment.reset(seed=seed)
    count, is_over = 0, False
    start_s = time.process_time()
    while not is_over:
        best = np.int64(np.where(observation[:, -1] > 0.0, observation[:, -2], np.inf).argmin())
        observation, _, _, is_over, _ = environment.step(best)
        count += 1
    return count, time.process_time() - start_s


def main() -> None:
    figures: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for preset in PRESETS:
            for name, run in (("simulator", simulate), ("environment", step_environment)):
                ran = np.array([run(preset, seed) for seed in range(WORLDS)]).sum(axis=0)
                figures.setdefault((preset, name), []).append(float(ran[0] / ran[1]))
    caption = (
        f"Seeds 0–{WORLDS - 1} of each preset, {REQUESTS} requests, {ROUNDS} rounds. Every "
        "decision steps the production NodeMachine some eight times, and all nodes hear heartbeats."
    )
    title = "Simulated decisions per CPU second, one core"
    columns = ("preset", "simulator + ect", "target", "environment steps")
    table = make_table(title, columns, caption)
    for preset in PRESETS:
        rates = figures[preset, "simulator"]
        verdict = at_least(float(np.median(rates)), TARGET_PER_S)
        table.add_row(preset, spread(rates), verdict, spread(figures[preset, "environment"]))
    show(table)


if __name__ == "__main__":
    main()
