"""Engines, cache and prefill: every way to hold the cache gives the same logits, within the memory it promises."""

import collections
import dataclasses
import gc
import sys
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from helpers import CONFIGS, GQA, LLAMA, OPT, assert_close, greedy, random_model, random_prompts
from kvpr_jax import compiling, costs, engines, memory, runtime, steps
from kvpr_jax import plan as plans
from kvpr_jax.models import llama, opt
from kvpr_jax.plan import Request
from kvpr_jax.runtime import Decoder
from kvpr_jax.segments import Activations, KeysValues

LENGTHS = (13, 7, 1)  # ragged: padded on the left
NEW = 12


def whole_text_logits(model, prompt, tokens):
    """Logits before each of `tokens` from one pass over the whole text, without any cache."""
    text = jnp.asarray([[*prompt, *tokens]])
    return np.asarray(jax.jit(lambda m, t: m(t))(model, text))[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("split", ["0", "1", "6", "13"])
@pytest.mark.parametrize("recompute", ["project", "absorb"])
def test_logits_equal_a_pass_without_cache(name, split, recompute):
    model = random_model(CONFIGS[name])
    prompts = random_prompts(LENGTHS, model.config.vocab_size)
    request = Request(split=split, recompute=recompute, tail_tokens=5)
    tokens, logits, cache, plan = greedy(Decoder(model), prompts, NEW, request)
    assert plan.split == int(split) and cache.tokens()["tail"] == 1 and len(cache.groups[0]) >= 2
    for row, prompt in enumerate(prompts):
        assert_close(logits[:, row], whole_text_logits(model, prompt, tokens[row]))


@pytest.mark.parametrize("change", [
    {"engine": "sequential"},
    {"prefill_tokens": 4},  # one sequence at a time, 4 queries at a time
    {"prefill_tokens": 26},  # chunks of 2 sequences and 1
    {"split": "auto", "offload": "none"},
    {"split": "auto", "offload": "all"},
    {"split": "auto", "offload": "auto", "device_cache_gib": 2e-4},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("config", [OPT, LLAMA], ids=["opt", "llama"])
def test_how_it_is_carried_out_does_not_change_the_tokens(config, change):
    decoder = Decoder(random_model(config))
    prompts = random_prompts(LENGTHS, config.vocab_size)
    reference, logits, _, _ = greedy(decoder, prompts, NEW, Request(split="6", tail_tokens=5))
    tokens, changed, _, _ = greedy(decoder, prompts, NEW, Request(**({"split": "6", "tail_tokens": 5} | change)))
    np.testing.assert_array_equal(tokens, reference)
    assert_close(changed, logits)


@pytest.mark.parametrize("config", [OPT, LLAMA], ids=["opt", "llama"])
def test_what_stays_on_the_device_is_decoded_in_groups(config, monkeypatch):
    monkeypatch.setattr(costs, "GROUP", 8)
    model = random_model(config)
    prompts = random_prompts(LENGTHS, config.vocab_size)
    request = Request(offload="none", prefill_tokens=26)  # chunks of 2 sequences and 1
    tokens, logits, cache, plan = greedy(Decoder(model), prompts, NEW, request)
    assert plan.group == 3 and len(cache.groups) == 1 and cache.tokens()["resident"] == max(LENGTHS)
    for row, prompt in enumerate(prompts):
        assert_close(logits[:, row], whole_text_logits(model, prompt, tokens[row]))


def test_residency_keeps_the_end_of_the_prompt_on_the_device():
    decoder = Decoder(random_model(OPT))
    prompts = random_prompts((13, 13), OPT.vocab_size)
    token_gib = 2 * OPT.kv_width * 4 * OPT.num_layers / memory.GIB
    request = Request(device_cache_gib=(11 + 0.5) * token_gib, tail_tokens=2)
    _, _, cache, plan = greedy(decoder, prompts, 4, request)
    assert plan.resident_tokens == 11 - 2 * 2 and plan.offloaded  # the budget holds a tail that leaves and the next one
    assert cache.tokens()["resident"] == 7
    assert cache.tokens()["activations"] + cache.tokens()["keys_values"] == 6 + 2


@pytest.mark.parametrize("config, group", [(OPT, 8), (GQA, 1)], ids=["opt", "gqa"])
def test_a_growing_cache_fills_the_device_and_spills_the_rest(config, group, monkeypatch):
    """Resident tails are merged like those on the host; nothing crosses before the first one leaves."""
    monkeypatch.setattr(costs, "GROUP", group)
    model = random_model(config)
    prompts = random_prompts((7, 4), config.vocab_size)
    token_gib = 2 * config.kv_width * 4 * config.num_layers / memory.GIB
    request = Request(device_cache_gib=(7 + 5 * 2 + 2 * 2 + 0.5) * token_gib, tail_tokens=2)
    step, moved = Decoder.step, []

    def counting(decoder, cache, tokens):
        logits = step(decoder, cache, tokens)
        moved.append(cache.bytes_per_step)
        return logits

    monkeypatch.setattr(Decoder, "step", counting)
    tokens, logits, cache, plan = greedy(Decoder(model), prompts, 21, request)
    assert (plan.resident_tokens, plan.resident_flushes, plan.flushes) == (7, 5, 9)
    held = cache.tokens()
    assert held["resident"] == 7 + 5 * 2 and held["tail"] == 2
    assert held["activations"] + held["keys_values"] == 4 * 2
    assert (held["activations"], held["keys_values"]) == (plan.at_the_end().activations, plan.at_the_end().keys_values)
    assert plan.host_bytes == cache.bytes_per_step
    on_device, on_host = ([s.tokens for s in cache.groups[0] if memory.on_host(s) == host] for host in (False, True))
    assert on_device == [7, 2 * 4, 2] and on_host == [2 * 4]
    # Nine steps up to the fifth flush and two in the sixth tail read nothing; then 2, 4, 6 and 8 tokens cross.
    numbers = config.activation_width if held["activations"] else config.kv_width
    assert sum(moved) == 2 * numbers * 4 * config.num_layers * (2 * 2 + 2 * 4 + 2 * 6 + 2 * 8)
    assert cache.recompiled == 0  # neither merged residents nor the passage to another engine
    for row, prompt in enumerate(prompts):
        assert_close(logits[:, row], whole_text_logits(model, prompt, tokens[row]))


def test_a_failure_to_compile_ahead_is_told(monkeypatch):
    monkeypatch.setattr(Decoder, "_prepare", lambda self, cache, h: 1 / 0)
    decoder = Decoder(random_model(OPT))
    with pytest.warns(UserWarning, match="could not be compiled ahead: ZeroDivisionError"):
        greedy(decoder, random_prompts((13,), OPT.vocab_size), 10, Request(split="6", tail_tokens=8))


def test_host_segments_are_in_pinned_host_memory_and_counted():
    prompts = random_prompts((10, 10), OPT.vocab_size)
    _, _, cache, plan = greedy(Decoder(random_model(OPT)), prompts, 3, Request(split="4", tail_tokens=5))
    for activations, keys_values in cache.groups:
        assert activations.x.shape == (1, 2, 4, 44) and activations.x.sharding.memory_kind == "pinned_host"
        assert keys_values.keys.shape == (1, 2, 6, 4, 11) and keys_values.values.sharding.memory_kind == "pinned_host"
    expected = 3 * 2 * (4 * 44 + 6 * 2 * 44) * 4
    assert cache.bytes_per_step == plan.host_bytes_per_step == expected


@pytest.mark.parametrize("split, group, merge_bytes, tokens", [
    ("0", 8, 2**25, 8), ("5", 1, 2**25, 8), ("5", 8, 3 * 2 * 2 * 44 * 4, 5)
])  # fmt: skip
def test_no_array_of_the_run_is_larger_than_what_is_reserved_for(split, group, merge_bytes, tokens, monkeypatch):
    """Four tails of 2 tokens become one segment of 8, unless a group's tail is large enough."""
    monkeypatch.setattr(costs, "GROUP", group)
    monkeypatch.setattr(plans, "MERGE_BYTES", merge_bytes)
    prompts = random_prompts((5, 5), OPT.vocab_size)
    _, _, cache, plan = greedy(Decoder(random_model(OPT)), prompts, 10, Request(split=split, tail_tokens=2))
    largest = max((segment for segment in cache.groups[0]), key=lambda segment: segment.tokens)
    assert largest.tokens == tokens and plan.group == min(group, OPT.num_layers)
    assert {array.nbytes for array in largest.arrays.values()} == {plan.largest_array_bytes}
    assert plan.host_bytes == cache.bytes_per_step


def test_logits_are_compiled_once_and_before_the_cache_takes_its_memory(monkeypatch):
    """For prefill's chunks and the steps."""
    decoder, prompts = Decoder(random_model(OPT)), random_prompts((5, 5, 5), OPT.vocab_size)
    plan, prefill_layer, compiled = decoder.plan(prompts, 3, Request(prefill_tokens=10)), steps.prefill_layer, []

    def run():
        compiled.append(compiling.compiled_here())
        cache, logits = decoder.prefill(prompts, plan)
        compiled.append(compiling.compiled_here())
        decoder.step(cache, logits.argmax(-1))
        compiled.append(compiling.compiled_here())

    def layer(*arguments, **options):
        compiled.append(compiling.compiled_here())
        return prefill_layer(*arguments, **options)

    run()
    compiled.clear()
    steps.logits.clear_cache()
    monkeypatch.setattr(steps, "prefill_layer", layer)
    run()
    assert plan.prefill_sequences == 2
    assert [count - compiled[0] for count in compiled] == [0] + [1] * (2 * OPT.num_layers + 2)


class Link:
    """Segments whose copies are never done until somebody waits for a group behind them."""

    def __init__(self, groups):
        self.groups, self.issued, self.held, self.most, self.calls = groups, 0, [], 0, []

    def fetch(self, group):
        assert group == self.issued % self.groups
        self.issued += 1
        self.held.append(self.issued)
        self.most = max(self.most, len(self.held))
        return (Activations(jnp.full((1, 1, 1, 1), float(self.issued)), jnp.zeros(1, jnp.int32)),)

    def compute(self, group, h, segments):
        number = int(segments[0].x.item())
        assert number % self.groups == (group + 1) % self.groups
        self.calls.append(group)
        return Output(self, number)


class Output:
    def __init__(self, link, segment):
        self.link, self.segment = link, segment

    def block_until_ready(self):  # a group that is done frees its segment, and those of the groups before it
        while self.link.held and self.link.held[0] <= self.segment:
            self.link.held.pop(0)


@pytest.mark.parametrize("groups", [1, 2, 4, 5])
@pytest.mark.parametrize("flush_every", [1, 2, 100])
@pytest.mark.parametrize("window", [3, 4, 9])
def test_the_window_holds_over_the_ends_of_steps(flush_every, groups, window):
    link, engine = Link(groups), engines.Overlapped(window, [True])
    step_unchecked = engines.Overlapped.step.__wrapped__  # without the check that hidden states are arrays
    for step in range(6):
        step_unchecked(engine, groups, link, link.compute, None, (step + 1) % flush_every != 0)
    ahead = min(groups, max(2, window // 2)) * (flush_every == 100)
    assert link.issued == groups * 6 + ahead
    assert max(engines.WINDOW, min(window, groups)) <= link.most <= window
    assert link.calls == 6 * [*range(groups)]


@pytest.mark.parametrize("window, waits", [(3, True), (5, True), (6, False)])
@pytest.mark.parametrize("tokens, first", [(1, ["x", "keys"]), (9, ["keys", "values"])])
def test_no_copies_overtake_those_of_the_group_before(tokens, first, window, waits, monkeypatch):
    """Where two groups arrive, copies are issued behind a call that waits for all arrays of the group before but the
    largest of those that cross; and that behind the compute which they may not run beside."""

    def segments_of(group):
        kv, stays = jnp.ones((1, 1, 2, 1, 4)), jnp.ones((1, 1, 99, 1, 4))
        held = Activations(jnp.ones((1, 1, tokens, 4)), jnp.arange(tokens)), KeysValues(kv, kv + 1, jnp.arange(2))
        return *held, KeysValues(stays, stays + 1, jnp.arange(99))

    groups, happened = [*map(segments_of, range(4))], []
    names = {id(segment.arrays[name]): (group, name) for group in range(4) for segment in groups[group]
             for name in segment.arrays}  # fmt: skip

    class Source:
        def fetch(self, group):
            happened.append(("copies", group))
            return groups[group]

    def compute(group, h, segments):
        happened.append(("compute", group))
        return h

    monkeypatch.setattr(steps, "wait_for", lambda arrays: happened.append(("wait", {names[id(a)] for a in arrays})))
    engine = engines.Overlapped(window, [True, True, False])
    engine.step(4, Source(), compute, jnp.zeros((1, 1, 1)), more=True)

    def behind(group):
        return [("wait", {(group, name) for name in first}), ("copies", (group + 1) % 4)]

    if waits:
        expected = [("copies", 0), *behind(0)]
        for group in range(4):
            expected += [("compute", group), *behind((group + 1) % 4)]
        assert happened == expected
    else:
        assert "wait" not in dict(happened)


def test_the_device_waits_for_arrays_that_nothing_is_computed_from():
    arrays = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 2, 1, 4))
    assert len(jax.tree.leaves(steps.wait_for.lower(arrays).compile().input_shardings)) == 2


@pytest.mark.parametrize("split", ["0", "6", "13"])
def test_copies_in_turn_give_the_same_logits_and_compile_nothing_in_a_step(split, monkeypatch):
    """Over flushes, which change the arrays that are waited for."""
    monkeypatch.setattr(costs, "GROUP", 1)
    decoder, prompts = Decoder(random_model(OPT)), random_prompts(LENGTHS, OPT.vocab_size)
    tokens, expected, cache, _ = greedy(decoder, prompts, NEW, Request(split=split, tail_tokens=3))
    assert cache.engine.arriving > 2  # groups are small
    monkeypatch.setattr(engines, "WINDOW_BYTES", 0)
    steps.wait_for.clear_cache()
    in_turn, logits, cache, _ = greedy(decoder, prompts, NEW, Request(split=split, tail_tokens=3))
    np.testing.assert_array_equal(in_turn, tokens)
    assert_close(logits, expected)
    assert cache.flushes == 3 and cache.engine.arriving == 2 and cache.recompiled == 0
    assert steps.wait_for._cache_size() > 0


@pytest.mark.parametrize("mib, window", [(0, 8), (4, 8), (64, 6), (100, 3), (128, 3), (512, 3)])
def test_small_groups_get_a_wider_window(mib, window):
    slots, held = jax.ShapeDtypeStruct((1,), jnp.int32), [(1, 1, 1, mib * 2**19), (1, 1, 1, 2**30)]
    segments = [Activations(jax.ShapeDtypeStruct(shape, jnp.bfloat16), slots) for shape in held]
    there = tuple(memory.described(of, host=host) for of, host in zip(segments, [True, False], strict=True))
    engine = engines.engine_for("overlapped", there)
    assert (type(engine), engine.window, engine.crossing) == (engines.Overlapped, window, [True, False])
    assert type(engines.engine_for("sequential", there)) is engines.Sequential


def test_the_most_that_a_window_takes_holds_for_all_smaller_groups_too():
    mib, most = 2**20, 0
    for nbytes in range(mib // 4, 300 * mib, mib // 4):
        most = max(most, engines.window(nbytes) * nbytes)
        assert most <= engines.window_bytes(nbytes) <= max(engines.WINDOW_BYTES, engines.WINDOW * nbytes)


def test_a_cache_that_is_dropped_is_freed_at_once():
    """Gigabytes of pinned memory cannot wait for the garbage collector."""
    decoder = Decoder(random_model(OPT))
    prompts = random_prompts((17, 17), OPT.vocab_size)
    cache, logits = decoder.prefill(prompts, decoder.plan(prompts, 4, Request(split="17")))
    decoder.step(cache, logits.argmax(-1).astype(jnp.int32))
    gc.disable()
    try:
        alive = weakref.ref(cache)
        del cache
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("engine, most", [("overlapped", engines.WINDOW), ("sequential", 1)])
def test_engine_holds_no_more_than_its_window_on_the_device(engine, most, monkeypatch):
    """Counts live device arrays of the shape of a host segment at every compute of a step."""
    layers = 7
    monkeypatch.setattr(engines, "WINDOW_BYTES", 0)
    config = OPT.__class__(**(vars(OPT) | {"num_layers": layers}))
    decoder = Decoder(random_model(config))
    prompts = random_prompts((17, 17), config.vocab_size)
    cache, logits = decoder.prefill(prompts, decoder.plan(prompts, 4, Request(split="17", engine=engine)))
    held: list[int] = []
    compute = decoder.shared("project")

    def counting(*args):
        alive = [a for a in jax.live_arrays() if a.shape == (1, 2, 17, 44) and a.sharding.memory_kind == memory.DEVICE]
        held.append(len(alive))
        return compute(*args)

    monkeypatch.setattr(decoder, "shared", lambda recompute: counting)
    for _ in range(2):
        logits = decoder.step(cache, logits.argmax(-1).astype(jnp.int32))
    assert len(held) == 2 * layers
    assert max(held) == most


def test_prefill_keeps_no_more_than_its_window_on_the_device(monkeypatch):
    layers = 7
    config = OPT.__class__(**(vars(OPT) | {"num_layers": layers}))
    decoder = Decoder(random_model(config))
    prompts = random_prompts((17, 17), config.vocab_size)
    plan = decoder.plan(prompts, 4, Request(split="17"))
    waiting: list[int] = []
    layer, block = steps.prefill_layer, jax.block_until_ready
    unfinished: collections.deque = collections.deque()

    def counting(*args, **kwargs):
        waiting.append(len(unfinished))
        unfinished.append(None)
        return layer(*args, **kwargs)

    def finishing(tree):
        unfinished.popleft()
        return block(tree)

    monkeypatch.setattr(steps, "prefill_layer", counting)
    monkeypatch.setattr(runtime.jax, "block_until_ready", finishing)
    decoder.prefill(prompts, plan)
    assert len(waiting) == layers and max(waiting) == engines.WINDOW - 1


@pytest.mark.parametrize(
    "config", [OPT, LLAMA, dataclasses.replace(OPT, norm_affine=False, bias=False)], ids=["opt", "llama", "no vectors"]
)
def test_a_module_is_split_into_few_arrays_and_put_together_again(config):
    layer = random_model(config).layers[0]
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), nnx.state(layer))
    nnx.update(layer, drawn)  # no two vectors are alike
    definition, params = steps.split_module(layer)
    assert [leaf.ndim for leaf in jax.tree.leaves(params)] == [2] * len(jax.tree.leaves(params["others"])) + [1]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(definition.module(params)), drawn)


def test_alike_modules_have_one_definition():
    model = random_model(OPT)
    (first, _), (second, _), (embedder, _) = map(steps.split_module, (*model.layers[:2], model.embedder))
    assert first == second and hash(first) == hash(second) and first != embedder


@pytest.mark.parametrize("config, module", [(OPT, opt), (LLAMA, llama)], ids=["opt", "llama"])
def test_a_decode_layers_is_traced_once_per_shape(config, module, monkeypatch):
    """Not once per layer, per token, per prompt content or per temperature."""
    jax.clear_caches()
    traces: list[str] = []

    def counted(name):
        method = getattr(module.DecoderLayer, name)

        def counting(*args, **kwargs):
            traces.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(module.DecoderLayer, name, counting)

    counted("__call__")
    counted("step")
    decoder = Decoder(random_model(config))
    for seed in (0, 1):
        prompts = random_prompts((13, 7), config.vocab_size, seed)
        greedy(decoder, prompts, 6, Request(split="6", tail_tokens=10, recompute="absorb"))
    assert traces == ["__call__", "step"]
    assert steps.decode_layers._cache_size() == 1 and steps.prefill_layer._cache_size() == 1
    greedy(decoder, prompts, 6, Request(split="5", tail_tokens=10, recompute="absorb"))
    assert traces == ["__call__", "step"] * 2


@pytest.mark.parametrize("split, group", [("0", 8), ("6", 1), ("6", 8), ("13", 1)])
def test_only_the_first_step_compiles(split, group, monkeypatch, caplog):
    """What a flush makes necessary, merging included, is compiled in another thread before."""
    monkeypatch.setattr(costs, "GROUP", group)
    decoder = Decoder(random_model(OPT))
    prompts = random_prompts((13, 7), OPT.vocab_size)
    plan = decoder.plan(prompts, 50, Request(split=split, tail_tokens=8))
    cache, logits = decoder.prefill(prompts, plan)
    compiled = []
    assert cache.recompiled == 0
    for _ in range(49):
        caplog.clear()
        with jax.log_compiles():  # of this thread
            logits = decoder.step(cache, logits.argmax(-1).astype(jnp.int32))
        text = caplog.text
        compiled.append("Compiling jit(decode_layers)" in text or "Compiling jit(concatenate)" in text)
        if cache.preparing is not None:
            cache.preparing.result()  # as there is time for in a step that takes long
    assert cache.flushes == plan.flushes == 6
    assert compiled == [True] + [False] * 48
    assert cache.recompiled == 0 and cache.longest_wait_s < 0.05


@pytest.fixture
def kept_on_disk(tmp_path):
    """JAX keeps compiled functions in this directory."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]

    def keep(*values):
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    jax.clear_caches()
    keep(str(tmp_path), 0.0)
    yield tmp_path
    keep(*before)


@pytest.mark.parametrize("most, own", [(3, True), (2, False)])
def test_few_groups_have_a_function_each(most, own, monkeypatch):
    """As on a GPU, where each has a graph: behind flushes and a merge as well, and the same ones in a later run."""
    prompts, request = random_prompts((13, 7), OPT.vocab_size), Request(split="6", tail_tokens=2)
    expected, logits, _, _ = greedy(Decoder(random_model(OPT)), prompts, NEW, request)
    monkeypatch.setattr(compiling, "uses_graphs", lambda: True)
    monkeypatch.setattr(runtime, "OWN_FUNCTIONS", most)
    decoder, called, compute = Decoder(random_model(OPT)), [], Decoder.compute

    def seeing(self, tails, place, functions):
        def seen(function):
            return lambda params, *of: called.append((function, id(params[0]))) or function(params, *of)

        return compute(self, tails, place, [*map(seen, functions)])

    monkeypatch.setattr(Decoder, "compute", seeing)
    tokens, again, cache, _ = greedy(decoder, prompts, NEW, request)
    np.testing.assert_array_equal(tokens, expected)
    assert_close(again, logits)
    assert (cache.flushes, cache.recompiled) == (5, 0)
    steps_calls = [called[step : step + 3] for step in range(0, len(called), 3)]
    assert [len({function for function, _ in calls}) for calls in steps_calls] == [3 if own else 1] * (NEW - 1)
    weights = {function: {of for by, of in called if by is function} for function, _ in called}
    assert {len(of) for of in weights.values()} == {1 if own else 3}
    first = called.copy()
    called.clear()
    greedy(decoder, prompts, NEW, request)
    assert called == first


def test_functions_of_a_few_shapes_are_kept(monkeypatch):
    monkeypatch.setattr(runtime, "SHAPES", 2)
    decoder = Decoder(random_model(OPT))
    for split in ("0", "3", "6", "9"):
        greedy(decoder, random_prompts((13, 7), OPT.vocab_size), 3, Request(split=split))
        assert len(decoder._functions_of) <= 2


def test_groups_read_their_functions_from_disk(kept_on_disk, monkeypatch):
    """Where the first one has come from there it cannot be stored again."""
    monkeypatch.setattr(compiling, "uses_graphs", lambda: True)
    prompts, request = random_prompts((13, 7), OPT.vocab_size), Request(split="6")
    monkeypatch.setattr(serialize_executable, "serialize", lambda _: pytest.fail("stored"))
    tokens = []
    for _ in range(2):
        jax.clear_caches()
        tokens.append(greedy(Decoder(random_model(OPT)), prompts, 3, request)[0])
    np.testing.assert_array_equal(*tokens)
    names = [path.name for path in kept_on_disk.iterdir() if path.name.startswith("jit_decode_layers")]
    assert len([name for name in names if name.endswith("-cache")]) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_without_a_cache_on_disk_one_function_is_compiled_for_all(count):
    lowered = jax.jit(lambda one, other: one + other, donate_argnums=0).lower(*[jnp.zeros(3)] * 2)
    before = compiling.compiled_here()
    functions = compiling.one_each({0: lowered}.__getitem__, count)
    assert len({*functions}) == count and compiling.compiled_here() == before + 1
    for function in functions:
        donated = jnp.arange(3.0)
        np.testing.assert_array_equal(function(donated, jnp.ones(3)), [1, 2, 3])
        assert donated.is_deleted()


def test_what_a_step_compiles_itself_is_counted(monkeypatch):
    """Without the thread: each flush changes the layer step, and the second one brings the first tail of its form."""
    jax.clear_caches()
    monkeypatch.setattr(Decoder, "_prepare", lambda self, cache, h: None)
    decoder = Decoder(random_model(OPT))
    _, _, cache, plan = greedy(decoder, random_prompts((13, 7), OPT.vocab_size), 25, Request(split="6", tail_tokens=8))
    assert plan.flushes == 2 and cache.recompiled == 2 + 1


def test_a_step_that_waits_for_its_compilation_says_so(monkeypatch):
    def slow(decoder, cache, h):
        while not cache.full:
            time.sleep(0.01)
        time.sleep(0.5)

    monkeypatch.setattr(Decoder, "_prepare", slow)
    decoder = Decoder(random_model(OPT))
    _, _, cache, _ = greedy(decoder, random_prompts((13, 7), OPT.vocab_size), 10, Request(split="6", tail_tokens=8))
    assert 0.1 < cache.longest_wait_s < 0.6


def test_the_compiling_thread_gives_way_only_while_it_compiles(monkeypatch):
    monkeypatch.setattr(compiling, "GIVE_WAY_S", 2e-4)
    before, seen = sys.getswitchinterval(), []
    compiling.ahead(lambda *given: seen.append((given, sys.getswitchinterval())), 1, 2).result()
    assert seen == [((1, 2), pytest.approx(2e-4))] and before == sys.getswitchinterval() > 1e-3
    with pytest.raises(ZeroDivisionError):
        compiling.ahead(lambda: 1 / 0).result()
    assert sys.getswitchinterval() == before


def test_a_plan_knows_what_has_been_compiled():
    """All in one process: the second request would rather have another split, but has few steps for it."""
    decoder = Decoder(random_model(OPT))
    prompts = random_prompts((32, 9), OPT.vocab_size)
    auto = Request(offload="all", tail_tokens=8)
    assert decoder.plan(prompts, 3, auto).split == 0
    greedy(decoder, prompts, 3, Request(split="16", tail_tokens=8))
    assert decoder.plan(prompts, 3, auto).split == 16
    assert Decoder(random_model(OPT)).plan(prompts, 3, auto).split == 0


def test_a_run_that_ends_early_compiles_nothing_in_vain(monkeypatch):
    prepared = []

    monkeypatch.setattr(compiling, "ahead", lambda _, cache, h: prepared.append(cache.length))
    decoder = Decoder(random_model(OPT))
    prompts = random_prompts((13,), OPT.vocab_size)
    for new, lengths in ((9, []), (10, [13 + 1]), (25, [13 + 1, 13 + 9])):
        greedy(decoder, prompts, new, Request(split="6", tail_tokens=8))
        assert prepared == lengths
        prepared.clear()


def test_a_forced_split_is_obeyed_where_it_does_not_pay():
    prompts = random_prompts((9,), GQA.vocab_size)
    plan = Decoder(random_model(GQA)).plan(prompts, 4, Request(split="5"))
    assert plan.split == 5 and plan.offloaded
    plan = Decoder(random_model(GQA)).plan(prompts, 4, Request(offload="all"))
    assert plan.split == 0 and "no smaller than keys and values" in plan.reason


def test_step_refuses_what_it_cannot_do():
    decoder = Decoder(random_model(OPT))
    prompts = random_prompts((109,), OPT.vocab_size)
    cache, logits = decoder.prefill(prompts, decoder.plan(prompts, 4, Request(offload="all")))
    with pytest.raises(ValueError, match=r"shape \(2,\).*each of the 1 sequences"):
        decoder.step(cache, jnp.zeros(2, jnp.int32))
    for _ in range(4):
        logits = decoder.step(cache, logits.argmax(-1).astype(jnp.int32))
    with pytest.raises(ValueError, match="113 tokens, all the positions"):
        decoder.step(cache, logits.argmax(-1).astype(jnp.int32))


@pytest.mark.parametrize("prompts, new, message", [
    ([], 4, "no prompts"),
    ([[3], []], 4, "prompt 2 of 2 is empty"),
    ([[3, 89]], 4, "outside the vocabulary 0..88"),
    ([[3]], 0, "max-new-tokens 0"),
    ([[3] * 110], 4, "110 prompt tokens and 4 new tokens are more than the model's 113 positions"),
])  # fmt: skip
def test_workloads_that_cannot_run_are_named(prompts, new, message):
    with pytest.raises(ValueError, match=message):
        Decoder(random_model(OPT)).plan(prompts, new)
