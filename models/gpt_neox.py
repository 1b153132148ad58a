"""GPT-NeoX (arXiv 2204.06745) and Pythia (2304.01373): attention and MLP side by side, part of a head rotated.

What is not rotated of a key is absorbed; the rest, a quarter of each head in the released models, is projected.
"""

import dataclasses

import jax.numpy as jnp
import transformers
from flax import nnx
from jaxtyping import Array, Float

from kvpr_jax.config import ModelConfig, common_fields, width_of_heads
from kvpr_jax.models import decoder, layers, names
from kvpr_jax.models.attention import Attention
from kvpr_jax.models.positions import Rope


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """GPT-NeoX's own fields.

    Attributes:
        rope: rotary embedding.
        parallel: whether the MLP reads the layer's input instead of what attention made of it.
        attention_bias: whether attention's projections have a bias.
    """

    rope: Rope
    parallel: bool
    attention_bias: bool

    @classmethod
    def from_hf(cls, hf: transformers.PretrainedConfig) -> "Config":
        head_dim = width_of_heads(hf.hidden_size, hf.num_attention_heads)
        return cls(
            **common_fields(hf),
            num_kv_heads=hf.num_attention_heads,
            head_dim=head_dim,
            mlp_size=hf.intermediate_size,
            activation=hf.hidden_act,
            max_positions=hf.max_position_embeddings,
            norm_epsilon=hf.layer_norm_eps,
            rope=Rope.from_parameters(head_dim, hf.rope_parameters),
            parallel=hf.use_parallel_residual,
            attention_bias=hf.attention_bias,
        )


class DecoderLayer(decoder.DecoderLayer):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.parallel = config.parallel
        self.attention_norm = layers.layer_norm(config, dtype=dtype, rngs=rngs)
        bias = config.attention_bias
        self.attention = Attention(config, bias=bias, out_bias=bias, rope=config.rope, dtype=dtype, rngs=rngs)
        self.mlp_norm = layers.layer_norm(config, dtype=dtype, rngs=rngs)
        self.mlp = layers.MLP(config, bias=True, dtype=dtype, rngs=rngs)

    def write(
        self, h: Float[Array, "B Q D"], x: Float[Array, "B Q D"], attended: Float[Array, "B Q D"]
    ) -> Float[Array, "B Q D"]:
        after = h + attended
        return after + self.mlp(self.mlp_norm(h if self.parallel else after))


class Embedder(decoder.Embedder):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config, layers.layer_norm(config, dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs)


BASE = "gpt_neox."


def checkpoint_names(config: Config) -> names.Names:
    fused = ("attention/q", "attention/k", "attention/v")
    bias = config.attention_bias
    layer = (
        names.norm("input_layernorm", "attention_norm", bias=True)
        | names.linear("attention.query_key_value", *fused, bias=bias, heads=config.num_heads)
        | names.linear("attention.dense", "attention/o", bias=bias)
        | names.norm("post_attention_layernorm", "mlp_norm", bias=True)
        | names.linear("mlp.dense_h_to_4h", "mlp/up")
        | names.linear("mlp.dense_4h_to_h", "mlp/down")
    )
    return (
        names.embedding("gpt_neox.embed_in", "embedder/tokens")
        | names.in_layers("gpt_neox.layers", config.num_layers, layer)
        | names.norm("gpt_neox.final_layer_norm", "embedder/final_norm", bias=True)
        | names.head("embed_out", config.tie_embeddings)
    )
