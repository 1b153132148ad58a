"""Hugging Face transformers' decoding beside ours: `python -m kvpr_jax.profiling.rivals`. Needs torch and a CUDA GPU.

The same shape, batch and prompts, random weights, greedy tokens, every step timed. One process a framework, since each
one's allocator keeps its memory: ours is `kvpr_jax.profiling.decode` in a process of its own, which ends before torch
takes any; JAX has no backend in this one.
"""

import argparse
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from kvpr_jax import checkpoint, memory
from kvpr_jax.command_line import FAILURE, Failure, Parser, Reporter, failing_with, run
from kvpr_jax.models import released
from kvpr_jax.profiling import plot, report, settings

CACHES = ("offloaded", "offloaded_static", "static", "dynamic")  # transformers' names; the last two stay on the GPU
DEFAULT_CACHES = CACHES[:3]
WARM_UP_TOKENS = 3


def cuda() -> str:
    """The name of torch's device to measure on.

    Raises:
        Failure: no torch, or no GPU that it can use.
    """
    try:
        import torch
    except ImportError as error:
        raise Failure(f"torch cannot be imported ({error}): pip install '.[torch]'", FAILURE) from None
    if not torch.cuda.is_available():
        needed = "needed are an NVIDIA GPU and a torch built for CUDA, pip install '.[torch]'"
        raise Failure(f"torch {torch.__version__} sees no CUDA GPU: {needed}", FAILURE)
    return "cuda"


def shape(model: str, layers: int | None, positions: int) -> Any:
    """What `settings.shape` gives, as a config of transformers with room for so many positions.

    Raises:
        ValueError: neither a released size nor a config.json or its directory.
    """
    path = Path(model)
    if path.exists():
        _, hf = checkpoint.read_config(path.parent if path.name == "config.json" else path)
    else:
        hf = released.release(model).hf
    if layers is not None:
        hf.num_hidden_layers = layers
        if getattr(hf, "layer_types", None):  # Qwen's: one a layer
            hf.layer_types = hf.layer_types[:layers]
    if hasattr(hf, "max_position_embeddings"):  # BLOOM has no such limit
        hf.max_position_embeddings = max(hf.max_position_embeddings, positions)
    return hf


def decode_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `kvpr_jax.profiling.decode` writes for this setting, measured in a process of its own.

    Raises:
        Failure: it did not end well, JAX without a GPU included; what it said comes before on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="kvpr_jax-rivals-") as directory:
        out = Path(directory) / "decode.json"
        command = [sys.executable, "-m", "kvpr_jax.profiling.decode", "--split", "0%", "--split", "100%"]
        for name in ("model", "layers", "batch", "prompt", "new_tokens", "dtype"):
            if (value := getattr(arguments, name)) is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": "cuda"}
        done = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, end="", file=sys.stderr)
            raise Failure(f"kvpr_jax.profiling.decode ended with exit code {done.returncode}", FAILURE)
        return json.loads(out.read_text())


