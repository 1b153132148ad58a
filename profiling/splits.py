"""Sweeps the split, and sets what was measured beside what was predicted: `python -m kvpr_jax.profiling.splits`.

Each setting has a report of its own, like that of the decode benchmark: its splits from 0 to the whole prompt, and what
the scheduler picks for each way to recompute, measured in turn, several times over. A prediction is the plan's for the
cache as it was in the measured step, its tail included; the paper's two-phase schedule (arXiv 2411.17089, equations 8
to 11) is predicted without a tail.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from kvpr_jax import command_line
from kvpr_jax.command_line import FAILURE, Parser, failing_with
from kvpr_jax.models.attention import Recompute
from kvpr_jax.plan import Request
from kvpr_jax.profiling import decode, link, plot, report, settings
from kvpr_jax.profiling.settings import Setting
from kvpr_jax.runtime import Decoder

ROUNDS = 3  # of all splits in turn: what disturbs a shared host for a while falls on one trial in three of a split


def sweep(
    decoder: Decoder, prompts: Sequence[Sequence[int]], steps: int, points: int, ways: Sequence[Recompute]
) -> list[dict[str, Any]]:
    """What `decode.measure` gives for each split and way, and what the scheduler makes of them.

    Splits come in order, `ROUNDS` times; 0 is measured for all ways together.

    Args:
        points: splits from 0 to the whole prompt, evenly spaced; the scheduler's picks come on top.

    Returns:
        Results, each with `picked_by`, the ways for which the scheduler picks it, and `two_phase_step_s`.
    """
    tokens = len(prompts[0])
    plans = {way: decoder.plan(prompts, steps + 1, Request("auto", way, offload="all")) for way in ways}
    evenly = {round(index * tokens / (points - 1)) for index in range(points)}
    wanted = {(split, way if split else ways[0]) for way in ways for split in evenly | {plans[way].split}}
    ordered = sorted(wanted, key=lambda of: (of[0], ways.index(of[1])))
    measured = decode.measure(decoder, prompts, steps, [Request(str(split), way) for split, way in ordered], ROUNDS)
    return [
        result | {
            "two_phase_step_s": plans[way].costs.two_phase_step_s(split, tokens - split),
            "picked_by": [other for other in ways if plans[other].split == split and (not split or other == way)],
        }
        for (split, way), result in zip(ordered, measured, strict=True)
    ]  # fmt: skip


def error(result: dict[str, Any]) -> float:
    """Of the prediction, relative to the median step."""
    return statistics.median(result["predicted_step_s"]) / statistics.median(result["step_s"]) - 1


def rows(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The lines of a setting's table."""
    return [
        {
            "split": f"{result['plan']['split']} of {result['plan']['cached_tokens']}",
            "recompute": result["plan"]["recompute"] if result["plan"]["split"] else "-",
            "step (ms)": report.median_ms(result["step_s"]),
            "min to max": report.min_to_max(result["step_s"]),
            "predicted (ms)": report.median_ms(result["predicted_step_s"]),
            "error": f"{error(result):+.1%}",
            "two phases, the paper's (ms)": f"{result['two_phase_step_s'] * 1e3:.2f}",
            "the scheduler's pick": ", ".join(result["picked_by"]),
        }
        for result in results
    ]


def summary(setting: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A setting's lines of the closing table, one for each way to recompute.

    Args:
        setting: of its report.
        results: of `sweep`.
    """
    lines = []
    for way in dict.fromkeys(way for result in results for way in result["picked_by"]):
        own = [result for result in results if not result["plan"]["split"] or result["plan"]["recompute"] == way]
        (picked,) = (result for result in own if way in result["picked_by"])
        medians, errors = [statistics.median(result["step_s"]) for result in own], [abs(error(r)) for r in own]
        lines.append({
            **{name: str(setting[name]) for name in ("model", "layers", "batch", "prompt")},
            "recompute": way,
            "the scheduler's pick": str(picked["plan"]["split"]),
            "pick / best": f"{statistics.median(picked['step_s']) / min(medians):.3f}",
            "error, median": f"{statistics.median(errors):.1%}",
            "error, largest": f"{max(errors):.1%}",
        })  # fmt: skip
    return lines


def parser() -> Parser:
    parser = Parser(
        prog="python -m kvpr_jax.profiling.splits",
        description="Time decode steps at splits from 0 to the whole prompt, beside what is predicted of them.",
    )
    settings.add_options(parser, new_tokens=32, several=True)
    add = parser.add_argument
    add("--recompute", choices=get_args(Recompute), action=settings.Several, default=[*get_args(Recompute)],
        help="may be given several times; default: both")  # fmt: skip
    add("--points", metavar="N", type=int, default=9, help="splits, evenly spaced; the scheduler's picks come on top")
    add("--out", metavar="FOLDER", type=Path, help="folder for a JSON file a setting with every trial, which is "
        "replaced if it exists; default: profiling/results/<gpu>")  # fmt: skip
    add("--plot", action="store_true", help="draw each report as well, beside it, as an SVG file")
    return parser


def execute(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Carry out a parsed command line and return the exit code."""
    closing: list[dict[str, str]] = []
    shapes = dict.fromkeys(itertools.product(arguments.batch, arguments.prompt))
    shapes = sorted(shapes, key=lambda of: -of[0] * of[1])  # the largest cache first, so that memory is pinned once
    with failing_with(FAILURE):
        if arguments.points < 2:
            raise ValueError(f"points {arguments.points} must be at least 2: the first is 0, the last the whole prompt")
        settings = [
            [Setting(model, arguments.layers, *of, arguments.new_tokens, arguments.dtype) for of in shapes]
            for model in dict.fromkeys(arguments.model)
        ]
        for setting in itertools.chain(*settings):
            setting.check(*files_of(setting, arguments))
        link_gb_per_s = link.gb_per_s()
        for of_model in settings:
            closing += sweep_model(of_model, arguments, argv, link_gb_per_s)
    print(report.table(closing))
    return 0


def sweep_model(
    settings: Sequence[Setting], arguments: argparse.Namespace, argv: Sequence[str], link_gb_per_s: float
) -> list[dict[str, str]]:
    """Sweep, print and store each setting of one model, whose weights are made once; their summaries."""
    decoder = max(settings, key=lambda of: of.prompt).decoder()  # with positions for the longest prompt
    ways, closing = list(dict.fromkeys(arguments.recompute)), []
    for setting in settings:
        results = sweep(decoder, setting.prompts(decoder), setting.new_tokens, arguments.points, ways)
        written = setting.report("splits", argv, decoder) | {"link_gb_per_s": link_gb_per_s, "results": results}
        written |= {"summary": summary(written["setting"], results), "table": rows(results)}
        print(f"{plot.title(written)}\n\n{report.table(written['table'])}\n", flush=True)
        decode.keep(written, *files_of(setting, arguments))
        closing += written["summary"]
    return closing


def files_of(setting: Setting, arguments: argparse.Namespace) -> tuple[Path, Path | None]:
    """Where a setting's report goes, and its picture."""
    out = setting.default_out("splits")
    if arguments.out is not None:
        out = arguments.out / out.name
    return out, out.with_suffix(".svg") if arguments.plot else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser().parse_args(argv)
    return command_line.run("kvpr_jax.profiling.splits", lambda: execute(arguments, argv))


if __name__ == "__main__":
    sys.exit(main())
