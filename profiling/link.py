"""Bandwidth between pinned host memory and the device, by size of the copy."""

import jax.numpy as jnp

from kvpr_jax import memory
from kvpr_jax.profiling.timing import median_s
from kvpr_jax.segments import Activations

MIB = 2**20
SIZES = (MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
LARGE_ON_CPU = 64 * MIB  # the largest there, where copies are slower and bandwidth shows earlier
IN_FLIGHT = 16  # copies issued together, as the engine does
TO_DEVICE_BYTES, TO_HOST_BYTES = 2048 * MIB, 256 * MIB  # of them at most; XLA keeps host memory that was pinned


def copy_times(to_device: bool) -> list[tuple[int, float]]:
    """(bytes, seconds) of one copy of each of `SIZES`, of several in flight, in either direction."""
    largest = LARGE_ON_CPU if memory.device_memory_is_host_memory() else TO_DEVICE_BYTES if to_device else 64 * MIB
    return [(size, copy_s(to_device, size)) for size in SIZES if size <= largest]


def copy_s(to_device: bool, size: int) -> float:
    """Seconds of one copy of `size` bytes, of several in flight."""
    tokens = size // jnp.dtype(jnp.float32).itemsize
    here = Activations(jnp.ones((1, tokens, 1), jnp.float32), jnp.arange(tokens, dtype=jnp.int32))
    source = memory.to_host(here) if to_device else here
    copy = memory.fetched if to_device else memory.to_host
    in_flight = min(IN_FLIGHT, (TO_DEVICE_BYTES if to_device else TO_HOST_BYTES) // size)
    return median_s(lambda: [copy(source).x for _ in range(in_flight)]) / in_flight


def gb_per_s() -> float:
    """1e9 bytes a second from pinned host memory to the device, of many large copies."""
    size = min(SIZES[-1], LARGE_ON_CPU) if memory.device_memory_is_host_memory() else SIZES[-1]
    return size / copy_s(True, size) / 1e9


def line(times: list[tuple[int, float]]) -> tuple[float, float]:
    """Cost per copy in seconds and bandwidth in bytes per second: the line through the smallest and largest copy.

    Copies of 1 MiB in 50 µs and of 64 MiB in 1.26 ms cost 31 µs each and then run at 54 GB/s.
    """
    (small, small_s), (large, large_s) = times[0], times[-1]
    per_byte = max((large_s - small_s) / (large - small), 1e-15)
    return max(small_s - small * per_byte, 0.0), 1 / per_byte
