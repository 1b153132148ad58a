"""What every benchmark writes beside its figures: the machine, the versions, a table, one JSON file.

`python -m kvpr_jax.profiling.report FOLDER` writes the tables of all reports in a folder to its README.md, each below
the command that measured it.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from kvpr_jax._version import __version__
from kvpr_jax.command_line import FAILURE, Parser, failing_with, run
from kvpr_jax.profiling import files, nvidia

PICTURES = (".svg", ".png")  # beside a report, with its name
MORE_TABLES = ("growth", "summary")  # of some reports, behind the one that all have
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")


def header(module: str, argv: Sequence[str]) -> dict[str, Any]:
    """The command, the day, the machine and the versions."""
    return {
        "command": f"python -m kvpr_jax.profiling.{module} {shlex.join(argv)}",
        "date": datetime.date.today().isoformat(),
        "machine": {
            "device": jax.local_devices()[0].device_kind,
            "driver": nvidia.driver(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "versions": {"kvpr_jax": __version__, "python": platform.python_version()} | installed(),
    }


def installed() -> dict[str, str]:
    """Versions of those of `PACKAGES` that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table; the first row's keys are the heading."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def median_ms(seconds: Sequence[float]) -> str:
    """The median, in milliseconds."""
    return f"{statistics.median(seconds) * 1e3:.2f}"


def min_to_max(seconds: Sequence[float]) -> str:
    """The least and the most, in milliseconds."""
    return f"{min(seconds) * 1e3:.2f} to {max(seconds) * 1e3:.2f}"


def prepare(path: Path) -> None:
    """Make the folder of a file that is to be written, before anything takes long.

    Raises:
        ValueError: there can be no such file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be written: {error}") from error
    if path.is_dir():
        raise ValueError(f"{str(path)!r} cannot be written: it is a directory")


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON, as `files.write` does.

    Raises:
        ValueError: the file cannot be written.
    """
    prepare(path)
    try:
        files.write(path, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be written: {error}") from error


def page(folder: Path) -> str:
    """The README of a folder of reports: what stands before its first section, and a section for each report.

    Raises:
        ValueError: there are no reports, or a file is none; names it.
    """
    readme = folder / "README.md"
    before = readme.read_text().split("\n## ")[0].strip() if readme.is_file() else f"# {folder.name}"
    sections = [before]
    for path in sorted(folder.glob("*.json")):
        try:
            report = json.loads(path.read_text())
            versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
            tables = [table(report["table"]), *(table(report[name]) for name in MORE_TABLES if report.get(name))]
            sections.append(
                f"## {path.stem}\n\n    {report['command']}\n\n{report['date']}, {report['machine']['device']}, driver "
                f"{report['machine']['driver']}; {versions}{profile_of(report)}.\n\n" + "\n\n".join(tables)
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is not a report of a benchmark: {error!r}") from error
        pictures = [path.with_suffix(suffix) for suffix in PICTURES if path.with_suffix(suffix).is_file()]
        sections += [f"![{path.stem}]({picture.name})" for picture in pictures]
    if len(sections) == 1:
        raise ValueError(f"{folder} has no reports: it must be a folder of the benchmarks' JSON files")
    return "\n\n".join(sections) + "\n"


def profile_of(report: dict[str, Any]) -> str:
    """The version of the profile that a report has, if it has any, as a part of a sentence."""
    return f"; profile of version {report['profile']['machine']['version']}" if "profile" in report else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser(prog="python -m kvpr_jax.profiling.report", description="Write a folder's README from its reports.")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    arguments = parser.parse_args(argv)

    def execute() -> int:
        with failing_with(FAILURE):
            text = page(arguments.folder)
        (arguments.folder / "README.md").write_text(text)
        return 0

    return run("kvpr_jax.profiling.report", execute)


if __name__ == "__main__":
    sys.exit(main())
