"""The command line: text alone on stdout, one line a mistake on stderr, exit codes, and how it ends when broken off."""

import dataclasses
import importlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_checkpoint import change_config, write, write_tokenizer

import kvpr_jax
from helpers import OPT, profile, random_model
from kvpr_jax import Decoder, checkpoint, command_line, memory, pace, scheduler, stream
from kvpr_jax.profiling import device
from kvpr_jax.profiling import measure as measuring
from kvpr_jax.profiling import profile as profiles

cli = importlib.import_module("kvpr_jax.generate.__main__")

ROOT = Path(kvpr_jax.__file__).parents[1]
PROMPT = "The with statement is used"
NEW = 12
LONG = 1400  # tokens; a run of some seconds


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint with random weights and the bundled tokenizer."""
    tokenizer = checkpoint.load_tokenizer(checkpoint.BUNDLED)
    config = dataclasses.replace(
        OPT,
        num_layers=2,
        vocab_size=len(tokenizer),
        eos_token_ids=(tokenizer.eos_token_id,),
        max_positions=LONG + 100,
    )
    return write_tokenizer(write(tmp_path_factory.mktemp("model"), random_model(config)))


@pytest.fixture(scope="module")
def loaded(directory):
    return kvpr_jax.load(directory)


@pytest.fixture(scope="module")
def count(loaded):
    """S: tokens of `PROMPT`."""
    return len(loaded[1](PROMPT)["input_ids"])


@pytest.fixture
def run(directory, capfd):
    """Runs the command line in this process; everything that reaches the two streams, from libraries too."""

    def main(*arguments: object) -> Result:
        argv = ["--model", str(directory), "--max-new-tokens", str(NEW), *map(str, arguments)]
        capfd.readouterr()
        try:
            code = cli.main(argv)
        except SystemExit as exit:
            code = exit.code
        return Result(code, *capfd.readouterr())

    return main


def expect_error(result: Result, code: int, *parts: str) -> None:
    """One line on stderr with all of the parts, and nothing on stdout."""
    assert (result.code, result.out) == (code, "")
    assert re.fullmatch(r"kvpr_jax\.generate: error: .*\S.*\n", result.err), result.err
    assert [part for part in parts if part not in result.err] == [], result.err


def one_object(text: str) -> dict:
    """The JSON object that is all of the text, and one that any reader understands."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert text.endswith("}\n") and text.count("\n") == 1
    return json.loads(text, parse_constant=refuse)


def text_of(loaded, prompts, **options) -> list[str]:
    outputs = kvpr_jax.generate(*loaded, prompts, **{"max_new_tokens": NEW} | options)
    return [output.text for output in outputs]


# What goes where


def test_text_goes_to_stdout_and_all_else_to_stderr(run, loaded, count):
    result = run("--prompt", PROMPT)
    assert (result.code, result.out) == (0, text_of(loaded, PROMPT)[0] + "\n")
    plan, statistics = result.err.splitlines()
    assert plan.startswith("plan: ")
    for part in (
        f"prompt: {count} tokens, ",
        f"generation: {NEW} tokens, ",
        "tokens/s",
        "link: ",
        " MB",
        " GB/s",
        "host ",
    ):
        assert part in statistics


def test_quiet_leaves_stderr_empty(run, loaded):
    assert run("--prompt", PROMPT, "--quiet") == Result(0, text_of(loaded, PROMPT)[0] + "\n", "")
    assert run("--prompt", PROMPT, "--quiet", "--json").err == ""


def test_several_prompts_are_printed_one_after_the_other(run, loaded):
    result = run("--prompt", PROMPT, "--prompt", "x")
    first, second = text_of(loaded, [PROMPT, "x"])
    assert result.out == f"==> 1/2: {PROMPT!r}\n{first}\n==> 2/2: 'x'\n{second}\n"


def test_json_is_one_object(run, loaded, directory, count):
    result = run("--prompt", PROMPT, "--prompt", "x", "--json", "--split", 2)
    assert result.code == 0 and len(result.err.splitlines()) == 2
    told = one_object(result.out)
    assert list(told) == ["model", "plan", "outputs", "stats"]
    assert told["model"] == str(directory)
    plan = told["plan"]
    assert {"recompute", "engine", "host_bytes_per_step", "predicted_step_s"} <= set(plan)
    assert (plan["split"], plan["cached_tokens"]) == (2, count)
    assert (
        plan["host_bytes_per_step"] == 2 * 2 * (2 * 44 + (count - 2) * 2 * 44) * 4
    )  # layers, sequences, numbers, bytes
    running = stream(*loaded, [PROMPT, "x"], max_new_tokens=NEW, split="2")
    for _ in running:
        pass
    assert told["outputs"] == [dataclasses.asdict(output) for output in running.outputs]
    assert set(told["outputs"][0]) == {"prompt", "prompt_tokens", "token_ids", "text", "finish_reason"}
    assert len(told["outputs"][0]["token_ids"]) == NEW  # the new tokens only
    stats = told["stats"]
    assert (stats["sequences"], stats["prompt_tokens"], stats["new_tokens"]) == (2, count + 2, 2 * NEW)
    assert stats["link_bytes"] == (NEW - 1) * plan["host_bytes_per_step"]
    assert {"prompt_tokens_per_s", "new_tokens_per_s", "link_gb_per_s", "peak_device_bytes", "peak_host_bytes"} <= set(
        stats
    )


