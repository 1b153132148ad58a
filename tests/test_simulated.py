"""Simulated devices: the formulas by hand, the measurements they come from, files, and plans for GPUs not here."""

import dataclasses
import json
import re
import shutil
import statistics

import jax.numpy as jnp
import pytest

from helpers import GQA, LLAMA, OPT, profile
from kvpr_jax.models import released
from kvpr_jax.profiling import curves, derived, device, simulated
from kvpr_jax.profiling import profile as profiles
from kvpr_jax.profiling.derived import Report
from kvpr_jax.profiling.device import Device, given
from kvpr_jax.profiling.simulated import main

BFLOAT16 = jnp.dtype("bfloat16")
MADE_UP = Device(
    name="Made Up", synthetic=True, source="a test", memory_bytes=10**9, link_bytes_per_s=2e10, flops_per_s=3e14,
    weights_bytes_per_s=5e11, keys_values_bytes_per_s=7e11, activations_bytes_per_s=11e11, layer_s=1e-5, absorb_s=5e-5,
    head_s=2e-4, dispatch_s=3e-5, layer_dispatch_s=2e-5, segment_dispatch_s=1e-5, issue_s=4e-6, compile_s=1.25,
)  # fmt: skip
SHIPPED = ["nvidia-a100-80gb-pcie", "nvidia-h200", "nvidia-l4", "nvidia-rtx-4090"]


def added_s(curve: list[tuple[int, float]]) -> float:
    """By one token more: a device's segments are on a line."""
    return curves.of_segment(curve, 5001) - curves.of_segment(curve, 5000)


def absorbing_s(curve: list[tuple[int, float]]) -> float:
    """By an absorbed segment beside its tokens."""
    return curves.of_segment(curve, 2) - 2 * added_s(curve)


def test_the_profile_of_opt_by_hand():
    """D 44, 4 heads of 11, F 53, V 89; keys and values are both absorbed."""
    found = MADE_UP.profile(OPT, BFLOAT16, 3)
    mlp = 44 * 53 + 53 + 53 * 44 + 44
    layer = 4 * (44 * 44 + 44) + mlp + 4 * 44
    assert found.base_s == pytest.approx(1e-5 + layer * 2 / 5e11)
    assert found.further_s == found.base_s
    assert found.mlp_s == pytest.approx(found.base_s * mlp / layer)
    assert added_s(found.keys_values) == pytest.approx(2 * 3 * 44 * 2 / 7e11)
    assert added_s(found.project) == pytest.approx(4 * 3 * 44 * 44 / 3e14 + 2 * 3 * 44 * 2 / 7e11)
    assert added_s(found.absorb) == pytest.approx(2 * 3 * 44 * 2 / 11e11)
    assert absorbing_s(found.absorb) == pytest.approx(5e-5 + 2 * 44 * 44 * 2 / 5e11)
    assert found.head_s == pytest.approx(2e-4 + 89 * 44 * 2 / 5e11)
    assert (found.dispatch_s, found.layer_dispatch_s, found.segment_dispatch_s) == (3e-5, 2e-5, 1e-5)
    assert (found.issue_s, found.compile_s) == (4e-6, 1.25)
    for copies in (found.to_device, found.to_host, found.both):
        assert [seconds for _, seconds in copies] == pytest.approx([nbytes / 2e10 for nbytes, _ in copies])
    assert found.machine["device"] == "Made Up (synthetic)" and found.machine["batch"] == "3"
    assert dataclasses.replace(MADE_UP, synthetic=False).profile(OPT, BFLOAT16, 3).machine["device"] == "Made Up"


