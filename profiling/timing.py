"""Wall-clock timing of asynchronous JAX work."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def trials_s(function: Callable[[], Any], trials: int = 5, warm_up: int = 2) -> list[float]:
    """Seconds of each trial of `function`, from the call until its results are ready; warm-up is left out."""
    seconds = []
    for _ in range(warm_up + trials):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - begin)
    return seconds[warm_up:]


def median_s(function: Callable[[], Any], trials: int = 5, warm_up: int = 2) -> float:
    """Median of `trials_s`."""
    return statistics.median(trials_s(function, trials, warm_up))


def added_s(few: int, few_s: float, many: int, many_s: float) -> float:
    """Seconds that one of many things in a row adds to the others, from those of so few and of so many: free of the
    cost of beginning. Their average where the difference is so little that it must be noise."""
    added, average_s = (many_s - few_s) / (many - few), many_s / many
    return added if added > average_s / 4 else average_s


def issued_s(function: Callable[[], Any], trials: int = 9) -> float:
    """Seconds until `function` returns, its results under way: the median of a few trials, which are waited for.

    Not the least, which is rarely reached: where the host has no time to spare, all that it does makes a step longer.
    """
    seconds = []
    for _ in range(trials):
        begin = time.perf_counter()
        results = function()
        seconds.append(time.perf_counter() - begin)
        jax.block_until_ready(results)
    return statistics.median(seconds)
