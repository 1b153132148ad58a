"""Against transformers while it runs: every way to hold the cache, whole texts, sampling, and the bundled model."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpr_jax
from helpers import assert_close, each_engine, greedy
from kvpr_jax import checkpoint, costs, evaluate, steps
from kvpr_jax.models import Model
from kvpr_jax.plan import Request
from kvpr_jax.runtime import Decoder
from kvpr_jax.sampling import Sampling, allowed, prompt_keys

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch: pip install -e '.[test,oracle]'")

import transformers  # noqa: E402
from transformers.generation import logits_process  # noqa: E402

import make_golden  # noqa: E402

SEED = 77  # of the checkpoints; none of the golden ones
LENGTHS = (19, 5, 1, 12)
EDGE, PROMPT = 16, 19  # the bucket edge within the longest prompt, and its length
WHOLE_GRID = (
    "opt", "opt-350m", "llama", "mistral", "gpt2", "gpt-neox", "phi", "bloom", "gemma", "olmo2", "qwen2", "qwen3",
)  # fmt: skip

# Name, split, recompute, tokens of the tail. With split 0 there are no activations for `recompute` to apply to.
# 19 tokens are fed: tails of 4 are flushed four times and merged, of 5 three times, of 7 twice.
GRID = [
    (name, split, recompute, 4 if split in (0, PROMPT) else 5)
    for name in WHOLE_GRID
    for split in (0, 1, EDGE - 1, EDGE, EDGE + 1, PROMPT)
    for recompute in ("project", "absorb")
    if split or recompute == "project"
] + [
    (name, split, recompute, 7)
    for name in make_golden.CASES
    if name not in WHOLE_GRID
    for split, recompute in ((EDGE, "absorb"), (7, "project"))
]


@dataclasses.dataclass
class Reference:
    """A fresh random checkpoint as ours and as theirs, and what transformers makes of ragged prompts with it."""

    model: Model
    theirs: Any
    prompts: list[list[int]]
    tokens: np.ndarray
    logits: np.ndarray


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Callable[[str], Reference]:
    """A function from a case's name to its `Reference`, made when it is first asked for."""
    made: dict[str, Reference] = {}

    def make(name: str) -> Reference:
        if name not in made:
            directory = tmp_path_factory.mktemp("checkpoints") / name
            case = dataclasses.replace(make_golden.CASES[name], lengths=LENGTHS)
            prompts, tokens, logits = make_golden.build(case, directory, SEED)
            model = checkpoint.load_model(directory, "float32")
            made[name] = Reference(model, make_golden.reference_model(directory), prompts, tokens, logits)
        return made[name]

    return make


@pytest.mark.parametrize("name, split, recompute, tail", GRID)
def test_greedy_text_equals_transformers(reference, name, split, recompute, tail, monkeypatch):
    assert costs.buckets(PROMPT) == [0, EDGE, PROMPT]
    expected = reference(name)
    decoder = Decoder(expected.model)
    for engine in itertools.chain(each_engine(monkeypatch, grouped=True), each_engine(monkeypatch, grouped=False)):
        request = Request(split=str(split), recompute=recompute, engine=engine, tail_tokens=tail)
        tokens, logits, cache, plan = greedy(decoder, expected.prompts, make_golden.NEW_TOKENS, request)
        np.testing.assert_array_equal(tokens, expected.tokens)
        assert_close(logits, expected.logits)
        flushes = (make_golden.NEW_TOKENS - 2) // tail
        assert plan.split == split and flushes >= 2
        assert sum(segment.tokens for segment in cache.groups[0]) == PROMPT + flushes * tail


@pytest.mark.parametrize("name", make_golden.CASES)
def test_logits_of_a_whole_text_equal_transformers(reference, name):
    """`Model.__call__`: without a cache, padded on the left."""
    expected = reference(name)
    texts = [[*prompt, *new] for prompt, new in zip(expected.prompts, expected.tokens.tolist(), strict=True)]
    inputs = make_golden.left_padded(texts)
    if expected.theirs.config.model_type == "gpt2":  # it would count the padding, where the others do not
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clip(0)
    with torch.no_grad():
        theirs = expected.theirs(**inputs).logits.numpy()
    written = inputs["attention_mask"].numpy().astype(bool)
    tokens, start = jnp.asarray(inputs["input_ids"].numpy(), jnp.int32), jnp.asarray(written.argmax(1), jnp.int32)
    ours = np.asarray(jax.jit(lambda model, tokens, start: model(tokens, start))(expected.model, tokens, start))
    assert_close(ours[written], theirs[written])


