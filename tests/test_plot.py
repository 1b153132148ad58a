"""The plot of the decode benchmark: what is drawn is what the report holds, legible, and the same again."""

import itertools
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from kvpr_jax import checkpoint
from kvpr_jax.profiling import decode, link, matmul, plot

STORED = sorted((Path(__file__).parent.parent / "profiling/results").glob("*/*.json"))
OVERLAP = next(path for path in STORED if path.stem.startswith("overlap"))
REASON = "plots are drawn with matplotlib: pip install -e '.[test,plot]'"


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason=REASON)


@pytest.fixture
def without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def measured(split: int, recompute: str, step_s: list[float], offloaded: bool = True) -> dict:
    """What `decode.measure` gives, of a prompt of 64 tokens; compute and prediction are told apart by their factors."""
    plan = {
        "batch": 2, "split": split, "cached_tokens": 64, "offloaded": offloaded, "recompute": recompute,
        "engine": "overlapped", "predicted_step_s": 0.1, "resident_tokens": 0, "flushes": 0,
    }  # fmt: skip
    return {
        "plan": plan, "step_s": step_s, "step_bytes": [(128 - split) * 10**6 * offloaded] * len(step_s),
        "predicted_step_s": [1.25 * step_s[0]] * len(step_s),
        "compute_s": step_s[0] / 4, "compile_s": 0.0, "prefill_s": 0.5, "prefill_flops": 10**9,
        "predicted_device_bytes": 0, "peak_device_bytes": None, "peak_host_bytes": 0,
        "pinned_bytes": [0], "cache_host_bytes": 0,
    }  # fmt: skip


RESULTS = [
    measured(64, "project", [0.011, 0.010, 0.015]),
    measured(0, "project", [0.020, 0.019, 0.022]),
    measured(64, "absorb", [0.009, 0.008, 0.012]),
]
SETTING = {"model": "m", "layers": 3, "dtype": "float32", "batch": 2, "prompt": 64, "engine": "overlapped"}
REPORT = {"machine": {"device": "GPU"}, "setting": SETTING, "link_gb_per_s": 8.0, "results": RESULTS}


def lines(figure) -> dict[str, tuple[list[float], list[float]]]:
    """The data of every line of a plot, by its label."""
    (axes,) = figure.axes
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def bars(figure) -> dict[str, tuple[list[float], list[float], list[tuple[float, float]]]]:
    """The splits, medians and bars of every series of measurements, by its label."""
    found = {}
    for container in figure.axes[0].containers:
        points, _, (collection,) = container.lines
        ends = [(segment[0][1], segment[1][1]) for segment in collection.get_segments()]
        found[container.get_label()] = list(points.get_xdata()), list(points.get_ydata()), ends
    return found


def test_points_and_bars_are_the_steps_measured_and_lines_what_the_report_says(matplotlib):
    figure = plot.figure(REPORT)
    drawn = bars(figure)
    assert list(drawn) == ["project: measured (min to max)", "absorb: measured (min to max)"]
    for label, at_64, ends_64 in (("project", 11, (10, 15)), ("absorb", 9, (8, 12))):
        splits, medians, ends = drawn[f"{label}: measured (min to max)"]
        assert splits == [0, 64] and medians == pytest.approx([20, at_64])
        assert ends == [pytest.approx((19, 22)), pytest.approx(ends_64)]
        assert lines(figure)[f"{label}: predicted"] == ([0, 64], pytest.approx([25, 1.25 * at_64]))
        assert lines(figure)[f"{label}: compute alone"] == ([0, 64], pytest.approx([5, at_64 / 4]))
    splits, link_ms = lines(figure)["link alone (8.0 GB/s)"]
    assert dict(zip(splits, link_ms, strict=True)) == {0: pytest.approx(16), 64: pytest.approx(8)}  # 128 MB, 64 MB


def test_the_plot_says_what_it_shows_and_its_legend_covers_nothing(matplotlib):
    figure = plot.figure(REPORT)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert figure.get_suptitle() == "m, 3 layers, float32, batch 2, prompt 64, GPU"
    assert "(ms)" in axes.get_ylabel() and "tokens" in axes.get_xlabel()
    assert axes.get_ylim()[0] == 0 and list(axes.get_xticks()) == [0, 64]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:3] == ["project: measured (min to max)", "project: predicted", "project: compute alone"]
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    assert axes.get_legend().get_window_extent().x1 <= figure.bbox.x1
    colors = {label: {line.get_color() for line in axes.get_lines() if line.get_label().startswith(label)}
              for label in ("project", "absorb")}  # fmt: skip
    assert len(colors["project"]) == len(colors["absorb"]) == 1 and colors["project"] != colors["absorb"]


