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


def issued_s(function: Callable[[], Any], trials: int = 5) -> float:
    """Seconds until `function` returns, its results under way: the least of a few trials, which are waited for.

    What else the host does only makes them longer.
    """
    seconds = []
    for _ in range(trials):
        begin = time.perf_counter()
        results = function()
        seconds.append(time.perf_counter() - begin)
        jax.block_until_ready(results)
    return min(seconds)
