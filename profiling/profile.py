"""What this machine takes to copy and compute: measured once, kept as JSON, measured again if it does not match."""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from kvpr_jax import memory, steps
from kvpr_jax.config import ModelConfig
from kvpr_jax.models import Model, abstract
from kvpr_jax.models.attention import Recompute
from kvpr_jax.profiling import curves, link, nvidia
from kvpr_jax.profiling.curves import Curve
from kvpr_jax.profiling.timing import issued_s, median_s, trials_s
from kvpr_jax.sampling import Sampling, prompt_keys
from kvpr_jax.segments import Activations, KeysValues, Place, Segment

VERSION = 7  # of the file's meaning
PROBE_TOKENS, PROBE_TOKENS_ON_CPU = 16384, 1024  # over the batch: tokens in the longest segment that is measured
FEWER = 32  # times as few in the shortest one
BETWEEN = (2, 4, 8)  # and in others: projecting is no line, since each length gets the matrix product that suits it
PROBE_TAIL = 16  # slots in the tail of the steps measured: it costs as much as another segment
SEVERAL = 4  # layers of a call that tells what the host needs for each further one
CALLS = 8  # layer steps dispatched together, as the engine does
SHORT_S = 0.015  # of those: there are more of them, or what is between the first call and the device counts as theirs
LONG_S = 0.1  # more is measured by single calls, so that a slow machine is done in seconds too
ENOUGH_S = 17.0  # of measuring: then no shorter segments, and in the ways that no plan asks for one size only


