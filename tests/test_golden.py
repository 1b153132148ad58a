"""Tokens and logits equal those recorded from transformers in tests/golden (see `make_golden.py`). Needs no torch."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from helpers import assert_close, each_engine, greedy, implicit_promotion
from kvpr_jax import checkpoint, costs
from kvpr_jax.plan import Request
from kvpr_jax.runtime import Decoder

GOLDEN = Path(__file__).parent / "golden"
EDGE, PROMPT = 16, 18  # the bucket edge within the longest prompt, and its length

# Name, split, recompute, tokens of the tail. Every way to hold the cache for the two main architectures, and two for
# each of the others. 19 tokens are fed: tails of 4 are flushed four times and merged, of 5 three times, of 7 twice.
GRID = [
    ("opt", 0, "project", 4),
    ("opt", 1, "absorb", 5),
    ("opt", EDGE - 1, "absorb", 5),
    ("opt", EDGE, "project", 5),
    ("opt", EDGE, "absorb", 5),
    ("opt", EDGE + 1, "project", 7),
    ("opt", PROMPT, "project", 7),
    ("opt", PROMPT, "absorb", 4),
    ("llama", 0, "absorb", 7),
    ("llama", 1, "project", 5),
    ("llama", EDGE - 1, "project", 5),
    ("llama", EDGE, "absorb", 5),
    ("llama", EDGE + 1, "absorb", 7),
    ("llama", PROMPT, "project", 4),
    ("opt-350m", EDGE, "project", 7),
    ("opt-350m", 9, "absorb", 5),
    ("opt-no-bias-untied", 9, "project", 7),
    ("opt-no-bias-untied", EDGE, "absorb", 7),
    ("opt-no-affine", EDGE, "absorb", 7),
    ("llama-gqa-llama3", 9, "project", 5),
    ("llama-gqa-llama3", EDGE, "absorb", 7),
    ("llama-linear", EDGE, "project", 7),
    ("llama-tied-biases", 9, "project", 7),
    ("llama-tied-biases", EDGE, "absorb", 7),
    ("llama-head-dim", EDGE, "absorb", 7),
    ("mistral", 9, "absorb", 5),
    ("mistral", EDGE, "project", 7),
    ("gpt2", 9, "project", 5),
    ("gpt2", EDGE, "absorb", 7),
    ("gpt2-unscaled", EDGE, "absorb", 7),
    ("gpt-neox", 9, "absorb", 5),
    ("gpt-neox", EDGE, "project", 7),
    ("gpt-neox-serial", PROMPT, "absorb", 7),
    ("phi", 9, "project", 7),
    ("phi", PROMPT, "absorb", 5),
    ("bloom", 9, "absorb", 5),
    ("bloom", EDGE, "project", 7),
    ("bloom-residual", EDGE, "absorb", 7),
    ("gemma", EDGE, "absorb", 5),
    ("gemma", 9, "project", 7),
    ("gemma-one-kv-head", EDGE, "absorb", 7),
    ("olmo2", 9, "absorb", 5),
    ("olmo2", EDGE, "project", 7),
    ("olmo2-gqa", EDGE, "absorb", 7),
    ("qwen2", EDGE, "absorb", 7),
    ("qwen2-gqa-tied", 9, "project", 7),
    ("qwen3", 9, "absorb", 5),
    ("qwen3", EDGE, "project", 7),
]


class Golden(NamedTuple):
    """A checkpoint, prompts, and what transformers makes of them in float32; see `make_golden.py`."""

    directory: Path
    prompts: list[list[int]]
    tokens: np.ndarray
    logits: np.ndarray
    more: dict[str, np.ndarray]


def read(name: str) -> Golden:
    with np.load(GOLDEN / name / "golden.npz") as file:
        more = dict(file)
    prompts = np.split(more.pop("prompts"), np.cumsum(more.pop("lengths"))[:-1])
    return Golden(GOLDEN / name, [p.tolist() for p in prompts], more.pop("tokens"), more.pop("logits"), more)


def test_the_grid_covers_every_case_and_the_edges_of_a_bucket():
    assert costs.buckets(PROMPT) == [0, EDGE, PROMPT]
    assert {name for name, *_ in GRID} == {path.name for path in GOLDEN.iterdir()} - {"bundled"}
    assert all(max(map(len, read(name).prompts)) == PROMPT for name, *_ in GRID)


@pytest.mark.parametrize("name, split, recompute, tail", GRID)
def test_float32_equals_transformers(name, split, recompute, tail, monkeypatch):
    golden = read(name)
    decoder = Decoder(checkpoint.load_model(golden.directory, "float32"))
    new_tokens = golden.tokens.shape[1]
    for engine in each_engine(monkeypatch, grouped=GRID.index((name, split, recompute, tail)) % 2 == 0):
        request = Request(split=str(split), recompute=recompute, engine=engine, tail_tokens=tail)
        tokens, logits, cache, plan = greedy(decoder, golden.prompts, new_tokens, request)
        np.testing.assert_array_equal(tokens, golden.tokens)
        assert_close(logits, golden.logits)
        flushes = (new_tokens - 2) // tail
        assert plan.split == split and flushes >= 2
        assert sum(segment.tokens for segment in cache.groups[0]) == PROMPT + flushes * tail


def forced_logits(decoder: Decoder, golden: Golden, request: Request) -> np.ndarray:
    """Logits (N, B, V) after the prompts and after each of the recorded tokens, whatever the model would have said."""
    new_tokens = golden.tokens.shape[1]
    cache, logits = decoder.prefill(golden.prompts, decoder.plan(golden.prompts, new_tokens, request))
    seen = [np.asarray(logits)]
    for step in range(new_tokens - 1):
        seen.append(np.asarray(decoder.step(cache, jnp.asarray(golden.tokens[:, step]))))
    return np.stack(seen)


@pytest.mark.parametrize("name", ["opt", "opt-350m", "llama"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_type_errs_no_more_than_with_keys_and_values_alone(name, dtype):
    golden = read(name)
    decoder = Decoder(checkpoint.load_model(golden.directory, dtype))
    errors = {}
    for split, recompute in ((0, "project"), (EDGE, "project"), (EDGE, "absorb")):
        with implicit_promotion():
            request = Request(split=str(split), recompute=recompute, tail_tokens=10)
            logits = forced_logits(decoder, golden, request)
        errors[split, recompute] = np.abs(logits - golden.logits).mean()
        assert_close(logits, golden.logits, dtype)
    assert max(errors.values()) <= 1.5 * errors[0, "project"], errors


@pytest.mark.parametrize("split, recompute", [("0", "project"), ("50%", "absorb"), ("100%", "project")])
def test_the_bundled_model_equals_transformers(split, recompute, monkeypatch):
    golden = read("bundled")
    stored = hashlib.sha256((checkpoint.BUNDLED / "model.safetensors").read_bytes()).hexdigest()
    assert stored == golden.more["model_sha256"], "models/tiny has changed: run python tests/make_golden.py bundled"
    tokenizer = checkpoint.load_tokenizer(checkpoint.BUNDLED)
    assert [tokenizer(text)["input_ids"] for text in golden.more["texts"].tolist()] == golden.prompts
    decoder = Decoder(checkpoint.load_model(checkpoint.BUNDLED, "float32"))
    for engine in each_engine(monkeypatch, grouped=split == "50%"):
        request = Request(split=split, recompute=recompute, engine=engine, tail_tokens=7)
        tokens, logits, _, _ = greedy(decoder, golden.prompts, golden.tokens.shape[1], request)
        np.testing.assert_array_equal(tokens, golden.tokens)
        assert_close(np.take_along_axis(logits, golden.more["logits_tokens"], -1), golden.logits)
