"""Names and layouts: which tensors of a Hugging Face checkpoint make up which parameters of a module.

The functions give the tensors of one module as `Names`; an architecture joins them with `|`, and `in_layers` repeats
those of a layer.
"""

import dataclasses
from typing import TypeVar

import jax
import numpy as np

Shape = tuple[int, ...]
ArrayT = TypeVar("ArrayT", np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint.

    Attributes:
        paths: the parameters that it holds; none for a tensor that a checkpoint may have and the module does not need.
        transposed: stored as (outputs, inputs), as torch's Linear has it, where Flax has (inputs, outputs).
        heads: several parameters stand side by side along the outputs; 0, or the number of heads by which they take
            turns: all of head 0, then all of head 1, and so on.
    """

    paths: tuple[str, ...] = ()
    transposed: bool = False
    heads: int = 0

    def shape(self, shapes: list[Shape]) -> Shape:
        """The tensor's shape, from those of the parameters."""
        shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        return shape[::-1] if self.transposed else shape

    def unpack(self, tensor: ArrayT) -> list[ArrayT]:
        """The parameters in a tensor, of NumPy or of JAX, in the order of `paths`."""
        tensor, count = tensor.T if self.transposed else tensor, len(self.paths)
        if not self.heads:
            width = tensor.shape[-1] // count
            return [tensor[..., index * width : (index + 1) * width] for index in range(count)]
        by_head = tensor.reshape(*tensor.shape[:-1], self.heads, count, -1)
        return [by_head[..., index, :].reshape(*tensor.shape[:-1], -1) for index in range(count)]

    def pack(self, parameters: list[np.ndarray]) -> np.ndarray:
        """The tensor that holds these parameters."""
        if self.heads:
            outer = parameters[0].shape[:-1]
            by_head = [parameter.reshape(*outer, self.heads, 1, -1) for parameter in parameters]
            tensor = np.concatenate(by_head, axis=-2).reshape(*outer, -1)
        else:
            tensor = np.concatenate(parameters, axis=-1)
        return np.ascontiguousarray(tensor.T if self.transposed else tensor)


Names = dict[str, Stored]


def linear(theirs: str, *ours: str, bias: bool = True, transposed: bool = True, heads: int = 0) -> Names:
    """A linear layer, or several in one: `linear("c_attn", "q", "k", "v")`."""
    names = {f"{theirs}.weight": Stored(tuple(f"{path}/kernel" for path in ours), transposed, heads)}
    if bias:
        names[f"{theirs}.bias"] = Stored(tuple(f"{path}/bias" for path in ours), heads=heads)
    return names


def norm(theirs: str, ours: str, bias: bool = False) -> Names:
    """A layer norm with its bias, or an RMS norm without."""
    names = {f"{theirs}.weight": Stored((f"{ours}/scale",))}
    if bias:
        names[f"{theirs}.bias"] = Stored((f"{ours}/bias",))
    return names


def embedding(theirs: str, ours: str) -> Names:
    return {f"{theirs}.weight": Stored((f"{ours}/embedding",))}


def head(theirs: str, tied: bool, bias: bool = False) -> Names:
    """The output head. Where it is the token embedding, checkpoints may hold it all the same."""
    return {f"{theirs}.weight": Stored()} if tied else linear(theirs, "embedder/head", bias=bias)


def in_layers(theirs: str, count: int, layer: Names) -> Names:
    """The same tensors in every layer; `theirs` is followed by the layer's number: "model.layers"."""
    return {
        f"{theirs}.{index}.{name}": dataclasses.replace(
            stored, paths=tuple(f"layers/{index}/{path}" for path in stored.paths)
        )
        for index in range(count)
        for name, stored in layer.items()
    }
