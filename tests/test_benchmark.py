"""The decode benchmark on a small shape: it measures what it says, keeps every trial, refuses unknown shapes."""

import dataclasses
import json
import statistics

import jax.numpy as jnp
import pytest

import helpers
from kvpr_jax import checkpoint
from kvpr_jax.profiling import decode, link, matmul
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


def test_a_cache_on_the_device_crosses_no_link(tmp_path):
    out = tmp_path / "report.json"
    assert decode.main(["--model", str(checkpoint.BUNDLED), *SETTING, "--split", "device", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["results"][0]["step_bytes"] == [0] * 3
    assert report["table"][0]["split"] == "all on the device" and report["table"][0]["step / floor"] == "-"


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
