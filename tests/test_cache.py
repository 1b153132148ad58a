"""The cache alone, without a model: which form new tokens take, and how segments are flushed and merged."""

import dataclasses
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import OPT, profile
from kvpr_jax import memory, scheduler
from kvpr_jax import plan as plans
from kvpr_jax.cache import Cache
from kvpr_jax.costs import Held
from kvpr_jax.pace import STEPS
from kvpr_jax.plan import MERGE, Request, Workload
from kvpr_jax.profiling.profile import Profile
from kvpr_jax.segments import Activations, KeysValues

PROMPT, TAIL, BATCH = 8, 2, 3
CONFIG = dataclasses.replace(OPT, num_layers=2)


def new_cache(split: int | None, offload: str = "all", machine: Profile = profile()) -> Cache:
    """The cache after a prompt of `PROMPT` tokens, with this split or the plan's own; every number in it is its
    token's slot."""
    forced = "auto" if split is None or offload != "all" else str(split)
    request = Request(split=forced, offload=offload, tail_tokens=TAIL, recompute="project")
    workload = Workload(BATCH, PROMPT, 1000)
    plan = scheduler.make_plan(CONFIG, jnp.dtype("float32"), workload, request, machine, 2**34, 2**34)
    plan = dataclasses.replace(plan, tail_tokens=TAIL)
    slots, split = jnp.arange(PROMPT), plan.split
    held = [filled(Activations, slots[:split])] if split else []
    held += [filled(KeysValues, slots[split:])] if split < PROMPT else []
    place = memory.to_host if plan.offloaded else memory.placed
    groups = [tuple(place(segment) for segment in held) for _ in range(CONFIG.num_layers)]
    return Cache(CONFIG, jnp.dtype("float32"), plan, groups, PROMPT, None)


def filled(form, slots):
    values = slots.astype(jnp.float32)[None, None, :, None, None]
    if form is Activations:
        return Activations(jnp.broadcast_to(values[..., 0], (1, BATCH, len(slots), 44)), slots)
    kv = jnp.broadcast_to(values, (1, BATCH, len(slots), 4, 11))
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
    assert all(isinstance(segment, form) for group in cache.groups for segment in (*group, *cache.tails))


@pytest.mark.parametrize("split", [1, 2, 4, 6, 7])
def test_new_tokens_keep_the_share_of_the_split(split):
    cache = new_cache(split)
    for _ in range(40):
        grow(cache, 1)
        held = cache.tokens()
        total = held["activations"] + held["keys_values"]
        assert total == cache.length
        assert abs(held["activations"] - total * split / PROMPT) <= TAIL


@pytest.mark.parametrize("split", [0, PROMPT])
def test_large_segments_are_not_merged(split, monkeypatch):
    """Four tails become one, four of which would: they have the limit's bytes just now."""
    cache = new_cache(split)
    numbers = cache.config.activation_width if split else cache.config.kv_width
    monkeypatch.setattr(plans, "MERGE_BYTES", BATCH * MERGE * TAIL * numbers * 4)
    grow(cache, 4 * MERGE + 1)
    sizes = [segment.tokens for segment in cache.groups[0]]
    assert sorted(sizes) == sorted([PROMPT, *[MERGE * TAIL] * 4, TAIL])


@pytest.mark.parametrize("split", [0, PROMPT])
def test_what_becomes_one_is_given_up_by_all_groups_before_it_goes_to_the_host(split, monkeypatch):
    """Otherwise it finds no room in the pool of pinned memory between what is left, and the pool doubles."""
    cache, moved = new_cache(split), []
    grow(cache, MERGE - 1)
    before = [weakref.ref(leaf) for group in cache.groups for segment in group[1:] for leaf in jax.tree.leaves(segment)]
    assert len(before) == CONFIG.num_layers * (MERGE - 1) * (2 if split else 3)
    assert not any(ref() is None for ref in before)
    to_host = memory.to_host

    def moving(segment):
        moved.append([ref() is None for ref in before])
        return to_host(segment)

    monkeypatch.setattr(memory, "to_host", moving)
    grow(cache, 1)
    assert len(moved) == CONFIG.num_layers and all(map(all, moved))


@pytest.mark.parametrize("split", [0, 3, PROMPT])
def test_segments_grow_with_the_logarithm_of_the_tokens_and_lose_none(split):
    cache = new_cache(split)
    for tails in range(1, 70):
        grow(cache, 1)
        for form in (Activations, KeysValues):
            sizes = [segment.tokens for segment in cache.groups[0] if isinstance(segment, form)]
            assert max((sizes.count(size) for size in sizes), default=0) < MERGE, (tails, sizes)
    assert len(cache.groups[0]) <= 2 * (1 + 3 * 4)
    for group in cache.groups:
        slots = np.concatenate([np.asarray(segment.slots) for segment in group])
        np.testing.assert_array_equal(np.sort(slots), np.arange(PROMPT + 69 * TAIL))
        for segment in group:  # the numbers moved with their slots
            assert memory.on_host(segment)
            first = segment.x[..., 0] if isinstance(segment, Activations) else segment.keys[..., 0, 0]
            np.testing.assert_array_equal(first, np.broadcast_to(np.asarray(segment.slots), first.shape))


