"""What is installed: one package, kvpr_jax, with the models, the profiler and the bundled model inside.

Built by setuptools' own hooks, which `pip` and `build` call too, from the files of the checkout: no network is needed.
"""

import email
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from kvpr_jax import __version__

ROOT = Path(__file__).parents[1]
BUNDLED = "kvpr_jax/models/tiny/"


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What a command prints on stdout; what it prints on stderr if it fails."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """Builds a "wheel" or an "sdist" in a process of its own."""
    target.mkdir(exist_ok=True)
    hook = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    return target / run(sys.executable, "-c", hook, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the files that git has or would take, without anything that was built before."""
    if not (ROOT / ".git").exists():
        pytest.skip("git says which files are the project's, and this is no checkout")
    source = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    assert (source / "kvpr_jax/models").is_symlink() and (source / "kvpr_jax/profiling").is_symlink()
    return source


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> tuple[Path, Path]:
    """A wheel and an sdist, each from a copy of its own."""
    target = tmp_path_factory.mktemp("target")
    copies = [shutil.copytree(source, target / kind / "copy", symlinks=True) for kind in ("wheel", "sdist")]
    return build("wheel", copies[0], target), build("sdist", copies[1], target)


@pytest.fixture(scope="module")
def files(built) -> dict[str, str]:
    return hashes(built[0])


def hashes(wheel: Path) -> dict[str, str]:
    """SHA-256 of each file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        assert len(set(archive.namelist())) == len(archive.namelist())
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_only_top_level_package_is_kvpr_jax(files):
    assert {name.split("/")[0] for name in files} == {"kvpr_jax", f"kvpr_jax-{__version__}.dist-info"}


def test_every_module_is_inside_and_nothing_else(source, files):
    """Those of models/ and profiling/ too, which are symlinks in the checkout."""
    modules = {
        path.relative_to(source).as_posix(): path
        for folder in ("kvpr_jax", "kvpr_jax/generate", "kvpr_jax/models", "kvpr_jax/profiling")
        for path in (source / folder).glob("*.py")
    }
    assert {"kvpr_jax/models/opt.py", "kvpr_jax/profiling/profile.py", "kvpr_jax/generate/__main__.py"} <= set(modules)
    assert {name for name in files if name.endswith(".py")} == set(modules)
    assert {name: sha256(path) for name, path in modules.items()} == {name: files[name] for name in modules}
    inside = {name for name in files if name.startswith("kvpr_jax/") and not name.startswith(BUNDLED)}
    assert {Path(name).suffix for name in inside} <= {".py", ".md", ".json"}


def test_the_bundled_model_is_inside_whole(source, files):
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert {name: files[BUNDLED + name] for name in names} == {
        name: sha256(source / "models/tiny" / name) for name in names
    }
    assert sum(path.stat().st_size for path in (source / "models/tiny").iterdir()) <= 8 * 10**6


def test_the_simulated_devices_are_inside(source, files):
    devices = {f"kvpr_jax/profiling/devices/{path.name}": path for path in (source / "profiling/devices").iterdir()}
    assert "kvpr_jax/profiling/devices/nvidia-h200.json" in devices
    assert {name: files[name] for name in devices} == {name: sha256(path) for name, path in devices.items()}


def test_the_metadata_is_the_projects(built):
    with zipfile.ZipFile(built[0]) as archive:
        folder = f"kvpr_jax-{__version__}.dist-info/"
        metadata = email.message_from_bytes(archive.read(folder + "METADATA"))
        assert folder + "licenses/LICENSE" in archive.namelist()
    assert (metadata["Name"], metadata["Version"]) == ("kvpr-jax", __version__)
    assert (metadata["Requires-Python"], metadata["License-Expression"]) == (">=3.11", "Apache-2.0")
    assert set(metadata.get_all("Provides-Extra")) == {"cuda12", "cuda13", "plot", "torch", "test", "oracle"}
    needed = [requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement]
    names = {requirement.split(">")[0].split("=")[0].split("[")[0].strip() for requirement in needed}
    assert {"jax", "jaxlib", "flax", "numpy", "transformers", "safetensors", "rich"} <= names
    assert not names & {"torch", "jax-cuda12-plugin", "pytest", "pynvml"}
    assert "python -m kvpr_jax.generate" in metadata.get_payload()  # the README


def test_a_wheel_from_the_sdist_is_the_same(built, files, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    again = hashes(build("wheel", unpacked, tmp_path / "again"))
    record = f"kvpr_jax-{__version__}.dist-info/RECORD"  # holds the order of the files
    assert {name: digest for name, digest in again.items() if name != record} == {
        name: digest for name, digest in files.items() if name != record
    }


def test_the_wheel_works_from_where_it_is_unpacked(built, tmp_path):
    """The bundled model loads and nothing is taken from the checkout; `models` and `profiling` are not importable."""
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(tmp_path / "site")
    program = """
import importlib.util, sys
import kvpr_jax
from kvpr_jax import checkpoint
from kvpr_jax.profiling import profile
model, tokenizer = kvpr_jax.load()
print(kvpr_jax.__file__, checkpoint.BUNDLED, profile.__file__, sep="\\n")
print([importlib.util.find_spec(name) for name in ("models", "profiling")])
print(tokenizer.decode(tokenizer("ok")["input_ids"], skip_special_tokens=True), model.config.model_type)
"""
    printed = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert [Path(line).is_relative_to(tmp_path / "site") for line in printed[:3]] == [True] * 3
    assert printed[3:] == ["[None, None]", "ok opt"]
