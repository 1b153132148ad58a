"""The cache alone, without a model: which form new tokens take, and how segments are flushed and merged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import OPT, profile
from kvpr_jax import memory, scheduler
from kvpr_jax.cache import MERGE, Cache
from kvpr_jax.segments import Activations, KeysValues

PROMPT, TAIL, BATCH = 8, 2, 3
CONFIG = dataclasses.replace(OPT, num_layers=2)


def new_cache(split: int, offload: str = "all") -> Cache:
    """The cache after a prompt of `PROMPT` tokens; every number in it is its token's slot."""
    request = scheduler.Request(split=str(split) if offload == "all" else "auto", offload=offload, tail_tokens=TAIL)
    workload = scheduler.Workload(BATCH, PROMPT, 1000)
    plan = scheduler.make_plan(CONFIG, jnp.dtype("float32"), workload, request, profile(), 2**34, 2**34)
    plan = dataclasses.replace(plan, tail_tokens=TAIL)
    slots = jnp.arange(PROMPT)
    held = [filled(Activations, slots[:split])] if split else []
    held += [filled(KeysValues, slots[split:])] if split < PROMPT else []
    place = memory.to_host if plan.offloaded else memory.placed
    layers = [tuple(place(segment) for segment in held) for _ in range(CONFIG.num_layers)]
    return Cache(CONFIG, jnp.dtype("float32"), plan, layers, PROMPT, None)


def filled(form, slots):
    values = slots.astype(jnp.float32)[None, :, None, None]
    if form is Activations:
        return Activations(jnp.broadcast_to(values[..., 0], (BATCH, len(slots), 44)), slots)
    kv = jnp.broadcast_to(values, (BATCH, len(slots), 4, 11))
    return KeysValues(kv, -kv, slots)


def grow(cache: Cache, tails: int) -> None:
    """Fill and flush so many tails."""
    for _ in range(tails):
        slots = jnp.arange(cache.length, cache.length + TAIL)
        cache.tails = [filled(type(tail), slots) for tail in cache.tails]
        cache.length += TAIL
        assert cache.full
        cache.flush()
        assert not cache.full


@pytest.mark.parametrize("split, form", [(0, KeysValues), (PROMPT, Activations)])
def test_a_pure_split_stays_pure(split, form):
    cache = new_cache(split)
    grow(cache, 11)
    assert all(isinstance(segment, form) for layer in cache.layers for segment in (*layer, *cache.tails))


@pytest.mark.parametrize("split", [1, 2, 4, 6, 7])
def test_new_tokens_keep_the_share_of_the_split(split):
    cache = new_cache(split)
    for _ in range(40):
        grow(cache, 1)
        held = cache.tokens()
        total = held["activations"] + held["keys_values"]
        assert total == cache.length
        assert abs(held["activations"] - total * split / PROMPT) <= TAIL


@pytest.mark.parametrize("split", [0, 3, PROMPT])
def test_segments_grow_with_the_logarithm_of_the_tokens_and_lose_none(split):
    cache = new_cache(split)
    for tails in range(1, 70):
        grow(cache, 1)
        for form in (Activations, KeysValues):
            sizes = [segment.tokens for segment in cache.layers[0] if isinstance(segment, form)]
            assert max((sizes.count(size) for size in sizes), default=0) < MERGE, (tails, sizes)
    assert len(cache.layers[0]) <= 2 * (1 + 3 * 4)
    for layer in cache.layers:
        slots = np.concatenate([np.asarray(segment.slots) for segment in layer])
        np.testing.assert_array_equal(np.sort(slots), np.arange(PROMPT + 69 * TAIL))
        for segment in layer:  # the numbers moved with their slots
            assert memory.on_host(segment)
            first = segment.x[..., 0] if isinstance(segment, Activations) else segment.keys[..., 0, 0]
            np.testing.assert_array_equal(first, np.broadcast_to(np.asarray(segment.slots), first.shape))


def test_bytes_are_those_of_the_segments_on_the_host():
    cache = new_cache(3)
    expected = CONFIG.num_layers * BATCH * (3 * 44 + 5 * 88) * 4
    assert cache.bytes_per_step == expected
    for layer in range(CONFIG.num_layers):
        fetched = cache.fetch(layer)
        assert not any(memory.on_host(segment) for segment in fetched)
        for there, here in zip(cache.layers[layer], fetched, strict=True):
            for host, device in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
                np.testing.assert_array_equal(host, device)


def test_a_cache_that_is_not_offloaded_stays_on_the_device():
    cache = new_cache(0, offload="none")
    grow(cache, MERGE + 1)
    assert not any(memory.on_host(segment) for layer in cache.layers for segment in layer)
    cache.fetch(0)
    assert cache.bytes_per_step == 0
