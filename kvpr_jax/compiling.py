"""Compilation beside decoding: in a thread of its own before a step needs it, and counted where a step did not wait;
and one function compiled for several callers.
"""

import collections
import sys
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.stages import Compiled, Lowered

GIVE_WAY_S = 2e-4  # after which tracing hands Python to a decode step; by default 5 ms, many times a step

_background = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")

_compiled: collections.Counter[int] = collections.Counter()  # functions by thread
_seconds: collections.defaultdict[int, float] = collections.defaultdict(float)  # the time they took


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":  # also where the function comes from a cache on disk
        _compiled[threading.get_ident()] += 1
        _seconds[threading.get_ident()] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiled_here() -> int:
    """Functions that this thread has compiled, or read from JAX's cache on disk, so far."""
    return _compiled[threading.get_ident()]


def compile_s() -> float:
    """Seconds that XLA has compiled, or read from JAX's cache on disk, in all threads so far."""
    return sum(list(_seconds.values()))


def ahead(function: Callable[..., None], *arguments: Any) -> futures.Future[None]:
    """Have a function that compiles called in the thread for that, which gives way to steps while it traces."""
    return _background.submit(_giving_way, function, *arguments)


def _giving_way(function: Callable[..., None], *arguments: Any) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, GIVE_WAY_S))
    try:
        function(*arguments)
    finally:
        sys.setswitchinterval(before)


def uses_graphs() -> bool:
    """Whether XLA runs the kernels of a compiled function as one graph, as it does on a GPU."""
    return jax.default_backend() == "gpu"


def one_each(lower: Callable[[int], Lowered], count: int) -> list[Compiled]:
    """The same function compiled for each of so many callers, who have a graph each.

    A graph is updated where its function is called with other arrays than before, for which the host needs about as
    long as for all else. A function that is always called with the same weights needs less of it.

    Only the first one is compiled. The others are read from JAX's cache on disk, or loaded from the first one's bytes
    where there is none: what came from disk cannot be stored again.

    Args:
        lower: lowers the function for one of the callers, so that JAX takes it for another one.
    """
    first, others = lower(0).compile(), range(1, count)
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return [first, *(lower(caller).compile() for caller in others)]
    if count == 1:
        return [first]
    stored, devices = serialize_executable.serialize(first), jax.local_devices()[:1]
    load = serialize_executable.deserialize_and_load
    return [first, *(load(*stored, execution_devices=devices) for _ in others)]
