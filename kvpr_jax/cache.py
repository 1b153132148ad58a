"""The KV cache of a batch: for each group of layers, segments in pinned host memory, and a small tail on the device.

    slots      0 ........ l ........ S-r ....... S ........ S+T ....... n
    segments   activations | keys, values | resident | flushed | … | tail (on the device, filling)
               \\______ on the host ______/            \\ on the host /

Every token is held in one form only. New tokens go into the tail, in the form they will be flushed in; a full tail
becomes the next segment: on the device as long as the plan has room for it there, then on the host. Small flushed
segments of equal length in one place become one with the next tail: fewer and larger copies are faster.
"""

import collections
import dataclasses
import time
import warnings
from collections.abc import Callable
from concurrent import futures

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvpr_jax import memory, steps
from kvpr_jax.config import ModelConfig
from kvpr_jax.costs import Held
from kvpr_jax.engines import Overlapped, Sequential, engine_for
from kvpr_jax.pace import Pace
from kvpr_jax.plan import MERGE, Plan, merged_tokens
from kvpr_jax.segments import TOKENS, Activations, KeysValues, Place, Segment

Join = Callable[[tuple[Segment, ...]], Segment]

AHEAD_S = 0.05  # of a step, at most: nobody sees that tokens come so much later than they are known


@dataclasses.dataclass
class Cache:
    """What a batch has said so far.

    Attributes:
        config, dtype: of the model.
        plan: what is held where, and how it is used.
        groups: for each group of layers, its segments before the tail.
        length: slots filled, the same for every sequence; the next token stands at this slot.
        start: (B,) first slot of each sequence that is not padding, or None.
        place: where the next token stands, on the device: slot `length`, and `start`.
        tails: for each group, its tail of `plan.tail_tokens` slots.
        functions: by which each group is decoded until the next flush; empty until they are chosen.
        engine: carries out its decode steps; chosen by what they move.
        bytes_per_step: bytes that cross the link in a step: all segments on the host.
        predicted_step_s: how long a step should take until the next flush.
        flushes: full tails so far.
        preparing: the compilation of what the next flush will make necessary, if it has begun.
        longest_wait_s: the longest time that a flush has waited for it.
        recompiled: functions that steps behind the first one compiled themselves.
        miss: what was said of steps that took longer than predicted for long; None if they did not.
    """

    config: ModelConfig
    dtype: jnp.dtype
    plan: Plan
    groups: list[tuple[Segment, ...]]
    length: int
    start: dataclasses.InitVar[Int[Array, " B"] | None]
    place: Place = dataclasses.field(init=False)
    tails: list[Segment] = dataclasses.field(init=False)
    functions: list[steps.DecodeLayers] = dataclasses.field(init=False)
    engine: Sequential | Overlapped = dataclasses.field(init=False)
    bytes_per_step: int = dataclasses.field(init=False)
    predicted_step_s: float = dataclasses.field(init=False)
    flushes: int = 0
    preparing: futures.Future[None] | None = None
    longest_wait_s: float = 0.0
    recompiled: int = 0
    miss: str | None = None
    _pace: Pace = dataclasses.field(default_factory=Pace)
    _slowed: Plan | None = None  # takes the plan's place once the next tail, whose form may be compiled for, is begun

    def __post_init__(self, start: Int[Array, " B"] | None) -> None:
        self.place = memory.placed(Place(jnp.array([self.length], jnp.int32), start))
        self._new_tails()

    @property
    def may_issue_ahead(self) -> bool:
        """Whether the next step may be issued before the tokens of this one are read.

        A long step would hold them back for as long as it takes, and gains next to nothing.
        """
        return isinstance(self.engine, Overlapped) and not self.full and self.predicted_step_s < AHEAD_S

    @property
    def full(self) -> bool:
        """Whether the tail must be flushed before the next token."""
        return self.length == self._tail_start + self.plan.tail_tokens

    def fetch(self, group: int) -> tuple[Segment, ...]:
        """The segments of one group, all on the device; those on the host are copied, asynchronously."""
        return memory.fetched(self.groups[group])

    def flush(self) -> None:
        """Make every group's full tail its next segment, on the device or on the host, and begin anew."""
        if self.preparing is not None:
            begin = time.perf_counter()
            if failed := self.preparing.exception():
                warnings.warn(f"what comes behind a flush could not be compiled ahead: {failed!r}", stacklevel=2)
            self.longest_wait_s = max(self.longest_wait_s, time.perf_counter() - begin)
        jax.block_until_ready(self.tails)  # no group is being computed whose segments a new engine would not know of
        del self.engine  # and with it what its window holds on the device
        with jax.profiler.TraceAnnotation("flush"):
            to_host = self.plan.leaves(self.flushes)
            for group, tail in enumerate(self.tails):
                self.groups[group], self.tails[group] = _joined(self.groups[group], tail, to_host, _join)
            # Only now: what one group's segments leave free in XLA's pool is scattered, what all leave is not.
            merged, full = self.tails[0].tokens > self.plan.tail_tokens, self.tails
            moved = [memory.to_host(tail) if to_host else tail for tail in full]
            self.groups = [(*segments, segment) for segments, segment in zip(self.groups, moved, strict=True)]
            if merged:  # it is gone from the device before what comes needs room
                jax.block_until_ready(moved)
            full.clear()
            self.flushes, self.preparing = self.flushes + 1, None
            self._new_tails()
        if self._slowed is not None:
            self.plan, self._slowed = self._slowed, None
            self.predicted_step_s = self.plan.step_s(self._read())

    def observe(self, step_s: float) -> None:
        """Take note of how long the last step took. Where steps miss the prediction for long, it is said, and later
        tails are planned by what was measured, if their form is free."""
        predicted_s = self.predicted_step_s
        times = self._pace.lasting_miss(step_s, predicted_s)
        if times is None:
            return
        self.predicted_step_s = times * predicted_s
        slowed, blamed = self.plan.slowed(self._read(), self.predicted_step_s)
        free = self.plan.offloaded and not self.plan.forced and self.config.activations_are_smaller
        if free:
            self._slowed = slowed
        if self.miss is None:
            self.miss = (
                f"decode steps take {self.predicted_step_s * 1e3:.2f} ms, {predicted_s * 1e3:.2f} ms were predicted; "
                f"slower than profiled: {blamed}" + ("; later tokens are held accordingly" if free else "")
            )

    @property
    def written(self) -> int:
        """Tokens in the tail."""
        return self.length - self._tail_start

    def after_flush(self, join: Join) -> tuple[tuple[Segment, ...], Segment]:
        """Shapes and places of what a group will have after the next flush: its segments, and its tail.

        Args:
            join: gives the shapes of segments that become one.
        """
        to_host = self.plan.leaves(self.flushes)
        staying, full = _joined(memory.described(self.groups[0]), memory.described(self.tails[0]), to_host, join)
        segments = (*staying, memory.described(full, host=to_host))
        empty = self._tail_form(segments, self.flushes + 1)
        return segments, memory.described(empty(self))  # made, so that what makes it is compiled as well

    def tokens(self) -> dict[str, int]:
        """Tokens of one layer by where and how they are held: activations, keys_values, resident, tail."""
        held = _held(self.groups[0])
        on_host = {"activations": held.activations, "keys_values": held.keys_values}
        return on_host | {"resident": held.resident, "tail": self.written}

    def _new_tails(self) -> None:
        """Empty tails from slot `length` on, in the form that they are to be held in."""
        self._tail_start, self.functions = self.length, []
        self.bytes_per_step = memory.host_bytes(self.groups[0]) * len(self.groups)
        self.engine = engine_for(self.plan.engine, self.groups[0])
        empty = self._tail_form(self.groups[0], self.flushes)
        self.tails = [memory.placed(empty(self)) for _ in self.groups]
        self.predicted_step_s = self.plan.step_s(self._read())

    def _read(self) -> Held:
        """Tokens that a step reads: the tail whole, slots that are not written yet too."""
        tail = self.tails[0]
        smaller = isinstance(tail, Activations)
        return dataclasses.replace(_held(self.groups[0]), tail=tail.tokens, tail_is_activations=smaller)

    def _tail_form(self, segments: tuple[Segment, ...], index: int) -> Callable[["Cache"], Segment]:
        """What makes the tail of this index beside these segments of a group."""
        smaller = self.plan.tail_is_activations(_held(segments), index)
        return _empty_activations if smaller else _empty_keys_values


