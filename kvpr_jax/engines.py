"""The ways to run a decode step over a cache on the host. Both do the same arithmetic.

An engine belongs to one cache. Its `step` runs the layers in order, over a `source` of segments and with a function
`compute(layers, h, segments)` that gives the hidden states after consecutive layers, one compiled call for all of them.
`more` says that the next step will read the same segments, so that its first copies may be issued early.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import jax
from jaxtyping import Array

from kvpr_jax.segments import Segment

Engine = Literal["overlapped", "sequential"]
Compute = Callable[[Sequence[int], Array, Sequence[tuple[Segment, ...]]], Array]

WINDOW, WINDOW_MOST = 3, 8  # groups whose host segments may be on the device at once: in use, arriving, and issued
WINDOW_BYTES = 384 * 2**20  # more than three of small ones, so many bytes at most
GROUP = 8  # layers at most
GROUP_BYTES = WINDOW_BYTES // WINDOW  # of their host segments, if there is more than one


@runtime_checkable
class Source(Protocol):
    """The segments of every layer."""

    def fetch(self, layers: Sequence[int]) -> list[tuple[Segment, ...]]:
        """Those of each of these layers, all on the device; those on the host are copied, asynchronously."""
        ...


class Sequential:
    """Copy, wait, compute, wait: one layer after the other. The plain form that the other must equal."""

    group = 1

    def step(self, layers: int, source: Source, compute: Compute, h: Array, more: bool) -> Array:
        del more
        for layer in range(layers):
            segments = jax.block_until_ready(source.fetch((layer,)))
            h = jax.block_until_ready(compute((layer,), h, segments))
        return h


class Overlapped:
    """Keep the copies of the next layers under way while others are computed: XLA runs them side by side.

    Layers go in groups, a copy of many arrays and a call for each: a group is one large layer, or several small ones,
    which are copied and computed in less time than the host needs to issue them one by one.

    A window bounds what is issued, over the ends of steps too. With a window of three, group i-1 must be done before
    group i+2 is fetched, so that the device holds three groups at most: i (being computed), i+1 and i+2 (arriving, one
    after the other). Behind the last group come the first ones of the next step: they cross while the next token is
    chosen.
    """

    def __init__(self, group: int = 1, window: int = WINDOW) -> None:
        self.group, self.window = group, window
        self.ahead: collections.deque[list[tuple[Segment, ...]]] = collections.deque()
        self.running: collections.deque[tuple[list[tuple[Segment, ...]], Array]] = collections.deque()

    def step(self, layers: int, source: Source, compute: Compute, h: Array, more: bool) -> Array:
        groups = [range(first, first + self.group) for first in range(0, layers, self.group)]
        depth = min(self.window - 1, len(groups))
        for group in groups[len(self.ahead) : depth]:
            self._issue(source, group)
        for following, group in enumerate(groups, start=depth):
            segments = self.ahead.popleft()
            h = compute(group, h, segments)
            self.running.append((segments, h))
            if more or following < len(groups):
                self._issue(source, groups[following % len(groups)])
        return h

    def _issue(self, source: Source, group: Sequence[int]) -> None:
        while len(self.running) + len(self.ahead) >= self.window:
            self.running.popleft()[1].block_until_ready()
        self.ahead.append(source.fetch(group))


def engine_for(engine: Engine, layers: int, layer_bytes: int) -> Sequential | Overlapped:
    """A new engine for a cache of which so many bytes a layer cross the link in each step."""
    if engine == "sequential":
        return Sequential()
    return Overlapped(group(layers, layer_bytes), window(layers, layer_bytes))


def group(layers: int, layer_bytes: int) -> int:
    """Layers of one call: all calls have as many, so that one function is compiled."""
    most = max(1, min(GROUP, GROUP_BYTES // max(1, layer_bytes)))
    return max(size for size in range(1, most + 1) if layers % size == 0)


def window(layers: int, layer_bytes: int) -> int:
    """Groups that an engine keeps on the device of those on the host, at most: the more, the smaller they are.

    While the window's copies cross, the host chooses the next token and issues the first groups of the next step.
    """
    return max(WINDOW, min(WINDOW_MOST, WINDOW_BYTES // max(1, group(layers, layer_bytes) * layer_bytes)))


def window_bytes(layer_bytes: int) -> int:
    """The most that a window over layers of up to so many bytes takes on the device, however many there are."""
    return max(WINDOW * layer_bytes, min(WINDOW_BYTES, WINDOW_MOST * GROUP * layer_bytes))
