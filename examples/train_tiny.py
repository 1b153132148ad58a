"""Train the bundled model: a small OPT that writes Python documentation, from text that ships with CPython.

    python examples/train_tiny.py

The text is `pydoc_data.topics` and the docstrings of the standard library; about one document in twenty is held out.
A byte-level BPE and the weights are learnt from the others. They are written to models/tiny in Hugging Face format, and
README.md beside them with everything measured. A run that was interrupted goes on from its last Orbax checkpoint with
the same tokens as if nothing had happened.
"""

import argparse
import ast
import dataclasses
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tokenizers
import transformers
from flax import nnx
from jaxtyping import Array, Float, Int, UInt16
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvpr_jax.checkpoint import load_model, read_config, save_weights
from kvpr_jax.config import ModelConfig
from kvpr_jax.models import Model

ROOT = Path(__file__).resolve().parent.parent
NOT_DOCUMENTED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data"}
PAD, END = "<pad>", "</s>"  # END stands before every document, as OPT has it before every prompt
PAD_ID, END_ID = 0, 1
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Codes = Int[np.ndarray, " N"]
Params = Any  # nnx.State; any tree of arrays to optax
State = dict[str, Params | optax.OptState]  # what a checkpoint holds beside the Run: "params" and "moments"
PROMPT = "Open a file and"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome.

    Attributes:
        seed: of the initial weights and of the order of the text.
        steps: of the optimiser.
        short_share: share of the steps, the first ones, that train on short windows only. After them every other step
            trains on windows of the model's full length, without which more context than `short` does harm.
        short: tokens of a short window.
        rows: full-length windows that a step has as many tokens as.
        learning_rate: peak. Linear warm-up, a cosine down to about half in the short steps, then linear to zero.
        adam_share: Adam's learning rate over Muon's.
        warmup_share: share of the short steps.
        weight_decay: of the layers' kernels.
        evaluate_every: steps between looks at the held-out part, each followed by an Orbax checkpoint.
        vocab_size, num_layers, hidden_size, num_heads, max_positions: shape of the model.
    """

    seed: int = 0
    steps: int = 2600
    short_share: float = 3 / 4
    short: int = 256
    rows: int = 2
    learning_rate: float = 1e-2
    adam_share: float = 0.3
    warmup_share: float = 0.1
    weight_decay: float = 0.1
    evaluate_every: int = 100
    vocab_size: int = 2048
    num_layers: int = 6
    hidden_size: int = 192
    num_heads: int = 6
    max_positions: int = 1024

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.max_positions

    @property
    def short_steps(self) -> int:
        return round(self.steps * self.short_share)

    def window(self, step: int) -> int:
        """Tokens of the windows of a step."""
        return self.max_positions if step >= self.short_steps and step % 2 else self.short


# The text


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Both parts of the text, twice.

    Attributes:
        train, held: bytes of all documents, each closed by a zero byte.
        train_tokens, held_tokens: END and the documents in tokens, each closed by END.
    """

    train: bytes
    held: bytes
    train_tokens: UInt16[np.ndarray, " N"]
    held_tokens: UInt16[np.ndarray, " M"]

    @classmethod
    def encode(cls, train: list[str], held: list[str], tokenizer: transformers.PreTrainedTokenizerBase) -> "Corpus":
        def in_bytes(texts: list[str]) -> bytes:
            return b"".join(text.encode() + b"\0" for text in texts)

        def in_tokens(texts: list[str]) -> UInt16[np.ndarray, " N"]:
            encoded = tokenizer(texts, verbose=False)["input_ids"]  # END first, each time
            return np.array([*itertools.chain.from_iterable(encoded), END_ID], np.uint16)

        return cls(in_bytes(train), in_bytes(held), in_tokens(train), in_tokens(held))


def documents() -> list[str]:
    """Topics and docstrings, each text once, in an order that only the CPython version decides."""
    found = [text.strip() for _, text in sorted(topics.items())]
    found += docstrings(Path(sysconfig.get_path("stdlib")))
    return list({text.split("\n", 1)[-1]: text for text in found}.values())