def test_the_profile_of_a_rotary_model_by_hand():
    """D 60, 6 heads of 10, F 53: keys are projected, and activations read for values only."""
    found = MADE_UP.profile(LLAMA, BFLOAT16, 5)
    assert found.base_s == pytest.approx(1e-5 + (4 * 60 * 60 + 3 * 60 * 53 + 2 * 60) * 2 / 5e11)
    assert added_s(found.project) == pytest.approx(4 * 5 * 60 * 60 / 3e14 + 2 * 5 * 60 * 2 / 7e11)
    assert added_s(found.absorb) == pytest.approx(2 * 5 * 60 * 60 / 3e14 + 5 * 60 * 2 / 7e11 + 5 * 60 * 2 / 11e11)
    assert absorbing_s(found.absorb) == pytest.approx(5e-5 + 60 * 60 * 2 / 5e11)
    grouped = MADE_UP.profile(GQA, BFLOAT16, 5)  # 2 heads of keys and values
    assert added_s(grouped.keys_values) == pytest.approx(2 * 5 * 20 * 2 / 7e11)
    assert absorbing_s(grouped.absorb) == pytest.approx(5e-5 + 60 * 20 * 2 / 5e11)
    assert added_s(grouped.project) == pytest.approx(4 * 5 * 60 * 20 / 3e14 + 2 * 5 * 20 * 2 / 7e11)


def test_partly_rotated_keys_are_partly_projected():
    """Phi-2: 32 heads of 80 dimensions, of which 32 are rotated; D 2560."""
    found = MADE_UP.profile(released.release("phi-2").config, BFLOAT16, 2)
    formed = 2 * 2 * 2560 * 32 * 32 / 3e14 + 2 * 32 * 32 * 2 / 7e11
    assert added_s(found.absorb) == pytest.approx(formed + 2 * 2 * 2560 * 2 / 11e11)
    assert absorbing_s(found.absorb) == pytest.approx(5e-5 + 32 * (48 + 80) * 2560 * 2 / 5e11)


def test_large_batches_are_bound_by_flops():
    batch = 2000
    layer = 4 * (44 * 44 + 44) + 44 * 53 + 53 + 53 * 44 + 44 + 4 * 44
    found = MADE_UP.profile(OPT, BFLOAT16, batch)
    assert found.base_s == pytest.approx(1e-5 + 2 * batch * layer / 3e14)
    assert absorbing_s(found.absorb) == pytest.approx(5e-5 + 2 * batch * 2 * 44 * 44 / 3e14)


def test_inverting_the_formulas_gives_the_device_back():
    """From profiles that a device computed itself, for models of each kind."""
    reports = []
    for name in ("opt-6.7b", "opt-13b", "llama-2-7b", "phi-2"):
        config = released.release(name).config
        given = dataclasses.asdict(MADE_UP.profile(config, BFLOAT16, 4))
        reports.append(Report(name, config, BFLOAT16, 4, MADE_UP.link_bytes_per_s, given, []))
    found = derived.measured(reports)
    for field in dataclasses.fields(Device):
        if field.type is float:
            assert getattr(found, field.name) == pytest.approx(getattr(MADE_UP, field.name), rel=1e-3), field.name
    assert found.name == "NVIDIA H200" and not found.synthetic and found.memory_bytes == 141 * 10**9


def test_synthetic_devices_have_the_h200s_shares_of_their_own_peaks():
    h200, *others = derived.devices()
    assert [each.name for each in others] == ["NVIDIA A100 80GB PCIe", "NVIDIA RTX 4090", "NVIDIA L4"]
    peaks = {  # PCIe 4.0 x16, TFLOP/s, memory GB/s and GB
        "NVIDIA A100 80GB PCIe": (312, 1935, 80),
        "NVIDIA RTX 4090": (165.2, 1008, 24),
        "NVIDIA L4": (121, 300, 24),
    }
    for each in others:
        tflops, gb_per_s, gb = peaks[each.name]
        assert each.synthetic and each.memory_bytes == gb * 10**9
        assert each.link_bytes_per_s == pytest.approx(h200.link_bytes_per_s / 2, rel=1e-3)  # of PCIe 5.0 x16
        assert each.flops_per_s == pytest.approx(h200.flops_per_s * tflops / 989.5, rel=1e-3)
        for name in ("weights_bytes_per_s", "keys_values_bytes_per_s", "activations_bytes_per_s"):
            assert getattr(each, name) == pytest.approx(getattr(h200, name) * gb_per_s / 4800, rel=1e-3)
        for name in ("layer_s", "absorb_s", "head_s", *derived.HOST_TIMES):
            assert getattr(each, name) == getattr(h200, name)
    assert all(0 < share < 1 for share in derived.shares(h200).values())
    assert derived.shares(h200)["link_bytes_per_s"] == pytest.approx(h200.link_bytes_per_s / 63.0e9, rel=1e-3)