def test_the_plan_is_printed_and_nothing_is_run(run, monkeypatch, directory, count):
    monkeypatch.setattr(Decoder, "prefill", None)
    result = run("--prompt", PROMPT, "--plan", "--split", "3")
    assert (result.code, result.err) == (0, "")
    plan, blank, heading, _, *table = result.out.splitlines()
    assert plan.startswith(f"plan: of {count} prompt tokens, 3 on the host as activations") and not blank
    times = "link (ms) | compute (ms) | dispatch (ms) | first step (ms) | last step (ms)"
    assert heading == f"| split | recompute | resident | {times} | host cache (GiB) | device in all (GiB) |  |"
    (chosen,) = [row for row in table if "<- the plan" in row]
    told = one_object(run("--prompt", PROMPT, "--plan", "--split", "3", "--json").out)
    assert list(told) == ["model", "plan", "candidates"] and told["model"] == str(directory)
    assert told["plan"]["split"] == 3 and chosen.startswith(f"| 3 | {told['plan']['recompute']} | ")
    assert len(told["candidates"]) == len(table)
    (row,) = run("--prompt", PROMPT, "--plan", "--offload", "none").out.splitlines()[4:]
    assert re.fullmatch(rf"\| 0 \| - \| {count} \| 0.000 \| .* \| 0.00 \| 0.0000\d\d \| <- the plan \|", row)


def test_a_plan_says_where_new_tokens_go(run, count, monkeypatch):
    def told(*arguments, new="200"):
        return run("--prompt", PROMPT, "--plan", "--max-new-tokens", new, "--offload", "all", *arguments).out

    monkeypatch.setattr(measuring, "load_or_measure", lambda *_: profile(compile_s=0.5))
    monkeypatch.setattr(scheduler, "TAIL_TOKENS", (64, 64))
    monkeypatch.setattr(scheduler, "TAIL_MOST", 64)
    assert f"{count} prompt tokens, 0 on the host as activations, {count} on the host as keys" in told("--split", "0")
    assert "new tokens gather on the device, 64 at a time, and go to the host 3 times" in told()
    waits = re.search(r"go to the host 3 times \(up to (\d\.\d) s in all to compile for it\)", told())
    assert 0.0 < float(waits[1]) < 4.5
    monkeypatch.setattr(measuring, "load_or_measure", lambda *_: profile(compile_s=0.0))
    assert "to compile" not in told() and "go to the host 3 times" in told()
    assert "go to the host" not in told(new="60") and "new tokens stay on the device" in told(new="60")


def test_a_plan_for_a_device_that_is_not_here(run, directory, tmp_path):
    """By its times, within its memory. A profile from a file serves a run as well."""
    plan = ["--prompt", PROMPT, "--max-new-tokens", "4", "--plan", "--json", "--dtype", "float16"]
    shipped = one_object(run(*plan, "--profile", "nvidia-l4").out)["plan"]
    here = one_object(run(*plan).out)["plan"]
    by_default = run("--prompt", PROMPT, "--max-new-tokens", "4", "--plan", "--json", "--profile", "nvidia-l4")
    assert one_object(by_default.out)["plan"] == shipped  # in 16 bits, as on a GPU
    assert not shipped["offloaded"] and shipped["predicted_step_s"] != here["predicted_step_s"]
    small = json.loads((device.DEVICES / "nvidia-l4.json").read_text()) | {"memory_bytes": 1000}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small))
    expect_error(run(*plan, "--profile", path), command_line.FAILURE, "not enough device memory")
    config, _ = checkpoint.read_config(directory)
    key = profiles.machine(config, jnp.dtype("float32"), 1) | {"memory": "1000"}
    profiles.write(path, profile(machine=key, base_s=0.5))
    told = one_object(run("--prompt", PROMPT, "--json", "--profile", path).out)
    assert told["plan"]["predicted_step_s"] > 0.5 and told["outputs"][0]["text"]
    planned = run("--prompt", PROMPT, "--plan", "--profile", path)  # in what it was measured in
    expect_error(planned, command_line.FAILURE, "not enough device memory")
    profiles.write(path, profile(machine=key | {"memory": str(2**34)}, base_s=0.5))
    planned = one_object(run("--prompt", PROMPT, "--plan", "--json", "--profile", path).out)["plan"]
    assert planned["predicted_step_s"] == told["plan"]["predicted_step_s"] and not planned["offloaded"]
    unknown = run(*plan, "--profile", "nvidia-l5")
    expect_error(unknown, command_line.USAGE, "profile 'nvidia-l5' is neither a file nor one of the devices")


