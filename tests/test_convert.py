"""Converted models: the same weights bit for bit, there whole or not at all, and no damage goes unnoticed."""

import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_checkpoint import assert_equal, change_config

import kvpr_jax
from helpers import greedy, implicit_promotion, random_prompts
from kvpr_jax import Decoder, Request, checkpoint, command_line, converted

cli = importlib.import_module("kvpr_jax.convert")

ROOT = Path(kvpr_jax.__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
KILLS = 10


@pytest.fixture
def run(capfd):
    """Runs the command line in this process: the exit code and what it says on stderr."""

    def main(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        out, err = capfd.readouterr()
        assert out == ""
        return code, err

    return main


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small converted model, to be copied and broken."""
    destination = tmp_path_factory.mktemp("converted") / "opt"
    assert cli.main([str(GOLDEN / "opt"), str(destination)]) == 0
    return destination


@pytest.fixture
def broken(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "broken"))


def expect_error(result: tuple[int, str], code: int, *parts: str) -> None:
    """One line on stderr with all of the parts."""
    assert result[0] == code, result
    assert result[1].startswith("kvpr_jax.convert: error: ") and result[1].count("\n") == 1, result
    assert [part for part in parts if part not in result[1]] == [], result


def reseal(directory: Path) -> None:
    """Have the manifest agree with the files as they are."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {
        name: {
            "bytes": (directory / name).stat().st_size,
            "crc32": converted._checksum(directory / name, lambda more: None),
        }
        for name in manifest["files"]
    }
    path.write_text(json.dumps(manifest))


# What is the same


@pytest.mark.parametrize("dtype", checkpoint.DTYPES)
@pytest.mark.parametrize("name", ["opt", "gpt-neox"])
def test_weights_and_tokens_are_those_of_the_source(run, tmp_path, name, dtype):
    assert run(GOLDEN / name, tmp_path / "new", "--dtype", dtype) == (0, f"wrote {tmp_path / 'new'}\n")
    expected = checkpoint.load_model(GOLDEN / name, dtype)
    model = checkpoint.load_model(tmp_path / "new", dtype)
    assert_equal(model, expected)
    prompts = random_prompts([5, 3], model.config.vocab_size)
    with implicit_promotion():
        tokens = [greedy(Decoder(each), prompts, 6, Request(split="2"))[0] for each in (model, expected)]
    np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_cast_while_loading_as_those_of_the_source_are(sound, dtype):
    assert_equal(checkpoint.load_model(sound, dtype), checkpoint.load_model(GOLDEN / "opt", dtype))


def test_batches_of_parameters_are_put_together_again(sound, monkeypatch):
    monkeypatch.setattr(converted, "AT_ONCE_BYTES", 3000)
    assert_equal(checkpoint.load_model(sound), checkpoint.load_model(GOLDEN / "opt"))


def test_a_converted_model_can_be_converted(run, sound, tmp_path):
    assert run(sound, tmp_path / "half", "--dtype", "float16")[0] == 0
    assert_equal(checkpoint.load_model(tmp_path / "half", "float16"), checkpoint.load_model(GOLDEN / "opt", "float16"))
    assert json.loads((tmp_path / "half" / "manifest.json").read_text())["dtype"] == "float16"


def test_the_bundled_model_converts_with_its_dtype_and_tokenizer(run, tmp_path):
    assert run(checkpoint.BUNDLED, tmp_path / "tiny")[0] == 0
    files = {path.name for path in (tmp_path / "tiny").iterdir()}
    beside = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files == beside | {"orbax", "manifest.json"}
    assert json.loads((tmp_path / "tiny" / "manifest.json").read_text())["dtype"] == "float16"
    options = {"prompts": "The with statement", "max_new_tokens": 8, "split": "2"}
    assert kvpr_jax.generate(*kvpr_jax.load(tmp_path / "tiny"), **options) == kvpr_jax.generate(
        *kvpr_jax.load(), **options
    )


def test_the_default_dtype_is_the_configs_else_float32(run, tmp_path):
    source = shutil.copytree(GOLDEN / "opt", tmp_path / "source")
    for named, dtype in (("bfloat16", "bfloat16"), ("float64", "float32"), (None, "float32")):
        change_config(source, dtype=named)
        assert run(source, tmp_path / str(named))[0] == 0
        assert json.loads((tmp_path / str(named) / "config.json").read_text())["dtype"] == dtype
        read = checkpoint.read_config(tmp_path / str(named))[1]
        assert checkpoint.stored_dtype(read) == dtype


# What is said


def test_progress_rises_to_all_bytes(sound):
    seen: list[tuple[int, int]] = []
    checkpoint.load_model(sound, progress=lambda done, total: seen.append((done, total)))
    (total,) = {total for _, total in seen}
    done = [done for done, _ in seen]
    assert done == sorted(done) and done[0] > 0 and done[-1] == total


def test_a_bar_in_bytes_says_so():
    report = command_line.Reporter(quiet=False)
    for in_bytes, expected in ((True, ["1.0/3.0 MB"]), (False, ["33%"])):
        text = io.StringIO()
        report.console = Console(file=text, force_terminal=True, width=100)
        with report.bar("Loading", in_bytes) as progress:
            progress(1_000_000, 3_000_000)
        assert [part for part in expected if part not in text.getvalue()] == []


def test_usage_errors_are_one_line(run):
    expect_error(run("only-one"), 2, "DST")
    expect_error(run("a", "b", "--dtype", "int8"), 2, "int8")


def test_a_destination_that_holds_something_is_refused_before_anything_is_read(run, tmp_path):
    (tmp_path / "file").touch()
    for destination in (tmp_path, tmp_path / "file"):
        expect_error(run("no/such/model", destination), 2, f"DST '{destination}' exists and is not an empty directory")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_destination_and_absent_parents_are_filled(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for destination in (tmp_path / "empty", tmp_path / "absent" / "new"):
        assert run(GOLDEN / "opt", destination)[0] == 0
        assert_equal(checkpoint.load_model(destination), checkpoint.load_model(GOLDEN / "opt"))


def test_a_source_that_fails_leaves_nothing_behind(run, tmp_path):
    source = shutil.copytree(GOLDEN / "opt", tmp_path / "source")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    expect_error(run(source, tmp_path / "new"), 1, str(weights))
    expect_error(run("no/such/model", tmp_path / "new"), 1, "no/such/model")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_destination_that_cannot_be_written_is_named(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    expect_error(run(GOLDEN / "opt", tmp_path / "file" / "new"), 1, f"DST '{tmp_path / 'file' / 'new'}'")

    def full(*arguments: object) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: no space\nleft")

    monkeypatch.setattr(converted.ocp.PyTreeCheckpointer, "save", full)
    expect_error(run(GOLDEN / "opt", tmp_path / "new"), 1, str(tmp_path / "new"), "RESOURCE_EXHAUSTED")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_ctrl_c_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(converted, "write", interrupted)
    assert run(GOLDEN / "opt", tmp_path / "new") == (130, "")
    assert not list(tmp_path.iterdir())


# Kills


# Forks a process for each conversion, so that imports are paid for once; JAX has not started its threads yet. A process
# kills itself at the n-th thing that it does with a file of its destination (an event of Python's audit hooks).
CONVERSIONS = """
import os, signal, sys
from pathlib import Path
from kvpr_jax import convert

source, root, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
EVENTS = {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir"}


def conversion(name, last=None):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in EVENTS and f"{root / name}/" in f"{arguments[0]}/":
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    code = convert.main([source, str(root / name / "new")])
    if last is None:
        (root / "count").write_text(str(count))
    os._exit(code)


assert conversion("whole") == 0
count = int((root / "count").read_text())
for index in range(kills):
    print(conversion(str(index), 2 + index * (count - 3) // (kills - 1)))
print(count, file=sys.stderr)
"""


def test_a_killed_conversion_leaves_nothing_or_all_and_can_be_started_again(run, tmp_path):
    arguments = [sys.executable, "-c", CONVERSIONS, str(GOLDEN / "opt"), str(tmp_path), str(KILLS)]
    process = subprocess.run(arguments, capture_output=True, text=True, env=os.environ, timeout=300)
    assert process.returncode == 0, process.stderr
    codes = [int(code) for code in process.stdout.split()]
    assert (
        len(codes) == KILLS and codes.count(-signal.SIGKILL) >= KILLS - 2
    )  # TensorStore's files are not always as many
    expected = checkpoint.load_model(GOLDEN / "opt")
    left_over = 0
    for index in range(KILLS):
        parent = tmp_path / str(index)
        destination = parent / "new"
        left_over += any(path.name.startswith(".new.converting-") for path in parent.iterdir())
        if destination.exists():
            assert_equal(checkpoint.load_model(destination), expected)
            shutil.rmtree(destination)
        assert run(GOLDEN / "opt", destination)[0] == 0
        assert_equal(checkpoint.load_model(destination), expected)
        assert [path.name for path in parent.iterdir()] == ["new"]
    assert left_over >= KILLS // 2


# Damage


def damaged(directory: Path, path: Path, kind: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    if kind == "deleted":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-1])
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :])


