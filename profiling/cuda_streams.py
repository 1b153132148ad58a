"""The CUDA-stream side of the overlap study: one decode step in PyTorch, copies on a stream of their own.

The same OPT layer as `models/opt.py`, on the same segments in the same window, as well as streams allow: pinned
buffers, a ring of device buffers that are never allocated anew, events in place of waiting hosts, no call that blocks
within a step. Keys and values are held by heads, (B, H, T, d), since that is what PyTorch's batched products read
without a copy. Run by `profiling/overlap.py`, in a process without JAX.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from kvpr_jax.profiling import link, timeline
from kvpr_jax.profiling.overlap import (
    TAIL_TOKENS,
    TRIALS,
    WARM_UP,
    Measured,
    Setting,
    serve,
)

WINDOW = 3  # layers whose segments the device holds, as in kvpr_jax

Tensor = torch.Tensor


@dataclasses.dataclass
class Layer:
    """OPT's decoder layer: weights (out, in) and biases (out,), as torch.nn.Linear has them."""

    norm: tuple[Tensor, Tensor]
    q: tuple[Tensor, Tensor]
    k: tuple[Tensor, Tensor]
    v: tuple[Tensor, Tensor]
    o: tuple[Tensor, Tensor]
    mlp_norm: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]


@dataclasses.dataclass
class Tail:
    """The newest tokens' keys and values (B, H, T, d), of which the first `length` and the new one count."""

    keys: Tensor
    values: Tensor
    length: int


