"""Building blocks that architectures share: chunked application, activation functions, rotary embeddings (RoPE)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The MLP's non-linearity by its name in config.json."""
    if name not in ACTIVATIONS:
        raise ValueError(f"config: activation {name!r} is not known; known: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


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


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864) in the half-split layout of Hugging Face checkpoints.

    Attributes:
        head_dim: d.
        theta: base of the frequencies.
        kind: "default", "linear" (positions divided by `factor`) or "llama3" (low frequencies divided by `factor`,
            high ones kept, those between blended).
        factor, low_freq_factor, high_freq_factor, original_max_positions: as in config.json.
    """

    head_dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    KINDS = ("default", "linear", "llama3")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"config: rope scaling {self.kind!r} is not supported; supported: {', '.join(self.KINDS)}")
        if self.head_dim % 2:
            raise ValueError(f"config: rotary embeddings need an even head_dim, not {self.head_dim}")

    @classmethod
    def from_parameters(cls, head_dim: int, parameters: Mapping[str, Any]) -> "Rope":
        """From the `rope_parameters` of a transformers config."""
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"config: partial_rotary_factor {parameters['partial_rotary_factor']} is not supported; 1.0 is"
            )
        names = {
            "rope_type": "kind",
            "rope_theta": "theta",
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_max_positions",
        }
        given = {ours: parameters[theirs] for theirs, ours in names.items() if parameters.get(theirs) is not None}
        return cls(head_dim, **given)

    def frequencies(self) -> np.ndarray:
        """(d/2,) float32: radians a position turns each pair of dimensions by."""
        frequency = self.theta ** -(np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        if self.kind == "linear":
            frequency = frequency / self.factor
        elif self.kind == "llama3":
            turns = self.original_max_positions * frequency / (2 * math.pi)  # over the context of pre-training
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = np.clip(kept, 0.0, 1.0)
            frequency = kept * frequency + (1 - kept) * frequency / self.factor
        return frequency.astype(np.float32)

    def rotate(self, x: Float[Array, "B T heads d"], positions: Int[Array, "#B T"]) -> Float[Array, "B T heads d"]:
        """`x` turned to `positions`; the angles are float32 whatever the dtype of `x`."""
        angle = positions[:, :, None, None].astype(jnp.float32) * self.frequencies()[None, None, None, :]
        cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
