"""When requests arrive: point processes on [0, ∞), all with the same mean rate. Simulated."""

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]

BURST_S = 2.0  # mean length of a burst
DAY_S = 60.0  # a simulated day, compressed so that a trace of some minutes sees several
SWING = 0.8  # of the daily rate around its mean
FLASH = (0.4, 0.55)  # when the crowd comes, as shares of the trace's length
FLASH_FACTOR = 3.0


def bursty(rng: np.random.Generator, rate: float, count: int, burstiness: float) -> Times:
    """Return times of a Markov-modulated Poisson process.

    With `burstiness` b > 1 the rate is b times the mean in bursts that take a share of 1/(2b) of
    the time, and lower otherwise; b = 1 is plain Poisson.
    """
    if burstiness <= 1.0:
        return np.cumsum(rng.exponential(1.0 / rate, size=count))
    share = 1.0 / (2.0 * burstiness)
    slow = (1.0 - share * burstiness) / (1.0 - share)
    times: list[float] = []
    now_s = 0.0
    is_burst = False
    while len(times) < count:
        mean_s = BURST_S if is_burst else BURST_S * (1.0 - share) / share
        end_s = now_s + float(rng.exponential(mean_s))
        here = rate * (burstiness if is_burst else slow)
        steps = rng.exponential(1.0 / here, size=int(here * mean_s * 4) + 8)
        arrivals = now_s + np.cumsum(steps)
        times.extend(arrivals[arrivals < end_s].tolist())
        now_s = end_s
        is_burst = not is_burst
    return np.array(times[:count])


def diurnal(rng: np.random.Generator, rate: float, count: int) -> Times:
    """Return times whose rate swings by 80 % with the (compressed) hour of the day, by thinning."""
    phase = float(rng.uniform(0.0, 2.0 * np.pi))
    kept: list[NDArray[np.float64]] = []
    now_s, found = 0.0, 0
    while found < count:
        times = now_s + np.cumsum(rng.exponential(1.0 / (rate * (1.0 + SWING)), size=2 * count))
        here = 1.0 + SWING * np.sin(2.0 * np.pi * times / DAY_S + phase)
        keep = times[rng.random(len(times)) * (1.0 + SWING) < here]
        kept.append(keep)
        found += len(keep)
        now_s = float(times[-1])
    return np.concatenate(kept)[:count]


def flash(rng: np.random.Generator, rate: float, count: int) -> tuple[Times, NDArray[np.bool_]]:
    """Return times with a flash crowd, and which of them are inside of it.

    For 15 % of the trace's length the rate is three times the mean; before and after it is lower.
    """
    length = count / rate
    width = FLASH[1] - FLASH[0]
    calm = (1.0 - FLASH_FACTOR * width) / (1.0 - width)
    ends = np.array([FLASH[0], FLASH[1], 1.0]) * length
    # Unit-rate times, stretched by the inverse of the integrated rate.
    unit = np.cumsum(rng.exponential(1.0, size=count))
    grid = np.concatenate([[0.0], ends, [ends[-1] + length]])
    rates = rate * np.array([calm, FLASH_FACTOR, calm, calm])
    integral = np.concatenate([[0.0], np.cumsum(rates * np.diff(grid))])
    times = np.interp(unit, integral, grid)
    return times, (times >= ends[0]) & (times < ends[1])
