"""Where arrays live, and how much room there is. The only file that names a memory kind."""

import dataclasses
import functools
import os
import resource
import sys
from pathlib import Path
from typing import TypeVar

import jax
from jax.sharding import SingleDeviceSharding

from kvpr_jax.segments import Segment

HOST, DEVICE = "pinned_host", "device"
HOST_POOL_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
GIB = 2**30

Tree = TypeVar("Tree")

_pinned_most = 0  # the most pinned bytes seen live: XLA's pool is at least this large


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


def fetched(segment: Segment) -> Segment:
    """The segment on the device: an asynchronous copy, or the segment itself if it is there."""
    return _moved(segment, DEVICE) if on_host(segment) else segment


def to_host(segment: Segment) -> Segment:
    """A copy of the segment in pinned host memory, asynchronous; its few `slots` stay on the device."""
    return _moved(segment, HOST)


def _moved(segment: Segment, kind: str) -> Segment:
    arrays = {f.name: getattr(segment, f.name) for f in dataclasses.fields(segment) if f.name != "slots"}
    return dataclasses.replace(segment, **jax.device_put(arrays, _sharding(kind)))


def on_host(segment: Segment) -> bool:
    return jax.tree.leaves(segment)[0].sharding.memory_kind == HOST


def free_host_bytes() -> int:
    """Bytes of host memory that can still be taken: what the system has, or the control group's limit if lower."""
    free = [_meminfo("MemAvailable")]
    cgroup = Path("/sys/fs/cgroup")
    for group, limit, used in (
        (cgroup, "memory.max", "memory.current"),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            taken = int((group / used).read_text()) - _given_back(group / "memory.stat")
            free.append(int((group / limit).read_text()) - taken)
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return max(0, min(free))


def _given_back(statistics: Path) -> int:
    """Bytes of a control group's usage that the kernel frees when they are needed: pages of files read long ago."""
    lines = statistics.read_text().splitlines() if statistics.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def free_pinned_bytes() -> int:
    """Bytes of pinned host memory that arrays can still take: free host memory, within XLA's limit for its pool.

    XLA keeps what it has pinned, so memory of arrays that are gone counts as free to new ones.
    """
    global _pinned_most
    if device_memory_is_host_memory():
        return free_host_bytes()
    live = sum(array.nbytes for array in jax.live_arrays() if array.sharding.memory_kind == HOST)
    _pinned_most = max(_pinned_most, live)
    limit = int(os.environ.get(HOST_POOL_LIMIT, "64")) * GIB
    return min(free_host_bytes() + _pinned_most - live, limit - live)


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


def peak_device_bytes() -> int | None:
    """The most bytes of device memory in use at once so far, or None where the device does not say (a CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def peak_host_bytes() -> int:
    """The most host memory this process has had resident so far, pinned memory included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
