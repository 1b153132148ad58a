"""What the command lines share: exit codes, one line an error, notes and progress bars on stderr."""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, get_args

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from kvpr_jax.engines import Engine
from kvpr_jax.plan import OffloadMode, Request
from kvpr_jax.profiling import profile

USAGE, FAILURE, INTERRUPTED = 2, 1, 130
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # how JAX's errors of that kind begin


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line each."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog.removeprefix('python -m ')}: error: {message}\n")


def add_cache_options(parser: Parser, split_of: str, offload: OffloadMode, offload_help: str) -> None:
    """The options that make up a `Request`."""
    add = parser.add_argument_group("cache").add_argument
    add("--split", metavar="auto|N|P%", default="auto", help=split_of)
    add("--recompute", choices=("auto", "project", "absorb"), default="auto", help="how activations are used")
    add("--engine", choices=get_args(Engine), default="overlapped")
    add("--offload", choices=get_args(OffloadMode), default=offload, help=offload_help)
    add("--device-cache-gib", metavar="GIB", type=float, help="device memory for the cache, at most, the tail "
        "of new tokens included (twice, where full ones leave); default: what the run leaves free")  # fmt: skip
    add("--host-cache-gib", metavar="GIB", type=float, help="host memory for the cache, at most; default: what "
        "is free")  # fmt: skip
    parser.add_argument("--no-compilation-cache", action="store_true", help="compile anew, and keep nothing for later")


def request_of(arguments: argparse.Namespace) -> Request:
    """The `Request` that those options make up; raises ValueError as it does."""
    fields = ("split", "recompute", "engine", "offload", "device_cache_gib", "host_cache_gib")
    return Request(**{name: getattr(arguments, name) for name in fields})


def keep_compiled(arguments: argparse.Namespace) -> None:
    """Keep compiled functions for later runs in the user's cache directory, as those options say.

    Where JAX was told where to keep them, it stays so.
    """
    told = jax.config.jax_compilation_cache_dir is not None  # pyright: ignore[reportAttributeAccessIssue]
    if not told and not arguments.no_compilation_cache:
        directory = profile.cache_directory() / "compiled"
        with contextlib.suppress(OSError):  # a home that cannot be written costs compilation each time, no more
            directory.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(directory))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small functions are many


class Failure(Exception):
    """An error with the exit code it ends the command with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def failing_with(code: int) -> Iterator[None]:
    """Turns errors that the library explains into a `Failure` of this exit code."""
    try:
        yield
    except MemoryError as error:
        raise Failure(str(error), FAILURE) from error
    except ValueError as error:
        raise Failure(str(error), code) from error


def run(module: str, command: Callable[[], int], debug: bool = False) -> int:
    """Carry out a command and return the exit code; what it fails with is one line on stderr, and so is a warning.

    Args:
        module: what the line begins with.
        debug: whether errors are raised instead.
    """

    def show(message: Warning | str, *_: Any) -> None:
        print(f"{module}: warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except (Failure, jax.errors.JaxRuntimeError) as error:  # JAX's: memory beyond what was planned, a lost device
        if debug:
            raise
        text = str(error).splitlines()[0]
        if text.startswith(OUT_OF_MEMORY):
            text += (
                "; what would help: a smaller memory budget, fewer or shorter prompts, or less taken by other programs"
            )
        print(f"{module}: error: {text}", file=sys.stderr)
        return error.code if isinstance(error, Failure) else FAILURE
    except OSError as error:  # stdout: a full disk, or a reader that has gone, as in `… | head`, which is no error
        if not isinstance(error, BrokenPipeError):
            print(f"{module}: error: the output cannot be written: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE


class Reporter:
    """What is said on stderr: notes, and progress bars if it is a terminal. If quiet, neither, and no warnings."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        if quiet:
            warnings.simplefilter("ignore")
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def bar(self, description: str, in_bytes: bool = False) -> Iterator[Any]:
        """A function of (done, total) that draws a bar, which is gone afterwards."""
        amount: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [TaskProgressColumn()]
        columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeElapsedColumn())
        hidden = self.quiet or not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as progress:
            task = progress.add_task(description, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
