"""Which part of the cache stays on the device, as measured: `python -m kvpr_jax.profiling.residency`.

The same share of the cache stays there, and the same bytes cross the link, as part of every layer (what plans do), as
whole layers among the others, or as the first layers. The rest is streamed as keys and values.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from kvpr_jax import command_line, engines, memory
from kvpr_jax.cache import Cache
from kvpr_jax.command_line import FAILURE, Parser, failing_with
from kvpr_jax.plan import Request
from kvpr_jax.profiling import decode, link, plot, report, settings
from kvpr_jax.profiling.settings import Setting
from kvpr_jax.runtime import Decoder


def arrangements(layers: int, tokens: int, percent: int) -> dict[str, list[int]]:
    """Tokens of each layer that stay on the device, the same number of all layers together in every arrangement.

    Of 4 layers of 10 tokens, 50 %: 5, 5, 5, 5; 0, 10, 0, 10; 10, 10, 0, 0.

    Raises:
        ValueError: the share is no whole number of layers, or of a layer's tokens.
    """
    if not 0 < percent < 100 or layers * percent % 100 or tokens * percent % 100:
        raise ValueError(
            f"share {percent} must be a percentage from 1 to 99 that is a whole number of {layers} layers and of "
            f"{tokens} tokens"
        )
    whole = layers * percent // 100
    counts = [index * percent // 100 for index in range(layers + 1)]
    return {
        "a share of every layer": [tokens * percent // 100] * layers,
        "whole layers, evenly spread": [tokens * (after - before) for before, after in itertools.pairwise(counts)],
        "the first layers": [tokens] * whole + [0] * (layers - whole),
    }


def leave(cache: Cache, resident: Sequence[int]) -> None:
    """Send what does not stay to the host, of a cache that is on the device.

    Args:
        resident: tokens of each layer that stay, its last ones.
    """
    (segment,) = cache.groups[0]
    sent = [segment.tokens - stay for stay in resident]
    token_bytes = segment.nbytes // segment.tokens
    memory.reserve_pinned(sum(sent) * token_bytes, max(sent) * token_bytes // 2)  # keys and values are apart
    for group, count in enumerate(sent):
        (segment,) = cache.groups[group]
        host = (memory.to_host(segment[:count]),) if count else ()
        cache.groups[group] = jax.block_until_ready((*host, *((segment[count:],) if resident[group] else ())))
    cache.bytes_per_step = sum(map(memory.host_bytes, cache.groups))
    cache.engine = engines.engine_for("overlapped", max(cache.groups, key=memory.host_bytes))


def measure(decoder: Decoder, prompts: Sequence[Sequence[int]], steps: int, resident: Sequence[int]) -> dict[str, Any]:
    """Time every step with so many tokens of each layer on the device, once all is compiled; there is no flush."""
    plan = decoder.plan(prompts, decode.WARM_UP_STEPS + steps + 1, Request(offload="none"))
    plan = dataclasses.replace(plan, group=1)  # so that a layer can stay on the device by itself
    cache, logits = decoder.prefill(prompts, plan)
    leave(cache, resident)

    tokens = decode.greedy(logits)

    def timed(count: int) -> dict[str, list[Any]]:
        return decode.timed_steps(
            lambda tokens: decoder.step(cache, tokens), tokens, count,
            lambda: {"step_bytes": cache.bytes_per_step}, lambda: False,
        )  # fmt: skip

    timed(decode.WARM_UP_STEPS)
    return {"resident": list(resident)} | timed(steps)


def rows(results: dict[str, dict[str, Any]], link_gb_per_s: float) -> list[dict[str, str]]:
    """The lines of the table. The floor is a step's bytes over the link's bandwidth."""
    lines = []
    for name, result in results.items():
        nbytes, step_s = result["step_bytes"][0], statistics.median(result["step_s"])
        floor_s = nbytes / link_gb_per_s / 1e9
        lines.append({
            "stays on the device": name,
            "step (ms)": report.median_ms(result["step_s"]),
            "min to max": report.min_to_max(result["step_s"]),
            "MB a step": f"{nbytes / 1e6:.1f}",
            "floor (ms)": f"{floor_s * 1e3:.2f}",
            "step / floor": f"{step_s / floor_s:.3f}",
        })  # fmt: skip
    return lines


def parser() -> Parser:
    parser = Parser(
        prog="python -m kvpr_jax.profiling.residency",
        description="Time decode steps with one share of the cache on the device, in three arrangements.",
    )
    settings.add_options(parser, new_tokens=32)
    add = parser.add_argument
    add("--share", metavar="P", type=int, default=50, help="percent of the cache on the device; default: 50")
    add("--out", metavar="FILE", type=Path, help="JSON file for every trial, which is replaced if it exists; default: "
        "profiling/results/<gpu>/residency-<model>-batch-<N>-prompt-<N>.json")  # fmt: skip
    return parser


def execute(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Carry out a parsed command line and return the exit code."""
    with failing_with(FAILURE):
        setting = Setting.of(arguments)
        out = arguments.out or setting.default_out("residency")
        setting.check(out)
        layers = settings.shape(setting.model, setting.layers).num_layers
        wanted = arrangements(layers, setting.prompt, arguments.share)
        decoder = setting.decoder()
        prompts, link_gb_per_s = setting.prompts(decoder), link.gb_per_s()
        results = {name: measure(decoder, prompts, setting.new_tokens, stay) for name, stay in wanted.items()}
    lines = rows(results, link_gb_per_s)
    written = setting.report("residency", argv, decoder) | {"share": arguments.share, "link_gb_per_s": link_gb_per_s}
    written |= {"arrangements": results, "table": lines}
    print(
        f"{plot.title(written)}; {arguments.share} % of the cache on the device, link {link_gb_per_s:.1f} GB/s"
        f"\n\n{report.table(lines)}"
    )
    decode.keep(written, out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser().parse_args(argv)
    return command_line.run("kvpr_jax.profiling.residency", lambda: execute(arguments, argv))


if __name__ == "__main__":
    sys.exit(main())
