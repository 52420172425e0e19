"""How functions behave, learnt from their calls. The scheduler and the simulator learn alike."""

import math
from collections.abc import Mapping

from tierwise.domain.function import PRIOR, FunctionProfile
from tierwise.domain.ids import FunctionId
from tierwise.domain.outcome import Outcome, OutcomeState

SMOOTHING = 0.1  # weight of the newest call, once there were ten
COLD_SMOOTHING = 0.3  # cold starts are rare: each counts for more
COLD_KNOWN = 4  # cold starts after which each has that weight
RATE_WINDOW_S = 60.0
PROFILES_MAX = 20_000  # functions that are learnt about


class Profiles:
    """A profile per function: exponentially weighted means, and an exponentially decayed rate."""

    def __init__(self, known: Mapping[FunctionId, FunctionProfile] | None = None) -> None:
        self._profiles: dict[FunctionId, FunctionProfile] = dict(known or {})
        self._counted_at_s: dict[FunctionId, float] = {}
        # What was stored may rest on many cold starts: a new one then only moves it.
        self._cold_counts: dict[FunctionId, int] = dict.fromkeys(self._profiles, COLD_KNOWN)

    def get(self, function: FunctionId) -> FunctionProfile:
        """Return what is known of `function`, the prior if nothing is."""
        return self._profiles.get(function, PRIOR)

    def snapshot(self) -> dict[FunctionId, FunctionProfile]:
        """Return a copy of all profiles."""
        return dict(self._profiles)

    def learn(self, outcome: Outcome, speed: float | None, now_s: float) -> bool:
        """Move the function's profile towards what a call showed; return False if there is no room.

        Args:
            outcome: How the call ended; only one that is OK says how long it runs.
            speed: Of the node that ran it; None if that is unknown.
            now_s: Monotonic time, never smaller than before.
        """
        function = outcome.function_id
        if function not in self._profiles and len(self._profiles) >= PROFILES_MAX:
            return False
        old = self.get(function)
        gap_s = now_s - self._counted_at_s.get(function, now_s)
        self._counted_at_s[function] = now_s
        rate = old.rate_per_s * math.exp(-gap_s / RATE_WINDOW_S)
        rate += outcome.item_count / RATE_WINDOW_S
        run_s, cold_s, response_bytes = old.run_s, old.cold_start_s, old.response_bytes
        if outcome.state is OutcomeState.OK and speed is not None:
            weight = max(SMOOTHING, 1.0 / (old.call_count + 1))
            items = max(1, outcome.item_count)
            run_s += weight * (max(0.0, outcome.latency.run_s) * speed / items - run_s)
            response_bytes += int(weight * (outcome.response_bytes / items - response_bytes))
            if outcome.is_cold:
                seen_s = max(0.0, outcome.latency.cold_start_s) * speed
                seen = self._cold_counts.get(function, 0)  # the first one replaces the prior
                self._cold_counts[function] = seen + 1
                cold_s += max(1.0 / (seen + 1), COLD_SMOOTHING) * (seen_s - cold_s)
        self._profiles[function] = FunctionProfile(
            run_s=run_s,
            cold_start_s=cold_s,
            response_bytes=max(0, response_bytes),
            rate_per_s=rate,
            call_count=old.call_count + outcome.item_count,
        )
        return True