def _held(segments: tuple[Segment, ...]) -> Held:
    """Tokens of a group's segments by place and form; on the device all are keys and values."""
    tokens, counts = collections.Counter[tuple[bool, bool]](), collections.Counter[tuple[bool, bool]]()
    for segment in segments:
        kind = memory.on_host(segment), isinstance(segment, Activations)
        tokens[kind] += segment.tokens
        counts[kind] += 1
    activations, keys_values, resident = (True, True), (True, False), (False, False)
    return Held(
        tokens[activations], tokens[keys_values], tokens[resident],
        segments=(counts[activations], counts[keys_values], counts[resident]),
    )  # fmt: skip


def _tail_slots(cache: Cache) -> Int[Array, " T"]:
    first = cache.length  # read once: another thread may be a step ahead
    return jnp.arange(first, first + cache.plan.tail_tokens, dtype=jnp.int32)


def _empty_activations(cache: Cache) -> Activations:
    shape = (cache.plan.group, cache.plan.batch, cache.plan.tail_tokens, cache.config.hidden_size)
    return Activations(jnp.zeros(shape, cache.dtype), _tail_slots(cache))


def _empty_keys_values(cache: Cache) -> KeysValues:
    heads = cache.config.num_kv_heads, cache.config.head_dim
    shape = (cache.plan.group, cache.plan.batch, cache.plan.tail_tokens, *heads)
    return KeysValues(jnp.zeros(shape, cache.dtype), jnp.zeros(shape, cache.dtype), _tail_slots(cache))


def _join(segments: tuple[Segment, ...]) -> Segment:
    """Segments as one, on the device."""
    return jax.block_until_ready(steps.concatenate(memory.fetched(segments), axis=TOKENS))


def _joined(
    segments: tuple[Segment, ...], full: Segment, to_host: bool, join: Join
) -> tuple[tuple[Segment, ...], Segment]:
    """One group's segments that stay as they are beside a full tail, and that with those that become one with it:
    `MERGE` - 1 others of its form and length in the place where it goes, while they are small.

    With MERGE 4 and tails of 64 tokens, the 4th flush leaves one segment of 256, the 16th one of 1024, unless those of
    256 have `MERGE_BYTES`.
    """
    alike: list[Segment] = []
    for tokens in merged_tokens(full.tokens, full.nbytes):
        kind = type(full), tokens, to_host
        smaller = [s for s in segments if (type(s), s.tokens, memory.on_host(s)) == kind]
        if len(smaller) < MERGE - 1:
            break
        alike += smaller
    staying = tuple(segment for segment in segments if not any(segment is other for other in alike))
    return staying, join((*alike, full)) if alike else full