def docstrings(root: Path) -> Iterator[str]:
    """Every docstring of a standard library below a heading: the module, or a qualified name and its signature."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).with_suffix("")
        if NOT_DOCUMENTED.isdisjoint(relative.parts):
            module = ".".join(relative.parts).removesuffix(".__init__")
            yield from docstrings_in(ast.parse(path.read_bytes()), module)


def docstrings_in(node: Documented, name: str) -> Iterator[str]:
    """The docstring of a module, class or function called `name`, then those inside it."""
    text = ast.get_docstring(node)
    if text:
        yield f"{heading(node, name)}\n\n{text.strip()}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings_in(child, f"{name}.{child.name}")


def heading(node: Documented, name: str) -> str:
    match node:
        case ast.ClassDef(bases=bases):
            return f"class {name}({', '.join(map(ast.unparse, bases))})".removesuffix("()")
        case ast.FunctionDef(args=args) | ast.AsyncFunctionDef(args=args):
            return f"{name}({re.sub(r'^(self|cls)(, /)?(, )?', '', ast.unparse(args))})"
        case _:
            return f"module {name}"


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents: one in twenty is held out, by the hash of its first line.

    Some documents quote others, so held-out ones lose the paragraphs that a training document has too.
    """
    train, held = [], []
    for text in texts:
        digest = hashlib.sha256(text.split("\n", 1)[0].encode()).digest()
        (held if digest[0] * 20 < 256 else train).append(text)
    seen = {paragraph for text in train for paragraph in text.split("\n\n")}
    unseen = ("\n\n".join(p for p in text.split("\n\n") if p not in seen) for text in held)
    return train, [text for text in unseen if text]


# The files of a Hugging Face model


def write_tokenizer(texts: list[str], recipe: Recipe, out: Path) -> None:
    """A byte-level BPE: any text comes back exactly. Encoding puts END in front, as OPT's does."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[PAD, END],  # they get the first ids
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, END_ID)]
    )
    bpe.save(str(out / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": recipe.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def write_config(recipe: Recipe, out: Path) -> None:
    config = transformers.OPTConfig(
        architectures=["OPTForCausalLM"],
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        ffn_dim=4 * recipe.hidden_size,
        max_position_embeddings=recipe.max_positions,
        word_embed_proj_dim=recipe.hidden_size,
        dropout=0.0,
        pad_token_id=PAD_ID,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        dtype="float16",
    )
    config.save_pretrained(out)
    generation = transformers.GenerationConfig(pad_token_id=PAD_ID, bos_token_id=END_ID, eos_token_id=END_ID)
    generation.save_pretrained(out)


def write_weights(model: Model, out: Path) -> None:
    """Replace model.safetensors in one step: whoever reads it sees the old or the new weights."""
    part = out / "model.safetensors.part"
    save_weights(model, part, "float16")
    part.chmod(0o644)
    part.replace(out / "model.safetensors")


# Training


class Windows:
    """Which windows of the training text a step sees: a function of the seed and the step's number alone.

    Every other window starts with a document, at position 0, as a prompt does. The rest start at any token and at any
    position, so that short windows train all of the model's positions.
    """

    def __init__(self, corpus: Corpus, recipe: Recipe) -> None:
        self.tokens, self.recipe = corpus.train_tokens, recipe
        self.documents = np.flatnonzero(self.tokens[: -recipe.max_positions] == END_ID)

    def at(self, step: int) -> tuple[Int[np.ndarray, "rows B Q1"], Int[np.ndarray, "rows B"]]:
        """Windows in `rows` equal pieces, each with one token more than its length, and their first positions."""
        rows, window = self.recipe.rows, self.recipe.window(step)
        count = self.recipe.tokens_per_step // window
        rng = np.random.default_rng([self.recipe.seed, step])
        first = rng.integers(len(self.tokens) - window, size=count)
        position = rng.integers(self.recipe.max_positions - window, size=count, endpoint=True)
        first[::2] = rng.choice(self.documents, len(first[::2]))
        position[::2] = 0
        tokens = self.tokens[first[:, None] + np.arange(window + 1)].astype(np.int32)
        return tokens.reshape(rows, -1, window + 1), position.reshape(rows, -1).astype(np.int32)


def new_model(config: ModelConfig, recipe: Recipe) -> Model:
    """Random weights, but for positions: sinusoids (arXiv 1706.03762, section 3.5) as large as the token embeddings.

    One rotation then leads from every position to the one before it, where random positions would have to be told apart
    one by one before a head can look one token back.
    """
    model = Model(config, dtype=jnp.float32, rngs=nnx.Rngs(recipe.seed))
    table = model.embedder.positions.embedding
    count, width = table.shape
    angles = np.arange(count)[:, None] * count ** (-2 * np.arange(width // 2) / width)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1) * math.sqrt(2 / width)
    table.set_value(jnp.asarray(waves, jnp.float32))
    return model


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for the layers' kernels and Adam for the rest; AdamW alone learns more slowly from as many tokens."""
    short = recipe.short_steps
    falling = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=recipe.learning_rate,
        warmup_steps=round(short * recipe.warmup_share),
        decay_steps=2 * short,
        end_value=recipe.learning_rate / 1000,
    )
    ending = optax.linear_schedule(falling(short), 0.0, recipe.steps - short)
    rate = optax.join_schedules([falling, ending], [short])
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            rate,
            weight_decay=recipe.weight_decay,
            adam_b2=0.98,
            adam_learning_rate=lambda step: recipe.adam_share * rate(step),
            muon_weight_dimension_numbers=kernels,
            consistent_rms=0.2,  # updates as large as Adam's, so that one learning rate suits both
        ),
    )