def test_steps_that_stay_slower_than_predicted_are_told_once(run, monkeypatch):
    fast = profile(
        base_s=1e-7,
        head_s=0.0,
        to_device=[(2**20, 1e-7), (2**26, 1e-6)],
        dispatch_s=0.0,
        layer_dispatch_s=0.0,
        segment_dispatch_s=0.0,
        issue_s=0.0,
    )
    monkeypatch.setattr(measuring, "load_or_measure", lambda *_: fast)
    monkeypatch.setattr(pace, "STEPS", 3)
    monkeypatch.setattr(pace, "SLOW_S", 0.0)
    result = run("--prompt", PROMPT, "--offload", "all")
    assert result.err.count("were predicted; ") == 1 and result.err.count("\n") == 3  # plan, miss, statistics
    told = one_object(run("--prompt", PROMPT, "--offload", "all", "--json", "--quiet").out)["stats"]
    assert "were predicted; " in told["miss"] and told["recompiled"] == 0 and told["longest_wait_s"] == 0.0
    forced = one_object(run("--prompt", PROMPT, "--split", "3", "--json").out)["stats"]["miss"]
    assert "were predicted; " in forced and "later tokens" in told["miss"] and "later tokens" not in forced


def test_a_budget_that_is_too_small_is_refused_before_the_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", None)
    refused = run("--prompt", PROMPT, "--offload", "all", "--host-cache-gib", "1.5e-6")
    parts = "and 0.0000015 GiB are allowed by --host-cache-gib", "help: a larger --host-cache-gib, --offload auto, f"
    expect_error(refused, command_line.FAILURE, *parts)
    refused = run("--prompt", PROMPT, "--device-cache-gib", "0")
    parts = "and 0.00 GiB are allowed by --device-cache-gib", "help: a larger --device-cache-gib, --offload all, f"
    expect_error(refused, command_line.FAILURE, *parts)


@pytest.mark.parametrize("arguments, expected", [
    ("--split 0", {"split": 0, "offloaded": True, "resident_tokens": 0}),
    ("--split 3", lambda S: {"split": 3, "offloaded": True, "reason": f"forced to 3 of {S} tokens"}),
    ("--split 50%", lambda S: {"split": round(S / 2), "offloaded": True}),
    ("--split 100%", lambda S: {"split": S, "offloaded": True}),
    ("--split 2 --offload auto", {"split": 2, "offloaded": True}),
    ("--split auto", {"split": 0, "offloaded": False}),
    ("--offload all", {"offloaded": True, "resident_tokens": 0}),
    ("--offload none", {"offloaded": False, "host_bytes_per_step": 0}),
    ("--device-cache-gib 1e-5", {"offloaded": True, "resident_tokens": 4}),
    ("--engine sequential", {"engine": "sequential"}),
    ("--engine overlapped", {"engine": "overlapped"}),
    ("--recompute project", {"recompute": "project"}),
    ("--recompute absorb", {"recompute": "absorb"}),
    ("--split 0 --dtype float32", lambda S: {"host_bytes_per_step": 2 * S * 88 * 4}),
    ("--split 0 --dtype bfloat16", lambda S: {"host_bytes_per_step": 2 * S * 88 * 2}),
])  # fmt: skip
def test_options_reach_the_plan(run, count, arguments, expected):
    expected = expected(count) if callable(expected) else expected
    plan = one_object(run("--prompt", PROMPT, "--plan", "--json", *arguments.split()).out)["plan"]
    assert {name: plan[name] for name in expected} == expected


