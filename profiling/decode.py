"""Benchmark of the decode step: `python -m kvpr_jax.profiling.decode`. Random weights, greedy tokens, every step timed.

The floor of a step is the bytes that must cross the link over the measured bandwidth of the link; no step that
streams them can be faster.
"""

import argparse
import copy
import dataclasses
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from kvpr_jax import checkpoint, command_line, engines, memory
from kvpr_jax.cache import Cache
from kvpr_jax.command_line import FAILURE, Parser, Reporter, failing_with
from kvpr_jax.config import ModelConfig
from kvpr_jax.models import Model, released
from kvpr_jax.plan import Plan, Request
from kvpr_jax.profiling import link, matmul, plot, profile, report, timing
from kvpr_jax.runtime import Decoder


def shape(model: str, layers: int | None) -> ModelConfig:
    """The config of a released size by name, or of a config.json or its directory; with fewer layers if so asked.

    Raises:
        ValueError: neither.
    """
    path = Path(model)
    if path.is_dir() or (path.name == "config.json" and path.is_file()):
        config, _ = checkpoint.read_config(path if path.is_dir() else path.parent)
    else:
        config = released.release(model).config
    return config if layers is None else dataclasses.replace(config, num_layers=layers)


def name_of(model: str) -> str:
    """What a model is called in a report: the last part of its name, or its directory's."""
    path = Path(os.path.abspath(model))
    return path.parent.name if path.name == "config.json" else path.name


def measure(decoder: Decoder, prompts: Sequence[Sequence[int]], steps: int, request: Request) -> dict[str, Any]:
    """Prefill and time every decode step of one setting, once all is compiled and the pinned memory is reserved."""
    plan = decoder.plan(prompts, steps + 1, request)
    short = shortened(decoder, plan)
    first_s, later_s = (sum_of(run(short, prompts, plan, steps)[0]) for _ in range(2))
    times, cache, logits = run(decoder, prompts, plan, steps)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves((decoder.embedder[1], decoder.params)))
    return {
        "plan": plan.as_dict(),
        "compile_s": max(0.0, first_s - later_s),
        **times,
        "cache_host_bytes": sum(s.nbytes for layer in range(len(cache.layers)) for s in cache.on_host(layer)),
        "compute_s": compute_s(decoder, cache, logits),
        "prefill_flops": prefill_flops(decoder, plan),
        "predicted_device_bytes": weights + plan.device_bytes,
        "peak_device_bytes": memory.peak_device_bytes(),
        "peak_host_bytes": memory.peak_host_bytes(),
    }


def shortened(decoder: Decoder, plan: Plan) -> Decoder:
    """The same model with few layers: it compiles all that the whole model needs, since layers share one function."""
    short = copy.copy(decoder)
    short.params = decoder.params[: 2 if plan.offloaded else engines.group(len(decoder.params))]
    short.config = dataclasses.replace(decoder.config, num_layers=len(short.params))
    return short


def run(
    decoder: Decoder, prompts: Sequence[Sequence[int]], plan: Plan, steps: int
) -> tuple[dict[str, Any], Cache, Array]:
    """Seconds of prefill and of each greedy step, the bytes each step fetched, and the memory taken after each; the
    cache and logits at the end."""
    begin = time.perf_counter()
    cache, logits = decoder.prefill(prompts, plan)
    jax.block_until_ready((cache.layers, logits))
    prefill_s, step_s, step_bytes, taken = time.perf_counter() - begin, [], [], []
    for _ in range(steps):
        fetched, begin = cache.fetched_bytes, time.perf_counter()
        logits = jax.block_until_ready(decoder.step(cache, logits.argmax(-1).astype(jnp.int32)))
        step_s.append(time.perf_counter() - begin)
        step_bytes.append(cache.fetched_bytes - fetched)
        taken.append((*memory.resident_bytes(), memory.device_bytes_in_use()))
    names = ("pinned_bytes", "other_host_bytes", "device_bytes")
    after = {name: list(column) for name, column in zip(names, zip(*taken, strict=True), strict=True)}
    return {"prefill_s": prefill_s, "step_s": step_s, "step_bytes": step_bytes} | after, cache, logits


