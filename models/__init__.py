"""Flax NNX language models whose attention reads a segmented cache; one file per architecture (`model_type`).

Each architecture file has the same parts in the same order: `Config` (with `from_hf`), `DecoderLayer`, `Embedder`, and
what its checkpoints look like: `BASE`, the prefix of all tensors but the head's, and `checkpoint_names`.
"""

import dataclasses
from types import ModuleType

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvpr_jax.config import ModelConfig
from kvpr_jax.models import bloom, gemma, gpt2, gpt_neox, llama, olmo2, opt, phi, qwen2, qwen3
from kvpr_jax.segments import Place

CHUNK = 256  # tokens of a text that pass a layer at a time when there is no cache

ARCHITECTURES: dict[str, ModuleType] = {
    "bloom": bloom,
    "gemma": gemma,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": llama,
    "olmo2": olmo2,
    "opt": opt,
    "phi": phi,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


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
            h, _ = layer(h, place, split=0, chunk=CHUNK)
        return self.embedder.decode(h)


def abstract(config: ModelConfig, dtype: jnp.dtype) -> Model:
    """A model that holds shapes in place of arrays. Only its first layer is traced: the others are alike."""
    one = dataclasses.replace(config, num_layers=1)
    model = nnx.eval_shape(lambda: Model(one, dtype=dtype, rngs=nnx.Rngs(0)))
    model.config = config
    model.layers = nnx.List([nnx.clone(model.layers[0]) for _ in range(config.num_layers)])
    return model


def weights_bytes(config: ModelConfig, dtype: jnp.dtype) -> int:
    """Bytes of the model's parameters, without making any."""
    return nbytes(abstract(config, dtype))


def nbytes(module: nnx.Module) -> int:
    """Bytes of a module's parameters, which may be shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
