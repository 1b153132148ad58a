"""Perplexity: the windows, each token's nats against the model without a cache, and the command line."""

import argparse
import dataclasses
import io
import itertools
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import write, write_tokenizer

from helpers import LLAMA, OPT, TOLERANCE, implicit_promotion, random_model
from kvpr_jax import Decoder, Request, checkpoint, evaluate

TEXT = argparse.__doc__[:400] + "né日"
POSITIONS = 256


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer(checkpoint.BUNDLED)


@pytest.fixture
def half_precision():
    """flax's norms promote half precision to float32 themselves."""
    with implicit_promotion():
        yield


@pytest.fixture(scope="module")
def model(tokenizer):
    """A random OPT with the bundled tokenizer's vocabulary."""
    shape = {"vocab_size": len(tokenizer), "max_positions": POSITIONS, "num_layers": 2}
    return random_model(dataclasses.replace(OPT, **shape))


@pytest.fixture(scope="module")
def tokens(tokenizer):
    tokens = tokenizer(TEXT)["input_ids"]
    assert 100 < len(tokens) < POSITIONS
    return tokens


# The windows


@given(
    tokens=st.integers(2, 300),
    sizes=st.integers(2, 64).flatmap(lambda window: st.tuples(st.just(window), st.integers(1, window - 1))),
    batch=st.integers(1, 9),
)
def test_every_token_but_the_first_is_scored_once_given_enough(tokens, sizes, batch):
    window, stride = sizes
    how = evaluate.cut(tokens, 64, window, stride, batch)
    assert {len(spans) for spans in how.batches} == {len(how.batches[0])} and len(how.batches[0]) <= batch
    spans = sorted(set(itertools.chain(*how.batches)), key=lambda span: span.first)
    assert [i for span in spans for i in range(span.first, span.end)] == list(range(1, tokens))
    for span in spans:
        assert span.end - span.begin <= window and span.end - span.first <= stride
        assert span.first - span.begin == min(span.first, window - stride)


def test_the_windows_of_the_docstring():
    (spans,) = evaluate.cut(8, 100, 4, 2).batches
    assert [dataclasses.astuple(span) for span in spans] == [(0, 1, 3), (1, 3, 5), (3, 5, 7), (5, 7, 8)]


def test_window_and_stride_have_defaults():
    assert dataclasses.astuple(evaluate.cut(1000, 100))[:2] == (100, 50)
    assert dataclasses.astuple(evaluate.cut(31, 100))[:2] == (31, 15)
    assert dataclasses.astuple(evaluate.cut(2, 100))[:2] == (2, 1)


@pytest.mark.parametrize("stride", [64, 7])
def test_batches_of_a_long_text_share_their_shapes(stride):
    """Window 0 has one token to go by, the next ones little more; 11 batches of at most 8 do not see it."""
    how = evaluate.cut(81 * stride, 128, 128, stride, 8)
    assert len(how.batches) == 11
    shapes = [(len(spans), max(s.first - s.begin for s in spans), max(s.end - s.first for s in spans))
              for spans in how.batches]  # fmt: skip
    assert set(shapes) == {(8, 128 - stride, stride)}


# The nats


