"""How well a model predicts a text, through the decode path itself: `python -m kvpr_jax.evaluate`.

The tokens t_0 … t_N of a text (as `generate` encodes a prompt: with the tokenizer's special tokens) are scored by
sliding window. Window k scores the `stride` tokens from 1 + k·stride on, the last window those that are left, given the
up to `window - stride` tokens before them. So each token but t_0 is scored once, given fewer than `window` tokens
before it, and given at least `window - stride` of them, or all where there are not so many. For 8 tokens, window 4 and
stride 2, what is given stands before the bar:

    0 | 1 2        1 2 | 3 4        3 4 | 5 6        5 6 | 7

The given tokens are a prompt: they go through `Decoder.prefill`, whose logits score the first token. The true tokens
are then fed to `Decoder.step` one by one, and its logits score the next one. A batch of windows is a batch of prompts.

    perplexity    = exp(mean of -ln p(t_i), i = 1 … N)
    bits per byte = sum of -log2 p(t_i) / bytes of the text in UTF-8

Text and table go to stdout; a progress bar, on a terminal, to stderr.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32
from rich.console import Console
from rich.table import Table

from kvpr_jax import checkpoint, steps
from kvpr_jax.command_line import (
    FAILURE,
    USAGE,
    Parser,
    Reporter,
    add_cache_options,
    failing_with,
    keep_compiled,
    request_of,
    run,
)
from kvpr_jax.generate import Progress, Tokenizer, encode
from kvpr_jax.models import Model
from kvpr_jax.plan import Plan, Request
from kvpr_jax.runtime import Decoder

BATCH = 8  # windows at a time
MOST_NATS = 700  # whose exponential is still a float


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens [begin, end) of a text, of which [first, end) are scored given those before them."""

    begin: int
    first: int
    end: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a text is cut.

    Attributes:
        window, stride: in tokens; see the module.
        batches: the windows that run together, equally many in each; see `cut`.
    """

    window: int
    stride: int
    batches: tuple[tuple[Span, ...], ...]


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a text was predicted.

    Attributes:
        nats: -ln p of each token but the first, in their order.
        text_bytes: of the text in UTF-8.
        window, stride: in tokens.
        plan: of the first batch of windows. The others have the same, unless the text is too short for that.
    """

    nats: Float32[np.ndarray, " N"]
    text_bytes: int
    window: int
    stride: int
    plan: Plan

    @property
    def mean_nats(self) -> float:
        return float(self.nats.mean(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nats)

    @property
    def bits_per_byte(self) -> float:
        return self.mean_nats * len(self.nats) / math.log(2) / self.text_bytes


def text_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """t_0 … t_N.

    Raises:
        ValueError: the text is empty or a single token, so that there is nothing to score, or not valid Unicode.
    """
    if not text:
        raise ValueError("the text is empty: give at least two tokens")
    (tokens,) = encode(tokenizer, [text])
    if len(tokens) < 2:
        raise ValueError(f"the text {text!r} is a single token, and the first is not scored: give at least two")
    return tokens


def cut(
    tokens: int, max_positions: int, window: int | None = None, stride: int | None = None, batch: int = BATCH
) -> Cut:
    """The windows of a text, in batches that share as many shapes as can be, since each new shape is compiled.

    Every n-th window goes into one of n batches: then each has a late window, whose prompt is as long as any. A batch
    that lacks one repeats its last.

    Args:
        tokens: N + 1.
        max_positions: of the model.
        window: None: all of the model's positions, or of the text if it is shorter.
        stride: None: half of the window.
        batch: windows at a time, at most.

    Raises:
        ValueError: window, stride or batch out of range; names the range.
    """
    window = min(max_positions, tokens) if window is None else window
    if not 2 <= window <= max_positions:
        raise ValueError(f"window {window} must be from 2 to {max_positions}, the positions that the model has")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"stride {stride} must be from 1 to {window - 1}, below the window")
    if batch < 1:
        raise ValueError(f"batch {batch} must be at least 1")
    spans = [
        Span(max(0, first - (window - stride)), first, min(first + stride, tokens))
        for first in range(1, tokens, stride)
    ]
    count = -(-len(spans) // batch)
    size = -(-len(spans) // count)
    groups = [spans[index::count] for index in range(count)]
    return Cut(window, stride, tuple((*group, *group[-1:] * (size - len(group))) for group in groups))


def perplexity(
    model: Model,
    tokenizer: Tokenizer,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int = BATCH,
    request: Request = Request(offload="all"),
    progress: Progress | None = None,
) -> Score:
    """Score a text by sliding window; the module says how.

    Args:
        window, stride, batch: see `cut`.
        request: where the cache is held and how it is used; by default all of it is on the host.
        progress: called with (steps done, steps in all); a step scores a token of each window of a batch.

    Raises:
        ValueError: an option is out of range, there is nothing to score, or the model's numbers are not finite.
        MemoryError: the plan does not fit the device or the host.
    """
    tokens = np.array(text_tokens(tokenizer, text), np.int32)
    how = cut(len(tokens), model.config.max_positions, window, stride, batch)
    decoder, nats, plans = Decoder(model), np.empty(len(tokens) - 1, np.float32), []
    counts = [max(span.end - span.first for span in spans) for spans in how.batches]
    done, total = 0, sum(counts)
    for spans, count in zip(how.batches, counts, strict=True):
        prompts = [tokens[span.begin : span.first].tolist() for span in spans]
        targets = np.zeros((len(spans), count), np.int32)  # any token will do where a window has no more
        for row, span in zip(targets, spans, strict=True):
            row[: span.end - span.first] = tokens[span.first : span.end]
        plans.append(decoder.plan(prompts, count, request))
        columns = []
        for column in _columns(decoder, prompts, targets, plans[-1]):
            columns.append(column)
            done += 1
            if progress is not None:
                progress(done, total)
        for row, span in zip(np.stack(columns, axis=1), spans, strict=True):
            nats[span.first - 1 : span.end - 1] = row[: span.end - span.first]
    score = Score(nats, len(text.encode()), how.window, how.stride, plans[0])
    if not score.mean_nats < MOST_NATS:  # nor is "not a number"
        raise ValueError(
            f"tokens of {score.mean_nats} nats in the mean have no perplexity: {model.dtype} has too little range for "
            "this model, or its weights are damaged"
        )
    return score


def _columns(
    decoder: Decoder, prompts: Sequence[Sequence[int]], targets: Int32[np.ndarray, "B Q"], plan: Plan
) -> Iterator[Float32[np.ndarray, " B"]]:
    """The nats of the first target of each prompt, of the second, and so on."""
    cache, logits = decoder.prefill(prompts, plan)
    yield np.asarray(steps.cross_entropy(logits, targets[:, 0]))
    for fed, target in itertools.pairwise(targets.T):
        logits = decoder.step(cache, jnp.asarray(fed))
        yield np.asarray(steps.cross_entropy(logits, target))


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run of a comparison."""

    dtype: str
    request: Request

    def __str__(self) -> str:
        return f"split {self.request.split}, {self.dtype}"


def settings_of(first: Setting, items: Sequence[str]) -> list[Setting]:
    """The first setting, and for each item the first with another dtype or split.

    Raises:
        ValueError: an item is neither; names it.
    """
    settings = [first]
    for item in items:
        try:
            change = {"dtype": item} if item in checkpoint.DTYPES else {
                "request": dataclasses.replace(first.request, split=item)
            }  # fmt: skip
        except ValueError as error:
            known = ", ".join(checkpoint.DTYPES)
            raise ValueError(f"compare {item!r} is neither a dtype ({known}) nor a split here: {error}") from error
        settings.append(dataclasses.replace(first, **change))
    return settings


def read_text(path: str | None) -> str:
    """The text of a file, or of stdin for None, byte by byte as it is.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        return (sys.stdin.buffer.read() if path is None else Path(path).read_bytes()).decode()
    except (OSError, UnicodeDecodeError, AttributeError) as error:  # no attributes: stdin is closed
        name = "on stdin" if path is None else repr(path)
        raise ValueError(f"text {name} cannot be read: {error}") from error


def differences(score: Score, first: Score) -> dict[str, float]:
    """How far the nats of a run are from the first run's: in the mean, and at most for a single token."""
    apart = score.nats.astype(np.float64) - first.nats
    return {"mean_nats_difference": float(apart.mean()), "largest_nats_difference": float(np.abs(apart).max())}


def as_dict(setting: Setting, score: Score) -> dict[str, Any]:
    """A run for JSON."""
    numbers = {name: getattr(score, name) for name in ("perplexity", "bits_per_byte", "mean_nats")}
    return {"dtype": setting.dtype, **numbers, "plan": score.plan.as_dict()}


def summary(setting: Setting, score: Score) -> str:
    """A run in one line."""
    plan = score.plan
    split = f"split {plan.split} of {plan.cached_tokens} tokens ({plan.recompute})" if plan.offloaded else "no offload"
    return (
        f"perplexity {score.perplexity:.3f}, {score.bits_per_byte:.3f} bits per byte ({len(score.nats):,} tokens, "
        f"{score.text_bytes:,} bytes; window {score.window}, stride {score.stride}; {split}, {plan.engine} engine, "
        f"{setting.dtype})"
    )


def print_table(settings: Sequence[Setting], scores: Sequence[Score]) -> None:
    """One row a run, with its differences from the first."""
    table = Table("setting", "perplexity", "bits per byte", "mean nats - first", "largest difference", box=None)
    for setting, score in zip(settings, scores, strict=True):
        apart = differences(score, scores[0])
        table.add_row(
            str(setting), f"{score.perplexity:.5f}", f"{score.bits_per_byte:.5f}",
            f"{apart['mean_nats_difference']:+.1e}", f"{apart['largest_nats_difference']:.1e}",
        )  # fmt: skip
    Console(width=120).print(table)


def parser() -> Parser:
    parser = Parser(
        prog="python -m kvpr_jax.evaluate",
        description="Perplexity and bits per byte of a text by sliding window, through decoding with the cache in use.",
    )
    add = parser.add_argument_group("model and text").add_argument
    add("--model", metavar="DIR_OR_HUB_ID", default=str(checkpoint.BUNDLED), help="default: the bundled model")
    add("--dtype", choices=checkpoint.DTYPES, help="default: the checkpoint's own; float32 on a CPU")
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--text", metavar="FILE", help="in UTF-8")
    source("--stdin", action="store_true", help="read the text from stdin")
    add = parser.add_argument_group("windows").add_argument
    add("--window", metavar="N", type=int, help="tokens; default: the model's positions, or the text if it is shorter")
    add("--stride", metavar="N", type=int, help="tokens that a window scores; default: half of the window")
    add("--batch", metavar="N", type=int, default=BATCH, help=f"windows at a time; default: {BATCH}")
    split_of = "of the window less its stride, held as activations"
    add_cache_options(parser, split_of, "all", "default: all, to evaluate the offloaded path")
    add = parser.add_argument_group("output").add_argument
    add("--compare", metavar="ITEM,…", help="splits and dtypes to run as well, each against the first run")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    """Carry out a parsed command line and return the exit code."""
    with failing_with(USAGE):
        request = request_of(arguments)
        text = read_text(arguments.text)
    keep_compiled(arguments)
    with failing_with(FAILURE):
        directory = checkpoint.find(arguments.model)
        config, hf = checkpoint.read_config(directory)
        tokenizer = checkpoint.load_tokenizer(directory)
    windows = {"window": arguments.window, "stride": arguments.stride, "batch": arguments.batch}
    with failing_with(USAGE):  # before anything takes long
        first = Setting(arguments.dtype or checkpoint.default_dtype(hf), request)
        settings = settings_of(first, [] if arguments.compare is None else arguments.compare.split(","))
        how = cut(len(text_tokens(tokenizer, text)), config.max_positions, **windows)
        for setting in settings:
            for batch in how.batches:
                setting.request.split_tokens(max(span.first - span.begin for span in batch))
    report, model, scores = Reporter(quiet=False), None, []
    for setting in settings:
        if model is None or model.dtype.name != setting.dtype:
            model = None  # given back before the next
            with failing_with(FAILURE), report.bar("Loading the model", in_bytes=True) as progress:
                model = checkpoint.load_model(directory, setting.dtype, progress)
        with failing_with(USAGE), report.bar(f"Scoring ({setting})") as progress:
            scores.append(perplexity(model, tokenizer, text, **windows, request=setting.request, progress=progress))
    score, *others = scores
    if arguments.json:
        compared = [
            as_dict(setting, other) | differences(other, score)
            for setting, other in zip(settings[1:], others, strict=True)
        ]
        sizes = {"tokens": len(score.nats), "bytes": score.text_bytes, "window": score.window, "stride": score.stride}
        print(json.dumps({"model": arguments.model} | sizes | as_dict(first, score) | {"compare": compared}))
    else:
        print(summary(first, score))
        if others:
            print_table(settings, scores)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    return run("kvpr_jax.evaluate", lambda: execute(arguments))


if __name__ == "__main__":
    sys.exit(main())