@pytest.mark.parametrize("arguments, options", [
    ("--max-new-tokens 5", {"max_new_tokens": 5}),
    ("--temperature 1 --seed 3", {"temperature": 1.0, "seed": 3}),
    ("--temperature 1 --seed 4", {"temperature": 1.0, "seed": 4}),
    ("--temperature 2 --seed 3 --top-k 5", {"temperature": 2.0, "seed": 3, "top_k": 5}),
    ("--temperature 2 --seed 3 --top-p 0.3", {"temperature": 2.0, "seed": 3, "top_p": 0.3}),
    ("--temperature 2 --seed 3 --min-p 0.4", {"temperature": 2.0, "seed": 3, "min_p": 0.4}),
])  # fmt: skip
def test_options_reach_generation(run, loaded, arguments, options):
    expected = text_of(loaded, PROMPT, **options)[0]
    assert run("--prompt", PROMPT, "--quiet", *arguments.split()).out == expected + "\n"
    assert expected != text_of(loaded, PROMPT)[0]


def test_stop_strings_and_the_end_of_sequence_end_the_text(run, loaded, monkeypatch):
    whole = text_of(loaded, PROMPT)[0]
    stop, earlier = whole[9:12], whole[4:6]
    result = run("--prompt", PROMPT, "--stop", stop, "--stop", earlier, "--json")
    (output,) = one_object(result.out)["outputs"]
    assert output["text"] == whole[: min(whole.index(stop), whole.index(earlier))]
    assert output["finish_reason"] == "stop" and len(output["token_ids"]) < NEW
    third = one_object(run("--prompt", PROMPT, "--json").out)["outputs"][0]["token_ids"][2]
    read = checkpoint.read_config

    def ends_at_third(directory):
        config, hf = read(directory)
        return dataclasses.replace(config, eos_token_ids=(third,)), hf

    monkeypatch.setattr(checkpoint, "read_config", ends_at_third)
    (output,) = one_object(run("--prompt", PROMPT, "--json").out)["outputs"]
    assert output["finish_reason"] == "stop" and output["token_ids"].index(third) == len(output["token_ids"]) - 1
    (output,) = one_object(run("--prompt", PROMPT, "--json", "--ignore-eos").out)["outputs"]
    assert output["finish_reason"] == "length" and output["text"] == whole


def test_chat_uses_the_template(run, directory, tmp_path):
    shutil.copytree(directory, tmp_path / "chat")
    path = tmp_path / "chat" / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {"chat_template": "<{{ messages[0].role }}>{{ messages[0].content }}"}
    path.write_text(json.dumps(fields))
    told = one_object(run("--model", tmp_path / "chat", "--prompt", "Hello", "--chat", "--json").out)
    (output,) = told["outputs"]
    plain = checkpoint.load_tokenizer(directory).encode("<user>Hello", add_special_tokens=False)
    assert (output["prompt"], output["prompt_tokens"]) == ("Hello", len(plain))


def test_help_names_every_option(run):
    result = run("--help")
    assert result.code == 0
    options = """--model --prompt --prompts --max-new-tokens --temperature --top-k --top-p --min-p --seed --stop
    --ignore-eos --chat --dtype --split --recompute --engine --offload --device-cache-gib --quiet --plan --json
    --debug --no-compilation-cache"""
    assert [option for option in options.split() if f"{option} " not in result.out.replace("\n", " ")] == []


# Prompts from files


@pytest.mark.parametrize("name, content, prompts", [
    ("p.txt", "one\ntwo words\n", ["one", "two words"]),
    ("p.txt", "\none\r\n  \n two", ["one", " two"]),
    ("p.txt", "né日😀\n[1]\n", ["né日😀", "[1]"]),
    ("p.txt", "\ufeffone\n", ["one"]),  # as Windows' editors write it
    ("p.txt", "a\x0cb\x1cc\u2028d\x85e\n", ["a\x0cb\x1cc\u2028d\x85e"]),  # one line
    ("p.jsonl", '{"prompt": "one\\ntwo"}\n\n{"id": 3, "prompt": "é"}\n', ["one\ntwo", "é"]),
    ("p.txt", '{"prompt": "one"}\n', ["one"]),
    ("p.jsonl", '\ufeff{"prompt": "one"}\n', ["one"]),
    ("p.jsonl", '{"prompt": "a\u2028b\x85c"}\n', ["a\u2028b\x85c"]),  # which JSON allows within a string
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("stdin", [False, True], ids=["file", "stdin"])
def test_prompts_are_read(run, tmp_path, monkeypatch, name, content, prompts, stdin):
    path = tmp_path / name
    path.write_bytes(content.encode())
    if stdin:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode()), encoding="utf-8"))
    assert cli.read_prompts("-" if stdin else str(path)) == prompts


