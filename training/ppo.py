"""Train a placement policy: residual MaskablePPO on the tuned base score, in the simulator.

    python -m training.ppo --steps 1000000 --seed 7

A run folder holds args.json, command.txt, TensorBoard logs, the latest model (to resume from), the
best weights on validation worlds, and at the end policy.npz with its card policy.json.
"""

import argparse
import json
import shlex
import sys
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import set_random_seed

from envs.placement import GAP, VALID
from envs.sharded import ShardedVecEnv
from envs.world import PRESETS
from tierwise.errors import InvalidArgument, TierwiseError
from tierwise.files import write_atomically
from tierwise.placement.features import FEATURES
from tierwise.placement.policies.learned import Network, Price, save, unpack_card
from tierwise.placement.signals import SIGNALS
from training.export import to_network
from training.judge import Origin, Range, Validation, as_policy, finish, new_folder, ship, verdict
from training.network import Residual, ResidualPolicy

STEPS_PER_ENV = 128
BATCH = 4096
EPOCHS = 4
LEARNING_RATE = 1e-3
GAMMA = 0.98  # a request's cost stands at its own decision; what queues behind it comes later
GAE_LAMBDA = 0.95
ENTROPY = 5e-4
VALIDATE_EVERY = 8  # rollouts
AVERAGED = 0.1  # weight of the newest weights in the average that is judged and exported


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that a run depends on, besides the code."""

    steps: int = 1_000_000
    seed: int = 7
    preset: str = "random"
    env_count: int = 128
    hidden: int = 64
    request_count: int = 300
    validation_worlds: int = 48
    evaluation_worlds: int = 100
    name: str = "placement"
    version: int = 1
    prices: str = ""  # run folder of training.search to learn on top of; "" is the base score

    @property
    def whole_steps(self) -> int:
        """Return the steps, rounded up to whole rollouts."""
        rollout = STEPS_PER_ENV * self.env_count
        return -(-self.steps // rollout) * rollout


@dataclass(slots=True)
class Progress:
    """What must survive an interruption beside the model itself."""

    best_ratio: float = float("inf")
    low: NDArray[np.float32] = field(
        default_factory=lambda: np.full(len(FEATURES), np.inf, dtype=np.float32)
    )
    high: NDArray[np.float32] = field(
        default_factory=lambda: np.full(len(FEATURES), -np.inf, dtype=np.float32)
    )

    @property
    def range(self) -> Range:
        """Return the lowest and highest value of each feature so far, shape (24,) each."""
        return self.low, self.high


class Watch(BaseCallback):
    """After each rollout: widen the trained range; now and then validate and checkpoint."""

    def __init__(
        self, settings: Settings, folder: Path, validation: Validation, progress: Progress, bar: Any
    ) -> None:
        super().__init__()
        self._settings = settings
        self._folder = folder
        self._validation = validation
        self._progress = progress
        self._bar = bar
        self._rollout_count = 0
        self._average: Residual | None = None
        self._prices = _prices(settings)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._look_back()
        observations = self.model.rollout_buffer.observations  # type: ignore[attr-defined]
        rows = observations.reshape(-1, observations.shape[-1])
        features = rows[rows[:, VALID] > 0.0][:, :GAP]
        self._progress.low = np.minimum(self._progress.low, features.min(axis=0))
        self._progress.high = np.maximum(self._progress.high, features.max(axis=0))
        self._bar.update(self.num_timesteps - self._bar.n)
        self._rollout_count += 1
        self._follow()
        if self._rollout_count % VALIDATE_EVERY == 1:
            self.validate()

    def _look_back(self) -> None:
        """Let each decision earn −cost of its own request, and compute the advantages again.

        A request ends many decisions after its own; paid then, its cost would be one of many that
        an advantage has to tell apart. What a decision does to others still comes later. Times
        1 − γ, values are mean costs of a request: about −1.
        """
        model: Any = self.model
        paid, earned = model.env.take_rewards()
        buffer = model.rollout_buffer
        truncated = buffer.rewards - paid  # SB3 has added γ·value where an episode ended
        buffer.rewards[:] = (1.0 - GAMMA) * earned + truncated
        with torch.no_grad():
            values = model.policy.predict_values(torch.as_tensor(model._last_obs))
        buffer.compute_returns_and_advantage(last_values=values, dones=model._last_episode_starts)

    def _follow(self) -> None:
        """Move the average of the weights towards the present ones (Polyak and Juditsky, 1992).

        Steps of the optimizer are mostly noise here: the average has less of it.
        """
        policy = self.model.policy
        assert isinstance(policy, ResidualPolicy)
        if self._average is None:
            self._average = deepcopy(policy.residual)
            if (kept := self._folder / "average.pt").exists():  # this is a resumed run
                self._average.load_state_dict(torch.load(kept, weights_only=True))
        with torch.no_grad():
            pairs = zip(self._average.parameters(), policy.residual.parameters(), strict=True)
            for average, present in pairs:
                average.lerp_(present, AVERAGED)

    def validate(self) -> None:
        """Judge the average of the weights; keep it if it is the best so far."""
        if self._average is None:
            self._follow()
        assert self._average is not None
        network = to_network(self._average)
        policy = as_policy(network, self._progress.range, prices=self._prices, temperature=0.0)
        ratio = self._validation.ratio(policy)
        self.logger.record("validation/cost_ratio", ratio)
        self._bar.set_postfix_str(f"cost {ratio - 1.0:+.1%} vs ect on validation")
        if ratio < self._progress.best_ratio:
            self._progress.best_ratio = ratio
            write_atomically(self._folder / "best.npz", save(network, policy.card)[0])
        self.checkpoint()

    def checkpoint(self) -> None:
        """Write what a resumed run needs."""
        self.model.save(self._folder / "model.zip")
        if self._average is not None:
            torch.save(self._average.state_dict(), self._folder / "average.pt")
        state = {
            "best_ratio": self._progress.best_ratio,
            "low": self._progress.low.tolist(),
            "high": self._progress.high.tolist(),
        }
        write_atomically(self._folder / "progress.json", json.dumps(state).encode())


def train(settings: Settings, folder: Path, *, is_resumed: bool) -> bool:
    """Train in `folder`; return False if it was interrupted (a checkpoint is left).

    Raises:
        InvalidArgument: There is nothing to resume in `folder`.
    """
    torch.set_num_threads(1)  # two threads on two busy cores collapse to a hundredth
    set_random_seed(settings.seed)
    environment = ShardedVecEnv(
        settings.env_count,
        seed=settings.seed,
        preset=settings.preset,
        request_count=settings.request_count,
        prices=_weights(_prices(settings)),
    )
    try:
        return _train(settings, folder, environment, is_resumed=is_resumed)
    finally:
        environment.close()


def _train(
    settings: Settings, folder: Path, environment: ShardedVecEnv, *, is_resumed: bool
) -> bool:
    from tqdm import tqdm

    progress = Progress()
    if is_resumed:
        model = _resume(folder, environment, progress)
    else:
        model = MaskablePPO(
            ResidualPolicy,
            environment,
            learning_rate=lambda left: LEARNING_RATE * left,
            n_steps=STEPS_PER_ENV,
            batch_size=min(BATCH, STEPS_PER_ENV * settings.env_count),
            n_epochs=EPOCHS,
            gamma=GAMMA,
            gae_lambda=GAE_LAMBDA,
            ent_coef=ENTROPY,
            seed=settings.seed,
            policy_kwargs={"hidden": settings.hidden},
            device="cpu",
        )
    model.set_logger(configure(str(folder / "tensorboard"), ["tensorboard"]))
    done, goal = model.num_timesteps, settings.whole_steps
    with (
        closing(Validation(settings.preset, settings.validation_worlds)) as validation,
        tqdm(total=goal, initial=done, unit="step", file=sys.stderr) as bar,
    ):
        watch = Watch(settings, folder, validation, progress, bar)
        try:
            model.learn(
                max(0, goal - done),
                callback=watch,
                reset_num_timesteps=False,
            )
        except KeyboardInterrupt:
            watch.checkpoint()
            return False
        watch.validate()
    _finish(settings, folder, progress)
    return True


def _resume(folder: Path, environment: ShardedVecEnv, progress: Progress) -> MaskablePPO:
    if not (folder / "model.zip").exists():
        raise InvalidArgument(f"{folder} holds no model.zip to resume from")
    state = json.loads((folder / "progress.json").read_text())
    progress.best_ratio = state["best_ratio"]
    progress.low = np.array(state["low"], dtype=np.float32)
    progress.high = np.array(state["high"], dtype=np.float32)
    model: MaskablePPO = MaskablePPO.load(
        folder / "model.zip",
        env=environment,
        custom_objects={"learning_rate": lambda left: LEARNING_RATE * left},
    )
    return model


def _finish(settings: Settings, folder: Path, progress: Progress) -> None:
    with np.load(folder / "best.npz", allow_pickle=False) as stored:
        network = Network(**{name: stored[name] for name in stored.files})
    origin = Origin(
        name=settings.name,
        version=settings.version,
        preset=settings.preset,
        seed=settings.seed,
        command=_command(settings),
        validation_worlds=settings.validation_worlds,
        evaluation_worlds=settings.evaluation_worlds,
    )
    finish(folder, network, origin, progress.range, _prices(settings))


def _prices(settings: Settings) -> dict[str, Price]:
    """Return the prices to learn on top of, none for the base score itself.

    Raises:
        InvalidArgument: The folder holds no usable policy.
    """
    if not settings.prices:
        return {}
    try:
        return unpack_card((Path(settings.prices) / "policy.json").read_bytes()).prices
    except OSError as error:
        raise InvalidArgument(f"--prices {settings.prices}: {error}") from None


def _weights(prices: dict[str, Price]) -> NDArray[np.float64] | None:
    return np.array([prices[name].weight for name in SIGNALS]) if prices else None


def _command(settings: Settings) -> str:
    default = Settings()
    changed = [
        f"--{name.replace('_', '-')} {getattr(settings, name)}"
        for name in ("preset", "seed", "steps", "env_count", "hidden", "request_count", "prices")
        if name in ("preset", "seed", "steps") or getattr(settings, name) != getattr(default, name)
    ]
    return "tierwise policy train " + " ".join(changed)


def main() -> int:
    """Parse the command line and train; return the exit code."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="tierwise policy train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps",
        type=int,
        help=f"decisions to learn from, by default {default.steps}; with --resume: in all, by "
        "default what the run was meant to have",
    )
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--preset", choices=PRESETS, default=default.preset)
    parser.add_argument("--env-count", type=int, default=default.env_count)
    parser.add_argument("--hidden", type=int, default=default.hidden)
    parser.add_argument("--request-count", type=int, default=default.request_count)
    parser.add_argument("--validation-worlds", type=int, default=default.validation_worlds)
    parser.add_argument("--evaluation-worlds", type=int, default=default.evaluation_worlds)
    parser.add_argument("--name", default=default.name, help="of the policy")
    parser.add_argument("--version", type=int, default=default.version, help="of the policy")
    parser.add_argument(
        "--prices",
        default=default.prices,
        metavar="RUN",
        help="run folder of `tierwise policy search` to learn on top of",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/placement"), help="folder of runs")
    parser.add_argument("--resume", type=Path, help="run folder to go on with")
    parser.add_argument(
        "--ship", action="store_true", help="also replace the policy inside the package"
    )
    flags = vars(parser.parse_args())
    root, resume, is_shipped = flags.pop("out"), flags.pop("resume"), flags.pop("ship")
    steps = flags.pop("steps")
    try:
        if resume is not None:
            saved = json.loads((resume / "args.json").read_text())
            settings = replace(Settings(**saved), steps=steps or saved["steps"])
            root, folder = resume.parent, resume
        else:
            settings = Settings(**flags, steps=steps or default.steps)
            folder = new_folder(root, settings.name)
        write_atomically(folder / "args.json", json.dumps(asdict(settings), indent=2).encode())
        write_atomically(folder / "command.txt", shlex.join(sys.argv).encode())
        print(f"training in {folder}; TensorBoard: tensorboard --logdir {root}", file=sys.stderr)
        if not train(settings, folder, is_resumed=resume is not None):
            print(f"interrupted; go on with --resume {folder}", file=sys.stderr)
            return 130
    except (TierwiseError, OSError, TypeError) as error:
        print(f"tierwise policy train: {error}", file=sys.stderr)
        return 1
    print(verdict(folder), file=sys.stderr)
    if is_shipped:
        ship(folder)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
