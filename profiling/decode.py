"""Benchmark of the decode step: `python -m kvpr_jax.profiling.decode`. Random weights, greedy tokens, every step timed.

The floor of a step is the bytes that must cross the link over the measured bandwidth of the link; no step that
streams them can be faster.
"""

import argparse
import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from kvpr_jax import checkpoint, memory
from kvpr_jax.cache import Cache
from kvpr_jax.config import ModelConfig
from kvpr_jax.engines import Overlapped
from kvpr_jax.models import Model, released
from kvpr_jax.profiling import link, matmul, profile, report, timing
from kvpr_jax.runtime import Decoder
from kvpr_jax.scheduler import Plan, Request


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


def measure(decoder: Decoder, prompts: Sequence[Sequence[int]], steps: int, request: Request) -> dict[str, Any]:
    """Prefill and time every decode step of one setting, once all is compiled and the pinned memory is touched."""
    plan = decoder.plan(prompts, steps + 1, request)
    short = shortened(decoder)
    first_s, later_s = (sum_of(run(short, prompts, plan, steps)[0]) for _ in range(2))
    touched = decoder.prefill(prompts, plan)
    jax.block_until_ready((touched[0].layers, touched[1]))
    del touched
    times, cache, logits = run(decoder, prompts, plan, steps)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves((decoder.embedder[1], decoder.params)))
    return {
        "plan": dataclasses.asdict(plan),
        "compile_s": max(0.0, first_s - later_s),
        **times,
        "compute_s": compute_s(decoder, cache, logits),
        "prefill_flops": prefill_flops(decoder, plan),
        "predicted_device_bytes": weights + plan.device_bytes,
        "peak_device_bytes": memory.peak_device_bytes(),
        "peak_host_bytes": memory.peak_host_bytes(),
    }


def shortened(decoder: Decoder) -> Decoder:
    """The same model with two layers: it compiles all that the whole model needs, since layers share one function."""
    short = copy.copy(decoder)
    short.params = decoder.params[:2]
    short.config = dataclasses.replace(decoder.config, num_layers=len(short.params))
    return short


def run(
    decoder: Decoder, prompts: Sequence[Sequence[int]], plan: Plan, steps: int
) -> tuple[dict[str, Any], Cache, Array]:
    """Seconds of prefill and of each greedy step, and the bytes each step fetched; the cache and logits at the end."""
    begin = time.perf_counter()
    cache, logits = decoder.prefill(prompts, plan)
    jax.block_until_ready((cache.layers, logits))
    prefill_s, step_s, step_bytes = time.perf_counter() - begin, [], []
    for _ in range(steps):
        fetched, begin = cache.fetched_bytes, time.perf_counter()
        logits = jax.block_until_ready(decoder.step(cache, logits.argmax(-1).astype(jnp.int32)))
        step_s.append(time.perf_counter() - begin)
        step_bytes.append(cache.fetched_bytes - fetched)
    return {"prefill_s": prefill_s, "step_s": step_s, "step_bytes": step_bytes}, cache, logits


def compute_s(decoder: Decoder, cache: Cache, logits: Array) -> float:
    """Median seconds of a step without the link: every layer reads the first one's segments, which are fetched once."""
    cache.flush()
    cache.layers = [jax.block_until_ready(cache.fetch(0))] * len(cache.layers)
    cache.engine = Overlapped()  # without the copies that are under way
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
            "device, predicted (GiB)": f"{predicted / memory.GIB:.2f}",
            "device, peak so far (GiB)": "-" if peak is None else f"{peak / memory.GIB:.2f}",
        })  # fmt: skip
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m kvpr_jax.profiling.decode", description=__doc__)
    parser.add_argument("--model", default="opt-6.7b", help="a released size (models/README.md), or a directory")
    parser.add_argument("--layers", type=int, help="only so many layers, where pinned memory is short")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="steps timed")
    parser.add_argument("--split", action="append", help="N, P%% or device (all of the cache stays there); may be "
                        "given several times; default: 0%% and 100%%")  # fmt: skip
    parser.add_argument("--recompute", choices=("auto", "project", "absorb"), action="append", help="default: auto; "
                        "given twice, every split but 0 is measured in both ways")  # fmt: skip
    parser.add_argument("--engine", choices=("overlapped", "sequential"), default="overlapped")
    parser.add_argument("--dtype", choices=checkpoint.DTYPES, default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file for every trial")
    arguments = parser.parse_args(argv)
    ways, results = arguments.recompute or ["auto"], []
    try:
        config, dtype = shape(arguments.model, arguments.layers), jnp.dtype(arguments.dtype)
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
    except (ValueError, MemoryError) as error:
        print(f"kvpr_jax.profiling.decode: error: {error}", file=sys.stderr)
        return 1
    lines = rows(results, link_gb_per_s, peak_flops_per_s)
    measured = {
        "link_gb_per_s": link_gb_per_s,
        "peak_flops_per_s": peak_flops_per_s,
        "profile": dataclasses.asdict(profile.load_or_measure(config, dtype, arguments.batch)),
        "results": results,
        "table": lines,
    }
    if arguments.out is not None:
        report.write(arguments.out, report.header("decode", argv) | measured)
    print(
        f"{arguments.model}, {config.num_layers} layers, {dtype.name}, batch {arguments.batch}, prompt "
        f"{arguments.prompt}; {jax.local_devices()[0].device_kind}, link {link_gb_per_s:.1f} GB/s, matrix products "
        f"{peak_flops_per_s / 1e12:.1f} TFLOP/s\n\n{report.table(lines)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