def test_prompts_of_both_kinds_are_run_together(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    told = one_object(run("--prompts", "-", "--prompt", PROMPT, "--json").out)
    assert [output["prompt"] for output in told["outputs"]] == [PROMPT, "x"]


@pytest.mark.parametrize("name, content, parts", [
    ("p.jsonl", b'{"prompt": "a"}\n\nnot json\n', ["line 3", "not json", '"prompt"']),
    ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', ["line 2", '{"text": "b"}']),
    ("p.jsonl", b'{"prompt": 5}\n', ["line 1", '{"prompt": 5}']),
    ("p.jsonl", b'{"prompt": null}\n', ["line 1"]),
    ("p.jsonl", b'["a"]\n', ["line 1", '["a"]']),
    ("p.jsonl", b'"a"\n', ["line 1"]),
    ("p.jsonl", b'{"prompt": "a"\n', ["line 1"]),
    ("p.txt", b'{"prompt": "a"}\nb\n', ["line 2"]),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ""}\n', ["prompt 2 of 2 is empty"]),
    ("p.txt", b"", ["p.txt", "at least one"]),
    ("p.txt", b" \n\n", ["p.txt", "at least one"]),
    ("p.txt", b"caf\xe9\n", ["p.txt", "utf-8"]),
    ("p.jsonl", b'{"prompt": "\\ud800"}\n', ["prompt 1 of 1", "Unicode"]),
], ids=repr)  # fmt: skip
def test_bad_prompts_files_are_named(run, tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content)
    expect_error(run("--prompts", tmp_path / name), 2, *parts)


@pytest.mark.parametrize("path", ["/no/such/file", "/", ""])
def test_prompts_that_cannot_be_read_are_named(run, path):
    expect_error(run("--prompts", path), 2, f"prompts {path!r}")


