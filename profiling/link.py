"""Bandwidth between pinned host memory and the device, by size of the copy."""

import collections
from typing import Literal

import jax
import jax.numpy as jnp

from kvpr_jax import memory
from kvpr_jax.profiling.timing import added_s, issued_s, trials_s
from kvpr_jax.segments import Activations

Way = Literal["to_device", "to_host", "both"]

MIB = 2**20
SIZES = (MIB // 16, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
TRIALS, TRIALS_ON_CPU = 10, 3
UNDER_WAY = 4  # copies at once, about as many as an engine's window has: a link is slower where all are issued at once
# Copies in a row, few and many: what the others add to the first ones is free of the cost of beginning.
COPIES: dict[Way, tuple[int, int]] = {"to_device": (4, 20), "to_host": (4, 12), "both": (4, 12)}
ISSUED = 2  # copies of one call, as of a group's keys and values
LARGE = 256 * MIB  # what shows all of a GPU's bandwidth


def sizes(way: Way) -> tuple[int, ...]:
    """Sizes to measure. The largest only where it shows a bandwidth, and not to the host: XLA keeps all host memory
    that it has pinned."""
    return SIZES if way == "to_device" and not memory.device_memory_is_host_memory() else SIZES[:-1]


def copy_s(way: Way, size: int) -> float:
    """Seconds that a copy of `size` bytes, or with "both" one each way, adds to others that are under way."""
    few, many = COPIES[way]
    return added_s(few, copies_s(way, size, few), many, copies_s(way, size, many))


def copies_s(way: Way, size: int, copies: int) -> float:
    """Seconds of so many copies of `size` bytes in a row, or with "both" so many each way, `UNDER_WAY` of them at once.

    The least of several trials: what else the machine does only makes them longer.
    """
    here = _segment(size)
    moves = [] if way == "to_host" else [(lambda there: memory.fetched([there])[0], memory.to_host(here))]
    moves += [] if way == "to_device" else [(memory.to_host, here)]

    def in_a_row() -> list[list[jax.Array]]:
        under_way: collections.deque[list[jax.Array]] = collections.deque()
        for _ in range(copies):
            if len(under_way) == UNDER_WAY:
                jax.block_until_ready(under_way.popleft())
            under_way.append([move(source).x for move, source in moves])
        return [*under_way]

    return min(trials_s(in_a_row, TRIALS_ON_CPU if memory.device_memory_is_host_memory() else TRIALS))


def under_way(copies: int) -> list[jax.Array]:
    """So many copies of the largest size to the device, issued together; what arrives."""
    there = jax.block_until_ready(memory.to_host(_segment(SIZES[-1])))
    return [memory.fetched([there])[0].x for _ in range(copies)]


def issue_s() -> float:
    """Seconds that the host needs for each of the copies to the device that one call issues."""
    there = [memory.to_host(_segment(SIZES[1])) for _ in range(ISSUED)]
    return issued_s(lambda: [segment.x for segment in memory.fetched(there)]) / ISSUED


def _segment(size: int) -> Activations:
    """One of so many bytes, on the device."""
    tokens = size // jnp.dtype(jnp.float32).itemsize
    return Activations(jnp.ones((1, tokens, 1), jnp.float32), jnp.arange(tokens, dtype=jnp.int32))


def gb_per_s() -> float:
    """1e9 bytes a second from pinned host memory to the device, of many large copies."""
    size = SIZES[-1] if memory.device_memory_is_host_memory() else LARGE
    return size / copy_s("to_device", size) / 1e9
