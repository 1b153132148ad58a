"""Bandwidth between pinned host memory and the device, by size of the copy."""

import jax.numpy as jnp

from kvpr_jax import memory
from kvpr_jax.profiling.timing import median_s
from kvpr_jax.segments import Activations

MIB = 2**20
SIZES = (MIB, 4 * MIB, 16 * MIB, 64 * MIB)
IN_FLIGHT = 4  # copies issued together, as the engine does


def copy_times(to_device: bool, sizes: tuple[int, ...] = SIZES, in_flight: int = IN_FLIGHT) -> list[tuple[int, float]]:
    """(bytes, seconds) of one copy of each size, of several in flight, in either direction."""
    times = []
    for size in sizes:
        tokens = size // jnp.dtype(jnp.float32).itemsize
        here = Activations(jnp.ones((1, tokens, 1), jnp.float32), jnp.arange(tokens, dtype=jnp.int32))
        source = memory.to_host(here) if to_device else here
        copy = memory.fetched if to_device else memory.to_host
        seconds = median_s(lambda source=source, copy=copy: [copy(source).x for _ in range(in_flight)])
        times.append((size, seconds / in_flight))
    return times


def gb_per_s() -> float:
    """1e9 bytes a second from pinned host memory to the device, of many large copies."""
    size = 2**28 if not memory.device_memory_is_host_memory() else SIZES[-1]
    ((_, seconds),) = copy_times(to_device=True, sizes=(size,), in_flight=16)
    return size / seconds / 1e9


def line(times: list[tuple[int, float]]) -> tuple[float, float]:
    """Cost per copy in seconds and bandwidth in bytes per second: the line through the smallest and largest copy.

    Copies of 1 MiB in 50 µs and of 64 MiB in 1.26 ms cost 31 µs each and then run at 54 GB/s.
    """
    (small, small_s), (large, large_s) = times[0], times[-1]
    per_byte = max((large_s - small_s) / (large - small), 1e-15)
    return max(small_s - small * per_byte, 0.0), 1 / per_byte
