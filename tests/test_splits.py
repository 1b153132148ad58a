"""The sweep of splits: what is measured, what is predicted of it, what the scheduler picks, and what the tables say."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from helpers import profile, random_model
from kvpr_jax import checkpoint
from kvpr_jax.profiling import decode, link, plot, settings, splits
from kvpr_jax.profiling import measure as measuring
from kvpr_jax.profiling import report as reports
from kvpr_jax.runtime import Decoder

MODEL = str(checkpoint.BUNDLED)
SETTING = ["--model", MODEL, "--layers", "2", "--batch", "2", "--new-tokens", "3", "--dtype", "float32"]
CONFIG = settings.shape(MODEL, 2)
# A link so slow that a token takes 0.15 ms as activations and 0.3 ms as keys and values. Beside 0.24 ms to project one,
# 3/4 of 64 tokens take least: 12 ms on the link, 11.5 to project them. Absorbed, the fewest bytes do.
NBYTES = 2 * CONFIG.activation_width * 4  # of a token in both sequences
SLOW = profile(
    to_device=[(NBYTES, 1.5e-4), (256 * NBYTES, 256 * 1.5e-4)], base_s=0.0, project=[(1, 2.4e-4)],
    keys_values=[(1, 1e-6)], absorb=[(1, 1e-6)], head_s=1e-3, dispatch_s=0.0, layer_dispatch_s=0.0,
    segment_dispatch_s=0.0, issue_s=0.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _slow_link(monkeypatch):
    monkeypatch.setattr(measuring, "load_or_measure", lambda config, dtype, batch: SLOW)
    monkeypatch.setattr(link, "gb_per_s", lambda: 2.0)


def made_up(decoder, prompts, steps, requests, rounds) -> list[dict]:
    """What `decode.measure` gives; a step takes what is predicted of it, twice that where it is absorbed."""
    plans = [decoder.plan(prompts, steps + 1, request).as_dict() for request in requests]
    slower = [2 if plan["recompute"] == "absorb" and plan["split"] else 1 for plan in plans]
    return [
        {
            "plan": plan,
            "step_s": [times * plan["predicted_step_s"]] * steps * rounds,
            "predicted_step_s": [plan["predicted_step_s"]] * steps * rounds,
        }
        for plan, times in zip(plans, slower, strict=True)
    ]


def sweep(monkeypatch, points: int, ways=("project", "absorb"), tokens: int = 64) -> list[dict]:
    monkeypatch.setattr(decode, "measure", made_up)
    return splits.sweep(Decoder(random_model(CONFIG)), [[3] * tokens, [4] * tokens], 3, points, ways)


def places(results: list[dict]) -> list[tuple]:
    return [(r["plan"]["split"], r["plan"]["recompute"], r["picked_by"]) for r in results]


def test_the_report_of_a_setting_holds_every_trial_and_can_be_read_again(tmp_path, capsys):
    assert splits.main([*SETTING, "--prompt", "64", "--points", "2", "--out", str(tmp_path)]) == 0
    path = tmp_path / "splits-tiny-batch-2-prompt-64-layers-2.json"
    report, printed = json.loads(path.read_text()), capsys.readouterr()
    assert printed.err == f"wrote {path}\n"
    assert places(report["results"]) == [
        (0, "project", []), (48, "project", ["project"]), (64, "project", []), (64, "absorb", ["absorb"])
    ]  # fmt: skip
    for result in report["results"]:
        assert len(result["step_s"]) == len(result["step_bytes"]) == 3 * splits.ROUNDS and min(result["step_s"]) > 0
    assert all(line in printed.out for line in (reports.table(report["table"]), reports.table(report["summary"])))
    assert "splits-tiny-batch-2-prompt-64-layers-2" in reports.page(tmp_path)
    assert [point.picked_by for point in plot.points(plot.read(path))] == [[], ["project"], [], ["absorb"]]


def test_what_is_predicted_is_the_step_that_was_measured(monkeypatch):
    """Over a tail of three slots too, which stay and are keys and values. The paper's schedule knows of no tail."""
    monkeypatch.setattr(measuring, "load_or_measure", lambda *_: dataclasses.replace(SLOW, project=[(1, 1e-2)]))
    decoder, prompts = Decoder(random_model(CONFIG)), [[3] * 64, [4] * 64]
    streamed, held = splits.sweep(decoder, prompts, 3, 2, ["project"])
    assert streamed["predicted_step_s"] == pytest.approx([2 * 64 * 3e-4] * 3 * splits.ROUNDS)
    assert held["predicted_step_s"] == pytest.approx([2 * (64e-2 + 3e-6) + 1e-3] * 3 * splits.ROUNDS)
    assert streamed["two_phase_step_s"] == pytest.approx(2 * 64 * 3e-4 + 1e-3)
    assert held["two_phase_step_s"] == pytest.approx(2 * (64 * 1.5e-4 + 64e-2) + 1e-3)