@pytest.mark.parametrize("kind", ["deleted", "truncated", "flipped"])
def test_every_damaged_file_is_named(broken, kind):
    for path in sorted(path for path in broken.rglob("*") if path.is_file() and path.name != "manifest.json"):
        content = path.read_bytes()
        damaged(broken, path, kind)
        with pytest.raises(ValueError) as error:
            checkpoint.load_model(broken)
        assert path.name in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(content)
    assert_equal(checkpoint.load_model(broken), checkpoint.load_model(GOLDEN / "opt"))


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b'{"files": []}', b'{"files": {"a": 5}}', b"\xff"])
def test_a_damaged_manifest_is_named(broken, content):
    path = broken / "manifest.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json.*convert the model again"):
        checkpoint.load_model(broken)


def test_a_manifest_with_a_flipped_byte_is_refused_or_means_the_same(broken):
    path, expected = broken / "manifest.json", checkpoint.load_model(GOLDEN / "opt")
    content = path.read_bytes()
    for at in range(3, len(content), len(content) // 20):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            model = checkpoint.load_model(broken)
        except ValueError as error:
            assert str(broken) in str(error)
        else:
            assert_equal(model, expected)


def test_what_orbax_does_not_understand_is_one_error(broken):
    """Files that are as they were written, by something else."""
    (broken / "orbax" / "_METADATA").write_text("{}")
    reseal(broken)
    with pytest.raises(ValueError, match=r"orbax: not a readable Orbax checkpoint") as error:
        checkpoint.load_model(broken)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields, message", [
    ({"num_hidden_layers": 4}, r"parameter 'layers/3/.*' is missing"),
    ({"num_hidden_layers": 1}, r"parameter 'layers/1/.*' does not belong"),
    ({"ffn_dim": 54}, r"parameter 'layers/0/.*' has shape \[.*\]; config\.json asks for \[.*54"),
])  # fmt: skip
def test_parameters_that_do_not_fit_the_config_are_named(broken, fields, message):
    change_config(broken, **fields)
    reseal(broken)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(broken)


def test_without_its_parameters_it_is_no_model(broken):
    shutil.rmtree(broken / "orbax")
    with pytest.raises(ValueError, match=r"none of model\.safetensors, .*, nor the orbax/"):
        checkpoint.load_model(broken)
