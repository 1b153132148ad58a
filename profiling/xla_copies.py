"""The XLA side of the overlap study: the same decode step in each form that XLA's asynchronous copies can take.

    device_put          copies issued by themselves, then the layer's step: `engines.Overlapped`, kvpr_jax's own
    in the layer step   the next layer's copies within the layer's step
    in one step         all layers and their copies in one compiled function, which is compiled for each model and shape

Each layer is a group of its own. Run by `profiling/overlap.py`, in a process without PyTorch.
"""

import collections
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from kvpr_jax import engines, memory, steps
from kvpr_jax.models import Model
from kvpr_jax.models.attention import Recompute
from kvpr_jax.profiling import link, settings, timeline
from kvpr_jax.profiling.overlap import TAIL_TOKENS, TRIALS, WARM_UP, Measured, Setting, serve
from kvpr_jax.runtime import Decoder
from kvpr_jax.segments import Activations, KeysValues, Place, Segment


class Stopwatch:
    """Adds up the seconds that are spent within it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.begin


@dataclasses.dataclass
class Host:
    """Segments of every layer, all on the host: an engine's source."""

    segments: list[tuple[Segment, ...]]
    issuing: Stopwatch

    def fetch(self, group: int) -> tuple[Segment, ...]:
        with self.issuing:
            return memory.fetched(self.segments[group])


@jax.jit
def touched(h: Array, segments: Any) -> Array:
    """In the place of layers' compute: next to nothing, but it reads what was copied."""
    for leaf in jax.tree.leaves(segments):
        h = h + 0 * leaf.ravel()[-1].astype(h.dtype)
    return h


@functools.partial(jax.jit, static_argnames=("definition", "recompute"), donate_argnames=("tail",))
def layer_step(
    definition: steps.Definition,
    params: steps.Params,
    h: Array,
    segments: tuple[Segment, ...],
    tail: Segment,
    place: Place,
    ahead: tuple[Segment, ...],
    *,
    recompute: Recompute | None,
) -> tuple[Array, Segment, tuple[Segment, ...]]:
    """A layer, and the segments `ahead`, another layer's, on the device.

    Args:
        recompute: None: copies alone.
    """
    fetched = memory.arriving(ahead)
    if recompute is None:
        return touched(h, segments), tail, fetched
    h, tail = steps.decode_layers(definition, (params,), h, segments, tail, place, recompute=recompute)
    return h, tail, fetched


@functools.partial(jax.jit, static_argnames=("definition", "recompute"), donate_argnames=("tails",))
def whole_step(
    definition: steps.Definition,
    params: tuple[steps.Params, ...],
    h: Array,
    layers: tuple[tuple[Segment, ...], ...],
    tails: tuple[Segment, ...],
    place: Place,
    *,
    recompute: Recompute | None,
) -> tuple[Array, tuple[Segment, ...]]:
    """All layers in one function: the copies of layer i+1 may begin once layer i-1 is done, which bounds the window.

    Args:
        recompute: None: copies alone.
    """
    ahead, written = memory.arriving(layers[0]), []
    for index, (of_layer, tail) in enumerate(zip(params, tails, strict=True)):
        segments = ahead
        if index + 1 < len(params):
            following, h = jax.lax.optimization_barrier((layers[index + 1], h))
            ahead = memory.arriving(following)
        if recompute is None:
            h = touched(h, segments)
        else:
            h, tail = steps.decode_layers(definition, (of_layer,), h, segments, tail, place, recompute=recompute)
        written.append(tail)
    return h, tuple(written)


@functools.partial(jax.jit, static_argnames=("definition", "recompute"), donate_argnames=("tails",))
def whole_step_alone(
    definition: steps.Definition,
    params: tuple[steps.Params, ...],
    h: Array,
    segments: tuple[Segment, ...],
    tails: tuple[Segment, ...],
    place: Place,
    *,
    recompute: Recompute,
) -> tuple[Array, tuple[Segment, ...]]:
    """All layers in one function, over the same segments, which are on the device."""
    written = []
    for of_layer, tail in zip(params, tails, strict=True):
        h, tail = steps.decode_layers(definition, (of_layer,), h, segments, tail, place, recompute=recompute)
        written.append(tail)
    return h, tuple(written)


def trials(function: Callable[[], Any], issued: Callable[[], float] | None = None) -> tuple[list[float], list[float]]:
    """Seconds of each trial until its result is there, and until the host had issued all of it.

    Args:
        issued: seconds that the last trial spent in issuing, where the function waits in between.
    """
    seconds, issue = [], []
    for _ in range(WARM_UP + TRIALS):
        begin = time.perf_counter()
        result = function()
        issue.append(issued() if issued else time.perf_counter() - begin)
        jax.block_until_ready(result)
        seconds.append(time.perf_counter() - begin)
    return seconds[WARM_UP:], issue[WARM_UP:]