def test_the_h200_reproduces_what_was_measured_on_it():
    """Within what its page states: a few percent."""
    h200, reports = derived.devices()[0], derived.reports()
    assert len(reports) == 13
    errors, heads = [], []
    for report in reports:
        found = h200.profile(report.config, report.dtype, report.batch)
        noise = 0.15 if report.batch == 1 else 0.1  # one sequence's tokens take little beside a segment
        assert added_s(found.project) == pytest.approx(derived.segment_line(report.profile["project"])[1], rel=noise)
        assert absorbing_s(found.absorb) == pytest.approx(derived.segment_line(report.profile["absorb"])[0], abs=4e-5)
        assert found.base_s == pytest.approx(report.profile["base_s"], rel=0.2)
        assert found.head_s == pytest.approx(report.profile["head_s"], abs=2.3e-4)  # up to version 14, the host's time
        heads.append(found.head_s / report.profile["head_s"])
        errors += [
            abs(report.predicted_s(result, h200) / report.step_s(result) - 1)
            for result in report.results
            if result["plan"]["offloaded"]
        ]
    assert statistics.median(abs(ratio - 1) for ratio in heads) < 0.25
    assert len(errors) > 30 and statistics.median(errors) < 0.0075 and max(errors) < 0.055
    page = (device.DEVICES / "README.md").read_text()
    stated = re.search(r"error is (\S+)% in the median and (\S+)% at most", page)
    assert [float(text) for text in stated.groups()] == pytest.approx(
        [100 * statistics.median(errors), 100 * max(errors)], abs=0.05
    )


def test_the_committed_devices_and_their_page_are_current(monkeypatch, tmp_path, capsys):
    committed = device.DEVICES
    monkeypatch.setattr(simulated, "DEVICES", tmp_path)
    assert main(["--write"]) == 0
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(written) == {f"{name}.json" for name in SHIPPED} | {"README.md"}
    assert written == {path.name: path.read_text() for path in committed.iterdir()}, (
        "python -m kvpr_jax.profiling.simulated --write"
    )
    assert capsys.readouterr().out.split("\n\n")[1].strip() in written["README.md"]


def test_devices_go_to_files_and_back(tmp_path):
    path = tmp_path / "made-up.json"
    path.write_text(json.dumps(dataclasses.asdict(MADE_UP)))
    assert device.parsed(json.loads(path.read_text())) == MADE_UP
    assert given(str(path), OPT, BFLOAT16, 3) == (MADE_UP.profile(OPT, BFLOAT16, 3), 10**9)
    path.write_text(path.read_text().replace("1.25", "2"))  # a whole number is a number
    assert given(str(path), OPT, BFLOAT16, 3)[0].compile_s == 2.0


def test_shipped_devices_go_by_name():
    assert device.shipped() == SHIPPED
    for each in derived.devices():
        name = each.name.lower().replace(" ", "-")
        assert given(name, OPT, BFLOAT16, 3) == (each.profile(OPT, BFLOAT16, 3), each.memory_bytes)


@pytest.fixture
def stored(tmp_path):
    """A function that stores a profile of OPT in bfloat16 for batch 3, of another machine, with changes; its path."""

    def store(**changes):
        machine = {
            "version": str(profiles.VERSION),
            "device": "other",
            "model": repr(OPT),
            "dtype": "bfloat16",
            "batch": "3",
        }
        path = tmp_path / "stored.json"
        profiles.write(path, profile(machine=machine | changes))
        return str(path)

    return store


def test_a_measured_profile_of_another_machine_is_taken(stored):
    path = stored(memory="1000")
    found, memory_bytes = given(path, OPT, BFLOAT16, 3)
    assert memory_bytes == 1000 and found.machine["device"] == "other"
    assert found == profile(machine=found.machine)


@pytest.mark.parametrize("changes, message", [
    ({"model": repr(dataclasses.replace(OPT, num_layers=7))},
     "it was measured for model num_layers=7, and this run has num_layers=3"),
    ({"dtype": "float16"}, "it was measured for dtype float16, and this run has bfloat16"),
    ({"batch": "4"}, "it was measured for batch 4, and this run has 3"),
    ({"memory": "much"}, "memory 'much' must be a number of bytes"),
    ({"version": "1"}, f"it was measured for version 1, and this run has {profiles.VERSION}"),
])  # fmt: skip
def test_a_measured_profile_of_something_else_is_refused(stored, changes, message):
    path = stored(**changes)
    with pytest.raises(ValueError) as refused:
        given(path, OPT, BFLOAT16, 3)
    assert str(refused.value) == f"profile {path!r}: {message}"


