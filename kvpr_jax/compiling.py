"""Compilation beside decoding: in a thread of its own before a step needs it, and counted where a step did not wait."""

import collections
import threading
from concurrent import futures
from typing import Any

import jax

BACKGROUND = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")

_compiled: collections.Counter[int] = collections.Counter()  # by thread


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    del duration_secs
    if event == "/jax/core/compile/backend_compile_duration":  # also where the function comes from a cache on disk
        _compiled[threading.get_ident()] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiled_here() -> int:
    """Functions that this thread has compiled, or read from JAX's cache on disk, so far."""
    return _compiled[threading.get_ident()]