# Sampling


def warped(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What transformers' warpers, in its order, make of logits (B, V); -inf for what they exclude."""
    warpers = logits_process.LogitsProcessorList()
    if sampling.temperature != 1:
        warpers.append(logits_process.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(logits_process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(logits_process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(logits_process.MinPLogitsWarper(sampling.min_p))
    return warpers(torch.zeros((len(logits), 1), dtype=torch.long), torch.from_numpy(logits)).numpy()


def on_an_edge(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Tokens so near the limit of top-p or min-p that the order of a sum decides."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    ranked = np.take_along_axis(logits.astype(np.float64) / sampling.temperature, order, -1)
    likely = np.exp(ranked - ranked[:, :1])
    if sampling.top_k:
        likely[:, sampling.top_k :] = 0
    near = np.zeros(logits.shape, bool)
    if sampling.min_p:
        near |= np.abs(likely / sampling.min_p - 1) < 1e-4
    if sampling.top_p < 1:
        probability = likely / likely.sum(-1, keepdims=True)
        near |= np.abs(probability.cumsum(-1) - probability - sampling.top_p) < 1e-5
    out = np.zeros_like(near)
    np.put_along_axis(out, order, near, -1)
    return out


jitted_allowed = jax.jit(allowed)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 3.0, 10.0]),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    top_k=st.just(0) | st.integers(1, 60),
    top_p=st.just(1.0) | st.floats(0.01, 0.999),
    min_p=st.just(0.0) | st.floats(0.001, 1.0),
)
def test_allowed_tokens_equal_transformers(seed, spread, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature, top_k, top_p, min_p)
    logits = np.random.default_rng(seed).normal(0, spread, (8, 53)).astype(np.float32)
    theirs = np.isfinite(warped(logits, sampling))
    ours = np.asarray(jitted_allowed(logits / np.float32(temperature), sampling))
    different = (ours != theirs) & ~on_an_edge(logits, sampling)
    assert not different.any(), f"rows, tokens: {np.argwhere(different).tolist()}"


def test_equally_likely_tokens_stay_or_go_together():
    """As in transformers, but for its top-p, which keeps some of them, by their order in the vocabulary."""
    logits = np.random.default_rng(0).integers(-3, 4, (200, 53)).astype(np.float32)
    for sampling in (Sampling(1.0, top_k=5), Sampling(1.0, min_p=0.3), Sampling(1.0, top_k=20, min_p=0.1)):
        ours = np.asarray(jitted_allowed(logits, sampling))
        np.testing.assert_array_equal(ours, np.isfinite(warped(logits, sampling)))
    sampling = Sampling(1.0, top_p=0.75)
    ours, theirs = np.asarray(jitted_allowed(logits, sampling)), np.isfinite(warped(logits, sampling))
    least = np.where(theirs, logits, np.inf).min(-1, keepdims=True)
    np.testing.assert_array_equal(ours, logits >= least)


def assert_drawn_from(counts: np.ndarray, probability: np.ndarray) -> None:
    """Pearson's chi-square over the outcomes that are expected often enough; five standard deviations are let pass."""
    expected = counts.sum() * probability
    assert counts[probability == 0].sum() == 0
    often = expected >= 10
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    freedom = often.sum() - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5, f"{statistic:.1f} with {freedom} degrees of freedom"


@pytest.mark.parametrize("sampling", [
    Sampling(1.0), Sampling(0.5), Sampling(2.0), Sampling(0.8, top_k=4), Sampling(1.3, top_p=0.8),
    Sampling(1.0, min_p=0.15), Sampling(0.9, top_k=6, top_p=0.9, min_p=0.05),
], ids=str)  # fmt: skip
def test_draws_follow_the_probabilities_of_transformers(sampling):
    """Over many prompts' keys; a prompt's next draw does not depend on the one before."""
    row = np.random.default_rng(5).normal(0, 1.5, (1, 9)).astype(np.float32)
    probability = torch.softmax(torch.from_numpy(warped(row, sampling)), -1).double().numpy()[0]
    keys = prompt_keys(3, [[index, 7] for index in range(20000)])
    logits = jnp.broadcast_to(jnp.asarray(row), (20000, 9))
    first, second = (
        np.asarray(steps.sample(logits, keys, jnp.int32(index), sampling, choice=sampling.choice)[0])
        for index in (0, 1)
    )
    for draws in (first, second):
        assert_drawn_from(np.bincount(draws, minlength=9), probability)
    assert_drawn_from(np.bincount(first * 9 + second, minlength=81), np.outer(probability, probability).ravel())


# The bundled model


@pytest.fixture(scope="module")
def bundled():
    """Texts, and transformers' model of models/tiny in float32, with the tokenizer."""
    texts, *_ = make_golden.bundled()
    return texts, make_golden.reference_model(make_golden.TINY), checkpoint.load_tokenizer(make_golden.TINY)


def test_transformers_loads_every_tensor_of_the_bundled_model():
    model, report = transformers.AutoModelForCausalLM.from_pretrained(make_golden.TINY, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float16


def their_tokens(theirs, tokenizer, texts: list[str], eos: int) -> list[list[int]]:
    """New tokens of each prompt by `generate`, the one that ends it among them."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    settings = {"do_sample": False, "max_new_tokens": make_golden.NEW_TOKENS, "eos_token_id": eos}
    rows = theirs.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


@pytest.mark.parametrize("placement", [
    {},
    {"split": "0"},
    {"split": "50%", "recompute": "absorb"},
    {"split": "100%", "recompute": "project", "engine": "sequential"},
], ids=str)  # fmt: skip
def test_generate_writes_what_transformers_writes(bundled, placement):
    texts, theirs, tokenizer = bundled
    expected = their_tokens(theirs, tokenizer, texts, tokenizer.eos_token_id)
    model, own_tokenizer = kvpr_jax.load(make_golden.TINY, "float32")
    outputs = kvpr_jax.generate(model, own_tokenizer, texts, max_new_tokens=make_golden.NEW_TOKENS, **placement)
    assert [output.token_ids for output in outputs] == expected
    decoded = [tokenizer.decode(r, skip_special_tokens=True, clean_up_tokenization_spaces=False) for r in expected]
    assert [output.text for output in outputs] == decoded


def test_a_text_ends_where_transformers_ends_it(bundled):
    texts, theirs, tokenizer = bundled
    model, own_tokenizer = kvpr_jax.load(make_golden.TINY, "float32")
    whole = their_tokens(theirs, tokenizer, texts, tokenizer.eos_token_id)
    eos = whole[0][3]
    expected = their_tokens(theirs, tokenizer, texts, eos)
    assert len(expected[0]) <= 4
    model.config = dataclasses.replace(model.config, eos_token_ids=(eos,))
    outputs = kvpr_jax.generate(model, own_tokenizer, texts, max_new_tokens=make_golden.NEW_TOKENS, split="50%")
    assert [output.token_ids for output in outputs] == expected
    assert [output.finish_reason for output in outputs] == ["stop" if r[-1] == eos else "length" for r in expected]


def their_nats(theirs, tokens: list[int], window: int) -> list[float]:
    """-ln p of every token but the first; the second half of each window is scored given the first."""
    half, nats = window // 2, []
    while len(nats) < len(tokens) - 1:
        scored = tokens[len(nats) + 1 :][:half]
        given = tokens[: len(nats) + 1][-half:]
        with torch.no_grad():
            logits = theirs(torch.tensor([given + scored])).logits[0, len(given) - 1 : -1]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(scored), reduction="none").tolist()
    return nats


def test_perplexity_equals_that_of_transformers(bundled):
    _, theirs, tokenizer = bundled
    text = argparse.__doc__
    nats = their_nats(theirs, tokenizer(text)["input_ids"], 128)
    expected = np.exp(np.mean(nats)), np.sum(nats) / np.log(2) / len(text.encode())
    model, own_tokenizer = kvpr_jax.load(make_golden.TINY, "float32")
    for request in (Request("0"), *(Request(s, way) for s in ("50%", "100%") for way in ("project", "absorb"))):
        score = evaluate.perplexity(model, own_tokenizer, text, window=128, batch=16, request=request)
        np.testing.assert_allclose(score.nats, nats, rtol=0, atol=1e-3)
        np.testing.assert_allclose((score.perplexity, score.bits_per_byte), expected, rtol=5e-5)