def random_layer(hidden: int, mlp: int, dtype: torch.dtype, device: torch.device) -> Layer:
    def linear(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        return (
            torch.randn(outputs, inputs, dtype=dtype, device=device) * inputs**-0.5,
            torch.zeros(outputs, dtype=dtype, device=device),
        )

    def norm() -> tuple[Tensor, Tensor]:
        return torch.ones(hidden, dtype=dtype, device=device), torch.zeros(hidden, dtype=dtype, device=device)

    square = [linear(hidden, hidden) for _ in range(4)]
    return Layer(norm(), *square, norm(), linear(hidden, mlp), linear(mlp, hidden))


def layer_step(layer: Layer, h: Tensor, segments: Sequence[Sequence[Tensor]], tail: Tail, recompute: str) -> Tensor:
    """One OPT layer over one new token a sequence.

    Args:
        h: (B, D).
        segments: activations (x,) of (B, T, D), or keys and values of (B, H, T, d).
        tail: the new token's keys and values are written into it.
        recompute: "project" or "absorb".
    """
    batch, hidden = h.shape
    heads, width = tail.keys.shape[1], tail.keys.shape[3]
    x = functional.layer_norm(h, (hidden,), *layer.norm)
    q = (functional.linear(x, *layer.q) * width**-0.5).view(batch, heads, 1, width)
    tail.keys[:, :, tail.length] = functional.linear(x, *layer.k).view(batch, heads, width)
    tail.values[:, :, tail.length] = functional.linear(x, *layer.v).view(batch, heads, width)
    held = [(tail.keys[:, :, : tail.length + 1], tail.values[:, :, : tail.length + 1])]
    absorbed = []
    for segment in segments:
        if len(segment) == 2:
            held.append((segment[0], segment[1]))
        elif recompute == "project":
            keys, values = (functional.linear(segment[0], *w).unflatten(-1, (heads, width)) for w in (layer.k, layer.v))
            held.append((keys.transpose(1, 2), values.transpose(1, 2)))
        else:
            absorbed.append(segment[0])
    scores = [(q @ keys.transpose(2, 3))[:, :, 0] for keys, _ in held]
    if absorbed:
        by_heads = layer.k[0].view(heads, width, hidden)
        turned = (q[:, :, 0].transpose(0, 1) @ by_heads).transpose(0, 1)  # (B, H, D)
        offset = (q[:, :, 0] * layer.k[1].view(heads, width)).sum(-1, keepdim=True)
        scores += [turned @ x.transpose(1, 2) + offset for x in absorbed]
    weights = torch.cat([s.float() for s in scores], -1).softmax(-1).to(h.dtype)
    shares = weights.split([s.shape[-1] for s in scores], -1)
    out = sum((w[:, :, None] @ values)[:, :, 0] for w, (_, values) in zip(shares, held, strict=False))
    for w, x in zip(shares[len(held) :], absorbed, strict=True):
        mean = (w @ x).transpose(0, 1)  # (H, B, D)
        by_heads = layer.v[0].view(heads, width, hidden).transpose(1, 2)
        out = out + (mean @ by_heads).transpose(0, 1) + w.sum(-1, keepdim=True) * layer.v[1].view(heads, width)
    h = h + functional.linear(out.reshape(batch, hidden), *layer.o)
    x = functional.layer_norm(h, (hidden,), *layer.mlp_norm)
    return h + functional.linear(functional.linear(x, *layer.up).relu(), *layer.down)


class Decoding:
    """A step over layers whose segments are in pinned host memory."""

    def __init__(self, setting: Setting) -> None:
        device, dtype = torch.device("cuda"), getattr(torch, setting.dtype)
        hidden, heads = setting.hidden, setting.heads
        self.recompute = setting.recompute
        self.layers = [random_layer(hidden, setting.mlp, dtype, device) for _ in range(setting.layers)]
        self.h = torch.randn(setting.batch, hidden, dtype=dtype, device=device)
        shape = (setting.batch, heads, TAIL_TOKENS, hidden // heads)
        self.tails = [
            Tail(*(torch.randn(shape, dtype=dtype, device=device) for _ in range(2)), length=TAIL_TOKENS // 2)
            for _ in self.layers
        ]
        streamed = setting.prompt - setting.split
        shapes: list[list[tuple[int, ...]]] = []
        if setting.split:
            shapes.append([(setting.batch, setting.split, hidden)])
        if streamed:
            shapes.append([(setting.batch, heads, streamed, hidden // heads)] * 2)
        self.ring = [
            [[torch.randn(shape, dtype=dtype, device=device) for shape in segment] for segment in shapes]
            for _ in range(WINDOW)
        ]
        self.host = [
            [
                [torch.empty_like(array, device="cpu", pin_memory=True).copy_(array) for array in segment]
                for segment in self.ring[0]
            ]
            for _ in self.layers
        ]
        self.copies = torch.cuda.Stream()
        self.begin()

    def begin(self) -> None:
        """With a ring that nothing is using."""
        self.arrived, self.used = ([torch.cuda.Event() for _ in range(WINDOW)] for _ in range(2))
        self.issued = self.computed = 0  # layers since the beginning; both count on over the ends of steps

    def fetch(self) -> None:
        """Issue the copies of the next layer into its place of the ring, behind the last use of that place."""
        place = self.issued % WINDOW
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(self.used[place])
            for segment, buffers in zip(self.host[self.issued % len(self.layers)], self.ring[place], strict=True):
                for source, buffer in zip(segment, buffers, strict=True):
                    buffer.copy_(source, non_blocking=True)
            self.arrived[place].record()
        self.issued += 1

    def compute(self, h: Tensor, layer: int, place: int) -> Tensor:
        return layer_step(self.layers[layer], h, self.ring[place], self.tails[layer], self.recompute)

    def touch(self, h: Tensor, layer: int, place: int) -> Tensor:
        """In the place of a layer's compute: next to nothing, but it reads what was copied."""
        return h + 0 * self.ring[place][-1][-1].view(-1)[-1]

    def both(self, compute: Callable[[Tensor, int, int], Tensor], more: bool = True) -> Tensor:
        """A step: layers in order, each behind its own copies; `more` issues those of the next step's first layers."""
        h, stream = self.h, torch.cuda.current_stream()
        last = self.computed + len(self.layers)
        while self.issued < min(self.computed + WINDOW, last):
            self.fetch()
        for layer in range(len(self.layers)):
            place = self.computed % WINDOW
            stream.wait_event(self.arrived[place])
            h = compute(h, layer, place)
            self.used[place].record()
            self.computed += 1
            if more or self.issued < last:
                self.fetch()
        return h

    def captured(self, compute: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        """A step for a CUDA graph: all that it needs is issued and awaited within it."""
        self.begin()
        stream = torch.cuda.current_stream()
        self.copies.wait_stream(stream)
        h = self.both(compute, more=False)
        stream.wait_stream(self.copies)
        return h

    def compute_alone(self) -> Tensor:
        h = self.h
        for layer in range(len(self.layers)):
            h = self.compute(h, layer, layer % WINDOW)
        return h


def trials(function: Callable[[], Any], wait: Callable[[], None]) -> tuple[list[float], list[float]]:
    """Seconds of each trial until its result is there, and until the host had issued all of it."""
    seconds, issued = [], []
    for _ in range(WARM_UP + TRIALS):
        begin = time.perf_counter()
        function()
        issued.append(time.perf_counter() - begin)
        wait()
        seconds.append(time.perf_counter() - begin)
    return seconds[WARM_UP:], issued[WARM_UP:]


def link_gb_per_s() -> float:
    """1e9 bytes a second of pinned copies to the device, many large ones in flight."""
    source = torch.empty(link.LARGE, dtype=torch.uint8, pin_memory=True)
    into = torch.empty(link.LARGE, dtype=torch.uint8, device="cuda")

    def copies() -> None:
        for _ in range(link.LARGE_COPIES):
            into.copy_(source, non_blocking=True)

    seconds, _ = trials(copies, torch.cuda.synchronize)
    return link.LARGE_COPIES * link.LARGE / statistics.median(seconds) / 1e9


def traced(step: Callable[[], Any], wait: Callable[[], None]) -> list[timeline.Span]:
    """What the device does in one step."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            for _ in range(WARM_UP + 1):
                with torch.profiler.record_function(timeline.STEP):
                    step()
                    wait()
        profiler.export_chrome_trace(str(trace))
        return timeline.last_step(trace)


def measure(decoding: Decoding) -> list[Measured]:
    """Each variant's seconds for copies alone, compute alone and both, of the host's issuing, and one step's spans."""
    results = []
    with torch.inference_mode():
        wait = torch.cuda.current_stream().synchronize
        decoding.begin()
        copy_s, _ = trials(lambda: decoding.both(decoding.touch), wait)
        compute_s, _ = trials(decoding.compute_alone, wait)
        both_s, issue_s = trials(lambda: decoding.both(decoding.compute), wait)
        spans = traced(lambda: decoding.both(decoding.compute), wait)
        results.append(Measured("CUDA streams", copy_s, compute_s, both_s, issue_s, spans))

        torch.cuda.synchronize()
        copy, compute, both = (torch.cuda.CUDAGraph() for _ in range(3))
        with torch.cuda.graph(copy):
            decoding.captured(decoding.touch)
        with torch.cuda.graph(compute):
            decoding.compute_alone()
        with torch.cuda.graph(both):
            decoding.captured(decoding.compute)
        copy_s, _ = trials(copy.replay, wait)
        compute_s, _ = trials(compute.replay, wait)
        both_s, issue_s = trials(both.replay, wait)
        spans = traced(both.replay, wait)
        results.append(Measured("CUDA streams in a graph", copy_s, compute_s, both_s, issue_s, spans))
    return results


if __name__ == "__main__":
    serve(Decoding, measure, link_gb_per_s)
