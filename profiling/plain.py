"""Decoding in plain JAX with all of the cache on the device: what kvpr_jax stands beside where nothing is offloaded.

One jitted function for the whole step, over keys and values in static arrays, (B, S_max, K, d) a layer, that it writes
in place. Of kvpr_jax it has the model's modules and the prefill of equally long prompts; neither segments nor engines.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvpr_jax import memory
from kvpr_jax.models.attention import Attention, linear_biases, visible
from kvpr_jax.plan import Plan
from kvpr_jax.runtime import Decoder
from kvpr_jax.segments import Place, of_layer
from kvpr_jax.steps import Definition, Params

KeysAndValues = tuple[Float[Array, "B T K d"], Float[Array, "B T K d"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """Keys and values of every layer, with room for all new tokens, and (1,) the slot of the next token."""

    layers: list[KeysAndValues]
    slots: Int[Array, " 1"]


def prefill(decoder: Decoder, prompts: Sequence[Sequence[int]], plan: Plan) -> tuple[Cache, Float[Array, "B V"]]:
    """Equally long prompts in a new cache, by kvpr_jax's prefill; and the logits behind them.

    Args:
        plan: with all of the cache on the device; its tail is the room for new tokens.
    """
    held, logits = decoder.prefill(prompts, plan)
    layers, room = [], [(0, 0), (0, plan.tail_tokens), (0, 0), (0, 0)]
    for index in range(len(held.groups)):
        (group,) = held.groups[index]
        for layer in range(plan.group):
            segment = of_layer(group, layer)
            layers.append((jnp.pad(segment.keys, room), jnp.pad(segment.values, room)))
        held.groups[index] = ()  # so that no more than one group is there twice
    return memory.placed(Cache(layers, jnp.array([held.length], jnp.int32))), logits


def step(decoder: Decoder, cache: Cache, tokens: Int[Array, " B"]) -> Float[Array, "B V"]:
    """Append one token to each sequence and return the logits after it."""
    definitions = decoder.embedder[0], decoder.layer
    params = decoder.embedder[1], tuple(decoder.params)
    logits, after = _step(definitions, params, Cache(cache.layers, cache.slots), tokens)
    cache.layers, cache.slots = after.layers, after.slots
    return logits


@functools.partial(jax.jit, static_argnames=("definitions",), donate_argnames=("cache",))
def _step(
    definitions: tuple[Definition, Definition],
    params: tuple[Params, tuple[Params, ...]],
    cache: Cache,
    tokens: Int[Array, " B"],
) -> tuple[Float[Array, "B V"], Cache]:
    """The whole step; of definitions and parameters, the embedder's come first, then the layers'."""
    embedder, place, written = definitions[0].module(params[0]), Place(cache.slots, None), []
    full = jax.tree.leaves(params)[0].dtype == jnp.float32  # means float32, no TF32
    with jax.default_matmul_precision("highest" if full else "default"):
        h = embedder.encode(tokens[:, None], place)
        for of_layer, (keys, values) in zip(params[1], cache.layers, strict=True):
            layer = definitions[1].module(of_layer)
            x = layer.read(h)
            own = layer.attention.remember(x, place)
            keys = jax.lax.dynamic_update_slice_in_dim(keys, own.keys, cache.slots[0], axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, own.values, cache.slots[0], axis=1)
            h = layer.write(h, x, _attended(layer.attention, x, keys, values, place))
            written.append((keys, values))
        return embedder.decode(h)[:, 0], Cache(written, cache.slots + 1)


def _attended(
    attention: Attention,
    x: Float[Array, "B 1 D"],
    keys: Float[Array, "B T K d"],
    values: Float[Array, "B T K d"],
    place: Place,
) -> Float[Array, "B 1 D"]:
    """Attention of one token over all slots up to its own."""
    slots = jnp.arange(keys.shape[1], dtype=jnp.int32)
    q = attention.queries(x, place.positions(place.slots))
    out = jax.nn.dot_product_attention(
        q.reshape(*q.shape[:2], -1, q.shape[-1]),
        keys,
        values,
        bias=None if attention.slopes is None else linear_biases(attention.slopes, place.slots, slots)[None],
        mask=visible(place.slots, slots, None, attention.window)[:, None],
        scale=1.0,
    )
    return attention.o(out.reshape(*x.shape[:2], -1))
