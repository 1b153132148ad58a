"""The cost model of a decode step: what a plan is chosen by. Lengths in tokens, times in seconds.

The layers go in groups of N, which are copied and computed together. Copies run beside the compute of the group before,
and the host issues both:

    link_s(l)    = L/N · sum over copies (activations; keys, values) of what one of so many bytes takes
    compute_s(l) = L/N · (layer + (N - 1) · further layer) + L · sum over segments (what one of so many tokens adds)
                   + beside copies · link_s · the layers' share of the above
    issue_s(l)   = L/N · (call + (N - 1) · further layer + copies · copy) + L · segments · segment + 3 · call
    step_s(l)    = max(link_s, compute_s + head, issue_s)

since layers, which read their weights, are slower while copies arrive in the same memory (by the share of the copies
that arrives beside them and not beside their segments), what surrounds the layers are three calls (`head` on the
device), the window reaches over the ends of steps, and a short step is issued before the host has read the tokens of
the one before it; a long one waits for that, which takes next to nothing of it.

Segments of one form and place count as if they were equally long. The layer that is measured without any has a tail of
keys and values, so the tokens of such a tail add what they add to a segment, and not what any segment takes; a tail of
activations counts with the segments of its form.
`two_phase_step_s` is the cost model of the paper (arXiv 2411.17089, equations 8 to 11), kept for comparison.
"""

import dataclasses
import math
from typing import Any

from kvpr_jax.config import ModelConfig
from kvpr_jax.engines import Engine
from kvpr_jax.models.attention import Recompute
from kvpr_jax.profiling.profile import Profile

BUCKETS = 16  # split points tried, about
HEAD_CALLS = 3  # that the host issues beside those of the layers: embedding, logits, the next token
GROUP = 8  # layers at most: one call of so many is issued in less time than the device needs for it
TIMES_OF = {  # sides of a step: the profile's times that make them up, and its curves
    "copies to the device": ("to_device",),
    "compute": ("base_s", "further_s", "keys_values", "project", "absorb", "head_s", "beside_copies"),
    "dispatch": ("dispatch_s", "layer_dispatch_s", "segment_dispatch_s", "issue_s"),
}


@dataclasses.dataclass(frozen=True)
class Held:
    """Tokens of a layer, by where and in which form they are held.

    Attributes:
        activations, keys_values: on the host.
        resident: on the device, as keys and values.
        tail: there, slots of the tail, written or not.
        tail_is_activations: whether it is held as such.
        segments: that the activations, the keys and values and the resident tokens are in, where there are any.
    """

    activations: int
    keys_values: int
    resident: int = 0
    tail: int = 0
    tail_is_activations: bool = False
    segments: tuple[int, int, int] = (1, 1, 1)

    @property
    def on_host(self) -> tuple[int, int]:
        """Segments on the host: of activations, and of keys and values."""
        return bool(self.activations) * self.segments[0], bool(self.keys_values) * self.segments[1]

    @property
    def as_activations(self) -> tuple[int, int]:
        """Tokens that count as activations, those of such a tail too; and segments."""
        tokens = self.activations + (self.tail if self.tail_is_activations else 0)
        return tokens, max(self.on_host[0], bool(tokens))

    @property
    def as_keys_values(self) -> tuple[int, int]:
        """Tokens that count as keys and values, without the tail, which a layer has anyway; and segments."""
        return self.keys_values + self.resident, self.on_host[1] + bool(self.resident) * self.segments[2]


