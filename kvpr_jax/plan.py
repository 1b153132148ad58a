"""What is asked of a plan, and the plan: how the cache is held and used, from the prompt to the last token."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args

from kvpr_jax.costs import Costs, Held
from kvpr_jax.engines import Engine
from kvpr_jax.models.attention import Recompute

OffloadMode = Literal["auto", "all", "none"]

TAIL_COMPILES = 3  # times what the profile's compilation took: the steps behind a flush have larger functions
MERGE = 4  # flushed segments of equal length that become one
MERGE_BYTES = 32 * 2**20  # but none this large, which crosses at the link's full rate


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asks of the plan; `auto` leaves it to the scheduler.

    Attributes:
        split: "auto", tokens ("96") or a share of the prompt ("75%") to hold as activations.
        recompute: how activations are used: "project", "absorb" or "auto".
        engine: "overlapped", or "sequential": copy, wait, compute, wait.
        offload: "all" of the cache on the host, "none", or "auto": what the device cannot hold.
        device_cache_gib: GiB of device memory for the cache; None: what is free.
        host_cache_gib: GiB of host memory for the cache, at most; None: what is free.
        tail_tokens: new tokens gathered on the device before they are flushed; None: by size, and by how long
            steps take to compile.
        prefill_tokens: bound on tokens of a chunk of sequences in prefill, and of the queries of one sequence.
    """

    split: str = "auto"
    recompute: Literal["auto", "project", "absorb"] = "auto"
    engine: Engine = "overlapped"
    offload: OffloadMode = "auto"
    device_cache_gib: float | None = None
    host_cache_gib: float | None = None
    tail_tokens: int | None = None
    prefill_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("recompute", ("auto", *get_args(Recompute))),
            ("engine", get_args(Engine)),
            ("offload", get_args(OffloadMode)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if self.split != "auto":
            self._parse_split()
            if self.offload == "none":
                raise ValueError(f"split {self.split} needs the cache on the host; offload none keeps it on the device")
        for name in ("tail_tokens", "prefill_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("device_cache_gib", "host_cache_gib"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1e9:
                raise ValueError(f"{name.replace('_', '-')} {value} must be 0 or more, and below 1e9")
        if self.device_cache_gib is not None and (self.offload != "auto" or self.split != "auto"):
            raise ValueError(
                f"device-cache-gib {self.device_cache_gib} goes with offload auto and split auto; "
                "the others say themselves what the device holds"
            )

    def _parse_split(self) -> tuple[float | int, bool]:
        """The number, and whether it is a percentage."""
        text, percent = self.split.strip().removesuffix("%"), self.split.strip().endswith("%")
        try:
            number = float(text) if percent else int(text)
        except ValueError:
            raise ValueError(f"split {self.split!r} must be auto, a number of tokens or a percentage") from None
        if percent and not 0 <= number <= 100:
            raise ValueError(f"split {self.split} must be from 0% to 100%")
        if number < 0:
            raise ValueError(f"split {self.split} must be 0 or more")
        return number, percent

    def split_tokens(self, prompt_tokens: int) -> int | None:
        """The forced l for a prompt of S tokens, or None for auto."""
        if self.split == "auto":
            return None
        number, percent = self._parse_split()
        split = round(prompt_tokens * number / 100) if percent else int(number)
        if split > prompt_tokens:
            raise ValueError(f"split {self.split} is more than the prompt's {prompt_tokens} tokens")
        return split


@dataclasses.dataclass(frozen=True)
class Workload:
    """The run that is planned: B sequences of S (padded) prompt tokens, and new tokens for each."""

    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def total_tokens(self) -> int:
        """Tokens a sequence has in the cache at the end: the last new token is never fed back."""
        return self.prompt_tokens + max(0, self.new_tokens - 1)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of the plans that one was chosen from, and what it is predicted to cost.

    Attributes:
        split, resident_tokens: see `Plan`.
        recompute: likewise; None where it never has activations.
        link_s, compute_s, dispatch_s: of all layers in the first decode step, and of what surrounds them; None where
            the host does not run ahead.
        step_s, last_step_s: the first decode step, and the last one.
        host_bytes, device_bytes: see `Plan`.
        fits: whether the memory holds it to the end of the run.
    """

    split: int
    recompute: Recompute | None
    resident_tokens: int
    link_s: float
    compute_s: float
    dispatch_s: float | None
    step_s: float
    last_step_s: float
    host_bytes: int
    device_bytes: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the runtime carries out.

    Attributes:
        batch: B.
        group: N, layers that are copied and computed together.
        split: l, tokens of the prompt held as activations on the host.
        cached_tokens: S.
        resident_tokens: the prompt's last tokens that stay on the device, as keys and values.
        resident_flushes: full tails that stay there too, before the first one that goes to the host.
        offloaded: whether any of the cache goes to the host; otherwise full tails stay on the device too.
        recompute, engine: see `Request`.
        activation_share: part of the prompt's tokens on the host that is held as activations.
        forced: whether the user chose that share, which new segments then keep.
        tail_tokens: T of the tail.
        flushes: full tails that become segments during the run.
        prefill_sequences, prefill_queries: sequences of a chunk, and tokens of one that pass a layer at a time.
        host_bytes: host memory of the cache at the end of the run.
        host_limit_bytes: what it may become, whatever is revised on the way.
        device_bytes: device memory beside the weights.
        host_bytes_per_step: bytes that cross the link in the first decode step.
        predicted_step_s, predicted_last_step_s: the first decode step, and the last one.
        reason: why this split, in a sentence.
        costs: the cost model that it was chosen by.
        candidates: what it was chosen from, by split: those that use activations as it does, and the best of those that
            do not. It alone where all of the cache stays on the device.
    """

    batch: int
    group: int
    split: int
    cached_tokens: int
    resident_tokens: int
    resident_flushes: int
    offloaded: bool
    recompute: Recompute
    engine: Engine
    activation_share: float
    forced: bool
    tail_tokens: int
    flushes: int
    prefill_sequences: int
    prefill_queries: int
    host_bytes: int
    host_limit_bytes: int
    device_bytes: int
    host_bytes_per_step: int
    predicted_step_s: float
    predicted_last_step_s: float
    reason: str
    costs: Costs = dataclasses.field(repr=False)
    candidates: tuple[Candidate, ...] = dataclasses.field(default=(), repr=False)

    def as_dict(self) -> dict[str, Any]:
        """What is to be done and why, for reports: all but the cost model and the other candidates."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.repr}

    def step_s(self, held: Held) -> float:
        """A decode step over these tokens, in seconds."""
        return self.costs.step_s(held, self.recompute, self.engine)

    def leaves(self, index: int) -> bool:
        """Whether the tail of this index goes to the host when it is full."""
        return self.offloaded and index >= self.resident_flushes

    def tail_is_activations(self, held: Held, index: int) -> bool:
        """The form of the tail of this index beside these tokens: that in which it will be on the host.

        Keys and values, which need no recompute, where it stays on the device, as the last one of the run does.
        """
        if not self.leaves(index) or index == self.flushes:
            return False
        return self.holds_activations_next(held, max(0, self.flushes - index - 1))

    def with_tail(self, held: Held, index: int) -> Held:
        """All tokens that a step reads beside these: the tail of this index, slots not written yet too."""
        smaller = self.tail_is_activations(held, index)
        return dataclasses.replace(held, tail=self.tail_tokens, tail_is_activations=smaller)

    @property
    def waits_s(self) -> float:
        """What the steps behind flushes wait for the compiler, at most."""
        filling_s = self.tail_tokens * self.predicted_step_s
        return self.flushes * max(0.0, TAIL_COMPILES * self.costs.profile.compile_s - filling_s)

    @property
    def step_shape(self) -> tuple[Any, ...]:
        """What the first step's compiled function depends on, for one model."""
        held = self.split, self.cached_tokens, self.resident_tokens, self.offloaded, self.tail_tokens
        return self.batch, self.group, *held, self.recompute, self.engine

    @property
    def largest_array_bytes(self) -> int:
        """Of the arrays that may go to the host."""
        of_prompt = self.split, self.cached_tokens - self.resident_tokens - self.split
        segments = [of_prompt, *longest_flushed(self.costs, self.tail_tokens, self.flushes)]
        return max(nbytes for tokens in segments for nbytes in self.costs.arrays_bytes(Held(*tokens)))

    def slowed(self, held: Held, step_s: float) -> tuple["Plan", str]:
        """The plan with costs by which a step over these tokens takes `step_s`, and what they blame."""
        costs, blamed = self.costs.slowed(held, self.recompute, self.engine, step_s)
        return dataclasses.replace(self, costs=costs), blamed

    def holds_activations_next(self, held: Held, left: int) -> bool:
        """Whether a new tail is to be held as activations, once it is on the host beside these tokens.

        A forced share is kept. Otherwise the form with which a step takes less time, as far as host memory allows:
        keys and values only if all the tails behind it still fit as activations. The segments that the tokens are in
        make no difference: `at_the_end`, which host memory is planned by, does not know them.

        Args:
            left: tails that will go to the host behind this one.
        """
        activations, keys_values, tail = held.activations, held.keys_values, self.tail_tokens
        if self.forced or not self.costs.config.activations_are_smaller:
            return self.activation_share * (activations + keys_values + tail) - activations >= tail / 2
        if self.costs.cache_bytes(activations + left * tail, keys_values + tail) > self.host_limit_bytes:
            return True
        held = dataclasses.replace(held, segments=Held.segments)
        smaller = dataclasses.replace(held, activations=activations + tail)
        larger = dataclasses.replace(held, keys_values=keys_values + tail)
        return self.step_s(smaller) <= self.step_s(larger)

    def at_first(self) -> Held:
        """Tokens of a layer behind prefill."""
        leaving = self.cached_tokens - self.resident_tokens
        return Held(self.split, leaving - self.split, self.resident_tokens)

    def at_the_end(self) -> Held:
        """Tokens of a layer when all tails are flushed."""
        held = self.at_first()
        held = dataclasses.replace(held, resident=held.resident + self.resident_flushes * self.tail_tokens)
        for index in range(self.resident_flushes, self.flushes):
            form = "activations" if self.tail_is_activations(held, index) else "keys_values"
            held = dataclasses.replace(held, **{form: getattr(held, form) + self.tail_tokens})
        return held


def merged_tokens(tokens: int, nbytes: int) -> Iterator[int]:
    """Lengths of which `MERGE` segments become one, from those of a tail on, which has so many tokens and bytes."""
    while nbytes < MERGE_BYTES:
        yield tokens
        tokens, nbytes = MERGE * tokens, MERGE * nbytes


def longest_flushed(costs: Costs, tail_tokens: int, flushes: int) -> list[tuple[int, int]]:
    """(activations, keys and values): tokens of the longest segment that so many full tails may make in each form."""

    def longest(token_bytes: int) -> int:
        lengths = (MERGE * tokens for tokens in merged_tokens(tail_tokens, tail_tokens * token_bytes))
        return max((tokens for tokens in lengths if tokens <= flushes * tail_tokens), default=tail_tokens)

    return [(longest(costs.group_bytes(1, 0)), 0), (0, longest(costs.group_bytes(0, 1)))]
