"""What a layer remembers of T tokens, in one of two forms. Axis letters: see `config.py`.

The cache holds segments of a group of N layers, with the layers in front; attention reads one layer's, without.

A token stands at a *slot*: its index in the padded batch, the same for every layer. `slots` lets a segment be cut,
merged and stored in any order, because attention only asks which slots a query may see.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

if TYPE_CHECKING:
    Held = Array
else:  # or what only describes one: shapes and types, where a step is compiled before it is needed
    Held = Any

LAYERS, SEQUENCES, TOKENS = 0, 1, 2  # axes of the arrays of a group's segment


def _nbytes(arrays: dict[str, Held]) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays.values())  # a shape has no nbytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activations:
    """Tokens held as the input of the layer's key/value projection: D numbers a token."""

    x: Float[Held, "*N B T D"]
    slots: Int[Held, " T"]

    @property
    def tokens(self) -> int:
        return self.slots.shape[0]

    @property
    def arrays(self) -> dict[str, Held]:
        """What crosses the link when the segment is fetched, by field; slots stay on the device."""
        return {"x": self.x}

    @property
    def nbytes(self) -> int:
        """Bytes of `arrays`."""
        return _nbytes(self.arrays)

    def __getitem__(self, tokens: slice) -> "Activations":
        return Activations(self.x[..., tokens, :], self.slots[tokens])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Tokens held as keys (rotated, where the model rotates them) and values: 2·K·d numbers a token."""

    keys: Float[Held, "*N B T K d"]
    values: Float[Held, "*N B T K d"]
    slots: Int[Held, " T"]

    @property
    def tokens(self) -> int:
        return self.slots.shape[0]

    @property
    def arrays(self) -> dict[str, Held]:
        """What crosses the link when the segment is fetched, by field; slots stay on the device."""
        return {"keys": self.keys, "values": self.values}

    @property
    def nbytes(self) -> int:
        """Bytes of `arrays`."""
        return _nbytes(self.arrays)

    def __getitem__(self, tokens: slice) -> "KeysValues":
        return KeysValues(self.keys[..., tokens, :, :], self.values[..., tokens, :, :], self.slots[tokens])


Segment = Activations | KeysValues


def stacked(layers: Sequence[Segment]) -> Segment:
    """A group's segment from one of each of its layers, of one form and at the same slots."""
    names = layers[0].arrays
    return dataclasses.replace(layers[0], **{name: jnp.stack([of.arrays[name] for of in layers]) for name in names})


def of_layer(segment: Segment, layer: int | Int[Array, ""]) -> Segment:
    """One layer's part of a group's segment."""
    return dataclasses.replace(segment, **{name: array[layer] for name, array in segment.arrays.items()})


def written(segment: Segment, layer: int | Int[Array, ""], token: Segment) -> Segment:
    """A group's segment, at consecutive slots, with one layer's token of the same form at the token's slot."""
    at = token.slots[0] - segment.slots[0]

    def put(into: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(into, new[None], (layer, 0, at, *[0] * (into.ndim - 3)))

    arrays = {name: put(array, token.arrays[name]) for name, array in segment.arrays.items()}
    return dataclasses.replace(segment, **arrays)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Place:
    """Where the tokens of one call stand.

    Attributes:
        slots: (Q,) slots of the tokens, ascending.
        start: (B,) the first slot that is not padding, or None when no sequence is padded.
    """

    slots: Int[Held, " Q"]
    start: Int[Held, " B"] | None

    def positions(self, slots: Int[Array, " T"]) -> Int[Array, "#B T"]:
        """Position of each slot in its own sequence; padding counts as position 0."""
        if self.start is None:
            return slots[None, :]
        return (slots[None, :] - self.start[:, None]).clip(0)
