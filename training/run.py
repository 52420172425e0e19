"""One run of a trainer: what all of them can be told, and the folder that it leaves behind."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from envs.world import PRESETS
from tierwise.files import write_atomically


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a run depends on, besides the code and what its trainer adds."""

    seed: int = 7
    preset: str = "random"
    request_count: int = 300
    validation_worlds: int = 48
    evaluation_worlds: int = 100
    name: str = "placement"
    version: int = 1


def add_options(parser: argparse.ArgumentParser, out: Path) -> None:
    """Let a trainer's command line take RunSettings, --out, --resume and --ship."""
    default = RunSettings()
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--preset", choices=PRESETS, default=default.preset)
    parser.add_argument("--request-count", type=int, default=default.request_count)
    parser.add_argument("--validation-worlds", type=int, default=default.validation_worlds)
    parser.add_argument("--evaluation-worlds", type=int, default=default.evaluation_worlds)
    parser.add_argument("--name", default=default.name, help="of the policy")
    parser.add_argument("--version", type=int, default=default.version, help="of the policy")
    parser.add_argument("--out", type=Path, default=out, help="folder of runs")
    parser.add_argument("--resume", type=Path, help="run folder to go on with")
    parser.add_argument(
        "--ship", action="store_true", help="also replace the policy inside the package"
    )


def new_folder(root: Path, name: str) -> Path:
    """Make and return the next run folder, `name_1`, `name_2` and so on, as rl-zoo does."""
    endings = [path.name.rpartition("_")[2] for path in root.glob(f"{name}_*")]
    number = 1 + max((int(ending) for ending in endings if ending.isdigit()), default=0)
    folder = root / f"{name}_{number}"
    folder.mkdir(parents=True)
    return folder


def note(folder: Path, settings: RunSettings) -> None:
    """Write down what a run was told, for people and for `--resume`."""
    write_atomically(folder / "args.json", json.dumps(asdict(settings), indent=2).encode())
    write_atomically(folder / "command.txt", shlex.join(sys.argv).encode())
