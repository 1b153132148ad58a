"""What every architecture's decoder layer and embedder have in common; an architecture adds its norms and residuals."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvpr_jax.config import ModelConfig
from kvpr_jax.models.attention import Attention, Recompute, kept
from kvpr_jax.models.layers import embedding, in_chunks, linear
from kvpr_jax.segments import Activations, KeysValues, Place, Segment, of_layer, written


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
        self, h: Float[Array, "B S D"], place: Place, *, split: int, chunk: int
    ) -> tuple[Float[Array, "B S D"], tuple[Activations | None, KeysValues | None]]:
        """One layer over whole prompts.

        Args:
            h: hidden states of the prompts.
            place: their slots, and where each sequence starts.
            split: static split index l: the first `split` tokens are to be kept as activations, the others as keys and
                values.
            chunk: static; queries that pass through attention and MLP at a time, a bound on temporaries.

        Returns:
            Hidden states for the next layer, and what the cache keeps of the prompts in either form.
        """
        x = self.read(h)
        own = self.attention.remember(x, place)

        def block(h: Array, x: Array, slots: Array) -> Array:
            return self.write(h, x, self.attention.over_prompt(x, own, Place(slots[0], place.start)))

        return in_chunks(block, chunk, h, x, place.slots[None]), kept(x, own, split)

    def step(
        self,
        h: Float[Array, "B 1 D"],
        segments: tuple[Segment, ...],
        tail: Segment,
        layer: int | Int[Array, ""],
        place: Place,
        recompute: Recompute,
    ) -> tuple[Float[Array, "B 1 D"], Segment]:
        """One layer over one new token a sequence, which is written into the tail and attends to the cache.

        Args:
            h: hidden states of the tokens.
            segments: this layer's cache of earlier slots, on the device. Those held as activations are turned back
                into attention here.
            tail: where the cache of a group of layers goes on; its form is that in which the tokens are kept.
            layer: which one of that group this is.
            place: the tokens' slot, and where each sequence starts.
            recompute: static; how segments of activations are used ("project" or "absorb").

        Returns:
            Hidden states for the next layer, and the tail with the tokens in it.
        """
        x = self.read(h)
        token = Activations(x, place.slots) if isinstance(tail, Activations) else self.attention.remember(x, place)
        tail = written(tail, layer, token)
        attended = self.attention(x, (*segments, of_layer(tail, layer)), place, recompute)
        return self.write(h, x, attended), tail


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
