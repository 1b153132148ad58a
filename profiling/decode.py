"""Benchmark of the decode step: `python -m kvpr_jax.profiling.decode`. Random weights, greedy tokens, every step timed.

The floor of a step is the bytes that must cross the link over the measured bandwidth of the link; no step that
streams them can be faster.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvpr_jax import command_line, engines, memory
from kvpr_jax.cache import Cache
from kvpr_jax.command_line import FAILURE, Parser, Reporter, failing_with
from kvpr_jax.plan import Plan, Request
from kvpr_jax.profiling import link, matmul, plain, plot, report, settings, timing
from kvpr_jax.profiling.settings import Setting
from kvpr_jax.runtime import Decoder, read_tokens

WARM_UP_STEPS = 2  # enough to compile all that comes before a flush


def measure(
    decoder: Decoder, prompts: Sequence[Sequence[int]], steps: int, requests: Sequence[Request], rounds: int = 1
) -> list[dict[str, Any]]:
    """Prefill and time every decode step of each setting, once its first steps are compiled and the pinned memory is
    reserved; what a flush makes necessary is compiled beside the steps, as in any run.

    Args:
        rounds: turns of each setting, all of whose steps are in its result.
    """
    plans = [decoder.plan(prompts, steps + 1, request) for request in requests]
    results: list[dict[str, Any]] = [{"plan": plan.as_dict()} for plan in plans]
    turns = [list[dict[str, Any]]() for _ in plans]
    for _ in range(rounds):
        for plan, result, turn in zip(plans, results, turns, strict=True):
            memory.reserve_pinned(plan.host_bytes, plan.largest_array_bytes)
            warm_up_s = [  # in every turn: of many settings a decoder does not keep all functions
                sum_of(run(decoder, prompts, plan, min(steps, WARM_UP_STEPS))[0]) for _ in range(1 if turn else 2)
            ]
            result.setdefault("compile_s", max(0.0, warm_up_s[0] - warm_up_s[-1]))
            times, cache = run(decoder, prompts, plan, steps)
            turn.append(times)
            if len(turn) == rounds:
                result |= joined(turn) | {
                    "cache_host_bytes": sum(map(memory.host_bytes, cache.groups)),
                    "compute_s": compute_s(decoder, cache),
                } | needed(decoder, plan)  # fmt: skip
            del cache  # its memory is the next one's
    return results


def joined(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `run` gives of each turn of a setting, as one: the steps of all, what they compiled, the longest wait, and
    the shortest prefill."""
    lists = [name for name, value in turns[0].items() if isinstance(value, list)]
    return {name: [value for turn in turns for value in turn[name]] for name in lists} | {
        "prefill_s": min(turn["prefill_s"] for turn in turns),
        "recompiled": sum(turn["recompiled"] for turn in turns),
        "longest_wait_s": max(turn["longest_wait_s"] for turn in turns),
    }


def measure_plain(decoder: Decoder, prompts: Sequence[Sequence[int]], steps: int) -> dict[str, Any]:
    """What `measure` gives, of plain JAX with all of the cache on the device; nothing is predicted of it."""
    plan = decoder.plan(prompts, steps + 1, Request(offload="none"))
    first, times = run_plain(decoder, prompts, plan, 1), run_plain(decoder, prompts, plan, steps)
    step_s = statistics.median(times["step_s"])
    return {
        "plan": plan.as_dict(),
        "plain": True,
        "compile_s": max(0.0, first["step_s"][0] - step_s),
        **times,
        "cache_host_bytes": 0,
        "compute_s": step_s,
    } | needed(decoder, plan)


