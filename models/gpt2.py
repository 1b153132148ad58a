"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019): learned positions, biases.

Like OPT's, its keys and values depend on nothing but the layer's normalised input: `absorb` forms neither.
"""

import dataclasses

import jax.numpy as jnp
import transformers
from flax import nnx
from jaxtyping import Array, Float, Int

from kvpr_jax.config import ModelConfig, common_fields, refuse, width_of_heads
from kvpr_jax.models import decoder, layers, names
from kvpr_jax.models.attention import Attention
from kvpr_jax.segments import Place


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """GPT-2's own fields.

    Attributes:
        scaled: whether scores are divided by the square root of d.
    """

    scaled: bool

    @classmethod
    def from_hf(cls, hf: transformers.PretrainedConfig) -> "Config":
        refuse(hf, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        return cls(
            **common_fields(hf),
            num_kv_heads=hf.num_attention_heads,
            head_dim=width_of_heads(hf.hidden_size, hf.num_attention_heads),
            mlp_size=hf.n_inner or 4 * hf.hidden_size,
            activation=hf.activation_function,
            max_positions=hf.max_position_embeddings,
            norm_epsilon=hf.layer_norm_epsilon,
            scaled=hf.scale_attn_weights,
        )


class DecoderLayer(decoder.DecoderLayer):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention_norm = layers.layer_norm(config, dtype=dtype, rngs=rngs)
        scale = None if config.scaled else 1.0
        self.attention = Attention(config, bias=True, out_bias=True, scale=scale, dtype=dtype, rngs=rngs)
        self.mlp_norm = layers.layer_norm(config, dtype=dtype, rngs=rngs)
        self.mlp = layers.MLP(config, bias=True, dtype=dtype, rngs=rngs)


class Embedder(decoder.Embedder):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config, layers.layer_norm(config, dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs)
        self.positions = layers.embedding(config.max_positions, config.hidden_size, dtype=dtype, rngs=rngs)

    def encode(self, tokens: Int[Array, "B Q"], place: Place) -> Float[Array, "B Q D"]:
        return self.tokens(tokens) + self.positions(place.positions(place.slots))


BASE = "transformer."


def checkpoint_names(config: Config) -> names.Names:
    layer = (
        names.norm("ln_1", "attention_norm", bias=True)
        | names.linear("attn.c_attn", "attention/q", "attention/k", "attention/v", transposed=False)
        | names.linear("attn.c_proj", "attention/o", transposed=False)
        | names.norm("ln_2", "mlp_norm", bias=True)
        | names.linear("mlp.c_fc", "mlp/up", transposed=False)
        | names.linear("mlp.c_proj", "mlp/down", transposed=False)
    )
    return (
        names.embedding("transformer.wte", "embedder/tokens")
        | names.embedding("transformer.wpe", "embedder/positions")
        | names.in_layers("transformer.h", config.num_layers, layer)
        | names.norm("transformer.ln_f", "embedder/final_norm", bias=True)
        | names.head("lm_head", config.tie_embeddings)
    )
