"""XLA's asynchronous copies against CUDA streams: `python -m kvpr_jax.profiling.overlap`.

One decode step of the same OPT layers over the same segments, as XLA runs it in each form that its copies can take
(`xla_copies.py`) and as PyTorch runs it with a copy stream and events (`cuda_streams.py`). Each framework has a process
of its own; they measure in turns. For each variant: the step's copies alone, its compute alone, and both together.

    overlap efficiency = (copy + compute - both) / min(copy, compute)        1: the shorter one is hidden entirely
    floor              = bytes over the link / its bandwidth as measured in the same run, the better of the two sides'
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from kvpr_jax import checkpoint
from kvpr_jax.command_line import FAILURE, Failure, Parser, Reporter, failing_with, run
from kvpr_jax.models import opt
from kvpr_jax.plan import Request
from kvpr_jax.profiling import nvidia, plot, report, settings, timeline

TAIL_TOKENS = 64  # on the device, half of them written
WARM_UP, TRIALS = 2, 7
ROUNDS = 2  # turns of each framework
SIDES = ("cuda_streams", "xla_copies")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One step of an OPT model to measure; `split` of the `prompt`'s tokens are held as activations."""

    model: str
    layers: int
    hidden: int
    heads: int
    mlp: int
    batch: int
    prompt: int
    split: int
    recompute: str
    dtype: str

    @property
    def link_bytes(self) -> int:
        """Bytes that cross the link in a step."""
        widths = self.split * self.hidden + (self.prompt - self.split) * 2 * self.hidden
        return self.layers * self.batch * widths * (4 if self.dtype == "float32" else 2)


@dataclasses.dataclass
class Measured:
    """One variant's trials, in seconds, and what the device did in one step."""

    variant: str
    copy_s: list[float]
    compute_s: list[float]
    both_s: list[float]
    issue_s: list[float]
    spans: list[timeline.Span]

    @property
    def efficiency(self) -> float:
        """The share of the shorter of copies and compute that is hidden by the other."""
        copy, compute, both = map(statistics.median, (self.copy_s, self.compute_s, self.both_s))
        return (copy + compute - both) / min(copy, compute)


def serve(
    make: Callable[[Setting], Any], measure: Callable[[Any], list[Measured]], link_gb_per_s: Callable[[], float]
) -> None:
    """A side's process: the link's bandwidth once, then a line of results for each line with a setting.

    Args:
        make: what a setting needs, kept for as long as the setting stays the same.
        measure: the variants, on what was made.
    """
    results, sys.stdout = sys.stdout, sys.stderr  # so that nothing else gets between the lines
    print(json.dumps(link_gb_per_s()), file=results, flush=True)
    setting = made = None
    for line in sys.stdin:
        asked = Setting(**json.loads(line))
        if asked != setting:
            made = None  # first, so that there is room
            setting, made = asked, make(asked)
        measured = measure(made)
        print(json.dumps([dataclasses.asdict(each) for each in measured]), file=results, flush=True)


