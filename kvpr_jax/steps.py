"""Every compiled function. A function is traced anew for each combination of what its row names, and for nothing else.

    name              | static                  | donated | what retraces it (shapes count for all of them)
    embed             | definition              |         | batch, tokens of the call, whether sequences are padded
    prefill_layer     | definition, split,      | h       | sequences of the chunk, S, l, resident tokens, queries at a
                      | resident, chunk         |         | time; not the layer, not the prompt
    decode_layers     | definition, recompute,  | tail    | batch, how many layers, the segments' forms and lengths,
                      | caller                  |         | the tail's form; not which layers, not the token, not the
                      |                         |         | position
    logits            | definition              |         | batch
    sample            | choice                  |         | batch; not the values of temperature, top-k, top-p, min-p or
                      |                         |         | seed
    concatenate       | axis                    |         | forms and shapes of the segments
    wait_for          |                         |         | how many arrays
    cross_entropy     |                         |         | batch

`definition` and `params` are an NNX module split once (`split_module`): all layers share one definition, so they share
one trace.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key

from kvpr_jax import memory
from kvpr_jax.models.attention import Recompute
from kvpr_jax.sampling import Choice, Sampling, sample_tokens
from kvpr_jax.segments import TOKENS, Place, Segment, of_layer, stacked

Params = dict[str, Any]
DecodeLayers = Callable[..., tuple[Array, Segment]]  # `decode_layers` with all static arguments given


class Definition:
    """A module's graph definition, hashed once: JAX hashes static arguments at every call, and this one is large.

    Args:
        graphdef: of the module.
        vectors: their shapes and types, by which `unravel` does the same for all modules that are equal otherwise.
        unravel: makes them of one array again.
    """

    def __init__(
        self, graphdef: nnx.GraphDef, vectors: tuple[tuple[Any, Any], ...], unravel: Callable[[Array], Params]
    ) -> None:
        self.graphdef, self.vectors, self.unravel = graphdef, vectors, unravel
        self._hash = hash((graphdef, vectors))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Definition) and self.vectors == other.vectors and self.graphdef == other.graphdef
        )

    def module(self, params: Params) -> Any:
        """The module with these parameters."""
        return nnx.merge(self.graphdef, self.unravel(params["vectors"]), params["others"])


def split_module(module: nnx.Module) -> tuple[Definition, Params]:
    """A module's static definition and its parameters, on the device: its vectors (biases, norms) as one array.

    The host needs longer the more arrays a call has, and in a short step it has no time to spare: OPT's layers have ten
    vectors.
    """
    graphdef, vectors, others = nnx.split(module, lambda path, variable: variable.ndim == 1, ...)
    vectors = nnx.to_pure_dict(vectors)
    raveled, unravel = ravel_pytree(vectors)
    kinds = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(vectors))
    return Definition(graphdef, kinds, unravel), memory.placed({"others": nnx.to_pure_dict(others), "vectors": raveled})


def _precision(array: Array) -> contextlib.AbstractContextManager[Any]:
    """float32 means float32: no TF32 and no bfloat16 passes in its matrix products."""
    if array.dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


@functools.partial(jax.jit, static_argnames=("definition",))
def embed(
    definition: Definition, params: Params, tokens: Int[Array, " B"] | Int[Array, "B Q"], place: Place
) -> tuple[Float[Array, "B Q D"], Int[Array, " 1"]]:
    """Hidden states of tokens at `place`, and the slot behind them, which so never has to be uploaded.

    A step's tokens, one a sequence, get their second axis here: the host would need as long for another call.
    """
    embedder = definition.module(params)
    tokens = tokens.reshape(tokens.shape[0], -1)
    with _precision(jax.tree.leaves(params["others"])[0]):
        return embedder.encode(tokens, place), place.slots[-1:] + 1


@functools.partial(
    jax.jit, static_argnames=("definition", "split", "resident", "chunk"), donate_argnames=("h",),
    # Large products are nearly as fast without: trying Triton's took half a minute for OPT-6.7B's on an H100.
    compiler_options={"xla_gpu_enable_triton_gemm": False},
)  # fmt: skip
def prefill_layer(
    definition: Definition,
    params: Params,
    h: Float[Array, "B Q D"],
    place: Place,
    *,
    split: int,
    resident: int,
    chunk: int,
) -> tuple[Float[Array, "B Q D"], tuple[Segment, ...], tuple[Segment, ...]]:
    """One layer over whole prompts: hidden states, segments for the host, segments that stay on the device; those of a
    group of one layer.

    With 8 tokens, split 3 and resident 2, the host gets activations [0, 3) and keys and values [3, 6), and keys and
    values [6, 8) stay.
    """
    layer = definition.module(params)
    with _precision(h):
        h, (activations, own) = layer(h, place, split=split, chunk=chunk)
    host: list[Segment] = [stacked([activations])] if activations is not None else []
    stay: list[Segment] = []
    if own is not None:
        streamed = own.tokens - resident
        if streamed:
            host.append(stacked([own[:streamed]]))
        if resident:
            stay.append(stacked([own[streamed:]]))
    return h, tuple(host), tuple(stay)


@functools.partial(jax.jit, static_argnames=("definition", "recompute", "caller"), donate_argnames=("tail",))
def decode_layers(
    definition: Definition,
    params: tuple[Params, ...],
    h: Float[Array, "B 1 D"],
    segments: tuple[Segment, ...],
    tail: Segment,
    place: Place,
    *,
    recompute: Recompute,
    caller: int = 0,
) -> tuple[Float[Array, "B 1 D"], Segment]:
    """A group of consecutive layers over one new token a sequence.

    Segments of activations are turned back into attention here, while the copies of later layers' segments, which the
    engine has issued already, cross the link.

    Args:
        params: of each layer.
        segments, tail: of the group.
        caller: for each, a compiled function of its own; see `compiling.one_each`.

    Returns:
        Hidden states, and the tail with the token written into it.
    """
    del caller
    for layer, of_this in enumerate(params):
        held = tuple(of_layer(segment, layer) for segment in segments)
        h, tail = _decode_layer(definition, of_this, h, held, tail, layer, place, recompute=recompute)
    return h, tail


@functools.partial(jax.jit, static_argnames=("definition", "recompute"))
def _decode_layer(
    definition: Definition,
    params: Params,
    h: Float[Array, "B 1 D"],
    segments: tuple[Segment, ...],
    tail: Segment,
    layer: Int[Array, ""],
    place: Place,
    *,
    recompute: Recompute,
) -> tuple[Float[Array, "B 1 D"], Segment]:
    """One of `decode_layers`: a function of its own within that, which a group of layers traces once."""
    with _precision(h):
        return definition.module(params).step(h, segments, tail, layer, place, recompute)


@functools.partial(jax.jit, static_argnames=("definition",))
def logits(definition: Definition, params: Params, h: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
    """Logits after a token of each sequence, in the weights' dtype, as float32."""
    with _precision(h):
        return definition.module(params).decode(h)[:, 0]


