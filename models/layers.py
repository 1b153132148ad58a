"""Building blocks that architectures share: linear layers, norms, activation functions, MLPs, chunked application."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvpr_jax.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), jax.nn.gelu),  # its tanh form
    "silu": jax.nn.silu,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The MLP's non-linearity by its name in config.json."""
    if name not in ACTIVATIONS:
        raise ValueError(f"config: activation {name!r} is not known; known: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def linear(inputs: int, outputs: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


def embedding(count: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(count, width, dtype=dtype, param_dtype=dtype, rngs=rngs)


def layer_norm(config: ModelConfig, *, affine: bool = True, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.norm_epsilon,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=dtype,
        rngs=rngs,
    )


def rms_norm(config: ModelConfig, width: int | None = None, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """An RMS norm of `width` numbers; None: D."""
    width = width or config.hidden_size
    return nnx.RMSNorm(width, epsilon=config.norm_epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)


class MLP(nnx.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.activation = activation(config.activation)
        self.up = linear(config.hidden_size, config.mlp_size, bias=bias, dtype=dtype, rngs=rngs)
        self.down = linear(config.mlp_size, config.hidden_size, bias=bias, dtype=dtype, rngs=rngs)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        return self.down(self.activation(self.up(x)))


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) · up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.activation = activation(config.activation)
        self.gate = linear(config.hidden_size, config.mlp_size, bias=bias, dtype=dtype, rngs=rngs)
        self.up = linear(config.hidden_size, config.mlp_size, bias=bias, dtype=dtype, rngs=rngs)
        self.down = linear(config.mlp_size, config.hidden_size, bias=bias, dtype=dtype, rngs=rngs)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def in_chunks(function: Callable[..., Array], chunk: int, *arrays: Array) -> Array:
    """`function` over pieces of `chunk` tokens along axis 1 of `arrays`, one piece after the other.

    Bounds the temporaries of a long prompt: with 5 tokens and chunk 2, `function` sees tokens (0, 1), (2, 3) and
    (4, padding); what it returns for the padding is dropped.
    """
    tokens = arrays[0].shape[1]
    if tokens <= chunk:
        return function(*arrays)
    pieces = -(-tokens // chunk)

    def split(array: Array) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, pieces * chunk - tokens)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(array.shape[0], pieces, chunk, *array.shape[2:]), 1, 0)

    out = jax.lax.map(lambda piece: function(*piece), tuple(split(array) for array in arrays))
    return jnp.moveaxis(out, 0, 1).reshape(out.shape[1], pieces * chunk, *out.shape[3:])[:, :tokens]
