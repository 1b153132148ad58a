"""The plan of a run: how much of the cache is held as activations, how they are used, what stays on the device.

`make_plan` is a function of (profile, model, workload, budgets) and the kind of machine: of the bucketed splits that
both budgets hold, it takes the one of least remaining time, compilation included, by the cost model of `costs.py`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp

from kvpr_jax import memory
from kvpr_jax.budget import Budget, Residency, budget_for
from kvpr_jax.config import ModelConfig
from kvpr_jax.costs import Costs, buckets
from kvpr_jax.models.attention import Recompute, fused, fusible
from kvpr_jax.plan import TAIL_COMPILES, Candidate, Plan, Request, Workload
from kvpr_jax.profiling.profile import Profile

WAYS: tuple[Recompute, ...] = ("absorb", "project")
TAIL_BYTES = 16 * 2**20  # a flushed segment should be this large: smaller copies use under half of the link
TAIL_TOKENS = (64, 256)  # and have between these many tokens
TAIL_MOST = 1024  # tokens at most, and two tails in
TAIL_SHARE = 16  # one part in so many of the device's free memory, and no more than --device-cache-gib


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
    plan = _best_plan(budget, request.tail_tokens or _tail_tokens(budget), compiled)
    lasting = 0 if request.tail_tokens else _lasting_tail(plan, budget)
    if lasting > plan.tail_tokens:
        with contextlib.suppress(MemoryError):
            longer = _best_plan(budget, lasting, compiled)
            plan = min(plan, longer, key=lambda plan: _steps_s(plan, workload) + plan.waits_s)
    return plan


def _best_plan(budget: Budget, tail_tokens: int, compiled: Collection[tuple[Any, ...]]) -> Plan:
    """The plan with so many tokens a tail that has the least remaining time; see `make_plan`.

    Of plans that take equally long, which wait for the link, the one that computes less.
    """
    splits, only = _splits(budget, tail_tokens)
    residencies = [(split, budget.residency(tail_tokens, split)) for split in splits]
    plans = [_plan(split, way, residency, budget) for way in WAYS for split, residency in residencies]
    asked, forced = budget.request, budget.request.split_tokens(budget.workload.prompt_tokens)
    allowed = [plan for plan in plans if asked.recompute in ("auto", plan.recompute) and forced in (None, plan.split)]
    fitting = [plan for plan in allowed if not budget.shortage(plan)]
    if not fitting:
        raise MemoryError(budget.shortage(min(allowed, key=lambda plan: plan.host_bytes)))

    def remaining_s(plan: Plan) -> tuple[float, float]:
        compile_s = 0.0 if plan.step_shape in compiled else plan.costs.profile.compile_s
        return _steps_s(plan, budget.workload) + compile_s, _first_sides(plan)["compute"]

    chosen = min(fitting, key=remaining_s)
    own = [plan for plan in plans if plan.recompute == chosen.recompute]
    reason = only or _reason(chosen, len(own), unfit=sum(plan not in fitting for plan in own))
    return dataclasses.replace(chosen, reason=reason, candidates=_candidates(plans, chosen, budget))


def _splits(budget: Budget, tail_tokens: int) -> tuple[list[int], str]:
    """The splits to consider, and why the plan's is as it is, where there is no choice.

    Where part of the prompt stays on the device, buckets of what is left where all of it is held as activations, the
    least that there may be.
    """
    prompt, config = budget.workload.prompt_tokens, budget.costs.config
    forced = budget.request.split_tokens(prompt)
    if forced is not None:
        return sorted({*buckets(prompt), forced}), f"forced to {forced} of {prompt} tokens"
    residency = budget.residency(tail_tokens, None)
    if not residency.offloaded:
        return [0], "the device holds the whole cache; nothing crosses the link"
    if not config.activations_are_smaller:
        return [0], (
            f"activations ({config.activation_width} numbers a token) are no smaller than keys and values "
            f"({config.kv_width}); all of the cache is streamed"
        )  # fmt: skip
    return buckets(prompt - residency.resident_tokens), ""


def _plan(split: int, recompute: Recompute, residency: Residency, budget: Budget) -> Plan:
    """The plan that holds so many of the prompt's tokens as activations and uses them so, and what it comes to."""
    costs, workload = budget.costs, budget.workload
    leaving = workload.prompt_tokens - residency.resident_tokens
    leaving_bytes = costs.host_bytes(split, leaving - split)
    plan = Plan(
        batch=workload.batch,
        group=costs.group,
        split=split,
        cached_tokens=workload.prompt_tokens,
        **dataclasses.asdict(residency),
        recompute=recompute,
        engine=budget.request.engine,
        activation_share=split / leaving if leaving else 0.0,
        forced=budget.request.split != "auto",
        prefill_sequences=budget.prefill.sequences,
        prefill_queries=budget.prefill.queries,
        host_bytes=0,
        host_limit_bytes=budget.host_limit_bytes(residency),
        device_bytes=0,
        host_bytes_per_step=costs.config.num_layers * leaving_bytes,
        predicted_step_s=0.0,
        predicted_last_step_s=0.0,
        reason="",
        costs=costs,
    )
    end = plan.at_the_end()
    read_bytes = costs.host_bytes(end.activations, end.keys_values)
    return dataclasses.replace(
        plan,
        host_bytes=costs.config.num_layers * read_bytes,
        device_bytes=budget.device_bytes(residency, leaving_bytes, read_bytes),
        predicted_step_s=plan.step_s(plan.with_tail(plan.at_first(), 0)),
        predicted_last_step_s=plan.step_s(plan.with_tail(end, plan.flushes)),
    )