def needed(decoder: Decoder, plan: Plan) -> dict[str, Any]:
    """Products of the prefill, and memory: predicted, and taken at most so far."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves((decoder.embedder[1], decoder.params)))
    return {
        "prefill_flops": prefill_flops(decoder, plan),
        "predicted_device_bytes": weights + plan.device_bytes,
        "peak_device_bytes": memory.peak_device_bytes(),
        "peak_host_bytes": memory.peak_host_bytes(),
    }


def run(decoder: Decoder, prompts: Sequence[Sequence[int]], plan: Plan, steps: int) -> tuple[dict[str, Any], Cache]:
    """Seconds of prefill; what `timed_steps` gives, with the bytes that each step fetched and what was predicted of
    it; what they compiled or waited for; the cache at the end."""
    begin = time.perf_counter()
    cache, logits = decoder.prefill(prompts, plan)
    tokens = greedy(logits)
    jax.block_until_ready((cache.groups, tokens))
    prefill_s = time.perf_counter() - begin
    columns = timed_steps(
        lambda tokens: decoder.step(cache, tokens), tokens, steps,
        lambda: {"step_bytes": cache.bytes_per_step, "predicted_step_s": cache.predicted_step_s},
        lambda: cache.may_issue_ahead,
    )  # fmt: skip
    waits = {"recompiled": cache.recompiled, "longest_wait_s": cache.longest_wait_s}
    return {"prefill_s": prefill_s} | columns | waits, cache


def run_plain(decoder: Decoder, prompts: Sequence[Sequence[int]], plan: Plan, steps: int) -> dict[str, Any]:
    """What `run` times, in plain JAX."""
    begin = time.perf_counter()
    cache, logits = plain.prefill(decoder, prompts, plan)
    tokens = greedy(logits)
    jax.block_until_ready((cache, tokens))
    prefill_s = time.perf_counter() - begin
    return {"prefill_s": prefill_s} | timed_steps(
        lambda tokens: plain.step(decoder, cache, tokens), tokens, steps, lambda: {"step_bytes": 0}, lambda: True
    )


@jax.jit
def greedy(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The likeliest tokens."""
    return logits.argmax(-1).astype(jnp.int32)


def timed_steps(
    step: Callable[[Array], Array],
    tokens: Array,
    steps: int,
    state: Callable[[], dict[str, Any]],
    ahead: Callable[[], bool],
) -> dict[str, list[Any]]:
    """Seconds of each greedy step, from when the tokens of the one before it are there until its own are; and the
    memory taken when they are read.

    Args:
        step: from tokens (B,) to the next logits (B, V).
        tokens: before the first step.
        state: what else is to be kept of each step, asked when its tokens are read.
        ahead: as in `read_tokens`.
    """
    taken = []
    with futures.ThreadPoolExecutor(max_workers=1) as watch:  # tokens may be there long before they are read
        there = [watch.submit(ready_at, tokens)]

        def next_tokens(tokens: Array) -> Array:
            tokens = greedy(step(tokens))
            there.append(watch.submit(ready_at, tokens))
            return tokens

        for _ in read_tokens(next_tokens, tokens, steps, ahead):
            pinned, other = memory.resident_bytes()
            in_use = memory.device_bytes_in_use()
            taken.append(state() | {"pinned_bytes": pinned, "other_host_bytes": other, "device_bytes": in_use})
    step_s = [end - begin for begin, end in itertools.pairwise(each.result() for each in there)]
    return {"step_s": step_s} | {name: [of_step[name] for of_step in taken] for name in taken[0]}


def ready_at(tokens: Array) -> float:
    """The time when they are there, by the clock of `time.perf_counter`."""
    jax.block_until_ready(tokens)
    return time.perf_counter()


def compute_s(decoder: Decoder, cache: Cache) -> float:
    """Median seconds of the cache's step without the link, of a few in a row: every group reads the first one's
    segments, which are fetched once. The tail is written again from its first slot on."""
    cache.groups = [jax.block_until_ready(cache.fetch(0))] * len(cache.groups)
    cache.engine = engines.engine_for("overlapped", cache.groups[0])  # nothing crosses
    first_slot = cache.length - cache.written
    place = memory.placed(dataclasses.replace(cache.place, slots=jnp.array([first_slot], jnp.int32)))
    tokens = memory.placed(jnp.zeros(cache.plan.batch, jnp.int32))
    count = min(5, cache.plan.tail_tokens)

    def steps() -> list[Array]:
        cache.length, cache.place = first_slot, place
        return [decoder.step(cache, tokens) for _ in range(count)]

    return timing.median_s(steps, trials=3, warm_up=1) / count


def sum_of(times: dict[str, Any]) -> float:
    return times["prefill_s"] + sum(times["step_s"])