def test_stdin_may_be_closed(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after `<&-`
    expect_error(run("--prompts", "-"), 2, "prompts '-'")


# Bad input


@pytest.mark.parametrize("arguments, parts", [
    (["--prompt", ""], ["prompt 1 of 1 is empty"]),
    (["--prompt", "x", "--prompt", ""], ["prompt 2 of 2 is empty"]),
    (["--prompt", "caf\udce9"], ["prompt 1 of 1", "Unicode"]),  # what the shell's Latin-1 becomes
    (["--split", "999"], ["split 999", "{S} tokens"]),
    (["--split", "-1"], ["split -1", "0 or more"]),
    (["--split", "half"], ["split 'half'", "auto, a number of tokens or a percentage"]),
    (["--split", "2.5"], ["split '2.5'", "auto, a number"]),
    (["--split", ""], ["split ''", "auto, a number"]),
    (["--split", "1" + "0" * 400], ["split"]),
    (["--split", "101%"], ["split 101%", "0% to 100%"]),
    (["--split=-1%"], ["split -1%", "0% to 100%"]),
    (["--split", "nan%"], ["split nan%"]),
    (["--split", "%"], ["split '%'"]),
    (["--split", "3", "--offload", "none"], ["split 3", "offload none"]),
    (["--temperature", "-0.5"], ["temperature -0.5", "0 or more"]),
    (["--temperature", "nan"], ["temperature nan"]),
    (["--temperature", "inf"], ["temperature inf"]),
    (["--temperature", "warm"], ["--temperature", "'warm'", "float"]),
    (["--top-p", "0"], ["top-p 0.0", "above 0 and at most 1"]),
    (["--top-p", "1.01"], ["top-p 1.01", "above 0 and at most 1"]),
    (["--top-p", "nan"], ["top-p nan"]),
    (["--min-p", "-0.1"], ["min-p -0.1", "from 0 to 1"]),
    (["--min-p", "1.1"], ["min-p 1.1", "from 0 to 1"]),
    (["--top-k", "-1"], ["top-k -1", "0 (no limit) or more"]),
    (["--top-k", "3000000000"], ["top-k 3000000000"]),
    (["--top-k", "2.5"], ["--top-k", "'2.5'", "int"]),
    (["--max-new-tokens", "0"], ["max-new-tokens 0", "at least 1"]),
    (["--max-new-tokens", "-5"], ["max-new-tokens -5", "at least 1"]),
    (["--max-new-tokens", "many"], ["--max-new-tokens", "'many'", "int"]),
    (["--max-new-tokens", str(LONG + 99)], ["{S} prompt tokens", f"{LONG + 99} new tokens", f"{LONG + 100} positions"]),
    (["--prompt", "word " * 1000, "--max-new-tokens", "600"], ["prompt tokens", f"{LONG + 100} positions"]),
    (["--stop", ""], ["stop ''", "at least one character"]),
    (["--device-cache-gib", "-1"], ["device-cache-gib -1.0", "0 or more"]),
    (["--device-cache-gib", "nan"], ["device-cache-gib nan"]),
    (["--device-cache-gib", "1e305"], ["device-cache-gib 1e+305"]),
    (["--seed", "one"], ["--seed", "'one'"]),
    (["--dtype", "float64"], ["--dtype", "'float64'", "float32", "bfloat16", "float16"]),
    (["--engine", "fast"], ["--engine", "'fast'", "overlapped", "sequential"]),
    (["--offload", "some"], ["--offload", "'some'", "auto", "all", "none"]),
    (["--recompute", "never"], ["--recompute", "'never'", "auto", "project", "absorb"]),
    (["--frobnicate"], ["--frobnicate"]),
    (["prompt without an option"], ["prompt without an option"]),
    (["--chat"], ["no chat template"]),
], ids=lambda value: " ".join(value)[:40] if value and value[0].startswith("-") else "")  # fmt: skip
def test_usage_errors_name_the_value(run, count, arguments, parts):
    given = [] if "--prompt" in arguments else ["--prompt", PROMPT]
    expect_error(run(*given, *arguments), 2, *(part.replace("{S}", str(count)) for part in parts))


def test_the_models_last_position_may_be_used_and_no_more(run, count):
    most = LONG + 100 - count
    assert run("--prompt", PROMPT, "--plan", "--max-new-tokens", most).code == 0
    expect_error(run("--prompt", PROMPT, "--plan", "--max-new-tokens", most + 1), 2, f"{most + 1} new tokens")


@pytest.mark.parametrize("arguments", [["--json"], ["--quiet"], ["--plan"]], ids=str)
def test_errors_look_the_same_whatever_the_output(run, arguments):
    expect_error(run("--prompt", PROMPT, "--split", "999", *arguments), 2, "split 999")


@pytest.mark.parametrize("name", ["nowhere", "/no/such/directory", "a/b/c", "nobody/nothing", ""])
def test_an_unknown_model_is_named(run, name):
    expect_error(run("--model", name), 1, f"model {name!r}")


@pytest.fixture
def broken(directory, tmp_path):
    return Path(shutil.copytree(directory, tmp_path / "broken"))


def test_an_unsupported_model_is_named(run, broken):
    change_config(broken, model_type="t5")
    expect_error(run("--model", broken), 1, "model_type 't5'", "llama", "mistral", "opt")


def test_a_config_that_is_absent_or_no_config_is_named(run, broken):
    change_config(broken, hidden_size="wide")
    expect_error(run("--model", broken), 1, "config.json", "hidden_size", "wide")
    change_config(broken, hidden_size=44, num_attention_heads=0)
    expect_error(run("--model", broken), 1, "config.json", "heads")
    (broken / "config.json").write_text("{")
    expect_error(run("--model", broken), 1, "config.json", "JSON")
    (broken / "config.json").unlink()
    expect_error(run("--model", broken), 1, str(broken), "no config.json")


def test_weights_that_do_not_fit_or_are_damaged_are_named(run, broken):
    path = broken / "model.safetensors"
    change_config(broken, ffn_dim=54)
    expect_error(run("--model", broken), 1, str(path), "fc1", "[53]", "[54]")
    change_config(broken, ffn_dim=53, num_hidden_layers=3)
    expect_error(run("--model", broken), 1, "decoder.layers.2.", "missing")
    change_config(broken, num_hidden_layers=2)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:1000], b"", b"\0" * 8 + whole[8:]):
        path.write_bytes(damaged)
        expect_error(run("--model", broken), 1, str(path), "not a readable safetensors file")
    path.unlink()
    expect_error(run("--model", broken), 1, str(broken), "model.safetensors")


def test_a_tokenizer_that_is_absent_or_damaged_is_named(run, broken):
    (broken / "tokenizer.json").write_text("{")
    expect_error(run("--model", broken), 1, str(broken), "tokenizer")
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    expect_error(run("--model", broken), 1, str(broken), "tokenizer")


@pytest.mark.parametrize("place, flags", [("host", "--offload auto"), ("device", "--max-new-tokens")])
def test_too_little_memory_is_told_with_both_figures_and_the_flags(run, monkeypatch, place, flags):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 2**40 if place == "device" else 1024)
    monkeypatch.setattr(memory, "free_device_bytes", lambda: 1024 if place == "device" else 2**40)
    result = run("--prompt", PROMPT, "--offload", "all")
    expect_error(result, 1, f"not enough {place} memory", flags)
    assert len(re.findall(r"\d+\.\d+ GiB", result.err)) == 2


