"""Phi-1, 1.5 and 2 (arXiv 2306.11644, 2309.05463): one norm for attention and MLP side by side, heads partly rotated.

What is not rotated of a key is absorbed; the rest, less than half of each head in the released models, is projected.
"""

import dataclasses

import jax.numpy as jnp
import transformers
from flax import nnx
from jaxtyping import Array, Float

from kvpr_jax.config import ModelConfig, common_fields, refuse, width_of_heads
from kvpr_jax.models import decoder, layers, names
from kvpr_jax.models.attention import Attention
from kvpr_jax.models.positions import Rope


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """Phi's own field.

    Attributes:
        rope: rotary embedding.
    """

    rope: Rope

    @classmethod
    def from_hf(cls, hf: transformers.PretrainedConfig) -> "Config":
        refuse(hf, qk_layernorm=False)
        head_dim = width_of_heads(hf.hidden_size, hf.num_attention_heads)
        return cls(
            **common_fields(hf),
            num_kv_heads=hf.num_key_value_heads,
            head_dim=head_dim,
            mlp_size=hf.intermediate_size,
            activation=hf.hidden_act,
            max_positions=hf.max_position_embeddings,
            norm_epsilon=hf.layer_norm_eps,
            rope=Rope.from_parameters(head_dim, hf.rope_parameters),
        )


class DecoderLayer(decoder.DecoderLayer):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention_norm = layers.layer_norm(config, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, bias=True, out_bias=True, rope=config.rope, dtype=dtype, rngs=rngs)
        self.mlp = layers.MLP(config, bias=True, dtype=dtype, rngs=rngs)

    def write(
        self, h: Float[Array, "B Q D"], x: Float[Array, "B Q D"], attended: Float[Array, "B Q D"]
    ) -> Float[Array, "B Q D"]:
        return h + attended + self.mlp(x)


class Embedder(decoder.Embedder):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        super().__init__(
            config, layers.layer_norm(config, dtype=dtype, rngs=rngs), head_bias=True, dtype=dtype, rngs=rngs
        )


BASE = "model."


def checkpoint_names(config: Config) -> names.Names:
    layer = (
        names.norm("input_layernorm", "attention_norm", bias=True)
        | names.linear("self_attn.q_proj", "attention/q")
        | names.linear("self_attn.k_proj", "attention/k")
        | names.linear("self_attn.v_proj", "attention/v")
        | names.linear("self_attn.dense", "attention/o")
        | names.linear("mlp.fc1", "mlp/up")
        | names.linear("mlp.fc2", "mlp/down")
    )
    return (
        names.embedding("model.embed_tokens", "embedder/tokens")
        | names.in_layers("model.layers", config.num_layers, layer)
        | names.norm("model.final_layernorm", "embedder/final_norm", bias=True)
        | names.head("lm_head", config.tie_embeddings, bias=True)
    )
