"""Where arrays live, and how much room there is. The only file that names a memory kind."""

import dataclasses
import functools
import math
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from kvpr_jax.segments import Segment

HOST, DEVICE = "pinned_host", "device"
HOST_POOL_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
GIB = 2**30

Tree = TypeVar("Tree")

_pool_bytes = 0  # XLA's pool of pinned memory is at least this large: what was reserved, or seen live


def in_gib(nbytes: int) -> str:
    """15.61, and 0.000075: two decimals, or two digits of what is less."""
    gib = nbytes / GIB
    return f"{gib:.{max(2, 1 - math.floor(math.log10(gib))) if nbytes else 2}f}"


def allow_pinned_memory() -> None:
    """Let XLA pin as much host memory as is free: its own limit is 64 GB. A value set by the user is kept.

    Takes effect only before JAX starts its backend.
    """
    os.environ.setdefault(HOST_POOL_LIMIT, str(max(1, free_host_bytes() * 9 // 10 // GIB)))


@functools.cache
def _sharding(kind: str) -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.local_devices()[0], memory_kind=kind)


def placed(tree: Tree) -> Tree:
    """The tree's arrays bound to the device, without a copy where they are there already.

    To JAX's cache of compiled functions an array that was left where JAX put it differs from one that was placed, so
    everything that enters a compiled step is placed; a mixture would compile the same step twice.
    """
    return jax.device_put(tree, _sharding(DEVICE))


def fetched(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Segments, all on the device: those on the host by one asynchronous copy of all their arrays."""
    with jax.profiler.TraceAnnotation("fetch"):
        arrived = iter(_moved([segment for segment in segments if on_host(segment)], DEVICE))
    return tuple(next(arrived) if on_host(segment) else segment for segment in segments)


def arriving(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Within a compiled function: segments that are on the host, on the device, copied beside what it computes."""
    return tuple(_moved(segments, DEVICE))


def described(tree: Tree, host: bool | None = None) -> Tree:
    """Shapes, types and places of the tree's arrays, as they are, or as they would be on the host or on the device.

    A segment's `slots` are always on the device.
    """

    def describe(array: Any) -> jax.ShapeDtypeStruct:
        sharding = array.sharding if host is None else _sharding(HOST if host and array.ndim > 1 else DEVICE)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(describe, tree)


def to_host(segment: Segment) -> Segment:
    """A copy of the segment in pinned host memory, asynchronous; its few `slots` stay on the device."""
    return _moved((segment,), HOST)[0]


def _moved(segments: Sequence[Segment], kind: str) -> list[Segment]:
    """The arrays of all of them to a kind of memory, by one call."""
    moved = jax.device_put([segment.arrays for segment in segments], _sharding(kind))
    return [dataclasses.replace(segment, **there) for segment, there in zip(segments, moved, strict=True)]


def on_host(segment: Segment) -> bool:
    return next(iter(segment.arrays.values())).sharding.memory_kind == HOST


def host_bytes(segments: tuple[Segment, ...]) -> int:
    """Bytes of those of the segments that are on the host."""
    return sum(segment.nbytes for segment in segments if on_host(segment))


def free_host_bytes() -> int:
    """Bytes of host memory that can still be taken: what the system has, or what the limits of this process's control
    group and of those around it leave, if that is less."""
    free = [_meminfo("MemAvailable")]
    for group, limit, used in _control_groups():
        try:
            taken = int((group / used).read_text()) - _given_back(group / "memory.stat")
            free.append(int((group / limit).read_text()) - taken)
        except (OSError, ValueError):  # no such control group, as in a container that sees only its own; or "max"
            continue
    return max(0, min(free))


def total_host_bytes() -> int:
    """Bytes of the machine's memory, taken or not."""
    return _meminfo("MemTotal")


def _control_groups() -> Iterator[tuple[Path, str, str]]:
    """This process's control groups, of version 2 and of version 1, and those around them; the files that hold a
    group's limit and what is used."""
    root, listed = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    own: dict[str, str] = {}  # paths by controller; that of version 2 has no name
    for line in listed.read_text().splitlines() if listed.is_file() else []:
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    for mount, controller, limit, used in (
        (root, "", "memory.max", "memory.current"),
        (root / "memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        group = mount / own.get(controller, "").strip("/")
        yield from ((of, limit, used) for of in (group, *group.parents) if of.is_relative_to(mount))


def _given_back(statistics: Path) -> int:
    """Bytes of a control group's usage that the kernel frees when they are needed: pages of files read long ago."""
    lines = statistics.read_text().splitlines() if statistics.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def free_pinned_bytes() -> int:
    """Bytes of pinned host memory that arrays can still take: free host memory, within XLA's limit for its pool.

    XLA keeps what it has pinned, so memory of arrays that are gone counts as free to new ones.
    """
    if device_memory_is_host_memory():
        return free_host_bytes()
    live = _live_pinned_bytes()
    limit = int(os.environ.get(HOST_POOL_LIMIT, "64")) * GIB
    return min(free_host_bytes() + _pool_bytes - live, limit - live)


def _live_pinned_bytes() -> int:
    global _pool_bytes
    live = sum(array.nbytes for array in jax.live_arrays() if array.sharding.memory_kind == HOST)
    _pool_bytes = max(_pool_bytes, live)
    return live


def reserve_pinned(nbytes: int, array_bytes: int) -> None:
    """Make room in XLA's pool of pinned memory for `nbytes` more, in arrays of up to `array_bytes`.

    By itself the pool grows by regions, each twice as large as the one before, and may end up with twice what the
    cache needs. A region is as large as the request that it was made for, rounded up to a power of two; so a few large
    arrays, made and given up, leave a pool that fits.
    """
    global _pool_bytes
    missing = 0 if device_memory_is_host_memory() else _live_pinned_bytes() + nbytes - _pool_bytes
    if missing > 0:
        sizes = regions(missing, array_bytes)
        jax.block_until_ready([jax.device_put(np.zeros(size, np.uint8), _sharding(HOST)) for size in sizes])
        _pool_bytes += sum(sizes)


def regions(nbytes: int, array_bytes: int) -> list[int]:
    """The least sum of different powers of two, ascending, that holds `nbytes` in whole arrays of `array_bytes`.

    6 arrays of 3 bytes: 4 + 16, which hold 1 and 5 of them.
    """
    smallest = max(array_bytes, nbytes // 64)  # smaller regions would save next to nothing
    low, high = (smallest - 1).bit_length(), (nbytes + array_bytes).bit_length()
    arrays, chosen = -(-nbytes // array_bytes), []
    for power in range(high, low - 1, -1):
        if sum(2**lower // array_bytes for lower in range(low, power)) < arrays:
            chosen.insert(0, 2**power)
            arrays -= 2**power // array_bytes
    return chosen


def _meminfo(name: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
    except (OSError, StopIteration):  # not Linux: all physical memory, the only figure there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_memory_is_host_memory() -> bool:
    """True on a CPU, where both kinds are the same physical memory."""
    return jax.default_backend() == "cpu"


def free_device_bytes() -> int:
    """Bytes the device can still give to arrays."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return free_host_bytes()
    return stats["bytes_limit"] - stats["bytes_in_use"]


def device_bytes_in_use() -> int | None:
    """Bytes of device memory in use now, or None where the device does not say (a CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_in_use") if stats else None


def resident_bytes() -> tuple[int, int]:
    """Host memory of this process now: pinned, which Linux counts as shared, and all other; 0 without /proc."""
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.is_file() else {}
    pinned, whole = (int(lines.get(name, "0").split()[0]) * 1024 for name in ("RssShmem", "VmRSS"))
    return pinned, whole - pinned


def peak_device_bytes() -> int | None:
    """The most bytes of device memory in use at once so far, or None where the device does not say (a CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def peak_host_bytes() -> int:
    """The most host memory this process has had resident so far, pinned memory included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