@pytest.mark.parametrize(
    "text, helps", [("RESOURCE_EXHAUSTED: Out of memory", True), ("INTERNAL: a lost device", False)]
)
def test_what_xla_runs_into_is_one_line(run, monkeypatch, text, helps):
    def fails(*_, **__):
        raise jax.errors.JaxRuntimeError(f"{text}\nand where")

    monkeypatch.setattr(Decoder, "prefill", fails)
    result = run("--prompt", PROMPT)
    assert result.code == 1 and result.out == ""
    (line,) = [line for line in result.err.splitlines() if "error: " in line]
    assert line.startswith(f"kvpr_jax.generate: error: {text}") and "and where" not in result.err
    assert ("what would help: a smaller memory budget" in line) == helps


def test_debug_shows_the_traceback_of_what_went_wrong(run):
    with pytest.raises(command_line.Failure, match="split 999") as error:
        run("--prompt", PROMPT, "--split", "999", "--debug")
    assert isinstance(error.value.__cause__, ValueError)


# Broken off


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C at a call of a function."""

    def at(owner: object, name: str, call: int) -> None:
        calls = itertools.count(1)
        function = getattr(owner, name)

        def interrupting(*args, **kwargs):
            if next(calls) == call:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, interrupting)

    return at


def shown_after(loaded, prompts, tokens: int, **options) -> list[str]:
    """What is certain of the texts after so many tokens of each."""
    running = stream(*loaded, prompts, **{"max_new_tokens": NEW} | options)
    for _ in itertools.islice(running, tokens * len(running.outputs)):
        pass
    return [output.text for output in running.outputs]


SIXTH = 6  # step: issued when five tokens are known, that of prefill and of four steps; the fifth's is on its way


def test_ctrl_c_keeps_the_text_so_far(run, loaded, interrupted):
    expected = shown_after(loaded, PROMPT, 5)[0]
    interrupted(Decoder, "step", SIXTH)
    result = run("--prompt", PROMPT)
    assert (result.code, result.out) == (130, expected + "\n") and expected
    assert "Traceback" not in result.err and "generation: 5 tokens" in result.err


def test_ctrl_c_keeps_the_texts_so_far_of_all_prompts(run, loaded, interrupted):
    first, second = shown_after(loaded, [PROMPT, "x"], 5)
    interrupted(Decoder, "step", SIXTH)
    result = run("--prompt", PROMPT, "--prompt", "x", "--quiet")
    assert result == Result(130, f"==> 1/2: {PROMPT!r}\n{first}\n==> 2/2: 'x'\n{second}\n", "")


def test_ctrl_c_leaves_one_json_object(run, loaded, interrupted):
    interrupted(Decoder, "step", SIXTH)
    result = run("--prompt", PROMPT, "--json", "--quiet")
    (output,) = one_object(result.out)["outputs"]
    assert (result.code, result.err, output["finish_reason"], len(output["token_ids"])) == (130, "", None, 5)
    assert output["text"] == shown_after(loaded, PROMPT, 5)[0]


@pytest.mark.parametrize("owner, name", [(Decoder, "prefill"), (cli, "plan_for"), (checkpoint, "load_model")])
@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["text", "json"])
def test_ctrl_c_before_the_first_token_prints_nothing(run, interrupted, owner, name, arguments):
    interrupted(owner, name, 1)
    result = run("--prompt", PROMPT, *arguments)
    assert (result.code, result.out) == (130, "") and "Traceback" not in result.err


@pytest.mark.parametrize("piece", [1, 2, 5])
def test_ctrl_c_during_a_print_neither_repeats_nor_loses_text(loaded, directory, monkeypatch, piece):
    """Where a pager or a terminal holds the output up, that is where Ctrl-C arrives."""
    options = {"temperature": 1.0, "seed": 3}
    expected = shown_after(loaded, PROMPT, piece, **options)[0]
    flushes = itertools.count(1)

    class Held(io.StringIO):
        def flush(self) -> None:
            if next(flushes) == piece:
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", Held())
    arguments = ["--prompt", PROMPT, "--quiet", "--temperature", "1", "--seed", "3", "--max-new-tokens", str(NEW)]
    assert cli.main(["--model", str(directory), *arguments]) == 130
    assert sys.stdout.getvalue() == expected + "\n"


# Processes of their own


def give_profile(cache: Path, directory: Path) -> None:
    """Spare a process that decodes one prompt of this model with float32 the measuring of the machine."""
    key = profiles.machine(checkpoint.read_config(directory)[0], jnp.dtype("float32"), 1)
    profiles.write(cache / "kvpr_jax" / profiles.path_of(key).name, profile(machine=key))


@pytest.fixture(scope="module")
def environment(tmp_path_factory, directory):
    """As conftest's, but buffering as usual. The machine is measured for the bundled model only."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    cache = tmp_path_factory.mktemp("cache")
    give_profile(cache, directory)
    return kept | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}


