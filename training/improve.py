"""Policy improvement from labels: learn what the copies of the simulation have shown.

    python -m training.improve --labels runs/labels --seed 7

The residual network is trained to minimise the expected cost of its own draws,
Σ π(c)·cost(c) over the candidates of each labelled decision: an all-action policy gradient, with
the labels of `training.teacher` for the action values.
"""

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tierwise.errors import InvalidArgument, TierwiseError
from tierwise.files import write_atomically
from training.export import to_network
from training.judge import Origin, finish, new_folder, ship, verdict
from training.network import BETA, Residual

CLIP = 4.0  # mean request costs; a label beyond it is an outlier of one future
BATCH = 512
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-3
HELD_BACK = 0.1  # share of the labels, whole runs of them, that decides when to stop
PATIENCE = 12  # epochs


@dataclass(frozen=True, slots=True)
class Examples:
    """Labels as tensors: features (n, 16, 24), gaps, valid and costs (n, 16)."""

    features: torch.Tensor
    gaps: torch.Tensor
    valid: torch.Tensor
    costs: torch.Tensor

    def __len__(self) -> int:
        return len(self.costs)

    def part(self, index: torch.Tensor) -> "Examples":
        """Return the labels at `index`."""
        return Examples(
            self.features[index], self.gaps[index], self.valid[index], self.costs[index]
        )


def load(folders: list[Path]) -> tuple[Examples, Examples]:
    """Return labels to learn from, and labels of other worlds to stop by.

    Raises:
        InvalidArgument: There are none.
    """
    shards = sorted(path for folder in folders for path in folder.glob("*.npz"))
    if not shards:
        raise InvalidArgument("there are no labels: run `python -m training.teacher` first")
    parts: dict[str, list[NDArray[np.float32]]] = {}
    is_held: list[NDArray[np.bool_]] = []
    for path in shards:
        with np.load(path, allow_pickle=False) as stored:
            count = len(stored["costs"])
            for name in ("features", "gaps", "valid", "costs"):
                parts.setdefault(name, []).append(stored[name])
        held = np.zeros(count, dtype=np.bool_)
        held[int(count * (1.0 - HELD_BACK)) :] = True  # the last worlds of each shard
        is_held.append(held)
    costs = np.clip(np.concatenate(parts["costs"]), -CLIP, CLIP)
    # What was not tried is taken to be as bad as the worst that was, and no better than the base.
    worst = np.maximum(np.nanmax(costs, axis=1, keepdims=True), 0.0)
    costs = np.where(np.isnan(costs), worst, costs).astype(np.float32)
    every = Examples(
        torch.from_numpy(np.concatenate(parts["features"])),
        torch.from_numpy(np.concatenate(parts["gaps"])),
        torch.from_numpy(np.concatenate(parts["valid"])),
        torch.from_numpy(costs),
    )
    held_all = torch.from_numpy(np.concatenate(is_held))
    return every.part(torch.nonzero(~held_all)[:, 0]), every.part(torch.nonzero(held_all)[:, 0])


def expected_cost(residual: Residual, examples: Examples) -> torch.Tensor:
    """Return the mean of Σ π(c)·cost(c), in mean request costs; the base choice costs 0."""
    logits = residual(examples.features, examples.valid) - BETA * examples.gaps
    logits = logits.masked_fill(examples.valid < 0.5, -torch.inf)
    shares = torch.softmax(logits, dim=1)
    return (shares * examples.costs).sum(dim=1).mean()


def improve(
    learn: Examples, held: Examples, *, seed: int, hidden: int, epochs: int
) -> tuple[Residual, float]:
    """Return the network that did best on the held-back labels, and its expected cost there."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    residual = Residual(hidden)
    optimizer = torch.optim.AdamW(
        residual.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    batch = min(BATCH, max(32, len(learn) // 16))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    with torch.no_grad():
        best_cost = float(expected_cost(residual, held))
    best = {name: value.clone() for name, value in residual.state_dict().items()}
    start_cost, best_epoch = best_cost, 0
    with tqdm(range(1, epochs + 1), unit="epoch", file=sys.stderr) as bar:
        for epoch in bar:
            for index in torch.split(torch.randperm(len(learn)), batch):
                loss = expected_cost(residual, learn.part(index))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            schedule.step()
            with torch.no_grad():
                cost = float(expected_cost(residual, held))
                learnt = float(expected_cost(residual, learn))
            bar.set_postfix_str(
                f"held back {cost:+.4f} (from {start_cost:+.4f}), learnt {learnt:+.4f}"
            )
            if cost < best_cost:
                best_cost, best_epoch = cost, epoch
                best = {name: value.clone() for name, value in residual.state_dict().items()}
            elif epoch - best_epoch > PATIENCE:
                break
    residual.load_state_dict(best)
    return residual, best_cost


def main() -> int:
    """Parse the command line and train; return the exit code."""
    parser = argparse.ArgumentParser(prog="tierwise policy improve", description=__doc__)
    parser.add_argument("--labels", type=Path, nargs="+", default=[Path("runs/labels")])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--preset", default="random", help="of the worlds to be judged on")
    parser.add_argument("--validation-worlds", type=int, default=48)
    parser.add_argument("--evaluation-worlds", type=int, default=100)
    parser.add_argument("--name", default="placement")
    parser.add_argument("--version", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/placement"))
    parser.add_argument("--ship", action="store_true", help="replace the policy in the package")
    flags = parser.parse_args()
    try:
        learn, held = load(flags.labels)
        residual, cost = improve(
            learn, held, seed=flags.seed, hidden=flags.hidden, epochs=flags.epochs
        )
        folder = new_folder(flags.out, flags.name)
        write_atomically(folder / "command.txt", shlex.join(sys.argv).encode())
        rows = learn.features[learn.valid > 0.5].numpy()
        origin = Origin(
            name=flags.name,
            version=flags.version,
            preset=flags.preset,
            seed=flags.seed,
            command=f"python -m training.improve --seed {flags.seed} ({len(learn)} labels)",
            validation_worlds=flags.validation_worlds,
            evaluation_worlds=flags.evaluation_worlds,
        )
        finish(folder, to_network(residual), (rows.min(axis=0), rows.max(axis=0)), origin)
    except (TierwiseError, OSError) as error:
        print(f"tierwise policy improve: {error}", file=sys.stderr)
        return 1
    print(f"held-back labels {cost:+.3f}; {verdict(folder)}", file=sys.stderr)
    if flags.ship:
        ship(folder)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
