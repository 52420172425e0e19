"""Tiers, nodes and the links between them."""

from dataclasses import dataclass, field
from enum import IntEnum

from tierwise.domain.ids import NodeId
from tierwise.domain.resources import Resources


class Tier(IntEnum):
    """How far a node is from the users, nearest first."""

    EDGE = 1
    FOG = 2
    CLOUD = 3

    @property
    def label(self) -> str:
        """Return the lower-case name that files and commands use."""
        return self.name.lower()


def parse_tier(text: str) -> Tier:
    """Return the tier named `text`.

    Raises:
        ValueError: It is none of edge, fog, cloud.
    """
    try:
        return Tier[text.upper()]
    except KeyError:
        raise ValueError(f"{text!r} is no tier: use edge, fog or cloud") from None


class NodeState(IntEnum):
    """What the control plane believes of a node."""

    READY = 1
    SUSPECT = 2  # heartbeats are late
    LOST = 3  # heartbeats have stopped, or it has said goodbye
    DRAINING = 4  # finishes what it has, takes nothing new


PYTHON_LABEL = "python"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One agent's machine.

    `speed` is relative to the reference device (1.0): a function's `run_s` there, divided by it.
    `address` is where peers dial the agent, `host:port`; empty when it cannot be dialled.
    """

    node_id: NodeId
    tier: Tier
    capacity: Resources
    speed: float = 1.0
    address: str = ""
    zone: str = ""
    labels: tuple[tuple[str, str], ...] = field(default=())

    @property
    def python_version(self) -> str:
        """Return the minor version of Python that functions get here, "3.11"; empty: unknown."""
        for key, value in self.labels:
            if key == PYTHON_LABEL:
                return value
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One directed network path between two nodes."""

    rtt_s: float
    bandwidth_bytes_per_s: float
    jitter_s: float = 0.0

    def transfer_s(self, payload_bytes: int) -> float:
        """Return seconds to move `payload_bytes` one way over an idle link."""
        return self.rtt_s / 2 + payload_bytes / self.bandwidth_bytes_per_s


LOOPBACK = Link(rtt_s=0.0, bandwidth_bytes_per_s=float("inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTable:
    """Paths between nodes: by pair where known, by pair of tiers otherwise.

    A missing tier pair means the default link. Nodes of one tier in the same non-empty zone
    use the `(tier, tier)` entry too: a zone only says which fog is near which edge.
    """

    by_tier: dict[tuple[Tier, Tier], Link] = field(default_factory=dict)
    by_pair: dict[tuple[NodeId, NodeId], Link] = field(default_factory=dict)
    default: Link = Link(rtt_s=0.02, bandwidth_bytes_per_s=12.5e6)

    def between(self, source: Node, target: Node) -> Link:
        """Return the path from `source` to `target`; a node reaches itself at once."""
        if source.node_id == target.node_id:
            return LOOPBACK
        if self.by_pair:
            pair = self.by_pair.get((source.node_id, target.node_id))
            if pair is not None:
                return pair
        return self.by_tier.get((source.tier, target.tier), self.default)


class Channel:
    """One direction of a link with a queue: messages leave one after the other.

    The same class emulates links between live agents and links in the simulator. It is a
    fluid first-in-first-out pipe: a message occupies the bandwidth for bytes ÷ bandwidth
    seconds and arrives half a round trip later.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self._free_at_s = 0.0

    def delay_s(self, payload_bytes: int, now_s: float, jitter: float = 0.0) -> float:
        """Return seconds from `now_s` until a message sent now has arrived.

        Args:
            payload_bytes: Size of the message.
            now_s: The sender's monotonic time; must not go backwards.
            jitter: A draw from [0, 1) that scales the link's `jitter_s`.
        """
        start_s = max(now_s, self._free_at_s)
        self._free_at_s = start_s + payload_bytes / self.link.bandwidth_bytes_per_s
        return self._free_at_s - now_s + self.link.rtt_s / 2 + jitter * self.link.jitter_s

    def wait_s(self, now_s: float) -> float:
        """Return seconds until the pipe is free."""
        return max(0.0, self._free_at_s - now_s)
