"""What does a Flower round cost over tierwise, and what does Flower learn? Beside Flower itself.

    make bench-flower                                         # all of it; writes docs/results
    .venv-flower/bin/python -m benchmarks.bench_flower rounds --variants defaults
    .venv-flower/bin/python -m benchmarks.bench_flower aggregation | capture | accuracy

- rounds: ten clients that do nothing, one model of 4 kB: deployed Flower (SuperLink and SuperNodes
  on loopback), our Grid, and bare calls of a function
- aggregation: ten updates of 47 MB in 62 arrays: Flower's own, and one product on a matrix of rows
- capture: a round of Flower's in-process runtime with and without `capture`
- accuracy: Flower's FedAvg on digits, 20 clients, three Dirichlet alphas, several seeds: for
  comparison with others' training of the same task (examples/flower_digits/digits_flower/task.py)
"""

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

import tierwise
from benchmarks.flower_deployed import VARIANTS, DeployedFlower
from benchmarks.report import at_least, at_most, commit, make_table, show, spread, where
from tests.flower.reference import in_process
from tierwise.clock import precise_s
from tierwise.sdk import flower

ROOT = Path(__file__).parents[1]
NOOP, DIGITS = ROOT / "benchmarks/flower_noop", ROOT / "examples/flower_digits"
CLIENTS, PARAMETERS = 10, 1000
TURNS, FLOWER_ROUNDS, OUR_ROUNDS = 2, 4, 20
UPDATE_BYTES, LAYERS, REPEATS = 47_000_000, 62, 9
CAPTURE_BYTES, CAPTURE_ROUNDS, CLIENT_S = 4_700_000, 16, 1.0
ALPHAS, SEEDS, TRAINERS, TRAINING_ROUNDS, EPOCHS = (0.1, 0.5, 100.0), 10, 20, 40, 2
ROUND_RATIO, AGGREGATION_RATIO, CAPTURE_SHARE = 10.0, 5.0, 0.05

Figures = dict[str, Any]


def rounds(variants: list[str]) -> Figures:
    """Return seconds per round: of each variant of Flower, and of ours in the same turns."""
    found: Figures = {}
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder) / "ours") as client:
        project = flower.load_project(NOOP, {"rounds": OUR_ROUNDS})
        clients = flower.participants(CLIENTS, ["edge-1", "edge-2"])
        native = bare_calls(client)
        native(2)
        with project.grid(clients, client=client, requirements=()) as grid:
            over_grid(project, grid, Path(folder))  # warms up
            for variant in variants:
                each: Figures = {"flower": [], "grid": [], "native": []}

                def ours(each: Figures = each) -> None:
                    for _ in range(TURNS):
                        each["grid"] += over_grid(project, grid, Path(folder))
                        each["native"] += native(OUR_ROUNDS)

                ours()  # before and after: SuperNodes that poll would slow it down
                with DeployedFlower(Path(folder) / variant, CLIENTS, variant) as deployed:
                    settings = {"rounds": FLOWER_ROUNDS, "parameters": PARAMETERS}
                    deployed.run(NOOP, {**settings, "rounds": 1})  # until every SuperNode is there
                    for _ in range(TURNS):
                        each["flower"] += deployed.run(NOOP, settings)
                ours()
                found[variant] = each
    return found


def over_grid(project: Any, grid: Any, folder: Path) -> list[float]:
    """Return seconds of each round of the same project over our grid."""
    out = folder / "ours.json"
    flower.run(project.server_app, grid, {**project.run_config, "out": str(out)})
    return [float(seconds) for seconds in json.loads(out.read_text())]