@contextlib.contextmanager
def side(module: str) -> Iterator[tuple[Callable[[Setting], list[Measured]], float]]:
    """A side's process: the function that lets it measure, and its bandwidth of the link."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", f"kvpr_jax.profiling.{module}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        ask, answers = process.stdin, process.stdout

        def measure(setting: Setting) -> list[Measured]:
            print(json.dumps(dataclasses.asdict(setting)), file=ask, flush=True)
            return [
                Measured(**each | {"spans": [timeline.Span(**span) for span in each["spans"]]})
                for each in answer(answers, module)
            ]

        yield measure, answer(answers, module)
        ask.close()


def answer(answers: IO[str], module: str) -> Any:
    line = answers.readline()
    if not line:
        raise Failure(f"the process of kvpr_jax.profiling.{module} ended; the lines above say why", FAILURE)
    return json.loads(line)


def require() -> None:
    """Raises Failure unless both frameworks can run here on a GPU."""
    if importlib.util.find_spec("torch") is None:
        raise Failure("the CUDA-stream side needs torch: pip install '.[torch]'", FAILURE)
    if nvidia.driver() == "none":
        raise Failure("no NVIDIA GPU was found: there are no copies to overlap without one", FAILURE)


def wanted(arguments: argparse.Namespace) -> list[Setting]:
    """The steps to measure, in order.

    Raises:
        ValueError: not an OPT model whose norms come first, or a split that the prompt does not have.
    """
    config = settings.shape(arguments.model, arguments.layers)
    if not (isinstance(config, opt.Config) and config.norm_first):
        raise ValueError(f"model {arguments.model!r} must be an OPT other than opt-350m: PyTorch's layer is OPT's")
    found = []
    for asked in arguments.split or ["0%", "50%", "100%"]:
        split = Request(split=asked).split_tokens(arguments.prompt)
        if split is None:
            raise ValueError("split auto must be a number of tokens or a percentage here")
        for way in (arguments.recompute or ["absorb"])[: None if split else 1]:
            shape = config.num_layers, config.hidden_size, config.num_heads, config.mlp_size
            found.append(
                Setting(arguments.model, *shape, arguments.batch, arguments.prompt, split, way, arguments.dtype)
            )
    return found


def measure(steps: Sequence[Setting]) -> tuple[list[list[Measured]], dict[str, float]]:
    """The variants of each setting, all turns' trials together, and each side's bandwidth of the link."""
    with contextlib.ExitStack() as stack:
        sides = {module: stack.enter_context(side(module)) for module in SIDES}
        results = []
        for step in steps:
            variants: dict[str, Measured] = {}
            for _ in range(ROUNDS):
                for ask, _ in sides.values():
                    for each in ask(step):
                        before = variants.setdefault(each.variant, each)
                        if before is not each:
                            for trials in ("copy_s", "compute_s", "both_s", "issue_s"):
                                getattr(before, trials).extend(getattr(each, trials))
            results.append(list(variants.values()))
        return results, {module: link_gb_per_s for module, (_, link_gb_per_s) in sides.items()}


def rows(steps: Sequence[Setting], results: Sequence[Sequence[Measured]], link_gb_per_s: float) -> list[dict[str, str]]:
    """The lines of the table."""
    lines = []
    for step, variants in zip(steps, results, strict=True):
        floor_s = step.link_bytes / link_gb_per_s / 1e9
        for each in variants:
            copy, compute, both, issue = (
                statistics.median(times) for times in (each.copy_s, each.compute_s, each.both_s, each.issue_s)
            )
            lines.append({
                "split": f"{step.split} of {step.prompt}",
                "recompute": step.recompute if step.split else "-",
                "variant": each.variant,
                "copy (ms)": f"{copy * 1e3:.2f}",
                "compute (ms)": f"{compute * 1e3:.2f}",
                "both (ms)": f"{both * 1e3:.2f}",
                "min to max": f"{min(each.both_s) * 1e3:.2f} to {max(each.both_s) * 1e3:.2f}",
                "overlap": f"{each.efficiency:.0%}",
                "both / floor": f"{both / floor_s:.3f}",
                "host issues in (ms)": f"{issue * 1e3:.2f}",
            })  # fmt: skip
    return lines


def parser() -> Parser:
    parser = Parser(
        prog="python -m kvpr_jax.profiling.overlap",
        description="Compare XLA's asynchronous copies with CUDA streams (PyTorch) on one decode step.",
    )
    add = parser.add_argument
    add("--model", default="opt-6.7b", help="an OPT size (models/README.md), or a directory")
    add("--layers", metavar="N", type=int, default=8)
    add("--batch", metavar="N", type=int, default=32)
    add("--prompt", metavar="N", type=int, default=1024, help="tokens of each prompt")
    add("--split", metavar="N|P%", action="append", help="several may be given; default: 0%%, 50%% and 100%%")
    add("--recompute", choices=("project", "absorb"), action="append", help="both may be given; default: absorb")
    add("--dtype", choices=checkpoint.DTYPES, default="bfloat16")
    add("--out", metavar="FILE", type=Path, required=True, help="JSON file for every trial")
    add("--timeline", metavar="FILE", type=Path, help="picture of one step of each variant at the last split")
    return parser


def execute(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Carry out a parsed command line and return the exit code."""
    require()
    with failing_with(FAILURE):
        steps = wanted(arguments)
        report.prepare(arguments.out)
        if arguments.timeline is not None:
            plot.check(arguments.timeline)
        results, links = measure(steps)
    lines = rows(steps, results, max(links.values()))
    title = (
        f"{arguments.model}, {steps[0].layers} layers, {arguments.dtype}, batch {arguments.batch}, prompt "
        f"{arguments.prompt}, link {max(links.values()):.1f} GB/s"
    )
    written = report.header("overlap", argv) | {
        "link_gb_per_s": links,
        "results": [
            {"setting": dataclasses.asdict(step), "variants": [dataclasses.asdict(each) for each in variants]}
            for step, variants in zip(steps, results, strict=True)
        ],
        "table": lines,
    }
    print(f"{title}\n\n{report.table(lines)}")
    with failing_with(FAILURE):
        report.write(arguments.out, written)
        if arguments.timeline is not None:
            last = steps[-1]
            way = f", {last.recompute}" if last.split else ""
            pictured = {each.variant: each.spans for each in results[-1]}
            timeline.draw(pictured, f"{title}; split {last.split}{way}", arguments.timeline)
    Reporter(quiet=False).note(f"wrote {arguments.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser().parse_args(argv)
    return run("kvpr_jax.profiling.overlap", lambda: execute(arguments, argv))


if __name__ == "__main__":
    sys.exit(main())