@dataclasses.dataclass(frozen=True)
class Costs:
    """The cost model for one model, batch and profile, with so many layers a group."""

    config: ModelConfig
    itemsize: int
    batch: int
    profile: Profile
    group: int = 1

    def host_bytes(self, activations: int, keys_values: int) -> int:
        """Bytes of one layer's tokens in each form."""
        width = activations * self.config.activation_width + keys_values * self.config.kv_width
        return self.batch * width * self.itemsize

    def cache_bytes(self, activations: int, keys_values: int) -> int:
        """Bytes of all layers' tokens in each form."""
        return self.config.num_layers * self.host_bytes(activations, keys_values)

    def group_bytes(self, activations: int, keys_values: int) -> int:
        """Bytes of one group's tokens in each form."""
        return self.group * self.host_bytes(activations, keys_values)

    def arrays_bytes(self, held: Held) -> list[int]:
        """Bytes of each array in which a group's tokens cross the link: activations; keys, values."""
        activations, keys_values = held.on_host
        arrays = [self.group_bytes(held.activations, 0) // max(1, activations)] * activations
        return arrays + [self.group_bytes(0, held.keys_values) // max(1, 2 * keys_values)] * (2 * keys_values)

    def link_s(self, held: Held) -> float:
        """One layer's share of its group's copies."""
        return sum(map(self.profile.copy_s, self.arrays_bytes(held)), 0.0) / self.group

    @property
    def _layer_s(self) -> float:
        """One layer's share of its group's step, beside its segments."""
        return self.profile.layer_s(self.group)

    def compute_s(self, held: Held, recompute: Recompute) -> float:
        """One layer's share of its group's step, wherever the tokens are held."""
        tail = 0 if held.tail_is_activations else held.tail
        return (
            self._layer_s
            + self.profile.segments_s(recompute, *held.as_activations)
            + self.profile.segments_s("keys_values", *held.as_keys_values, tail)
        )

    def issue_s(self, held: Held) -> float:
        """One layer's share of what the host needs to issue its group's step and copies."""
        copies, segments = len(self.arrays_bytes(held)), held.as_activations[1] + held.as_keys_values[1]
        call_s = self.profile.dispatch_s + (self.group - 1) * self.profile.layer_dispatch_s
        return (call_s + copies * self.profile.issue_s) / self.group + segments * self.profile.segment_dispatch_s

    def step_s(self, held: Held, recompute: Recompute, engine: Engine) -> float:
        """One decode step."""
        together = sum if engine == "sequential" else max
        return together(self.sides(held, recompute, engine).values())

    def sides(self, held: Held, recompute: Recompute, engine: Engine) -> dict[str, float]:
        """What a step takes of each thing that it may be bound by, the head's time with the compute that it is behind;
        dispatch, where the host runs ahead."""
        layers = self.config.num_layers
        link_s, compute_s = layers * self.link_s(held), layers * self.compute_s(held, recompute)
        if engine == "sequential":
            return {"copies to the device": link_s, "compute": compute_s + self.profile.head_s}
        slower_s = self.profile.beside_copies * link_s * layers * self._layer_s / compute_s
        return {
            "copies to the device": link_s,
            "compute": compute_s + slower_s + self.profile.head_s,
            "dispatch": layers * self.issue_s(held) + HEAD_CALLS * self.profile.dispatch_s,
        }

    def slowed(self, held: Held, recompute: Recompute, engine: Engine, step_s: float) -> tuple["Costs", str]:
        """The cost model by which this step, which is predicted to take less, takes `step_s`; and what it blames.

        What the prediction is bound by is taken to be slower than profiled.
        """
        sides = self.sides(held, recompute, engine)
        blamed = max(sides, key=lambda side: sides[side])
        times = 1 + (step_s - self.step_s(held, recompute, engine)) / sides[blamed]
        changes = {name: _longer(getattr(self.profile, name), times) for name in TIMES_OF[blamed]}
        return dataclasses.replace(self, profile=dataclasses.replace(self.profile, **changes)), blamed

    def two_phase_step_s(self, activations: int, keys_values: int) -> float:
        """The paper's schedule: the activations cross first, then they are projected beside the other copies."""
        first = self.link_s(Held(activations, 0))
        rest = max(self.link_s(Held(0, keys_values)), self.compute_s(Held(activations, keys_values), "project"))
        return self.config.num_layers * (first + rest) + self.profile.head_s


def _longer(of: Any, times: float) -> Any:
    """A time, or the times of a curve, so many times as long."""
    return times * of if isinstance(of, float) else [(size, times * seconds) for size, seconds in of]


def group_sizes(layers: int, layer_bytes: int, most_bytes: int) -> list[int]:
    """N to choose from, layers of a group, largest first: all groups are alike and compiled once.

    The larger the better: the device waits between two calls, and the host needs longer to issue layers one by one.

    Args:
        layer_bytes: of a layer's cache, at most.
        most_bytes: of a group's, if it has more than one layer.
    """
    most = max(1, min(GROUP, most_bytes // max(1, layer_bytes)))
    return [size for size in range(most, 0, -1) if layers % size == 0]


def buckets(tokens: int) -> list[int]:
    """Split points to choose from: multiples of a power of two, about `BUCKETS` of them, and all of the tokens.

    For 50 tokens 0, 16, 32, 48 and 50; for 1024, every 64th.
    """
    step = max(16, 2 ** math.ceil(math.log2(max(1, tokens) / BUCKETS)))
    return sorted({*range(0, tokens, step), tokens})
