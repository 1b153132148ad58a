"""What this machine takes to copy and compute: measured once, kept as JSON, measured again if it does not match."""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from kvpr_jax import memory, steps
from kvpr_jax.config import ModelConfig
from kvpr_jax.models import Model, abstract
from kvpr_jax.models.attention import Recompute
from kvpr_jax.profiling import curves, link, nvidia
from kvpr_jax.profiling.curves import Curve
from kvpr_jax.profiling.timing import added_s, issued_s, trials_s
from kvpr_jax.sampling import Sampling, prompt_keys
from kvpr_jax.segments import Activations, KeysValues, Place, Segment

VERSION = 8  # of the file's meaning
PROBE_TOKENS, PROBE_TOKENS_ON_CPU = 16384, 512  # over the batch: tokens in the longest segment that is measured
PROBE_TAIL = 16  # slots in the tail of the steps measured: it costs as much as another segment
SEVERAL = 4  # layers of a call, where one takes less than `SHORT_LAYER_S`, as layers in groups do on a GPU, and a
SHORT_LAYER_S = 1e-3
SHORT_BYTES = 2**27  # segment of all of them no more than so many as keys and values
CALLS = 8  # dispatched together, as the engine does, at least
SHORT_S = 0.015  # of those, at least
LONG_S = 0.1  # more is measured by single calls, so that a slow machine is done in seconds too
ENOUGH_S = 12.0  # then no shorter segments, and in the ways that no plan asks for one size only
COMPILERS = 4  # threads: more of them gain little, since Python and what tries products on a GPU go one at a time
FORMS: dict[str, tuple[str, Recompute]] = {  # by their curves: how a segment is held, and what is done with it
    "keys_values": ("keys_values", "project"),
    "project": ("activations", "project"),
    "absorb": ("activations", "absorb"),
}
# Segments measured, the most telling first, and how many times as few tokens they have as the longest one. Projecting
# is no line: each length gets the matrix product that suits it.
SEGMENTS = (
    ("keys_values", 1), ("project", 1), ("absorb", 1),
    ("project", 4), ("absorb", 4), ("keys_values", 32), ("project", 2), ("project", 8), ("absorb", 32), ("project", 32),
)  # fmt: skip

Calls = Callable[[int], Any]  # issues the same so many times, and returns what to wait for


@dataclasses.dataclass(frozen=True)
class Profile:
    """Measured costs of one model's layer for one batch on one machine. Times in seconds.

    Attributes:
        machine: everything that would make the profile stale if it changed.
        to_device, to_host: (bytes, seconds) of copies by size.
        both: the same of one copy each way, where copies cross in both directions at once.
        base_s, further_s: one layer step whose cache is a short tail (projections, norms, MLP, and attention at its
            least), and each further layer in one call.
        mlp_s: the MLP's part of one.
        keys_values, project, absorb: (tokens, seconds) that a segment of the cache adds to it in each form, by length.
        head_s: embedding, logits and sampling of a step, of many in a row.
        dispatch_s, layer_dispatch_s: what the host needs to issue a layer step, and each further layer in one call.
        issue_s: what it needs to issue one of several copies.
        compile_s: tracing and compiling one layer step.
    """

    machine: dict[str, str]
    to_device: Curve
    to_host: Curve
    both: Curve
    base_s: float
    further_s: float
    mlp_s: float
    keys_values: Curve
    project: Curve
    absorb: Curve
    head_s: float
    dispatch_s: float
    layer_dispatch_s: float
    issue_s: float
    compile_s: float

    def copy_s(self, nbytes: int) -> float:
        """Seconds that one host-to-device copy adds to others under way."""
        return curves.of_copy(self.to_device, nbytes)

    def layer_s(self, recompute: Recompute, activations: int, keys_values: int, group: int) -> float:
        """Seconds of one of `group` layers in one call over so many tokens in each form, a segment each."""
        seconds = (self.base_s + (group - 1) * self.further_s) / group
        if activations:
            seconds += curves.of_segment(self.project if recompute == "project" else self.absorb, activations)
        if keys_values:
            seconds += curves.of_segment(self.keys_values, keys_values)
        return seconds


