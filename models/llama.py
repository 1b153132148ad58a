"""Llama 1 to 3 (arXiv 2302.13971, 2307.09288, 2407.21783) and Mistral (2310.06825): RMS norm, RoPE, gated MLP.

Keys are rotated, so `absorb` projects keys and absorbs values. With grouped queries D is no smaller than 2·K·d, and
activations save nothing. Gemma, OLMo 2 and Qwen differ from it in little and build on this file.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import transformers
from flax import nnx

from kvpr_jax.config import ModelConfig, common_fields, width_of_heads
from kvpr_jax.models import decoder, layers, names
from kvpr_jax.models.attention import Attention
from kvpr_jax.models.positions import Rope


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """Llama's own fields.

    Attributes:
        rope: rotary embedding.
        window: sliding window in tokens (Mistral), or None.
        attention_bias: whether the query, key and value projections have a bias.
        out_bias, mlp_bias: whether the output projection and those of the MLP have one.
        key_norm: RMS norm of queries and keys: of each "head" (Qwen3), of "all" heads together (OLMo 2), or None.
    """

    rope: Rope
    window: int | None
    attention_bias: bool
    out_bias: bool
    mlp_bias: bool
    key_norm: Literal["head", "all"] | None = None

    mlp_arrays: ClassVar[int] = 3  # the gate's, the other's and their product

    @classmethod
    def from_hf(cls, hf: transformers.PretrainedConfig) -> "Config":
        return cls(**llama_fields(hf))


def llama_fields(hf: transformers.PretrainedConfig) -> dict[str, Any]:
    """The fields of `Config` as Llama's config.json has them."""
    head_dim = getattr(hf, "head_dim", None) or width_of_heads(hf.hidden_size, hf.num_attention_heads)
    bias = getattr(hf, "attention_bias", False)
    return {
        **common_fields(hf),
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": head_dim,
        "mlp_size": hf.intermediate_size,
        "activation": hf.hidden_act,
        "max_positions": hf.max_position_embeddings,
        "norm_epsilon": hf.rms_norm_eps,
        "rope": Rope.from_parameters(head_dim, hf.rope_parameters),
        "window": getattr(hf, "sliding_window", None),
        "attention_bias": bias,
        "out_bias": bias,
        "mlp_bias": getattr(hf, "mlp_bias", False),
    }


def attention(config: Config, dtype: jnp.dtype, rngs: nnx.Rngs) -> Attention:
    norm = partial(layers.rms_norm, config, dtype=dtype, rngs=rngs)
    return Attention(
        config,
        bias=config.attention_bias,
        out_bias=config.out_bias,
        rope=config.rope,
        window=config.window,
        norm=norm if config.key_norm else None,
        norm_heads=config.key_norm == "head",
        dtype=dtype,
        rngs=rngs,
    )


class DecoderLayer(decoder.DecoderLayer):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention_norm = layers.rms_norm(config, dtype=dtype, rngs=rngs)
        self.attention = attention(config, dtype, rngs)
        self.mlp_norm = layers.rms_norm(config, dtype=dtype, rngs=rngs)
        self.mlp = layers.GatedMLP(config, bias=config.mlp_bias, dtype=dtype, rngs=rngs)


class Embedder(decoder.Embedder):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config, layers.rms_norm(config, dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs)


BASE = "model."


def checkpoint_names(config: Config) -> names.Names:
    layer = names.norm("input_layernorm", "attention_norm") | names.norm("post_attention_layernorm", "mlp_norm")
    return tensors(config, layer)


def tensors(config: Config, norms: names.Names) -> names.Names:
    """All tensors, with these norms in every layer."""
    layer = (
        names.linear("self_attn.q_proj", "attention/q", bias=config.attention_bias)
        | names.linear("self_attn.k_proj", "attention/k", bias=config.attention_bias)
        | names.linear("self_attn.v_proj", "attention/v", bias=config.attention_bias)
        | names.linear("self_attn.o_proj", "attention/o", bias=config.out_bias)
        | names.linear("mlp.gate_proj", "mlp/gate", bias=config.mlp_bias)
        | names.linear("mlp.up_proj", "mlp/up", bias=config.mlp_bias)
        | names.linear("mlp.down_proj", "mlp/down", bias=config.mlp_bias)
    )
    return (
        names.embedding("model.embed_tokens", "embedder/tokens")
        | names.in_layers("model.layers", config.num_layers, layer | norms)
        | names.norm("model.norm", "embedder/final_norm")
        | names.head("lm_head", config.tie_embeddings)
    )
