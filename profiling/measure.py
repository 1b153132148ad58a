"""Measures this machine's profile for a model and a batch, unless it is stored already."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import Array

from kvpr_jax import memory, steps
from kvpr_jax.config import ModelConfig
from kvpr_jax.models import Model, abstract, nbytes, weights_bytes
from kvpr_jax.models.attention import Recompute
from kvpr_jax.profiling import link, nvidia
from kvpr_jax.profiling.curves import Curve
from kvpr_jax.profiling.profile import FORMS, Profile, machine, path_of, read, write
from kvpr_jax.profiling.timing import added_s, issued_s, trials_s
from kvpr_jax.sampling import Sampling, prompt_keys
from kvpr_jax.segments import Activations, KeysValues, Place, Segment

PROBE_TOKENS, PROBE_TOKENS_ON_CPU = 16384, 512  # over the batch: tokens in the longest segment that is measured
PROBE_FLOPS_ON_CPU = 2**35  # of projecting these, at most
HEAD_NUMBERS_ON_CPU = 2**26  # of the head that is measured, at most: the vocabulary's others take as long each
LONGEST = 4096  # tokens in it, at most
PROBE_TAIL = 16  # slots in the tail of the steps measured, which take the time of another short segment for it
PROBE_SLOT = 2**20  # the first of these, behind any segment
SEVERAL = 2  # layers of a call on a GPU, as they go in groups
BESIDE_SHARE = 16  # copies to the device while layers are computed: one part in so many of its free memory at most
AHEAD_S = 0.01  # so long a GPU is busy before it comes to the calls measured: the host has issued them by then
AHEAD_BYTES = 2**28  # read and written meanwhile, again and again
QUEUED, QUEUED_S = 24, 0.025  # calls behind that, at most
LASTING_S = 0.1  # of calls that compute so much that a GPU lowers its clock: it has done so by then
LONG_S = 0.1  # what takes so long is measured once: a slow machine is done in seconds too
AGAIN_S = 0.5  # and on a CPU as often again as is done in this time
CALLS = 8  # whose issuing is measured, dispatched together as the engine does
BESIDE_S = 0.01  # of calls with copies beside them and without, at least
TURNS = 5  # of those
ENOUGH_S, ENOUGH_ON_CPU_S = 15.0, 8.0  # then no further segments, and in the ways that no plan asks for one size only
# Segments measured, by how many times as few tokens they have as the longest ones. Needed are the longest, and on a GPU
# a shorter one where it tells what any segment takes beside its tokens; the others come in this order. Projecting is no
# line: each length gets the matrix product that suits it, and of few rows reading the weights is what takes time.
SHORTEST = 32
NEEDED = (*((form, 1) for form in FORMS), ("keys_values", SHORTEST), ("absorb", SHORTEST))
FEW, FEW_ROWS = (("project", 8), ("project", SHORTEST)), 512  # needed as well, where the last has fewer rows than that
FURTHER = (("project", 4), ("project", 2), *FEW, ("absorb", 4))

Issue = Callable[[int], Any]  # issues so many calls of a function, and returns what to wait for
Compile = Callable[[], Issue]  # compiles the function by itself, as it is for a decode step on a GPU


def load_or_measure(
    config: ModelConfig, dtype: jnp.dtype, batch: int, progress: Callable[[int, int], None] | None = None
) -> Profile:
    """The stored profile of this machine for this model and batch, measured now if there is none that matches.

    Warns of a profile that cannot be stored, and of a GPU's link that has fallen to a lower width.

    Args:
        progress: as in `measure`; not called where nothing has to be measured.
    """
    key = machine(config, dtype, batch)
    path = path_of(key)
    profile = read(path, key)
    if profile is None:
        profile = measure(config, dtype, batch, progress)
        gc.collect()  # a module refers to itself: the one measured would still be there when a plan asks what is free
        try:
            write(path, profile)
        except OSError as error:
            warnings.warn(f"{str(path)!r} cannot be written, so each run measures anew: {error}", stacklevel=2)
    if fallen := nvidia.fallen():
        warnings.warn(fallen, stacklevel=2)
    return profile


@contextlib.contextmanager
def _compiling_anew() -> Iterator[None]:
    """Within, functions are compiled whatever JAX's cache on disk holds, and are not kept in it."""
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]

    def enable(cache: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", cache)
        compilation_cache.reset_cache()  # JAX looks only once whether there is one

    enable(False)
    try:
        yield
    finally:
        enable(enabled)


@_compiling_anew()
def measure(
    config: ModelConfig, dtype: jnp.dtype, batch: int, progress: Callable[[int, int], None] | None = None
) -> Profile:
    """Measure copies, and layers of the model (with random weights) over segments that are on the device.

    Args:
        progress: called with (things measured or left out, things in all).

    Raises:
        MemoryError: the device has less memory than is measured in.
    """
    begin, compiled_s, measured = time.perf_counter(), dict[Any, float](), dict[Any, float]()
    on_cpu = memory.device_memory_is_host_memory()
    tokens = max(SHORTEST, min(PROBE_TOKENS // batch, LONGEST))
    vocab_size = config.vocab_size
    if on_cpu:
        projected = PROBE_FLOPS_ON_CPU // (2 * config.hidden_size * config.kv_width)
        tokens = max(1, min(PROBE_TOKENS_ON_CPU, projected) // batch)
        vocab_size = min(vocab_size, HEAD_NUMBERS_ON_CPU // config.hidden_size)
    some = dataclasses.replace(config, num_layers=SEVERAL)  # with segments and products to try they take twice that
    several = 1 if on_cpu or 2 * weights_bytes(some, dtype) > memory.free_device_bytes() else SEVERAL
    shares = [(form, times) for form, times in (*NEEDED, *FURTHER) if times <= tokens]
    forms = [(form, tokens // times) for form, times in shares]
    shortest = "keys_values", tokens // (1 if on_cpu else SHORTEST)
    layers = {of: several if of == shortest else 1 for of in forms}  # of a call; of several, to issue it is measured
    lengths = {(FORMS[form][0], count): layers[form, count] for form, count in forms}
    shapes = abstract(dataclasses.replace(config, num_layers=several, vocab_size=vocab_size), dtype)
    _check_memory(shapes, batch, lengths, [*{1, several}, *layers.values()])
    model = _some(shapes)
    segments = _segments(model, batch, lengths)
    segments[shortest].append(jax.tree.map(jnp.copy, segments[shortest][0]))
    functions: dict[Any, Compile] = {("layers", count): _layers(model, batch, layers=count) for count in {1, several}}
    functions |= {"mlp": _mlp(model, batch), "head": _head(model, batch)}
    for form, count in forms:
        held, recompute = FORMS[form]
        functions[form, count] = _layers(model, batch, segments[held, count], recompute, layers[form, count])
    calls, ahead = dict[Any, Issue](), _ahead()
    lasting = {of for of in forms if not on_cpu and of[0] == "project" and batch * of[1] > FEW_ROWS}
    issued = {("layers", 1), ("layers", several), shortest}

    def run(name: Any) -> float:
        compiling = time.perf_counter()
        calls[name] = functions[name]()
        compiled_s[name] = time.perf_counter() - compiling
        run_s = _run_s(calls[name], ahead, warm_up=not on_cpu or name == ("layers", 1))
        return _lasting_s(calls[name], run_s) if name in lasting else run_s

    def dispatch(name: Any) -> float:
        return _dispatch_s(calls[name], measured[name])

    measurements: dict[Any, Callable[[], float]] = {name: functools.partial(run, name) for name in functions}
    measurements |= {("dispatch", name): functools.partial(dispatch, name) for name in issued}
    measurements["issue"] = link.issue_s
    at_least = [*NEEDED, *FEW] if batch * tokens // FEW[-1][1] < FEW_ROWS else NEEDED
    optional = [of for of in shares if of not in at_least or (on_cpu and of[1] > 1)]
    needed = {*measurements} - {(form, tokens // times) for form, times in optional}
    for way in get_args(link.Way):
        sizes = link.sizes(way)
        measurements |= {(way, size): functools.partial(link.copy_s, way, size) for size in sizes}
        needed |= {(way, size) for size in (sizes if way == "to_device" else sizes[:1])}
    if not on_cpu:  # which copies by what computes
        copies = max(1, memory.free_device_bytes() // BESIDE_SHARE // link.SIZES[-1])
        measurements["beside"] = lambda: _beside_copies(
            calls["layers", several], measured["layers", several], measured["to_device", link.SIZES[-1]], copies
        )
        needed.add("beside")
    order = sorted(measurements, key=lambda name: name not in needed)
    for done, name in enumerate(order, start=1):
        if name in needed or time.perf_counter() - begin < (ENOUGH_ON_CPU_S if on_cpu else ENOUGH_S):
            measured[name] = measurements[name]()
        if progress is not None:
            progress(done, len(order))

    base_s, together = measured["layers", 1], layers[shortest]
    dispatch_s = measured["dispatch", ("layers", 1)]
    if on_cpu:  # where a call may return when it is done
        dispatch_s = min(dispatch_s, base_s)
    segments_s = measured["dispatch", shortest] - measured["dispatch", ("layers", together)]

    def further(several_s: float, one_s: float) -> float:
        """What each further layer takes, no more than one alone."""
        return min(added_s(1, one_s, several, several_s), one_s) if several > 1 else one_s

    def least_s(form: str, count: int) -> float:
        """On a CPU, where it may be less than the noise: a segment is not read faster than weights."""
        segment = segments[FORMS[form][0], count][0]
        return base_s * segment.nbytes / nbytes(model.layers[0]) if on_cpu else 0.0

    def by_length(form: str) -> Curve:
        found = sorted(count for of, count in forms if of == form and (of, count) in measured)
        added = {count: measured[form, count] - measured["layers", layers[form, count]] for count in found}
        return [(count, max(least_s(form, count), added[count]) / layers[form, count]) for count in found]

    def by_size(way: link.Way) -> Curve:
        return [(size, measured[way, size]) for size in link.sizes(way) if (way, size) in measured]

    return Profile(
        machine=machine(config, dtype, batch),
        to_device=by_size("to_device"),
        to_host=by_size("to_host"),
        both=by_size("both"),
        base_s=base_s,
        further_s=further(measured["layers", several], base_s),
        mlp_s=min(measured["mlp"], base_s),
        keys_values=by_length("keys_values"),
        project=by_length("project"),
        absorb=by_length("absorb"),
        head_s=measured["head"] * config.vocab_size / vocab_size,
        dispatch_s=dispatch_s,
        layer_dispatch_s=further(measured["dispatch", ("layers", several)], dispatch_s),
        segment_dispatch_s=max(0.0, segments_s) / together,
        issue_s=measured["issue"],
        beside_copies=measured.get("beside", 0.0),
        compile_s=statistics.median(compiled_s[of] for of in forms if of in compiled_s),
    )


def _check_memory(model: Model, batch: int, segments: Mapping[tuple[str, int], int], functions: Sequence[int]) -> None:
    """Raises MemoryError, with both figures, if the weights, the segments, the functions' tails, and one more tail or
    the logits while a function runs, do not fit what is free. These are all there at once; there is a little more.

    Args:
        model: its shapes.
        segments: as for `_segments`.
        functions: the layers of each function that has a tail.
    """
    config = model.config
    widths = {"activations": config.hidden_size, "keys_values": config.kv_width}
    numbers = sum(layers * count * widths[held] for (held, count), layers in segments.items())
    tail = PROBE_TAIL * config.kv_width
    numbers += tail * sum(functions) + max(tail, config.vocab_size)
    needed, free = nbytes(model) + batch * numbers * model.dtype.itemsize, memory.free_device_bytes()
    if memory.device_memory_is_host_memory():  # which gets back late what functions have used
        free = free * 7 // 8
    if needed > free:
        raise MemoryError(
            f"not enough memory to measure layers of batch {batch}: {needed / memory.GIB:.2f} GiB are needed and "
            f"{free / memory.GIB:.2f} GiB are free on the device; change --batch, the number of prompts or --dtype"
        )


def _numbers(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Numbers that are nothing special, repeated. On a CPU, whose times do not depend on them, they are all the same:
    of a large layer others take seconds to make."""
    if memory.device_memory_is_host_memory():
        return jnp.full(shape, 0.02, dtype)
    return jnp.resize(0.02 * jax.random.normal(key, (2**16 + 1,), dtype), shape)


def _some(model: Model) -> Model:
    """A model of these shapes, with such numbers; all made by one function, since each one takes long to compile."""
    graphdef, state = nnx.split(model)
    made = jax.jit(lambda key: jax.tree.map(lambda leaf: _numbers(key, leaf.shape, leaf.dtype), state))
    return nnx.merge(graphdef, jax.block_until_ready(made(jax.random.key(0))))


def _segments(model: Model, batch: int, layers: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], list[Segment]]:
    """Segments of such numbers, one each by how they are held and by length.

    Args:
        layers: how many each of them is of.
    """
    config, dtype = model.config, model.dtype

    def segment(key: Array, held: str, count: int) -> Segment:
        shape, slots = (layers[held, count], batch, count), jnp.arange(count, dtype=jnp.int32)
        if held == "activations":
            return Activations(_numbers(key, (*shape, config.hidden_size), dtype), slots)
        kv = _numbers(key, (*shape, config.num_kv_heads, config.head_dim), dtype)
        return KeysValues(kv, kv, slots)

    made = jax.jit(lambda key: {wanted: [segment(key, *wanted)] for wanted in layers})
    return jax.block_until_ready(memory.placed(made(jax.random.key(0))))


def _layers(
    model: Model, batch: int, segments: Sequence[Segment] = (), recompute: Recompute = "project", layers: int = 1
) -> Compile:
    """Steps of one layer, or of several in one call, over a segment of theirs, or over none.

    As in decoding, where each call of a function has the weights of the one before, but other segments.

    Args:
        segments: equal ones, which take turns: two, where the host's time is measured.
    """
    config, dtype = model.config, model.dtype
    shape = (layers, batch, PROBE_TAIL, config.num_kv_heads, config.head_dim)
    slots = PROBE_SLOT + jnp.arange(PROBE_TAIL, dtype=jnp.int32)
    place = memory.placed(Place(jnp.full(1, PROBE_SLOT, jnp.int32), None))
    h = memory.placed(jnp.ones((batch, 1, config.hidden_size), dtype))
    (definition, *_), params = zip(*map(steps.split_module, model.layers), strict=True)  # one definition for all layers
    tail = memory.placed(KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots))
    turns = itertools.cycle([(segment,) for segment in segments] or [()])

    def compiled() -> Issue:
        of_one = params[:layers], h, tuple(segments[:1]), tail, place
        step = steps.decode_layers.lower(definition, *of_one, recompute=recompute).compile()

        def calls(count: int) -> Array:
            nonlocal tail
            out = h
            for _ in range(count):
                out, tail = step(params[:layers], out, next(turns), tail, place)
            return out

        return calls

    return compiled


def _mlp(model: Model, batch: int) -> Compile:
    """One layer's MLP in a decode step."""
    definition, params = steps.split_module(model.layers[0].mlp)
    h = memory.placed(jnp.ones((batch, 1, model.config.hidden_size), model.dtype))

    def compiled() -> Issue:
        mlp = jax.jit(lambda params, h: definition.module(params)(h)).lower(params, h).compile()
        return lambda count: [mlp(params, h) for _ in range(count)]

    return compiled


def _head(model: Model, batch: int) -> Compile:
    """What surrounds the layers in a step: embedding, logits and the next token."""
    (definition, params), sampling = steps.split_module(model.embedder), Sampling()
    place = memory.placed(Place(jnp.zeros(1, jnp.int32), None))
    keys, start = prompt_keys(0, [[0]] * batch), memory.placed((jnp.zeros(batch, jnp.int32), jnp.int32(0)))

    @jax.jit  # as one function: the host issues three more slowly than the device is done with them
    def head(params: steps.Params, tokens: Array, index: Array) -> tuple[Array, Array]:
        h, _ = steps.embed(definition, params, tokens, place)
        return steps.sample(steps.logits(definition, params, h), keys, index, sampling, choice=sampling.choice)

    def compiled() -> Issue:
        step = head.lower(params, *start).compile()

        def calls(count: int) -> Array:
            tokens, index = start
            for _ in range(count):
                tokens, index = step(params, tokens, index)
            return tokens

        return calls

    return compiled


def _ahead() -> Callable[[], Any]:
    """What keeps a GPU busy for `AHEAD_S`. On a CPU nothing does: calls may return there when they are done."""
    if memory.device_memory_is_host_memory():
        return lambda: None
    negated, numbers = jax.jit(jnp.negative, donate_argnums=0), memory.placed(jnp.ones(AHEAD_BYTES // 4, jnp.float32))

    def calls(count: int) -> Array:
        nonlocal numbers
        for _ in range(count):
            numbers = negated(numbers)
        return numbers

    one_s = min(trials_s(lambda: calls(CALLS))) / CALLS
    return lambda: calls(math.ceil(AHEAD_S / one_s))


def _run_s(calls: Issue, ahead: Callable[[], Any], warm_up: bool) -> float:
    """Seconds to run once what `calls` issues; it is compiled, and has not run before.

    A GPU is busy with what is `ahead` meanwhile, so that what the host takes to issue them is no part of it.

    Args:
        warm_up: whether the first call is left out, in which a GPU may load what it needs. On a CPU calls may be long,
            and it is needed only where what all others add is counted from.
    """
    (once_s,) = trials_s(lambda: calls(1), trials=1, warm_up=int(warm_up))
    if once_s >= LONG_S:
        again = int(AGAIN_S / once_s) if memory.device_memory_is_host_memory() else 0
        return min([once_s, *trials_s(lambda: calls(1), trials=again, warm_up=0)])
    count = max(1, min(QUEUED, int(QUEUED_S / once_s)))
    ahead_s, both_s = (min(trials_s(of, 4, warm_up=0)) for of in (ahead, lambda: (ahead(), calls(count))))
    return (both_s - ahead_s) / count if both_s > ahead_s else once_s


def _lasting_s(calls: Issue, run_s: float) -> float:
    """Seconds to run once what `calls` issues, of many in a row without a pause, as in decoding.

    Args:
        run_s: what it takes on a GPU that has been idle.
    """
    count = math.ceil(LASTING_S / run_s)
    return min(trials_s(lambda: calls(count), trials=2, warm_up=1)) / count


def _beside_copies(calls: Issue, run_s: float, copy_s: float, most: int) -> float:
    """Part of the time of copies to the device, of the largest size, by which what `calls` issues takes longer while
    they are under way.

    Args:
        most: copies, which the device holds all at once.
    """
    enough = min(most, math.ceil(1.5 * max(CALLS * run_s, BESIDE_S) / copy_s))
    count = max(1, int(enough * copy_s / 1.5 / run_s))
    trials: dict[int, list[float]] = {0: [], enough: []}
    for _ in range(TURNS):
        for copies, seconds in trials.items():
            arriving = link.under_way(copies)
            seconds.append(trials_s(lambda: calls(count), trials=1, warm_up=0)[0])
            jax.block_until_ready(arriving)
    return max(0.0, statistics.median(trials[enough]) / statistics.median(trials[0]) - 1)


def _dispatch_s(calls: Issue, run_s: float) -> float:
    """Seconds that the host needs to issue a call which takes `run_s` on the device."""
    if CALLS * run_s >= LONG_S:
        return issued_s(lambda: calls(1), trials=1)
    return issued_s(lambda: calls(CALLS)) / CALLS
