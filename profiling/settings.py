"""What a benchmark of decoding measures: a model's shape by name, batch, prompt; its options, prompts and report."""

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvpr_jax import checkpoint, engines
from kvpr_jax.command_line import Parser
from kvpr_jax.config import ModelConfig
from kvpr_jax.models import Model, released
from kvpr_jax.profiling import measure, plot, report
from kvpr_jax.runtime import Decoder


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured. Refuses numbers below 1.

    Attributes:
        model: a released size, or a config.json or its directory.
        layers: only so many of its layers, or None.
        batch: B.
        prompt: tokens of each prompt.
        new_tokens: steps timed.
        dtype: of the weights, by name.
    """

    model: str
    layers: int | None
    batch: int
    prompt: int
    new_tokens: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("layers", "batch", "prompt", "new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', '-')} {value} must be at least 1")

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Setting":
        """That of the options of `add_options`."""
        return cls(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(cls)})

    def check(self, out: Path, picture: Path | None = None) -> None:
        """Make sure that it can be measured, written to `out` and drawn, before anything takes long.

        Raises:
            ValueError: the model is unknown, or a file cannot be written.
        """
        shape(self.model, self.layers)
        if picture is not None:
            plot.check(picture)
        report.prepare(out)

    def decoder(self) -> Decoder:
        """The model with random weights.

        Raises:
            ValueError: it is unknown.
        """
        config = shape(self.model, self.layers)
        positions = self.prompt + self.new_tokens + 32  # random weights: any number will do
        config = dataclasses.replace(config, max_positions=max(config.max_positions, positions))
        return Decoder(Model(config, dtype=jnp.dtype(self.dtype), rngs=nnx.Rngs(0)))

    def prompts(self, decoder: Decoder) -> list[list[int]]:
        """Random tokens, the same each time."""
        rng = np.random.default_rng(0)
        return rng.integers(3, decoder.config.vocab_size, (self.batch, self.prompt)).tolist()

    def default_out(self, benchmark: str) -> Path:
        """The file of a benchmark's report, under the current directory."""
        layers = "" if self.layers is None else f"-layers-{self.layers}"
        name = f"{benchmark}-{dashed(name_of(self.model))}-batch-{self.batch}-prompt-{self.prompt}{layers}.json"
        return Path("profiling/results", dashed(jax.local_devices()[0].device_kind), name)

    def report(
        self, benchmark: str, argv: Sequence[str], decoder: Decoder, engine: engines.Engine = "overlapped"
    ) -> dict[str, Any]:
        """What every report of a benchmark of decoding begins with."""
        config = decoder.config
        return report.header(benchmark, argv) | {
            "setting": {
                "model": name_of(self.model),
                "layers": config.num_layers,
                "dtype": self.dtype,
                "batch": self.batch,
                "prompt": self.prompt,
                "engine": engine,
            },
            "profile": dataclasses.asdict(measure.load_or_measure(config, decoder.dtype, self.batch)),
        }


def shape(model: str, layers: int | None) -> ModelConfig:
    """The config of a released size by name, or of a config.json or its directory; with fewer layers if so asked.

    Raises:
        ValueError: neither.
    """
    path = Path(model)
    if path.is_dir() or (path.name == "config.json" and path.is_file()):
        config, _ = checkpoint.read_config(path if path.is_dir() else path.parent)
    else:
        config = released.release(model).config
    return config if layers is None else dataclasses.replace(config, num_layers=layers)


def name_of(model: str) -> str:
    """What a model is called in a report: the last part of its name, or its directory's."""
    path = Path(os.path.abspath(model))
    return path.parent.name if path.name == "config.json" else path.name


def dashed(text: str) -> str:
    """In lower case, with dashes between words: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def add_options(parser: Parser, new_tokens: int = 64, several: bool = False) -> None:
    """What is measured: the fields of a `Setting`.

    Args:
        new_tokens: the default.
        several: whether model, batch and prompt may be given several times; each then is a list.
    """
    add = parser.add_argument
    for name, default, options, text in (
        ("model", "opt-6.7b", {}, "a released size (models/README.md), or a directory"),
        ("batch", 32, {"metavar": "N", "type": int}, "sequences"),
        ("prompt", 1024, {"metavar": "N", "type": int}, "tokens of each prompt"),
    ):
        if several:
            add(f"--{name}", action=Several, default=[default], help=f"{text}; may be given several times", **options)
        else:
            add(f"--{name}", default=default, help=text, **options)
    add("--layers", metavar="N", type=int, help="only so many layers, where host memory is short")
    add("--new-tokens", metavar="N", type=int, default=new_tokens, help="steps timed")
    add("--dtype", choices=checkpoint.DTYPES, default="bfloat16")


class Several(argparse.Action):
    """Gathers the values of an option in a list, which the first one begins anew in place of the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        held = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [values] if held is self.default else [*held, values])
