"""Llama 1 to 3 (arXiv 2302.13971, 2307.09288, 2407.21783) and Mistral (2310.06825): RMS norm, RoPE, gated MLP.

Keys are rotated, so `absorb` projects keys and absorbs values. With grouped queries D is no smaller than 2·K·d, and
activations save nothing.
"""

import dataclasses

import jax.numpy as jnp
import transformers
from flax import nnx
from jaxtyping import Array, Float, Int

from kvpr_jax.config import ModelConfig, token_ids, width_of_heads
from kvpr_jax.models.attention import Attention, Recompute, kept
from kvpr_jax.models.layers import Rope, activation, in_chunks
from kvpr_jax.segments import Activations, KeysValues, Place, Segment


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """Llama's own fields.

    Attributes:
        norm_epsilon: of every RMS norm.
        rope: rotary embedding.
        window: Mistral's sliding window in tokens, or None.
        attention_bias, mlp_bias: whether those projections have a bias.
        activation: the MLP's non-linearity.
    """

    norm_epsilon: float
    rope: Rope
    window: int | None
    attention_bias: bool
    mlp_bias: bool
    activation: str

    @classmethod
    def from_hf(cls, hf: transformers.PretrainedConfig) -> "Config":
        head_dim = getattr(hf, "head_dim", None) or width_of_heads(hf.hidden_size, hf.num_attention_heads)
        return cls(
            model_type=hf.model_type,
            vocab_size=hf.vocab_size,
            num_layers=hf.num_hidden_layers,
            hidden_size=hf.hidden_size,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=head_dim,
            mlp_size=hf.intermediate_size,
            max_positions=hf.max_position_embeddings,
            tie_embeddings=hf.tie_word_embeddings,
            eos_token_ids=token_ids(hf.eos_token_id),
            norm_epsilon=hf.rms_norm_eps,
            rope=Rope.from_parameters(head_dim, hf.rope_parameters),
            window=getattr(hf, "sliding_window", None),
            attention_bias=getattr(hf, "attention_bias", False),
            mlp_bias=getattr(hf, "mlp_bias", False),
            activation=hf.hidden_act,
        )


def rms_norm(config: Config, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.norm_epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)


class MLP(nnx.Module):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.activation = activation(config.activation)
        kwargs = {"use_bias": config.mlp_bias, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.gate = nnx.Linear(config.hidden_size, config.mlp_size, **kwargs)
        self.up = nnx.Linear(config.hidden_size, config.mlp_size, **kwargs)
        self.down = nnx.Linear(config.mlp_size, config.hidden_size, **kwargs)

    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention_norm = rms_norm(config, dtype, rngs)
        self.attention = Attention(
            config,
            scale=config.head_dim**-0.5,
            bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=config.rope,
            window=config.window,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = rms_norm(config, dtype, rngs)
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
        x = self.attention_norm(h)
        own = self.attention.remember(x, place)

        def block(h: Array, x: Array, slots: Array) -> Array:
            h = h + self.attention(x, own, segments, Place(slots[0], place.start), recompute)
            return h + self.mlp(self.mlp_norm(h))

        return in_chunks(block, chunk, h, x, place.slots[None]), kept(x, own, split)


class Embedder(nnx.Module):
    """Both ends of the model: tokens to hidden states, and hidden states to logits."""

    def __init__(self, config: Config, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        kwargs = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.tokens = nnx.Embed(config.vocab_size, config.hidden_size, **kwargs)
        self.final_norm = rms_norm(config, dtype, rngs)
        self.head = (
            None
            if config.tie_embeddings
            else nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, **kwargs)
        )

    def encode(self, tokens: Int[Array, "B Q"], place: Place) -> Float[Array, "B Q D"]:
        del place  # positions enter by rotation
        return self.tokens(tokens)

    def decode(self, h: Float[Array, "B Q D"]) -> Float[Array, "B Q V"]:
        h = self.final_norm(h)
        return (self.tokens.attend(h) if self.head is None else self.head(h)).astype(jnp.float32)


def checkpoint_names(config: Config) -> dict[str, tuple[str, bool]]:
    """Checkpoint tensor (without the leading "model.") → (path in the module, whether it is transposed)."""
    linears = {
        "self_attn.q_proj": ("attention/q", config.attention_bias),
        "self_attn.k_proj": ("attention/k", config.attention_bias),
        "self_attn.v_proj": ("attention/v", config.attention_bias),
        "self_attn.o_proj": ("attention/o", config.attention_bias),
        "mlp.gate_proj": ("mlp/gate", config.mlp_bias),
        "mlp.up_proj": ("mlp/up", config.mlp_bias),
        "mlp.down_proj": ("mlp/down", config.mlp_bias),
    }
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    names = {
        "embed_tokens.weight": ("embedder/tokens/embedding", False),
        "norm.weight": ("embedder/final_norm/scale", False),
    }
    for i in range(config.num_layers):
        for theirs, (ours, bias) in linears.items():
            names[f"layers.{i}.{theirs}.weight"] = (f"layers/{i}/{ours}/kernel", True)
            if bias:
                names[f"layers.{i}.{theirs}.bias"] = (f"layers/{i}/{ours}/bias", False)
        for theirs, ours in norms.items():
            names[f"layers.{i}.{theirs}.weight"] = (f"layers/{i}/{ours}/scale", False)
    if not config.tie_embeddings:
        names["lm_head.weight"] = ("embedder/head/kernel", True)
    return names
