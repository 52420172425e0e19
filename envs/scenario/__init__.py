"""Scenarios in files: someone else's cluster and trace as a world to evaluate policies on.

A scenario is a TOML file with nodes, links and functions, and a CSV file with arrivals.
docs/scenarios.md describes both.
"""

from envs.scenario.reading import read
from envs.scenario.writing import write

__all__ = ["read", "write"]