@dataclasses.dataclass(frozen=True)
class Profile:
    """Measured costs of one model's layer for one batch on one machine. Times in seconds.

    Attributes:
        machine: everything that would make the profile stale if it changed.
        to_device, to_host: (bytes, seconds) of copies by size.
        both: the same of one copy each way, where copies cross in both directions at once.
        base_s: one layer step whose cache is a short tail: projections, norms, MLP, and attention at its least.
        mlp_s: the MLP's part of it.
        keys_values, project, absorb: (tokens, seconds) that a segment of the cache adds to it in each form, by length.
        head_s: embedding, logits and sampling of a step.
        dispatch_s, layer_dispatch_s: what the host needs to issue a layer step, and each further layer in one call.
        issue_s: what it needs to issue one of several copies.
        compile_s: tracing and compiling one layer step.
    """

    machine: dict[str, str]
    to_device: Curve
    to_host: Curve
    both: Curve
    base_s: float
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

    def layer_s(self, recompute: Recompute, activations: int, keys_values: int) -> float:
        """Seconds of one layer step over so many tokens in each form, a segment each."""
        seconds = self.base_s
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
    """Measure copies, and one layer of the model (with random weights) over segments that are on the device.

    Args:
        progress: called with (measurements done, measurements in all).
    """
    one = _some(abstract(dataclasses.replace(config, num_layers=1), dtype))
    probe = PROBE_TOKENS_ON_CPU if memory.device_memory_is_host_memory() else PROBE_TOKENS
    tokens = max(32, min(probe // batch, 2048))
    few, *between = (tokens // times for times in (FEWER, *BETWEEN))
    slots = jnp.arange(tokens, dtype=jnp.int32)
    x = _numbers((1, batch, tokens, config.hidden_size), dtype)
    kv = _numbers((1, batch, tokens, config.num_kv_heads, config.head_dim), dtype)
    activations, keys_values = Activations(x, slots), KeysValues(kv, kv, slots)
    forms: dict[str, tuple[Segment, Recompute]] = {
        "keys_values": (keys_values, "project"), "project": (activations, "project"), "absorb": (activations, "absorb")
    }  # fmt: skip

    def over(form: str, count: int) -> Callable[[], tuple[float, float]]:
        segment, recompute = forms[form]
        return lambda: _run_s(_calls(one, batch, (memory.placed(segment[:count]),), recompute))

    empty, several = (_calls(one, batch, (), layers=count) for count in (1, SEVERAL))
    measurements: dict[Any, Callable[[], Any]] = {
        "empty": lambda: _run_s(empty),
        **{(form, tokens): over(form, tokens) for form in forms},
        "dispatch": lambda: _dispatch_s(empty, measured["empty"][1]),
        "dispatch of several": lambda: _dispatch_s(several, SEVERAL * measured["empty"][1]),
        "mlp": functools.partial(_mlp_s, one, batch),
        "head": functools.partial(_head_s, one, batch),
        "issue": link.issue_s,
    }
    copies: dict[link.Way, dict[Any, Callable[[], float]]] = {
        way: {(way, size): functools.partial(link.copy_s, way, size) for size in link.sizes(way)}
        for way in get_args(link.Way)
    }
    needed = {*measurements, *copies["to_device"], *(next(iter(sizes)) for sizes in copies.values())}
    measurements |= copies["to_device"] | {(form, few): over(form, few) for form in forms}
    measurements |= {("project", count): over("project", count) for count in between}
    measurements |= copies["to_host"] | copies["both"]
    measured: dict[Any, Any] = {}
    begin = time.perf_counter()
    for done, (name, measurement) in enumerate(measurements.items(), start=1):
        if name in needed or time.perf_counter() - begin < ENOUGH_S:
            measured[name] = measurement()
        if progress is not None:
            progress(done, len(measurements))

    compile_s, base_s = measured["empty"]
    dispatch_s = min(measured["dispatch"], base_s)

    def by_length(form: str) -> Curve:
        lengths = [count for count in sorted({few, *between, tokens}) if (form, count) in measured]
        return [(count, max(0.0, measured[form, count][1] - base_s)) for count in lengths]

    def by_size(way: link.Way) -> Curve:
        return [(size, measured[way, size]) for size in link.sizes(way) if (way, size) in measured]

    return Profile(
        machine=machine(config, dtype, batch),
        to_device=by_size("to_device"),
        to_host=by_size("to_host"),
        both=by_size("both"),
        base_s=base_s,
        mlp_s=min(measured["mlp"], base_s),
        keys_values=by_length("keys_values"),
        project=by_length("project"),
        absorb=by_length("absorb"),
        head_s=measured["head"],
        dispatch_s=dispatch_s,
        layer_dispatch_s=min(max(0.0, measured["dispatch of several"] - dispatch_s) / (SEVERAL - 1), dispatch_s),
        issue_s=measured["issue"],
        compile_s=compile_s,
    )


def _numbers(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Numbers that are nothing special, repeated: on a CPU a layer of random ones takes long to draw."""
    some = 0.02 * jax.random.normal(jax.random.key(0), (2**16 + 1,), dtype)
    return jnp.resize(some, shape)


def _some(model: Model) -> Model:
    """A model of these shapes, with such numbers."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: _numbers(leaf.shape, leaf.dtype), state))


def _calls(
    model: Model, batch: int, segments: tuple[Segment, ...], recompute: Recompute = "project", layers: int = 1
) -> Callable[[int], jax.Array]:
    """A function that issues so many calls, each of one layer, or of several, over these segments of theirs."""
    config, dtype = model.config, model.dtype
    shape = (layers, batch, PROBE_TAIL, config.num_kv_heads, config.head_dim)
    slots = 2**20 + jnp.arange(PROBE_TAIL, dtype=jnp.int32)
    place = memory.placed(Place(slots[:1], None))
    h = memory.placed(jnp.ones((batch, 1, config.hidden_size), dtype))
    tail: Segment = memory.placed(KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots))
    definition, params = steps.split_module(model.layers[0])

    def calls(count: int) -> jax.Array:
        nonlocal tail
        out = h
        for _ in range(count):
            out, tail = steps.decode_layers(
                definition, (params,) * layers, out, segments, tail, place, recompute=recompute
            )
        return out

    return calls


def _run_s(calls: Callable[[int], Any]) -> tuple[float, float]:
    """Seconds to compile what `calls` issues so many times, and to run it once."""
    first_s, *later = trials_s(lambda: calls(1), trials=3, warm_up=0)
    run_s = min(later)
    if CALLS * run_s < LONG_S:
        count = max(CALLS, math.ceil(SHORT_S / run_s))
        run_s = median_s(lambda: calls(count)) / count
    return max(0.0, first_s - run_s), run_s


def _dispatch_s(calls: Callable[[int], Any], run_s: float) -> float:
    """Seconds that the host needs to issue a call which takes `run_s` on the device."""
    count, trials = (CALLS, 5) if CALLS * run_s < LONG_S else (1, 1)
    jax.block_until_ready(calls(1))  # compiled
    return issued_s(lambda: calls(count), trials) / count


def _mlp_s(model: Model, batch: int) -> float:
    """Seconds of one layer's MLP in a decode step."""
    definition, params = steps.split_module(model.layers[0].mlp)
    h = memory.placed(jnp.ones((batch, 1, model.config.hidden_size), model.dtype))
    run = jax.jit(lambda params, h: definition.module(params)(h))
    return _run_s(lambda count: [run(params, h) for _ in range(count)])[1]


def _head_s(model: Model, batch: int) -> float:
    """Seconds of what surrounds the layers in a step: embedding, logits and the next token. The least of a few trials,
    which vary by a factor of two where another process keeps the host busy."""
    embedder = steps.split_module(model.embedder)
    tokens, place = jnp.zeros((batch, 1), jnp.int32), Place(jnp.zeros(1, jnp.int32), None)
    keys, index, sampling = prompt_keys(0, [[0]] * batch), jnp.int32(0), Sampling()

    def surround() -> Any:
        logits = steps.logits(*embedder, steps.embed(*embedder, tokens, place)[0])
        return steps.sample(logits, keys, index, sampling)

    return min(trials_s(surround))


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
        for name in ("keys_values", "project", "absorb"):
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
