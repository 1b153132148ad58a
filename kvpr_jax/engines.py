"""The two ways to run a decode step over a cache on the host. Both do the same arithmetic.

An engine belongs to one cache. Its `step` runs the layers in order: `compute(layer, h, segments)` gives the hidden
states after a layer, `fetch(layer)` the layer's segments on the device. `more` says that the next step will read the
same segments, so that its first copies may be issued early.
"""

import collections
from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array

from kvpr_jax.segments import Segment

Engine = Literal["overlapped", "sequential"]
Fetch = Callable[[int], tuple[Segment, ...]]
Compute = Callable[[int, Array, tuple[Segment, ...]], Array]

WINDOW = 3  # layers whose host segments may be on the device at once: in use, arriving, and issued


class Sequential:
    """Copy, wait, compute, wait: one layer after the other. The plain form that `Overlapped` must equal."""

    def step(self, layers: int, fetch: Fetch, compute: Compute, h: Array, more: bool) -> Array:
        del more
        for layer in range(layers):
            segments = jax.block_until_ready(fetch(layer))
            h = jax.block_until_ready(compute(layer, h, segments))
        return h


class Overlapped:
    """Issue the copies of layer i+1, then compute layer i: XLA runs them side by side, on streams of their own.

    A window bounds what is issued, over the ends of steps too. Before layer i+1 is fetched, layer i-2 must be done, so
    the device holds the segments of three layers at most: i-1 (being computed), i (arriving) and i+1 (issued). Behind
    the last layer comes the first one of the next step, whose copies cross while the next token is chosen.
    """

    def __init__(self) -> None:
        self.ahead: collections.deque[tuple[Segment, ...]] = collections.deque()
        self.running: collections.deque[tuple[tuple[Segment, ...], Array]] = collections.deque()

    def step(self, layers: int, fetch: Fetch, compute: Compute, h: Array, more: bool) -> Array:
        if not self.ahead:
            self._issue(fetch, 0)
        for layer in range(layers):
            segments = self.ahead.popleft()
            if more or layer + 1 < layers:
                self._issue(fetch, (layer + 1) % layers)
            h = compute(layer, h, segments)
            self.running.append((segments, h))
        return h

    def _issue(self, fetch: Fetch, layer: int) -> None:
        while len(self.running) >= WINDOW - 1:
            self.running.popleft()[1].block_until_ready()
        self.ahead.append(fetch(layer))


ENGINES: dict[str, type[Sequential] | type[Overlapped]] = {"overlapped": Overlapped, "sequential": Sequential}
