"""Carries a plan out: prefill a batch of prompts into a cache, then step it token by token."""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered
from jaxtyping import Array, Float, Int

from kvpr_jax import compiling, engines, memory, scheduler, steps
from kvpr_jax.cache import Cache
from kvpr_jax.config import ModelConfig
from kvpr_jax.models import Model
from kvpr_jax.models.attention import Recompute
from kvpr_jax.plan import Plan, Request, Workload
from kvpr_jax.profiling import measure
from kvpr_jax.profiling.profile import Profile
from kvpr_jax.segments import LAYERS, SEQUENCES, TOKENS, Place, Segment

UNLIMITED = 2**62  # bytes
OWN_FUNCTIONS = 12  # groups at most that are decoded by a function each: more are mostly copied for long
SHAPES = 32  # of steps, whose functions a decoder keeps
PREPARE_AT = 1 / 16  # of the tail written: runs that end early compile nothing in vain, others are ready in time


class Decoder:
    """A model ready to decode: its layers split once into one static definition and L sets of parameters.

    The step level of the API:

        decoder = Decoder(model)
        plan = decoder.plan(prompts, new_tokens=64, request=Request(split="50%", offload="all"))
        cache, logits = decoder.prefill(prompts, plan)          # logits (B, V) after the prompt
        logits = decoder.step(cache, tokens)                    # feed any tokens (B,), read the next logits
    """

    def __init__(self, model: Model) -> None:
        self.config, self.dtype = model.config, model.dtype
        self.embedder = steps.split_module(model.embedder)
        layers = [steps.split_module(layer) for layer in model.layers]
        self.layer, self.params = layers[0][0], [params for _, params in layers]
        self.compiled: set[tuple[Any, ...]] = set()  # `Plan.step_shape` of plans that have been stepped
        self._functions_of: dict[Any, list[steps.DecodeLayers]] = {}  # shapes of a step: for each group

    def plan(self, prompts: Sequence[Sequence[int]], new_tokens: int, request: Request = Request()) -> Plan:
        """The plan for a batch of tokenized prompts on this machine.

        Raises:
            ValueError: a prompt is empty or too long, or the request does not fit it.
            MemoryError: it does not fit the device or the host.
        """
        workload = workload_of(prompts, new_tokens, self.config)
        return plan_for(self.config, self.dtype, workload, request, compiled=self.compiled)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        plan: Plan,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Cache, Float[Array, "B V"]]:
        """Run the prompts through the model, a layer and in it a chunk of sequences at a time, into a new cache.

        Prompts of different lengths are padded on the left. While one layer computes, the segments of the group
        before its own are copied to the host.

        Args:
            prompts: token ids; those that the plan was made for, or others of the same number and greatest length.
            plan: how the cache is held.
            progress: called with (layers done, layers in all).

        Returns:
            The cache and the logits after each prompt's last token.

        Raises:
            ValueError: a prompt is empty, has tokens outside the vocabulary, or the plan is for other shapes.
        """
        workload = workload_of(prompts, 1, self.config)
        if (workload.batch, workload.prompt_tokens) != (plan.batch, plan.cached_tokens):
            raise ValueError(
                f"the plan is for {plan.batch} prompts of {plan.cached_tokens} tokens at most; these are "
                f"{workload.batch} of {workload.prompt_tokens}"
            )
        memory.reserve_pinned(plan.host_bytes, plan.largest_array_bytes)
        tokens, start = _left_padded(prompts)
        slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        chunks = []  # of sequences: where they stand, and their hidden states
        for first in range(0, plan.batch, plan.prefill_sequences):
            rows = slice(first, first + plan.prefill_sequences)
            place = Place(slots, None if start is None else start[rows])
            chunks.append((place, steps.embed(*self.embedder, tokens[rows], place)[0]))
        # Compiled while there is room for the copy of the head's weights that XLA tries the product on.
        last = jax.ShapeDtypeStruct((plan.batch, 1, self.config.hidden_size), self.dtype)
        steps.logits.lower(*self.embedder, memory.described(last, host=False)).compile()
        groups: list[tuple[Segment, ...]] = []
        layers = []  # of the next group: segments for the host, and segments that stay
        for layer, params in enumerate(self.params, start=1):
            if not layers and len(groups) >= engines.WINDOW:  # bounds what waits on the device for its copy
                jax.block_until_ready(groups[-engines.WINDOW])
            parts = []
            for index, (place, h) in enumerate(chunks):
                h, *segments = steps.prefill_layer(
                    self.layer, params, h, place,
                    split=plan.split, resident=plan.resident_tokens, chunk=plan.prefill_queries,
                )  # fmt: skip
                chunks[index] = (place, h)
                parts.append(segments)
            layers.append(_joined(parts, SEQUENCES))
            parts.clear()  # what is joined is not there twice
            if len(layers) == plan.group:
                host, stay = _joined(layers, LAYERS)
                groups.append((*map(memory.to_host, host), *stay))
                layers.clear()
            if progress is not None:
                progress(layer, self.config.num_layers)
        logits = steps.logits(*self.embedder, jnp.concatenate([h[:, -1:] for _, h in chunks]))
        return Cache(self.config, self.dtype, plan, groups, plan.cached_tokens, start), logits

    def compute(self, tails: list[Segment], place: Place, functions: Sequence[steps.DecodeLayers]) -> engines.Compute:
        """What an engine calls to compute a group, by its function, for a token at `place`, which it writes into the
        group's tail."""
        layers = len(self.params) // len(tails)

        def group_step(group: int, h: Array, segments: tuple[Segment, ...]) -> Array:
            params = tuple(self.params[group * layers : (group + 1) * layers])
            h, tails[group] = functions[group](params, h, segments, tails[group], place)
            return h

        return group_step

    def shared(self, recompute: Recompute) -> steps.DecodeLayers:
        """One function that decodes any group."""
        return functools.partial(steps.decode_layers, self.layer, recompute=recompute, caller=0)

    def step(self, cache: Cache, tokens: Int[Array, " B"]) -> Float[Array, "B V"]:
        """Append one token to each sequence and return the logits after it.

        Raises:
            ValueError: the model has no position left, or the tokens are not one a sequence.
        """
        batch = cache.plan.batch
        if tokens.shape != (batch,):
            raise ValueError(f"tokens have shape {tokens.shape}; one for each of the {batch} sequences is needed")
        if cache.length >= self.config.max_positions:
            raise ValueError(f"the cache holds {cache.length} tokens, all the positions that the model has")
        compiled = compiling.compiled_here()
        if cache.full:
            cache.flush()
        place = cache.place
        h, slots = steps.embed(*self.embedder, tokens, place)
        cache.place = Place(slots, place.start)
        cache.length += 1
        if cache.written == math.ceil(cache.plan.tail_tokens * PREPARE_AT) and cache.flushes < cache.plan.flushes:
            cache.preparing = compiling.ahead(self._prepare, cache, memory.described(h))
        if not cache.functions:
            cache.functions = self._functions(cache, memory.described(h), cache.groups[0], cache.tails[0])
        compute = self.compute(cache.tails, place, cache.functions)
        h = cache.engine.step(len(cache.groups), cache, compute, h, more=not cache.full)
        logits = steps.logits(*self.embedder, h)
        if cache.length == cache.plan.cached_tokens + 1:  # the first step
            self.compiled.add(cache.plan.step_shape)
        else:
            cache.recompiled += compiling.compiled_here() - compiled
        return logits

    def _prepare(self, cache: Cache, h: Any) -> None:
        """Compile what the steps behind the next flush need, so that none of them waits for it.

        Args:
            h: shape and place of a step's hidden states.
        """

        def join(segments: tuple[Segment, ...]) -> Segment:
            merging = steps.concatenate.lower(memory.described(segments, host=False), axis=TOKENS)
            merging.compile()
            return merging.out_info

        self._functions(cache, h, *cache.after_flush(join))

    def _functions(
        self, cache: Cache, h: Any, segments: tuple[Segment, ...], tail: Segment
    ) -> list[steps.DecodeLayers]:
        """What decodes each group of a cache, compiled: a function each where they are few, or one for all.

        Args:
            h, segments, tail: shapes and places of what it is called with.
        """
        groups, recompute = len(cache.groups), cache.plan.recompute
        arrived = memory.described(segments, host=False)
        shapes = (
            (memory.described(self.params[0]),) * cache.plan.group, h,
            arrived, memory.described(tail), memory.described(cache.place),
        )  # fmt: skip
        engine = engines.engine_for(cache.plan.engine, segments)
        if first := engine.first_to_arrive(arrived):
            steps.wait_for.lower(first).compile()
        leaves, structure = jax.tree.flatten(shapes)
        key = recompute, structure, *leaves
        if key not in self._functions_of:

            def lower(caller: int) -> Lowered:
                return steps.decode_layers.lower(self.layer, *shapes, recompute=recompute, caller=caller)

            if compiling.uses_graphs() and groups <= OWN_FUNCTIONS:
                functions = compiling.one_each(lower, groups)
            else:
                lower(0).compile()
                functions = [self.shared(recompute)] * groups
            while len(self._functions_of) >= SHAPES:
                self._functions_of.pop(next(iter(self._functions_of)))
            self._functions_of[key] = functions
        return self._functions_of[key]


