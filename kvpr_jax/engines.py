"""The ways to run a decode step over a cache on the host. All do the same arithmetic.

An engine belongs to one cache. Its `step` runs the layers in order, over a `source` of segments and with a function
`compute(layers, h, segments, ahead)` that gives the hidden states after these layers, and the segments `ahead`, which
are on the host, on the device. `more` says that the next step will read the same segments, so that its first copies
may be issued early.

`engine_for` picks by what crosses the link: nothing, a little a layer, or much.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import jax
from jaxtyping import Array

from kvpr_jax.segments import Segment

Engine = Literal["overlapped", "sequential"]
Compute = Callable[
    [Sequence[int], Array, Sequence[tuple[Segment, ...]], tuple[Segment, ...]], tuple[Array, tuple[Segment, ...]]
]

WINDOW = 3  # layers whose host segments may be on the device at once: in use, arriving, and issued
WINDOW_BYTES, WINDOW_MOST = 256 * 2**20, 32  # more of small layers, so many bytes and layers at most
SMALL_BYTES = 16 * 2**20  # of a layer: fewer cross in less time than it takes to issue their copies
GROUP = 8  # layers in one call, at most, where nothing crosses


@runtime_checkable
class Source(Protocol):
    """The segments of every layer."""

    def fetch(self, layer: int) -> tuple[Segment, ...]:
        """All on the device; those on the host are copied, asynchronously."""
        ...

    def on_host(self, layer: int) -> tuple[Segment, ...]:
        """Those on the host, as they lie there."""
        ...

    def on_device(self, layer: int) -> tuple[Segment, ...]:
        """Those that stay on the device."""
        ...


class Sequential:
    """Copy, wait, compute, wait: one layer after the other. The plain form that the others must equal."""

    def step(self, layers: int, source: Source, compute: Compute, h: Array, more: bool) -> Array:
        del more
        for layer in range(layers):
            segments = jax.block_until_ready(source.fetch(layer))
            h = jax.block_until_ready(compute((layer,), h, (segments,), ())[0])
        return h


class Overlapped:
    """Keep the copies of the next layers under way while one is computed: XLA runs them side by side.

    A window bounds what is issued, over the ends of steps too. With a window of three, layer i-1 must be done before
    layer i+2 is fetched, so that the device holds three layers at most: i (being computed), i+1 and i+2 (arriving, one
    after the other). Behind the last layer come the first ones of the next step: they cross while the next token is
    chosen.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self.window = window
        self.ahead: collections.deque[tuple[Segment, ...]] = collections.deque()
        self.running: collections.deque[tuple[tuple[Segment, ...], Array]] = collections.deque()

    def step(self, layers: int, source: Source, compute: Compute, h: Array, more: bool) -> Array:
        depth = min(self.window - 1, layers)
        for layer in range(len(self.ahead), depth):
            self._issue(source, layer)
        for layer in range(layers):
            segments = self.ahead.popleft()
            h, _ = compute((layer,), h, (segments,), ())
            self.running.append((segments, h))
            following = layer + depth
            if more or following < layers:
                self._issue(source, following % layers)
        return h

    def _issue(self, source: Source, layer: int) -> None:
        while len(self.running) + len(self.ahead) >= self.window:
            self.running.popleft()[1].block_until_ready()
        self.ahead.append(source.fetch(layer))


class InStep:
    """For small layers: the copies of layer i+1 are part of the compiled step of layer i, one call in place of several.

    The window bounds what is issued here too: of three, before layer i is issued, layer i-2 must be done. It is wider
    for small layers, since a host that often waits for layers that are soon done wakes up too late to issue the next.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self.window = window
        self.ahead: tuple[Segment, ...] = ()  # the first layer's, brought by the last layer of the step before
        self.running: collections.deque[Array] = collections.deque()

    def step(self, layers: int, source: Source, compute: Compute, h: Array, more: bool) -> Array:
        if not self.ahead:
            self.ahead = source.fetch(0)
        for layer in range(layers):
            while len(self.running) >= self.window - 1:
                self.running.popleft().block_until_ready()
            segments, following = self.ahead, (layer + 1) % layers
            h, fetched = compute((layer,), h, (segments,), source.on_host(following))
            self.running.append(h)
            self.ahead = (*fetched, *source.on_device(following))
        if not more:  # brought in vain: a step without copies would have to be compiled for this
            self.ahead = ()
        return h


class Resident:
    """Nothing crosses the link: several layers a call, so that the device does not wait for calls to be issued."""

    def step(self, layers: int, source: Source, compute: Compute, h: Array, more: bool) -> Array:
        del more
        size = group(layers)
        for first in range(0, layers, size):
            together = range(first, first + size)
            h, _ = compute(together, h, [source.on_device(layer) for layer in together], ())
        return h


def group(layers: int) -> int:
    """Layers of one call where nothing crosses: all calls have as many, so that one function is compiled."""
    return max(size for size in range(1, GROUP + 1) if layers % size == 0)


def engine_for(engine: Engine, layer_bytes: int) -> Sequential | Overlapped | InStep | Resident:
    """A new engine for a cache of which so many bytes a layer cross the link in each step."""
    if engine == "sequential":
        return Sequential()
    if not layer_bytes:
        return Resident()
    return (InStep if layer_bytes < SMALL_BYTES else Overlapped)(window(layer_bytes))


def window(layer_bytes: int) -> int:
    """Layers that an engine keeps on the device of those on the host, at most: the wider, the smaller they are.

    While the window's copies cross, the host chooses the next token and issues the first layers of the next step.
    """
    return max(WINDOW, min(WINDOW_MOST, WINDOW_BYTES // max(1, layer_bytes)))


def window_bytes(layer_bytes: int) -> int:
    """The most that a window of layers of up to so many bytes takes on the device."""
    return max(WINDOW * layer_bytes, min(WINDOW_BYTES, WINDOW_MOST * layer_bytes))
