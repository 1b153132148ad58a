"""The plan of a run: how much of the cache is held as activations, how they are used, what stays on the device.

`make_plan` is a function of (profile, model, workload, budgets) and the kind of machine: of the bucketed splits that
both budgets hold, it takes the one of least remaining time, compilation included, by the cost model of `costs.py`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Collection
from typing import Any, get_args

import jax.numpy as jnp

from kvpr_jax import memory
from kvpr_jax.config import ModelConfig
from kvpr_jax.costs import Costs, Held, buckets, group_sizes
from kvpr_jax.engines import WINDOW, window_bytes
from kvpr_jax.models.attention import Recompute, fused, fusible
from kvpr_jax.plan import Plan, Request, Workload, longest_flushed
from kvpr_jax.profiling.profile import Profile

TAIL_BYTES = 16 * 2**20  # a flushed segment should be this large: smaller copies use under half of the link
TAIL_TOKENS = (64, 256)  # and have between these many tokens
TAIL_COMPILES = 3  # but gather for so many times what the profile compiled took: the next group's functions are larger
TAIL_MOST = 1024  # tokens at most, and two tails in
TAIL_SHARE = 16  # one part in so many of the device's free memory, and no more than --device-cache-gib
PREFILL_TOKENS = 32768  # tokens of a chunk of sequences, at most
PREFILL_QUERIES = 2048  # tokens of one sequence that pass through attention and MLP at a time, at most
PREFILL_QUERIES_LEAST = 64  # fewer would not fill the device
MARGIN = 0.05  # of free memory, left alone
GROUP_BYTES = 2**29  # cache of a group of which some crosses the link, at most: its window holds three
GROUP_SHARE = 64  # and one part in so many of the device's free memory
GROUP_SHARE_RESIDENT = 8  # the same of a group that stays on the device, which is there twice while prefill makes it


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to hold and use the tokens on the host, and what it is predicted to cost.

    Attributes:
        split: l.
        recompute: how activations are used.
        link_s, compute_s: of all layers in one decode step.
        step_s: the decode step.
        cache_bytes: of these tokens on the host.
        fits: whether the memory holds it to the end of the run.
    """

    split: int
    recompute: Recompute
    link_s: float
    compute_s: float
    step_s: float
    cache_bytes: int
    fits: bool


def candidates(plan: Plan) -> list[Candidate]:
    """What a plan was chosen from, by split: the buckets and l itself in its own way, and the best in the other way.

    None where none of the prompt is on the host.
    """
    costs, tokens = plan.costs, plan.cached_tokens - plan.resident_tokens
    if not tokens:
        return []

    def candidate(split: int, recompute: Recompute) -> Candidate:
        held = plan.with_tail(Held(split, tokens - split, plan.resident_tokens), 0)
        cache_bytes = costs.cache_bytes(split, tokens - split)
        sides = costs.sides(held, recompute, plan.engine)
        link_s, compute_s = sides["copies to the device"], sides["compute"]
        step_s = costs.step_s(held, recompute, plan.engine)
        fits = split not in plan.unfit_splits
        return Candidate(split, recompute, link_s, compute_s, step_s, cache_bytes, fits)

    other: Recompute = "absorb" if plan.recompute == "project" else "project"
    best = min((candidate(split, other) for split in buckets(tokens) if split), key=lambda c: c.step_s, default=None)
    found = [candidate(split, plan.recompute) for split in {*buckets(tokens), plan.split}]
    return sorted([*found, *([best] if best else [])], key=lambda c: (c.split, c.recompute != plan.recompute))


