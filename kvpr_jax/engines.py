"""The ways to run a decode step over a cache on the host. Both do the same arithmetic.

An engine belongs to one cache. Its `step` runs the groups of layers in order, over a `source` of segments and with a
function `compute(group, h, segments)` that gives the hidden states after a group. `more` says that the next step will
read the same segments, so that its first copies may be issued early.
"""

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import jax
from jaxtyping import Array

from kvpr_jax import memory, steps
from kvpr_jax.segments import Held, Segment

Engine = Literal["overlapped", "sequential"]
Compute = Callable[[int, Array, tuple[Segment, ...]], Array]

WINDOW, WINDOW_MOST = 3, 8  # groups whose host segments may be on the device at once: in use, arriving, and issued
WINDOW_BYTES = 384 * 2**20  # more than three of small ones, so many bytes at most


@runtime_checkable
class Source(Protocol):
    """The segments of every group of layers."""

    def fetch(self, group: int) -> tuple[Segment, ...]:
        """Those of one group, all on the device; those on the host are copied, asynchronously."""
        ...


class Sequential:
    """Copy, wait, compute, wait: one group after the other. The plain form that the other must equal."""

    def step(self, groups: int, source: Source, compute: Compute, h: Array, more: bool) -> Array:
        del more
        for group in range(groups):
            segments = jax.block_until_ready(source.fetch(group))
            h = jax.block_until_ready(compute(group, h, segments))
        return h

    def first_to_arrive(self, segments: tuple[Segment, ...]) -> tuple[Held, ...]:
        """None: no copies are behind those of a group."""
        del segments
        return ()


class Overlapped:
    """Keep the copies of the next groups under way while others are computed: XLA runs them side by side.

    A window bounds what is issued, over the ends of steps too. With a window of three, group i-1 must be done before
    group i+2 is fetched, so that the device holds three groups at most: i (being computed), i+1 and i+2 (arriving, one
    after the other). A larger window is shared: half of it for groups that arrive, half for those whose compute is
    issued, which the device goes on with where the host is late. Behind the last group come the first ones of the next
    step: they cross while the next token is chosen.

    Copies that are issued may cross in any order. Were those of group i+2 before the last one of group i+1, that group
    would be computed late, and the link would have nothing to do meanwhile. So in a window of less than six, where no
    third group arrives, group i+2's may begin only when all arrays of group i+1 that cross but the largest are there:
    that one is then on its way, or there too.

    Args:
        window: groups.
        crossing: of the segments of every group, those that cross the link.
    """

    def __init__(self, window: int, crossing: Sequence[bool]) -> None:
        self.window, self.arriving, self.crossing = window, max(2, window // 2), crossing
        self.ahead: collections.deque[tuple[Segment, ...]] = collections.deque()
        self.running: collections.deque[tuple[tuple[Segment, ...], Array]] = collections.deque()

    def step(self, groups: int, source: Source, compute: Compute, h: Array, more: bool) -> Array:
        arriving = min(self.arriving, groups)
        for group in range(len(self.ahead), arriving):
            self._issue(source, group)
        for group in range(groups):
            segments = self.ahead.popleft()
            h = compute(group, h, segments)
            self.running.append((segments, h))
            if more or group + arriving < groups:
                self._issue(source, (group + arriving) % groups)
        return h

    def _issue(self, source: Source, group: int) -> None:
        while len(self.running) + len(self.ahead) >= self.window:
            self.running.popleft()[1].block_until_ready()
        if self.ahead and (first := self.first_to_arrive(self.ahead[0])):
            steps.wait_for(first)
        self.ahead.append(source.fetch(group))

    def first_to_arrive(self, segments: tuple[Segment, ...]) -> tuple[Held, ...]:
        """The arrays of a group that is on its way for which the copies behind it wait."""
        if self.arriving > 2:
            return ()
        crossing = itertools.compress(segments, self.crossing)
        arrays = [array for segment in crossing for array in segment.arrays.values()]
        return tuple(sorted(arrays, key=lambda array: array.size)[:-1])


def engine_for(engine: Engine, segments: tuple[Segment, ...]) -> Sequential | Overlapped:
    """A new engine for a cache whose groups have such segments, in such places: arrays, or what describes them."""
    if engine == "sequential":
        return Sequential()
    return Overlapped(window(memory.host_bytes(segments)), [memory.on_host(segment) for segment in segments])


def window(group_bytes: int) -> int:
    """Groups that an engine keeps on the device of those on the host, at most: the more, the smaller they are.

    While the window's copies cross, the host chooses the next token and issues the first groups of the next step.
    """
    return max(WINDOW, min(WINDOW_MOST, WINDOW_BYTES // max(1, group_bytes)))


def window_bytes(group_bytes: int) -> int:
    """The most that a window over groups of up to so many bytes takes on the device."""
    return max(WINDOW * group_bytes, min(WINDOW_BYTES, WINDOW_MOST * group_bytes))