@pytest.fixture
def start(environment, tmp_path):
    """Starts the command line as a process, in a directory without models."""
    running = []

    def popen(*arguments: object, **options) -> subprocess.Popen:
        # A shell's background jobs ignore Ctrl-C, and so would their children. A handler of ours is not inherited.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvpr_jax.generate", *map(str, arguments)],
                **{
                    "stdout": subprocess.PIPE,
                    "stderr": subprocess.PIPE,
                    "cwd": tmp_path,
                    "env": environment,
                    "bufsize": 0,
                }
                | options,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        running.append(process)
        return process

    yield popen
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_without_arguments_the_bundled_model_writes(start):
    process = start()
    out, err = (stream.decode() for stream in process.communicate(timeout=300))
    assert process.returncode == 0 and out.strip() and out.endswith("\n")
    notice, plan, *told, statistics = err.splitlines()
    assert all("ms were predicted" in line for line in told) and len(told) <= 1  # where the machine is busy now
    assert "no arguments" in notice and "--offload all" in notice and "--help" in notice
    activations, streamed = (int(number) for number in re.findall(r"(\d+) on the host", plan))
    assert activations > 0 and streamed > 0
    assert float(re.search(r"link: ([\d.]+) MB", statistics)[1]) > 0


def test_prompts_come_through_a_pipe_and_quiet_is_silent(start, directory, loaded):
    process = start(
        "--model", directory, "--prompts", "-", "--json", "--quiet", "--max-new-tokens", NEW, stdin=subprocess.PIPE
    )  # fmt: skip
    out, err = process.communicate('{"prompt": "né日"}\n'.encode(), timeout=300)
    assert (process.returncode, err) == (0, b"")
    (output,) = one_object(out.decode())["outputs"]
    assert output["prompt"] == "né日" and output["text"] == text_of(loaded, "né日")[0]


def test_ctrl_c_ends_the_process_with_130_after_the_text_so_far(start, directory, loaded):
    process = start("--model", directory, "--prompt", PROMPT, "--ignore-eos", "--max-new-tokens", LONG)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    text, whole = (
        (first + out).decode().removesuffix("\n"),
        text_of(loaded, PROMPT, max_new_tokens=60, ignore_eos=True)[0],
    )
    assert len(text) > 0 and (whole.startswith(text) or text.startswith(whole))
    plan, statistics = err.decode().splitlines()
    assert plan.startswith("plan: ") and int(re.search(r"generation: (\d+) tokens", statistics)[1]) < LONG


def test_a_reader_that_has_enough_ends_the_process_quietly(start, directory):
    process = start("--model", directory, "--prompt", PROMPT, "--ignore-eos", "--quiet", "--max-new-tokens", LONG)
    assert len(process.stdout.read(4)) > 0  # as `| head -c 4`
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=300)) == (b"", 1)


def test_a_reader_that_is_gone_before_the_end_is_no_traceback(start, directory):
    """What is printed last leaves Python's buffer only when the process ends."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start("--model", directory, "--prompt", PROMPT, "--plan", "--json", "--quiet", stdout=writing)
    os.close(writing)
    assert (process.stderr.read(), process.wait(timeout=300)) == (b"", 1)


def test_libraries_add_no_lines_to_an_error(start, directory):
    """transformers warns of prompts beyond the tokenizer's model_max_length, and of odd values in config.json."""
    process = start("--model", directory, "--prompt", "word " * 2000)
    out, err = (stream.decode() for stream in process.communicate(timeout=300))
    expect_error(Result(process.returncode, out, err), 2, f"more than the model's {LONG + 100} positions")


# Compiled functions


def test_a_second_start_compiles_little(start, directory, tmp_path):
    """The seconds that JAX says it compiled for, in two processes."""
    code = """if True:
        import sys, jax
        from kvpr_jax.generate.__main__ import main
        seconds = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, duration, **_: seconds.append(duration) if "backend_compile" in name else None
        )
        code = main(sys.argv[1:])
        print(sum(seconds), file=sys.stderr)
        sys.exit(code)
    """
    arguments = ["--model", str(directory), "--prompt", PROMPT, "--split", "3", "--max-new-tokens", "9", "--quiet"]

    def run_again(*more: str) -> tuple[str, float]:
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": ""}  # compiled as for users
        command = [sys.executable, "-c", code, *arguments, *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout, float(done.stderr)

    give_profile(tmp_path, directory)
    text, _ = run_again("--no-compilation-cache")
    assert not (tmp_path / "kvpr_jax" / "compiled").exists()
    first, first_s = run_again()
    second, second_s = run_again()
    assert first == second == text and second_s <= 0.25 * first_s
