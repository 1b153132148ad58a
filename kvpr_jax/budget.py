"""Both memories: what there is of them, what a run needs, and what of its cache may so stay on the device."""

import bisect
import dataclasses

import jax.numpy as jnp

from kvpr_jax import memory
from kvpr_jax.config import ModelConfig
from kvpr_jax.costs import Costs, group_sizes
from kvpr_jax.engines import WINDOW, window_bytes
from kvpr_jax.plan import Plan, Request, Workload, longest_flushed

PREFILL_TOKENS = 32768  # tokens of a chunk of sequences, at most
PREFILL_QUERIES = 2048  # tokens of one sequence that pass through attention and MLP at a time, at most
PREFILL_QUERIES_LEAST = 64  # fewer would not fill the device
PREFILL_SHARE = 16  # a chunk's temporaries take one part in so many of the device's free memory, at most
MARGIN = 0.1  # of free memory, left alone: with half as much, a prefill of Llama-3-8B ran out of it on an H200
GROUP_BYTES = 2**29  # cache of a group of which some crosses the link, at most: its window holds three
GROUP_SHARE = 64  # and one part in so many of the device's free memory
GROUP_SHARE_RESIDENT = 8  # the same of a group that stays on the device, which is there twice while prefill makes it


@dataclasses.dataclass(frozen=True)
class Prefill:
    """How prompts pass through a layer.

    Attributes:
        sequences, queries: of a chunk, and tokens of one of them that pass at a time.
        batch_bytes, chunk_bytes: device memory of the batch's hidden states, and of one chunk's temporaries.
    """

    sequences: int
    queries: int
    batch_bytes: int
    chunk_bytes: int