def kernels(params: Params) -> Params:
    """What Muon takes as matrices."""
    return jax.tree.map_with_path(
        lambda path, _: optax.contrib.MuonDimensionNumbers() if "kernel" in jax.tree_util.keystr(path) else None, params
    )


def nats(
    params: Params,
    inputs: Int[Array, "B Q"],
    targets: Int[Array, "B Q"],
    positions: Int[Array, " B"],
    graphdef: nnx.GraphDef,
) -> Float[Array, "B Q"]:
    """Cross-entropy of `targets`, each after the `inputs` up to its own place; `positions` of the first inputs."""
    # The model takes the slot where a sequence starts: slots below it are padding. One before slot 0 shifts positions.
    logits = nnx.merge(graphdef, params)(inputs, -positions)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


@partial(jax.jit, static_argnames=("graphdef", "optimizer", "recipe"), donate_argnames=("params", "moments"))
def train_step(
    params: Params,
    moments: optax.OptState,
    tokens: Int[Array, "rows B Q1"],
    positions: Int[Array, "rows B"],
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
) -> tuple[Params, optax.OptState, Float[Array, ""]]:
    """One step of the optimiser; compiled twice, for short windows and for long ones.

    Returns:
        New parameters and moments, and the step's mean loss in nats a token.
    """
    inputs, targets = tokens[..., :-1], tokens[..., 1:]

    def add(total: Params, row: tuple[Array, Array, Array]) -> tuple[Params, Float[Array, ""]]:
        loss, gradient = jax.value_and_grad(lambda params: nats(params, *row, graphdef).mean())(params)
        return jax.tree.map(jnp.add, total, gradient), loss

    # Row by row: attention scores of all rows at once do not fit a CPU's cache, which is half as fast.
    total, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (inputs, targets, positions))
    gradient = jax.tree.map(lambda leaf: leaf / recipe.rows, total)
    updates, moments = optimizer.update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments, losses.mean()


@dataclasses.dataclass
class Run:
    """How far a run has come; kept with each Orbax checkpoint.

    Attributes:
        recipe: what is trained; a checkpoint of another recipe or text is not continued.
        text: digest of the training text.
        step: steps done.
        seconds: spent on them, evaluations included.
    """

    recipe: dict[str, int | float]
    text: str
    step: int = 0
    seconds: float = 0.0


def train(recipe: Recipe, corpus: Corpus, workdir: Path, out: Path, console: Console) -> Run:
    """Train from the start or from the last checkpoint in `workdir`; the weights so far are in `out` at any time.

    Raises:
        ValueError: `workdir` holds the checkpoints of something else.
    """
    config, _ = read_config(out)
    graphdef, params = nnx.split(new_model(config, recipe))
    optimizer = make_optimizer(recipe)
    state = {"params": params, "moments": optimizer.init(params)}
    run = Run(dataclasses.asdict(recipe), hashlib.sha256(corpus.train).hexdigest())
    windows = Windows(corpus, recipe)
    step = partial(train_step, graphdef=graphdef, optimizer=optimizer, recipe=recipe)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(workdir.resolve(), options=options) as checkpoints, progress_bar(console) as progress:
        if checkpoints.latest_step() is not None:
            run, state = resume(checkpoints, run, state)
            console.print(f"going on from step {run.step} in {workdir}")
        bar = progress.add_task("", total=recipe.steps, completed=run.step)
        while run.step < recipe.steps:
            started, losses = time.perf_counter(), []
            for _ in range(min(recipe.evaluate_every, recipe.steps - run.step)):
                tokens, positions = windows.at(run.step)
                params, moments, loss = step(**state, tokens=tokens, positions=positions)
                state = {"params": params, "moments": moments}
                losses.append(float(loss))
                run.step += 1
                progress.update(bar, completed=run.step, description=f"{losses[-1]:.3f} nats/token")
            model = nnx.merge(graphdef, state["params"])
            bits = held_out_bits(model, corpus.held_tokens) / len(corpus.held)
            write_weights(model, out)
            run.seconds += time.perf_counter() - started
            console.print(
                f"step {run.step:5}  train {np.mean(losses):.3f} nats/token  held-out {bits:.3f} bits/byte  "
                f"{run.seconds:.0f} s"
            )
            save(checkpoints, run, state)
    return run


