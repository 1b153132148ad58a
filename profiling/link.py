"""Bandwidth between pinned host memory and the device, by size of the copy."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from kvpr_jax import memory
from kvpr_jax.profiling.timing import issued_s, trials_s
from kvpr_jax.segments import Activations

Way = Literal["to_device", "to_host", "both"]

MIB = 2**20
SIZES = (MIB // 16, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
FEW, MANY = 2, 8  # copies issued together; what the others add to the first ones is free of the cost of beginning
LARGE, LARGE_COPIES = 256 * MIB, 16  # what shows all of a GPU's bandwidth


def sizes(way: Way) -> tuple[int, ...]:
    """Sizes to measure. The largest only where it shows a bandwidth, and not to the host: XLA keeps all host memory
    that it has pinned."""
    return SIZES if way == "to_device" and not memory.device_memory_is_host_memory() else SIZES[:-1]


def copy_s(way: Way, size: int) -> float:
    """Seconds that a copy of `size` bytes, or with "both" one each way, adds to others that are under way."""
    few_s, many_s = (copies_s(way, size, copies) for copies in (FEW, MANY))
    added_s, average_s = (many_s - few_s) / (MANY - FEW), many_s / MANY
    return added_s if added_s > average_s / 4 else average_s  # less is noise, which small copies drown in


def copies_s(way: Way, size: int, copies: int) -> float:
    """Seconds of so many copies of `size` bytes, issued together; with "both", so many each way.

    The least of a few trials: what else the machine does only makes them longer.
    """
    here = _segment(size)
    moves = [] if way == "to_host" else [(memory.fetched, memory.to_host(here))]
    moves += [] if way == "to_device" else [(memory.to_host, here)]
    return min(trials_s(lambda: [move(source).x for _ in range(copies) for move, source in moves]))


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


class Law(NamedTuple):
    """What a copy behind others takes: as long as a small one, or its share of the cost of beginning and its bytes.

    Attributes:
        small_s: of a small copy, which takes as long to issue.
        begin_s: what a larger one takes beside its bytes.
        bytes_per_s: of what is larger.
    """

    small_s: float
    begin_s: float
    bytes_per_s: float

    def copy_s(self, nbytes: int) -> float:
        return max(self.small_s, self.begin_s + nbytes / self.bytes_per_s)


def law(times: list[tuple[int, float]]) -> Law:
    """The law of copies, from (bytes, seconds).

    So many of the smaller sizes take one time, the others lie on a line, both with least squared relative errors.
    Copies of 64 KiB and 1 MiB in 80 µs, of 16 MiB in 315 µs and of 64 MiB in 1.23 ms cost 80 µs, or 10 µs and their
    bytes at 55 GB/s.
    """
    times = sorted(times)
    fits = []
    for small in range(len(times)):
        small_s = _scale(np.array([1 / seconds for _, seconds in times[:small]])) if small else 0.0
        fits.append(Law(small_s, *line(times[small:])))

    def error(fit: Law) -> float:
        return sum((fit.copy_s(nbytes) / seconds - 1) ** 2 for nbytes, seconds in times)

    return min(fits, key=lambda fit: round(error(fit), 9))  # of equally good ones that with fewer small sizes


def line(times: list[tuple[int, float]]) -> tuple[float, float]:
    """A time in seconds and a rate in bytes per second, from (bytes, seconds): the line of least squared relative
    errors. Neither is ever negative."""
    nbytes, seconds = np.array(times, np.float64).T
    copies, weighted = 1 / seconds, nbytes / seconds  # time · copies + seconds a byte · weighted should be 1
    per_copy, per_byte = 0.0, 0.0
    if len(times) > 1:
        per_copy, per_byte = np.linalg.lstsq(np.stack([copies, weighted], axis=1), np.ones(len(times)))[0]
    if per_copy < 0 or len(times) == 1:
        per_copy, per_byte = 0.0, _scale(weighted)
    elif per_byte <= 0:
        per_copy, per_byte = _scale(copies), 1e-15
    return float(per_copy), float(1 / per_byte)


def _scale(ratios: np.ndarray) -> float:
    """The m that brings m · ratio nearest to 1, by least squares."""
    return float(ratios.sum() / (ratios @ ratios))
