"""OPT (arXiv 2205.01068): learned positions, biases, ReLU; opt-350m norms after each block, projects embeddings.

Its keys and values depend on nothing but the layer's normalised input, so `absorb` never forms either of them.
"""

import dataclasses

import jax.numpy as jnp
import transformers
from flax import nnx
from jaxtyping import Array, Float, Int

from kvpr_jax.config import ModelConfig, common_fields, width_of_heads
from kvpr_jax.models import decoder, layers, names
from kvpr_jax.models.attention import Attention
from kvpr_jax.segments import Place

POSITION_OFFSET = 2  # OPT's position table starts with two rows that no token uses
NORM_EPSILON = 1e-5  # torch's default; OPT's config has no field for it


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """OPT's own fields.

    Attributes:
        embed_size: width of the token embedding; projected to D where they differ (opt-350m).
        norm_first: layer norm before attention and MLP (all sizes but opt-350m) or after.
        final_norm: layer norm after the last layer.
        norm_affine: whether layer norms have a scale and a bias.
        bias: whether projections have a bias.
    """

    embed_size: int
    norm_first: bool
    final_norm: bool
    norm_affine: bool
    bias: bool

    @classmethod
    def from_hf(cls, hf: transformers.PretrainedConfig) -> "Config":
        return cls(
            **common_fields(hf),
            num_kv_heads=hf.num_attention_heads,
            head_dim=width_of_heads(hf.hidden_size, hf.num_attention_heads),
            mlp_size=hf.ffn_dim,
            activation=hf.activation_function,
            norm_epsilon=NORM_EPSILON,
            max_positions=hf.max_position_embeddings,
            embed_size=hf.word_embed_proj_dim,
            norm_first=hf.do_layer_norm_before,
            final_norm=hf.do_layer_norm_before and not hf._remove_final_layer_norm,
            norm_affine=hf.layer_norm_elementwise_affine,
            bias=hf.enable_bias,
        )


class DecoderLayer(decoder.DecoderLayer):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.norm_first = config.norm_first
        self.attention_norm = layers.layer_norm(config, affine=config.norm_affine, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, bias=config.bias, out_bias=config.bias, dtype=dtype, rngs=rngs)
        self.mlp_norm = layers.layer_norm(config, affine=config.norm_affine, dtype=dtype, rngs=rngs)
        self.mlp = layers.MLP(config, bias=config.bias, dtype=dtype, rngs=rngs)

    def read(self, h: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        return super().read(h) if self.norm_first else h

    def write(
        self, h: Float[Array, "B Q D"], x: Float[Array, "B Q D"], attended: Float[Array, "B Q D"]
    ) -> Float[Array, "B Q D"]:
        if self.norm_first:
            return super().write(h, x, attended)
        h = self.attention_norm(h + attended)
        return self.mlp_norm(h + self.mlp(h))


class Embedder(decoder.Embedder):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        final_norm = (
            layers.layer_norm(config, affine=config.norm_affine, dtype=dtype, rngs=rngs) if config.final_norm else None
        )
        super().__init__(config, final_norm, width=config.embed_size, dtype=dtype, rngs=rngs)
        positions = config.max_positions + POSITION_OFFSET
        self.positions = layers.embedding(positions, config.hidden_size, dtype=dtype, rngs=rngs)
        outer, inner = config.embed_size, config.hidden_size
        projected = outer != inner
        self.project_in = layers.linear(outer, inner, bias=False, dtype=dtype, rngs=rngs) if projected else None
        self.project_out = layers.linear(inner, outer, bias=False, dtype=dtype, rngs=rngs) if projected else None

    def encode(self, tokens: Int[Array, "B Q"], place: Place) -> Float[Array, "B Q D"]:
        h = self.tokens(tokens)
        if self.project_in is not None:
            h = self.project_in(h)
        return h + self.positions(place.positions(place.slots) + POSITION_OFFSET)

    def head_input(self, h: Float[Array, "B Q D"]) -> Float[Array, "B Q _"]:
        h = super().head_input(h)
        return h if self.project_out is None else self.project_out(h)


BASE = "model."


def checkpoint_names(config: Config) -> names.Names:
    layer = (
        names.linear("self_attn.q_proj", "attention/q", bias=config.bias)
        | names.linear("self_attn.k_proj", "attention/k", bias=config.bias)
        | names.linear("self_attn.v_proj", "attention/v", bias=config.bias)
        | names.linear("self_attn.out_proj", "attention/o", bias=config.bias)
        | names.linear("fc1", "mlp/up", bias=config.bias)
        | names.linear("fc2", "mlp/down", bias=config.bias)
    )
    if config.norm_affine:
        layer |= names.norm("self_attn_layer_norm", "attention_norm", bias=True)
        layer |= names.norm("final_layer_norm", "mlp_norm", bias=True)
    found = (
        names.embedding("model.decoder.embed_tokens", "embedder/tokens")
        | names.embedding("model.decoder.embed_positions", "embedder/positions")
        | names.in_layers("model.decoder.layers", config.num_layers, layer)
        | names.head("lm_head", config.tie_embeddings)
    )
    if config.final_norm and config.norm_affine:
        found |= names.norm("model.decoder.final_layer_norm", "embedder/final_norm", bias=True)
    if config.embed_size != config.hidden_size:
        found |= names.linear("model.decoder.project_in", "embedder/project_in", bias=False)
        found |= names.linear("model.decoder.project_out", "embedder/project_out", bias=False)
    return found