def bare_calls(client: tierwise.Client) -> Callable[[int], list[float]]:
    """Return what times rounds of plain calls that bring an array and take it back."""
    app = tierwise.App("bench", client=client)

    @app.function(name="noop", memory="128MiB")
    def noop(arrays: Any) -> Any:
        return arrays

    functions = [noop.options(node=f"edge-{1 + index % 2}") for index in range(CLIENTS)]
    array = np.zeros(PARAMETERS, np.float32)

    async def one_round() -> None:
        await asyncio.gather(*(function.remote.aio(array) for function in functions))

    def timed(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start_s = precise_s()
            client.run(one_round)
            seconds.append(precise_s() - start_s)
        return seconds

    return timed


def aggregation() -> Figures:
    """Return seconds of one aggregation: Flower's, a product, and copying the same bytes."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((CLIENTS, UPDATE_BYTES // 4), dtype=np.float32)
    counts = rng.integers(50, 500, CLIENTS)
    weights = (counts / counts.sum()).astype(np.float32)
    records = [
        RecordDict(
            {
                "arrays": ArrayRecord([np.array(part) for part in np.array_split(row, LAYERS)]),
                "metrics": MetricRecord({"num-examples": int(count)}),
            }
        )
        for row, count in zip(matrix, counts, strict=True)
    ]
    copied = np.empty_like(matrix)
    ways: dict[str, Callable[[], Any]] = {
        "flower": lambda: aggregate_arrayrecords(records, "num-examples"),
        "product": lambda: weights @ matrix,
        "memcpy": lambda: np.copyto(copied, matrix),
    }
    theirs = np.concatenate([a.numpy() for a in ways["flower"]().values()])
    np.testing.assert_allclose(weights @ matrix, theirs, rtol=1e-3, atol=1e-4)
    del theirs
    found: Figures = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            gc.collect()
            start_s = precise_s()
            way()
            found[name].append(precise_s() - start_s)
    return found


def capturing() -> Figures:
    """Return seconds of a round of clients that work for a second, captured and not, in turns."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Any) -> Message:
        import time

        time.sleep(CLIENT_S / (CLIENTS / 2))  # two threads run the clients
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
        return Message(content, reply_to=message)

    found: Figures = {"plain": [], "captured": [], "flush": []}
    array = np.random.default_rng(0).standard_normal(CAPTURE_BYTES // 4, dtype=np.float32)
    content = RecordDict({"arrays": ArrayRecord({"w": Array(array)})})
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster(Path(folder)) as client,
        in_process(app, CLIENTS, {}) as grid,
    ):
        grid.set_run(grid.run)
        captured = flower.capture(grid, tierwise.Rounds(client, "captured"))
        nodes = grid.get_node_ids()

        def one_round(which: Any) -> float:
            start_s = precise_s()
            which.send_and_receive([Message(content, node, "train") for node in nodes])
            return precise_s() - start_s

        for turn in range(CAPTURE_ROUNDS + 1):
            order = [("plain", grid), ("captured", captured)]
            for name, which in order if turn % 2 else order[::-1]:
                round_s = one_round(which)
                start_s = precise_s()
                assert captured.capture.flush()
                if turn:
                    found[name].append(round_s)
                if turn and which is captured:
                    found["flush"].append(precise_s() - start_s)
        assert not captured.capture.failures, captured.capture.failures
    return found


def accuracy(seeds: int) -> Figures:
    """Return the accuracy on held-out pictures after each round, by alpha and seed."""
    import sys

    sys.path.insert(0, str(DIGITS))
    from digits_flower import task

    held = task.split()[2:]
    found: Figures = {}
    for alpha in ALPHAS:
        for seed in range(seeds):
            config = {"alpha": alpha, "seed": seed, "local-epochs": EPOCHS}
            project = flower.load_project(DIGITS, config)
            from digits_flower.client_app import app

            judged: list[float] = []

            def judge(server_round: int, arrays: Any, out: list[float] = judged) -> MetricRecord:
                share, loss = task.judge([arrays[name].numpy() for name in task.NAMES], *held)
                out.append(share)
                return MetricRecord({"accuracy": share, "loss": loss})

            random.seed(seed)
            arrays = zip(task.NAMES, task.initial(seed), strict=True)
            with in_process(app, TRAINERS, project.run_config) as grid:
                grid.set_run(grid.run)
                FedAvg(fraction_evaluate=0.0).start(
                    grid,
                    initial_arrays=ArrayRecord({name: Array(array) for name, array in arrays}),
                    num_rounds=TRAINING_ROUNDS,
                    evaluate_fn=judge,
                )
            found.setdefault(f"{alpha:g}", {})[str(seed)] = judged
            print(f"alpha {alpha:g}, seed {seed}: {judged[-1]:.4f}")
    shared = ("local-epochs", "batch-size", "learning-rate")
    settings = {name: project.run_config[name] for name in shared}
    settings |= {"clients": TRAINERS, "rounds": TRAINING_ROUNDS}
    return {"settings": settings, "accuracy": found}


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[tierwise.Client]:
    """Yield a client of a cluster of real processes without emulated links."""
    running = tierwise.LocalCluster(folder, "1c,2e", policy="ect", emulate=False)
    with running, tierwise.Client(running.context) as client:
        yield client


def show_rounds(found: Figures) -> None:
    table = make_table(
        f"A round of {CLIENTS} clients that do nothing",
        ("", "ms per round", "it ÷ ours over the Grid", "target"),
        "Ours before and after each variant, with mTLS and sealed workers; Flower without TLS.",
    )
    for variant, each in found.items():
        ours = float(np.median(each["grid"]))
        ratio = float(np.median(each["flower"])) / ours
        target = at_least(ratio, ROUND_RATIO, "×")
        table.add_row(VARIANTS[variant], spread(ms(each["flower"])), f"{ratio:,.1f}", target)
        table.add_row("tierwise, Flower's apps over the Grid", spread(ms(each["grid"])), "", "")
        native = float(np.median(each["native"])) / ours
        table.add_row("tierwise, bare calls", spread(ms(each["native"])), f"{native:,.2f}", "")
        table.add_section()
    show(table)


def show_aggregation(found: Figures) -> None:
    table = make_table(
        f"Aggregating {CLIENTS} × {UPDATE_BYTES / 1e6:.0f} MB in {LAYERS} arrays",
        ("", "ms", "it ÷ product", "target"),
        f"{REPEATS} rounds in turns, one thread.",
    )
    ours = np.array(found["product"])
    for name, title in (
        ("flower", "Flower, aggregate_arrayrecords"),
        ("product", "w @ M on float32 rows"),
        ("memcpy", "copying the same bytes"),
    ):
        ratio = float(np.median(np.array(found[name]) / ours))
        target = at_least(ratio, AGGREGATION_RATIO, "×") if name == "flower" else ""
        table.add_row(title, spread(ms(found[name])), f"{ratio:.2f}", target)
    show(table)


def show_capture(found: Figures) -> None:
    table = make_table(
        f"A captured round: {CLIENTS} × {CAPTURE_BYTES / 1e6:.1f} MB, {CLIENT_S:g} s of work",
        ("", "ms per round", "more than plain", "target"),
        f"{CAPTURE_ROUNDS} rounds in turns, Flower's in-process runtime.",
    )
    plain, captured = np.array(found["plain"]), np.array(found["captured"])
    share = float(np.median(captured / plain)) - 1
    table.add_row("plain", spread(ms(plain)), "", "")
    table.add_row("captured", spread(ms(captured)), f"{share:+.1%}", at_most(share, CAPTURE_SHARE))
    table.add_row("then, until all is on disk", spread(ms(found["flush"])), "", "")
    show(table)


def show_accuracy(found: Figures) -> None:
    settings = found["settings"]
    table = make_table(
        f"Flower's FedAvg on digits, {settings['clients']} clients, {settings['rounds']} rounds",
        ("Dirichlet alpha", "accuracy, mean", "standard deviation", "lowest", "highest"),
        f"{len(found['accuracy']['0.1'])} seeds; held-out pictures; Flower's in-process runtime.",
    )
    for alpha, by_seed in found["accuracy"].items():
        last = np.array([values[-1] for values in by_seed.values()])
        figures = (last.mean(), last.std(ddof=1), last.min(), last.max())
        table.add_row(alpha, *(f"{figure:.4f}" for figure in figures))
    show(table)


def ms(seconds: Any) -> Any:
    return np.array(seconds) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = ("rounds", "aggregation", "capture", "accuracy")
    parser.add_argument("parts", nargs="*", default=parts, choices=parts)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    results: Figures = {}
    if "rounds" in chosen.parts:
        show_rounds(results.setdefault("round_s", rounds(chosen.variants)))
    if "aggregation" in chosen.parts:
        show_aggregation(results.setdefault("aggregation_s", aggregation()))
    if "capture" in chosen.parts:
        show_capture(results.setdefault("capture_s", capturing()))
    if "accuracy" in chosen.parts:
        show_accuracy(results.setdefault("training", accuracy(chosen.seeds)))
    if chosen.out is not None:
        path = chosen.out / "flower.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        stamp = {name: {"machine": where(), "commit": commit()} for name in results}
        if "round_s" in results:  # variants may be measured one at a time
            results["round_s"] = before.get("round_s", {}) | results["round_s"]
        before |= results | {"measured": before.get("measured", {}) | stamp}
        path.write_text(json.dumps(before, indent=1) + "\n")


if __name__ == "__main__":
    main()
