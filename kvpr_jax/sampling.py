"""From logits to tokens: greedy, or temperature, top-k, top-p and min-p in the order transformers applies them."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

Choice = Literal["greedy", "unlimited", "limited"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. All of it is traced: changing a value compiles nothing, unless the choice becomes another.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and ignores the rest.
        top_k: only this many most likely tokens; 0 is no limit.
        top_p: only the fewest most likely tokens whose probabilities reach this sum; 1 is no limit.
        min_p: only tokens at least this fraction as likely as the most likely one; 0 is no limit.
    """

    temperature: float | Float[Array, ""] = 0.0
    top_k: int | Int[Array, ""] = 0
    top_p: float | Float[Array, ""] = 1.0
    min_p: float | Float[Array, ""] = 0.0

    @property
    def choice(self) -> Choice:
        """What the values ask for. Told from them where the host knows them: where the device had to tell, a step's
        layers could not be issued before the one before it is done."""
        if self.temperature < np.finfo(np.float32).tiny:  # 0 to the device
            return "greedy"
        return "limited" if self.top_k or self.top_p < 1 or self.min_p else "unlimited"

    def check(self) -> None:
        """Raises ValueError for a value out of range, naming it."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be 0 or more")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top-k {self.top_k} must be 0 (no limit) or more, and below 2^31")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min-p {self.min_p} must be from 0 to 1")


def prompt_keys(seed: int, prompts: Sequence[Sequence[int]]) -> Key[Array, " B"]:
    """A random key for each prompt from the seed and the prompt's tokens alone, not from its place in a batch."""

    def words(prompt: Sequence[int]) -> np.ndarray:
        digest = hashlib.sha256(repr((seed, list(map(int, prompt)))).encode()).digest()
        return np.frombuffer(digest[:8], np.uint32)

    return jax.random.wrap_key_data(jnp.asarray(np.stack([words(prompt) for prompt in prompts])), impl="threefry2x32")


def allowed(logits: Float[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    """Which tokens top-k, top-p and min-p leave, given logits that are divided by the temperature already."""
    ranked = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])[None, :]
    kept = (sampling.top_k == 0) | (rank < sampling.top_k)
    probability = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    no_limit = sampling.top_p >= 1  # asked apart: the float32 sum reaches 1 before the last tokens
    kept = kept & ((before < sampling.top_p) | no_limit | (rank == 0))
    kept = kept & (probability >= sampling.min_p * probability[:, :1])
    least = jnp.where(kept, ranked, jnp.inf).min(-1, keepdims=True)
    return logits >= least


def sample_tokens(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], index: Int[Array, ""], sampling: Sampling, choice: Choice
) -> Int[Array, " B"]:
    """The next token of each sequence; draw number `index` of each key.

    Args:
        choice: of `sampling`.
    """
    if choice == "greedy":
        return logits.argmax(-1).astype(jnp.int32)
    scaled = logits / sampling.temperature
    if choice == "limited":
        scaled = jnp.where(allowed(scaled, sampling), scaled, -jnp.inf)
    draws = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    return jax.vmap(jax.random.categorical)(draws, scaled).astype(jnp.int32)
