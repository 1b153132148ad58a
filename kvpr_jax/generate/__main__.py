"""Command line: `python -m kvpr_jax.generate`. Text goes to stdout; the plan, progress and statistics to stderr."""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from kvpr_jax import checkpoint, memory
from kvpr_jax.command_line import (
    FAILURE,
    INTERRUPTED,
    USAGE,
    Parser,
    Reporter,
    add_cache_options,
    failing_with,
    keep_compiled,
    request_of,
    run,
)
from kvpr_jax.generate import Output, Stream, Until, encode
from kvpr_jax.models import weights_bytes
from kvpr_jax.plan import Plan
from kvpr_jax.profiling import device, measure
from kvpr_jax.profiling.report import table
from kvpr_jax.runtime import Decoder, plan_for, workload_of
from kvpr_jax.sampling import Sampling

DEFAULT_PROMPT = "Open a file and"
DEMONSTRATION = shlex.split("--offload all --split 50% --temperature 0.6 --top-p 0.9 --max-new-tokens 200")


def parser() -> Parser:
    parser = Parser(
        prog="python -m kvpr_jax.generate",
        description="Generate text with the KV cache in host memory, split between activations and keys and values.",
        epilog=f"Without arguments, the bundled model runs with: {' '.join(DEMONSTRATION)}",
    )
    add = parser.add_argument_group("model and prompts").add_argument
    add("--model", metavar="DIR_OR_HUB_ID", default=str(checkpoint.BUNDLED), help="default: the bundled model")
    add("--revision", metavar="REVISION", help="branch, tag or commit of a hub model; default: main")
    add("--prompt", metavar="TEXT", action="append", default=[], help="may be given several times")
    add("--prompts", metavar="FILE", help='one a line, or JSON lines with a "prompt" key; - is stdin')
    add("--chat", action="store_true", help="use the tokenizer's chat template")
    add("--dtype", choices=checkpoint.DTYPES, help="default: the checkpoint's own; float32 on a CPU")
    add = parser.add_argument_group("generation").add_argument
    add("--max-new-tokens", metavar="N", type=int, default=256)
    add("--stop", metavar="TEXT", action="append", default=[], help="ends a sequence; may be given several times")
    add("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    add("--temperature", metavar="T", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-k", metavar="K", type=int, default=0, help="0 is no limit")
    add("--top-p", metavar="P", type=float, default=1.0)
    add("--min-p", metavar="P", type=float, default=0.0)
    add("--seed", metavar="N", type=int, default=0)
    split_of = "prompt tokens held as activations; implies --offload all"
    add_cache_options(parser, split_of, "auto", "auto: only what the device cannot hold; all: the prompt, and "
        "new tokens in tails, which gather on the device; default: auto")  # fmt: skip
    add = parser.add_argument_group("output").add_argument
    add("--quiet", action="store_true", help="nothing on stderr but errors")
    add("--plan", action="store_true", help="print the plan and what it was chosen from, and exit")
    add("--profile", metavar="NAME_OR_FILE", help="plan by the profile of another machine, such as nvidia-l4 (see "
        "profiling/devices), in place of this one's; with --plan, within that device's memory")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def read_prompts(path: str) -> list[str]:
    """Prompts of a file, one a line; JSON lines if it is named .jsonl or begins with a brace. Blank lines are skipped.

    Raises:
        ValueError: the file cannot be read, or a JSON line is not an object with a string "prompt"; names the line.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, AttributeError) as error:  # no attributes: stdin is closed
        raise ValueError(f"prompts {path!r} cannot be read: {error}") from error
    text = text.removeprefix("\ufeff")  # the mark with which Windows' editors begin a file
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"prompts {path!r} holds no prompts: give at least one")
    if not path.endswith(".jsonl") and not lines[0][1].lstrip().startswith("{"):
        return [line.removesuffix("\r") for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError):
            prompts.append(None)
        if not isinstance(prompts[-1], str):
            raise ValueError(f'prompts {path!r}, line {number}: no JSON object with a string "prompt": {line[:60]!r}')
    return prompts


def describe(plan: Plan) -> str:
    """The plan in words."""
    if not plan.offloaded:
        held = f"{plan.cached_tokens} prompt tokens on the device"
    else:
        streamed = plan.cached_tokens - plan.split - plan.resident_tokens
        way = f" ({plan.recompute})" if plan.split else ""
        held = (
            f"of {plan.cached_tokens} prompt tokens, {plan.split} on the host as activations{way}, "
            f"{streamed} on the host as keys and values, {plan.resident_tokens} on the device; "
        )
        leaving = plan.flushes - plan.resident_flushes
        if leaving:
            held += f"new tokens gather on the device, {plan.tail_tokens} at a time, and go to the host {leaving} times"
        else:
            held += "new tokens stay on the device"
        if plan.waits_s:
            held += f" (up to {plan.waits_s:.1f} s in all to compile for it)"
    return (
        f"plan: {held}; {plan.engine} engine, {plan.host_bytes_per_step / 1e6:.2f} MB over the link and "
        f"{plan.predicted_step_s * 1e3:.2f} ms predicted for the first step ({plan.reason})"
    )


def explained(plan: Plan) -> str:
    """A table of what the plan was chosen from, with the times predicted for a step and the memory needed."""

    def milliseconds(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e3:.3f}"

    return table([
        {
            "split": str(each.split),
            "recompute": each.recompute or "-",
            "resident": str(each.resident_tokens),
            "link (ms)": milliseconds(each.link_s),
            "compute (ms)": milliseconds(each.compute_s),
            "dispatch (ms)": milliseconds(each.dispatch_s),
            "first step (ms)": milliseconds(each.step_s),
            "last step (ms)": milliseconds(each.last_step_s),
            "host cache (GiB)": memory.in_gib(each.host_bytes),
            "device in all (GiB)": memory.in_gib(each.device_bytes),
            "": "<- the plan" if (each.split, each.recompute or plan.recompute) == (plan.split, plan.recompute)
            else "" if each.fits else "does not fit",
        }
        for each in plan.candidates
    ])  # fmt: skip


def summary(stream: Stream) -> str:
    """The closing line of statistics."""
    s = stream.statistics
    device = f"device {s.peak_device_bytes / memory.GIB:.2f} GiB, " if s.peak_device_bytes is not None else ""
    return (
        f"prompt: {s.prompt_tokens} tokens, {s.prompt_tokens_per_s:.1f} tokens/s | "
        f"generation: {s.new_tokens} tokens, {s.new_tokens_per_s:.1f} tokens/s | "
        f"link: {s.link_bytes / 1e6:.1f} MB, {s.link_gb_per_s:.3f} GB/s | "
        f"compilation: {s.compile_s:.2f} s, of steps behind the first {s.recompiled}, "
        f"longest wait {s.longest_wait_s * 1e3:.1f} ms | "
        f"peak memory: {device}host {s.peak_host_bytes / memory.GIB:.2f} GiB"
    )


class Printer:
    """Prints texts one prompt after the other, each as far as it is known; several get a heading each."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self.outputs, self.current, self.written = outputs, 0, 0
        self._heading()

    def _heading(self) -> None:
        if len(self.outputs) > 1:
            print(f"==> {self.current + 1}/{len(self.outputs)}: {self.outputs[self.current].prompt[:60]!r}")

    def show(self, to_the_end: bool = False) -> None:
        """Print what is new, up to the first unfinished text, or of all texts."""
        while True:
            output = self.outputs[self.current]
            print(output.text[self.written :], end="")
            self.written = len(output.text)
            sys.stdout.flush()  # after the count: an interrupt while the reader is slow repeats nothing
            if self.current + 1 == len(self.outputs) or not (output.finish_reason or to_the_end):
                break
            print()
            self.current, self.written = self.current + 1, 0
            self._heading()
        if to_the_end:
            print(flush=True)


