"""Both memories: what there is of them, what a run needs, and what of its cache may so stay on the device."""

import dataclasses
import math

import jax.numpy as jnp

from kvpr_jax import memory
from kvpr_jax.config import ModelConfig
from kvpr_jax.costs import Costs, group_sizes
from kvpr_jax.engines import WINDOW, window_bytes
from kvpr_jax.plan import Plan, Request, Workload, longest_flushed

PREFILL_TOKENS = 32768  # tokens of a chunk of sequences, at most
PREFILL_QUERIES = 2048  # tokens of one sequence that pass through attention and MLP at a time, at most
PREFILL_QUERIES_LEAST = 64  # fewer would not fill the device
PREFILL_SHARE = 8  # a chunk's temporaries take one part in so many of the device's free memory, at most
MARGIN = 0.05  # of free memory, left alone
GROUP_BYTES = 2**29  # cache of a group of which some crosses the link, at most: its window holds three
GROUP_SHARE = 64  # and one part in so many of the device's free memory
GROUP_SHARE_RESIDENT = 8  # the same of a group that stays on the device, which is there twice while prefill makes it


@dataclasses.dataclass(frozen=True)
class Prefill:
    """How prompts pass through a layer.

    Attributes:
        sequences, queries: of a chunk, and tokens of one of them that pass at a time.
        nbytes: device memory for it beside the cache: the batch's hidden states and one chunk's temporaries.
    """

    sequences: int
    queries: int
    nbytes: int


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
        joined_bytes = self._joined_layers * self.costs.host_bytes(0, self.workload.prompt_tokens)
        room = self._usable_bytes - max(self.prefill.nbytes + joined_bytes, self._step_bytes)
        return self.costs.cache_bytes(0, self.workload.total_tokens) <= min(room, self.device_cache_bytes)

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
    def tail_token_bytes(self) -> int:
        """A token of all layers' tails, in the largest form that they may have."""
        forced = bool(self.request.split_tokens(self.workload.prompt_tokens))
        return max(self.costs.cache_bytes(0, 1), self.costs.cache_bytes(int(forced), 0))

    def residency(self, tail_tokens: int) -> Residency:
        """What stays on the device, with so many tokens a tail, if tails are flushed.

        The device's budget is filled first, evenly in all layers, by the prompt's last tokens and then by new ones.
        """
        prompt, written = self.workload.prompt_tokens, max(1, self.workload.new_tokens - 1)
        if self.all_stays or self.request.offload == "none":
            return Residency(False, prompt, 0, tail_tokens=written, flushes=0)
        tail = min(tail_tokens, written)
        flushes = (written - 1) // tail  # a full tail leaves when the next token comes
        if self.request.offload == "all" or self.request.split != "auto":
            return Residency(True, 0, 0, tail, flushes)
        resident, token_bytes, merging = 0, self.costs.cache_bytes(0, 1), self._merging_bytes(tail, written // tail)
        for _ in range(2):  # what stays makes the window's layers smaller, so that a little more can stay
            reading = window_bytes(self.costs.group_bytes(0, self.workload.total_tokens - resident))
            beside = max(reading + 2 * tail * token_bytes, merging)
            left = min(self.device_cache_bytes - tail * token_bytes, self._usable_bytes - self._beside_bytes - beside)
            resident = max(0, left // token_bytes)
        of_prompt = min(prompt, resident)
        return Residency(True, of_prompt, min((resident - of_prompt) // tail, flushes), tail, flushes)

    def device_bytes(self, of: Residency, leaving_bytes: int, read_bytes: int) -> int:
        """Device memory that a run needs.

        Args:
            leaving_bytes: of a layer, which go to the host in prefill.
            read_bytes: of a layer, which the last step reads from there.
        """
        costs, group = self.costs, self.costs.group
        staying_bytes = costs.host_bytes(0, of.resident_tokens)
        waiting_bytes = WINDOW * group * leaving_bytes + self._joined_layers * (leaving_bytes + staying_bytes)
        filling = costs.cache_bytes(0, of.resident_tokens) + waiting_bytes + self.prefill.nbytes
        tails = 2 if of.flushes else 1  # while full ones leave, empty ones are there
        stepping = tails * of.tail_tokens * self.tail_token_bytes + window_bytes(group * read_bytes) + self._step_bytes
        resident_bytes = costs.cache_bytes(0, of.resident_tokens + of.resident_flushes * of.tail_tokens)
        return max(filling, resident_bytes + max(stepping, self._merging_bytes(of.tail_tokens, of.flushes)))

    def host_limit_bytes(self, of: Residency) -> int:
        """Host memory that the cache may take, whatever is revised on the way."""
        if not self.one_memory:
            return min(self.free_host_bytes, self.host_cache_bytes)
        read_bytes = self.costs.host_bytes(0, self.workload.total_tokens)
        device_bytes = self.device_bytes(of, self._widest_bytes, read_bytes)
        return min(self.free_host_bytes - device_bytes, self.host_cache_bytes)

    def shortage(self, plan: Plan) -> str:
        """What the plan lacks, with both figures and the flags that change them; empty if it fits."""
        less = "fewer or shorter prompts, --max-new-tokens, --split or --dtype"
        host_bytes = plan.host_bytes + (plan.device_bytes if self.one_memory else 0)
        free = "are free beside the weights"
        limits = [
            ("host", host_bytes, self.free_host_bytes, free, less),
            ("device", plan.device_bytes, self.free_device_bytes, free,
             "--offload all, a smaller --device-cache-gib, fewer or shorter prompts or --dtype"),
        ]  # fmt: skip
        if self.request.host_cache_gib is not None:
            allowed = "are allowed by --host-cache-gib"
            limits.insert(0, ("host", plan.host_bytes, self.host_cache_bytes, allowed, f"that, {less}"))
        for place, needed, there, are, flags in limits:
            if needed > there:
                return (
                    f"not enough {place} memory: the plan needs {_gib(needed)} and {_gib(max(0, there))} {are}; "
                    f"change {flags}"
                )
        return ""

    @property
    def _usable_bytes(self) -> int:
        return int(self.free_device_bytes * (1 - MARGIN))

    @property
    def _joined_layers(self) -> int:
        """Layers that are on the device twice in prefill, while they become a group."""
        return self.costs.group if self.costs.group > 1 else 0

    @property
    def _widest_bytes(self) -> int:
        """A layer of the prompt's cache, in the larger form."""
        return self.workload.prompt_tokens * max(self.costs.host_bytes(0, 1), self.costs.host_bytes(1, 0))

    @property
    def _beside_bytes(self) -> int:
        """Device memory beside what stays there: in prefill, with the layers that wait for the link, or in a step."""
        waiting_layers = WINDOW * self.costs.group + self._joined_layers
        return max(self.prefill.nbytes + waiting_layers * self._widest_bytes, self._step_bytes)

    @property
    def _step_bytes(self) -> int:
        """Of a decode step beside the window: keys and values of one group, formed or transposed; logits."""
        logits_bytes = 4 * self.workload.batch * self.costs.config.vocab_size * 4
        return self.costs.group_bytes(0, self.workload.total_tokens) + logits_bytes

    def _merging_bytes(self, tail: int, flushes: int) -> int:
        """Of a flush, beside what stays there: what all layers' smallest segments become one in."""
        longest = longest_flushed(self.costs, tail, flushes)
        return max(self.costs.cache_bytes(*tokens) for tokens in longest)


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
    """Chunks as large as the request and the device's memory allow.

    Scores are formed for a chunk's queries where no fused attention does without; then the mask alone is.
    """
    tokens, itemsize = workload.prompt_tokens, dtype.itemsize
    batch_bytes = workload.batch * tokens * config.hidden_size * itemsize
    whole_bytes = tokens * (config.hidden_size + config.kv_width) * itemsize
    scores_bytes = tokens * (1 + itemsize) if has_fused else 3 * config.num_heads * tokens * 4
    query_bytes = (config.hidden_size + config.mlp_arrays * config.mlp_size) * itemsize + scores_bytes

    def chunk_bytes() -> int:
        return sequences * (whole_bytes + queries * query_bytes)

    queries = min(tokens, request.prefill_tokens or PREFILL_QUERIES)
    sequences = max(1, min(workload.batch, (request.prefill_tokens or PREFILL_TOKENS) // tokens))
    while chunk_bytes() > free_device_bytes // PREFILL_SHARE:
        if sequences > 1:
            sequences = -(-sequences // 2)
        elif queries > PREFILL_QUERIES_LEAST:
            queries = -(-queries // 2)
        else:
            break
    return Prefill(sequences, queries, batch_bytes + chunk_bytes())


def _gib(nbytes: int) -> str:
    """15.61 GiB, and 0.000075 GiB: two decimals, or two digits of what is less."""
    gib = nbytes / memory.GIB
    return f"{gib:.{max(2, 1 - math.floor(math.log10(gib))) if nbytes else 2}f} GiB"