def save(checkpoints: ocp.CheckpointManager, run: Run, state: State) -> None:
    arguments = {"state": ocp.args.StandardSave(state), "run": ocp.args.JsonSave(dataclasses.asdict(run))}
    checkpoints.save(run.step, args=ocp.args.Composite(**arguments))


def resume(checkpoints: ocp.CheckpointManager, run: Run, state: State) -> tuple[Run, State]:
    """The last checkpoint of a run that was to start as `run` and `state`."""
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    arguments = {"state": ocp.args.StandardRestore(shapes), "run": ocp.args.JsonRestore()}
    restored = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.Composite(**arguments))
    last = Run(**restored["run"])
    if (last.recipe, last.text) != (run.recipe, run.text):
        raise ValueError(f"{checkpoints.directory} holds a run of another recipe or text; remove it or give --workdir")
    return last, restored["state"]


def progress_bar(console: Console) -> Progress:
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    return Progress(TextColumn("training"), *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


# What README.md reports


@partial(jax.jit, static_argnames="graphdef")
def score(params: Params, tokens: Int[Array, " Q1"], graphdef: nnx.GraphDef) -> Float[Array, " Q"]:
    """Nats of every token but the first."""
    return nats(params, tokens[None, :-1], tokens[None, 1:], jnp.zeros(1, jnp.int32), graphdef)[0]


def held_out_bits(model: Model, tokens: UInt16[np.ndarray, " N"]) -> float:
    """Bits of the held-out documents, each on its own from its start and to its end, as `model` is prompted.

    A document longer than the model's positions is cut into that many tokens at a time, each piece on its own.
    """
    graphdef, params = nnx.split(model)
    window, total = model.config.max_positions, 0.0
    ends = np.flatnonzero(tokens == END_ID).tolist()
    for start, end in itertools.pairwise(ends):
        for first in range(start, end, window):
            piece = tokens[first : min(end, first + window) + 1].astype(np.int32)
            length = 1 << (len(piece) - 2).bit_length()  # a power of two: few lengths to compile for
            losses = score(params, np.pad(piece, (0, length + 1 - len(piece))), graphdef)
            total += float(losses[: len(piece) - 1].sum())
    return total / math.log(2)


def gzip_bits(text: bytes, before: bytes = b"") -> int:
    """Bits that `text` adds to `gzip -9` of what comes `before` it."""
    return 8 * (len(gzip.compress(before + text, 9)) - (len(gzip.compress(before, 9)) if before else 0))


def ngram_bits(train: bytes, text: bytes, order: int) -> float:
    """Bits of `text` under byte statistics of `train`, each byte given the `order` bytes before it.

    Interpolated Witten-Bell smoothing: where a context was followed by N bytes, of T kinds, c of them this one,
    p = (c + T·p') / (N + T), with p' the same for the context without its first byte, and 1/256 below the empty one.
    """

    def codes(data: bytes, length: int) -> Codes:
        """Each byte and the `length` bytes before it as one number; zeros stand before the first."""
        padded = np.frombuffer(bytes(length) + data, np.uint8).astype(np.int64)
        number = np.zeros(len(data), np.int64)
        for i in range(length + 1):
            number = number << 8 | padded[i : i + len(data)]
        return number

    def look_up(keys: Codes, values: Codes, wanted: Codes) -> Codes:
        """The value of each of the `wanted` among the sorted `keys`, 0 where it is not among them."""
        index = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        return np.where(keys[index] == wanted, values[index], 0)

    p = np.full(len(text), 1 / 256)
    for length in range(order + 1):
        grams, counts = np.unique(codes(train, length), return_counts=True)
        contexts, first, kinds = np.unique(grams >> 8, return_index=True, return_counts=True)
        wanted = codes(text, length)
        c = look_up(grams, counts, wanted)
        n = look_up(contexts, np.add.reduceat(counts, first), wanted >> 8)
        t = look_up(contexts, kinds, wanted >> 8)
        p = np.where(n > 0, (c + t * p) / np.maximum(n + t, 1), p)
    return float(-np.log2(p).sum())


def write_on(
    model: Model, tokenizer: transformers.PreTrainedTokenizerBase, prompt: str, new: int, temperature: float
) -> str:
    """`prompt` and up to `new` tokens after it, the likeliest ones where `temperature` is 0. Slow: without a cache."""
    tokens = tokenizer(prompt)["input_ids"]
    length = len(tokens) + new
    forward = nnx.jit(lambda model, padded, last: model(padded)[0, last])
    rng = np.random.default_rng(0)
    while len(tokens) < length:
        padded = np.pad(np.array([tokens], np.int32), ((0, 0), (0, length - len(tokens))))
        logits = np.asarray(forward(model, padded, len(tokens) - 1))
        token = int(np.argmax(logits + temperature * rng.gumbel(size=logits.shape)))
        if token == END_ID:
            break
        tokens.append(token)
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def readme(recipe: Recipe, run: Run, corpus: Corpus, out: Path) -> str:
    """README.md of the model in `out`, measured on the weights as they are stored there."""
    model = load_model(out, "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ngram = "order-3 n-gram of bytes, made from the training part, interpolated Witten-Bell"
    bits = {
        "this model as stored, each document on its own": held_out_bits(model, corpus.held_tokens),
        ngram: ngram_bits(corpus.train, corpus.held, 3),
        "`gzip -9` of the held-out part alone": gzip_bits(corpus.held),
        "`gzip -9` of both parts, less `gzip -9` of the training part": gzip_bits(corpus.held, corpus.train),
    }
    table = "\n".join(f"| {name} | {value / len(corpus.held):.3f} |" for name, value in bits.items())
    packages = "jax", "flax", "optax", "orbax-checkpoint", "tokenizers", "transformers"
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    manners = {"The likeliest token each time": 0.0, "Sampled at temperature 0.7": 0.7}
    samples = "\n\n".join(
        f"{manner}:\n\n```text\n{write_on(model, tokenizer, PROMPT, 200, temperature)}\n```"
        for manner, temperature in manners.items()
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    return f"""\
# tiny: a small OPT that writes Python documentation

{parameters:,} parameters in float16: {recipe.num_layers} layers of width {recipe.hidden_size} with \
{recipe.num_heads} heads, {recipe.max_positions} positions, a byte-level BPE of {recipe.vocab_size} tokens. It is for \
demonstrations and tests: what it writes reads like documentation and is not to be believed.

This file and those beside it are what `python examples/train_tiny.py` writes.

## Text

`pydoc_data.topics` and the docstrings of the standard library of CPython {platform.python_version()}, each once: \
{len(corpus.train):,} bytes ({len(corpus.train_tokens):,} tokens) to train on and {len(corpus.held):,} bytes \
({len(corpus.held_tokens):,} tokens) held out. Held out is one document in twenty, by the hash of its first line, \
without the paragraphs that a training document has too. The text is part of CPython, copyright Python Software \
Foundation, under the [PSF License Agreement](https://docs.python.org/3/license.html).

## Training

{run.step:,} steps of {recipe.tokens_per_step:,} tokens, {run.step * recipe.tokens_per_step:,} tokens in all \
({run.step * recipe.tokens_per_step / len(corpus.train_tokens):.1f} times the training part), in {run.seconds:,.0f} s \
on {os.cpu_count()} CPU cores; {versions}. The weights are those of the last step: the held-out part decided nothing. \
Everything else is `Recipe` in the script.

## Held-out part

| | bits per byte |
|---|---|
{table}

The end of a document counts as one more byte of it, in every row.

## Sample

The prompt is `{PROMPT}`.

{samples}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model on the documentation in CPython.")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "tiny", help="where the model goes")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "tiny", help="where Orbax checkpoints go")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="steps of the optimiser (%(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of weights and data (%(default)s)")
    arguments = parser.parse_args()
    recipe, out, console = Recipe(seed=arguments.seed, steps=arguments.steps), arguments.out, Console()

    out.mkdir(parents=True, exist_ok=True)
    train_texts, held_texts = split(documents())
    write_tokenizer(train_texts, recipe, out)
    write_config(recipe, out)
    corpus = Corpus.encode(train_texts, held_texts, transformers.AutoTokenizer.from_pretrained(out))
    console.print(f"{len(corpus.train_tokens):,} tokens to train on, {len(corpus.held_tokens):,} held out")
    run = train(recipe, corpus, arguments.workdir, out, console)
    (out / "README.md").write_text(readme(recipe, run, corpus, out))
    console.print(f"{out}: written after {run.step} steps")


if __name__ == "__main__":
    main()
