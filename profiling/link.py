"""Bandwidth between pinned host memory and the device, by size of the copy."""

from typing import Literal

import jax.numpy as jnp

from kvpr_jax import memory
from kvpr_jax.profiling.timing import issued_s, median_s
from kvpr_jax.segments import Activations

Way = Literal["to_device", "to_host", "both"]

MIB = 2**20
SIZES = (MIB // 16, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
FEW, MANY = 2, 8  # copies issued together; what the others add to the first ones is free of the cost of beginning
LARGE, LARGE_COPIES = 256 * MIB, 16  # what shows all of a GPU's bandwidth


def sizes(way: Way) -> tuple[int, ...]:
    """Sizes to measure. To the host only the smaller ones: XLA keeps all host memory that it has pinned."""
    return SIZES if way == "to_device" else SIZES[:-1]


def copy_s(way: Way, size: int) -> float:
    """Seconds that a copy of `size` bytes, or with "both" one each way, adds to others that are under way."""
    few_s, many_s = (copies_s(way, size, copies) for copies in (FEW, MANY))
    added_s, average_s = (many_s - few_s) / (MANY - FEW), many_s / MANY
    return added_s if added_s > average_s / 4 else average_s  # less is noise, which small copies drown in


def copies_s(way: Way, size: int, copies: int) -> float:
    """Seconds of so many copies of `size` bytes, issued together; with "both", so many each way."""
    here = _segment(size)
    moves = [] if way == "to_host" else [(memory.fetched, memory.to_host(here))]
    moves += [] if way == "to_device" else [(memory.to_host, here)]
    return median_s(lambda: [move(source).x for _ in range(copies) for move, source in moves])


def issue_s() -> float:
    """Seconds that the host needs to issue a copy to the device."""
    there = memory.to_host(_segment(SIZES[0]))
    return issued_s(lambda: [memory.fetched(there).x for _ in range(MANY)]) / MANY


def _segment(size: int) -> Activations:
    """One of so many bytes, on the device."""
    tokens = size // jnp.dtype(jnp.float32).itemsize
    return Activations(jnp.ones((1, tokens, 1), jnp.float32), jnp.arange(tokens, dtype=jnp.int32))


def gb_per_s() -> float:
    """1e9 bytes a second from pinned host memory to the device, of many large copies."""
    size = SIZES[-1] if memory.device_memory_is_host_memory() else LARGE
    return LARGE_COPIES * size / copies_s("to_device", size, LARGE_COPIES) / 1e9


def law(times: list[tuple[int, float]]) -> tuple[float, float]:
    """Seconds of a small copy, and bytes per second of large ones: a copy behind others takes the longer of the two.

    Fitted to (bytes, seconds) by size: so many of the smaller sizes take one time, the others are in proportion to
    their bytes, both with least squared relative errors. Copies of 64 KiB and 1 MiB in 80 µs and of 64 MiB in 1.26 ms
    cost 80 µs, or run at 53 GB/s.
    """

    def mean(ratios: list[float]) -> float:  # m of the least squares of m · ratio = 1
        return sum(ratios) / sum(ratio**2 for ratio in ratios)

    def error(small_s: float, per_byte: float) -> float:
        return sum((max(small_s, nbytes * per_byte) / seconds - 1) ** 2 for nbytes, seconds in times)

    times = sorted(times)
    fits = []
    for small in range(len(times)):
        small_s = mean([1 / seconds for _, seconds in times[:small]]) if small else 0.0
        fits.append((small_s, mean([nbytes / seconds for nbytes, seconds in times[small:]])))
    small_s, per_byte = min(fits, key=lambda fit: error(*fit))
    return small_s, 1 / per_byte
