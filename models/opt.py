"""OPT (arXiv 2205.01068): learned positions, biases, ReLU; opt-350m norms after each block, projects embeddings.

Its keys and values depend on nothing but the layer's normalised input, so `absorb` never forms either of them.
"""

import dataclasses

import jax.numpy as jnp
import transformers
from flax import nnx
from jaxtyping import Array, Float, Int

from kvpr_jax.config import ModelConfig, token_ids, width_of_heads
from kvpr_jax.models.attention import Attention, Recompute, kept
from kvpr_jax.models.layers import activation, in_chunks
from kvpr_jax.segments import Activations, KeysValues, Place, Segment

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
        activation: the MLP's non-linearity.
    """

    embed_size: int
    norm_first: bool
    final_norm: bool
    norm_affine: bool
    bias: bool
    activation: str

    @classmethod
    def from_hf(cls, hf: transformers.PretrainedConfig) -> "Config":
        return cls(
            model_type="opt",
            vocab_size=hf.vocab_size,
            num_layers=hf.num_hidden_layers,
            hidden_size=hf.hidden_size,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_attention_heads,
            head_dim=width_of_heads(hf.hidden_size, hf.num_attention_heads),
            mlp_size=hf.ffn_dim,
            max_positions=hf.max_position_embeddings,
            tie_embeddings=hf.tie_word_embeddings,
            eos_token_ids=token_ids(hf.eos_token_id),
            embed_size=hf.word_embed_proj_dim,
            norm_first=hf.do_layer_norm_before,
            final_norm=hf.do_layer_norm_before and not hf._remove_final_layer_norm,
            norm_affine=hf.layer_norm_elementwise_affine,
            bias=hf.enable_bias,
            activation=hf.activation_function,
        )


def layer_norm(config: Config, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=NORM_EPSILON,
        use_bias=config.norm_affine,
        use_scale=config.norm_affine,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=dtype,
        rngs=rngs,
    )


class MLP(nnx.Module):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.activation = activation(config.activation)
        self.up = nnx.Linear(
            config.hidden_size, config.mlp_size, use_bias=config.bias, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.down = nnx.Linear(
            config.mlp_size, config.hidden_size, use_bias=config.bias, dtype=dtype, param_dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        return self.down(self.activation(self.up(x)))


class DecoderLayer(nnx.Module):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.norm_first = config.norm_first
        self.attention_norm = layer_norm(config, dtype, rngs)
        self.attention = Attention(
            config, scale=config.head_dim**-0.5, bias=config.bias, out_bias=config.bias, dtype=dtype, rngs=rngs
        )
        self.mlp_norm = layer_norm(config, dtype, rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        h: Float[Array, "B Q D"],
        segments: tuple[Segment, ...],
        place: Place,
        *,
        split: int,
        recompute: Recompute,
        chunk: int,
    ) -> tuple[Float[Array, "B Q D"], tuple[Activations | None, KeysValues | None]]:
        """See `kvpr_jax.models.DecoderLayer`."""
        x = self.attention_norm(h) if self.norm_first else h
        own = self.attention.remember(x, place)

        def block(h: Array, x: Array, slots: Array) -> Array:
            h = h + self.attention(x, own, segments, Place(slots[0], place.start), recompute)
            if self.norm_first:
                return h + self.mlp(self.mlp_norm(h))
            h = self.attention_norm(h)
            return self.mlp_norm(h + self.mlp(h))

        return in_chunks(block, chunk, h, x, place.slots[None]), kept(x, own, split)


class Embedder(nnx.Module):
    """Both ends of the model: tokens to hidden states, and hidden states to logits."""

    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        kwargs = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.tokens = nnx.Embed(config.vocab_size, config.embed_size, **kwargs)
        self.positions = nnx.Embed(config.max_positions + POSITION_OFFSET, config.hidden_size, **kwargs)
        projected = config.embed_size != config.hidden_size
        self.project_in = (
            nnx.Linear(config.embed_size, config.hidden_size, use_bias=False, **kwargs) if projected else None
        )
        self.final_norm = layer_norm(config, dtype, rngs) if config.final_norm else None
        self.project_out = (
            nnx.Linear(config.hidden_size, config.embed_size, use_bias=False, **kwargs) if projected else None
        )
        self.head = (
            None
            if config.tie_embeddings
            else nnx.Linear(config.embed_size, config.vocab_size, use_bias=False, **kwargs)
        )

    def encode(self, tokens: Int[Array, "B Q"], place: Place) -> Float[Array, "B Q D"]:
        h = self.tokens(tokens)
        if self.project_in is not None:
            h = self.project_in(h)
        return h + self.positions(place.positions(place.slots) + POSITION_OFFSET)

    def decode(self, h: Float[Array, "B Q D"]) -> Float[Array, "B Q V"]:
        if self.final_norm is not None:
            h = self.final_norm(h)
        if self.project_out is not None:
            h = self.project_out(h)
        return (self.tokens.attend(h) if self.head is None else self.head(h)).astype(jnp.float32)


def checkpoint_names(config: Config) -> dict[str, tuple[str, bool]]:
    """Checkpoint tensor (without the leading "model.") → (path in the module, whether it is transposed)."""
    weights_and_biases = {
        "self_attn.q_proj": "attention/q",
        "self_attn.k_proj": "attention/k",
        "self_attn.v_proj": "attention/v",
        "self_attn.out_proj": "attention/o",
        "fc1": "mlp/up",
        "fc2": "mlp/down",
    }
    norms = {"self_attn_layer_norm": "attention_norm", "final_layer_norm": "mlp_norm"}
    names = {
        "decoder.embed_tokens.weight": ("embedder/tokens/embedding", False),
        "decoder.embed_positions.weight": ("embedder/positions/embedding", False),
    }
    for i in range(config.num_layers):
        for theirs, ours in weights_and_biases.items():
            names[f"decoder.layers.{i}.{theirs}.weight"] = (f"layers/{i}/{ours}/kernel", True)
            if config.bias:
                names[f"decoder.layers.{i}.{theirs}.bias"] = (f"layers/{i}/{ours}/bias", False)
        for theirs, ours in norms.items() if config.norm_affine else ():
            names[f"decoder.layers.{i}.{theirs}.weight"] = (f"layers/{i}/{ours}/scale", False)
            names[f"decoder.layers.{i}.{theirs}.bias"] = (f"layers/{i}/{ours}/bias", False)
    if config.final_norm and config.norm_affine:
        names["decoder.final_layer_norm.weight"] = ("embedder/final_norm/scale", False)
        names["decoder.final_layer_norm.bias"] = ("embedder/final_norm/bias", False)
    if config.embed_size != config.hidden_size:
        names["decoder.project_in.weight"] = ("embedder/project_in/kernel", True)
        names["decoder.project_out.weight"] = ("embedder/project_out/kernel", True)
    if not config.tie_embeddings:
        names["lm_head.weight"] = ("embedder/head/kernel", True)
    return names
