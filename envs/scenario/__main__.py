"""Write the world of a preset as a scenario, to look at, change and evaluate."""

import argparse
import sys
from pathlib import Path

from envs.scenario import write
from envs.scenario.tables import toml_path
from envs.world import PRESETS, make_world
from tierwise.errors import TierwiseError


def main() -> int:
    """Write the world of a preset as a scenario; return the exit code."""
    parser = argparse.ArgumentParser(prog="tierwise policy scenario", description=__doc__)
    parser.add_argument("--preset", default="small", choices=PRESETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True, help="a folder, or a .toml file")
    flags = parser.parse_args()
    if flags.seed < 0 or flags.requests < 1:
        parser.error("seeds start at 0, requests at 1")
    try:
        write(make_world(flags.preset, flags.seed, request_count=flags.requests), flags.out)
    except (TierwiseError, OSError) as error:
        parser.error(str(error))
    print(toml_path(flags.out, is_new=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
