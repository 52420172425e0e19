"""Functions, their versions and what is known of how they behave."""

import hashlib
from dataclasses import dataclass, field
from enum import IntEnum

from tierwise.domain.ids import FunctionId, function_id
from tierwise.domain.resources import Resources
from tierwise.domain.sizing import Sizing
from tierwise.domain.topology import Tier

ALL_TIERS = frozenset(Tier)


class Priority(IntEnum):
    """How much a missed deadline hurts."""

    LOW = 1
    NORMAL = 2
    HIGH = 3
    CRITICAL = 4


def requirements_digest(requirements: tuple[str, ...]) -> str:
    """Return the SHA-256 of a set of requirements, in any order; empty for none."""
    if not requirements:
        return ""
    return hashlib.sha256("\n".join(sorted(requirements)).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSpec:
    """One immutable version of a function, as its author declared it.

    `deadline_s` is the latency that a call should meet (a missed one is counted and costs);
    `timeout_s` is when a running call is killed.
    """

    namespace: str
    name: str
    version: int
    code_digest: str  # SHA-256 of the code blob, hex
    requirements: tuple[str, ...] = ()
    memory_mib: int = 256
    cpus: float = 1.0
    gpu_slots: int = 0
    timeout_s: float = 60.0
    deadline_s: float = 1.0
    priority: Priority = Priority.NORMAL
    tiers: frozenset[Tier] = field(default=ALL_TIERS)
    instances_max: int = 16  # per node
    keep_alive_s: float = 300.0
    budget_usd: float | None = None  # per call
    retries_max: int = 2
    description: str = ""
    network: tuple[str, ...] = ()  # "host:port" that it may reach, through the agent; else nothing
    instances_min: int = 0  # kept on every node that may host it, and takes memory there
    burst_max: int = 0  # starts per second and node; 0: as many as there is room for
    python_version: str = ""  # "3.11": what pickled the code, and all that can load it
    is_memory_auto: bool = False  # `memory_mib` is then for calls of which nothing is known yet
    function_id: FunctionId = field(init=False, compare=False)  # namespace/name@version

    def __post_init__(self) -> None:
        """Derive the id once: every request reads it many times."""
        identity = function_id(self.namespace, self.name, self.version)
        object.__setattr__(self, "function_id", identity)

    @property
    def requirements_digest(self) -> str:
        """Return what names its environment on every node; empty without requirements."""
        return requirements_digest(self.requirements)

    @property
    def resources(self) -> Resources:
        """Return what one running instance takes."""
        return Resources(cpus=self.cpus, memory_mib=self.memory_mib, gpu_slots=self.gpu_slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionProfile:
    """How a function has behaved: exponentially weighted means over its calls.

    `run_s` is on a node of speed 1.0. The defaults are the prior before the first call.
    """

    run_s: float = 0.05
    cold_start_s: float = 0.2
    response_bytes: int = 1024
    rate_per_s: float = 0.0  # calls per second over the cluster
    call_count: int = 0


PRIOR = FunctionProfile()


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Every function version that may be called, and the newest version of each name."""

    revision: int = 0
    functions: dict[FunctionId, FunctionSpec] = field(default_factory=dict)
    profiles: dict[FunctionId, FunctionProfile] = field(default_factory=dict)
    sizings: dict[FunctionId, Sizing] = field(default_factory=dict)

    def profile(self, function: FunctionId) -> FunctionProfile:
        """Return what is known of `function`, the prior if nothing is."""
        return self.profiles.get(function, PRIOR)

    def latest(self, namespace: str, name: str) -> FunctionSpec | None:
        """Return the newest version of a name, or None."""
        found = [f for f in self.functions.values() if f.namespace == namespace and f.name == name]
        return max(found, key=lambda spec: spec.version, default=None)