def compute_s(decoder: Decoder, cache: Cache, logits: Array) -> float:
    """Median seconds of a step without the link: every layer reads the first one's segments, which are fetched once."""
    cache.layers = [jax.block_until_ready(cache.fetch(0))] * len(cache.layers)
    kind = engines.Overlapped if isinstance(cache.engine, engines.Overlapped) else engines.Resident
    cache.plan = dataclasses.replace(cache.plan, offloaded=False)  # so that the full tails stay on the device
    cache.flush()
    cache.engine = kind()  # without the copies that are under way
    tokens = logits.argmax(-1).astype(jnp.int32)
    return timing.median_s(lambda: decoder.step(cache, tokens), trials=min(5, cache.plan.tail_tokens - 2))


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
    return plan["offloaded"] and plan["split"] == 0


def rows(results: list[dict[str, Any]], link_gb_per_s: float, peak_flops_per_s: float) -> list[dict[str, str]]:
    """The lines of the table. The floor is a step's bytes over the link's bandwidth."""
    medians = [statistics.median(result["step_s"]) for result in results]
    streamed = next((s for s, r in zip(medians, results, strict=True) if is_streamed(r["plan"])), None)
    lines = []
    for step_s, result in zip(medians, results, strict=True):
        plan, nbytes = result["plan"], statistics.median(result["step_bytes"])
        flops_per_s = result["prefill_flops"] / result["prefill_s"]
        peak = result["peak_device_bytes"]
        predicted = result["predicted_device_bytes"]
        lines.append({
            "split": f"{plan['split']} of {plan['cached_tokens']}" if plan["offloaded"] else "all on the device",
            "recompute": plan["recompute"] if plan["split"] else "-",
            "step (ms)": f"{step_s * 1e3:.2f}",
            "min to max": f"{min(result['step_s']) * 1e3:.2f} to {max(result['step_s']) * 1e3:.2f}",
            "predicted (ms)": f"{plan['predicted_step_s'] * 1e3:.2f}",
            "MB a step": f"{nbytes / 1e6:.1f}",
            "compute alone (ms)": f"{result['compute_s'] * 1e3:.2f}",
            "GB/s": f"{nbytes / step_s / 1e9:.1f}",
            "step / floor": f"{step_s / (nbytes / link_gb_per_s / 1e9):.3f}" if nbytes else "-",
            "over l = 0": f"{streamed / step_s:.2f}x" if streamed else "-",
            "tokens/s": f"{plan['batch'] / step_s:.1f}",
            "prefill (s)": f"{result['prefill_s']:.2f}",
            "of peak": f"{flops_per_s / peak_flops_per_s:.0%}",
            "compile (s)": f"{result['compile_s']:.1f}",
            "pinned / cache": f"{result['pinned_bytes'][-1] / result['cache_host_bytes']:.3f}"
            if result["pinned_bytes"][-1] and result["cache_host_bytes"] else "-",
            "device, predicted (GiB)": f"{predicted / memory.GIB:.2f}",
            "device, peak so far (GiB)": "-" if peak is None else f"{peak / memory.GIB:.2f}",
        })  # fmt: skip
    return lines


def default_out(model: str, arguments: argparse.Namespace) -> Path:
    """The report's file, under the current directory."""
    layers = "" if arguments.layers is None else f"-layers-{arguments.layers}"
    name = f"decode-{dashed(model)}-batch-{arguments.batch}-prompt-{arguments.prompt}{layers}.json"
    return Path("profiling/results", dashed(jax.local_devices()[0].device_kind), name)


def dashed(text: str) -> str:
    """In lower case, with dashes between words: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def add_setting_options(parser: Parser) -> None:
    """What is measured: the model's shape, the batch, and how many steps."""
    add = parser.add_argument
    add("--model", default="opt-6.7b", help="a released size (models/README.md), or a directory")
    add("--layers", metavar="N", type=int, help="only so many layers, where host memory is short")
    add("--batch", metavar="N", type=int, default=32)
    add("--prompt", metavar="N", type=int, default=1024, help="tokens of each prompt")
    add("--new-tokens", metavar="N", type=int, default=64, help="steps timed")
    add("--dtype", choices=checkpoint.DTYPES, default="bfloat16")