def test_the_two_ways_stand_beside_each_other(matplotlib):
    """Their medians may be equal; on paper the points are apart, with the split between them. One way stands on it."""

    def aside(figure) -> list[float]:
        """How far to the right of the split each series is drawn, in inches."""
        figure.draw_without_rendering()
        (axes,) = figure.axes
        at = axes.transData.transform((64, 0))[0]
        drawn = [container.lines[0].get_transform().transform((64, 0))[0] for container in axes.containers]
        return [(x - at) / figure.dpi for x in drawn]

    assert aside(plot.figure(REPORT)) == pytest.approx([-plot.APART / 2, plot.APART / 2])
    assert aside(plot.figure(REPORT | {"results": RESULTS[:2]})) == pytest.approx([0])


def test_one_very_slow_step_does_not_flatten_the_plot(matplotlib):
    slow = measured(64, "absorb", [0.009, 0.009, 2.7736])
    (axes,) = plot.figure(REPORT | {"results": [*RESULTS[:2], slow]}).axes
    assert axes.get_ylim()[1] == pytest.approx(1.15 * 25)
    assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [("to 2773.6 ms", 64)]
    assert not plot.figure(REPORT).axes[0].texts


@pytest.mark.parametrize("step", [16, 8])
def test_what_is_said_above_neighbouring_splits_does_not_overlap(step, matplotlib):
    slow = [measured(split, "absorb", [0.02, 0.02, 2.7736]) for split in range(0, 65, step)]
    figure = plot.figure(REPORT | {"results": slow})
    figure.draw_without_rendering()
    extents = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(extents) == len(slow)
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(extents))
    assert all(extent.y1 <= figure.bbox.y1 for extent in extents)


def test_a_sweep_has_rings_at_the_picks_and_the_papers_two_phases(matplotlib):
    swept = [of | {"two_phase_step_s": 0.03 + of["plan"]["split"] * 1e-4, "picked_by": []} for of in RESULTS]
    swept[1]["picked_by"], swept[2]["picked_by"] = ["project"], ["absorb"]
    figure = plot.figure(REPORT | {"results": swept})
    drawn = lines(figure)
    assert ["pick" in line.get_label() for line in figure.axes[0].get_lines()].count(True) == 2
    assert drawn["project: the scheduler's pick"] == ([0], [20])
    assert drawn["absorb: the scheduler's pick"] == ([64], [9])
    assert drawn["the paper's two phases: predicted"] == ([0, 64], pytest.approx([30, 36.4]))
    assert figure.axes[0].get_ylim()[1] == pytest.approx(1.15 * 36.4)
    assert not [label for label in lines(plot.figure(REPORT)) if "pick" in label or "paper" in label]


@pytest.mark.parametrize("splits", [
    [*range(0, 1025, 128), 960], [*range(0, 4097, 1024), 3840], [*range(0, 4097, 1024), 3584], range(0, 4097, 820),
])  # fmt: skip
def test_the_numbers_of_splits_do_not_touch(splits, matplotlib):
    figure = plot.figure(REPORT | {"results": [measured(split, "absorb", [0.01]) for split in splits]})
    figure.draw_without_rendering()
    boxes = sorted((label.get_window_extent() for label in figure.axes[0].get_xticklabels()), key=lambda box: box.x0)
    assert len(boxes) == len(splits) and all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_a_report_without_a_prediction_for_each_step_has_that_of_the_plan():
    (old,) = plot.points(REPORT | {"results": [{n: v for n, v in RESULTS[0].items() if n != "predicted_step_s"}]})
    assert old.predicted == pytest.approx(100) and plot.points(REPORT)[1].predicted == pytest.approx(1.25 * 11)


def test_a_cache_on_the_device_is_no_split(matplotlib):
    on_device = measured(0, "project", [0.004, 0.003, 0.005], offloaded=False)
    figure = plot.figure(REPORT | {"results": [on_device, *RESULTS]})
    assert bars(figure) == bars(plot.figure(REPORT))
    assert lines(figure)["all on the device"][1] == pytest.approx([4, 4])
    assert lines(plot.figure(REPORT | {"results": [on_device]}))["all on the device"][1] == pytest.approx([4, 4])
    in_part = measured(0, "project", [0.006, 0.005, 0.007])
    in_part["plan"] |= {"resident_tokens": 32}
    figure = plot.figure(REPORT | {"results": [on_device, on_device | {"plain": True}, in_part, *RESULTS]})
    assert bars(figure) == bars(plot.figure(REPORT))
    assert lines(figure)["32 tokens on the device"][1] == pytest.approx([6, 6])
    assert lines(figure)["plain JAX, all on the device"][1] == pytest.approx([4, 4])


@pytest.mark.parametrize("results, ways", [
    (RESULTS[1:2], ["project"]),
    (RESULTS[1:], ["absorb"]),
    (RESULTS[2:], ["absorb"]),
], ids=["split 0 alone", "one way", "one split"])  # fmt: skip
def test_a_way_that_was_not_measured_is_not_drawn(results, ways, matplotlib):
    labels = list(bars(plot.figure(REPORT | {"results": results})))
    assert labels == [f"{way}: measured (min to max)" for way in ways]


