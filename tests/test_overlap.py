"""The overlap study: both sides compute the same layer, both profilers' traces are read alike, the table adds up."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers import OPT, assert_close, random_model
from kvpr_jax import memory
from kvpr_jax.profiling import nvidia, overlap, timeline
from kvpr_jax.profiling.timeline import Span
from kvpr_jax.runtime import Decoder
from kvpr_jax.segments import Activations, KeysValues, Place

TRACES = Path(__file__).parent / "traces"
BATCH, CACHED, WRITTEN = 2, 12, 3  # tokens in segments, and in the tail before the new one


@pytest.mark.parametrize("split", [0, 5, CACHED])
@pytest.mark.parametrize("recompute", ["project", "absorb"])
def test_pytorch_computes_the_same_layer(split, recompute):
    torch = pytest.importorskip("torch", reason="the CUDA-stream side needs PyTorch")
    from kvpr_jax.profiling import cuda_streams

    decoder = Decoder(random_model(OPT))
    params = nnx.to_pure_dict(nnx.state(decoder.layer.module(decoder.params[0])))
    rng = np.random.default_rng(0)
    heads, width = OPT.num_heads, OPT.head_dim
    x, h = (rng.normal(size=(BATCH, n, OPT.hidden_size)).astype(np.float32) for n in (split, 1))
    kv = rng.normal(size=(2, BATCH, CACHED - split, heads, width)).astype(np.float32)
    tail = rng.normal(size=(2, BATCH, WRITTEN + 4, heads, width)).astype(np.float32)

    slots = jnp.arange(CACHED + WRITTEN + 4, dtype=jnp.int32)
    held = [Activations(jnp.asarray(x)[None], slots[:split])] if split else []
    held += [KeysValues(*map(jnp.asarray, kv[:, None]), slots[split:CACHED])] if split < CACHED else []
    tails = [memory.placed(KeysValues(*map(jnp.asarray, tail[:, None]), slots[CACHED:]))] * OPT.num_layers
    place = Place(slots[CACHED + WRITTEN :][:1], None)
    ours = decoder.compute(tails, place, [decoder.shared(recompute)] * len(tails))(0, jnp.asarray(h), tuple(held))

    def both(module, weight):  # PyTorch's weights are (out, in)
        return torch.from_numpy(np.array(module[weight]).T.copy()), torch.from_numpy(np.array(module["bias"]))

    attention, mlp = params["attention"], params["mlp"]
    layer = cuda_streams.Layer(
        both(params["attention_norm"], "scale"), *(both(attention[name], "kernel") for name in "qkvo"),
        both(params["mlp_norm"], "scale"), both(mlp["up"], "kernel"), both(mlp["down"], "kernel"),
    )  # fmt: skip

    def by_heads(array):
        return torch.from_numpy(array).transpose(1, 2).contiguous()

    theirs_tail = cuda_streams.Tail(*map(by_heads, tail), length=WRITTEN)
    segments = [[torch.from_numpy(x)]] if split else []
    segments += [list(map(by_heads, kv))] if split < CACHED else []
    theirs = cuda_streams.layer_step(layer, torch.from_numpy(h[:, 0]), segments, theirs_tail, recompute)
    assert_close(np.asarray(ours[:, 0]), theirs.numpy())
    new = theirs_tail.keys[:, :, WRITTEN].numpy()
    assert_close(np.asarray(tails[0].keys[0, :, WRITTEN]), new)


@pytest.mark.parametrize("name", ["xla.trace.json", "torch.trace.json"])
def test_traces_of_both_profilers_give_one_form(name):
    """Cut from traces of an H200; see traces/README.md for what each one holds."""
    expected = json.loads((TRACES / "expected.json").read_text())[name]
    spans = timeline.last_step(TRACES / name)
    assert [(span.lane, round(span.begin_s * 1e6), round(span.end_s * 1e6)) for span in spans] == [
        tuple(row) for row in expected
    ]


@pytest.mark.parametrize("events, message", [([], "no 'decode step'"), ([
    {"ph": "X", "name": timeline.STEP, "pid": 1, "ts": 5, "dur": 2},
], "nothing of a GPU")])  # fmt: skip
def test_a_trace_without_steps_or_device_is_named(tmp_path, events, message):
    trace = tmp_path / "some.trace.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    with pytest.raises(ValueError, match=message) as raised:
        timeline.last_step(trace)
    assert str(trace) in str(raised.value)


STEP = overlap.Setting("opt-125m", 4, 8, 2, 32, 3, 100, 40, "absorb", "bfloat16")


def test_bytes_are_those_of_both_forms():
    assert STEP.link_bytes == 4 * 3 * (40 * 8 + 60 * 2 * 8) * 2
    assert dataclasses.replace(STEP, dtype="float32").link_bytes == 2 * STEP.link_bytes


def test_the_table_gives_efficiency_and_the_ratio_to_the_floor():
    """10 ms of copies and 4 ms of compute in 11 ms: 3 of the 4 ms are hidden; the floor is 8 ms."""
    measured = overlap.Measured("v", [0.010, 0.010, 9.0], [0.004] * 3, [0.011, 0.011, 0.012], [0.001] * 3, [])
    (row,) = overlap.rows([STEP], [[measured]], STEP.link_bytes / 0.008 / 1e9)
    assert row["overlap"] == "75%" and row["both / floor"] == "1.375" and row["host issues in (ms)"] == "1.00"
    assert row["split"] == "40 of 100" and row["min to max"] == "11.00 to 12.00"


def test_the_picture_has_a_bar_for_each_span(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    spans = [Span("copy", 0.0, 0.002), Span("copy", 0.002, 0.004), Span("compute", 0.002, 0.003)]
    out = tmp_path / "step.svg"
    timeline.draw({"one": spans, "other": spans[:1]}, "a step", out)
    assert "a step" in out.read_text() and out.read_text().count("<!-- other -->") == 1


@pytest.mark.parametrize("missing, message", [("torch", "needs torch: pip install"), ("gpu", "no NVIDIA GPU")])
def test_what_is_missing_is_one_line(missing, message, tmp_path, monkeypatch, capsys):
    spec = None if missing == "torch" else object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(nvidia, "driver", lambda: "none" if missing == "gpu" else "580.1 PCIe 5.0 x16")
    assert overlap.main(["--out", str(tmp_path / "out.json")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kvpr_jax.profiling.overlap: error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("arguments, message", [
    (["--model", "llama-2-7b"], "'llama-2-7b' must be an OPT"),
    (["--model", "opt-350m"], "'opt-350m' must be an OPT other than opt-350m"),
    (["--split", "auto"], "split auto"),
    (["--split", "2000"], "split 2000 is more than the prompt's 1024 tokens"),
])  # fmt: skip
def test_what_cannot_be_compared_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overlap, "require", lambda: None)
    assert overlap.main([*arguments, "--out", str(tmp_path / "out.json")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_xla_measures_each_of_its_forms(monkeypatch):
    from kvpr_jax.profiling import xla_copies

    monkeypatch.setattr(
        xla_copies, "traced", lambda step: [Span("copy", 0.0, float(jax.block_until_ready(step()).size))]
    )
    monkeypatch.setattr(xla_copies, "TRIALS", 1)
    setting = overlap.Setting("opt-125m", 2, 768, 12, 3072, 2, 8, 4, "absorb", "float32")
    measured = xla_copies.measure(xla_copies.Decoding(setting))
    assert [each.variant for each in measured] == ["XLA, device_put", "XLA, in the layer step", "XLA, in one step"]
    for each in measured:
        assert all(
            len(times) == 1 and times[0] > 0 for times in (each.copy_s, each.compute_s, each.both_s, each.issue_s)
        )
        assert each.spans[0].end_s == 2 * 768


def test_the_forms_of_xla_compute_the_same():
    from kvpr_jax.profiling import xla_copies

    decoding = xla_copies.Decoding(overlap.Setting("opt-125m", 3, 768, 12, 3072, 2, 8, 4, "absorb", "float32"))
    reference = np.asarray(decoding.by_layer())
    for got in (
        decoding.step(decoding.engine()), decoding.in_layer_steps("absorb"), decoding.whole("absorb"),
        decoding.whole_alone(),
    ):  # fmt: skip
        assert_close(np.asarray(got), reference)
    for copies in (decoding.copies(decoding.engine()), decoding.in_layer_steps(None), decoding.whole(None)):
        np.testing.assert_array_equal(np.asarray(copies), np.asarray(decoding.h))