@dataclasses.dataclass(frozen=True)
class Residency:
    """What stays on the device; the attributes are those of `plan.Plan`."""

    offloaded: bool
    resident_tokens: int
    resident_flushes: int
    tail_tokens: int
    flushes: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a workload may take of both memories beside the weights, and what its plans need.

    Attributes:
        costs: the cost model, which knows how many layers a group has.
        workload, request: what is planned, and what was asked of it.
        free_device_bytes, free_host_bytes: what there is.
        one_memory: whether both are the same.
        prefill: how prompts pass through a layer.
    """

    costs: Costs
    workload: Workload
    request: Request
    free_device_bytes: int
    free_host_bytes: int
    one_memory: bool
    prefill: Prefill

    def _in_groups(self) -> "Budget":
        """The budget with as many layers a group as there is room for.

        If all of the cache stays on the device, a group may be larger; but the cache goes to the host for want of room
        only, not for larger groups.
        """
        layers, layer_bytes = self.costs.config.num_layers, self.costs.host_bytes(0, self.workload.total_tokens)
        resident = group_sizes(layers, layer_bytes, self.free_device_bytes // GROUP_SHARE_RESIDENT)
        streamed = group_sizes(layers, layer_bytes, min(GROUP_BYTES, self.free_device_bytes // GROUP_SHARE))

        def grouped(size: int) -> Budget:
            return dataclasses.replace(self, costs=dataclasses.replace(self.costs, group=size))

        return next((budget for budget in map(grouped, resident) if budget.all_stays), grouped(streamed[0]))

    @property
    def all_stays(self) -> bool:
        """Whether all of the cache may stay on the device, and there is room for it."""
        if self.request.offload == "all" or self.request.split != "auto":
            return False
        filling_bytes = self._filling_bytes(0, self.costs.host_bytes(0, self.workload.prompt_tokens))
        room = self._usable_bytes - max(filling_bytes, self._step_bytes)
        tokens = self.workload.prompt_tokens + self._written
        return self.costs.cache_bytes(0, tokens) <= min(room, self.device_cache_bytes)

    @property
    def _written(self) -> int:
        """New tokens that are fed back, and slots for one where none is."""
        return max(1, self.workload.new_tokens - 1)

    @property
    def device_cache_bytes(self) -> int:
        """Device memory that the cache is allowed: all that is free, if the user sets no bound."""
        gib = self.request.device_cache_gib
        return self.free_device_bytes if gib is None else int(gib * memory.GIB)

    @property
    def host_cache_bytes(self) -> int:
        """Host memory that the cache is allowed: all that is free, if the user sets no bound."""
        gib = self.request.host_cache_gib
        return self.free_host_bytes if gib is None else int(gib * memory.GIB)

    @property
    def _has_activations(self) -> bool:
        """Whether any token may be held as such."""
        forced = self.request.split_tokens(self.workload.prompt_tokens)
        return self.costs.config.activations_are_smaller if forced is None else forced > 0

    @property
    def tail_token_bytes(self) -> int:
        """A token of all layers' tails, in the largest form that they may have."""
        return max(self.costs.cache_bytes(0, 1), self.costs.cache_bytes(int(self._has_activations), 0))

    def residency(self, tail_tokens: int, split: int | None) -> Residency:
        """What stays on the device, with so many tokens a tail, if tails are flushed.

        The device's budget is filled first, evenly in all layers, by the prompt's last tokens and then by new ones: as
        far as `device_bytes` leaves room for it, if tails go to the host in the larger form.

        Args:
            split: tokens of the prompt that are held as activations on the host; None: all that do not stay.
        """
        prompt, written = self.workload.prompt_tokens, self._written
        if self.all_stays or self.request.offload == "none":
            return Residency(False, prompt, 0, tail_tokens=written, flushes=0)
        tail = min(tail_tokens, written)
        flushes = (written - 1) // tail  # a full tail leaves when the next token comes
        if self.request.offload == "all" or self.request.split != "auto":
            return Residency(True, 0, 0, tail, flushes)

        def keeping(tokens: int) -> Residency:
            of_prompt = min(prompt, tokens)
            return Residency(True, of_prompt, (tokens - of_prompt) // tail, tail, flushes)

        def fits(tokens: int) -> bool:
            of = keeping(tokens)
            leaving = prompt - of.resident_tokens
            activations = leaving if split is None else split
            leaving_bytes = self.costs.host_bytes(activations, leaving - activations)
            read_bytes = leaving_bytes + self.costs.host_bytes(0, (flushes - of.resident_flushes) * tail)
            needed = self.device_bytes(of, leaving_bytes, read_bytes)
            if self.one_memory:
                needed += self.costs.config.num_layers * read_bytes
            return needed <= self._usable_bytes and self.held_bytes(of) <= self.device_cache_bytes

        most = prompt - split if split else prompt + flushes * tail
        kept = bisect.bisect_left(range(1, most + 1), True, key=lambda tokens: not fits(tokens))
        return keeping(kept)

    def held_bytes(self, of: Residency | Plan) -> int:
        """Device memory of what of the cache stays there, tails included: two, while full ones leave."""
        tails = 2 if of.flushes else 1
        resident_tokens = of.resident_tokens + of.resident_flushes * of.tail_tokens
        return self.costs.cache_bytes(0, resident_tokens) + tails * of.tail_tokens * self.tail_token_bytes

    def device_bytes(self, of: Residency, leaving_bytes: int, read_bytes: int) -> int:
        """Device memory that a run needs.

        Args:
            leaving_bytes: of a layer, which go to the host in prefill.
            read_bytes: of a layer, which the last step reads from there.
        """
        costs, group = self.costs, self.costs.group
        staying_bytes = costs.host_bytes(0, of.resident_tokens)
        filling = costs.cache_bytes(0, of.resident_tokens) + self._filling_bytes(leaving_bytes, staying_bytes)
        stepping = self.held_bytes(of) + window_bytes(group * read_bytes) + self._step_bytes
        resident_bytes = costs.cache_bytes(0, of.resident_tokens + of.resident_flushes * of.tail_tokens)
        merging = resident_bytes + self._merging_bytes(of.tail_tokens, of.flushes)
        return max(self.prefill.batch_bytes + self._trying_bytes, filling, stepping, merging)

    def host_limit_bytes(self, of: Residency) -> int:
        """Host memory that the cache may take, whatever is revised on the way."""
        if not self.one_memory:
            return min(self.free_host_bytes, self.host_cache_bytes)
        read_bytes = self.costs.host_bytes(0, self.workload.total_tokens)
        device_bytes = self.device_bytes(of, self._widest_bytes, read_bytes)
        return min(self.free_host_bytes - device_bytes, self.host_cache_bytes)

    def shortage(self, plan: Plan) -> str:
        """What the plan lacks, with both figures and what would help; empty if it fits."""
        request, forced = self.request, self.request.split != "auto"
        host_bytes = plan.host_bytes + (plan.device_bytes if self.one_memory else 0)
        limits = [
            ("host", plan.host_bytes, self.host_cache_bytes, request.host_cache_gib),
            ("host", host_bytes, self.free_host_bytes, None),
            ("device", self.held_bytes(plan), self.device_cache_bytes, request.device_cache_gib),
            ("device", plan.device_bytes, self.free_device_bytes, None),
        ]
        for place, needed, there, allowed in limits:
            if needed > there:
                are = "free beside the weights" if allowed is None else f"allowed by --{place}-cache-gib"
                bounded = request.device_cache_gib is not None
                helps = {
                    "a larger --host-cache-gib": place == "host" and allowed is not None,
                    "a larger --device-cache-gib": bounded and (place == "host" or allowed is not None),
                    "--offload all": bounded and place == "device",
                    "--offload auto": request.offload == ("all" if place == "host" else "none") and not forced,
                    "another --split": place == "host" and forced,
                }
                changes = ", ".join(change for change, would in helps.items() if would)
                figures = f"needs {memory.in_gib(needed)} GiB and {memory.in_gib(max(0, there))} GiB are {are}"
                return (
                    f"not enough {place} memory: the plan {figures}; "
                    f"what would help: {changes}{', ' if changes else ''}"
                    "fewer or shorter prompts, a smaller --max-new-tokens or a narrower --dtype"
                )
        return ""

    @property
    def _usable_bytes(self) -> int:
        return int(self.free_device_bytes * (1 - MARGIN))

    def _filling_bytes(self, leaving_bytes: int, staying_bytes: int) -> int:
        """Of prefill, beside what stays there: hidden states, groups that wait for the link, and a chunk's temporaries.
        What becomes one is there twice: layers their group, and behind the last chunk all chunks of a layer.

        Args:
            leaving_bytes, staying_bytes: of a layer.
        """
        group, layer_bytes, beside_bytes = self.costs.group, leaving_bytes + staying_bytes, self.prefill.chunk_bytes
        if group > 1:
            beside_bytes += group * layer_bytes
        elif self.prefill.sequences < self.workload.batch:
            beside_bytes = max(beside_bytes, layer_bytes)
        return self.prefill.batch_bytes + WINDOW * group * leaving_bytes + beside_bytes

    @property
    def _widest_bytes(self) -> int:
        """A layer of the prompt's cache, in the larger form."""
        return self.workload.prompt_tokens * max(self.costs.host_bytes(0, 1), self.costs.host_bytes(1, 0))

    @property
    def _step_bytes(self) -> int:
        """Of a decode step beside the window: keys and values of one group, formed or transposed; logits."""
        logits_bytes = 4 * self.workload.batch * self.costs.config.vocab_size * 4
        return self.costs.group_bytes(0, self.workload.total_tokens) + logits_bytes

    @property
    def _trying_bytes(self) -> int:
        """A copy of the head's weights, on which XLA tries ways to compute logits before prefill, but for a CPU."""
        config = self.costs.config
        return 0 if self.one_memory else config.vocab_size * config.hidden_size * self.costs.itemsize

    def _merging_bytes(self, tail: int, flushes: int) -> int:
        """Of a flush, beside what stays there: what all layers' smallest segments become one in."""
        longest = longest_flushed(self.costs, tail, flushes)
        return max(self.costs.cache_bytes(*tokens) for tokens in longest if self._has_activations or not tokens[0])


def budget_for(
    costs: Costs,
    dtype: jnp.dtype,
    workload: Workload,
    request: Request,
    free_device_bytes: int,
    free_host_bytes: int,
    one_memory: bool,
    has_fused: bool,
) -> Budget:
    """The budget of a workload, with as many layers a group as there is room for.

    Args:
        has_fused: whether prefill has a fused attention, which forms no scores.
    """
    prefill = _prefill(costs.config, dtype, workload, request, free_device_bytes, has_fused)
    return Budget(costs, workload, request, free_device_bytes, free_host_bytes, one_memory, prefill)._in_groups()


def _prefill(
    config: ModelConfig, dtype: jnp.dtype, workload: Workload, request: Request, free_device_bytes: int, has_fused: bool
) -> Prefill:
    """Chunks as large as the request and the device's memory allow: of a single sequence, what its queries need.

    Scores are formed for a chunk's queries where no fused attention does without; then the mask alone is.
    """
    tokens, itemsize = workload.prompt_tokens, dtype.itemsize
    batch_bytes = workload.batch * tokens * config.hidden_size * itemsize
    scores_bytes = tokens * (1 + itemsize) if has_fused else 3 * config.num_heads * tokens * 4
    query_bytes = (config.hidden_size + config.mlp_arrays * config.mlp_size) * itemsize + scores_bytes

    def chunk_bytes() -> int:
        width = config.hidden_size + config.kv_width
        if queries < tokens:  # what all of them attend to, and what becomes of them, is there again
            width += 2 * config.hidden_size + config.kv_width
        return sequences * (tokens * width * itemsize + queries * query_bytes)

    queries = min(tokens, request.prefill_tokens or PREFILL_QUERIES)
    sequences = max(1, min(workload.batch, (request.prefill_tokens or PREFILL_TOKENS) // tokens))
    most_bytes = free_device_bytes // PREFILL_SHARE
    while sequences > 1 and chunk_bytes() > most_bytes:
        sequences = -(-sequences // 2)
    while queries > PREFILL_QUERIES_LEAST and queries * query_bytes > most_bytes:
        queries = -(-queries // 2)
    return Prefill(sequences, queries, batch_bytes, chunk_bytes())