@functools.partial(jax.jit, static_argnames=("choice",))
@jax.named_scope("sample")
def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], index: Int[Array, ""], sampling: Sampling, *, choice: Choice
) -> tuple[Int[Array, " B"], Int[Array, ""]]:
    """The next token of each sequence, and index + 1; `index` counts the new tokens before it."""
    return sample_tokens(logits, keys, index, sampling, choice), index + 1


@jax.jit
def cross_entropy(logits: Float[Array, "B V"], targets: Int[Array, " B"]) -> Float[Array, " B"]:
    """Nats of each target under its logits: what `evaluate` adds up."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


@functools.partial(jax.jit, static_argnames=("axis",))
def concatenate(segments: tuple[Segment, ...], axis: int) -> Segment:
    """Groups' segments of one form as one, along their layers, sequences or tokens."""

    def join(*arrays: Array) -> Array:
        if arrays[0].ndim == 1:  # slots
            return jnp.concatenate(arrays) if axis == TOKENS else arrays[0]
        return jnp.concatenate(arrays, axis)

    return jax.tree.map(join, *segments)


@functools.partial(jax.jit, keep_unused=True)
def wait_for(arrays: tuple[Array, ...]) -> Array:
    """Nothing, once these arrays are there: copies issued behind this call begin when the device is past it."""
    return jnp.zeros(0)
