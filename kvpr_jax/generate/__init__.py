"""Text in, text out, on three levels: `token_steps` yields tokens, `stream` pieces of text, `generate` whole texts."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import transformers

from kvpr_jax import checkpoint, compiling, memory, steps
from kvpr_jax.cache import Cache
from kvpr_jax.models import Model
from kvpr_jax.plan import Plan, Request
from kvpr_jax.runtime import Decoder, read_tokens
from kvpr_jax.sampling import Sampling, prompt_keys

Tokenizer = transformers.PreTrainedTokenizerBase
Progress = Callable[[int, int], None]

INCOMPLETE = "\ufffd"  # what a tokenizer makes of the first bytes of a character


@dataclasses.dataclass(frozen=True)
class Until:
    """When a sequence ends.

    Attributes:
        max_new_tokens: at the latest after this many tokens.
        stop: strings that end it; the text is cut before the first of them.
        eos_token_ids: tokens that end it; they are kept in the tokens, not in the text.
    """

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max-new-tokens {self.max_new_tokens} must be at least 1")
        if "" in self.stop:
            raise ValueError("stop '' is empty: give at least one character")


@dataclasses.dataclass
class Output:
    """What became of one prompt.

    Attributes:
        prompt: its text.
        prompt_tokens: how many tokens it was.
        token_ids: the new tokens.
        text: the new text, without special tokens and without a stop string.
        finish_reason: "stop" (end of sequence or stop string), "length" (max_new_tokens), or None before the end.
    """

    prompt: str
    prompt_tokens: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


@dataclasses.dataclass
class Statistics:
    """How a run went. Rates count the tokens of all sequences; padding does not count.

    Attributes:
        sequences: B.
        prompt_tokens, new_tokens: tokens of all prompts, and tokens handed out.
        prefill_s: from the first prompt's embedding until the first tokens are known.
        decode_s: from then until the last tokens are known.
        decode_steps: steps in that time.
        link_bytes: bytes fetched from the host in those steps.
        compile_s: of compilation in all threads, or of reading what an earlier run compiled; tracing is left out.
        recompiled: functions that steps behind the first one had to compile.
        longest_wait_s: the longest that one of them waited for what was being compiled in the background.
        miss: what was said of steps that took longer than predicted for long; None if they did not.
        peak_device_bytes: of the device since the process began; None on a CPU.
        peak_host_bytes: of the process.
    """

    sequences: int
    prompt_tokens: int
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0
    link_bytes: int = 0
    compile_s: float = 0.0
    recompiled: int = 0
    longest_wait_s: float = 0.0
    miss: str | None = None
    peak_device_bytes: int | None = None
    peak_host_bytes: int = 0

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def new_tokens_per_s(self) -> float:
        """Tokens of the decode steps over their time; the first token of each sequence belongs to prefill."""
        return (self.new_tokens - self.sequences) / self.decode_s if self.decode_s else 0.0

    @property
    def link_gb_per_s(self) -> float:
        """1e9 bytes a second over the decode steps."""
        return self.link_bytes / self.decode_s / 1e9 if self.decode_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        rates = ("prompt_tokens_per_s", "new_tokens_per_s", "link_gb_per_s")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in rates}


def encode(tokenizer: Tokenizer, prompts: Sequence[str], chat: bool = False) -> list[list[int]]:
    """The tokens of each prompt, with the tokenizer's special tokens, or as a user's turn of its chat template.

    Raises:
        ValueError: there are no prompts, one is empty, or the tokenizer has no chat template.
    """
    if not prompts:
        raise ValueError("no prompts: give at least one")
    for index, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ValueError(f"prompt {index} of {len(prompts)} is empty: give at least one character")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError(f"prompt {index} of {len(prompts)} is not valid Unicode: {prompt[:60]!r}")
    if chat and not tokenizer.chat_template:
        raise ValueError("this model's tokenizer has no chat template; leave chat out")

    def tokens(prompt: str) -> Any:
        if not chat:
            return tokenizer(prompt, verbose=False)["input_ids"]  # its warning of long prompts is our error
        turn = [{"role": "user", "content": prompt}]
        try:
            return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the prompt: {error}") from error

    return [list(tokens(prompt)) for prompt in prompts]


def token_steps(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    plan: Plan,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[tuple[np.ndarray, Cache]]:
    """Prefill, then yield the (B,) next tokens of each step together with the cache.

    While the caller reads, the first layers' copies for the next step are under way already, and where steps are short
    (`Cache.may_issue_ahead`), all of that step.
    """
    sampling.check()
    keys, choice = prompt_keys(seed, prompts), sampling.choice
    cache, logits = decoder.prefill(prompts, plan, progress)
    # On the device once and for all: what a step uploads would queue behind the copies of segments.
    sampling, index = memory.placed((sampling, jnp.int32(0)))

    def choose(logits: jax.Array) -> jax.Array:
        nonlocal index
        tokens, index = steps.sample(logits, keys, index, sampling, choice=choice)
        return tokens

    tokens = choose(logits)
    yield np.asarray(tokens), cache
    begin = time.perf_counter()
    following = read_tokens(
        lambda tokens: choose(decoder.step(cache, tokens)), tokens, max_new_tokens - 1, lambda: cache.may_issue_ahead
    )
    for known in following:
        cache.observe(time.perf_counter() - begin)
        yield known, cache
        begin = time.perf_counter()


class _Writer:
    """Turns one sequence's tokens into text as they come, and says when it ends."""

    def __init__(self, tokenizer: Tokenizer, output: Output, until: Until) -> None:
        self.tokenizer, self.output, self.until = tokenizer, output, until
        self.settled = ""  # text of the tokens before `read`
        self.context = self.read = 0  # tokens from `context` on are decoded together, since spaces depend on neighbours

    def write(self, token: int) -> str:
        """Take one more token; returns the text that is certain by now."""
        output = self.output
        output.token_ids.append(token)
        text = self._text()
        found = [at for at in map(text.find, self.until.stop) if at >= 0]
        if found:
            text, output.finish_reason = text[: min(found)], "stop"
        elif token in self.until.eos_token_ids:
            output.finish_reason = "stop"
        elif len(output.token_ids) == self.until.max_new_tokens:
            output.finish_reason = "length"
        shown = output.text
        output.text = text if output.finish_reason else text[: self._certain(text)]
        return output.text[len(shown) :]

    def _text(self) -> str:
        """All of the text so far; only the tokens since `context` are decoded again."""
        before = self._decode(self.output.token_ids[self.context : self.read])
        new = self._decode(self.output.token_ids[self.context :])[len(before) :]
        text = self.settled + new
        if new and not new.endswith(INCOMPLETE):
            self.settled, self.context, self.read = text, self.read, len(self.output.token_ids)
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _certain(self, text: str) -> int:
        """Characters that no later token can change: not half a character, not the beginning of a stop string."""
        whole = text.rstrip(INCOMPLETE)
        begun = [n for stop in self.until.stop for n in range(1, len(stop)) if whole.endswith(stop[:n])]
        return len(whole) - max(begun, default=0)


