"""The plan of a run: how much of the cache is held as activations, how they are used, what stays on the device.

The cost of one decode step, layer i+1's copies running beside layer i's compute (seconds):

    link_s(l)    = (activations + keys and values held on the host) / bandwidth + copies · cost_per_copy
    compute_s(l) = layer + tokens in each form · time a token costs in that form
    step_s(l)    = L · max(link_s, compute_s) + first copy + head

`choose_split` takes the bucketed l of least remaining time, compilation included. `two_phase_step_s` is the cost model
of the paper (arXiv 2411.17089, equations 8 to 11), kept for comparison.
"""

import dataclasses
import math
from typing import Literal, get_args

import jax.numpy as jnp

from kvpr_jax import memory
from kvpr_jax.config import ModelConfig
from kvpr_jax.engines import WINDOW, Engine, window
from kvpr_jax.models.attention import Recompute, fused
from kvpr_jax.profiling.profile import Profile

OffloadMode = Literal["auto", "all", "none"]

BUCKETS = 16  # split points tried, about
TAIL_BYTES = 16 * 2**20  # a flushed segment should be this large: smaller copies use under half of the link
TAIL_TOKENS = (64, 256)  # and have between these many tokens
PREFILL_TOKENS = 32768  # tokens of a chunk of sequences, at most
PREFILL_QUERIES = 2048  # tokens of one sequence that pass through attention and MLP at a time, at most
PREFILL_QUERIES_LEAST = 64  # fewer would not fill the device
MARGIN = 0.05  # of free memory, left alone


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asks of the plan; `auto` leaves it to the scheduler.

    Attributes:
        split: "auto", tokens ("96") or a share of the prompt ("75%") to hold as activations.
        recompute: how activations are used: "project", "absorb" or "auto".
        engine: "overlapped", or "sequential": copy, wait, compute, wait.
        offload: "all" of the cache on the host, "none", or "auto": what the device cannot hold.
        device_cache_gib: GiB of device memory for the cache; None: what is free.
        tail_tokens: new tokens gathered on the device before they are flushed; None: by size.
        prefill_tokens: bound on tokens of a chunk of sequences in prefill, and of the queries of one sequence.
    """

    split: str = "auto"
    recompute: Literal["auto", "project", "absorb"] = "auto"
    engine: Engine = "overlapped"
    offload: OffloadMode = "auto"
    device_cache_gib: float | None = None
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
        if self.device_cache_gib is not None:
            if not 0 <= self.device_cache_gib < 1e9:
                raise ValueError(f"device-cache-gib {self.device_cache_gib} must be 0 or more, and below 1e9")
            if self.offload != "auto" or self.split != "auto":
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
class Plan:
    """What the runtime carries out.

    Attributes:
        batch: B.
        split: l, tokens of the prompt held as activations on the host.
        cached_tokens: S.
        resident_tokens: the prompt's last tokens that stay on the device, as keys and values.
        offloaded: whether any of the cache goes to the host; otherwise full tails stay on the device too.
        recompute, engine: see `Request`.
        activation_share: part of the host's tokens held as activations; new segments keep it.
        tail_tokens: T of the tail.
        flushes: full tails that become segments during the run.
        prefill_sequences, prefill_queries: sequences of a chunk, and tokens of one that pass a layer at a time.
        host_bytes: host memory of the cache at the end of the run.
        device_bytes: device memory beside the weights.
        host_bytes_per_step: bytes that cross the link in the first decode step.
        predicted_step_s: the first decode step.
        reason: why this split, in a sentence.
    """

    batch: int
    split: int
    cached_tokens: int
    resident_tokens: int
    offloaded: bool
    recompute: Recompute
    engine: Engine
    activation_share: float
    tail_tokens: int
    flushes: int
    prefill_sequences: int
    prefill_queries: int
    host_bytes: int
    device_bytes: int
    host_bytes_per_step: int
    predicted_step_s: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Costs:
    """The cost model for one model, batch and profile; lengths in tokens, times in seconds."""

    config: ModelConfig
    itemsize: int
    batch: int
    profile: Profile

    def host_bytes(self, activations: int, keys_values: int) -> int:
        """Bytes of one layer's tokens in each form."""
        width = activations * self.config.activation_width + keys_values * self.config.kv_width
        return self.batch * width * self.itemsize

    def link_s(self, activations: int, keys_values: int) -> float:
        arrays = [self.host_bytes(activations, 0)] if activations else []
        arrays += [self.host_bytes(0, keys_values) // 2] * 2 if keys_values else []
        return sum((self.profile.copy_s(nbytes) for nbytes in arrays), 0.0)

    def compute_s(self, activations: int, keys_values: int, recompute: Recompute) -> float:
        return self.profile.layer_s(recompute, activations, keys_values)

    def step_s(self, activations: int, keys_values: int, resident: int, recompute: Recompute, engine: Engine) -> float:
        """One decode step over tokens held on the host in each form and tokens resident on the device."""
        link = self.link_s(activations, keys_values)
        compute = self.compute_s(activations, keys_values + resident, recompute)
        layers = self.config.num_layers
        if engine == "sequential":
            return layers * (link + compute) + self.profile.head_s
        return layers * max(link, compute) + min(link, compute) + self.profile.head_s

    def two_phase_step_s(self, activations: int, keys_values: int) -> float:
        """The paper's schedule: the activations cross first, then they are projected beside the other copies."""
        first = self.link_s(activations, 0)
        rest = max(self.link_s(0, keys_values), self.compute_s(activations, keys_values, "project"))
        return self.config.num_layers * (first + rest) + self.profile.head_s


def buckets(tokens: int) -> list[int]:
    """Split points to choose from: multiples of a power of two, about `BUCKETS` of them, and all of the tokens.

    For 50 tokens 0, 16, 32, 48 and 50; for 1024, every 64th.
    """
    step = max(16, 2 ** math.ceil(math.log2(max(1, tokens) / BUCKETS)))
    return sorted({*range(0, tokens, step), tokens})


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to hold and use the tokens on the host, and what it is predicted to cost.

    Attributes:
        split: l.
        recompute: how activations are used.
        link_s, compute_s: of all layers in one decode step.
        step_s: the decode step.
    """

    split: int
    recompute: Recompute
    link_s: float
    compute_s: float
    step_s: float


def candidates(config: ModelConfig, dtype: jnp.dtype, plan: Plan, profile: Profile) -> list[Candidate]:
    """What a plan was chosen from, by split: the buckets and l itself in its own way, and the best in the other way.

    None where nothing is on the host. A plan with an empty host was chosen for what generation will spill.
    """
    if not plan.offloaded:
        return []
    costs = Costs(config, jnp.dtype(dtype).itemsize, plan.batch, profile)
    tokens = plan.cached_tokens - plan.resident_tokens

    def candidate(split: int, recompute: Recompute) -> Candidate:
        link_s, rest = costs.link_s(split, tokens - split), tokens - split + plan.resident_tokens
        compute_s = costs.compute_s(split, rest, recompute)
        step_s = costs.step_s(split, tokens - split, plan.resident_tokens, recompute, plan.engine)
        return Candidate(split, recompute, config.num_layers * link_s, config.num_layers * compute_s, step_s)

    other: Recompute = "absorb" if plan.recompute == "project" else "project"
    best = min((candidate(split, other) for split in buckets(tokens) if split), key=lambda c: c.step_s, default=None)
    found = [candidate(split, plan.recompute) for split in {*buckets(tokens), plan.split}]
    return sorted([*found, *([best] if best else [])], key=lambda c: (c.split, c.recompute != plan.recompute))


def choose_split(
    costs: Costs, tokens: int, resident: int, steps: int, recompute: Recompute, engine: Engine,
    compiled: frozenset[int] = frozenset(),
) -> int:  # fmt: skip
    """The bucketed l of least remaining time: steps · step_s(l), and the time to compile l if it is not compiled yet.

    Args:
        tokens: tokens on the host that are split into [0, l) and [l, tokens).
        resident: tokens on the device beside them.
        steps: decode steps left.
        compiled: splits whose layer step is compiled already.
    """
    if not costs.config.activations_are_smaller:
        return 0

    def remaining_s(split: int) -> float:
        step_s = costs.step_s(split, tokens - split, resident, recompute, engine)
        return steps * step_s + (0.0 if split in compiled else costs.profile.compile_s)

    return min(buckets(tokens), key=remaining_s)


def make_plan(
    config: ModelConfig,
    dtype: jnp.dtype,
    workload: Workload,
    request: Request,
    profile: Profile,
    free_device_bytes: int,
    free_host_bytes: int,
) -> Plan:
    """Choose a plan and check that it fits.

    Args:
        free_device_bytes: what the device has left once the weights are loaded.
        free_host_bytes: what the host can still give.

    Raises:
        ValueError: the request contradicts itself or the workload; names both values.
        MemoryError: the plan needs more device or host memory than there is; names both figures and the flags that
            change them.
    """
    itemsize = jnp.dtype(dtype).itemsize
    costs = Costs(config, itemsize, workload.batch, profile)
    recompute = _recompute(costs, workload, request)
    sequences, queries = _prefill_chunk(config, dtype, workload, request, free_device_bytes)
    prefill_bytes = _prefill_bytes(config, dtype, workload, sequences, queries)
    usable = int(free_device_bytes * (1 - MARGIN)) - max(prefill_bytes, _step_bytes(costs, workload))
    offloaded, resident, tail = _residency(costs, workload, request, usable)
    split, share, reason = _split(costs, workload, request, recompute, offloaded, resident)

    # At the end of the run: new tokens are flushed in whole tails, those that are not activations as keys and values.
    streamed = workload.prompt_tokens - resident - split
    written = workload.total_tokens - workload.prompt_tokens
    flushes = max(0, written - 1) // tail if offloaded else 0  # a full tail leaves when the next token comes
    flushed, flushed_activations = flushes * tail, int(share * flushes) * tail
    layer_bytes = costs.host_bytes(split + flushed_activations, streamed + flushed - flushed_activations)
    tails = 2 if flushes else 1  # while full ones leave for the host, empty ones are there
    token_bytes = costs.host_bytes(0, 1) * config.num_layers
    resident_bytes = resident * token_bytes
    plan = Plan(
        batch=workload.batch,
        split=split,
        cached_tokens=workload.prompt_tokens,
        resident_tokens=resident,
        offloaded=offloaded,
        recompute=recompute,
        engine=request.engine,
        activation_share=share,
        tail_tokens=tail,
        flushes=flushes,
        prefill_sequences=sequences,
        prefill_queries=queries,
        host_bytes=config.num_layers * layer_bytes,
        device_bytes=max(
            resident_bytes + prefill_bytes,
            resident_bytes
            + tails * tail * token_bytes
            + window(layer_bytes) * layer_bytes
            + _step_bytes(costs, workload),
        ),
        host_bytes_per_step=config.num_layers * costs.host_bytes(split, streamed),
        predicted_step_s=costs.step_s(split, streamed, resident, recompute, request.engine),
        reason=reason,
    )
    check_memory(plan, free_device_bytes, free_host_bytes)
    return plan


def _residency(costs: Costs, workload: Workload, request: Request, usable: int) -> tuple[bool, int, int]:
    """Whether anything goes to the host, the prompt's tokens that stay on the device, and the tokens of a tail."""
    everything = max(1, workload.new_tokens - 1)  # a tail that is never flushed
    if request.offload == "none":
        return False, workload.prompt_tokens, everything
    tail = min(request.tail_tokens or _tail_tokens(costs), everything)
    if request.offload == "all" or request.split != "auto":
        return True, 0, tail
    budget = usable if request.device_cache_gib is None else int(request.device_cache_gib * memory.GIB)
    token_bytes = costs.host_bytes(0, 1) * costs.config.num_layers
    if min(budget, usable) >= workload.total_tokens * token_bytes:
        return False, workload.prompt_tokens, everything
    layer_bytes = costs.host_bytes(0, workload.total_tokens)
    window_bytes = window(layer_bytes) * layer_bytes
    tokens = min(budget, usable - window_bytes) // token_bytes - 2 * tail
    return True, min(workload.prompt_tokens, max(0, tokens)), tail


def _split(
    costs: Costs, workload: Workload, request: Request, recompute: Recompute, offloaded: bool, resident: int
) -> tuple[int, float, str]:
    """l, the share of the host's tokens to hold as activations, and why."""
    forced = request.split_tokens(workload.prompt_tokens)
    if forced is not None:
        return forced, forced / workload.prompt_tokens, f"forced to {forced} of {workload.prompt_tokens} tokens"
    if not offloaded:
        return 0, 0.0, "the device holds the whole cache; nothing crosses the link"
    config = costs.config
    if not config.activations_are_smaller:
        return 0, 0.0, (
            f"activations ({config.activation_width} numbers a token) are no smaller than keys and values "
            f"({config.kv_width}); all of the cache is streamed"
        )  # fmt: skip
    prompt = workload.prompt_tokens - resident
    tokens = prompt or workload.total_tokens - resident  # an empty host: what generation will spill
    steps = max(1, workload.new_tokens - 1)
    chosen = choose_split(costs, tokens, resident, steps, recompute, request.engine)
    if not chosen:
        return 0, 0.0, "streaming keys and values is predicted to be fastest here"
    reason = f"holding {chosen} of {tokens} tokens as activations is predicted to be fastest"
    return (chosen if prompt else 0), chosen / tokens, reason


def check_memory(plan: Plan, free_device_bytes: int, free_host_bytes: int) -> None:
    """Raises MemoryError, with both figures and the flags that change them, if the plan does not fit."""
    host_needed = plan.host_bytes + (plan.device_bytes if memory.device_memory_is_host_memory() else 0)
    for place, needed, free, flags in (
        ("host", host_needed, free_host_bytes, "fewer or shorter prompts, --max-new-tokens, --split or --dtype"),
        ("device", plan.device_bytes, free_device_bytes,
         "--offload all, a smaller --device-cache-gib, fewer or shorter prompts or --dtype"),
    ):  # fmt: skip
        if needed > free:
            raise MemoryError(
                f"not enough {place} memory: the plan needs {needed / memory.GIB:.2f} GiB and "
                f"{max(0, free) / memory.GIB:.2f} GiB are free beside the weights; change {flags}"
            )


def _recompute(costs: Costs, workload: Workload, request: Request) -> Recompute:
    """As asked, or the cheaper way over the whole prompt."""
    if request.recompute != "auto":
        return request.recompute
    ways: tuple[Recompute, ...] = get_args(Recompute)
    return min(reversed(ways), key=lambda way: costs.compute_s(workload.prompt_tokens, 0, way))


def _tail_tokens(costs: Costs) -> int:
    """Tokens whose activations make a copy of `TAIL_BYTES`, within `TAIL_TOKENS`."""
    least, most = TAIL_TOKENS
    return min(most, max(least, 2 ** math.ceil(math.log2(TAIL_BYTES / costs.host_bytes(1, 0)))))


def _step_bytes(costs: Costs, workload: Workload) -> int:
    """Device memory of a decode step beside the window: keys and values of one layer, formed or transposed; logits."""
    return costs.host_bytes(0, workload.total_tokens) + 4 * workload.batch * costs.config.vocab_size * 4


def _prefill_bytes(config: ModelConfig, dtype: jnp.dtype, workload: Workload, sequences: int, queries: int) -> int:
    """Device memory of prefill: the batch's hidden states and three layers' segments, and one chunk's temporaries.

    Scores are formed for a chunk's queries where no fused attention does without; then the mask alone is.
    """
    tokens, widest = workload.prompt_tokens, max(config.activation_width, config.kv_width)
    batch = workload.batch * tokens * (config.hidden_size + WINDOW * widest) * dtype.itemsize
    whole = tokens * (config.hidden_size + config.kv_width) * dtype.itemsize
    passing = (config.hidden_size + config.mlp_arrays * config.mlp_size) * dtype.itemsize
    scores = tokens * (1 + dtype.itemsize) if fused(dtype, config.head_dim) else 3 * config.num_heads * tokens * 4
    return batch + sequences * (whole + queries * (passing + scores))


def _prefill_chunk(
    config: ModelConfig, dtype: jnp.dtype, workload: Workload, request: Request, free_device_bytes: int
) -> tuple[int, int]:
    """Sequences of a chunk and tokens of each that pass a layer at a time: an eighth of the device's memory at most."""
    bound = request.prefill_tokens or PREFILL_TOKENS
    queries = min(workload.prompt_tokens, request.prefill_tokens or PREFILL_QUERIES)
    sequences = max(1, min(workload.batch, bound // workload.prompt_tokens))
    held = _prefill_bytes(config, dtype, workload, 0, 0)
    while _prefill_bytes(config, dtype, workload, sequences, queries) - held > free_device_bytes // 8:
        if sequences > 1:
            sequences = -(-sequences // 2)
        elif queries > PREFILL_QUERIES_LEAST:
            queries = -(-queries // 2)
        else:
            break
    return sequences, queries