def test_picks_that_are_no_points_are_measured_as_well(monkeypatch):
    assert places(sweep(monkeypatch, 3)) == [
        (0, "project", []), (32, "project", []), (32, "absorb", []), (48, "project", ["project"]),
        (64, "project", []), (64, "absorb", ["absorb"]),
    ]  # fmt: skip
    assert places(sweep(monkeypatch, 5, ["absorb"])) == [
        (split, "absorb", ["absorb"] if split == 64 else []) for split in (0, 16, 32, 48, 64)
    ]
    assert [split for split, _, _ in places(sweep(monkeypatch, 9, ["absorb"], tokens=3))] == [0, 1, 2, 3]


def test_a_pick_of_zero_is_marked_once_for_each_way(monkeypatch):
    monkeypatch.setattr(measuring, "load_or_measure", lambda *_: profile(project=[(1, 1.0)], absorb=[(1, 1.0)]))
    assert places(sweep(monkeypatch, 2))[0] == (0, "project", ["project", "absorb"])


def test_the_closing_table_sets_the_pick_beside_the_best_of_its_way():
    def result(split: int, way: str, step_s: list[float], predicted_s: float, picked_by: list[str]) -> dict:
        plan = {"split": split, "cached_tokens": 64, "recompute": way}
        return {"plan": plan, "step_s": step_s, "predicted_step_s": [predicted_s] * 3, "picked_by": picked_by,
                "two_phase_step_s": 0.5}  # fmt: skip

    results = [
        result(0, "project", [0.2, 0.1, 0.4], 0.19, []),  # 5 % too little
        result(48, "project", [0.11, 0.10, 0.5], 0.121, ["project"]),  # 10 % too much
        result(64, "project", [0.1, 0.1, 0.1], 0.1, []),
        result(64, "absorb", [0.05, 0.05, 0.06], 0.049, ["absorb"]),  # 2 % too little
    ]
    setting = {"model": "m", "layers": 2, "dtype": "float32", "batch": 2, "prompt": 64, "engine": "overlapped"}
    assert [list(row.values()) for row in splits.summary(setting, results)] == [
        ["m", "2", "2", "64", "project", "48", "1.100", "5.0%", "10.0%"],
        ["m", "2", "2", "64", "absorb", "64", "1.000", "3.5%", "5.0%"],
    ]
    assert [list(row.values()) for row in splits.rows(results)] == [
        ["0 of 64", "-", "200.00", "100.00 to 400.00", "190.00", "-5.0%", "500.00", ""],
        ["48 of 64", "project", "110.00", "100.00 to 500.00", "121.00", "+10.0%", "500.00", "project"],
        ["64 of 64", "project", "100.00", "100.00 to 100.00", "100.00", "+0.0%", "500.00", ""],
        ["64 of 64", "absorb", "50.00", "50.00 to 60.00", "49.00", "-2.0%", "500.00", "absorb"],
    ]


def test_every_combination_is_swept_the_largest_first_with_one_set_of_weights(monkeypatch, tmp_path, capsys):
    swept, decoders = [], []

    def recorded(decoder, prompts, steps, points, ways):
        swept.append((len(prompts), len(prompts[0]), steps, points, ways, decoder.config.max_positions))
        decoders.append(decoder)
        return [{"plan": {"split": 0, "cached_tokens": 1, "recompute": "absorb"}, "step_s": [1.0], "picked_by": ways,
                 "predicted_step_s": [1.0], "two_phase_step_s": 1.0}]  # fmt: skip

    monkeypatch.setattr(splits, "sweep", recorded)
    monkeypatch.chdir(tmp_path)
    prompts = ["--prompt", "5", "--prompt", "2000", "--prompt", "5"]
    assert splits.main([*SETTING, "--batch", "3", *prompts, "--recompute", "absorb"]) == 0
    shared = 3, 9, ["absorb"], 2000 + 3 + 32
    assert swept == [(3, 2000, *shared), (2, 2000, *shared), (3, 5, *shared), (2, 5, *shared)]
    assert all(decoder is decoders[0] for decoder in decoders)
    folder = Path("profiling/results/cpu")
    names = [f"splits-tiny-batch-{b}-prompt-{p}-layers-2" for b, p in ((3, 2000), (2, 2000), (3, 5), (2, 5))]
    assert capsys.readouterr().err == "".join(f"wrote {folder / name}.json\n" for name in names)


@pytest.mark.parametrize("command, message", [
    (["--points", "1"], r"points 1 must be at least 2: .*"),
    (["--prompt", "9", "--prompt", "0"], r"prompt 0 must be at least 1"),
    (["--model", MODEL, "--model", "opt-7b"], r"model 'opt-7b': neither a directory nor one of .*"),
    (["--out", "file"], r"'file/.*' cannot be written: .*"),
], ids=lambda of: of[0] if isinstance(of, list) else "")  # fmt: skip
def test_an_error_is_one_line(command, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(decode, "measure", lambda *_: pytest.fail("measured first"))
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert splits.main([*command, "--layers", "2"]) == 1
    assert re.fullmatch(rf"kvpr_jax\.profiling\.splits: error: {message}\n", capsys.readouterr().err)