def measure(hf: Any, device: str, dtype: str, prompts: list[list[int]], steps: int, cache: str) -> dict[str, Any]:
    """Prefill and time every decode step with one of transformers' caches; a step ends when its token is known."""
    import torch

    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(hf, dtype=getattr(torch, dtype)).eval()
        tokens = torch.tensor(prompts)
    stamps: list[float] = []

    def stamp(tokens: Any, scores: Any, **_: Any) -> Any:
        """A stopping criterion, which is asked after each token, and never stops."""
        if device == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        return torch.zeros(len(tokens), dtype=torch.bool, device=device)

    def generate(new_tokens: int) -> None:
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
            stopping_criteria=transformers.StoppingCriteriaList([stamp]),
        )

    generate(WARM_UP_TOKENS)
    stamps.clear()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    generate(steps + 1)  # the first one is the prompt's
    return {
        "prefill_s": stamps[0] - begin,
        "step_s": np.diff(stamps).tolist(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def trial(hf: Any, device: str, dtype: str, prompts: list[list[int]], steps: int, cache: str) -> dict[str, Any]:
    """What `measure` gives, or the first line of its error; device memory is free again in either case."""
    import torch

    try:
        return {"cache": cache} | measure(hf, device, dtype, prompts, steps, cache)
    except Exception as error:  # out of memory, or a cache that does not go with the model: the others may
        return {"cache": cache, "error": ": ".join([type(error).__name__, *str(error).splitlines()[:1]])}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def rows(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], batch: int) -> list[dict[str, str]]:
    """The lines of the table: results of `decode`, then `trial`s, each over the best median of ours."""
    best_s = min(statistics.median(result["step_s"]) for result in ours)
    lines = []
    for result in [*ours, *theirs]:
        plan = result.get("plan")
        line = {
            "decoder": "kvpr_jax" if plan else "transformers",
            "cache": f"{plan['split']} of {plan['cached_tokens']} as activations" if plan else result["cache"],
        }
        if "error" in result:
            lines.append(line | {"step (ms)": result["error"]} | dict.fromkeys(list(lines[0])[3:], "-"))
            continue
        step_s, peak = statistics.median(result["step_s"]), result["peak_device_bytes"]
        lines.append(line | {
            "step (ms)": f"{step_s * 1e3:.2f}",
            "min to max": f"{min(result['step_s']) * 1e3:.2f} to {max(result['step_s']) * 1e3:.2f}",
            "tokens/s": f"{batch / step_s:.1f}",
            "prefill (s)": f"{result['prefill_s']:.2f}",
            "device, peak (GiB)": "-" if peak is None else f"{peak / memory.GIB:.2f}",
            "kvpr_jax is faster by": "-" if plan else f"{step_s / best_s:.2f}x",
        })  # fmt: skip
    return lines


def parser() -> Parser:
    parser = Parser(
        prog="python -m kvpr_jax.profiling.rivals",
        description="Time every decode step of Hugging Face transformers and of kvpr_jax on the same shape and batch.",
    )
    settings.add_options(parser)
    add = parser.add_argument
    add("--cache", choices=CACHES, action="append", help="transformers' cache_implementation, not compiled; may be "
        f"given several times; default: {', '.join(DEFAULT_CACHES)}")  # fmt: skip
    add("--out", metavar="FILE", type=Path, help="JSON file for every trial, which is replaced if it exists")
    return parser


def execute(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Carry out a parsed command line and return the exit code."""
    device = cuda()
    with failing_with(FAILURE):
        hf = shape(arguments.model, arguments.layers, arguments.prompt + arguments.new_tokens + 1)
        if arguments.out is not None:
            report.prepare(arguments.out)
    ours = decode_report(arguments)
    prompts = np.random.default_rng(0).integers(3, hf.vocab_size, (arguments.batch, arguments.prompt)).tolist()
    theirs = [
        trial(hf, device, arguments.dtype, prompts, arguments.new_tokens, cache)
        for cache in arguments.cache or DEFAULT_CACHES
    ]
    lines = rows(ours["results"], theirs, arguments.batch)
    print(f"{plot.title(ours)}\n\n{report.table(lines)}")
    if arguments.out is not None:
        # Not `report.header`: it would start JAX's backend.
        written = {"command": f"python -m kvpr_jax.profiling.rivals {shlex.join(argv)}"}
        written |= {name: ours[name] for name in ("date", "machine", "versions", "setting")}
        with failing_with(FAILURE):
            own = {name: value for name, value in ours.items() if name != "command"}  # it names a folder that is gone
            report.write(arguments.out, written | {"kvpr_jax": own, "transformers": theirs, "table": lines})
        Reporter(quiet=False).note(f"wrote {arguments.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser().parse_args(argv)
    return run("kvpr_jax.profiling.rivals", lambda: execute(arguments, argv))


if __name__ == "__main__":
    sys.exit(main())
