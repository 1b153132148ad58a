"""Benchmark of the decode step: `python -m kvpr_jax.profiling.decode`. Random weights, greedy tokens, every step timed.

The floor of a step is the bytes that must cross the link over the measured bandwidth of the link; no step that
streams them can be faster.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax import nnx

from kvpr_jax import checkpoint, memory
from kvpr_jax._version import __version__
from kvpr_jax.config import ModelConfig
from kvpr_jax.models import Model, opt
from kvpr_jax.profiling import profile
from kvpr_jax.runtime import Decoder
from kvpr_jax.scheduler import Request

WARM_UP_STEPS = 3  # the first compiles; the others let the allocator settle

OPT_SIZES = {  # layers, width, heads (arXiv 2205.01068, table 1)
    "opt-125m": (12, 768, 12),
    "opt-1.3b": (24, 2048, 32),
    "opt-6.7b": (32, 4096, 32),
    "opt-13b": (40, 5120, 40),
    "opt-30b": (48, 7168, 56),
}


def shape(model: str, layers: int | None) -> ModelConfig:
    """The config of an OPT size by name, or of a directory's config.json; with fewer layers if so asked.

    Raises:
        ValueError: neither.
    """
    if model in OPT_SIZES:
        depth, width, heads = OPT_SIZES[model]
        config: ModelConfig = opt.Config(
            model_type="opt", vocab_size=50272, num_layers=depth, hidden_size=width, num_heads=heads,
            num_kv_heads=heads, head_dim=width // heads, mlp_size=4 * width, max_positions=2048, tie_embeddings=True,
            eos_token_ids=(2,), embed_size=width, norm_first=True, final_norm=True, norm_affine=True, bias=True,
            activation="relu", norm_epsilon=1e-5,
        )  # fmt: skip
    elif Path(model).is_dir():
        config, _ = checkpoint.read_config(Path(model))
    else:
        raise ValueError(f"model {model!r}: neither a directory nor one of {', '.join(OPT_SIZES)}")
    return config if layers is None else dataclasses.replace(config, num_layers=layers)


def measure(decoder: Decoder, batch: int, prompt: int, steps: int, request: Request) -> dict[str, Any]:
    """Prefill twice (compiling, then timed) and time every decode step of one setting."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, decoder.config.vocab_size, (batch, prompt)).tolist()
    plan = decoder.plan(prompts, WARM_UP_STEPS + steps + 1, request)
    prefill_s = []
    for _ in range(2):
        cache = logits = None  # the cache before it is given back first
        begin = time.perf_counter()
        cache, logits = decoder.prefill(prompts, plan)
        jax.block_until_ready((cache.layers, logits))
        prefill_s.append(time.perf_counter() - begin)
    step_s, step_bytes = [], []
    for _ in range(WARM_UP_STEPS + steps):
        fetched, begin = cache.fetched_bytes, time.perf_counter()
        logits = jax.block_until_ready(decoder.step(cache, logits.argmax(-1).astype(jnp.int32)))
        step_s.append(time.perf_counter() - begin)
        step_bytes.append(cache.fetched_bytes - fetched)
    return {
        "plan": dataclasses.asdict(plan),
        "prefill_s": prefill_s,
        "warm_up_step_s": step_s[:WARM_UP_STEPS],
        "step_s": step_s[WARM_UP_STEPS:],
        "step_bytes": step_bytes[WARM_UP_STEPS:],
        "peak_device_bytes": memory.peak_device_bytes(),
        "peak_host_bytes": memory.peak_host_bytes(),
    }


def row(result: dict[str, Any], batch: int, gb_per_s: float) -> dict[str, str]:
    """One line of the table."""
    plan, step_s = result["plan"], statistics.median(result["step_s"])
    nbytes = statistics.median(result["step_bytes"])
    peak = result["peak_device_bytes"]
    return {
        "split": f"{plan['split']} of {plan['cached_tokens']}",
        "recompute": plan["recompute"],
        "step (ms)": f"{step_s * 1e3:.2f}",
        "min to max": f"{min(result['step_s']) * 1e3:.2f} to {max(result['step_s']) * 1e3:.2f}",
        "MB a step": f"{nbytes / 1e6:.1f}",
        "step / floor": f"{step_s / (nbytes / gb_per_s / 1e9):.2f}" if nbytes else "-",
        "tokens/s": f"{batch / step_s:.1f}",
        "prefill (s)": f"{result['prefill_s'][-1]:.2f}",
        "peak device (GiB)": "-" if peak is None else f"{peak / memory.GIB:.2f}",
    }


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(r.values()) for r in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvpr_jax.profiling.decode", description=__doc__)
    parser.add_argument("--model", default="opt-6.7b", help=f"one of {', '.join(OPT_SIZES)}, or a directory")
    parser.add_argument("--layers", type=int, help="only so many layers, where pinned memory is short")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="steps timed, after warm-up")
    parser.add_argument("--split", action="append", help="may be given several times; default: 0%% and 100%%")
    parser.add_argument("--recompute", choices=("auto", "project", "absorb"), default="auto")
    parser.add_argument("--engine", choices=("overlapped", "sequential"), default="overlapped")
    parser.add_argument("--dtype", choices=checkpoint.DTYPES, default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file for every trial")
    arguments = parser.parse_args(argv)
    try:
        config, dtype = shape(arguments.model, arguments.layers), jnp.dtype(arguments.dtype)
        decoder = Decoder(Model(config, dtype=dtype, rngs=nnx.Rngs(0)))
        measured = profile.load_or_measure(config, dtype, arguments.batch)
        size, seconds = measured.to_device[-1]
        gb_per_s = size / seconds / 1e9
        results = []
        for split in arguments.split or ["0%", "100%"]:
            request = Request(split, arguments.recompute, arguments.engine)
            results.append(measure(decoder, arguments.batch, arguments.prompt, arguments.new_tokens, request))
    except (ValueError, MemoryError) as error:
        print(f"kvpr_jax.profiling.decode: error: {error}", file=sys.stderr)
        return 1
    rows = [row(result, arguments.batch, gb_per_s) for result in results]
    report = {
        "command": "python -m kvpr_jax.profiling.decode " + shlex.join(sys.argv[1:] if argv is None else argv),
        "date": datetime.date.today().isoformat(),
        "machine": measured.machine | {"processors": os.cpu_count(), "system": platform.platform()},
        "versions": {"kvpr_jax": __version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__,
                     "flax": flax.__version__, "python": platform.python_version()},
        "link_gb_per_s": gb_per_s,
        "profile": dataclasses.asdict(measured),
        "results": results,
        "table": rows,
    }  # fmt: skip
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{arguments.model}, {config.num_layers} layers, {dtype.name}, batch {arguments.batch}, prompt "
          f"{arguments.prompt}; {measured.machine['device']}, link {gb_per_s:.1f} GB/s\n\n{table(rows)}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
