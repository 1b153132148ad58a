"""The decode benchmark on a small shape: it measures what it says, keeps every trial, refuses unknown shapes."""

import dataclasses
import json
import os
import re
import shlex
import statistics
import weakref
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import helpers
from kvpr_jax import checkpoint, compiling, costs, engines, memory, scheduler
from kvpr_jax.models import weights_bytes
from kvpr_jax.plan import Request
from kvpr_jax.profiling import decode, link, matmul, plain, residency, settings
from kvpr_jax.profiling import measure as measuring
from kvpr_jax.profiling import report as reports
from kvpr_jax.runtime import Decoder

SETTING = ["--layers", "2", "--batch", "2", "--prompt", "9", "--new-tokens", "3", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def _small_measurements(monkeypatch):
    monkeypatch.setattr(link, "SIZES", (2**16, 2**20))
    monkeypatch.setattr(matmul, "SHAPES", ((256, 128, 64),))


def test_the_report_holds_every_trial_and_the_bytes_of_each_split(tmp_path, capsys):
    out = tmp_path / "gpu" / "report.json"
    splits = ["--split", "0%", "--split", "100%"]
    assert decode.main(["--model", str(checkpoint.BUNDLED), *SETTING, *splits, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert "| step / floor |" in printed and report["versions"]["jax"]
    streamed, held = report["results"]
    config, _ = checkpoint.read_config(checkpoint.BUNDLED)
    assert streamed["step_bytes"] == [2 * 2 * 9 * config.kv_width * 4] * 3  # layers · batch · tokens · width · bytes
    assert held["step_bytes"] == [2 * 2 * 9 * config.activation_width * 4] * 3
    assert streamed["compute_s"] > 0 and streamed["prefill_flops"] > 0
    speed_up = sum(streamed["step_s"]) / sum(held["step_s"])
    assert [row["over l = 0"] for row in report["table"]] == ["1.00x", f"{speed_up:.2f}x"]
    for result, row in zip(report["results"], report["table"], strict=True):
        assert len(result["step_s"]) == 3 and result["prefill_s"] > 0 and min(result["step_s"]) > 0
        step_s = statistics.median(result["step_s"])
        assert row["step (ms)"] == f"{step_s * 1e3:.2f}"
        floor_s = result["step_bytes"][0] / report["link_gb_per_s"] / 1e9
        assert float(row["step / floor"]) == pytest.approx(step_s / floor_s, abs=0.0006)
        assert row["step (ms)"] in printed
        rate = float(row["GB/s"]) * 1e9
        assert rate == pytest.approx(result["step_bytes"][0] / step_s, abs=0.06e9)
        after = [result[name] for name in ("pinned_bytes", "other_host_bytes", "device_bytes")]
        assert all(len(column) == 3 for column in after) and min(after[1]) > 10**8
        assert result["cache_host_bytes"] == result["step_bytes"][0]


def test_pinned_memory_is_shown_beside_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "resident_bytes", lambda: (3 * 2**20, 2**30))
    out = tmp_path / "report.json"
    assert decode.main(["--model", str(checkpoint.BUNDLED), *SETTING, "--split", "0%", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    ratio = 3 * 2**20 / report["results"][0]["cache_host_bytes"]
    assert report["table"][0]["pinned / cache"] == f"{ratio:.3f}"


def test_no_steps_is_one_line(capsys):
    assert decode.main(["--new-tokens", "0"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "new-tokens 0 must be at least 1" in error


def test_a_cache_on_the_device_crosses_no_link(tmp_path):
    out = tmp_path / "report.json"
    assert decode.main(["--model", str(checkpoint.BUNDLED), *SETTING, "--split", "device", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["results"][0]["step_bytes"] == [0] * 3
    assert report["table"][0]["split"] == "all on the device" and report["table"][0]["step / floor"] == "-"


def test_the_report_goes_below_the_current_directory_by_default(tmp_path, monkeypatch, capsys):
    """And what is there already is replaced."""
    monkeypatch.chdir(tmp_path)
    out = Path("profiling/results/cpu/decode-tiny-batch-2-prompt-9-layers-2.json")
    out.parent.mkdir(parents=True)
    out.write_text("an older report")
    assert decode.main(["--model", str(checkpoint.BUNDLED), *SETTING, "--split", "device"]) == 0
    assert os.listdir(out.parent) == [out.name]
    assert json.loads(out.read_text())["setting"] == {
        "model": "tiny", "layers": 2, "dtype": "float32", "batch": 2, "prompt": 9, "engine": "overlapped",
    }  # fmt: skip
    assert capsys.readouterr().err == f"wrote {out}\n"


@pytest.mark.parametrize("line, device, expected", [
    ("", "cpu", "cpu/decode-opt-6.7b-batch-32-prompt-1024"),
    ("--model facebook/OPT-1.3b --prompt 7", "TPU v4", "tpu-v4/decode-opt-1.3b-batch-32-prompt-7"),
    ("--layers 24 --batch 8", "NVIDIA H200", "nvidia-h200/decode-opt-6.7b-batch-8-prompt-1024-layers-24"),
    ("--model /models/My_Model/config.json", "cpu", "cpu/decode-my-model-batch-32-prompt-1024"),
    ("--model /models/tiny/snapshots/..", "cpu", "cpu/decode-tiny-batch-32-prompt-1024"),
], ids=str)  # fmt: skip
def test_the_reports_name_says_what_was_measured(line, device, expected, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(device_kind=device)])
    arguments = decode.parser().parse_args(shlex.split(line))
    out = settings.Setting.of(arguments).default_out("decode")
    assert out == Path(f"profiling/results/{expected}.json")


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    reports.write(path, {"old": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(ValueError, match=r"report\.json' cannot be written: full"):
            reports.write(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == [path.name]


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    """/dev/null, say, for whoever wants no report."""
    (tmp_path / "link").symlink_to(tmp_path / "report.json")
    reports.write(tmp_path / "report.json", {"old": 1})
    reports.write(tmp_path / "link", {})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "report.json").read_text() == "{}\n"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    reports.write(tmp_path / "pipe", {})
    assert (tmp_path / "pipe").is_fifo() and os.read(reader, 9) == b"{}\n"
    os.close(reader)


def test_few_steps_warm_up(monkeypatch):
    """What flushes make necessary is compiled beside the steps that are timed."""
    counted, decoder = [], Decoder(helpers.random_model(helpers.OPT))
    run = decode.run
    monkeypatch.setattr(decode, "run", lambda *of: counted.append(of[-1]) or run(*of))
    requests = [Request("0%"), Request("0%", tail_tokens=3)]  # of which the second one is flushed once
    decode.measure(decoder, [[3, 4, 5]], 5, requests)
    assert counted == [2, 2, 5, 2, 2, 5]


def test_settings_take_turns_and_each_keeps_the_steps_of_all_its_turns(monkeypatch):
    """A short run comes before each timed one, and two in the first turn, whose difference is what was compiled. No
    setting's cache is there beside another's."""
    happened, alive, run = [], [], decode.run

    def numbered(decoder, prompts, plan, steps):
        assert not any(cache() for cache in alive)
        happened.append((plan.split, steps))
        turn = len(happened)
        times, cache = run(decoder, prompts, plan, steps)
        alive.append(weakref.ref(cache))
        waits = {"prefill_s": 1 / turn, "recompiled": turn, "longest_wait_s": float(turn)}
        return times | waits | {"step_s": [100.0 - turn] * steps}, cache

    monkeypatch.setattr(decode, "run", numbered)
    monkeypatch.setattr(decode, "compute_s", lambda decoder, cache: happened.append("compute") or 0.5)
    decoder = Decoder(helpers.random_model(helpers.OPT))
    few, many = decode.measure(decoder, [[3, 4, 5]], 3, [Request("0"), Request("2")], 3)
    first = [(0, 2), (0, 2), (0, 3), (2, 2), (2, 2), (2, 3)]
    later = [(0, 2), (0, 3), (2, 2), (2, 3)]
    assert happened == [*first, *later, *later[:2], "compute", *later[2:], "compute"]
    assert few["step_s"] == [97] * 3 + [92] * 3 + [88] * 3 and many["step_s"] == [94] * 3 + [90] * 3 + [85] * 3
    assert len(few["predicted_step_s"]) == len(few["device_bytes"]) == 9
    assert (few["recompiled"], few["longest_wait_s"], few["prefill_s"]) == (3 + 8 + 12, 12, 1 / 12)
    assert few["compile_s"] == pytest.approx(1 / 1 + 2 * 99 - (1 / 2 + 2 * 98))
    assert few["compute_s"] == 0.5 and few["cache_host_bytes"] == few["step_bytes"][0] > many["cache_host_bytes"]


@pytest.mark.parametrize("ahead", [True, False])
def test_steps_are_timed_by_when_their_tokens_are_there(ahead, monkeypatch):
    """Not by when they are read, which of steps issued ahead is later."""
    there = (1.0, 1.5, 4.0, 4.25)
    monkeypatch.setattr(decode, "ready_at", lambda tokens: there[int(tokens[0])])
    first, state = jnp.zeros(2, jnp.int32), iter("abc")
    times = decode.timed_steps(
        lambda tokens: jax.nn.one_hot(tokens + 1, 5), first, 3, lambda: {"state": next(state)}, lambda: ahead
    )
    assert (times["step_s"], times["state"]) == ([0.5, 2.5, 0.25], ["a", "b", "c"])


@pytest.mark.parametrize("tail, steps, count", [(8, 7, 5), (1, 1, 1)])  # behind 7 steps, copies of the next are ahead
def test_compute_alone_is_that_of_the_steps_calls(tail, steps, count, monkeypatch):
    """By the same functions over the same segments and as long a tail, but that nothing moves. No flush fills it."""
    monkeypatch.setattr(costs, "GROUP", 1)
    decoder, prompts = Decoder(helpers.random_model(helpers.OPT)), [[3, 4, 5]]
    _, cache = decode.run(decoder, prompts, decoder.plan(prompts, tail + 1, Request("2", tail_tokens=tail)), steps)
    seen, held = [], memory.described(cache.groups[0], host=False)
    cache.functions = [lambda *of, own=own: seen.append((of[2], of[4])) or own(*of) for own in cache.functions]
    compiled = compiling.compiled_here()
    assert decode.compute_s(decoder, cache) > 0
    assert len(seen) == 4 * count * 3 and cache.flushes == 0
    assert all(memory.described(segments) == held for segments, _ in seen)
    assert {id(segment) for segments, _ in seen for segment in segments} == {id(segment) for segment in seen[0][0]}
    slots = [3 + step for _ in range(4) for step in range(count) for _ in cache.groups]
    assert [int(place.slots[0]) for _, place in seen] == slots
    assert compiling.compiled_here() - compiled <= 2  # the first slot and the tokens, as arrays


def test_a_device_that_holds_a_part_of_the_cache_is_a_setting_of_its_own(monkeypatch, tmp_path):
    """Of 64 tokens, the tail's three and 34 of the prompt's."""
    slow = helpers.profile(to_device=[(2**10, 1e-3), (2**20, 1.0)])
    monkeypatch.setattr(measuring, "load_or_measure", lambda *_: slow)
    config, _ = checkpoint.read_config(checkpoint.BUNDLED)
    gib = 37.5 * 2 * 2 * config.kv_width * 4 / memory.GIB
    setting = [*SETTING, "--prompt", "64", "--split", "0%", "--device-cache-gib", str(gib)]
    assert decode.main(["--model", str(checkpoint.BUNDLED), *setting, "--out", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["resident"] for row in report["table"]] == ["0", "34"]
    assert [row["split"] for row in report["table"]] == ["0 of 64", "30 of 64"]
    assert report["results"][1]["step_bytes"] == [2 * 2 * 30 * config.activation_width * 4] * 3
    streamed_s, held_s = (sum(result["step_s"]) for result in report["results"])
    assert report["table"][1]["over l = 0"] == f"{streamed_s / held_s:.2f}x"


def test_a_run_with_flushes_is_set_beside_its_steady_states(monkeypatch, tmp_path):
    """Three steps of 1 s, three of 3 s, one slow among each, and the first of those of 4 s."""
    plan = {"batch": 8, "split": 5, "cached_tokens": 9, "recompute": "absorb", "tail_tokens": 3, "flushes": 2}
    grown = {"plan": plan, "step_s": [1.0, 1.0, 2.0, 3.0, 3.0, 5.0, 4.0], "recompiled": 1, "longest_wait_s": 0.25}
    (row,) = decode.growth([grown, {"plan": plan | {"flushes": 1}, "step_s": [1.0]}])
    assert list(row.values()) == [
        "5 of 9", "absorb", "7", "2", f"{56 / 19:.1f}", f"{56 / 16:.1f}", f"{16 / 19:.3f}", "1", "250.0"
    ]  # fmt: skip
    out = tmp_path / "report.json"
    monkeypatch.setattr(scheduler, "TAIL_TOKENS", (3, 3))
    monkeypatch.setattr(scheduler, "TAIL_MOST", 3)
    setting = [*SETTING, "--new-tokens", "7", "--split", "0%", "--out", str(out)]
    assert decode.main(["--model", str(checkpoint.BUNDLED), *setting]) == 0
    report = json.loads(out.read_text())
    assert [row["flushes"] for row in report["growth"]] == [str(report["results"][0]["plan"]["flushes"])] == ["2"]
    (row,), (result,) = report["table"], report["results"]
    assert len(set(result["step_bytes"])) == 3
    steps = zip(result["step_s"], result["step_bytes"], strict=True)
    ratio = statistics.median(step_s * report["link_gb_per_s"] * 1e9 / moved for step_s, moved in steps)
    assert float(row["step / floor"]) == pytest.approx(ratio, abs=0.0006)


@pytest.mark.parametrize("name", ["opt-350m", "mistral", "bloom", "qwen3"])
def test_plain_jax_decodes_the_same_tokens(name):
    """Its step has one function for everything, compiled once."""
    model = checkpoint.load_model(Path(__file__).parent / "golden" / name, "float32")
    decoder, prompts = Decoder(model), helpers.random_prompts([18, 18, 18], model.config.vocab_size)
    tokens, expected, _, _ = helpers.greedy(decoder, prompts, 12, Request("50%", offload="all", tail_tokens=4))
    compiled = plain._step._cache_size()
    cache, logits = plain.prefill(decoder, prompts, decoder.plan(prompts, 12, Request(offload="none")))
    for index in range(12):
        helpers.assert_close(logits, expected[index])
        assert logits.argmax(-1).tolist() == tokens[:, index].tolist()
        if index < 11:
            logits = plain.step(decoder, cache, jnp.asarray(tokens[:, index]))
    assert plain._step._cache_size() == compiled + 1
    assert cache.slots.tolist() == [29] and cache.layers[0][0].shape[1] == 29


def test_plain_jax_stands_beside_a_cache_on_the_device(tmp_path):
    out = tmp_path / "report.json"
    splits = ["--split", "device", "--split", "plain"]
    assert decode.main(["--model", str(checkpoint.BUNDLED), *SETTING, *splits, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    ours, plainly = report["table"]
    assert [ours["split"], plainly["split"]] == ["all on the device", "plain JAX, all on the device"]
    assert ours["predicted (ms)"] != "-" and plainly["predicted (ms)"] == "-"
    assert plainly["step (ms)"] == f"{statistics.median(report['results'][1]['step_s']) * 1e3:.2f}"
    assert len(report["results"][1]["step_s"]) == 3 and report["results"][1]["compile_s"] > 0


def test_all_arrangements_keep_as_much_on_the_device():
    assert list(residency.arrangements(4, 10, 50).values()) == [[5, 5, 5, 5], [0, 10, 0, 10], [10, 10, 0, 0]]
    assert list(residency.arrangements(8, 40, 25).values())[1:] == [[0, 0, 0, 40, 0, 0, 0, 40], [40, 40, *[0] * 6]]
    for layers, tokens, share in ((3, 10, 50), (4, 9, 50), (4, 10, 0), (4, 10, 100)):
        with pytest.raises(
            ValueError, match=rf"share {share} must .* whole number of {layers} layers and of {tokens} "
        ):
            residency.arrangements(layers, tokens, share)


def test_every_arrangement_decodes_the_same_and_moves_the_same_bytes():
    config = dataclasses.replace(helpers.OPT, num_layers=4)
    decoder, prompts = Decoder(helpers.random_model(config)), helpers.random_prompts([10, 10], config.vocab_size)
    tokens, expected, _, _ = helpers.greedy(decoder, prompts, 4, Request("0%", offload="all"))
    for stay in residency.arrangements(4, 10, 50).values():
        cache, _ = decoder.prefill(prompts, decoder.plan(prompts, 4, Request(offload="none")))
        residency.leave(cache, stay)
        on_device = [sum(s.tokens for s in segments if not memory.on_host(s)) for segments in cache.groups]
        assert on_device == stay and isinstance(cache.engine, engines.Overlapped)
        assert cache.bytes_per_step == sum(map(memory.host_bytes, cache.groups))
        assert cache.bytes_per_step == 4 * 2 * 5 * config.kv_width * 4
        for index in range(3):
            helpers.assert_close(decoder.step(cache, jnp.asarray(tokens[:, index])), expected[index + 1])


def test_the_report_of_arrangements_holds_every_step(tmp_path, monkeypatch, capsys):
    """Layer by layer, though plans have them in groups."""
    monkeypatch.setattr(costs, "GROUP", 8)
    out = tmp_path / "report.json"
    setting = ["--model", str(checkpoint.BUNDLED), *SETTING, "--prompt", "10"]
    assert residency.main([*setting, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [row["stays on the device"] for row in report["table"]] == list(report["arrangements"])
    assert [len(result["step_s"]) for result in report["arrangements"].values()] == [3] * 3
    assert reports.table(report["table"]) in capsys.readouterr().out and reports.page(tmp_path)
    row, result = report["table"][0], report["arrangements"]["a share of every layer"]
    ratio = statistics.median(result["step_s"]) * report["link_gb_per_s"] * 1e9 / result["step_bytes"][0]
    assert float(row["step / floor"]) == pytest.approx(ratio, abs=0.0006)
    assert residency.main([*setting, "--prompt", "9", "--out", str(out)]) == 1
    assert re.fullmatch(r"kvpr_jax\.profiling\.residency: error: share 50 must .*\n", capsys.readouterr().err[-200:])


@pytest.mark.parametrize("out", ["folder", "file/report.json"])
def test_a_report_that_could_not_be_written_is_an_error_before_anything_is_measured(out, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "Decoder", lambda *_: pytest.fail("measured first"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert decode.main(["--model", str(checkpoint.BUNDLED), "--out", str(tmp_path / out)]) == 1
    line = rf"kvpr_jax\.profiling\.decode: error: '{tmp_path / out}' cannot be written: .*\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_prefill_flops_are_those_of_a_count_by_hand():
    """One layer of width 4, MLP 8, one head: 4·16 + 2·32 numbers in its kernels, for 2 · 3 tokens."""
    config = dataclasses.replace(helpers.OPT, num_layers=1, hidden_size=4, embed_size=4, num_heads=1, num_kv_heads=1,
                                 head_dim=4, mlp_size=8)  # fmt: skip
    decoder = Decoder(helpers.random_model(config))
    plan = decoder.plan([[3, 4, 5], [6, 7, 8]], 2)
    assert decode.prefill_flops(decoder, plan) == 2 * 6 * (4 * 16 + 2 * 32) + 2 * 6 * 3 * 4


def test_an_unknown_shape_is_one_line(capsys):
    assert decode.main(["--model", "opt-7b"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'opt-7b': neither a directory nor one of opt-125m" in error


@pytest.mark.parametrize(
    "name, billions", [("opt-125m", 0.125), ("opt-1.3b", 1.316), ("opt-6.7b", 6.658), ("opt-30b", 29.975)]
)
def test_named_shapes_have_the_published_size(name, billions):
    nbytes = weights_bytes(settings.shape(name, None), jnp.dtype("bfloat16"))
    assert nbytes / 2 / 1e9 == pytest.approx(billions, abs=0.001)


RESULTS = Path(__file__).parents[1] / "profiling" / "results"


@pytest.mark.parametrize("folder", sorted(path for path in RESULTS.iterdir() if path.is_dir()), ids=lambda p: p.name)
def test_the_pages_of_results_are_what_their_reports_say(folder):
    assert (folder / "README.md").read_text() == reports.page(folder)


def test_a_page_has_each_report_below_its_command(tmp_path, capsys):
    assert reports.main([str(tmp_path)]) == 1 and "has no reports" in capsys.readouterr().err
    report = reports.header("decode", ["--batch", "3"]) | {"table": [{"a": "1", "b": "2"}], "growth": []}
    reports.write(tmp_path / "some.json", report)
    (tmp_path / "some.svg").write_text("<svg/>")
    (tmp_path / "README.md").write_text("# Here\n\nBy hand.\n\n## old\n\ngone\n")
    assert reports.main([str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# Here\n\nBy hand.\n\n## some\n\n    python -m kvpr_jax.profiling.decode --batch 3\n\n")
    assert page.endswith("| a | b |\n| --- | --- |\n| 1 | 2 |\n\n![some](some.svg)\n") and "gone" not in page
    assert "profile of version" not in page
    profiled = {"profile": {"machine": {"version": "7"}}}
    reports.write(tmp_path / "some.json", report | profiled | {"growth": [{"c": "3"}], "summary": [{"d": "4"}]})
    tables = "| 1 | 2 |\n\n| c |\n| --- |\n| 3 |\n\n| d |\n| --- |\n| 4 |\n\n![some]"
    assert tables in reports.page(tmp_path) and "; profile of version 7.\n" in reports.page(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    assert reports.main([str(tmp_path)]) == 1 and "other.json is not a report" in capsys.readouterr().err
