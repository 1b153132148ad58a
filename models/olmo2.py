"""OLMo 2 (arXiv 2501.00656): Llama with norms behind attention and MLP, and norms of all queries and of all keys.

Attention reads the hidden states themselves, so those are what the cache holds as activations. The norm of the keys
stands between W_K and the dot product: `absorb` projects keys and absorbs values.
"""

import dataclasses

import jax.numpy as jnp
import transformers
from flax import nnx
from jaxtyping import Array, Float

from kvpr_jax.models import decoder, layers, llama, names
from kvpr_jax.models.llama import BASE, Embedder

__all__ = ["BASE", "Config", "DecoderLayer", "Embedder", "checkpoint_names"]


@dataclasses.dataclass(frozen=True)
class Config(llama.Config):
    """OLMo 2's fields are Llama's."""

    @classmethod
    def from_hf(cls, hf: transformers.PretrainedConfig) -> "Config":
        return cls(**llama.llama_fields(hf), key_norm="all")


class DecoderLayer(decoder.DecoderLayer):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention = llama.attention(config, dtype, rngs)
        self.attention_norm = layers.rms_norm(config, dtype=dtype, rngs=rngs)
        self.mlp = layers.GatedMLP(config, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.mlp_norm = layers.rms_norm(config, dtype=dtype, rngs=rngs)

    def read(self, h: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        return h

    def write(
        self, h: Float[Array, "B Q D"], x: Float[Array, "B Q D"], attended: Float[Array, "B Q D"]
    ) -> Float[Array, "B Q D"]:
        h = h + self.attention_norm(attended)
        return h + self.mlp_norm(self.mlp(h))


def checkpoint_names(config: Config) -> names.Names:
    norms = (
        names.norm("self_attn.q_norm", "attention/q_norm")
        | names.norm("self_attn.k_norm", "attention/k_norm")
        | names.norm("post_attention_layernorm", "attention_norm")
        | names.norm("post_feedforward_layernorm", "mlp_norm")
    )
    return llama.tensors(config, norms)