def changed(**changes):
    return json.dumps({k: v for k, v in (dataclasses.asdict(MADE_UP) | changes).items() if v is not None})


@pytest.mark.parametrize("text, message", [
    ("{", "is no JSON file: Expecting"),
    ("[" * 10**5, "is no JSON file: "),
    (b"\xff\xfe\x00", "is no JSON file: "),
    ("[]", "a Device is a JSON object, not []"),
    ("{}", "a Device lacks absorb_s, activations_bytes_per_s, "),
    (changed(layer_s=None), "a Device lacks layer_s"),
    (changed(price=3), "a Device has no use for price"),
    (changed(layer_s=None, price=3), "a Device lacks layer_s and has no use for price"),
    (changed(flops_per_s=-1.0), "flops_per_s -1.0 must be above 0 and finite"),
    (changed(flops_per_s=0), "flops_per_s 0.0 must be above 0 and finite"),
    (changed(link_bytes_per_s=float("inf")), "link_bytes_per_s inf must be above 0 and finite"),
    (changed(link_bytes_per_s=float("nan")), "link_bytes_per_s nan must be above 0 and finite"),
    (changed(link_bytes_per_s=10**400), "link_bytes_per_s inf must be above 0 and finite"),
    (changed(head_s=-1e-3), "head_s -0.001 must be 0 or more and finite"),
    (changed(head_s="fast"), "head_s 'fast' must be of type float"),
    (changed(head_s=True), "head_s True must be of type float"),
    (changed(memory_bytes=1.5), "memory_bytes 1.5 must be of type int"),
    (changed(memory_bytes=0), "memory_bytes 0 must be above 0"),
    (changed(synthetic="no"), "synthetic 'no' must be of type bool"),
    (json.dumps({"machine": {}}), "a Profile lacks absorb, base_s, "),
    (json.dumps(dataclasses.asdict(profile(base_s=-1.0, further_s=1e-4))), "base_s -1.0 is of no use: -1.0 s"),
    (json.dumps(dataclasses.asdict(profile(to_device=[]))), "to_device [] is of no use: "),
    (json.dumps(dataclasses.asdict(profile()) | {"machine": 3}), "machine 3 is of no use: "),
])  # fmt: skip
def test_files_of_no_use_are_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "given.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as refused:
        given(str(path), OPT, BFLOAT16, 3)
    assert str(refused.value).startswith(f"profile {str(path)!r}") and message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["nvidia-h100", "missing.json", "", "."])
def test_unknown_names_list_those_that_are_shipped(name):
    with pytest.raises(ValueError) as refused:
        given(name, OPT, BFLOAT16, 3)
    assert str(refused.value) == f"profile {name!r} is neither a file nor one of the devices {', '.join(SHIPPED)}"


def test_a_device_has_no_rates_for_float32():
    with pytest.raises(ValueError, match="profile 'nvidia-l4': dtype float32 must be bfloat16 or float16: NVIDIA L4"):
        given("nvidia-l4", OPT, jnp.dtype("float32"), 3)


def cells(printed: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in printed.split("\n\n")[1].splitlines()[2:]]


