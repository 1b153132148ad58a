"""Qwen3 (arXiv 2505.09388): Llama with a norm of each head's queries and keys.

The norm of the keys stands between W_K and the dot product: `absorb` projects keys and absorbs values.
"""

import dataclasses

import transformers

from kvpr_jax.config import refuse
from kvpr_jax.models import llama, names
from kvpr_jax.models.llama import BASE, DecoderLayer, Embedder

__all__ = ["BASE", "Config", "DecoderLayer", "Embedder", "checkpoint_names"]


@dataclasses.dataclass(frozen=True)
class Config(llama.Config):
    """Qwen3's fields are Llama's."""

    @classmethod
    def from_hf(cls, hf: transformers.PretrainedConfig) -> "Config":
        refuse(hf, use_sliding_window=False)  # it would differ from layer to layer
        return cls(**llama.llama_fields(hf), key_norm="head")


def checkpoint_names(config: Config) -> names.Names:
    norms = (
        names.norm("input_layernorm", "attention_norm")
        | names.norm("post_attention_layernorm", "mlp_norm")
        | names.norm("self_attn.q_norm", "attention/q_norm")
        | names.norm("self_attn.k_norm", "attention/k_norm")
    )
    return llama.tensors(config, norms)