def prefill_flops(decoder: Decoder, plan: Plan) -> int:
    """Products with the layers' kernels, and causal attention's two."""
    config, tokens = decoder.config, plan.batch * plan.cached_tokens
    kernels = sum(leaf.size for leaf in jax.tree.leaves(decoder.params) if leaf.ndim == 2)
    attention = 2 * tokens * plan.cached_tokens * config.num_heads * config.head_dim * config.num_layers
    return 2 * tokens * kernels + attention


def is_streamed(plan: dict[str, Any]) -> bool:
    """Whether all of the cache is streamed as keys and values: what the speed-up is over."""
    return plan["offloaded"] and plan["split"] == 0 and not plan["resident_tokens"]


def rows(results: list[dict[str, Any]], link_gb_per_s: float, peak_flops_per_s: float) -> list[dict[str, str]]:
    """The lines of the table. The floor of a step is its bytes over the link's bandwidth; all that is said of a step is
    the median over the steps, but the speed-up over l = 0 is that of all steps together."""
    streamed_s = next((sum(result["step_s"]) for result in results if is_streamed(result["plan"])), None)
    lines = []
    for result in results:
        plan, step_s, nbytes = result["plan"], result["step_s"], result["step_bytes"]
        rate = statistics.median(moved / seconds for moved, seconds in zip(nbytes, step_s, strict=True)) / 1e9
        flops_per_s = result["prefill_flops"] / result["prefill_s"]
        peak = result["peak_device_bytes"]
        predicted = result["predicted_device_bytes"]
        lines.append({
            "split": f"{plan['split']} of {plan['cached_tokens']}" if plan["offloaded"] else plot.on_device(result),
            "recompute": plan["recompute"] if plan["split"] else "-",
            "resident": str(plan["resident_tokens"]),
            "step (ms)": report.median_ms(step_s),
            "min to max": report.min_to_max(step_s),
            "predicted (ms)": "-" if "plain" in result else report.median_ms(result["predicted_step_s"]),
            "MB a step": f"{statistics.median(nbytes) / 1e6:.1f}",
            "compute alone (ms)": f"{result['compute_s'] * 1e3:.2f}",
            "GB/s": f"{rate:.1f}",
            "step / floor": f"{link_gb_per_s / rate:.3f}" if rate else "-",
            "over l = 0": f"{streamed_s / sum(step_s):.2f}x" if streamed_s else "-",
            "tokens/s": f"{plan['batch'] / statistics.median(step_s):.1f}",
            "prefill (s)": f"{result['prefill_s']:.2f}",
            "of peak": f"{flops_per_s / peak_flops_per_s:.0%}",
            "compile (s)": f"{result['compile_s']:.1f}",
            "pinned / cache": f"{result['pinned_bytes'][-1] / result['cache_host_bytes']:.3f}"
            if result["pinned_bytes"][-1] and result["cache_host_bytes"] else "-",
            "device, predicted (GiB)": f"{predicted / memory.GIB:.2f}",
            "device, peak so far (GiB)": "-" if peak is None else f"{peak / memory.GIB:.2f}",
        })  # fmt: skip
    return lines


