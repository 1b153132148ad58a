"""Gemma 1 (arXiv 2403.08295): Llama with norm scales around 1, scaled embeddings, and heads wider than D / H.

The 7B model has D = 3072 and 2·K·d = 8192: its activations are 2.67 times smaller than its keys and values.
"""

import dataclasses

import jax.numpy as jnp
import transformers
from flax import nnx
from jaxtyping import Array, Float, Int

from kvpr_jax.config import refuse
from kvpr_jax.models import decoder, llama
from kvpr_jax.models.llama import BASE, checkpoint_names
from kvpr_jax.segments import Place

__all__ = ["BASE", "Config", "DecoderLayer", "Embedder", "checkpoint_names"]


@dataclasses.dataclass(frozen=True)
class Config(llama.Config):
    """Gemma's fields are Llama's."""

    @classmethod
    def from_hf(cls, hf: transformers.PretrainedConfig) -> "Config":
        refuse(hf, use_bidirectional_attention=None)
        return cls(**llama.llama_fields(hf))


class Norm(nnx.Module):
    """An RMS norm that stores how far its scale is from 1."""

    def __init__(self, config: Config, dtype: jnp.dtype) -> None:
        self.epsilon = config.norm_epsilon
        self.scale = nnx.Param(jnp.zeros(config.hidden_size, dtype))

    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        wide = x.astype(jnp.float32)
        wide = wide / jnp.sqrt((wide**2).mean(-1, keepdims=True) + self.epsilon)
        return (wide * (1 + self.scale[...].astype(jnp.float32))[None, None]).astype(x.dtype)


class DecoderLayer(llama.DecoderLayer):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.attention_norm = Norm(config, dtype)
        self.mlp_norm = Norm(config, dtype)


class Embedder(decoder.Embedder):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config, Norm(config, dtype), dtype=dtype, rngs=rngs)
        self.scale = config.hidden_size**0.5

    def encode(self, tokens: Int[Array, "B Q"], place: Place) -> Float[Array, "B Q D"]:
        h = super().encode(tokens, place)
        return h * jnp.asarray(self.scale, h.dtype)  # rounded to the weights' dtype, as in training
