"""Bandwidth between pinned host memory and the device, by size of the copy."""

import jax.numpy as jnp

from kvpr_jax import memory
from kvpr_jax.profiling.timing import median_s
from kvpr_jax.segments import Activations

MIB = 2**20
SIZES = (MIB, 4 * MIB, 16 * MIB, 64 * MIB)
FEW, MANY = 2, 8  # copies issued together; what the others add to the first ones is free of the cost of beginning
LARGE, LARGE_COPIES = 256 * MIB, 16  # what shows all of a GPU's bandwidth


def copy_times(to_device: bool) -> list[tuple[int, float]]:
    """(bytes, seconds) that a copy of each of `SIZES` adds to others that are under way, in either direction."""
    return [(size, copy_s(to_device, size)) for size in SIZES]


def copy_s(to_device: bool, size: int) -> float:
    """Seconds that a copy of `size` bytes adds to others."""
    few_s, many_s = (copies_s(to_device, size, copies) for copies in (FEW, MANY))
    added_s = (many_s - few_s) / (MANY - FEW)
    return added_s if added_s > 0 else many_s / MANY  # where small copies drown in noise


def copies_s(to_device: bool, size: int, copies: int) -> float:
    """Seconds of so many copies of `size` bytes, issued together."""
    tokens = size // jnp.dtype(jnp.float32).itemsize
    here = Activations(jnp.ones((1, tokens, 1), jnp.float32), jnp.arange(tokens, dtype=jnp.int32))
    source = memory.to_host(here) if to_device else here
    copy = memory.fetched if to_device else memory.to_host
    return median_s(lambda: [copy(source).x for _ in range(copies)])


def gb_per_s() -> float:
    """1e9 bytes a second from pinned host memory to the device, of many large copies."""
    size = SIZES[-1] if memory.device_memory_is_host_memory() else LARGE
    return LARGE_COPIES * size / copies_s(True, size, LARGE_COPIES) / 1e9


def line(times: list[tuple[int, float]]) -> tuple[float, float]:
    """Cost per copy in seconds and bandwidth in bytes per second: the line through the smallest and largest copy.

    Copies of 1 MiB in 50 µs and of 64 MiB in 1.26 ms cost 31 µs each and then run at 54 GB/s.
    """
    (small, small_s), (large, large_s) = times[0], times[-1]
    per_byte = max((large_s - small_s) / (large - small), 1e-15)
    return max(small_s - small * per_byte, 0.0), 1 / per_byte
