"""Segment attention against `jax.nn.dot_product_attention` over the whole, for any cut into segments of either form."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import LLAMA, OPT, assert_close
from kvpr_jax.models.attention import Attention, attend, visible
from kvpr_jax.models.layers import in_chunks, rms_norm
from kvpr_jax.models.positions import Rope, alibi_slopes
from kvpr_jax.segments import Activations, KeysValues, Place

TOKENS, BATCH = 12, 3
F32, RNGS = jnp.dtype("float32"), nnx.Rngs(0)


def attention(config, bias: bool, options: dict, dtype: str = "float32") -> Attention:
    """Random weights and, where there are any, random biases: the same numbers in every dtype."""
    module = Attention(config, scale=0.3, bias=bias, out_bias=bias, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0), **options)
    graphdef, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [0.5 * jax.random.normal(key, a.shape, jnp.bfloat16) for key, a in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, tree.unflatten([a.astype(dtype) for a in leaves]))


def oracle(module: Attention, x, slots, start):
    """The last token's attention over all of `x`, by JAX's own attention over concatenated keys and values."""
    place = Place(slots, start)
    positions = place.positions(slots)
    q = module.queries(x[:, -1:], positions[:, -1:])
    mask = np.arange(TOKENS)[None, :] >= (np.zeros(BATCH, int) if start is None else np.asarray(start))[:, None]
    if module.window is not None:
        mask &= np.arange(TOKENS)[None, :] > TOKENS - 1 - module.window
    distance = np.arange(TOKENS, dtype=np.float32) - (TOKENS - 1)
    slopes = np.zeros(q.shape[2] * q.shape[3], np.float32) if module.slopes is None else np.array(module.slopes)
    out = jax.nn.dot_product_attention(
        q.reshape(BATCH, 1, -1, module.head_dim), module.keys(x, positions), module.values(x),
        bias=jnp.asarray(slopes[:, None] * distance, jnp.float32)[None, :, None],
        mask=jnp.asarray(mask)[:, None, None], scale=1.0,
    )  # fmt: skip
    return module.o(out.reshape(BATCH, 1, -1))


def over_segments(module, x, slots, start, cuts, forms, recompute):
    """The same through segments between `cuts`, last ones first, each in the form that `forms` says."""
    edges = [0, *sorted(set(cuts)), TOKENS]
    segments = []
    for first, last, as_activations in zip(edges, edges[1:], forms, strict=False):
        if first < last:
            piece, at = x[:, first:last], slots[first:last]
            segments.append(Activations(piece, at) if as_activations else module.remember(piece, Place(at, start)))
    return module(x[:, -1:], tuple(segments[::-1]), Place(slots[-1:], start), recompute)


GROUPED = dataclasses.replace(LLAMA, num_kv_heads=2)
CASES = {
    "opt": (OPT, True, {}),
    "without biases": (OPT, False, {}),
    "rope": (LLAMA, False, {"rope": Rope(10, theta=50.0)}),
    "rope and biases": (LLAMA, True, {"rope": Rope(10, theta=50.0)}),
    "grouped": (GROUPED, True, {"rope": Rope(10)}),
    "partly rotated": (GROUPED, True, {"rope": Rope(4, theta=50.0)}),
    "key norm": (GROUPED, False, {"rope": Rope(10), "norm": partial(rms_norm, LLAMA, dtype=F32, rngs=RNGS)}),
    "alibi": (OPT, True, {"slopes": alibi_slopes(4)}),
    "window": (OPT, True, {"window": 5}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("recompute", ["project", "absorb"])
@settings(max_examples=8, deadline=None)
@given(
    cuts=st.lists(st.integers(1, TOKENS - 1), max_size=3),
    forms=st.lists(st.booleans(), min_size=4, max_size=4),
    starts=st.none() | st.lists(st.integers(0, TOKENS - 1), min_size=BATCH, max_size=BATCH),
    seed=st.integers(0, 99),
)
def test_any_cut_into_segments_equals_attention_over_the_whole(name, recompute, cuts, forms, starts, seed):
    config, bias, options = CASES[name]
    module = attention(config, bias, options)
    x = jax.random.normal(jax.random.key(seed), (BATCH, TOKENS, config.hidden_size))
    slots, start = jnp.arange(TOKENS), None if starts is None else jnp.asarray(starts)
    with jax.default_matmul_precision("highest"):
        expected = oracle(module, x, slots, start)
        assert_close(over_segments(module, x, slots, start, cuts, forms, recompute), expected)


@pytest.mark.parametrize("name", ["opt", "rope and biases"])
def test_bfloat16_activations_are_no_worse_than_bfloat16_keys_and_values(name):
    config, bias, options = CASES[name]
    module, in_float32 = attention(config, bias, options, dtype="bfloat16"), attention(config, bias, options)
    slots = jnp.arange(TOKENS)
    errors = {"keys and values": [], "project": [], "absorb": []}
    for seed in range(8):
        x = jax.random.normal(jax.random.key(seed), (BATCH, TOKENS, config.hidden_size), jnp.bfloat16)
        expected = np.asarray(oracle(in_float32, x.astype(jnp.float32), slots, None))
        for way, error in errors.items():
            forms = [way != "keys and values"] * 4
            out = over_segments(module, x, slots, None, [], forms, "absorb" if way == "absorb" else "project")
            error.append(np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected))
            assert_close(np.asarray(out, np.float32), expected, "bfloat16")
    mean = {way: np.mean(error) for way, error in errors.items()}
    assert mean["absorb"] <= 1.1 * mean["keys and values"], mean
    assert mean["project"] <= 1.1 * mean["keys and values"], mean


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("chunk", [12, 5, 4, 1])
@pytest.mark.parametrize("name", CASES)
def test_a_prompt_in_chunks_of_queries_equals_token_by_token(name, chunk, ragged):
    config, bias, options = CASES[name]
    module = attention(config, bias, options)
    x = jax.random.normal(jax.random.key(7), (BATCH, TOKENS, config.hidden_size))
    slots, start = jnp.arange(TOKENS), jnp.array([0, 3, 7]) if ragged else None
    whole = module.remember(x, Place(slots, start))

    def block(x, at):
        return module.over_prompt(x, whole, Place(at[0], start))

    with jax.default_matmul_precision("highest"):
        out = in_chunks(block, chunk, x, slots[None])
        alone = module(x[:, -1:], (whole,), Place(slots[-1:], start), "project")
    assert out.shape == (BATCH, TOKENS, config.hidden_size)
    assert_close(out[:, -1:], alone)


def test_slots_not_written_yet_do_not_count():
    """A tail that is half full of numbers which would win every softmax."""
    module = attention(OPT, True, {})
    x = jax.random.normal(jax.random.key(3), (BATCH, TOKENS, OPT.hidden_size))
    slots = jnp.arange(TOKENS)
    full = module.remember(x[:, :7], Place(slots[:7], None))
    tail = KeysValues(
        jnp.concatenate([full.keys, jnp.full((BATCH, 4, 4, 11), 1e4)], 1),
        jnp.concatenate([full.values, jnp.full((BATCH, 4, 4, 11), 1e4)], 1),
        slots[:11],
    )
    place = Place(slots[6:7], None)
    assert_close(module(x[:, 6:7], (tail,), place, "project"), module(x[:, 6:7], (full,), place, "project"))


def test_a_sequence_that_sees_only_itself_stays_finite():
    module = attention(OPT, True, {})
    x = jax.random.normal(jax.random.key(3), (1, 4, OPT.hidden_size))
    slots, start = jnp.arange(4), jnp.array([3])
    out = module.over_prompt(x, module.remember(x, Place(slots, start)), Place(slots, start))
    assert np.isfinite(np.asarray(out)).all()


def test_attend_does_not_overflow():
    def ones(weights):
        return weights.sum(-1)[..., None]

    scores = jnp.array([[[[[3e4, -3e4]]]]])
    np.testing.assert_allclose(attend([(scores, ones), (scores - 6e4, ones)]), 1.0)


def test_visible_is_causal_padded_and_windowed():
    seen = visible(jnp.array([3, 4]), jnp.arange(5), jnp.array([0, 2]), 3)
    expected = [[[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]], [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]]
    np.testing.assert_array_equal(seen, np.array(expected, bool))


@pytest.mark.parametrize("heads, slopes", [
    (4, [1 / 4, 1 / 16, 1 / 64, 1 / 256]),
    (6, [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]),
    (8, [2.0**-n for n in range(1, 9)]),
])  # fmt: skip
def test_alibi_slopes_are_the_papers(heads, slopes):
    np.testing.assert_allclose(alibi_slopes(heads), slopes, rtol=1e-12)
