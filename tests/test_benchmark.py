"""The decode benchmark on a small shape: it measures what it says, keeps every trial, refuses unknown shapes."""

import json
import statistics

import jax.numpy as jnp
import pytest

from kvpr_jax import checkpoint
from kvpr_jax.profiling import decode

SETTING = ["--layers", "2", "--batch", "2", "--prompt", "9", "--new-tokens", "3", "--dtype", "float32"]


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
    for result, row in zip(report["results"], report["table"], strict=True):
        assert len(result["step_s"]) == 3 and len(result["prefill_s"]) == 2 and min(result["step_s"]) > 0
        step_s = statistics.median(result["step_s"])
        assert row["step (ms)"] == f"{step_s * 1e3:.2f}"
        floor_s = result["step_bytes"][0] / report["link_gb_per_s"] / 1e9
        assert float(row["step / floor"]) == pytest.approx(step_s / floor_s, abs=0.006)
        assert row["step (ms)"] in printed


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
