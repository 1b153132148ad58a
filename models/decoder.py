"""What every architecture's decoder layer and embedder have in common; an architecture adds its norms and residuals."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvpr_jax.config import ModelConfig
from kvpr_jax.models.attention import Attention, Recompute, kept
from kvpr_jax.models.layers import embedding, in_chunks, linear
from kvpr_jax.segments import Activations, KeysValues, Place, Segment


class DecoderLayer(nnx.Module):
    """One layer: attention over the cache and the new tokens, then the MLP, each behind a norm and beside a residual.

    An architecture makes the modules. Where its norms or residuals are others, it says what attention reads (`read`)
    or what becomes of what it gives (`write`).
    """

    attention_norm: nnx.Module
    attention: Attention
    mlp_norm: nnx.Module
    mlp: nnx.Module

    def read(self, h: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        """The input of the query, key and value projections: what the cache holds of a token as activations."""
        return self.attention_norm(h)

    def write(
        self, h: Float[Array, "B Q D"], x: Float[Array, "B Q D"], attended: Float[Array, "B Q D"]
    ) -> Float[Array, "B Q D"]:
        """The layer's output, from its input `h`, from x = read(h) and from what attention made of x."""
        h = h + attended
        return h + self.mlp(self.mlp_norm(h))

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
        """One layer over new tokens, attending to the cache and, causally, to one another.

        Args:
            h: hidden states of the call's tokens.
            segments: this layer's cache of earlier slots, on the device. Those held as activations are turned back
                into attention here.
            place: slots of the call's tokens, and where each sequence starts.
            split: static split index of the call's own tokens: the first `split` are to be kept as activations, the
                others as keys and values. A prompt of S tokens gets the plan's l; a decode step's one token gets 1
                or 0.
            recompute: static; how segments of activations are used ("project" or "absorb").
            chunk: static; queries that pass through attention and MLP at a time, a bound on temporaries.

        Returns:
            Hidden states for the next layer, and what the cache keeps of the call's tokens in either form.
        """
        x = self.read(h)
        own = self.attention.remember(x, place)

        def block(h: Array, x: Array, slots: Array) -> Array:
            return self.write(h, x, self.attention(x, own, segments, Place(slots[0], place.start), recompute))

        return in_chunks(block, chunk, h, x, place.slots[None]), kept(x, own, split)


class Embedder(nnx.Module):
    """Both ends of the model: tokens to hidden states, and hidden states to logits.

    Args:
        config: shapes.
        final_norm: applied after the last layer, or None.
        width: of the token embedding; None: D.
        head_bias: whether an output head of its own has a bias.
    """

    def __init__(
        self,
        config: ModelConfig,
        final_norm: nnx.Module | None,
        *,
        width: int | None = None,
        head_bias: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        width = width or config.hidden_size
        self.tokens = embedding(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.final_norm = final_norm
        self.head = (
            None if config.tie_embeddings else linear(width, config.vocab_size, bias=head_bias, dtype=dtype, rngs=rngs)
        )

    def encode(self, tokens: Int[Array, "B Q"], place: Place) -> Float[Array, "B Q D"]:
        """Hidden states of tokens at `place`, before the first layer."""
        del place  # for architectures whose positions are embedded
        return self.tokens(tokens)

    def decode(self, h: Float[Array, "B Q D"]) -> Float[Array, "B Q V"]:
        """float32 logits of hidden states after the last layer."""
        h = self.head_input(h)
        return (self.tokens.attend(h) if self.head is None else self.head(h)).astype(jnp.float32)

    def head_input(self, h: Float[Array, "B Q D"]) -> Float[Array, "B Q _"]:
        """What the output head reads."""
        return h if self.final_norm is None else self.final_norm(h)