def traced(step: Callable[[], Any]) -> list[timeline.Span]:
    """What the device does in one step."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(WARM_UP + 1):
                with jax.profiler.TraceAnnotation(timeline.STEP):
                    jax.block_until_ready(step())
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        return timeline.last_step(trace)


class Decoding:
    """A step over layers whose segments are in pinned host memory."""

    def __init__(self, setting: Setting) -> None:
        dtype = jnp.dtype(setting.dtype)
        config = settings.shape(setting.model, setting.layers)
        self.decoder = Decoder(Model(config, dtype=dtype, rngs=nnx.Rngs(0)))
        self.recompute, self.count = setting.recompute, setting.layers
        batch, streamed = setting.batch, setting.prompt - setting.split

        def random(*shape: int) -> Array:
            return jax.random.normal(jax.random.key(0), shape, dtype)

        def keys_values(first: int, tokens: int) -> KeysValues:
            shape = (1, batch, tokens, config.num_kv_heads, config.head_dim)
            return KeysValues(random(*shape), random(*shape), jnp.arange(first, first + tokens, dtype=jnp.int32))

        held: list[Segment] = []
        if setting.split:
            x = random(1, batch, setting.split, config.hidden_size)
            held.append(Activations(x, jnp.arange(setting.split, dtype=jnp.int32)))
        if streamed:
            held.append(keys_values(setting.split, streamed))
        nbytes = sum(segment.nbytes for segment in held)
        memory.reserve_pinned(setting.layers * nbytes, max(array.nbytes for array in jax.tree.leaves(held)))
        self.on_device = memory.placed(tuple(held))
        self.issuing = Stopwatch()
        self.host = Host([tuple(map(memory.to_host, held)) for _ in range(setting.layers)], self.issuing)
        jax.block_until_ready(self.host.segments)
        self.tails: list[Segment] = [memory.placed(keys_values(setting.prompt, TAIL_TOKENS)) for _ in range(self.count)]
        self.place = memory.placed(Place(jnp.array([setting.prompt + TAIL_TOKENS // 2], jnp.int32), None))
        self.h = memory.placed(random(batch, 1, config.hidden_size))
        self.functions = [self.decoder.shared(self.recompute)] * self.count
        self.ahead: tuple[Segment, ...] = ()  # the first layer's, brought by the last layer of the step before

    def engine(self) -> engines.Sequential | engines.Overlapped:
        """A new one, kvpr_jax's own."""
        return engines.engine_for("overlapped", self.host.segments[0])

    def step(self, engine: engines.Sequential | engines.Overlapped) -> Array:
        """A step by the engine; `issuing` has the seconds that the host takes to issue copies and compute."""
        self.issuing.seconds = 0.0
        compute = self.decoder.compute(self.tails, self.place, self.functions)

        def timed(*arguments: Any) -> Array:
            with self.issuing:
                return compute(*arguments)

        return engine.step(self.count, self.host, timed, self.h, True)

    def copies(self, engine: engines.Sequential | engines.Overlapped) -> Array:
        """The copies of a step by the engine."""
        return engine.step(self.count, self.host, lambda _, h, segments: touched(h, segments), self.h, True)

    def by_layer(self) -> Array:
        """Layer after layer, over segments that are on the device."""
        h, compute = self.h, self.decoder.compute(self.tails, self.place, self.functions)
        for layer in range(self.count):
            h = compute(layer, h, self.on_device)
        return h

    def in_layer_steps(self, recompute: Recompute | None) -> Array:
        """Layer after layer, each with the copies of the next one, as many at once as `engines.WINDOW` allows;
        `issuing` has the seconds that the host does not wait."""
        self.issuing.seconds, h, running = 0.0, self.h, collections.deque[Array]()
        if not self.ahead:
            self.ahead = memory.fetched(self.host.segments[0])
        for layer, params in enumerate(self.decoder.params):
            if len(running) == engines.WINDOW - 1:
                running.popleft().block_until_ready()
            with self.issuing:
                h, self.tails[layer], self.ahead = layer_step(
                    self.decoder.layer, params, h, self.ahead, self.tails[layer], self.place,
                    self.host.segments[(layer + 1) % self.count], recompute=recompute,
                )  # fmt: skip
            running.append(h)
        return h

    def whole(self, recompute: Recompute | None) -> Array:
        decoder = self.decoder
        h, tails = whole_step(
            decoder.layer, tuple(decoder.params), self.h, tuple(self.host.segments), tuple(self.tails), self.place,
            recompute=recompute,
        )  # fmt: skip
        self.tails = list(tails)
        return h

    def whole_alone(self) -> Array:
        """All layers in one compiled function, over segments that are on the device."""
        decoder = self.decoder
        h, tails = whole_step_alone(
            decoder.layer, tuple(decoder.params), self.h, self.on_device, tuple(self.tails), self.place,
            recompute=self.recompute,
        )  # fmt: skip
        self.tails = list(tails)
        return h


def measure(decoding: Decoding) -> list[Measured]:
    """Each variant's seconds for copies alone, compute alone and both, of the host's issuing, and one step's spans."""

    def issuing() -> float:
        return decoding.issuing.seconds

    whole, in_layer_steps, recompute = decoding.whole, decoding.in_layer_steps, decoding.recompute
    variants: list[tuple[str, Callable[[], Array], Callable[[], Array], Callable[[], Array], Any]] = [
        ("XLA, device_put", functools.partial(decoding.copies, decoding.engine()), decoding.by_layer,
         functools.partial(decoding.step, decoding.engine()), issuing),
        ("XLA, in the layer step", lambda: in_layer_steps(None), decoding.by_layer,
         lambda: in_layer_steps(recompute), issuing),
        ("XLA, in one step", lambda: whole(None), decoding.whole_alone, lambda: whole(recompute), None),
    ]  # fmt: skip
    results = []
    for variant, copies, compute, both, issued in variants:
        (copy_s, _), (compute_s, _) = trials(copies), trials(compute)
        both_s, issue_s = trials(both, issued)
        results.append(Measured(variant, copy_s, compute_s, both_s, issue_s, traced(both)))
    return results


if __name__ == "__main__":
    serve(Decoding, measure, link.gb_per_s)
