"""Plans for a GPU that is not there: `python -m kvpr_jax.profiling.simulated` says what each device would gain.

`--write` derives the shipped devices from the committed measurements and datasheets, and writes them to devices/ with
the page that says how far to trust them.
"""

import argparse
import dataclasses
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import jax.numpy as jnp

from kvpr_jax import checkpoint, command_line
from kvpr_jax.command_line import FAILURE, Parser, failing_with
from kvpr_jax.costs import Held, buckets
from kvpr_jax.models.attention import Recompute
from kvpr_jax.plan import Request, Workload
from kvpr_jax.profiling import derived, report, settings
from kvpr_jax.profiling.device import DEVICES, Weights, given, shipped
from kvpr_jax.profiling.report import table
from kvpr_jax.runtime import UNLIMITED
from kvpr_jax.scheduler import make_plan

MODULE = "kvpr_jax.profiling.simulated"
MODELS = ("opt-6.7b", "opt-13b", "opt-30b", "llama-2-7b", "llama-2-13b", "llama-3-8b")
WAYS = get_args(Recompute)
FIGURES = {  # what is shown of a device: heading, unit
    "link_bytes_per_s": ("link (GB/s)", 1e9),
    "flops_per_s": ("matrix products (TFLOP/s)", 1e12),
    "weights_bytes_per_s": ("weights (GB/s)", 1e9),
    "keys_values_bytes_per_s": ("keys and values (GB/s)", 1e9),
    "activations_bytes_per_s": ("absorbed activations (GB/s)", 1e9),
    "layer_s": ("layer (ms)", 1e-3),
    "absorb_s": ("absorbing (ms)", 1e-3),
    "head_s": ("embedding and LM head (ms)", 1e-3),
    "dispatch_s": ("issuing a layer (ms)", 1e-3),
    "layer_dispatch_s": ("a further layer (ms)", 1e-3),
    "segment_dispatch_s": ("a segment (ms)", 1e-3),
    "issue_s": ("a copy (ms)", 1e-3),
    "compile_s": ("compiling (s)", 1.0),
}
MEASURED: dict[str, Callable[[Mapping[str, Any]], float]] = {  # what is shown of a profile
    "layer": lambda profile: profile["base_s"],
    "token as keys and values": lambda profile: derived.segment_line(profile["keys_values"])[1],
    "token, project": lambda profile: derived.segment_line(profile["project"])[1],
    "token, absorb": lambda profile: derived.segment_line(profile["absorb"])[1],
    "absorbing": lambda profile: derived.segment_line(profile["absorb"])[0],
    "embedding and LM head": lambda profile: profile["head_s"],
}

HEADER = """\
This page and the JSON files beside it are what `{command}` writes.

# Simulated devices

A plan follows from a model's shape, the workload and a machine profile. The profile can be that of a GPU that is not
there: a file of this folder holds what a device achieves, and [device.py](../device.py) computes from it the profile of
any model and batch, by the formulas at its head. One is measured; the others are **synthetic**: nobody has run kvpr_jax
on them, and what they give is an estimate.

## What each would gain

Split and speed-up over streaming all of the cache (l = 0) as the plan chooses them, with each way to recompute, and as
the paper's own formula has it over its own l = 0: the activations cross first, and are projected beside the rest
(`Costs.two_phase_step_s`). Where the activations of a model are no smaller than its keys and values, as with grouped
queries, all of the cache is streamed. Weights must fit the device, since only the cache is offloaded.

{setting}:

{gains}

## What the devices achieve

What [device.py](../device.py) takes. GB is 1e9 bytes, of memory too: a datasheet's GB may be more.

{achieved}

Sources:

{sources}

### Measured

The figures of the H200 invert the formulas for the profile in each report of the decode benchmark in
[results](../results/nvidia-h200/README.md), all in bfloat16, and are the medians of these:

{inverted}

- Reading weights: the time of a layer with next to no cache is a line through the bytes of a layer of all reports.
- The link: large copies, which the benchmark measures beside the steps. In a step, copies are issued ahead and queue
  one behind the other, so that one costs no more than its bytes.
- The head, and absorbing: the medians of what the measured times have left once the weights are read. A segment's time
  beside its tokens is on the line through the shortest one and the longest. Profiles older than version 15 measured the
  head as fast as the host issues it.
- Absorbed activations spread most: in rotary models the keys are formed beside them, and what that leaves for reading
  activations is three times as long.

### Synthetic

The peaks of a datasheet, times the shares of its own peaks that the H200 reached:

{shares}

Times that do not follow from bytes or FLOPs are those of the H200, since the host sets most of them. Other hosts, cards
that slow down under load, and slots with fewer lanes are not accounted for.

## How far to trust them

The H200 as measured, and the error of what the device above gives. It was derived from the same reports, so this is a
test of the formulas and of the spread between runs, not of other machines. First the measured profiles, in µs; a token
is one more in each sequence's cache:

{profiles}

Then the steps, by the cost model. Small errors of what hides behind the link leave no trace here:

{steps}

With the cache on the host, the error is {median} in the median and {most} at most.
"""


