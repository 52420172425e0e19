"""How many instances each function wants on this node even when nobody calls it. Pure."""

from tierwise.domain.function import Catalogue, FunctionSpec
from tierwise.domain.ids import FunctionId
from tierwise.domain.topology import Node
from tierwise.placement.feasibility import hard_limit

RETRY_FIRST_S = 1.0  # after a floor's instance could not be started; doubles
RETRY_MAX_S = 60.0


class Floors:
    """The functions of the catalogue with `instances_min`, as far as this node may host them."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._specs: tuple[FunctionSpec, ...] = ()
        self._retries: dict[FunctionId, tuple[float, float]] = {}  # not before, next pause

    def replace(self, catalogue: Catalogue) -> None:
        """Take over a catalogue: of each name, the newest version has the floor."""
        newest: dict[tuple[str, str], FunctionSpec] = {}
        for spec in catalogue.functions.values():
            known = newest.get((spec.namespace, spec.name))
            if known is None or known.version < spec.version:
                newest[spec.namespace, spec.name] = spec
        self._specs = tuple(
            spec for spec in newest.values() if spec.instances_min and self._may_host(spec)
        )
        kept = {spec.function_id for spec in self._specs}
        self._retries = {key: value for key, value in self._retries.items() if key in kept}

    def wanted(self, now_s: float) -> list[FunctionSpec]:
        """Return the functions whose floor may be looked after now."""
        if not self._retries:
            return list(self._specs)
        return [
            spec for spec in self._specs if self._retries.get(spec.function_id, (0.0,))[0] <= now_s
        ]

    def failed(self, function: FunctionId, now_s: float) -> None:
        """Wait before the next try; longer each time."""
        if any(spec.function_id == function for spec in self._specs):
            _, pause_s = self._retries.get(function, (0.0, RETRY_FIRST_S))
            self._retries[function] = now_s + pause_s, min(RETRY_MAX_S, 2 * pause_s)

    def started(self, function: FunctionId) -> None:
        """An instance came up: the next failure begins with a short pause again."""
        self._retries.pop(function, None)

    def _may_host(self, spec: FunctionSpec) -> bool:
        return self._node.tier in spec.tiers and hard_limit(self._node, spec, 0) is None
