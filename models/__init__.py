"""Flax NNX language models whose attention reads a segmented cache; one file per architecture (`model_type`).

Each architecture file has the same parts in the same order: `Config` (with `from_hf`), `MLP`, `DecoderLayer`,
`Embedder` and `checkpoint_names`.
"""

from types import ModuleType
from typing import Protocol

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvpr_jax.config import ModelConfig
from kvpr_jax.models import llama, opt
from kvpr_jax.models.attention import Recompute
from kvpr_jax.segments import Activations, KeysValues, Place, Segment

ARCHITECTURES: dict[str, ModuleType] = {"llama": llama, "mistral": llama, "opt": opt}


class DecoderLayer(Protocol):
    """What every architecture's `DecoderLayer` does."""

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
        ...


def architecture(model_type: str) -> ModuleType:
    """The module of a `model_type`.

    Raises:
        ValueError: unknown, with the known ones.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[model_type]


class Model(nnx.Module):
    """A decoder-only language model: an embedder for both ends and L equal layers.

    Args:
        config: of one of the architectures.
        dtype: of weights and arithmetic (softmax, scores and norms are float32 in any case).
        rngs: for random weights; `checkpoint.load` replaces them.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        module = architecture(config.model_type)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embedder = module.Embedder(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([module.DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])

    def __call__(self, tokens: Int[Array, "B Q"], start: Int[Array, " B"] | None = None) -> Float[Array, "B Q V"]:
        """Logits after every token, without a cache: for training and for scoring whole texts."""
        place = Place(jnp.arange(tokens.shape[1]), start)
        h = self.embedder.encode(tokens, place)
        for layer in self.layers:
            h, _ = layer(h, (), place, split=0, recompute="project", chunk=tokens.shape[1])
        return self.embedder.decode(h)