def parser() -> Parser:
    parser = Parser(
        prog="python -m kvpr_jax.profiling.decode",
        description="Time every decode step of a model with random weights, beside the floor that the link sets.",
    )
    add_setting_options(parser)
    add = parser.add_argument
    add("--split", metavar="N|P%|device", action="append", help="device: all of the cache stays there; may be given "
        "several times; default: 0%% and 100%%")  # fmt: skip
    add("--recompute", choices=("auto", "project", "absorb"), action="append", help="default: auto; given twice, every "
        "split but 0 is measured in both ways")  # fmt: skip
    add("--engine", choices=get_args(engines.Engine), default="overlapped")
    add("--out", metavar="FILE", type=Path, help="JSON file for every trial, which is replaced if it exists; default: "
        "profiling/results/<gpu>/decode-<model>-batch-<N>-prompt-<N>.json")  # fmt: skip
    add("--plot", metavar="FILE", type=Path, help="draw the report as well, as kvpr_jax.profiling.plot does")
    return parser


def execute(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Carry out a parsed command line and return the exit code."""
    model, dtype = name_of(arguments.model), jnp.dtype(arguments.dtype)
    ways, results = arguments.recompute or ["auto"], []
    out = arguments.out or default_out(model, arguments)
    with failing_with(FAILURE):
        config = shape(arguments.model, arguments.layers)
        if arguments.new_tokens < 1:
            raise ValueError(f"new-tokens {arguments.new_tokens} must be at least 1: it is the number of steps timed")
        if arguments.plot is not None:
            plot.check(arguments.plot)
        report.prepare(out)
        positions = arguments.prompt + arguments.new_tokens + 16  # random weights: any number will do
        config = dataclasses.replace(config, max_positions=max(config.max_positions, positions))
        decoder = Decoder(Model(config, dtype=dtype, rngs=nnx.Rngs(0)))
        rng = np.random.default_rng(0)
        prompts = rng.integers(3, config.vocab_size, (arguments.batch, arguments.prompt)).tolist()
        for split in arguments.split or ["0%", "100%"]:
            for way in ways if split not in ("0", "0%", "device") else ways[:1]:
                on_device = Request(engine=arguments.engine, offload="none")
                request = on_device if split == "device" else Request(split, way, arguments.engine)
                results.append(measure(decoder, prompts, arguments.new_tokens, request))
        # Last, since their buffers would count in the peak of device memory.
        link_gb_per_s, peak_flops_per_s = link.gb_per_s(), matmul.flops_per_s(dtype)
    lines = rows(results, link_gb_per_s, peak_flops_per_s)
    written = report.header("decode", argv) | {
        "setting": {
            "model": model,
            "layers": config.num_layers,
            "dtype": dtype.name,
            "batch": arguments.batch,
            "prompt": arguments.prompt,
            "engine": arguments.engine,
        },
        "link_gb_per_s": link_gb_per_s,
        "peak_flops_per_s": peak_flops_per_s,
        "profile": dataclasses.asdict(profile.load_or_measure(config, dtype, arguments.batch)),
        "results": results,
        "table": lines,
    }
    print(
        f"{plot.title(written)}; link {link_gb_per_s:.1f} GB/s, matrix products {peak_flops_per_s / 1e12:.1f} TFLOP/s"
        f"\n\n{report.table(lines)}"
    )
    note = Reporter(quiet=False).note
    with failing_with(FAILURE):
        report.write(out, written)
        note(f"wrote {out}")
        if arguments.plot is not None:
            plot.write(written, arguments.plot)
            note(f"wrote {arguments.plot}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser().parse_args(argv)
    return command_line.run("kvpr_jax.profiling.decode", lambda: execute(arguments, argv))


if __name__ == "__main__":
    sys.exit(main())
