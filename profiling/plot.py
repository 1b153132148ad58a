"""Draws what was measured, step time against split: `python -m kvpr_jax.profiling.plot RESULT.json`, a report of the
decode benchmark or of `kvpr_jax.profiling.splits`.

Each way to recompute has a colour. Points are medians, and their bars reach from the fastest step to the slowest;
dashed is what the plan predicted, dotted the same step over a cache that is on the device already. A split of 0
recomputes nothing, and is drawn for both ways. Gray is a step's bytes over the measured bandwidth of the link. Of a
sweep, the scheduler's pick has a ring around it, and green is what the paper's two-phase schedule would take. Settings
with tokens that stay on the device are no splits of the whole prompt: they are lines from side to side.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpr_jax.command_line import FAILURE, Parser, Reporter, failing_with, run
from kvpr_jax.profiling.report import prepare

SUFFIXES = (".png", ".svg")
WAYS = {"project": ("#d55e00", "s"), "absorb": ("#0072b2", "o")}  # told apart by the colour-blind, and without colour
GRAY, GREEN = "#808080", "#009e73"
ASIDE = ("-", "--", "-.", ":")  # lines from side to side
LINE = {"linewidth": 1.2, "markersize": 4}
APART = 5 / 72  # inches between the two ways' measurements of one split
LEVEL = 6  # so many splits, evenly spaced, have numbers that stand beside each other without touching
HEADROOM = 1.15  # of the plot, over the highest median or line; a bar that is longer is cut and its end written there


@dataclasses.dataclass(frozen=True)
class Point:
    """One measured setting. Times in milliseconds.

    Attributes:
        split: l.
        recompute: the way; of no meaning where `split` is 0.
        aside: what is measured where it is no split of the whole prompt; else empty.
        median, fastest, slowest: of the steps.
        predicted: by the plan.
        compute: of a step without the link.
        link: of the bytes that a step fetches, at the measured bandwidth.
        two_phase: by the paper's cost model; None where the report does not have it.
        picked_by: the ways to recompute for which the scheduler picks this.
    """

    split: int
    recompute: str
    aside: str
    median: float
    fastest: float
    slowest: float
    predicted: float
    compute: float
    link: float
    two_phase: float | None
    picked_by: Sequence[str]


def points(report: dict[str, Any]) -> list[Point]:
    """Those of a report, by split."""
    found = []
    for result in report["results"]:
        plan, step_ms = result["plan"], [1e3 * step_s for step_s in result["step_s"]]
        found.append(
            Point(
                split=plan["split"],
                recompute=plan["recompute"],
                aside=on_device(result),
                median=statistics.median(step_ms),
                fastest=min(step_ms),
                slowest=max(step_ms),
                predicted=1e3 * statistics.median(result.get("predicted_step_s", [plan["predicted_step_s"]])),
                compute=1e3 * result["compute_s"],
                link=statistics.median(result["step_bytes"]) / report["link_gb_per_s"] / 1e6,
                two_phase=1e3 * result["two_phase_step_s"] if "two_phase_step_s" in result else None,
                picked_by=result.get("picked_by", ()),
            )
        )
    return sorted(found, key=lambda point: point.split)


def on_device(result: dict[str, Any]) -> str:
    """What of the cache stays on the device, and in plain JAX if so; empty where nothing does."""
    plan = result["plan"]
    if not plan["offloaded"]:
        return "plain JAX, all on the device" if "plain" in result else "all on the device"
    return f"{plan['resident_tokens']} tokens on the device" if plan["resident_tokens"] else ""


def check(path: Path) -> None:
    """Make sure that a plot can be drawn, before anything takes long.

    Raises:
        ValueError: the suffix is none of `SUFFIXES`, matplotlib is missing, or there can be no such file.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"plot {str(path)!r} must end in {' or '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("a plot needs matplotlib: pip install '.[plot]'") from None
    prepare(path)


