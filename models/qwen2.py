"""Qwen1.5, Qwen2 and Qwen2.5 (arXiv 2309.16609, 2407.10671, 2412.15115): Llama with biases on queries, keys and values.

Most sizes of Qwen1.5 have a key/value head for each query head; later ones share them, and activations save nothing.
"""

import dataclasses

import transformers

from kvpr_jax.config import refuse
from kvpr_jax.models import llama
from kvpr_jax.models.llama import BASE, DecoderLayer, Embedder, checkpoint_names

__all__ = ["BASE", "Config", "DecoderLayer", "Embedder", "checkpoint_names"]


@dataclasses.dataclass(frozen=True)
class Config(llama.Config):
    """Qwen's fields are Llama's."""

    @classmethod
    def from_hf(cls, hf: transformers.PretrainedConfig) -> "Config":
        refuse(hf, use_sliding_window=False)  # it would differ from layer to layer
        return cls(**llama.llama_fields(hf) | {"attention_bias": True})
