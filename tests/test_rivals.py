"""The comparison with transformers' own decoding: every step is timed, ratios are right, a failure stops no other.

Measured on a CPU, where nothing can be offloaded; JAX's part is a report made up or made in this process.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import types

import pytest
import transformers

from kvpr_jax import checkpoint, command_line
from kvpr_jax.models import architecture, released
from kvpr_jax.profiling import decode, link, matmul, rivals, settings

PROMPTS = [[3, 4, 5, 6, 7], [7, 6, 5, 4, 3]]
STEPS = 4
GIB = 2**30

# What `decode` reports, as far as it is read: medians of 20 and 10 ms.
OURS = {
    "command": "python -m kvpr_jax.profiling.decode", "date": "2025-01-01", "versions": {},
    "machine": {"device": "made up"},
    "setting": {"model": "tiny", "layers": 2, "dtype": "float32", "batch": 2, "prompt": 9, "engine": "overlapped"},
    "results": [
        {"plan": {"split": split, "cached_tokens": 64}, "step_s": step_s, "prefill_s": 0.5,
         "peak_device_bytes": 3 * GIB}
        for split, step_s in ((0, [0.018, 0.02, 0.03]), (64, [0.01, 0.009, 0.05]))
    ],
}  # fmt: skip

NAMES = {release.model_type: name for name, release in released.RELEASED.items()}  # one of each architecture


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the rival is transformers on torch: pip install '.[torch]'")


@pytest.fixture
def small():
    return transformers.OPTConfig(
        vocab_size=89, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=32,
    )  # fmt: skip


def test_without_torch_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert rivals.main(["--model", "opt-125m"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kvpr_jax.profiling.rivals: error: torch cannot be imported (") and error.count("\n") == 1
    assert "pip install '.[torch]'" in error


def test_without_a_gpu_one_line_says_what_is_needed(torch, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rivals.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"kvpr_jax.profiling.rivals: error: torch {torch.__version__} sees no CUDA GPU: ")
    assert "an NVIDIA GPU and a torch built for CUDA, pip install '.[torch]'" in error and error.count("\n") == 1


def test_an_unknown_shape_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(rivals, "cuda", lambda: "cuda")
    assert rivals.main(["--model", "opt-7b"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'opt-7b': neither a directory nor one of opt-125m" in error


@pytest.mark.parametrize("model", [*NAMES.values(), str(checkpoint.BUNDLED), f"{checkpoint.BUNDLED}/config.json"])
def test_the_shape_is_that_of_the_decode_benchmark(model):
    hf = rivals.shape(model, 2, 9)
    assert architecture(hf.model_type).Config.from_hf(hf) == settings.shape(model, 2)
    assert len(getattr(hf, "layer_types", None) or [0, 0]) == 2


def test_there_is_room_for_a_longer_sequence_than_the_model_was_made_for():
    assert rivals.shape("opt-6.7b", None, 5000).max_position_embeddings == 5000
    assert rivals.shape("gpt2", None, 5000).n_positions == 5000


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_step_is_timed_by_itself(torch, small, cache, monkeypatch):
    calls = []
    forward = transformers.OPTForCausalLM.forward

    @functools.wraps(forward)  # generate reads its signature
    def counted(self, *args, **kwargs):
        calls.append((self.training, self.dtype, kwargs["input_ids"].shape[1]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.OPTForCausalLM, "forward", counted)
    result = rivals.measure(small, "cpu", "bfloat16", PROMPTS, STEPS, cache)
    assert len(result["step_s"]) == STEPS and min(result["step_s"]) > 0 and result["prefill_s"] > 0
    assert result["peak_device_bytes"] is None
    # The prompt, and each new token but the last: once to warm up, once timed.
    tokens = [len(PROMPTS[0])] + [1] * (rivals.WARM_UP_TOKENS - 1) + [len(PROMPTS[0])] + [1] * STEPS
    assert calls == [(False, torch.bfloat16, count) for count in tokens]


def test_a_slow_prompt_and_a_slow_step_are_found_where_they_are(torch, small, monkeypatch):
    """Time goes by in the model alone: 0.5 s for the prompt, then 1, 2, 3 and 4 s, as a clock of our own says."""
    clock, forward = [0.0], transformers.OPTForCausalLM.forward
    later = iter([0.0] * rivals.WARM_UP_TOKENS + [0.5, 1.0, 2.0, 3.0, 4.0])

    @functools.wraps(forward)
    def slow(self, *args, **kwargs):
        clock[0] += next(later)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.OPTForCausalLM, "forward", slow)
    monkeypatch.setattr(rivals.time, "perf_counter", lambda: clock[0])
    result = rivals.measure(small, "cpu", "float32", PROMPTS, STEPS, "dynamic")
    assert result == {"prefill_s": 0.5, "step_s": [1.0, 2.0, 3.0, 4.0], "peak_device_bytes": None}


def test_a_cache_that_fails_gives_the_first_line_of_its_error(torch, small, monkeypatch):
    def measure(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried this and that.")

    failed = rivals.trial(small, "cpu", "float32", PROMPTS, STEPS, "none such")
    assert failed["cache"] == "none such" and failed["error"].startswith("ValueError: Invalid `cache_implementation`")
    monkeypatch.setattr(rivals, "measure", measure)
    failed = rivals.trial(small, "cpu", "float32", PROMPTS, STEPS, "static")
    assert failed == {"cache": "static", "error": "OutOfMemoryError: CUDA out of memory."}


def test_the_table_compares_medians_with_the_best_of_ours():
    static = {"cache": "static", "step_s": [0.004, 0.007, 0.005], "prefill_s": 0.25, "peak_device_bytes": 5 * GIB // 2}
    offloaded = {"cache": "offloaded", "step_s": [0.07, 0.075, 0.9], "prefill_s": 1, "peak_device_bytes": None}
    failed = {"cache": "dynamic", "error": "OutOfMemoryError: CUDA out of memory."}
    rows = rivals.rows(OURS["results"], [offloaded, failed, static], batch=3)
    assert [list(row.values()) for row in rows] == [
        ["kvpr_jax", "0 of 64 as activations", "20.00", "18.00 to 30.00", "150.0", "0.50", "3.00", "-"],
        ["kvpr_jax", "64 of 64 as activations", "10.00", "9.00 to 50.00", "300.0", "0.50", "3.00", "-"],
        ["transformers", "offloaded", "75.00", "70.00 to 900.00", "40.0", "1.00", "-", "7.50x"],
        ["transformers", "dynamic", "OutOfMemoryError: CUDA out of memory.", "-", "-", "-", "-", "-"],
        ["transformers", "static", "5.00", "4.00 to 7.00", "600.0", "0.25", "2.50", "0.50x"],
    ]
    assert all(list(row) == list(rows[0]) for row in rows) and list(rows[0])[-1] == "kvpr_jax is faster by"


def test_our_own_steps_are_the_decode_benchmarks(monkeypatch, capsys):
    """On the same setting, in a process that must find a GPU and leaves memory to others."""
    monkeypatch.setattr(link, "SIZES", (2**16, 2**20))
    monkeypatch.setattr(matmul, "SHAPES", ((256, 128, 64),))

    def here(command, env, capture_output, text):
        assert command[:3] == [sys.executable, "-m", "kvpr_jax.profiling.decode"]
        assert env["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false" and env["JAX_PLATFORMS"] == "cuda"
        code = decode.main(command[3:])
        return subprocess.CompletedProcess(command, code, stdout="", stderr=f"decode said {code}\n")

    monkeypatch.setattr(rivals, "subprocess", types.SimpleNamespace(run=here))
    setting = argparse.Namespace(
        model=str(checkpoint.BUNDLED), layers=2, batch=2, prompt=9, new_tokens=3, dtype="float32"
    )
    report = rivals.decode_report(setting)
    plans = [result["plan"] for result in report["results"]]
    assert [(plan["split"], plan["cached_tokens"], plan["batch"]) for plan in plans] == [(0, 9, 2), (9, 9, 2)]
    assert [len(result["step_s"]) for result in report["results"]] == [3, 3]
    assert report["setting"]["layers"] == 2 and report["setting"]["dtype"] == "float32"
    assert rivals.rows(report["results"], [], 2)[1]["cache"] == "9 of 9 as activations"
    capsys.readouterr()
    with pytest.raises(command_line.Failure, match=r"kvpr_jax.profiling.decode ended with exit code 1"):
        rivals.decode_report(argparse.Namespace(**vars(setting) | {"model": "opt-7b"}))
    assert capsys.readouterr().err.endswith("decode said 1\n")


def test_the_report_holds_both_and_jax_starts_no_backend(torch, tmp_path):
    """A backend would take the memory that torch is to have: here there is none that JAX could start."""
    out = tmp_path / "gpu" / "report.json"
    code = """if True:
        import json, sys
        from kvpr_jax.profiling import rivals
        rivals.cuda, rivals.decode_report = lambda: "cpu", lambda arguments: json.loads(sys.argv[1])
        sys.exit(rivals.main(sys.argv[2:]))
    """
    setting = ["--layers", "2", "--batch", "2", "--prompt", "9", "--new-tokens", "3", "--dtype", "float32"]
    caches = ["--cache", "dynamic", "--cache", "static"]
    options = ["--model", str(checkpoint.BUNDLED), *setting, *caches, "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(OURS), *options],
        env=os.environ | {"JAX_PLATFORMS": "none"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, f"wrote {out}\n")
    report = json.loads(out.read_text())
    assert report["command"] == f"python -m kvpr_jax.profiling.rivals {' '.join(options)}"
    assert report["kvpr_jax"] == {name: value for name, value in OURS.items() if name != "command"}
    assert report["machine"] == OURS["machine"]
    assert [(trial["cache"], len(trial["step_s"])) for trial in report["transformers"]] == [
        ("dynamic", 3),
        ("static", 3),
    ]
    assert "tiny, 2 layers, float32, batch 2, prompt 9, made up\n\n| decoder | cache | step (ms) |" in done.stdout
    assert all(row["step (ms)"] in done.stdout for row in report["table"]) and len(report["table"]) == 4