def test_a_step_is_predicted_by_the_segments_there_are():
    """Half of the prompt in each form and flushed tails behind it, the first two of which stay on the device; the third
    and its followers do not, and become one with the fourth of them."""
    cache = new_cache(0)
    cache.plan = dataclasses.replace(cache.plan, resident_flushes=2)
    counts = []
    for _ in range(2 + MERGE + 1):
        grow(cache, 1)
        counts.append(cache._read().segments)
    assert counts == [(0, 1, 1), (0, 1, 2), *[(0, 1 + tails, 2) for tails in range(1, MERGE)], (0, 2, 2), (0, 3, 2)]
    cache = new_cache(PROMPT)
    grow(cache, 2)
    assert cache._read().segments == (3, 0, 0)


def test_a_link_that_stays_slow_is_told_once_and_later_tails_are_smaller():
    """Keys and values at first, since projecting is dear here. Behind the next tail, which may be compiled for already,
    what was measured says otherwise."""
    host = {"head_s": 0.0, "dispatch_s": 0.0, "layer_dispatch_s": 0.0, "segment_dispatch_s": 0.0, "issue_s": 0.0}
    dear = profile(base_s=0.0, keys_values=[(1, 1e-9)], project=[(1, 1e-3)], **host)
    cache = new_cache(None, machine=dear)
    grow(cache, 2)
    assert cache.plan.split == 0 and cache.tokens()["activations"] == 0 and isinstance(cache.tails[0], KeysValues)
    link_s = CONFIG.num_layers * cache.plan.costs.link_s(Held(0, PROMPT + 2 * TAIL, segments=(1, 3, 1)))
    assert cache.predicted_step_s == pytest.approx(link_s)
    slow_s = cache.predicted_step_s + 2 * CONFIG.num_layers
    for _ in range(3 * STEPS):
        cache.observe(slow_s)
    told = cache.miss
    assert f"take {slow_s * 1e3:.2f} ms" in told and "slower than profiled: copies to the device" in told
    grow(cache, 1)
    assert isinstance(cache.tails[0], KeysValues)
    grow(cache, 1)
    assert isinstance(cache.tails[0], Activations)
    assert cache.predicted_step_s > link_s + CONFIG.num_layers  # by what was measured, behind the flush too
    for _ in range(STEPS):
        cache.observe(2 * cache.predicted_step_s)
    assert cache.miss is told


@pytest.mark.parametrize("split", [0, PROMPT])
def test_a_step_is_predicted_with_its_tail_in_its_own_form(split):
    cache = new_cache(split)
    held = Held(split, PROMPT - split, tail=TAIL, tail_is_activations=bool(split))
    assert cache.predicted_step_s == cache.plan.step_s(held) != cache.plan.step_s(Held(split, PROMPT - split))
    assert cache.plan.predicted_step_s == cache.predicted_step_s
    given = cache.plan.costs.profile
    ((_, each_s),) = given.project if split else given.keys_values
    link_s = cache.plan.costs.link_s(held)
    compute_s = given.base_s + (PROMPT + TAIL) * each_s
    assert link_s < compute_s
    assert cache.predicted_step_s == pytest.approx(CONFIG.num_layers * compute_s + given.head_s)


@pytest.mark.parametrize("split, offload", [(0, "all"), (None, "none")])
def test_what_stays_slow_is_told_where_nothing_can_be_revised_too(split, offload):
    cache = new_cache(split, offload)
    plan = cache.plan
    for _ in range(2 * STEPS):
        cache.observe(10 * cache.predicted_step_s)
    assert "slower than profiled: " in cache.miss and "later tokens" not in cache.miss
    grow(cache, 2)
    assert cache.plan is plan


def test_bytes_are_those_of_the_segments_on_the_host(monkeypatch):
    cache, put, calls = new_cache(3), jax.device_put, []
    monkeypatch.setattr(jax, "device_put", lambda *given: calls.append(given) or put(*given))
    expected = CONFIG.num_layers * BATCH * (3 * 44 + 5 * 88) * 4
    assert cache.bytes_per_step == expected
    fetched = cache.fetch(1)
    assert not any(memory.on_host(segment) for segment in fetched)
    for host, device in zip(jax.tree.leaves(cache.groups[1]), jax.tree.leaves(fetched), strict=True):
        np.testing.assert_array_equal(host, device)
    assert len(calls) == 1  # one for all the segments together


def test_a_cache_that_is_not_offloaded_stays_on_the_device():
    cache = new_cache(0, offload="none")
    grow(cache, MERGE + 1)
    assert not any(memory.on_host(segment) for group in cache.groups for segment in group)
    assert [cache.fetch(0), cache.fetch(1)] == cache.groups  # the same objects
    assert cache.bytes_per_step == 0
