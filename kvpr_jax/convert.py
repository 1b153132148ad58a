"""Command line: `python -m kvpr_jax.convert SRC DST` writes a model as an Orbax checkpoint that every command loads.

DST appears whole or not at all: it is written as a hidden directory beside it, which is renamed at the end. What an
interrupted conversion left behind is removed by the next one.
"""

import argparse
import contextlib
import glob
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvpr_jax import checkpoint, converted
from kvpr_jax.command_line import FAILURE, USAGE, Parser, Reporter, failing_with, run


def check_destination(destination: Path) -> None:
    """Refuse one that holds something already.

    Raises:
        ValueError: it is a file, or a directory that is not empty.
    """
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ValueError(f"DST {str(destination)!r} exists and is not an empty directory; give another or remove it")


def convert(source: str | Path, destination: Path, dtype: str | None, revision: str | None, report: Reporter) -> None:
    """Write the model `source` (a directory or a hub id) to the directory `destination`.

    Args:
        dtype: of the parameters; None is the one that config.json names, else float32.

    Raises:
        ValueError: there is no such model or its files are damaged, or `destination` cannot be written.
    """
    directory = checkpoint.find(source, revision)
    _, hf = checkpoint.read_config(directory)
    dtype = dtype or checkpoint.stored_dtype(hf)
    try:
        with _appearing_whole(destination) as temporary:
            with report.bar("Reading the model", in_bytes=True) as progress:
                model = checkpoint.load_model(directory, dtype, progress)
            _copy_other_files(directory, temporary, dtype)
            with report.bar("Writing the model", in_bytes=True) as progress:
                converted.write(model, temporary, progress)
    except OSError as error:
        raise ValueError(f"DST {str(destination)!r} cannot be written: {error}") from error


def _copy_other_files(source: Path, destination: Path, dtype: str) -> None:
    """Everything but weights: the tokenizer's files, generation_config.json, and config.json with its new dtype."""
    for pattern in checkpoint.OTHER_FILES:
        for path in source.glob(pattern):
            if path.name != converted.MANIFEST and not path.name.endswith(".index.json"):
                shutil.copyfile(path, destination / path.name)
    fields = json.loads((source / "config.json").read_text())
    fields.pop("torch_dtype", None)  # the name of this field in older files
    (destination / "config.json").write_text(json.dumps(fields | {"dtype": dtype}, indent=2) + "\n")


@contextlib.contextmanager
def _appearing_whole(destination: Path) -> Iterator[Path]:
    """A new directory that becomes `destination` when all went well, and else is removed."""
    parent, prefix = destination.parent, f".{destination.name}.converting-"
    parent.mkdir(parents=True, exist_ok=True)
    for left_over in parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(left_over)
    temporary = parent / f"{prefix}{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        temporary.rename(destination)
        _sync(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    """Have the disk hold a file, or a directory's names, before anything that is done later."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parser() -> Parser:
    parser = Parser(
        prog="python -m kvpr_jax.convert",
        description="Write a model as an Orbax checkpoint, which every --model takes.",
    )
    parser.add_argument("source", metavar="SRC", help="directory or hub id")
    parser.add_argument("destination", metavar="DST", help="directory to be made")
    parser.add_argument("--dtype", choices=checkpoint.DTYPES, help="default: the checkpoint's own")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of a hub model; default: main")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    """Carry out a parsed command line and return the exit code."""
    destination, report = Path(arguments.destination).resolve(), Reporter(quiet=False)
    with failing_with(USAGE):
        check_destination(destination)
    with failing_with(FAILURE):
        convert(arguments.source, destination, arguments.dtype, arguments.revision, report)
    report.note(f"wrote {arguments.destination}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    return run("kvpr_jax.convert", lambda: execute(arguments))


if __name__ == "__main__":
    sys.exit(main())
