"""Carries a plan out: prefill a batch of prompts into a cache, then step it token by token.

The engines are the two ways to run a decode step over a cache on the host; both do the same arithmetic.
"""

import collections
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvpr_jax import memory, scheduler, steps
from kvpr_jax.cache import Cache, join_sequences
from kvpr_jax.config import ModelConfig
from kvpr_jax.models import Model
from kvpr_jax.profiling import profile
from kvpr_jax.scheduler import Plan, Request, Workload
from kvpr_jax.segments import Place, Segment

Fetch = Callable[[int], tuple[Segment, ...]]
Compute = Callable[[int, Array, tuple[Segment, ...]], Array]


def sequential(layers: int, fetch: Fetch, compute: Compute, h: Array) -> Array:
    """Copy, wait, compute, wait: one layer after the other. The plain form that `overlapped` must equal."""
    for layer in range(layers):
        segments = jax.block_until_ready(fetch(layer))
        h = jax.block_until_ready(compute(layer, h, segments))
    return h


def overlapped(layers: int, fetch: Fetch, compute: Compute, h: Array) -> Array:
    """Issue the copies of layer i+1, then compute layer i: XLA runs them side by side, on streams of their own.

    A window bounds what is issued. Before layer i+1 is fetched, layer i-2 must be done, so the device holds the
    segments of three layers at most: i-1 (being computed), i (arriving) and i+1 (issued).
    """
    window: collections.deque[tuple[tuple[Segment, ...], Array]] = collections.deque()
    ahead = fetch(0)
    for layer in range(layers):
        segments, ahead = ahead, ()
        if len(window) == scheduler.WINDOW - 1:
            window.popleft()[1].block_until_ready()
        if layer + 1 < layers:
            ahead = fetch(layer + 1)
        h = compute(layer, h, segments)
        window.append((segments, h))
    return h


ENGINES: dict[str, Callable[[int, Fetch, Compute, Array], Array]] = {
    "overlapped": overlapped,
    "sequential": sequential,
}


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

    def plan(self, prompts: Sequence[Sequence[int]], new_tokens: int, request: Request = Request()) -> Plan:
        """The plan for a batch of tokenized prompts on this machine.

        Raises:
            ValueError: a prompt is empty or too long, or the request does not fit it.
            MemoryError: it does not fit the device or the host.
        """
        workload = workload_of(prompts, new_tokens, self.config)
        measured = profile.load_or_measure(self.config, self.dtype, workload.batch)
        free = memory.free_device_bytes(), memory.free_host_bytes()
        return scheduler.make_plan(self.config, self.dtype, workload, request, measured, *free)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        plan: Plan,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Cache, Float[Array, "B V"]]:
        """Run the prompts through the model, a chunk of sequences at a time, into a new cache.

        Prompts of different lengths are padded on the left. While one layer computes, the segments of the layer
        before it are copied to the host.

        Args:
            progress: called with (layers done, layers in all) over all chunks.

        Returns:
            The cache and the logits after each prompt's last token.
        """
        tokens, start = _left_padded(prompts)
        per_chunk = plan.prefill_sequences
        chunks = range(0, len(prompts), per_chunk)
        done, total = 0, len(chunks) * self.config.num_layers
        stored: list[list[tuple[Segment, ...]]] = [[] for _ in self.params]
        logits = []
        for first in chunks:
            rows = slice(first, first + per_chunk)
            slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            place = Place(slots, None if start is None else start[rows])
            h = steps.embed(*self.embedder, tokens[rows], place)
            for layer, params in enumerate(self.params):
                h, host, stay = steps.prefill_layer(
                    self.layer, params, h, place,
                    split=plan.split, resident=plan.resident_tokens, chunk=plan.prefill_queries,
                )  # fmt: skip
                stored[layer].append((*(memory.to_host(segment) for segment in host), *stay))
                if layer >= scheduler.WINDOW - 1:  # bounds what waits on the device for its copy
                    jax.block_until_ready(stored[layer - scheduler.WINDOW + 1][-1])
                done += 1
                if progress is not None:
                    progress(done, total)
            logits.append(steps.logits(*self.embedder, h))
        layers = []
        for layer, pieces in enumerate(stored):
            layers.append(join_sequences(pieces))
            stored[layer] = []
        cache = Cache(self.config, self.dtype, plan, layers, start, len(prompts), tokens.shape[1])
        return cache, jnp.concatenate(logits) if len(logits) > 1 else logits[0]

    def step(self, cache: Cache, tokens: Int[Array, " B"]) -> Float[Array, "B V"]:
        """Append one token to each sequence and return the logits after it.

        Raises:
            ValueError: the model has no position left, or the tokens are not one a sequence.
        """
        if tokens.shape != (cache.batch,):
            raise ValueError(f"tokens have shape {tokens.shape}; one for each of the {cache.batch} sequences is needed")
        if cache.length >= self.config.max_positions:
            raise ValueError(f"the cache holds {cache.length} tokens, all the positions that the model has")
        if cache.full:
            cache.flush()
        place = Place(jnp.array([cache.length], jnp.int32), cache.start)

        def compute(layer: int, h: Array, segments: tuple[Segment, ...]) -> Array:
            h, cache.tails[layer] = steps.layer_step(
                self.layer, self.params[layer], h, segments, cache.tails[layer], place, recompute=cache.plan.recompute
            )
            return h

        # Placed explicitly, as the layers' outputs are: otherwise the first layer would compile a step of its own.
        h = memory.to_device(steps.embed(*self.embedder, tokens[:, None], place))
        h = ENGINES[cache.plan.engine](self.config.num_layers, cache.fetch, compute, h)
        cache.length += 1
        return steps.logits(*self.embedder, h)


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