def growth(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Whole runs beside their steady states, of those with two flushes or more.

    A steady state is the median step between two flushes, and the mean of a run's is over its steps. It is a mean of
    times: a run of 1 s and 4 s a step takes as long as one of 2.5 s, whose rate is not the mean of the two rates.
    """
    lines = []
    for result in results:
        plan, step_s = result["plan"], result["step_s"]
        if plan["flushes"] < 2:
            continue
        between = [step_s[first : first + plan["tail_tokens"]] for first in range(0, len(step_s), plan["tail_tokens"])]
        steady_s = sum(len(bucket) * statistics.median(bucket) for bucket in between)
        tokens = plan["batch"] * len(step_s)
        lines.append({
            "split": f"{plan['split']} of {plan['cached_tokens']}",
            "recompute": plan["recompute"] if plan["split"] else "-",
            "steps": str(len(step_s)),
            "flushes": str(plan["flushes"]),
            "whole run (tokens/s)": f"{tokens / sum(step_s):.1f}",
            "steady states (tokens/s)": f"{tokens / steady_s:.1f}",
            "whole run / steady states": f"{steady_s / sum(step_s):.3f}",
            "recompiled": str(result["recompiled"]),
            "longest wait (ms)": f"{result['longest_wait_s'] * 1e3:.1f}",
        })  # fmt: skip
    return lines


def parser() -> Parser:
    parser = Parser(
        prog="python -m kvpr_jax.profiling.decode",
        description="Time every decode step of a model with random weights, beside the floor that the link sets.",
    )
    settings.add_options(parser)
    add = parser.add_argument
    add("--split", metavar="N|P%|device|plain", action=settings.Several, default=["0%", "100%"], help="device: all of "
        "the cache stays there; plain: as there, in plain JAX, without kvpr_jax's engines; may be given several times; "
        "default: 0%% and 100%%")  # fmt: skip
    add("--device-cache-gib", metavar="GIB", type=float, help="measure also what the scheduler plans if the device may "
        "hold so much of the cache")  # fmt: skip
    add("--recompute", choices=("auto", "project", "absorb"), action=settings.Several, default=["auto"], help="given "
        "twice, every split but 0 is measured in both ways; default: auto")  # fmt: skip
    add("--engine", choices=get_args(engines.Engine), default="overlapped")
    add("--out", metavar="FILE", type=Path, help="JSON file for every trial, which is replaced if it exists; default: "
        "profiling/results/<gpu>/decode-<model>-batch-<N>-prompt-<N>.json")  # fmt: skip
    add("--plot", metavar="FILE", type=Path, help="draw the report as well, as kvpr_jax.profiling.plot does")
    return parser


def requests(arguments: argparse.Namespace) -> list[Request | None]:
    """What is to be measured, in order; None is plain JAX."""
    found: list[Request | None] = []
    for split in arguments.split:
        if split == "plain":
            found.append(None)
        elif split == "device":
            found.append(Request(engine=arguments.engine, offload="none"))
        else:
            ways = arguments.recompute if split not in ("0", "0%") else arguments.recompute[:1]
            found += [Request(split, way, arguments.engine) for way in ways]
    if arguments.device_cache_gib is not None:
        found += [
            Request("auto", way, arguments.engine, device_cache_gib=arguments.device_cache_gib)
            for way in arguments.recompute
        ]
    return found


def execute(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Carry out a parsed command line and return the exit code."""
    results, steps = [], arguments.new_tokens
    with failing_with(FAILURE):
        setting, wanted = Setting.of(arguments), requests(arguments)
        out = arguments.out or setting.default_out("decode")
        setting.check(out, arguments.plot)
        decoder = setting.decoder()
        prompts = setting.prompts(decoder)
        for request in wanted:
            if request is None:
                results.append(measure_plain(decoder, prompts, steps))
            else:
                results += measure(decoder, prompts, steps, [request])
        # Last, since their buffers would count in the peak of device memory.
        link_gb_per_s, peak_flops_per_s = link.gb_per_s(), matmul.flops_per_s(decoder.dtype)
    lines, runs = rows(results, link_gb_per_s, peak_flops_per_s), growth(results)
    written = setting.report("decode", argv, decoder, arguments.engine) | {
        "link_gb_per_s": link_gb_per_s,
        "peak_flops_per_s": peak_flops_per_s,
        "results": results,
        "growth": runs,
        "table": lines,
    }
    print(
        f"{plot.title(written)}; link {link_gb_per_s:.1f} GB/s, matrix products {peak_flops_per_s / 1e12:.1f} TFLOP/s"
        f"\n\n{report.table(lines)}"
    )
    if runs:
        print(f"\n{report.table(runs)}")
    keep(written, out, arguments.plot)
    return 0


def keep(written: dict[str, Any], out: Path, picture: Path | None = None) -> None:
    """Write a report, and a plot of it if it is to have one, and say so on stderr."""
    note = Reporter(quiet=False).note
    with failing_with(FAILURE):
        report.write(out, written)
        note(f"wrote {out}")
        if picture is not None:
            plot.write(written, picture)
            note(f"wrote {picture}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser().parse_args(argv)
    return command_line.run("kvpr_jax.profiling.decode", lambda: execute(arguments, argv))


if __name__ == "__main__":
    sys.exit(main())