def test_the_table_by_hand(capsys):
    """OPT-6.7B on the L4, from the file's figures: 32 layers, D 4096, 32 heads of 128; every 64th split."""
    assert main(["--profile", "nvidia-l4", "--model", "opt-6.7b", "--batch", "16", "--prompt", "1024"]) == 0
    it = json.loads((device.DEVICES / "nvidia-l4.json").read_text())
    kv = 16 * 8192 * 2 / it["keys_values_bytes_per_s"]
    project = 4 * 16 * 4096**2 / it["flops_per_s"] + kv
    absorb = 2 * 16 * 4096 * 2 / it["activations_bytes_per_s"]
    absorbing = it["absorb_s"] + 2 * 4096**2 * 2 / it["weights_bytes_per_s"]
    layer = (4 * (4096**2 + 4096) + 2 * 4096 * 16384 + 4096 + 16384 + 4 * 4096) * 2
    base = it["layer_s"] + layer / it["weights_bytes_per_s"]
    head = it["head_s"] + 50272 * 4096 * 2 / it["weights_bytes_per_s"]
    bandwidth = it["link_bytes_per_s"]

    def ours(split, token, once=0.0):
        link = 16 * 2 * (split * 4096 + (1024 - split) * 8192) / bandwidth
        compute = base + bool(split) * once + split * token + (1024 - split) * kv
        return max(32 * link, 32 * compute + head)

    def paper(split):
        first, rest = 16 * 2 * split * 4096 / bandwidth, 16 * 2 * (1024 - split) * 8192 / bandwidth
        return 32 * (first + max(rest, base + split * project + (1024 - split) * kv)) + head

    def best(step_s):
        split = min(range(0, 1025, 64), key=step_s)
        return f"{split}, {step_s(0) / step_s(split):.2f}x"

    expected = [
        "NVIDIA L4 (synthetic)", "opt-6.7b", f"{ours(0, 0.0) * 1e3:.1f}", best(lambda split: ours(split, project)),
        best(lambda split: ours(split, absorb, absorbing)), best(paper),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.startswith("bfloat16, batch 16, prompt 1024, all of the cache in host memory")
    assert cells(printed) == [expected] and len(set(expected[3:])) == 3


def test_rows_say_what_does_not_fit_and_what_does_not_pay(capsys):
    models = ["--model", "opt-13b", "--model", "llama-3-8b", "--batch", "8", "--prompt", "128"]
    assert main(["--profile", "nvidia-l4", "--profile", "nvidia-h200", *models]) == 0
    rows = cells(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [
        [name, model] for name in ("NVIDIA L4 (synthetic)", "NVIDIA H200") for model in ("opt-13b", "llama-3-8b")
    ]
    assert rows[0][2:] == ["weights do not fit", "-", "-", "-"]
    assert rows[1][3:] == rows[3][3:] == ["0, 1.00x"] * 3
    assert main(["--profile", "nvidia-l4", "--model", "llama-2-7b", "--batch", "512", "--prompt", "4096"]) == 0
    assert cells(capsys.readouterr().out)[0][2:] == ["no room beside the weights", "-", "-", "-"]


@pytest.mark.parametrize("memory_bytes, streamed", [(2**40, r"[\d.]+"), (2**30, "weights do not fit")])
def test_a_measured_profile_has_a_row_within_its_memory(memory_bytes, streamed, capsys, tmp_path):
    config = released.release("opt-6.7b").config
    machine = {
        "version": str(profiles.VERSION),
        "device": "other",
        "model": repr(config),
        "dtype": "float16",
        "batch": "32",
        "memory": str(memory_bytes),
    }
    profiles.write(tmp_path / "stored.json", profile(machine=machine))
    assert main(["--profile", str(tmp_path / "stored.json"), "--model", "opt-6.7b", "--dtype", "float16"]) == 0
    device, model, first, *_ = cells(capsys.readouterr().out)[0]
    assert (device, model) == ("other", "opt-6.7b") and re.fullmatch(streamed, first)


@pytest.mark.parametrize("argv, message", [
    (["--profile", "nvidia-h100"], "profile 'nvidia-h100' is neither a file nor one of the devices nvidia-a100"),
    (["--model", "opt-6.8b"], "model 'opt-6.8b': neither a directory nor one of"),
    (["--batch", "0"], "batch 0 must be at least 1"),
    (["--prompt", "-1"], "prompt -1 must be at least 1"),
    (["--dtype", "float32"], "dtype float32 must be bfloat16 or float16"),
])  # fmt: skip
def test_errors_are_one_line_and_code_1(argv, message, capsys):
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("kvpr_jax.profiling.simulated: error: ") and message in error and error.count("\n") == 1


def test_writing_needs_the_measurements(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(derived, "RESULTS", tmp_path)
    monkeypatch.setattr(simulated, "DEVICES", shutil.copytree(device.DEVICES, tmp_path / "devices"))
    assert main(["--write"]) == 1
    assert "has no reports to derive devices from: it is part of a checkout only" in capsys.readouterr().err