def test_another_engine_is_named():
    sequential = REPORT | {"setting": SETTING | {"engine": "sequential"}}
    assert plot.title(sequential) == "m, 3 layers, float32, batch 2, prompt 64, sequential, GPU"


def test_every_stored_report_can_be_drawn(matplotlib, tmp_path):
    titles = {}
    for path in STORED:
        if {"setting", "results"} <= set(json.loads(path.read_text())):
            report = plot.read(path)
            titles[path.parent.name, path.stem] = plot.title(report)
            swept = any(not point.aside for point in plot.points(report))
            assert len(bars(plot.figure(report))) in ((1, 2) if swept else (0,))
    h200 = "nvidia-h200"
    assert titles[h200, "opt-6.7b"] == "opt-6.7b, 32 layers, bfloat16, batch 32, prompt 1024, NVIDIA H200"
    assert titles[h200, "llama-2-7b"] == "llama-2-7b, 16 layers, bfloat16, batch 32, prompt 1024, NVIDIA H200"


@pytest.mark.parametrize("suffix, begin", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_same_report_gives_the_same_file(suffix, begin, matplotlib, tmp_path, capsys):
    report = tmp_path / "report.json"
    report.write_text(json.dumps(REPORT))
    files = [tmp_path / f"{name}/plot{suffix}" for name in "ab"]
    for file in files:
        assert plot.main([str(report), "--out", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes() and files[0].read_bytes().startswith(begin)
    assert capsys.readouterr().err.splitlines() == [f"wrote {file}" for file in files]


def test_a_plot_stands_beside_its_report(matplotlib, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert plot.main([str(tmp_path / "report.json")]) == 0
    assert {path.name for path in tmp_path.glob("*.*")} == {"report.json", "report.png"}


def test_decode_draws_what_plot_draws_from_its_report(matplotlib, tmp_path, monkeypatch):
    results = iter(RESULTS)
    monkeypatch.setattr(decode, "measure", lambda *_: [next(results)])
    monkeypatch.setattr(link, "gb_per_s", lambda: 8.0)
    monkeypatch.setattr(matmul, "flops_per_s", lambda dtype: 1e12)
    out, first, again = tmp_path / "report.json", tmp_path / "first.svg", tmp_path / "again.svg"
    command = shlex.split("--layers 3 --batch 2 --prompt 64 --dtype float32 --split 64 --split 0 --split 64 --model")
    assert decode.main([*command, str(checkpoint.BUNDLED), "--out", str(out), "--plot", str(first)]) == 0
    report = json.loads(out.read_text())
    assert report["setting"] == SETTING | {"model": "tiny"} and report["results"] == RESULTS
    assert plot.main([str(out), "--out", str(again)]) == 0
    assert first.read_bytes() == again.read_bytes()


def test_without_matplotlib_one_line_names_the_extra(without_matplotlib, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode, "Decoder", lambda *_: pytest.fail("measured first"))
    report = tmp_path / "report.json"
    report.write_text(json.dumps(REPORT))
    benchmark = ["--model", str(checkpoint.BUNDLED), "--out", str(tmp_path / "out.json"), "--plot", "plot.png"]
    for name, main, arguments in (("plot", plot.main, [str(report)]), ("decode", decode.main, benchmark)):
        assert main(arguments) == 1
        line = f"kvpr_jax.profiling.{name}: error: a plot needs matplotlib: pip install '.[plot]'\n"
        assert capsys.readouterr().err == line
    assert [path.name for path in tmp_path.glob("*.*")] == ["report.json"]


@pytest.mark.parametrize("text, out, message", [
    (None, "plot.png", r"report '.*report\.json' cannot be read: .*No such file"),
    ("{", "plot.png", r"report '.*report\.json' cannot be read: .*"),
    ('{"table": []}', "plot.png", r"report '.*report\.json' is not one of python -m kvpr_jax\.profiling\.decode"),
    (OVERLAP.read_text(), "plot.png", r"report '.*report\.json' is not one of python -m kvpr_jax\.profiling\.decode"),
    (json.dumps(REPORT), "plot.gif", r"plot '.*plot\.gif' must end in \.png or \.svg"),
    (json.dumps(REPORT), "report.json/plot.png", r"'.*plot\.png' cannot be written: .*"),
], ids=["no report", "damaged", "another's", "of copies", "suffix", "no folder"])  # fmt: skip
def test_an_error_is_one_line(text, out, message, matplotlib, tmp_path, capsys):
    report = tmp_path / "report.json"
    if text is not None:
        report.write_text(text)
    assert plot.main([str(report), "--out", str(tmp_path / out)]) == 1
    assert re.fullmatch(rf"kvpr_jax\.profiling\.plot: error: {message}.*\n", capsys.readouterr().err)
