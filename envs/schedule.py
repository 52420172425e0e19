"""What arrives when: a trace as named requests, and the barriers that hold later ones back."""

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np

from envs.traces import Arrival, Trace
from tierwise.domain.ids import RequestId
from tierwise.domain.request import Request

Named = tuple[RequestId, Arrival]


class Schedule:
    """A trace being played.

    Requests are named by their place in the trace, and each has its noise from the start, so that
    it is as heavy whatever a policy makes of the others.
    """

    def __init__(self, trace: Trace, service: np.random.Generator) -> None:
        """Name every request and draw its noise.

        Args:
            trace: What arrives.
            service: The stream of service times.
        """
        self._trace = trace
        named = [(RequestId(f"r{i + 1:06}"), a) for i, a in enumerate(trace.arrivals)]
        self._followers = {
            number: [(RequestId(f"s{number:05}-{i + 1}"), a) for i, a in enumerate(stage.then)]
            for number, stage in sorted(trace.stages.items())
        }
        self._named = named + [pair for then in self._followers.values() for pair in then]
        drawn = service.standard_normal(len(self._named)).tolist()
        names = [name for name, _ in self._named]
        self._noise: dict[RequestId, float] = dict(zip(names, drawn, strict=True))
        for name, arrival in self._named:
            if arrival.run_s > 0.0:
                self._noise[name] = self._noise_of(arrival)
        self._arrivals: Iterator[Named] = iter(named)
        self._stage_left = {number: stage.size for number, stage in trace.stages.items()}
        self._stage_of: dict[RequestId, int] = {}
        self.open_count = trace.request_count  # without an end yet
        self.last_arrival_s = trace.arrivals[-1].at_s if trace.arrivals else 0.0

    def next(self) -> Named | None:
        """Return what arrives next by itself, or None."""
        return next(self._arrivals, None)

    def begin(self, request_id: RequestId, arrival: Arrival) -> Request:
        """Return the request of an arrival; from now on its stage waits for it."""
        if arrival.stage:
            self._stage_of[request_id] = arrival.stage
        spec = self._trace.behaviours[arrival.function].spec
        return Request(
            request_id=request_id,
            spec=spec,
            origin=arrival.origin,
            priority=arrival.priority,
            deadline_s=arrival.deadline_s or spec.deadline_s * arrival.item_count,
            timeout_s=spec.timeout_s * arrival.item_count,
            request_bytes=arrival.request_bytes,
            item_count=arrival.item_count,
            data_nodes=() if arrival.data_node is None else (arrival.data_node,),
            data_bytes=arrival.data_bytes,
            node_id=arrival.data_node if arrival.is_pinned else None,
        )

    def end(self, request_id: RequestId) -> list[Named]:
        """Count a request as ended; return what begins if it was the last of its stage."""
        self.open_count -= 1
        number = self._stage_of.pop(request_id, 0)
        if not number:
            return []
        self._stage_left[number] -= 1
        return [] if self._stage_left[number] else self._followers[number]

    def noise(self, request_id: RequestId) -> float:
        """Return the standard normal draw behind a request's lognormal run time."""
        return self._noise[request_id]

    def _noise_of(self, arrival: Arrival) -> float:
        """Return the draw that would give a request the run time that its trace tells."""
        behaviour = self._trace.behaviours[arrival.function]
        mean_s = behaviour.profile.run_s * arrival.item_count
        return math.log(arrival.run_s / mean_s) / behaviour.run_sigma

    def planned(self) -> Iterator[tuple[RequestId, Arrival, float]]:
        """Yield every request of the trace, those of later stages last, with its noise."""
        for name, arrival in self._named:
            yield name, arrival, self._noise[name]

    def cut_after(self, count: int) -> float | None:
        """Keep only so many more arrivals, and what follows from them; return when the last is."""
        left = list(islice(self._arrivals, count))
        dead: set[int] = set()
        cut = [arrival for _, arrival in self._arrivals]
        while cut:
            number = cut.pop().stage
            self.open_count -= 1
            if number and number not in dead:  # it will never be complete
                dead.add(number)
                cut += [arrival for _, arrival in self._followers[number]]
        self._arrivals = iter(left)
        return left[-1][1].at_s if left else None
