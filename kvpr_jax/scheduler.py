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
from kvpr_jax.budget import Budget, Residency, budget_for
from kvpr_jax.config import ModelConfig
from kvpr_jax.costs import Costs, Held, buckets
from kvpr_jax.models.attention import Recompute, fused, fusible
from kvpr_jax.plan import Plan, Request, Workload
from kvpr_jax.profiling.profile import Profile

TAIL_BYTES = 16 * 2**20  # a flushed segment should be this large: smaller copies use under half of the link
TAIL_TOKENS = (64, 256)  # and have between these many tokens
TAIL_COMPILES = 3  # but gather for so many times what the profile compiled took: the next group's functions are larger
TAIL_MOST = 1024  # tokens at most, and two tails in
TAIL_SHARE = 16  # one part in so many of the device's free memory, and no more than --device-cache-gib


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
    has_fused = fusible(dtype, config.head_dim) if elsewhere else fused(dtype, config.head_dim)
    one_memory = memory.device_memory_is_host_memory() and not elsewhere
    budget = budget_for(
        costs, dtype, workload, request, free_device_bytes, free_host_bytes, one_memory=one_memory, has_fused=has_fused
    )
    plan = _best_plan(budget, request.tail_tokens or _tail_tokens(budget.costs), compiled)
    lasting = 0 if request.tail_tokens else _lasting_tail(plan, budget)
    if lasting > plan.tail_tokens:
        with contextlib.suppress(MemoryError):
            plan = min(plan, _best_plan(budget, lasting, compiled), key=lambda plan: _run_s(plan, workload))
    return plan


def _best_plan(budget: Budget, tail_tokens: int, compiled: Collection[tuple[Any, ...]]) -> Plan:
    """The plan with so many tokens a tail that has the least remaining time; see `make_plan`."""
    residency = budget.residency(tail_tokens)
    splits, only = _splits(budget, residency)
    undivided = _undivided(residency, budget)
    plans = [_divided(undivided, split, residency, budget) for split in splits]
    fitting = [plan for plan in plans if not budget.shortage(plan)]
    if not fitting:
        raise MemoryError(budget.shortage(min(plans, key=lambda plan: plan.host_bytes)))

    def remaining_s(plan: Plan) -> float:
        compile_s = 0.0 if plan.step_shape in compiled else plan.costs.profile.compile_s
        return max(1, budget.workload.new_tokens - 1) * plan.predicted_step_s + compile_s

    chosen = min(fitting, key=remaining_s)
    unfit = tuple(plan.split for plan in plans if plan not in fitting)
    chosen = dataclasses.replace(chosen, unfit_splits=unfit)
    return dataclasses.replace(chosen, reason=_reason(chosen, len(plans), only))


def _undivided(residency: Residency, budget: Budget) -> Plan:
    """What the plans of all splits have in common; they replace the zeros, and the one chosen the reason."""
    return Plan(
        batch=budget.workload.batch,
        group=budget.costs.group,
        split=0,
        cached_tokens=budget.workload.prompt_tokens,
        **dataclasses.asdict(residency),
        recompute=_recompute(budget),
        engine=budget.request.engine,
        activation_share=0.0,
        forced=budget.request.split != "auto",
        prefill_sequences=budget.prefill.sequences,
        prefill_queries=budget.prefill.queries,
        host_bytes=0,
        host_limit_bytes=budget.host_limit_bytes(residency),
        device_bytes=0,
        host_bytes_per_step=0,
        predicted_step_s=0.0,
        reason="",
        unfit_splits=(),
        costs=budget.costs,
    )


def _divided(undivided: Plan, split: int, residency: Residency, budget: Budget) -> Plan:
    """The plan that holds so many of the prompt's tokens as activations, and what it comes to."""
    costs, prompt = undivided.costs, undivided.cached_tokens - undivided.resident_tokens
    held = Held(split, prompt - split, undivided.resident_tokens)
    plan = dataclasses.replace(undivided, split=split, activation_share=split / prompt if prompt else 0.0)
    end = plan.at_the_end()
    leaving_bytes, read_bytes = (costs.host_bytes(of.activations, of.keys_values) for of in (held, end))
    return dataclasses.replace(
        plan,
        host_bytes=costs.config.num_layers * read_bytes,
        device_bytes=budget.device_bytes(residency, leaving_bytes, read_bytes),
        host_bytes_per_step=costs.config.num_layers * leaving_bytes,
        predicted_step_s=plan.step_s(plan.with_tail(held, 0)),
    )


def _splits(budget: Budget, residency: Residency) -> tuple[list[int], str]:
    """The splits of the prompt's tokens on the host to choose from, and why, where there is only one."""
    prompt, config = budget.workload.prompt_tokens, budget.costs.config
    forced = budget.request.split_tokens(prompt)
    if forced is not None:
        return [forced], f"forced to {forced} of {prompt} tokens"
    if not residency.offloaded:
        return [0], "the device holds the whole cache; nothing crosses the link"
    if not config.activations_are_smaller:
        return [0], (
            f"activations ({config.activation_width} numbers a token) are no smaller than keys and values "
            f"({config.kv_width}); all of the cache is streamed"
        )  # fmt: skip
    return buckets(prompt - residency.resident_tokens), ""


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


def _recompute(budget: Budget) -> Recompute:
    """As asked, or the cheaper way over the whole prompt."""
    if budget.request.recompute != "auto":
        return budget.request.recompute
    ways: tuple[Recompute, ...] = get_args(Recompute)
    whole = Held(budget.workload.prompt_tokens, 0)
    return min(reversed(ways), key=lambda way: budget.costs.compute_s(whole, way))


def _tail_tokens(costs: Costs) -> int:
    """Tokens whose activations make a copy of `TAIL_BYTES`, within `TAIL_TOKENS`."""
    least, most = TAIL_TOKENS
    return min(most, max(least, 2 ** math.ceil(math.log2(TAIL_BYTES / costs.group_bytes(1, 0)))))


def _lasting_tail(plan: Plan, budget: Budget) -> int:
    """Tokens of a tail that steps take long enough to fill: meanwhile the steps behind its flush are compiled. 0 where
    none is flushed."""
    if not plan.flushes:
        return 0
    least, _ = TAIL_TOKENS
    lasting = TAIL_COMPILES * plan.costs.profile.compile_s / plan.predicted_step_s
    most = min(budget.free_device_bytes / TAIL_SHARE, budget.device_cache_bytes) / (2 * budget.tail_token_bytes)
    return min(math.ceil(lasting / least), math.floor(most / least), TAIL_MOST // least) * least


def _run_s(plan: Plan, workload: Workload) -> float:
    """All steps, as long as the first and the last one in the mean, and what they wait for the compiler at most."""
    last_s = plan.step_s(plan.with_tail(plan.at_the_end(), plan.flushes))
    wait_s = max(0.0, TAIL_COMPILES * plan.costs.profile.compile_s - plan.tail_tokens * plan.predicted_step_s)
    return workload.new_tokens * (plan.predicted_step_s + last_s) / 2 + plan.flushes * wait_s