def machine(config: ModelConfig, dtype: jnp.dtype, batch: int) -> dict[str, str]:
    """What identifies a profile."""
    return {
        "version": str(VERSION),
        "device": jax.local_devices()[0].device_kind,
        "driver": nvidia.driver(),
        "host": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "jax": jax.__version__,
        "model": repr(config),
        "dtype": jnp.dtype(dtype).name,
        "batch": str(batch),
    }


def measure(
    config: ModelConfig, dtype: jnp.dtype, batch: int, progress: Callable[[int, int], None] | None = None
) -> Profile:
    """Measure copies, and layers of the model (with random weights) over segments that are on the device.

    Args:
        progress: called with (things compiled or measured, such things in all).
    """
    begin = time.perf_counter()
    probe = PROBE_TOKENS_ON_CPU if memory.device_memory_is_host_memory() else PROBE_TOKENS
    tokens = max(32, min(probe // batch, 2048))
    one = _some(abstract(dataclasses.replace(config, num_layers=1), dtype))
    empty = _layers(one, batch)
    first_s, base_s = _first_s(empty), _run_s(empty)
    several = SEVERAL if base_s < SHORT_LAYER_S else 1
    token_bytes = several * batch * config.kv_width * jnp.dtype(dtype).itemsize
    forms = [(form, tokens // times) for form, times in SEGMENTS]
    layers = {count: several if count * token_bytes <= SHORT_BYTES else 1 for _, count in forms}  # of a call
    segments = _segments(one, batch, {(FORMS[form][0], count): layers[count] for form, count in forms})
    calls: dict[Any, Calls] = {"several": _layers(one, batch, layers=several)}
    calls |= {"mlp": _mlp(one, batch), "head": _head(one, batch)}
    for form, count in forms:
        held, recompute = FORMS[form]
        calls[form, count] = _layers(one, batch, (segments[held, count],), recompute, layers[count])
    measurements: dict[Any, Callable[[], float]] = {name: functools.partial(_run_s, of) for name, of in calls.items()}
    measurements |= {
        "dispatch": lambda: _dispatch_s(empty, base_s),
        "dispatch of several": lambda: _dispatch_s(calls["several"], measured["several"]),
        "issue": link.issue_s,
    }
    needed = {*measurements} - {(form, count) for form, count in forms if count < tokens}
    for way in get_args(link.Way):
        sizes = link.sizes(way)
        measurements |= {(way, size): functools.partial(link.copy_s, way, size) for size in sizes}
        needed |= {(way, size) for size in (sizes if way == "to_device" else sizes[:1])}
    done = itertools.count(1)

    def next_one() -> None:
        if progress is not None:
            progress(next(done), 1 + len(calls) + len(measurements))

    def in_time(name: Any) -> bool:
        return name in needed or time.perf_counter() - begin < ENOUGH_S

    def compiled(name: Any) -> bool:
        """Whether there was time to compile its calls."""
        if in_time(name):
            jax.block_until_ready(calls[name](1))
            return True
        return False

    next_one()
    measured: dict[Any, float] = {}
    for names in ([name for name in measurements if (name in needed) == first] for first in (True, False)):
        # Side by side, so that it takes a few seconds for all of them; nothing is measured meanwhile.
        pool = futures.ThreadPoolExecutor(COMPILERS)
        try:
            compiling = {name: pool.submit(compiled, name) for name in names if name in calls}
            for _ in futures.as_completed(compiling.values()):
                next_one()
        finally:
            pool.shutdown(cancel_futures=True)  # of Ctrl-C
        for name in names:
            if compiling[name].result() if name in compiling else in_time(name):
                measured[name] = measurements[name]()
            next_one()

    empty_s, dispatch_s = {several: measured["several"]} | {1: base_s}, min(measured["dispatch"], base_s)

    def further(several_s: float, one_s: float) -> float:
        """What each further layer takes, no more than one alone."""
        return min(added_s(1, one_s, several, several_s), one_s) if several > 1 else one_s

    def by_length(form: str) -> Curve:
        found = sorted(count for of, count in forms if of == form and (of, count) in measured)
        return [(count, max(0.0, measured[form, count] - empty_s[layers[count]]) / layers[count]) for count in found]

    def by_size(way: link.Way) -> Curve:
        return [(size, measured[way, size]) for size in link.sizes(way) if (way, size) in measured]

    return Profile(
        machine=machine(config, dtype, batch),
        to_device=by_size("to_device"),
        to_host=by_size("to_host"),
        both=by_size("both"),
        base_s=base_s,
        further_s=further(measured["several"], base_s),
        mlp_s=min(measured["mlp"], base_s),
        keys_values=by_length("keys_values"),
        project=by_length("project"),
        absorb=by_length("absorb"),
        head_s=measured["head"],
        dispatch_s=dispatch_s,
        layer_dispatch_s=further(measured["dispatch of several"], dispatch_s),
        issue_s=measured["issue"],
        compile_s=max(0.0, first_s - base_s),
    )


def _numbers(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Numbers that are nothing special, repeated: on a CPU a layer of random ones takes long to draw."""
    return jnp.resize(0.02 * jax.random.normal(key, (2**16 + 1,), dtype), shape)


def _some(model: Model) -> Model:
    """A model of these shapes, with such numbers; all made by one function, since each one takes long to compile."""
    graphdef, state = nnx.split(model)
    made = jax.jit(lambda key: jax.tree.map(lambda leaf: _numbers(key, leaf.shape, leaf.dtype), state))
    return nnx.merge(graphdef, made(jax.random.key(0)))


def _segments(model: Model, batch: int, layers: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], Segment]:
    """Segments of such numbers by how they are held and by length.

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

    made = jax.jit(lambda key: {wanted: segment(key, *wanted) for wanted in layers})
    return memory.placed(made(jax.random.key(0)))


def _layers(
    model: Model, batch: int, segments: tuple[Segment, ...] = (), recompute: Recompute = "project", layers: int = 1
) -> Calls:
    """Steps of one layer, or of several in one call, over these segments of theirs."""
    config, dtype = model.config, model.dtype
    shape = (layers, batch, PROBE_TAIL, config.num_kv_heads, config.head_dim)
    slots = 2**20 + jnp.arange(PROBE_TAIL, dtype=jnp.int32)
    place = memory.placed(Place(slots[:1], None))
    h = memory.placed(jnp.ones((batch, 1, config.hidden_size), dtype))
    tail: Segment = memory.placed(KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots))
    definition, params = steps.split_module(model.layers[0])

    def calls(count: int) -> Array:
        nonlocal tail
        out = h
        for _ in range(count):
            out, tail = steps.decode_layers(
                definition, (params,) * layers, out, segments, tail, place, recompute=recompute
            )
        return out

    return calls


def _mlp(model: Model, batch: int) -> Calls:
    """One layer's MLP in a decode step."""
    definition, params = steps.split_module(model.layers[0].mlp)
    h = memory.placed(jnp.ones((batch, 1, model.config.hidden_size), model.dtype))
    run = jax.jit(lambda params, h: definition.module(params)(h))
    return lambda count: [run(params, h) for _ in range(count)]


def _head(model: Model, batch: int) -> Calls:
    """What surrounds the layers in a step: embedding, logits and the next token."""
    embedder, sampling = steps.split_module(model.embedder), Sampling()
    place = memory.placed(Place(jnp.zeros(1, jnp.int32), None))
    keys, start = prompt_keys(0, [[0]] * batch), memory.placed((jnp.zeros(batch, jnp.int32), jnp.int32(0)))

    def calls(count: int) -> Array:
        tokens, index = start
        for _ in range(count):
            h, _ = steps.embed(*embedder, tokens[:, None], place)
            logits = steps.logits(*embedder, h)
            tokens, index = steps.sample(logits, keys, index, sampling, choice=sampling.choice)
        return tokens

    return calls


def _first_s(calls: Calls) -> float:
    """Seconds of the first call, which traces and compiles."""
    return trials_s(lambda: calls(1), trials=1, warm_up=0)[0]


def _run_s(calls: Calls) -> float:
    """Seconds to run once what `calls` issues; it is compiled."""
    one_s = min(trials_s(lambda: calls(1), trials=2, warm_up=0))
    if CALLS * one_s >= LONG_S:
        return one_s
    count = max(CALLS, math.ceil(SHORT_S / one_s))
    return added_s(1, one_s, count, min(trials_s(lambda: calls(count))))


def _dispatch_s(calls: Calls, run_s: float) -> float:
    """Seconds that the host needs to issue a call which takes `run_s` on the device."""
    count, trials = (CALLS, 5) if CALLS * run_s < LONG_S else (1, 1)
    return issued_s(lambda: calls(count), trials) / count


def cache_directory() -> Path:
    """Where this package keeps files of the user's that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvpr_jax"


def path_of(key: dict[str, str]) -> Path:
    """The file of a profile in the user's cache directory."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_directory() / f"profile-{digest}.json"


def read(path: Path, key: dict[str, str]) -> Profile | None:
    """The stored profile, or None where there is none, it is damaged, or it describes something else."""
    try:
        profile = parsed(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None
    return profile if profile.machine == key else None


def parsed(fields: Any) -> Profile:
    """The profile that a JSON file holds.

    Raises:
        ValueError: a field is missing, foreign or of no use; names it.
    """
    check_names(Profile, fields)
    values, name = dict(fields), "machine"
    try:
        if not all(isinstance(value, str) for value in values[name].values()):
            raise ValueError("texts are wanted")
        for name in get_args(link.Way):
            values[name] = _curve(values[name])
            if min(map(min, values[name])) <= 0:
                raise ValueError("copies take bytes and seconds")
        for name in FORMS:
            values[name] = _curve(values[name])
            if min(tokens for tokens, _ in values[name]) <= 0:
                raise ValueError("segments have tokens")
        for name in {field.name for field in dataclasses.fields(Profile) if field.type is float}:
            values[name] = _seconds(values[name])
        if not values[name := "base_s"]:
            raise ValueError("no step takes no time")
    except (AttributeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} {fields[name]!r} is of no use: {error}") from error
    return Profile(**values)


def check_names(of: type, fields: Any) -> None:
    """Raises ValueError if what a JSON file holds has not just the fields of a dataclass; names those."""
    if not isinstance(fields, dict):
        raise ValueError(f"a {of.__name__} is a JSON object, not {fields!r}")
    there, wanted = set(fields), {field.name for field in dataclasses.fields(of)}
    if there != wanted:
        parts = {"lacks": wanted - there, "has no use for": there - wanted}
        raise ValueError(
            f"a {of.__name__} "
            + " and ".join(f"{how} {', '.join(sorted(names))}" for how, names in parts.items() if names)
        )


def _curve(pairs: Any) -> Curve:
    """Stored times by size; ValueError for none at all, and for two of one size."""
    curve = [(int(size), _seconds(seconds)) for size, seconds in pairs]
    if not curve or len(curve) > len(dict(curve)):
        raise ValueError("times of different sizes are wanted")
    return curve


def _seconds(value: Any) -> float:
    """A stored time; ValueError for what no time can be."""
    seconds = float(value)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{seconds} s")
    return seconds


def write(path: Path, profile: Profile) -> None:
    """Store a profile atomically: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump(dataclasses.asdict(profile), file, indent=1)
    os.replace(file.name, path)


def load_or_measure(
    config: ModelConfig, dtype: jnp.dtype, batch: int, progress: Callable[[int, int], None] | None = None
) -> Profile:
    """The stored profile of this machine for this model and batch, measured now if there is none that matches.

    Args:
        progress: as in `measure`; not called where nothing has to be measured.
    """
    key = machine(config, dtype, batch)
    path = path_of(key)
    profile = read(path, key)
    if profile is None:
        profile = measure(config, dtype, batch, progress)
        gc.collect()  # a module refers to itself: the one measured would still be there when a plan asks what is free
        with contextlib.suppress(OSError):  # a home that cannot be written costs a measurement each time, no more
            write(path, profile)
    return profile