def execute(arguments: argparse.Namespace) -> int:
    """Carry out a parsed command line and return the exit code."""
    with failing_with(USAGE):
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p)
        sampling.check()
        until = Until(arguments.max_new_tokens, tuple(arguments.stop))
        request = request_of(arguments)
        prompts = arguments.prompt + (read_prompts(arguments.prompts) if arguments.prompts is not None else [])
        prompts = prompts or [DEFAULT_PROMPT]
    report = Reporter(arguments.quiet)
    keep_compiled(arguments)
    with failing_with(FAILURE):
        directory = checkpoint.find(arguments.model, arguments.revision, weights=not arguments.plan)
        config, hf = checkpoint.read_config(directory)
        tokenizer = checkpoint.load_tokenizer(directory)
    elsewhere = arguments.profile if arguments.plan else None
    with failing_with(USAGE):
        default = checkpoint.default_dtype(hf) if elsewhere is None else device.default_dtype(elsewhere)
    dtype = jnp.dtype(arguments.dtype or default)
    if not arguments.ignore_eos:
        until = dataclasses.replace(until, eos_token_ids=frozenset(config.eos_token_ids))
    with failing_with(USAGE), report.bar("Planning") as progress:
        ids = encode(tokenizer, prompts, arguments.chat)
        workload = workload_of(ids, until.max_new_tokens, config)
        if arguments.profile is None:
            measured, its_bytes = measure.load_or_measure(config, dtype, workload.batch, progress), None
        else:
            measured, its_bytes = device.given(arguments.profile, config, dtype, workload.batch)
        free_bytes = None if elsewhere is None else its_bytes
        plan = plan_for(config, dtype, workload, request, weights_bytes(config, dtype), measured, free_bytes)
    result = {"model": arguments.model, "plan": plan.as_dict()}
    if arguments.plan:
        if arguments.json:
            print(json.dumps(result | {"candidates": [dataclasses.asdict(each) for each in plan.candidates]}))
        else:
            print(f"{describe(plan)}\n\n{explained(plan)}")
        return 0
    with failing_with(FAILURE), report.bar("Loading the model", in_bytes=True) as progress:
        decoder = Decoder(checkpoint.load_model(directory, dtype.name, progress))
    report.note(describe(plan))
    with report.bar("Reading the prompt") as progress:
        stream = Stream(decoder, tokenizer, prompts, ids, plan, until, sampling, arguments.seed, progress)
        pieces = iter(stream)
        next(pieces)  # prefill, and the first token
    printer = None if arguments.json else Printer(stream.outputs)
    interrupted = False
    try:
        if printer:
            printer.show()
        for _ in pieces:
            if printer:
                printer.show()
    except KeyboardInterrupt:
        interrupted = True
    if printer:
        printer.show(to_the_end=True)
    else:
        outputs = [dataclasses.asdict(output) for output in stream.outputs]
        print(json.dumps(result | {"outputs": outputs, "stats": stream.statistics.as_dict()}))
    if stream.statistics.miss:
        report.note(stream.statistics.miss)
    report.note(summary(stream))
    return INTERRUPTED if interrupted else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser().parse_args(argv or DEMONSTRATION)

    def command() -> int:
        if not argv:
            Reporter(quiet=False).note(f"no arguments: running with {shlex.join(DEMONSTRATION)}; --help lists them all")
        return execute(arguments)

    return run("kvpr_jax.generate", command, arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
