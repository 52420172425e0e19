"""Aggregation of one round beside a copy of its bytes, and beside Flower's."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.flstore.servers import ROOT
from tierwise.clock import precise_s
from tierwise.functions.fl.blocks import mean

FLOWER = ROOT / ".venv-flower/bin/python"
COUNT, ROUNDS = 10, 9


def aggregation(size_mb: int = 47) -> dict[str, Any]:
    """Return seconds of ours, of a copy and of Flower's aggregation of ten updates.

    The round is a matrix that is there already, as the cache holds it; the copy goes to memory that
    has been touched before, which is the faster kind. In turns; Flower's, which needs its own
    environment, right after.
    """
    size = size_mb * 250_000
    matrix = np.random.default_rng(0).standard_normal((COUNT, size), dtype=np.float32)
    target = np.zeros_like(matrix)
    rows, weights = list(range(COUNT)), [100.0 + number for number in range(COUNT)]
    figures: dict[str, list[float]] = {"tierwise": [], "memcpy": []}
    for number in range(ROUNDS + 1):
        start_s = precise_s()
        mean(matrix, rows, weights)
        middle_s = precise_s()
        np.copyto(target, matrix)
        end_s = precise_s()
        if number:
            figures["tierwise"].append(middle_s - start_s)
            figures["memcpy"].append(end_s - middle_s)
    return {"size_mb": size_mb, **figures, "flower": flower(size_mb)}


def flower(size_mb: int) -> dict[str, list[float]]:
    """Return seconds of Flower's two functions; nothing if it is not installed here."""
    if not FLOWER.exists():
        return {}
    script = Path(__file__).with_name("flower_aggregate.py")
    done = subprocess.run(
        [str(FLOWER), str(script), str(size_mb), str(COUNT), str(ROUNDS)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"Flower's aggregation failed: {done.stderr.strip()[-300:]}")
        return {}
    found: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
