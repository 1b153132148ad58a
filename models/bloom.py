"""BLOOM (arXiv 2211.05100): ALiBi, biases, a layer norm after the embedding.

Positions enter the scores beside the product of query and key, so `absorb` forms neither keys nor values.
"""

import dataclasses

import jax.numpy as jnp
import transformers
from flax import nnx
from jaxtyping import Array, Float, Int

from kvpr_jax.config import ModelConfig, common_fields, width_of_heads
from kvpr_jax.models import decoder, layers, names
from kvpr_jax.models.attention import Attention
from kvpr_jax.models.positions import alibi_slopes
from kvpr_jax.segments import Place

POSITIONS = 2048  # trained on; the config has no field of that name, though released ones say seq_length


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """BLOOM's own fields.

    Attributes:
        norm_residual: whether residuals start from the normalised hidden states.
    """

    norm_residual: bool

    @classmethod
    def from_hf(cls, hf: transformers.PretrainedConfig) -> "Config":
        return cls(
            **common_fields(hf),
            num_kv_heads=hf.num_attention_heads,
            head_dim=width_of_heads(hf.hidden_size, hf.num_attention_heads),
            mlp_size=4 * hf.hidden_size,
            activation="gelu_pytorch_tanh",
            max_positions=getattr(hf, "seq_length", POSITIONS),
            norm_epsilon=hf.layer_norm_epsilon,
            norm_residual=hf.apply_residual_connection_post_layernorm,
        )


class DecoderLayer(decoder.DecoderLayer):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.norm_residual = config.norm_residual
        self.attention_norm = layers.layer_norm(config, dtype=dtype, rngs=rngs)
        slopes = alibi_slopes(config.num_heads)
        self.attention = Attention(config, bias=True, out_bias=True, slopes=slopes, dtype=dtype, rngs=rngs)
        self.mlp_norm = layers.layer_norm(config, dtype=dtype, rngs=rngs)
        self.mlp = layers.MLP(config, bias=True, dtype=dtype, rngs=rngs)

    def write(
        self, h: Float[Array, "B Q D"], x: Float[Array, "B Q D"], attended: Float[Array, "B Q D"]
    ) -> Float[Array, "B Q D"]:
        h = (x if self.norm_residual else h) + attended
        x = self.mlp_norm(h)
        return (x if self.norm_residual else h) + self.mlp(x)


class Embedder(decoder.Embedder):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config, layers.layer_norm(config, dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs)
        self.norm = layers.layer_norm(config, dtype=dtype, rngs=rngs)

    def encode(self, tokens: Int[Array, "B Q"], place: Place) -> Float[Array, "B Q D"]:
        return self.norm(self.tokens(tokens))


BASE = "transformer."


def checkpoint_names(config: Config) -> names.Names:
    fused = ("attention/q", "attention/k", "attention/v")
    layer = (
        names.norm("input_layernorm", "attention_norm", bias=True)
        | names.linear("self_attention.query_key_value", *fused, heads=config.num_heads)
        | names.linear("self_attention.dense", "attention/o")
        | names.norm("post_attention_layernorm", "mlp_norm", bias=True)
        | names.linear("mlp.dense_h_to_4h", "mlp/up")
        | names.linear("mlp.dense_4h_to_h", "mlp/down")
    )
    return (
        names.embedding("transformer.word_embeddings", "embedder/tokens")
        | names.norm("transformer.word_embeddings_layernorm", "embedder/norm", bias=True)
        | names.in_layers("transformer.h", config.num_layers, layer)
        | names.norm("transformer.ln_f", "embedder/final_norm", bias=True)
        | names.head("lm_head", config.tie_embeddings)
    )