def make_plan(
    config: ModelConfig,
    dtype: jnp.dtype,
    workload: Workload,
    request: Request,
    profile: Profile,
    free_device_bytes: int,
    free_host_bytes: int,
    compiled: Collection[tuple[Any, ...]] = (),
    elsewhere: bool = False,
) -> Plan:
    """Choose a plan and check that it fits: of the splits that both budgets hold, the one of least remaining time.

    Args:
        free_device_bytes: what the device has left once the weights are loaded.
        free_host_bytes: what the host can still give.
        compiled: `Plan.step_shape` of plans whose step is compiled already; the others cost the time to compile it.
        elsewhere: the plan is for a GPU that is not here, with memory of its own and fused attention.

    Raises:
        ValueError: the request contradicts itself or the workload; names both values.
        MemoryError: the plan needs more device or host memory than there is; names both figures and the flags that
            change them.
    """
    costs = Costs(config, jnp.dtype(dtype).itemsize, workload.batch, profile)
    recompute = _recompute(costs, workload, request)
    has_fused = fusible(dtype, config.head_dim) if elsewhere else fused(dtype, config.head_dim)
    one_memory = memory.device_memory_is_host_memory() and not elsewhere
    sequences, queries = _prefill_chunk(config, dtype, workload, request, free_device_bytes, has_fused)
    prefill_bytes = _prefill_bytes(config, dtype, workload, sequences, queries, has_fused)
    widest = workload.prompt_tokens * max(costs.host_bytes(0, 1), costs.host_bytes(1, 0))
    costs, all_stays = _in_groups(costs, workload, request, free_device_bytes, prefill_bytes)
    group, step_bytes = costs.group, _step_bytes(costs, workload)
    leaving = WINDOW * group  # layers that wait in prefill for the link
    joined = _joined_layers(group)
    beside_bytes = max(prefill_bytes + (leaving + joined) * widest, step_bytes)
    usable = _usable(free_device_bytes) - beside_bytes
    forced = bool(request.split_tokens(workload.prompt_tokens))  # whose tails may be activations
    tail_token_bytes = max(costs.cache_bytes(0, 1), costs.cache_bytes(int(forced), 0))

    def shortage(plan: Plan) -> str:
        return _shortage(plan, request, free_device_bytes, free_host_bytes, one_memory)

    def remaining_s(plan: Plan) -> float:
        compile_s = 0.0 if plan.step_shape in compiled else profile.compile_s
        return max(1, workload.new_tokens - 1) * plan.predicted_step_s + compile_s

    def planned(tail_tokens: int | None) -> Plan:
        """With so many tokens a tail; None: by size."""
        offloaded, resident, resident_flushes, tail = _residency(
            costs, workload, request, tail_tokens, all_stays, usable
        )
        written = workload.total_tokens - workload.prompt_tokens
        flushes = max(0, written - 1) // tail if offloaded else 0  # a full tail leaves when the next token comes
        prompt = workload.prompt_tokens - resident
        tails_bytes = tail * tail_token_bytes
        tails_bytes *= 2 if flushes else 1  # while full ones leave, empty ones are there
        token_bytes = costs.cache_bytes(0, 1)
        resident_bytes = (resident + min(resident_flushes, flushes) * tail) * token_bytes

        def device_bytes(leaving_bytes: int, layer_bytes: int) -> int:
            """Beside the weights, while so many bytes a layer leave in prefill or while a last step reads so many."""
            staying_bytes = costs.host_bytes(0, resident)
            filling = (
                config.num_layers * staying_bytes + leaving * leaving_bytes + joined * (leaving_bytes + staying_bytes)
            )
            stepping = tails_bytes + window_bytes(group * layer_bytes) + step_bytes
            return max(filling + prefill_bytes, resident_bytes + max(stepping, _merging_bytes(costs, tail, flushes)))

        limit = free_host_bytes
        if one_memory:
            limit -= device_bytes(widest, costs.host_bytes(0, workload.total_tokens))
        if request.host_cache_gib is not None:
            limit = min(limit, int(request.host_cache_gib * memory.GIB))

        def plan_of(split: int) -> Plan:
            held = Held(split, prompt - split, resident)
            plan = Plan(
                batch=workload.batch,
                group=group,
                split=held.activations,
                cached_tokens=workload.prompt_tokens,
                resident_tokens=resident,
                resident_flushes=min(resident_flushes, flushes),
                offloaded=offloaded,
                recompute=recompute,
                engine=request.engine,
                activation_share=split / prompt if prompt else 0.0,
                forced=request.split != "auto",
                tail_tokens=tail,
                flushes=flushes,
                prefill_sequences=sequences,
                prefill_queries=queries,
                host_bytes=0,
                host_limit_bytes=limit,
                device_bytes=0,
                host_bytes_per_step=costs.cache_bytes(held.activations, held.keys_values),
                predicted_step_s=0.0,
                reason="",
                unfit_splits=(),
                costs=costs,
            )
            end = plan.at_the_end()
            layer_bytes = costs.host_bytes(end.activations, end.keys_values)
            return dataclasses.replace(
                plan,
                host_bytes=config.num_layers * layer_bytes,
                device_bytes=device_bytes(costs.host_bytes(held.activations, held.keys_values), layer_bytes),
                predicted_step_s=plan.step_s(plan.with_tail(held, 0)),
            )

        splits, reason = _splits(costs, workload, request, offloaded, prompt)
        plans = [plan_of(split) for split in splits]
        fitting = [plan for plan in plans if not shortage(plan)]
        if not fitting:
            raise MemoryError(shortage(min(plans, key=lambda plan: plan.host_bytes)))
        chosen = min(fitting, key=remaining_s)
        unfit = tuple(plan.split for plan in plans if plan not in fitting)
        chosen = dataclasses.replace(chosen, unfit_splits=unfit)
        return dataclasses.replace(chosen, reason=_reason(chosen, len(plans), reason))

    plan = planned(request.tail_tokens)
    lasting = 0 if request.tail_tokens else _lasting_tail(plan, request, free_device_bytes, tail_token_bytes)
    if lasting > plan.tail_tokens:
        with contextlib.suppress(MemoryError):
            plan = min(plan, planned(lasting), key=lambda plan: _run_s(plan, workload))
    return plan