def read(path: Path) -> dict[str, Any]:
    """A report of the decode benchmark, or of a sweep.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"report {str(path)!r} cannot be read: {error}") from error
    if not isinstance(report, dict) or not {"machine", "setting", "link_gb_per_s", "results"} <= set(report):
        raise ValueError(f"report {str(path)!r} is not one of python -m kvpr_jax.profiling.decode or splits")
    return report


def title(report: dict[str, Any]) -> str:
    """What was measured, and on what."""
    setting = report["setting"]
    engine = "" if setting["engine"] == "overlapped" else f", {setting['engine']}"
    return (
        f"{setting['model']}, {setting['layers']} layers, {setting['dtype']}, batch {setting['batch']}, prompt "
        f"{setting['prompt']}{engine}, {report['machine']['device']}"
    )


def figure(report: dict[str, Any]) -> Any:
    """The plot of a report, a matplotlib `Figure`."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import ScaledTranslation

    measured = points(report)
    swept = [point for point in measured if not point.aside]
    used = {point.recompute for point in swept if point.split} or {point.recompute for point in swept}
    ways = [way for way in WAYS if way in used]
    top = HEADROOM * max(max(p.median, p.predicted, p.compute, p.link, p.two_phase or 0) for p in measured)

    drawn = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes, handles = drawn.subplots(), []
    for index, way in enumerate(ways):
        color, marker = WAYS[way]
        line = [point for point in swept if not point.split or point.recompute == way]
        x = [point.split for point in line]
        bars = [p.median - p.fastest for p in line], [p.slowest - p.median for p in line]
        beside = ScaledTranslation((index - (len(ways) - 1) / 2) * APART, 0, drawn.dpi_scale_trans)
        handles += [
            axes.errorbar(
                x, [p.median for p in line], bars, fmt=marker, color=color, markersize=4, elinewidth=1, capsize=2,
                zorder=3, transform=axes.transData + beside, label=f"{way}: measured (min to max)",
            ),
            *axes.plot(x, [p.predicted for p in line], "--.", color=color, **LINE, label=f"{way}: predicted"),
            *axes.plot(x, [p.compute for p in line], ":.", color=color, **LINE, label=f"{way}: compute alone"),
        ]  # fmt: skip
        for pick in (point for point in line if way in point.picked_by):
            handles += axes.plot(
                pick.split, pick.median, "o", color=color, fillstyle="none", markersize=11, zorder=3,
                transform=axes.transData + beside, label=f"{way}: the scheduler's pick",
            )  # fmt: skip
    two_phase = {point.split: point.two_phase for point in swept if point.two_phase is not None}
    if two_phase:
        x, y = zip(*two_phase.items(), strict=True)
        handles += axes.plot(x, y, "-.", color=GREEN, **LINE, label="the paper's two phases: predicted")
    link = f"link alone ({report['link_gb_per_s']:.1f} GB/s)"
    handles += axes.plot(
        [p.split for p in swept], [p.link for p in swept], ".-", color=GRAY, linewidth=0.8, markersize=4,
        zorder=1.5, label=link,
    )  # fmt: skip
    handles += [
        axes.axhline(point.median, color="black", linewidth=1, linestyle=style, label=point.aside)
        for point, style in zip((p for p in measured if p.aside), itertools.cycle(ASIDE), strict=False)
    ]  # fmt: skip
    splits = sorted({point.split for point in swept})
    gaps = [later - split for split, later in itertools.pairwise(splits)]
    turned = 90 if gaps and min(gaps) * (LEVEL - 1) < splits[-1] else 0  # texts at splits: none lies on its neighbour's
    for split in splits:
        slowest = max(point.slowest for point in swept if point.split == split)
        if slowest > top:
            axes.annotate(
                f"to {slowest:.1f} ms", (split, top), (0, 2), textcoords="offset points", ha="center", fontsize=8,
                rotation=turned,
            )  # fmt: skip
    drawn.suptitle(title(report), fontsize=10)
    axes.set_xlabel("split (tokens of the prompt held as activations)")
    axes.set_ylabel("time of a decode step (ms)")
    axes.set_xticks(splits)
    axes.tick_params("x", labelrotation=turned)
    axes.set_ylim(0, top)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    return drawn


def write(report: dict[str, Any], path: Path) -> None:
    """Draw a report into a PNG or SVG file, as its suffix says; the same report gives the same file.

    Raises:
        ValueError: the file cannot be written.
    """
    import matplotlib

    try:
        with matplotlib.rc_context({"svg.hashsalt": "kvpr_jax"}):
            figure(report).savefig(path, dpi=200, metadata={"Date": None})
    except OSError as error:
        raise ValueError(f"plot {str(path)!r} cannot be written: {error}") from error


def parser() -> Parser:
    parser = Parser(
        prog="python -m kvpr_jax.profiling.plot",
        description="Draw what the decode benchmark or a sweep of splits measured: step time against split.",
    )
    parser.add_argument("report", metavar="RESULT", type=Path, help="JSON file of the decode benchmark or of a sweep")
    parser.add_argument("--out", metavar="FILE", type=Path, help=".png or .svg; default: beside RESULT, as .png")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    """Carry out a parsed command line and return the exit code."""
    out = arguments.out or arguments.report.with_suffix(".png")
    with failing_with(FAILURE):
        check(out)
        write(read(arguments.report), out)
    Reporter(quiet=False).note(f"wrote {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    return run("kvpr_jax.profiling.plot", lambda: execute(arguments))


if __name__ == "__main__":
    sys.exit(main())
