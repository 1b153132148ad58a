"""The machine profile of a model's shape: `python -m kvpr_jax.profiling` measures, stores and prints it."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from kvpr_jax import checkpoint, command_line, memory
from kvpr_jax.command_line import FAILURE, Parser, Reporter, failing_with
from kvpr_jax.profiling import link, measure, nvidia, profile, settings
from kvpr_jax.profiling.profile import Profile
from kvpr_jax.profiling.report import table


def machine_rows() -> list[dict[str, str]]:
    """This machine as it is now."""
    lines = {
        "device": jax.local_devices()[0].device_kind,
        "driver": nvidia.driver(),
        "link": nvidia.pcie(),
        "cores": str(os.cpu_count()),
        "free device memory": f"{memory.free_device_bytes() / memory.GIB:.2f} GiB",
        "free pinned host memory": f"{memory.free_pinned_bytes() / memory.GIB:.2f} GiB",
    }
    return [{"machine": name, "now": value} for name, value in lines.items()]


def copy_rows(measured: Profile) -> list[dict[str, str]]:
    """Copies by size."""
    ways = {
        "to the device": measured.to_device,
        "to the host": measured.to_host,
        "both at once, each way": measured.both,
    }

    def cell(size: int, seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e3:.3f} ms, {size / seconds / 1e9:.1f} GB/s"

    sizes = sorted({size for times in ways.values() for size, _ in times})
    return [
        {"copy": f"{size / link.MIB:g} MiB"} | {way: cell(size, dict(times).get(size)) for way, times in ways.items()}
        for size in sizes
    ]


def layer_rows(measured: Profile) -> list[dict[str, str]]:
    """Compute of a decode step."""
    seconds = {
        "a layer, its cache a short tail": measured.base_s,
        "and each further layer of a call": measured.further_s,
        "of a layer, the MLP": measured.mlp_s,
        **{
            f"{tokens} tokens as {form}": added_s
            for form, curve in (
                ("keys and values", measured.keys_values),
                ("activations, project", measured.project),
                ("activations, absorb", measured.absorb),
            )
            for tokens, added_s in curve
        },
        "head: embedding, logits, next token": measured.head_s,
        "the host issues a layer's step in": measured.dispatch_s,
        "and each further layer's of a call": measured.layer_dispatch_s,
        "for each segment of a layer it needs": measured.segment_dispatch_s,
        "the host issues one of several copies in": measured.issue_s,
        "compiling a layer": measured.compile_s,
    }
    lines = [{"compute": name, "ms": f"{value * 1e3:.3f}"} for name, value in seconds.items()]
    return [*lines, {"compute": "for each ms of copies beside it, longer by", "ms": f"{measured.beside_copies:.3f}"}]


def default_dtype(model: str) -> str:
    """What the commands take: a directory's own, bfloat16 for a released size; float32 on a CPU."""
    path = Path(model)
    path = path.parent if path.name == "config.json" else path
    if path.is_dir():
        return checkpoint.default_dtype(checkpoint.read_config(path)[1])
    return "float32" if memory.device_memory_is_host_memory() else "bfloat16"


def parser() -> Parser:
    parser = Parser(
        prog="python -m kvpr_jax.profiling",
        description="Measure what this machine takes to copy and compute for a model's shape, store it for the plans "
        "of later runs, and print it.",
    )
    add = parser.add_argument
    add("--model", metavar="NAME_OR_DIR", default=str(checkpoint.BUNDLED), help="a released size "
        "(models/README.md), or a directory; default: the bundled model")  # fmt: skip
    add("--dtype", choices=checkpoint.DTYPES, help="default: a directory's own, bfloat16 for a released size; float32 "
        "on a CPU")  # fmt: skip
    add("--batch", metavar="N", type=int, default=1, help="sequences decoded together; default: 1")
    add("--show", action="store_true", help="print what is stored and measure nothing")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    """Carry out a parsed command line and return the exit code."""
    report = Reporter(quiet=False)
    with failing_with(FAILURE):
        if arguments.batch < 1:
            raise ValueError(f"batch {arguments.batch} must be at least 1")
        config = settings.shape(arguments.model, None)
        dtype = jnp.dtype(arguments.dtype or default_dtype(arguments.model))
        setting = ["--model", arguments.model, "--dtype", dtype.name, "--batch", str(arguments.batch)]
        key = profile.machine(config, dtype, arguments.batch)
        path = profile.path_of(key)
        measured = profile.read(path, key)
        if not arguments.show:
            begin = time.perf_counter()
            with report.bar("Measuring") as progress:
                measured = measure.measure(config, dtype, arguments.batch, progress)
            report.note(f"measured in {time.perf_counter() - begin:.1f} s")
        elif measured is None:
            command = shlex.join(["python", "-m", "kvpr_jax.profiling", *setting])
            raise ValueError(f"this machine has no profile for that model, dtype and batch yet: {command} makes it")
    print(f"{settings.name_of(arguments.model)}, {dtype.name}, batch {arguments.batch}\n")
    copies = table(copy_rows(measured))
    if "| - |" in copies:
        copies += "\n\nA dash stands for copies that were not measured: no plan is made from them."
    print("\n\n".join([table(machine_rows()), copies, table(layer_rows(measured))]))
    if memory.device_memory_is_host_memory():
        print("\nThere is no GPU: the CPU computes, copies stay within host memory, and both kinds of it are the same.")
    if not arguments.show:
        try:
            profile.write(path, measured)
        except OSError as error:
            raise command_line.Failure(f"{str(path)!r} cannot be written: {error}", FAILURE) from error
        report.note(f"stored in {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    return command_line.run("kvpr_jax.profiling", lambda: execute(arguments))


if __name__ == "__main__":
    sys.exit(main())