def _in_groups(
    costs: Costs, workload: Workload, request: Request, free_device_bytes: int, prefill_bytes: int
) -> tuple[Costs, bool]:
    """The cost model with as many layers a group as there is room for, and whether all the cache stays on the device.

    If it does, a group may be larger; but the cache goes to the host for want of room only, not for larger groups.
    """
    layers, layer_bytes = costs.config.num_layers, costs.host_bytes(0, workload.total_tokens)
    for group in group_sizes(layers, layer_bytes, free_device_bytes // GROUP_SHARE_RESIDENT):
        grouped = dataclasses.replace(costs, group=group)
        if _all_stays(grouped, workload, request, free_device_bytes, prefill_bytes):
            return grouped, True
    streamed = group_sizes(layers, layer_bytes, min(GROUP_BYTES, free_device_bytes // GROUP_SHARE))
    return dataclasses.replace(costs, group=streamed[0]), False


def _all_stays(costs: Costs, workload: Workload, request: Request, free_device_bytes: int, prefill_bytes: int) -> bool:
    """Whether all of the cache may stay on the device, and there is room for it."""
    if request.offload == "all" or request.split != "auto":
        return False
    joined_bytes = _joined_layers(costs.group) * costs.host_bytes(0, workload.prompt_tokens)
    room = _usable(free_device_bytes) - max(prefill_bytes + joined_bytes, _step_bytes(costs, workload))
    if request.device_cache_gib is not None:
        room = min(room, int(request.device_cache_gib * memory.GIB))
    return costs.cache_bytes(0, workload.total_tokens) <= room


def _joined_layers(group: int) -> int:
    """Layers that are on the device twice in prefill, while they become a group."""
    return group if group > 1 else 0


def _usable(free_device_bytes: int) -> int:
    return int(free_device_bytes * (1 - MARGIN))


def _residency(
    costs: Costs, workload: Workload, request: Request, tail_tokens: int | None, all_stays: bool, usable: int
) -> tuple[bool, int, int, int]:
    """Whether anything goes to the host, the prompt's tokens and the full tails that stay on the device, and the tokens
    of a tail.

    The device's budget is filled first, evenly in all layers, by the prompt's last tokens and then by new ones.

    Args:
        tail_tokens: of a tail; None: by size.
        all_stays: whether there is room for all of the cache.
        usable: bytes that the cache may take on the device beside what prefill and a step need.
    """
    everything = max(1, workload.new_tokens - 1)  # a tail that is never flushed
    if all_stays or request.offload == "none":
        return False, workload.prompt_tokens, 0, everything
    tail = min(tail_tokens or _tail_tokens(costs), everything)
    if request.offload == "all" or request.split != "auto":
        return True, 0, 0, tail
    budget = usable if request.device_cache_gib is None else int(request.device_cache_gib * memory.GIB)
    token_bytes, total = costs.cache_bytes(0, 1), workload.total_tokens
    resident = 0
    for _ in range(2):  # what stays makes the window's layers smaller, so that a little more can stay
        stepping = window_bytes(costs.group_bytes(0, total - resident)) + 2 * tail * token_bytes
        beside = max(stepping, _merging_bytes(costs, tail, everything // tail))
        left = min(budget - tail * token_bytes, usable - beside)
        resident = max(0, left // token_bytes)
    of_prompt = min(workload.prompt_tokens, resident)
    return True, of_prompt, (resident - of_prompt) // tail, tail


def _splits(costs: Costs, workload: Workload, request: Request, offloaded: bool, prompt: int) -> tuple[list[int], str]:
    """The splits of the prompt's tokens on the host to choose from, and why, where there is only one."""
    forced = request.split_tokens(workload.prompt_tokens)
    if forced is not None:
        return [forced], f"forced to {forced} of {workload.prompt_tokens} tokens"
    if not offloaded:
        return [0], "the device holds the whole cache; nothing crosses the link"
    config = costs.config
    if not config.activations_are_smaller:
        return [0], (
            f"activations ({config.activation_width} numbers a token) are no smaller than keys and values "
            f"({config.kv_width}); all of the cache is streamed"
        )  # fmt: skip
    return buckets(prompt), ""


def _reason(chosen: Plan, tried: int, only: str) -> str:
    """Why this plan, of so many splits; `only`: why there was but one to choose from, empty if there were more."""
    prompt = chosen.cached_tokens - chosen.resident_tokens
    if chosen.offloaded and not prompt:
        end = chosen.at_the_end()
        return (
            f"the device holds the prompt; {end.activations + end.keys_values} new tokens go to the host, "
            f"{end.activations} of them as activations"
        )
    if only:
        return only
    reason = "streaming keys and values is predicted to be fastest here"
    if chosen.split:
        reason = f"holding {chosen.split} of {prompt} tokens as activations is predicted to be fastest"
    if chosen.unfit_splits:
        reason += f"; {len(chosen.unfit_splits)} of {tried} splits do not fit the memory"
    return reason


def _shortage(plan: Plan, request: Request, free_device_bytes: int, free_host_bytes: int, one_memory: bool) -> str:
    """What the plan lacks, with both figures and the flags that change them; empty if it fits."""
    less = "fewer or shorter prompts, --max-new-tokens, --split or --dtype"
    host_bytes = plan.host_bytes + (plan.device_bytes if one_memory else 0)
    free = "are free beside the weights"
    limits = [
        ("host", host_bytes, free_host_bytes, free, less),
        ("device", plan.device_bytes, free_device_bytes, free,
         "--offload all, a smaller --device-cache-gib, fewer or shorter prompts or --dtype"),
    ]  # fmt: skip
    if request.host_cache_gib is not None:
        allowed = int(request.host_cache_gib * memory.GIB)
        limits.insert(0, ("host", plan.host_bytes, allowed, "are allowed by --host-cache-gib", f"that, {less}"))
    for place, needed, there, are, flags in limits:
        if needed > there:
            return (
                f"not enough {place} memory: the plan needs {_gib(needed)} and {_gib(max(0, there))} {are}; "
                f"change {flags}"
            )
    return ""


def _gib(nbytes: int) -> str:
    """15.61 GiB, and 0.000075 GiB: two decimals, or two digits of what is less."""
    gib = nbytes / memory.GIB
    return f"{gib:.{max(2, 1 - math.floor(math.log10(gib))) if nbytes else 2}f} GiB"


def _recompute(costs: Costs, workload: Workload, request: Request) -> Recompute:
    """As asked, or the cheaper way over the whole prompt."""
    if request.recompute != "auto":
        return request.recompute
    ways: tuple[Recompute, ...] = get_args(Recompute)
    return min(reversed(ways), key=lambda way: costs.compute_s(Held(workload.prompt_tokens, 0), way))


def _tail_tokens(costs: Costs) -> int:
    """Tokens whose activations make a copy of `TAIL_BYTES`, within `TAIL_TOKENS`."""
    least, most = TAIL_TOKENS
    return min(most, max(least, 2 ** math.ceil(math.log2(TAIL_BYTES / costs.group_bytes(1, 0)))))


def _lasting_tail(plan: Plan, request: Request, free_device_bytes: int, token_bytes: int) -> int:
    """Tokens of a tail that steps take long enough to fill: meanwhile the steps behind its flush are compiled. 0 where
    none is flushed."""
    if not plan.flushes:
        return 0
    least, _ = TAIL_TOKENS
    lasting = TAIL_COMPILES * plan.costs.profile.compile_s / plan.predicted_step_s
    room = free_device_bytes / TAIL_SHARE
    if request.device_cache_gib is not None:
        room = min(room, request.device_cache_gib * memory.GIB)
    most = room / (2 * token_bytes)
    return min(math.ceil(lasting / least), math.floor(most / least), TAIL_MOST // least) * least


def _run_s(plan: Plan, workload: Workload) -> float:
    """All steps, as long as the first and the last one in the mean, and what they wait for the compiler at most."""
    last_s = plan.step_s(plan.with_tail(plan.at_the_end(), plan.flushes))
    wait_s = max(0.0, TAIL_COMPILES * plan.costs.profile.compile_s - plan.tail_tokens * plan.predicted_step_s)
    return workload.new_tokens * (plan.predicted_step_s + last_s) / 2 + plan.flushes * wait_s


def _step_bytes(costs: Costs, workload: Workload) -> int:
    """Device memory of a decode step beside the window: keys and values of one group, formed or transposed; logits."""
    return costs.group_bytes(0, workload.total_tokens) + 4 * workload.batch * costs.config.vocab_size * 4


def _merging_bytes(costs: Costs, tail: int, flushes: int) -> int:
    """Device memory of a flush, beside what stays there: what all layers' smallest segments become one in."""
    return costs.config.num_layers * max(costs.host_bytes(*tokens) for tokens in longest_flushed(costs, tail, flushes))


def _prefill_bytes(
    config: ModelConfig, dtype: jnp.dtype, workload: Workload, sequences: int, queries: int, has_fused: bool
) -> int:
    """Device memory of prefill beside the cache: the batch's hidden states and one chunk's temporaries.

    Scores are formed for a chunk's queries where no fused attention does without; then the mask alone is.
    """
    tokens = workload.prompt_tokens
    batch = workload.batch * tokens * config.hidden_size * dtype.itemsize
    whole = tokens * (config.hidden_size + config.kv_width) * dtype.itemsize
    passing = (config.hidden_size + config.mlp_arrays * config.mlp_size) * dtype.itemsize
    scores = tokens * (1 + dtype.itemsize) if has_fused else 3 * config.num_heads * tokens * 4
    return batch + sequences * (whole + queries * (passing + scores))


def _prefill_chunk(
    config: ModelConfig,
    dtype: jnp.dtype,
    workload: Workload,
    request: Request,
    free_device_bytes: int,
    has_fused: bool,
) -> tuple[int, int]:
    """Sequences of a chunk and tokens of each that pass a layer at a time: an eighth of the device's memory at most."""
    bound = request.prefill_tokens or PREFILL_TOKENS
    queries = min(workload.prompt_tokens, request.prefill_tokens or PREFILL_QUERIES)
    sequences = max(1, min(workload.batch, bound // workload.prompt_tokens))
    held = _prefill_bytes(config, dtype, workload, 0, 0, has_fused)
    while _prefill_bytes(config, dtype, workload, sequences, queries, has_fused) - held > free_device_bytes // 8:
        if sequences > 1:
            sequences = -(-sequences // 2)
        elif queries > PREFILL_QUERIES_LEAST:
            queries = -(-queries // 2)
        else:
            break
    return sequences, queries