@dataclasses.dataclass(frozen=True)
class Piece:
    """New text of one sequence; `finish_reason` is set on its last piece."""

    index: int
    text: str
    token_id: int
    finish_reason: str | None


class Stream:
    """An iterator of `Piece`s over a batch; `outputs` and `statistics` are true at any moment, also when broken off."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        prompt_ids: Sequence[Sequence[int]],
        plan: Plan,
        until: Until,
        sampling: Sampling,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
        self.plan = plan
        self.outputs = [Output(text, len(ids)) for text, ids in zip(prompts, prompt_ids, strict=True)]
        self.statistics = Statistics(len(prompt_ids), sum(map(len, prompt_ids)))
        writers = [_Writer(tokenizer, output, until) for output in self.outputs]
        self._pieces = self._run(
            token_steps(decoder, prompt_ids, plan, until.max_new_tokens, sampling, seed, progress), writers
        )

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def _run(self, tokens: Iterator[tuple[np.ndarray, Cache]], writers: list[_Writer]) -> Iterator[Piece]:
        statistics, begin, first, compiled_s = self.statistics, time.perf_counter(), None, compiling.compile_s()
        for step, (row, cache) in enumerate(tokens):
            now = time.perf_counter()
            if first is None:
                first, statistics.prefill_s = now, now - begin
            statistics.decode_s, statistics.decode_steps = now - first, step
            statistics.link_bytes += cache.bytes_per_step if step else 0  # this step's: no flush is issued ahead
            statistics.miss = cache.miss
            statistics.compile_s = compiling.compile_s() - compiled_s
            statistics.recompiled, statistics.longest_wait_s = cache.recompiled, cache.longest_wait_s
            statistics.peak_device_bytes = memory.peak_device_bytes()
            statistics.peak_host_bytes = memory.peak_host_bytes()
            for index, (writer, token) in enumerate(zip(writers, row.tolist(), strict=True)):
                if writer.output.finish_reason is None:
                    text = writer.write(token)
                    statistics.new_tokens += 1
                    yield Piece(index, text, token, writer.output.finish_reason)
            if all(output.finish_reason for output in self.outputs):
                return


def load(
    model: str | Path = checkpoint.BUNDLED,
    dtype: str | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
) -> tuple[Model, Tokenizer]:
    """A model and its tokenizer from a directory or a hub id; the bundled model by default.

    Args:
        dtype: "float32", "bfloat16" or "float16"; None is the checkpoint's own, and float32 on a CPU.
        progress: called with (bytes read, bytes in all).
        revision: branch, tag or commit of a hub id; None is its main branch.

    Raises:
        ValueError: there is no such model, it is of an unknown type, or its files are damaged; names which.
    """
    directory = checkpoint.find(model, revision)
    return checkpoint.load_model(directory, dtype, progress), checkpoint.load_tokenizer(directory)


def stream(
    model: Model,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] = (),
    ignore_eos: bool = False,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    progress: Progress | None = None,
    **placement: Any,
) -> Stream:
    """Generate from a batch of prompts, handing out pieces of text as they are made.

    Args:
        max_new_tokens, stop, ignore_eos: when a sequence ends; see `Until`.
        temperature, top_k, top_p, min_p: how tokens are drawn; see `Sampling`. Greedy by default.
        seed: with the prompt it decides a sampled output: neighbours in the batch and the split do not.
        chat: whether prompts are a user's turns for the tokenizer's chat template.
        progress: called with (layers done, layers in all) during prefill.
        placement: where the cache is held and how it is used (split, recompute, engine, offload, …); see `Request`.

    Raises:
        ValueError: an option is out of range, or a prompt is empty or too long.
        MemoryError: the plan does not fit the device or the host.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    sampling.check()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    until = Until(max_new_tokens, stops, frozenset() if ignore_eos else frozenset(model.config.eos_token_ids))
    request = Request(**placement)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = encode(tokenizer, texts, chat)
    decoder = Decoder(model)
    plan = decoder.plan(ids, max_new_tokens, request)
    return Stream(decoder, tokenizer, texts, ids, plan, until, sampling, seed, progress)


def generate(model: Model, tokenizer: Tokenizer, prompts: str | Sequence[str], **options: Any) -> list[Output]:
    """Generate from a batch of prompts and return when all are done. The options are those of `stream`."""
    running = stream(model, tokenizer, prompts, **options)
    for _ in running:
        pass
    return running.outputs
