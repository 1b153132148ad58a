"""What the device did and when, from the traces of jax.profiler and torch.profiler, in one form; and a picture of it.

Both write the Chrome trace format, each with its own names for the device's queues and for copies.
"""

import dataclasses
import gzip
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

STEP = "decode step"  # the host's annotation around each traced step
APART_S = 4e-6  # kernels closer than this count as one span
COLOURS = {"copy": ("#d95f02", "#f2b27f"), "compute": ("#1b6ca8",)}  # copies take turns, to be told apart

Lane = Literal["copy", "compute"]


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that the device did; seconds from the beginning of the step.

    Attributes:
        lane: "copy" from the host to the device, or "compute": kernels, and copies within the device.
    """

    lane: Lane
    begin_s: float
    end_s: float


def last_step(trace: Path) -> list[Span]:
    """What the device did during the last step of a trace by either profiler, in order of beginning.

    Raises:
        ValueError: the trace has no annotated step, or nothing of a device in it.
    """
    content = trace.read_bytes()
    events = json.loads(gzip.decompress(content) if trace.suffix == ".gz" else content)["traceEvents"]
    devices = {
        event["pid"]
        for event in events
        if event.get("name") == "process_name" and event["args"]["name"].startswith("/device:GPU")
    }
    timed = [event for event in events if event.get("ph") == "X"]
    steps = [event for event in timed if event["name"] == STEP and event.get("cat") in (None, "user_annotation")]
    if not steps:
        raise ValueError(f"{trace}: no {STEP!r} in this trace")
    begin, duration = max((step["ts"], step["dur"]) for step in steps)
    spans = []
    for event in timed:
        lane = _lane(event, event["pid"] in devices)
        first, last = event["ts"] - begin, event["ts"] + event["dur"] - begin
        if lane is not None and first < duration and last > 0:
            spans.append(Span(lane, max(first, 0) / 1e6, last / 1e6))
    if not spans:
        raise ValueError(f"{trace}: nothing of a GPU in the last {STEP!r}")
    return _joined(sorted(spans, key=lambda span: span.begin_s))


def _lane(event: Mapping[str, Any], on_device: bool) -> Lane | None:
    """Where an event belongs, or None. PyTorch gives it a category, XLA the device as its process."""
    name = event["name"]
    if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") or on_device:
        return "copy" if "HtoD" in name or "H2D" in name else "compute"
    return None


def _joined(spans: list[Span]) -> list[Span]:
    """Kernels that follow one another at once as one span; copies stay as they are."""
    copies = [span for span in spans if span.lane == "copy"]
    joined: list[Span] = []
    for span in (span for span in spans if span.lane == "compute"):
        if joined and span.begin_s - joined[-1].end_s < APART_S:
            joined[-1] = dataclasses.replace(joined[-1], end_s=max(joined[-1].end_s, span.end_s))
        else:
            joined.append(span)
    return sorted([*copies, *joined], key=lambda span: span.begin_s)


def draw(steps: Mapping[str, Sequence[Span]], title: str, out: Path) -> None:
    """A picture of one step of each variant, one under the other: what was copied above what was computed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.6 + 0.75 * len(steps)), layout="constrained")
    axes = figure.add_subplot()
    names = list(steps)
    for row, name in enumerate(names):
        for lane, top in (("copy", 0.0), ("compute", 0.38)):
            bars = [(s.begin_s * 1e3, (s.end_s - s.begin_s) * 1e3) for s in steps[name] if s.lane == lane]
            colours = [colour for _, colour in zip(bars, itertools.cycle(COLOURS[lane]), strict=False)]
            axes.broken_barh(bars, (row + top, 0.34), facecolors=colours, linewidth=0)
    axes.set_yticks([row + 0.36 for row in range(len(names))], names)
    axes.set_ylim(len(names) - 0.1, -0.15)
    axes.set_xlim(0, max(span.end_s for spans in steps.values() for span in spans) * 1e3)
    axes.set_xlabel("ms since the beginning of the step · above: copies to the device, below: compute")
    axes.set_title(title, fontsize="medium")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(out, dpi=150)