def read_tokens(
    step: Callable[[Int[Array, " B"]], Int[Array, " B"]],
    tokens: Int[Array, " B"],
    count: int,
    ahead: Callable[[], bool],
) -> Iterator[np.ndarray]:
    """The tokens of each of `count` steps, as soon as the host knows them; or once the next step is issued, so that
    the device need not wait until the host has read them and issued the next step's first layers.

    Args:
        step: from the tokens of one step to those of the next, asynchronously.
        tokens: before the first step.
        ahead: asked behind each step, whether the next one is to be issued first.
    """
    unread = None
    for _ in range(count):
        tokens = step(tokens)
        if unread is not None:
            yield np.asarray(unread)
        unread = tokens
        if not ahead():
            yield np.asarray(unread)
            unread = None
    if unread is not None:
        yield np.asarray(unread)


def plan_for(
    config: ModelConfig,
    dtype: jnp.dtype,
    workload: Workload,
    request: Request,
    weights_bytes: int = 0,
    measured: Profile | None = None,
    elsewhere_bytes: int | None = None,
    compiled: Collection[tuple[Any, ...]] = (),
) -> Plan:
    """The plan for a workload on this machine as it is now; see `scheduler.make_plan` for the errors.

    Args:
        weights_bytes: device memory that the model will take, if it is not loaded yet.
        measured: the profile to plan by; None: this machine's, measured now if it was not before.
        elsewhere_bytes: memory of a device that is not here, to plan for; its host has as much as the request allows.
        compiled: see `scheduler.make_plan`.
    """
    measured = measured or measure.load_or_measure(config, dtype, workload.batch)
    on_host = weights_bytes if memory.device_memory_is_host_memory() else 0
    free = memory.free_device_bytes() - weights_bytes, memory.free_pinned_bytes() - on_host
    if elsewhere_bytes is not None:
        free = elsewhere_bytes - weights_bytes, UNLIMITED
    return scheduler.make_plan(
        config, dtype, workload, request, measured, *free, compiled, elsewhere=elsewhere_bytes is not None
    )


