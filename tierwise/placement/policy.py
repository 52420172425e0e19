"""The seam between a request and whoever decides where it runs."""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol, Self, runtime_checkable

import numpy as np

from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.outcome import Outcome
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.errors import NotFound


class Policy(Protocol):
    """Chooses a node for one request, and does nothing else.

    The same view, request and generator state give the same decision, so a policy cannot
    tell whether the simulator or a live node is asking.
    """

    @property
    def policy_id(self) -> PolicyId:
        """Return `name@version`, as `tierwise get policies` lists it."""
        ...

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return an order of feasible nodes, or the reasons why there is none."""
        ...


@runtime_checkable
class Learner(Policy, Protocol):
    """A policy that also learns from how its requests ended.

    What it has learnt is part of what it decides by, so the law above holds for it only between
    two outcomes. A run starts from `fresh()`: no run knows of another. The simulator tells a
    learner every outcome, as if all nodes shared what they learn; live agents tell none yet.
    """

    def fresh(self) -> Self:
        """Return the same policy as it was before its first outcome."""
        ...

    def learn(self, outcome: Outcome) -> None:
        """Take note of how a request ended, its own or another's."""
        ...


_FACTORIES: dict[str, Callable[[], Policy]] = {}


def register(name: str, factory: Callable[[], Policy]) -> None:
    """Make a policy available by name.

    Raises:
        ValueError: The name is taken.
    """
    if name in _FACTORIES:
        raise ValueError(f"policy {name!r} is registered already")
    _FACTORIES[name] = factory


def names() -> list[str]:
    """Return the registered names, sorted; the built-in ones are always among them."""
    import_module("tierwise.placement.policies")
    return sorted(_FACTORIES)


def create(name: str) -> Policy:
    """Return a new policy of that name.

    Raises:
        NotFound: No policy has this name; the message lists those that exist.
    """
    known = names()
    if name not in known:
        raise NotFound(f"there is no policy {name!r}; known: {', '.join(known)}")
    return _FACTORIES[name]()