def gains(name: str, model: str, dtype: jnp.dtype, workload: Workload) -> dict[str, str]:
    """What a device would gain with a model whose cache is all on the host: a row of the table.

    Raises:
        ValueError: as `given` and `settings.shape` do.
    """
    config = settings.shape(model, None)
    found, memory_bytes = given(name, config, dtype, workload.batch)
    row = {"device": found.machine["device"], "model": settings.name_of(model)}
    columns = ("l = 0 (ms)", *WAYS, "paper's formula")
    free = memory_bytes - Weights.of(config, dtype).model_bytes
    if free < 0:
        return row | dict(zip(columns, ("weights do not fit", "-", "-", "-"), strict=True))
    try:
        plans = [
            make_plan(config, dtype, workload, Request(offload="all", recompute=way), found, free, UNLIMITED)
            for way in WAYS
        ]
    except MemoryError:
        return row | dict(zip(columns, ("no room beside the weights", "-", "-", "-"), strict=True))
    costs, tokens = plans[0].costs, workload.prompt_tokens
    streamed_s = costs.step_s(Held(0, tokens), "project", "overlapped")
    paper_s = {split: costs.two_phase_step_s(split, tokens - split) for split in buckets(tokens)}
    split = min(paper_s, key=lambda split: paper_s[split])
    cells = [
        f"{streamed_s * 1e3:.1f}",
        *(f"{plan.split}, {streamed_s / plan.predicted_step_s:.2f}x" for plan in plans),
        f"{split}, {paper_s[0] / paper_s[split]:.2f}x",
    ]
    return row | dict(zip(columns, cells, strict=True))


def page(argv: Sequence[str], setting: str, gained: str) -> str:
    """The page of the shipped devices.

    Args:
        argv: what the command was given.
        setting, gained: as it prints them.
    """
    reports, devices = derived.reports(), derived.devices()
    h200 = devices[0]
    profiles, steps, errors = [], [], []
    for each in reports:
        found = h200.profile(each.config, each.dtype, each.batch)
        profiles.append({"report": each.name} | {
            heading: _beside(*map(seconds, (each.profile, vars(found)))) for heading, seconds in MEASURED.items()
        })  # fmt: skip
        for result in each.results:
            plan, measured_s, predicted_s = result["plan"], each.step_s(result), each.predicted_s(result, h200)
            error = predicted_s / measured_s - 1
            if plan["offloaded"]:
                errors.append(abs(error))
            steps.append({
                "report": each.name,
                "split": f"{plan['split']} of {plan['cached_tokens']}" if plan["offloaded"] else "all on the device",
                "recompute": plan["recompute"] if plan["split"] else "-",
                "measured (ms)": f"{measured_s * 1e3:.2f}",
                "predicted (ms)": f"{predicted_s * 1e3:.2f}",
                "error": f"{error:+.1%}",
            })  # fmt: skip
    shares = {FIGURES[name][0].split(" (")[0]: f"{share:.0%}" for name, share in derived.shares(h200).items()}
    return HEADER.format(
        command=shlex.join(["python", "-m", MODULE, *argv]),
        setting=setting,
        gains=gained,
        achieved=table([{"device": each.name} | _figures(vars(each)) for each in devices]),
        sources="\n".join(f"- {'**synthetic** ' * each.synthetic}{each.name}: {each.source}." for each in devices),
        inverted=table([{"report": each.name} | _figures(each.rates()) for each in reports]),
        shares=table([shares]),
        profiles=table(profiles),
        steps=table(steps),
        median=f"{statistics.median(errors):.1%}",
        most=f"{max(errors):.1%}",
    )


def _beside(measured_s: float, found_s: float) -> str:
    """A measured time in µs, and the error of what was found; 0 is less than the noise, and has none."""
    return f"{measured_s * 1e6:.3g}" + (f", {found_s / measured_s - 1:+.0%}" if measured_s else "")


def _figures(values: Mapping[str, Any]) -> dict[str, str]:
    """Cells of those of `FIGURES` that there are."""
    return {label: f"{values[name] / unit:.4g}" for name, (label, unit) in FIGURES.items() if name in values}


def parser() -> Parser:
    parser = Parser(
        prog=f"python -m {MODULE}",
        description="What recompute would gain on GPUs that are not here, by their profiles.",
    )
    add = parser.add_argument
    add("--profile", metavar="NAME_OR_FILE", action="append", help="a device of profiling/devices/, a file like those, "
        "or a stored profile of this model, dtype and batch; may be given several times; default: all of the "
        "first")  # fmt: skip
    add("--model", metavar="NAME_OR_DIR", action="append", help="a released size (models/README.md), or a directory; "
        f"may be given several times; default: {', '.join(MODELS)}")  # fmt: skip
    add("--batch", metavar="N", type=int, default=32)
    add("--prompt", metavar="N", type=int, default=1024, help="tokens of each prompt")
    add("--dtype", choices=checkpoint.DTYPES, default="bfloat16")
    add("--write", action="store_true", help="derive the devices anew, and write them and their page to "
        "profiling/devices/; in a checkout only")  # fmt: skip
    return parser


def execute(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Carry out a parsed command line and return the exit code."""
    with failing_with(FAILURE):
        for name in ("batch", "prompt"):
            if getattr(arguments, name) < 1:
                raise ValueError(f"{name} {getattr(arguments, name)} must be at least 1")
        if arguments.write:
            for each in derived.devices():
                report.write(DEVICES / f"{settings.dashed(each.name)}.json", dataclasses.asdict(each))
        dtype, workload = jnp.dtype(arguments.dtype), Workload(arguments.batch, arguments.prompt, new_tokens=1)
        gained = table([
            gains(name, model, dtype, workload)
            for name in arguments.profile or shipped()
            for model in arguments.model or MODELS
        ])  # fmt: skip
        setting = (
            f"{dtype.name}, batch {workload.batch}, prompt {workload.prompt_tokens}, all of the cache in host memory "
            "without a limit"
        )
        if arguments.write:
            (DEVICES / "README.md").write_text(page(argv, setting, gained))
    print(f"{setting}\n\n{gained}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser().parse_args(argv)
    return command_line.run(MODULE, lambda: execute(arguments, argv))


if __name__ == "__main__":
    sys.exit(main())
