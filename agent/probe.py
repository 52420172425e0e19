"""Real readings of the machine under the agent."""

import os
from pathlib import Path

import psutil

from tierwise.domain.resources import Resources
from tierwise.v1 import types_pb2

CGROUP = Path("/sys/fs/cgroup")
UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes a huge number for "no limit"
NVIDIA = Path("/proc/driver/nvidia/gpus")


class Probe:
    """Reads processor, memory, cgroup limits and GPUs; cheap enough for every heartbeat."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        psutil.cpu_percent()  # the first reading is the start of the first interval

    def capacity(self) -> Resources:
        """Return what functions may use here: cgroup limits if set, the machine otherwise."""
        memory = cgroup_memory_limit_bytes() or psutil.virtual_memory().total
        return Resources(
            cpus=cgroup_cpu_limit() or float(os.cpu_count() or 1),
            memory_mib=memory // 2**20,
            gpu_slots=len(gpu_names()),
        )

    def read(self, *, instance_count: int) -> types_pb2.HostReading:
        """Return the present readings; `instance_count` is how many workers the node holds."""
        memory = psutil.virtual_memory()
        return types_pb2.HostReading(
            cpu_percent=psutil.cpu_percent(),
            memory_used_mib=memory.used // 2**20,
            memory_total_mib=memory.total // 2**20,
            load_1min=psutil.getloadavg()[0],
            agent_rss_mib=self._process.memory_info().rss / 2**20,
            process_count=instance_count,
            gpus=gpu_names(),
            cpu_limit=cgroup_cpu_limit() or 0.0,
            memory_limit_mib=(cgroup_memory_limit_bytes() or 0) // 2**20,
        )


def cgroup_cpu_limit() -> float | None:
    """Return the CPUs that the cgroup (v2, then v1) allows, or None without a limit."""
    text = _read(CGROUP / "cpu.max")
    if text:
        quota, period = text.split()
        return None if quota == "max" else int(quota) / int(period)
    quota, period = _read(CGROUP / "cpu/cpu.cfs_quota_us"), _read(CGROUP / "cpu/cpu.cfs_period_us")
    if quota and period and int(quota) > 0:
        return int(quota) / int(period)
    return None


def cgroup_memory_limit_bytes() -> int | None:
    """Return the memory that the cgroup (v2, then v1) allows, or None without a limit."""
    text = _read(CGROUP / "memory.max") or _read(CGROUP / "memory/memory.limit_in_bytes")
    if not text or text == "max" or int(text) >= UNLIMITED_BYTES:
        return None
    return int(text)


def gpu_names() -> list[str]:
    """Return the GPUs that the NVIDIA kernel driver lists; empty without the driver."""
    names = []
    for card in sorted(NVIDIA.glob("*/information")):
        for line in _read(card).splitlines():
            key, _, value = line.partition(":")
            if key == "Model":
                names.append(value.strip())
    return names


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