def workload_of(prompts: Sequence[Sequence[int]], new_tokens: int, config: ModelConfig) -> Workload:
    """The workload of tokenized prompts.

    Raises:
        ValueError: nothing to run, tokens outside the vocabulary, or more tokens than the model has positions.
    """
    if not prompts:
        raise ValueError("no prompts: give at least one")
    for index, prompt in enumerate(prompts, start=1):
        if not len(prompt):
            raise ValueError(f"prompt {index} of {len(prompts)} is empty: give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(
                f"prompt {index} of {len(prompts)} has a token outside the vocabulary 0..{config.vocab_size - 1}"
            )
    if new_tokens < 1:
        raise ValueError(f"max-new-tokens {new_tokens} must be at least 1")
    longest = max(map(len, prompts))
    if longest + new_tokens > config.max_positions:
        raise ValueError(
            f"{longest} prompt tokens and {new_tokens} new tokens are more than the model's {config.max_positions} "
            "positions"
        )
    return Workload(len(prompts), longest, new_tokens)


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Int[Array, "B S"], Int[Array, " B"] | None]:
    """Prompts as one array, and where each starts in it; None where all are equally long."""
    longest = max(map(len, prompts))
    tokens = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    start = np.array([longest - len(prompt) for prompt in prompts], np.int32)
    return jnp.asarray(tokens), jnp.asarray(start) if start.any() else None


def _joined(parts: Sequence[Sequence[Iterable[Segment]]], axis: int) -> list[tuple[Segment, ...]]:
    """Of each list of segments that every part has, one list, in which each segment is that of all parts."""
    return [
        tuple(pieces[0] if len(pieces) == 1 else steps.concatenate(pieces, axis) for pieces in zip(*lists, strict=True))
        for lists in zip(*parts, strict=True)
    ]