def brute_force(model, tokens, window: int, stride: int) -> np.ndarray:
    """Each token's nats, the text of each window through the model at once."""
    firsts = range(1, len(tokens), stride)
    begins = [max(0, first - (window - stride)) for first in firsts]
    padded = np.zeros((len(firsts), window), np.int32)  # at the end, where a causal model does not see it
    for row, begin in zip(padded, begins, strict=True):
        text = tokens[begin : begin + window]
        row[: len(text)] = text
    logits = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(padded)), np.float64)
    best = logits.max(-1, keepdims=True)
    logs = logits - best - np.log(np.exp(logits - best).sum(-1, keepdims=True))
    where = [((i - 1) // stride, i) for i in range(1, len(tokens))]
    return np.array([-logs[k, i - 1 - begins[k], tokens[i]] for k, i in where])


def assert_same(nats, expected) -> None:
    np.testing.assert_allclose(nats, expected, rtol=0, atol=TOLERANCE["float32"] * expected.max())


@pytest.mark.parametrize("window, stride, batch", [(None, None, 8), (32, 16, 3), (32, 5, 4), (24, 23, 8), (9, 1, 50)])
def test_nats_equal_those_of_the_model_without_a_cache(model, tokenizer, tokens, window, stride, batch):
    score = evaluate.perplexity(model, tokenizer, TEXT, window=window, stride=stride, batch=batch)
    assert (score.window, score.stride) == (window or len(tokens), stride or (window or len(tokens)) // 2)
    assert score.plan.offloaded and score.nats.std() > 1
    assert_same(score.nats, brute_force(model, tokens, score.window, score.stride))


def test_every_split_recompute_and_engine_gives_the_same_nats(model, tokenizer, tokens):
    expected = brute_force(model, tokens, 32, 16)
    for split, way, engine in itertools.product(
        ("0", "50%", "100%"), ("project", "absorb"), ("overlapped", "sequential")
    ):
        request = Request(split, way, engine, tail_tokens=8)  # flushed once
        score = evaluate.perplexity(model, tokenizer, TEXT, window=32, stride=16, request=request)
        assert (score.plan.split, score.plan.recompute, score.plan.engine) == (
            {"0": 0, "50%": 8, "100%": 16}[split], way, engine,
        )  # fmt: skip
        assert_same(score.nats, expected)


def test_a_model_with_rotary_positions_and_a_cache_on_the_device(tokenizer, tokens):
    model = random_model(dataclasses.replace(LLAMA, vocab_size=len(tokenizer), max_positions=POSITIONS, num_layers=2))
    for request in (Request("3", "absorb"), Request(offload="none")):
        score = evaluate.perplexity(model, tokenizer, TEXT, window=32, stride=12, request=request)
        assert_same(score.nats, brute_force(model, tokens, 32, 12))


def test_progress_counts_to_the_end(model, tokenizer, tokens):
    seen = []
    evaluate.perplexity(
        model, tokenizer, TEXT, window=32, stride=16, batch=3, progress=lambda done, total: seen.append((done, total))
    )
    batches = math.ceil(math.ceil((len(tokens) - 1) / 16) / 3)
    assert batches > 1 and seen == [(done, batches * 16) for done in range(1, batches * 16 + 1)]


def test_perplexity_and_bits_per_byte_are_what_they_are(model, tokenizer):
    score = evaluate.perplexity(model, tokenizer, TEXT, window=32)
    assert score.text_bytes == len(TEXT) + 3  # é is two bytes, 日 three
    halves = dataclasses.replace(score, nats=np.log(np.array([2, 2, 4, 8, 8, 2, 2, 4], np.float32)), text_bytes=4)
    assert halves.mean_nats == pytest.approx(math.log(2) * 14 / 8)
    assert halves.perplexity == pytest.approx(2 ** (14 / 8))
    assert halves.bits_per_byte == pytest.approx(14 / 4)


@pytest.mark.parametrize("text, options, message", [
    ("", {}, "the text is empty"),
    ("a", {}, "'a' is a single token"),
    (TEXT, {"window": 1}, "window 1 must be from 2 to 256"),
    (TEXT, {"window": 257}, "window 257 must be from 2 to 256"),
    (TEXT, {"stride": 0}, "stride 0 must be from 1 to"),
    (TEXT, {"window": 32, "stride": 32}, "stride 32 must be from 1 to 31"),
    (TEXT, {"batch": 0}, "batch 0 must be at least 1"),
    (TEXT, {"request": Request("99"), "window": 32}, "split 99 is more than"),
])  # fmt: skip
def test_bad_input_is_named(model, tokenizer, monkeypatch, text, options, message):
    if text == "a":
        monkeypatch.setattr(evaluate, "encode", lambda tokenizer, texts: [[5]])  # the bundled tokenizer begins a text
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate.perplexity(model, tokenizer, text, **options)


def test_numbers_that_are_not_finite_are_no_perplexity(tokenizer, tmp_path, half_precision):
    config = dataclasses.replace(OPT, vocab_size=len(tokenizer), num_layers=1)
    model = checkpoint.load_model(write(tmp_path, random_model(config, scale=1e4)), "float16")
    with pytest.raises(ValueError, match="float16 has too little range"):
        evaluate.perplexity(model, tokenizer, "a few words", window=8)


# The command line


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    return write_tokenizer(write(tmp_path_factory.mktemp("model"), model))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def run(directory, capfd):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def main(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = evaluate.main(["--model", str(directory), *map(str, arguments)])
        except SystemExit as exit:
            code = exit.code
        return code, *capfd.readouterr()

    return main


def test_one_line_says_it_all(run, path, model, tokenizer, tokens):
    request = Request("50%", "absorb")
    score = evaluate.perplexity(model, tokenizer, TEXT, window=32, stride=8, request=request)
    assert run("--text", path, "--window", 32, "--stride", 8, "--split", "50%", "--recompute", "absorb") == (
        0,
        f"perplexity {score.perplexity:.3f}, {score.bits_per_byte:.3f} bits per byte ({len(tokens) - 1} tokens, "
        f"{len(TEXT.encode())} bytes; window 32, stride 8; "
        "split 12 of 24 tokens (absorb), overlapped engine, float32)\n",
        "",
    )


def test_the_text_may_come_from_stdin_and_keeps_its_line_ends(run, monkeypatch, tmp_path):
    text = "one\r\ntwo\r\n"
    (tmp_path / "text.txt").write_bytes(text.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    code, out, err = run("--stdin", "--offload", "none", "--engine", "sequential")
    assert (code, err) == (0, "") and "10 bytes" in out and "no offload, sequential engine" in out
    assert run("--text", tmp_path / "text.txt", "--offload", "none", "--engine", "sequential")[1] == out


def test_json_is_one_object_and_compare_adds_runs_to_it(run, path, directory, model, tokenizer, tokens, half_precision):
    code, out, err = run("--text", path, "--window", 32, "--split", 16, "--json", "--compare", "0,bfloat16,50%")
    assert (code, err, out.count("\n")) == (0, "", 1)
    told = json.loads(out)
    numbers = {"dtype", "perplexity", "bits_per_byte", "mean_nats", "plan"}
    assert set(told) == {"model", "tokens", "bytes", "window", "stride", "compare"} | numbers
    assert (told["model"], told["tokens"], told["bytes"]) == (str(directory), len(tokens) - 1, len(TEXT.encode()))
    assert (told["window"], told["stride"], told["dtype"], told["plan"]["split"]) == (32, 16, "float32", 16)
    score = evaluate.perplexity(model, tokenizer, TEXT, window=32)
    assert told["perplexity"] == pytest.approx(score.perplexity, rel=1e-5)
    assert told["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-5)
    streamed, narrow, half = told["compare"]
    assert set(narrow) == numbers | {"mean_nats_difference", "largest_nats_difference"}
    assert [(r["plan"]["split"], r["dtype"]) for r in told["compare"]] == [
        (0, "float32"), (16, "bfloat16"), (8, "float32"),
    ]  # fmt: skip
    for one in told["compare"]:
        assert one["mean_nats_difference"] == pytest.approx(one["mean_nats"] - told["mean_nats"], abs=1e-12)
        assert one["largest_nats_difference"] >= abs(one["mean_nats_difference"])
    assert max(streamed["largest_nats_difference"], half["largest_nats_difference"]) < 1e-3
    assert narrow["largest_nats_difference"] > 1e-2  # bfloat16 was really run


def test_compare_prints_a_table(run, path, half_precision):
    code, out, err = run("--text", path, "--window", 32, "--split", 16, "--compare", "0,float16")
    assert (code, err) == (0, "")
    line, heading, *rows = out.splitlines()
    assert line.startswith("perplexity ")
    titles = ["setting", "perplexity", "bits per byte", "mean nats - first", "largest difference"]
    assert re.split("  +", heading.strip()) == titles
    cells = [re.split("  +", row.strip()) for row in rows]
    assert [row[0] for row in cells] == ["split 16, float32", "split 0, float32", "split 16, float16"]
    assert {len(row) for row in cells} == {5} and cells[0][3:] == ["+0.0e+00", "0.0e+00"]
    assert float(cells[1][4]) < 1e-3 < float(cells[2][4])
    assert f"{float(cells[0][1]):.3f}" in line


def test_differences_are_those_from_the_first(model, tokenizer):
    score = evaluate.perplexity(model, tokenizer, "some words", window=8)
    first = dataclasses.replace(score, nats=np.array([1, 2, 3, 4], np.float32))
    other = dataclasses.replace(score, nats=np.array([1, 2.5, 1, 4], np.float32))
    assert evaluate.differences(other, first) == {"mean_nats_difference": -0.375, "largest_nats_difference": 2.0}


@pytest.mark.parametrize("arguments, parts", [
    ([], ["--text", "--stdin", "required"]),
    (["--text", "{path}", "--stdin"], ["--stdin", "not allowed with", "--text"]),
    (["--text", "/no/such/file"], ["text '/no/such/file' cannot be read"]),
    (["--text", ""], ["text '' cannot be read"]),
    (["--text", "{latin}"], ["cannot be read", "utf-8"]),
    (["--text", "{empty}"], ["the text is empty"]),
    (["--text", "{path}", "--window", "257"], ["window 257", "256"]),
    (["--text", "{path}", "--window", "many"], ["--window", "'many'"]),
    (["--text", "{path}", "--stride", "0"], ["stride 0"]),
    (["--text", "{path}", "--batch", "0"], ["batch 0"]),
    (["--text", "{path}", "--split", "half"], ["split 'half'"]),
    (["--text", "{path}", "--split", "40", "--window", "32"], ["split 40", "16 tokens"]),
    (["--text", "{path}", "--device-cache-gib", "1"], ["device-cache-gib 1.0", "offload auto"]),
    (["--text", "{path}", "--compare", "0,half"], ["compare 'half'", "bfloat16", "percentage"]),
    (["--text", "{path}", "--compare", "0,,float16"], ["compare ''"]),
    (["--text", "{path}", "--compare", ""], ["compare ''"]),
    (["--text", "{path}", "--compare", "0,40", "--window", "32"], ["split 40", "16 tokens"]),
    (["--text", "{path}", "--offload", "none", "--compare", "0"], ["compare '0'", "offload none"]),
])  # fmt: skip
def test_usage_errors_are_one_line_before_the_model_is_loaded(run, path, tmp_path, monkeypatch, arguments, parts):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"")
    monkeypatch.setattr(checkpoint, "load_model", None)
    names = {"path": path, "latin": tmp_path / "latin", "empty": tmp_path / "empty"}
    code, out, err = run(*(argument.format(**names) for argument in arguments))
    assert (code, out) == (2, "")
    assert re.fullmatch(r"kvpr_jax\.evaluate: error: .*\S.*\n", err), err
    assert [part for part in parts if part not in err] == [], err


def test_a_model_that_is_not_there_is_an_error_of_its_own(run, path):
    code, out, err = run("--text", path, "--model", "nowhere")
    assert (code, out) == (1, "") and re.fullmatch("kvpr_jax.evaluate: error: model 'nowhere': .*\n", err)


def test_stdin_may_be_closed(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    code, out, err = run("--stdin")
    assert (code, out) == (2, "") and err.startswith("kvpr_jax.evaluate: error: text on stdin cannot be read")


def test_ctrl_c_ends_with_130_and_prints_nothing(run, path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "step", interrupted)
    assert run("--text", path, "--window", 32, "--json") == (130, "", "")
