"""What several test modules share: tolerances, small models with random weights, a given profile, decoding by hand."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvpr_jax import costs
from kvpr_jax.cache import Cache
from kvpr_jax.models import Model, llama, opt
from kvpr_jax.models.positions import Rope
from kvpr_jax.plan import Plan, Request
from kvpr_jax.profiling.profile import Profile
from kvpr_jax.runtime import Decoder

# Largest error of logits against a float32 reference, relative to the largest logit, by dtype.
TOLERANCE = {"float32": 5e-5, "bfloat16": 5e-2, "float16": 1e-2}


def assert_close(actual, expected, dtype: str = "float32") -> None:
    """Logits within the tolerance of their dtype."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max())


OPT = opt.Config(
    model_type="opt", vocab_size=89, num_layers=3, hidden_size=44, num_heads=4, num_kv_heads=4, head_dim=11,
    mlp_size=53, max_positions=113, tie_embeddings=True, eos_token_ids=(2,), embed_size=44, norm_first=True,
    final_norm=True, norm_affine=True, bias=True, activation="relu", norm_epsilon=1e-5,
)  # fmt: skip
OPT_350M = dataclasses.replace(OPT, embed_size=22, norm_first=False, final_norm=False)
LLAMA = llama.Config(
    model_type="llama", vocab_size=89, num_layers=3, hidden_size=60, num_heads=6, num_kv_heads=6, head_dim=10,
    mlp_size=53, max_positions=113, tie_embeddings=False, eos_token_ids=(2,), norm_epsilon=1e-5,
    rope=Rope(10, theta=100.0), window=None, attention_bias=False, out_bias=False, mlp_bias=False, activation="silu",
)  # fmt: skip
GQA = dataclasses.replace(LLAMA, num_kv_heads=2)
CONFIGS = {"opt": OPT, "opt-350m": OPT_350M, "llama": LLAMA, "llama-gqa": GQA}


@contextlib.contextmanager
def implicit_promotion() -> Iterator[None]:
    """For half precision, in which Flax's norms compute by promotion; in all threads, since one compiles ahead."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    try:
        yield
    finally:
        jax.config.update("jax_numpy_dtype_promotion", "strict")


def profile(**changes: object) -> Profile:
    """A machine whose link is slow and whose compute is fast; `changes` replace fields."""
    given = Profile(
        machine={"version": "0", "device": "given"},
        to_device=[(1, 1e-4 / 2**20), (2**20, 1e-4), (2**26, 6.4e-3)],
        to_host=[(2**20, 1e-4), (2**26, 6.4e-3)],
        both=[(2**20, 2e-4), (2**26, 1.28e-2)],
        base_s=1e-4,
        further_s=changes.get("base_s", 1e-4),
        mlp_s=6e-5,
        keys_values=[(1, 1e-7)],
        project=[(1, 1e-6)],
        absorb=[(1, 2e-7)],
        head_s=1e-3,
        dispatch_s=2e-5,
        layer_dispatch_s=1e-5,
        segment_dispatch_s=3e-6,
        issue_s=1e-5,
        beside_copies=0.0,
        compile_s=0.5,
    )
    return dataclasses.replace(given, **changes)


def each_engine(monkeypatch, grouped: bool) -> Iterator[str]:
    """What to request for each engine of a cache on the host.

    Args:
        grouped: whether layers go together.
    """
    monkeypatch.setattr(costs, "GROUP", 8 if grouped else 1)
    yield from ("overlapped", "sequential")


def random_model(config, dtype: str = "float32", seed: int = 0, scale: float = 3.0) -> Model:
    """A model with random weights, `scale` times as large as at the start of training: logits far from uniform."""
    model = Model(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split(model)
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(state))))

    def scaled(leaf):
        if leaf.ndim > 1:
            return (leaf * scale).astype(leaf.dtype)
        return leaf + (0.1 * jax.random.normal(next(keys), leaf.shape)).astype(leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(scaled, state))


def random_prompts(lengths, vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab_size, length).tolist() for length in lengths]


def greedy(decoder: Decoder, prompts, new_tokens: int, request: Request) -> tuple[np.ndarray, np.ndarray, Cache, Plan]:
    """Greedy tokens (B, N) and the logits (N, B, V) they were taken from, by stepping by hand."""
    plan = decoder.plan(prompts, new_tokens, request)
    cache, logits = decoder.prefill(prompts, plan)
    tokens, seen = [], []
    for step in range(new_tokens):
        seen.append(np.asarray(logits))
        tokens.append(seen[-1].argmax(-1).astype(np.int32))
        if step + 1 < new_tokens:
            logits = decoder.step(cache, jnp.asarray(tokens[-1]))
    return np.stack(tokens, 1), np.stack(seen), cache, plan
