"""Instances on one node: who is warm, what they hold, and whom to evict. Pure."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from tierwise.domain.function import FunctionSpec
from tierwise.domain.ids import FunctionId, InstanceId, NodeId, RequestId
from tierwise.domain.resources import Resources

RATE_WINDOW_S = 60.0
REMEMBERED_MAX = 10_000  # functions whose keep-alive was set, or that have a burst cap


class InstanceState(Enum):
    """STARTING and BUSY hold CPU and memory, IDLE holds memory only."""

    STARTING = 1
    IDLE = 2
    BUSY = 3


@dataclass(slots=True)
class Instance:
    """One worker process of a function."""

    instance_id: InstanceId
    spec: FunctionSpec
    state: InstanceState = InstanceState.STARTING
    cold_start_s: float = 0.0
    started_at_s: float = 0.0
    idle_since_s: float = 0.0
    run_count: int = 0
    request_id: RequestId | None = None


@dataclass(slots=True)
class _Rate:
    """Exponentially decayed arrivals per second."""

    per_s: float
    at_s: float

    def at(self, now_s: float) -> float:
        return self.per_s * math.exp((self.at_s - now_s) / RATE_WINDOW_S)


class InstancePool:
    """Instances and the resources that they take from a node's capacity.

    Invariant: what STARTING and BUSY instances hold, plus the memory of IDLE ones, never
    exceeds the capacity.
    """

    def __init__(self, node_id: NodeId, capacity: Resources) -> None:
        self._node_id = node_id
        self._capacity = capacity
        self._free_cpus = capacity.cpus
        self._free_memory_mib = capacity.memory_mib
        self._free_gpu_slots = capacity.gpu_slots
        self._instances: dict[InstanceId, Instance] = {}
        self._idle: dict[FunctionId, list[InstanceId]] = {}
        self._count: dict[FunctionId, int] = {}
        self._starting: dict[FunctionId, int] = {}
        self._rates: dict[FunctionId, _Rate] = {}
        self._started_count = 0
        self._floored_count = 0  # instances of functions that have a floor
        self._bursts: dict[FunctionId, tuple[float, float]] = {}  # starts left, at a time
        self._keep_alives_s: dict[FunctionId, float] = {}
        self.now_s = 0.0  # time of the step that changes it
        # Memory of idle instances per function, since when it is that much, and what it came to.
        self._idle_mib: dict[FunctionId, int] = {}
        self._idle_mib_since_s: dict[FunctionId, float] = {}
        self._idle_gb_s: dict[FunctionId, float] = {}
        self.warm: dict[FunctionId, int] = {}  # idle instances per function, kept current
        self.engaged: dict[FunctionId, int] = {}  # those that start or run

    @property
    def free(self) -> Resources:
        """Return what is not held; memory of idle instances counts as held."""
        return Resources(
            cpus=self._free_cpus, memory_mib=self._free_memory_mib, gpu_slots=self._free_gpu_slots
        )

    def __len__(self) -> int:
        return len(self._instances)

    def instances(self) -> tuple[Instance, ...]:
        """Return all instances in order of their start."""
        return tuple(self._instances.values())

    def get(self, instance_id: InstanceId) -> Instance | None:
        """Return an instance, or None if it is gone."""
        return self._instances.get(instance_id)

    def count(self, function: FunctionId) -> int:
        """Return how many instances of `function` there are, whatever they do."""
        return self._count.get(function, 0)

    @property
    def reserved_mib(self) -> int:
        """Return the memory of the instances that floors keep here."""
        if not self._floored_count:  # asked for at every decision
            return 0
        kept: dict[FunctionId, int] = {}
        held_mib = 0
        for instance in self._instances.values():
            spec = instance.spec
            if spec.instances_min and kept.get(spec.function_id, 0) < spec.instances_min:
                kept[spec.function_id] = kept.get(spec.function_id, 0) + 1
                held_mib += spec.memory_mib
        return held_mib

    def set_keep_alive(self, function: FunctionId, keep_alive_s: float | None) -> None:
        """Keep idle instances so long; None goes back to what the function's author said."""
        self._keep_alives_s.pop(function, None)
        if keep_alive_s is not None:
            while len(self._keep_alives_s) >= REMEMBERED_MAX:
                del self._keep_alives_s[next(iter(self._keep_alives_s))]
            self._keep_alives_s[function] = keep_alive_s

    def starting_count(self, function: FunctionId) -> int:
        """Return how many instances of `function` are on their way."""
        return self._starting.get(function, 0)

    def starting(self) -> Iterator[Instance]:
        """Yield the instances that are on their way."""
        if any(self._starting.values()):
            for instance in self._instances.values():
                if instance.state is InstanceState.STARTING:
                    yield instance

    def may_free(self, spec: FunctionSpec) -> bool:
        """Return whether a call may wait for an instance of its own function to come free.

        One that is idle but could not grow to what the call needs will not do: memory must.
        """
        is_stuck = spec.is_memory_auto and spec.function_id in self.warm
        return self.count(spec.function_id) > 0 and not is_stuck

    def has_cpu_for(self, spec: FunctionSpec) -> bool:
        """Return whether CPU and GPU are free for one more running instance."""
        return spec.cpus <= self._free_cpus + 1e-9 and spec.gpu_slots <= self._free_gpu_slots

    def note_arrival(self, function: FunctionId, now_s: float) -> None:
        """Count one request, for the price of evicting its function."""
        rate = self._rates.get(function)
        if rate is None:
            self._rates[function] = _Rate(1.0 / RATE_WINDOW_S, now_s)
        else:
            rate.per_s = rate.at(now_s) + 1.0 / RATE_WINDOW_S
            rate.at_s = now_s

    def take_idle(
        self, spec: FunctionSpec, request_id: RequestId, now_s: float
    ) -> tuple[Instance, list[Instance]] | None:
        """Make an idle instance busy, or return None.

        It is the most recently used one; where memory is chosen per call, the smallest that is
        large enough, else the largest. Its limit becomes that of the call: nothing is started anew.
        The caller has checked `has_cpu_for`.

        Returns:
            The instance and the ones evicted (removed already) so that it could grow, or None if
            none is idle or evicting every other idle instance would not free enough.
        """
        function = spec.function_id
        idle = self._idle.get(function)
        if not idle:
            return None
        chosen = idle[-1]
        if spec.is_memory_auto:
            sizes = {name: self._instances[name].spec.memory_mib for name in idle}
            fitting = [name for name in idle if sizes[name] >= spec.memory_mib]
            chosen = min(fitting, key=sizes.__getitem__) if fitting else max(idle, key=sizes.get)  # type: ignore[arg-type]
        instance = self._instances[chosen]
        growth_mib = spec.memory_mib - instance.spec.memory_mib
        evicted = self._make_room(growth_mib, now_s, keep=instance)
        if evicted is None:
            return None
        idle.remove(chosen)
        self._set_warm(instance, len(idle), -1)
        self._free_memory_mib -= growth_mib
        instance.spec = spec
        instance.state = InstanceState.BUSY
        self._engage(function, 1)
        instance.request_id = request_id
        instance.run_count += 1
        self._free_cpus -= instance.spec.cpus
        self._free_gpu_slots -= instance.spec.gpu_slots
        return instance, evicted

    def start(self, spec: FunctionSpec, now_s: float) -> tuple[Instance, list[Instance]] | None:
        """Reserve room for a new instance, evicting idle ones if memory must be freed.

        Returns:
            The new instance and the evicted ones (removed already), or None if the function is
            at its instance limit or its burst cap, or evicting every idle instance that no floor
            keeps would not free enough.
        """
        function = spec.function_id
        if self._count.get(function, 0) >= spec.instances_max:
            return None
        starts_left = self._starts_left(spec, now_s)
        if starts_left < 1.0:
            return None
        evicted = self._make_room(spec.memory_mib, now_s)
        if evicted is None:
            return None
        if spec.burst_max:
            self._bursts.pop(function, None)
            while len(self._bursts) >= REMEMBERED_MAX:
                del self._bursts[next(iter(self._bursts))]
            self._bursts[function] = starts_left - 1.0, now_s
        self._started_count += 1
        instance = Instance(InstanceId(f"{self._node_id}-{self._started_count}"), spec)
        instance.started_at_s = now_s
        self._engage(function, 1)
        self._instances[instance.instance_id] = instance
        self._count[function] = self._count.get(function, 0) + 1
        self._starting[function] = self._starting.get(function, 0) + 1
        self._free_cpus -= spec.cpus
        self._free_gpu_slots -= spec.gpu_slots
        self._free_memory_mib -= spec.memory_mib
        self._floored_count += spec.instances_min > 0
        return instance, evicted

    def _make_room(
        self, memory_mib: int, now_s: float, *, keep: Instance | None = None
    ) -> list[Instance] | None:
        """Evict idle instances until `memory_mib` are free; None, and none of them, if too few."""
        evicted: list[Instance] = []
        missing_mib = memory_mib - self._free_memory_mib
        if missing_mib > 0:
            for victim in self._by_eviction_price(now_s):
                if victim is keep:
                    continue
                evicted.append(victim)
                missing_mib -= victim.spec.memory_mib
                if missing_mib <= 0:
                    break
            else:
                return None
        for victim in evicted:
            self.remove(victim.instance_id)
        return evicted

    def release(self, instance: Instance, now_s: float) -> None:
        """Make a started or finished instance idle."""
        function = instance.spec.function_id
        if instance.state is InstanceState.STARTING:
            self._starting[function] -= 1
        self._engage(function, -1)
        instance.state = InstanceState.IDLE
        instance.request_id = None
        instance.idle_since_s = now_s
        self._free_cpus += instance.spec.cpus
        self._free_gpu_slots += instance.spec.gpu_slots
        idle = self._idle.setdefault(function, [])
        idle.append(instance.instance_id)
        self._set_warm(instance, len(idle), +1)

    def remove(self, instance_id: InstanceId) -> Instance | None:
        """Forget an instance and free what it held; unknown ids give None."""
        instance = self._instances.pop(instance_id, None)
        if instance is None:
            return None
        function = instance.spec.function_id
        if instance.state is InstanceState.IDLE:
            idle = self._idle[function]
            idle.remove(instance_id)
            self._set_warm(instance, len(idle), -1)
        else:
            self._engage(function, -1)
            self._free_cpus += instance.spec.cpus
            self._free_gpu_slots += instance.spec.gpu_slots
            if instance.state is InstanceState.STARTING:
                self._starting[function] -= 1
        self._free_memory_mib += instance.spec.memory_mib
        self._floored_count -= instance.spec.instances_min > 0
        self._count[function] -= 1
        if self._count[function] == 0:
            for table in (self._count, self._starting, self._idle):
                table.pop(function, None)
        return instance

    def stale(self, now_s: float) -> list[Instance]:
        """Return idle instances that have outlived their function's keep-alive and its floor."""
        return self._beyond_floors(
            [
                instance
                for instance in self._instances.values()
                if instance.state is InstanceState.IDLE
                and now_s - instance.idle_since_s >= self._keep_alive_s(instance.spec)
            ]
        )

    def _keep_alive_s(self, spec: FunctionSpec) -> float:
        if not self._keep_alives_s:
            return spec.keep_alive_s
        return self._keep_alives_s.get(spec.function_id, spec.keep_alive_s)

    def _beyond_floors(self, idle: list[Instance]) -> list[Instance]:
        """Return those that may go, in the given order, with every floor held."""
        gone: dict[FunctionId, int] = {}
        found = []
        for instance in idle:
            spec = instance.spec
            if spec.instances_min:
                gone_count = gone.get(spec.function_id, 0)
                if self._count[spec.function_id] - gone_count <= spec.instances_min:
                    continue
                gone[spec.function_id] = gone_count + 1
            found.append(instance)
        return found

    def _starts_left(self, spec: FunctionSpec, now_s: float) -> float:
        """Return how many instances may start now: a bucket that fills in a second."""
        burst = self._bursts.get(spec.function_id)
        if not spec.burst_max or burst is None:
            return float(spec.burst_max or 1)
        left, at_s = burst
        return min(float(spec.burst_max), left + (now_s - at_s) * spec.burst_max)

    def eviction_price_s_per_mib(self, now_s: float) -> float:
        """Return the price of the cheapest idle memory; 0 if nothing is idle."""
        if not self.warm:
            return 0.0
        return min(
            self._price_s_per_mib(self._instances[idle[0]], now_s)
            for idle in self._idle.values()
            if idle
        )

    def _price_s_per_mib(self, instance: Instance, now_s: float) -> float:
        """Chance that the function is called again within the window × its cold start, per MiB."""
        rate = self._rates.get(instance.spec.function_id)
        calls = 0.0 if rate is None else rate.at(now_s) * RATE_WINDOW_S
        return min(1.0, calls) * instance.cold_start_s / instance.spec.memory_mib

    def _by_eviction_price(self, now_s: float) -> list[Instance]:
        idle = [i for i in self._instances.values() if i.state is InstanceState.IDLE]
        idle.sort(key=lambda i: (self._price_s_per_mib(i, now_s), i.idle_since_s))
        return self._beyond_floors(idle)

    def _engage(self, function: FunctionId, change: int) -> None:
        count = self.engaged.get(function, 0) + change
        if count:
            self.engaged[function] = count
        else:
            self.engaged.pop(function, None)

    def take_idle_gb_s(self, now_s: float) -> dict[str, float]:
        """Return the GB-seconds that idle instances held since the last time, per function."""
        self.now_s = max(self.now_s, now_s)
        for function in self._idle_mib:
            self._add_idle(function)
        taken, self._idle_gb_s = self._idle_gb_s, {}
        return {str(function): gb_s for function, gb_s in taken.items() if gb_s > 0.0}

    def _add_idle(self, function: FunctionId) -> None:
        """Add what was held idle since it changed last; monotonic time, so it only grows."""
        held_s = max(0.0, self.now_s - self._idle_mib_since_s.get(function, self.now_s))
        gb_s = self._idle_mib.get(function, 0) / 1024.0 * held_s
        self._idle_gb_s[function] = self._idle_gb_s.get(function, 0.0) + gb_s
        self._idle_mib_since_s[function] = self.now_s

    def _set_warm(self, instance: Instance, count: int, change: int) -> None:
        function = instance.spec.function_id
        self._add_idle(function)
        idle_mib = self._idle_mib.get(function, 0) + change * instance.spec.memory_mib
        self._idle_mib[function] = idle_mib
        if not idle_mib:
            del self._idle_mib[function], self._idle_mib_since_s[function]
        if count:
            self.warm[function] = count
        else:
            self.warm.pop(function, None)
