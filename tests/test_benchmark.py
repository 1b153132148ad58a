"""The decode benchmark on a small shape: it measures what it says, keeps every trial, refuses unknown shapes."""

import dataclasses
import json
import os
import re
import shlex
import statistics
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import helpers
from kvpr_jax import checkpoint, memory
from kvpr_jax.profiling import decode, link, matmul
from kvpr_jax.profiling import report as reports
from kvpr_jax.runtime import Decoder

SETTING = ["--layers", "2", "--batch", "2", "--prompt", "9", "--new-tokens", "3", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def _small_measurements(monkeypatch):
    monkeypatch.setattr(link, "SIZES", (2**16, 2**20))
    monkeypatch.setattr(matmul, "SHAPES", ((256, 128, 64),))


def test_the_report_holds_every_trial_and_the_bytes_of_each_split(tmp_path, capsys):
    out = tmp_path / "gpu" / "report.json"
    splits = ["--split", "0%", "--split", "100%"]
    assert decode.main(["--model", str(checkpoint.BUNDLED), *SETTING, *splits, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert "| step / floor |" in printed and report["versions"]["jax"]
    streamed, held = report["results"]
    config, _ = checkpoint.read_config(checkpoint.BUNDLED)
    assert streamed["step_bytes"] == [2 * 2 * 9 * config.kv_width * 4] * 3  # layers · batch · tokens · width · bytes
    assert held["step_bytes"] == [2 * 2 * 9 * config.activation_width * 4] * 3
    assert streamed["compute_s"] > 0 and streamed["prefill_flops"] > 0
    speed_up = statistics.median(streamed["step_s"]) / statistics.median(held["step_s"])
    assert [row["over l = 0"] for row in report["table"]] == ["1.00x", f"{speed_up:.2f}x"]
    for result, row in zip(report["results"], report["table"], strict=True):
        assert len(result["step_s"]) == 3 and result["prefill_s"] > 0 and min(result["step_s"]) > 0
        step_s = statistics.median(result["step_s"])
        assert row["step (ms)"] == f"{step_s * 1e3:.2f}"
        floor_s = result["step_bytes"][0] / report["link_gb_per_s"] / 1e9
        assert float(row["step / floor"]) == pytest.approx(step_s / floor_s, abs=0.0006)
        assert row["step (ms)"] in printed
        after = [result[name] for name in ("pinned_bytes", "other_host_bytes", "device_bytes")]
        assert all(len(column) == 3 for column in after) and min(after[1]) > 10**8
        assert result["cache_host_bytes"] == result["step_bytes"][0]


def test_pinned_memory_is_shown_beside_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "resident_bytes", lambda: (3 * 2**20, 2**30))
    out = tmp_path / "report.json"
    assert decode.main(["--model", str(checkpoint.BUNDLED), *SETTING, "--split", "0%", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    ratio = 3 * 2**20 / report["results"][0]["cache_host_bytes"]
    assert report["table"][0]["pinned / cache"] == f"{ratio:.3f}"


def test_no_steps_is_one_line(capsys):
    assert decode.main(["--new-tokens", "0"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "new-tokens 0 must be at least 1" in error


def test_a_cache_on_the_device_crosses_no_link(tmp_path):
    out = tmp_path / "report.json"
    assert decode.main(["--model", str(checkpoint.BUNDLED), *SETTING, "--split", "device", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["results"][0]["step_bytes"] == [0] * 3
    assert report["table"][0]["split"] == "all on the device" and report["table"][0]["step / floor"] == "-"


def test_the_report_goes_below_the_current_directory_by_default(tmp_path, monkeypatch, capsys):
    """And what is there already is replaced."""
    monkeypatch.chdir(tmp_path)
    out = Path("profiling/results/cpu/decode-tiny-batch-2-prompt-9-layers-2.json")
    out.parent.mkdir(parents=True)
    out.write_text("an older report")
    assert decode.main(["--model", str(checkpoint.BUNDLED), *SETTING, "--split", "device"]) == 0
    assert os.listdir(out.parent) == [out.name]
    assert json.loads(out.read_text())["setting"] == {
        "model": "tiny", "layers": 2, "dtype": "float32", "batch": 2, "prompt": 9, "engine": "overlapped",
    }  # fmt: skip
    assert capsys.readouterr().err == f"wrote {out}\n"


@pytest.mark.parametrize("line, device, expected", [
    ("", "cpu", "cpu/decode-opt-6.7b-batch-32-prompt-1024"),
    ("--model facebook/OPT-1.3b --prompt 7", "TPU v4", "tpu-v4/decode-opt-1.3b-batch-32-prompt-7"),
    ("--layers 24 --batch 8", "NVIDIA H200", "nvidia-h200/decode-opt-6.7b-batch-8-prompt-1024-layers-24"),
    ("--model /models/My_Model/config.json", "cpu", "cpu/decode-my-model-batch-32-prompt-1024"),
    ("--model /models/tiny/snapshots/..", "cpu", "cpu/decode-tiny-batch-32-prompt-1024"),
], ids=str)  # fmt: skip
def test_the_reports_name_says_what_was_measured(line, device, expected, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(device_kind=device)])
    arguments = decode.parser().parse_args(shlex.split(line))
    out = decode.default_out(decode.name_of(arguments.model), arguments)
    assert out == Path(f"profiling/results/{expected}.json")


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    reports.write(path, {"old": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(ValueError, match=r"report\.json' cannot be written: full"):
            reports.write(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == [path.name]


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    """/dev/null, say, for whoever wants no report."""
    (tmp_path / "link").symlink_to(tmp_path / "report.json")
    reports.write(tmp_path / "report.json", {"old": 1})
    reports.write(tmp_path / "link", {})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "report.json").read_text() == "{}\n"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    reports.write(tmp_path / "pipe", {})
    assert (tmp_path / "pipe").is_fifo() and os.read(reader, 9) == b"{}\n"
    os.close(reader)


@pytest.mark.parametrize("out", ["folder", "file/report.json"])
def test_a_report_that_could_not_be_written_is_an_error_before_anything_is_measured(out, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "Decoder", lambda *_: pytest.fail("measured first"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert decode.main(["--model", str(checkpoint.BUNDLED), "--out", str(tmp_path / out)]) == 1
    line = rf"kvpr_jax\.profiling\.decode: error: '{tmp_path / out}' cannot be written: .*\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_prefill_flops_are_those_of_a_count_by_hand():
    """One layer of width 4, MLP 8, one head: 4·16 + 2·32 numbers in its kernels, for 2 · 3 tokens."""
    config = dataclasses.replace(helpers.OPT, num_layers=1, hidden_size=4, embed_size=4, num_heads=1, num_kv_heads=1,
                                 head_dim=4, mlp_size=8)  # fmt: skip
    decoder = Decoder(helpers.random_model(config))
    plan = decoder.plan([[3, 4, 5], [6, 7, 8]], 2)
    assert decode.prefill_flops(decoder, plan) == 2 * 6 * (4 * 16 + 2 * 32) + 2 * 6 * 3 * 4


def test_an_unknown_shape_is_one_line(capsys):
    assert decode.main(["--model", "opt-7b"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'opt-7b': neither a directory nor one of opt-125m" in error


@pytest.mark.parametrize(
    "name, billions", [("opt-125m", 0.125), ("opt-1.3b", 1.316), ("opt-6.7b", 6.658), ("opt-30b", 29.975)]
)
def test_named_shapes_have_the_published_size(name, billions):
    nbytes = checkpoint.weights_bytes(decode.shape(name, None), jnp.dtype("bfloat16"))
    assert nbytes / 2 / 1e9 == pytest.approx(billions, abs=0.001)


RESULTS = Path(__file__).parents[1] / "profiling" / "results"


@pytest.mark.parametrize("folder", sorted(path for path in RESULTS.iterdir() if path.is_dir()), ids=lambda p: p.name)
def test_the_pages_of_results_are_what_their_reports_say(folder):
    assert (folder / "README.md").read_text() == reports.page(folder)


def test_a_page_has_each_report_below_its_command(tmp_path, capsys):
    assert reports.main([str(tmp_path)]) == 1 and "has no reports" in capsys.readouterr().err
    report = reports.header("decode", ["--batch", "3"]) | {"table": [{"a": "1", "b": "2"}]}
    reports.write(tmp_path / "some.json", report)
    (tmp_path / "some.svg").write_text("<svg/>")
    (tmp_path / "README.md").write_text("# Here\n\nBy hand.\n\n## old\n\ngone\n")
    assert reports.main([str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# Here\n\nBy hand.\n\n## some\n\n    python -m kvpr_jax.profiling.decode --batch 3\n\n")
    assert page.endswith("| a | b |\n| --- | --- |\n| 1 | 2 |\n\n![some](some.svg)\n") and "gone" not in page
    (tmp_path / "other.json").write_text("{}")
    assert reports.main([str(tmp_path)]) == 1 and "other.json is not a report" in capsys.readouterr().err
