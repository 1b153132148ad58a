"""Positions that enter in attention: rotary embeddings (RoPE) and linear biases (ALiBi)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864) in the half-split layout of Hugging Face checkpoints.

    Attributes:
        width: dimensions of each head that are turned, its first ones; the others stay as they are.
        theta: base of the frequencies.
        kind: "default", "linear" (positions divided by `factor`) or "llama3" (low frequencies divided by `factor`,
            high ones kept, those between blended).
        factor, low_freq_factor, high_freq_factor, original_max_positions: as in config.json.
    """

    width: int
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
        if self.width < 2 or self.width % 2:
            raise ValueError(f"config: rotary embeddings turn an even number of dimensions of a head, not {self.width}")

    @classmethod
    def from_parameters(cls, head_dim: int, parameters: Mapping[str, Any]) -> "Rope":
        """From the `rope_parameters` of a transformers config."""
        names = {
            "rope_type": "kind",
            "rope_theta": "theta",
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_max_positions",
        }
        given = {ours: parameters[theirs] for theirs, ours in names.items() if parameters.get(theirs) is not None}
        return cls(int(head_dim * parameters.get("partial_rotary_factor", 1.0)), **given)

    def frequencies(self) -> np.ndarray:
        """(width/2,) float32: radians a position turns each pair of dimensions by."""
        frequency = self.theta ** -(np.arange(0, self.width, 2, dtype=np.float64) / self.width)
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
        first, second, others = jnp.split(x, (self.width // 2, self.width), axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, others], axis=-1)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """For each head, what each position between a query and a key takes off their score (arXiv 2108.12409).

    For a power of two heads, the geometric series of 2^(-8/H): 1/4, 1/16, 1/64 and 1/256 for 4 of them. Any other
    number gets the series of the power of two below it, and for the rest every other one of that of the power above:
    1/4, 1/16, 1/64, 1/256, 1/2 and 1/8 for 6.
    """
    below = 2 ** int(math.log2(heads))
    series = 2.0 ** (-8 / below * np.arange(1, below + 1))
    between = 2.0 ** (-4 / below * np.arange(1, 2 * (heads - below), 2))
    return (*series.tolist(), *between.tolist())