def _first_sides(plan: Plan) -> dict[str, float]:
    """What the first decode step may be bound by; see `Costs.sides`."""
    return plan.costs.sides(plan.with_tail(plan.at_first(), 0), plan.recompute, plan.engine)


def _candidates(plans: Sequence[Plan], chosen: Plan, budget: Budget) -> tuple[Candidate, ...]:
    """What is shown of the plans considered; see `Plan.candidates`."""
    found = [(plan.recompute == chosen.recompute, _candidate(plan, not budget.shortage(plan))) for plan in plans]
    others = [each for own, each in found if not own and each.recompute]
    others.sort(key=lambda each: (not each.fits, each.step_s + each.last_step_s))
    shown = [*(each for own, each in found if own), *others[:1]]
    return tuple(sorted(shown, key=lambda each: each.split))


def _candidate(plan: Plan, fits: bool) -> Candidate:
    """What is shown of a plan that was considered."""
    sides = _first_sides(plan)
    recompute = plan.recompute if plan.split or plan.at_the_end().activations else None
    return Candidate(
        plan.split, recompute, plan.resident_tokens,
        sides["copies to the device"], sides["compute"], sides.get("dispatch"),
        plan.predicted_step_s, plan.predicted_last_step_s, plan.host_bytes, plan.device_bytes, fits,
    )  # fmt: skip


def _reason(chosen: Plan, tried: int, unfit: int) -> str:
    """Why this plan, of so many splits, some of which do not fit the memory."""
    prompt = chosen.cached_tokens - chosen.resident_tokens
    if not prompt:
        end = chosen.at_the_end()
        return (
            f"the device holds the prompt; {end.activations + end.keys_values} new tokens go to the host, "
            f"{end.activations} of them as activations"
        )
    reason = "streaming keys and values is predicted to be fastest here"
    if chosen.split:
        reason = f"holding {chosen.split} of {prompt} tokens as activations is predicted to be fastest"
    return reason + (f"; {unfit} of {tried} splits do not fit the memory" if unfit else "")


def _tail_tokens(budget: Budget) -> int:
    """Tokens whose activations make a copy of `TAIL_BYTES`, within `TAIL_TOKENS`, and two of them in the device's
    budget."""
    least, most = TAIL_TOKENS
    wanted = 2 ** math.ceil(math.log2(TAIL_BYTES / budget.costs.group_bytes(1, 0)))
    allowed = budget.device_cache_bytes // (2 * budget.tail_token_bytes)
    return max(least, min(wanted, most, allowed // least * least))


def _lasting_tail(plan: Plan, budget: Budget) -> int:
    """Tokens of a tail that steps take long enough to fill: meanwhile the steps behind its flush are compiled. 0 where
    none is flushed."""
    if not plan.flushes:
        return 0
    least, _ = TAIL_TOKENS
    lasting = TAIL_COMPILES * plan.costs.profile.compile_s / plan.predicted_step_s
    most = min(budget.free_device_bytes / TAIL_SHARE, budget.device_cache_bytes) / (2 * budget.tail_token_bytes)
    return min(math.ceil(lasting / least), math.floor(most / least), TAIL_MOST // least) * least


def _steps_s(plan: Plan, workload: Workload) -> float:
    """All decode steps, as long as the first and the last one in the mean."""
    return max(1, workload.new_tokens - 1) * (plan.predicted_step_s + plan.predicted_last_step_s) / 2
