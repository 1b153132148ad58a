"""The machine profile: measured for real on small shapes, stored atomically, never trusted when it does not match."""

import dataclasses
import importlib
import itertools
import json
import re
import shlex
import time
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pynvml
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache

from helpers import OPT, profile
from kvpr_jax import checkpoint, command_line, memory, models
from kvpr_jax.costs import Costs, Held
from kvpr_jax.models import abstract, weights_bytes
from kvpr_jax.profiling import curves, files, link, nvidia, timing
from kvpr_jax.profiling import measure as measuring
from kvpr_jax.profiling import profile as profiles
from kvpr_jax.segments import KeysValues

command = importlib.import_module("kvpr_jax.profiling.__main__")

FLOAT32 = jnp.dtype("float32")
load_or_measure = measuring.load_or_measure  # before the fixture that replaces it


@pytest.fixture
def key():
    return profiles.machine(OPT, FLOAT32, 2)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(link, "SIZES", (2**16, 2**20, 2**22))
    monkeypatch.setattr(measuring, "PROBE_TOKENS_ON_CPU", 128)
    monkeypatch.setattr(measuring, "AHEAD_BYTES", 2**20)


@pytest.fixture
def gpu(monkeypatch):
    """A function that gives pynvml a GPU with this PCIe generation and width now; 5 and 16 at most."""

    def give(generation, width):
        answers = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetHandleByIndex": "gpu",
            "nvmlSystemGetDriverVersion": "580.95",
            "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=80 * 2**30, free=1),
            "nvmlDeviceGetMaxPcieLinkGeneration": 5,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetCurrPcieLinkGeneration": generation,
            "nvmlDeviceGetCurrPcieLinkWidth": width,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)

    return give


def test_a_measured_profile_is_plausible_and_read_back(monkeypatch, small):
    monkeypatch.setattr(measuring, "ENOUGH_ON_CPU_S", 600.0)  # another process may use this machine
    measured = load_or_measure(OPT, FLOAT32, 2)
    assert [size for size, _ in measured.to_device] == [2**16, 2**20]  # the largest on a GPU only
    assert all(seconds > 0 for _, seconds in measured.to_device + measured.to_host + measured.both)
    assert [size for size, _ in measured.to_host] == [size for size, _ in measured.both] == [2**16, 2**20]
    assert measured.base_s > 0 and measured.head_s > 0 and measured.compile_s > measured.base_s
    assert [tokens for tokens, _ in measured.project] == [2, 8, 16, 32, 64]
    assert [tokens for tokens, _ in measured.absorb] == [2, 16, 64]
    assert [tokens for tokens, _ in measured.keys_values] == [2, 64]
    assert 0 < measured.further_s <= measured.base_s
    assert all(seconds >= 0 for _, seconds in measured.keys_values + measured.project + measured.absorb)
    monkeypatch.setattr(measuring, "measure", lambda *_: pytest.fail("measured again"))
    assert load_or_measure(OPT, FLOAT32, 2) == measured


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2],
    lambda text: "[]",
    lambda text: text.replace('"base_s"', '"base"'),
    lambda text: text.replace('"batch": "2"', '"batch": "3"'),
    lambda text: text.replace('"head_s": 0.001', '"head_s": "fast"'),
    lambda text: text.replace('"head_s": 0.001', '"head_s": -0.001'),
    lambda text: text.replace('"head_s": 0.001', '"head_s": NaN'),
    lambda text: text.replace('"base_s": 0.0001', '"base_s": 0.0'),
    lambda text: text.replace("0.0064", "0.0"),
    lambda text: text.replace("67108864", "Infinity"),
    lambda text: json.dumps(json.loads(text) | {"to_device": []}),
    lambda text: json.dumps(json.loads(text) | {"project": [[8, 1.0], [8, 2.0]]}),
    lambda text: json.dumps(json.loads(text) | {"absorb": [[0, 1.0]]}),
    lambda text: json.dumps(json.loads(text) | {"keys_values": [[10**400, 1.0]]}),
    lambda text: "[" * 10**5,
], ids=["truncated", "not an object", "renamed field", "other batch", "not a number", "negative", "not finite",
        "a step of no time", "no time", "no size", "no copies", "one length twice", "no tokens", "too many tokens",
        "nested"])  # fmt: skip
def test_a_damaged_or_foreign_file_is_measured_again(damage, key, monkeypatch):
    path = profiles.path_of(key)
    fresh = profile(machine=key)
    profiles.write(path, fresh)
    assert profiles.read(path, key) == fresh
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    assert profiles.read(path, key) is None
    monkeypatch.setattr(measuring, "measure", lambda *_: fresh)
    assert load_or_measure(OPT, FLOAT32, 2) == fresh == profiles.read(path, key)


def test_another_machine_model_or_batch_has_another_file(key):
    others = [
        profiles.machine(dataclasses.replace(OPT, hidden_size=88, embed_size=88), FLOAT32, 2),
        profiles.machine(OPT, jnp.dtype("bfloat16"), 2),
        profiles.machine(OPT, FLOAT32, 4),
        key | {"driver": "another"},
    ]
    assert len({profiles.path_of(k) for k in [key, *others]}) == 5


def test_a_profile_says_which_cpu_and_how_much_memory_it_is_of(gpu, monkeypatch, tmp_path):
    gpu(5, 16)
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU: 3 GHz\n\nmodel name\t: Another\n")
    (tmp_path / "meminfo").write_text("MemTotal:       24684092 kB\nMemFree:        22991556 kB\n")
    real = profiles.Path
    for module in (profiles, memory):
        monkeypatch.setattr(module, "Path", lambda path: real(str(path).replace("/proc", str(tmp_path))))
    machine = profiles.machine(OPT, FLOAT32, 2)
    assert (machine["host"], machine["memory"]) == ("Some CPU: 3 GHz", str(24684092 * 1024))
    (tmp_path / "cpuinfo").unlink()
    monkeypatch.setattr(memory, "device_memory_is_host_memory", lambda: False)
    machine = profiles.machine(OPT, FLOAT32, 2)
    assert machine["host"] == (profiles.platform.processor() or profiles.platform.machine())
    assert machine["memory"] == str(80 * 2**30)


def test_an_interrupted_write_leaves_the_old_file(key, monkeypatch):
    path = profiles.path_of(key)
    old = profile(machine=key)
    profiles.write(path, old)
    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            profiles.write(path, profile(machine=key, base_s=1.0))
    assert profiles.read(path, key) == old
    assert list(path.parent.iterdir()) == [path]


def test_a_cache_directory_that_cannot_be_written_is_a_warning(key, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fresh = profile(machine=key)
    monkeypatch.setattr(measuring, "measure", lambda *_: fresh)
    path = re.escape(repr(str(profiles.path_of(key))))
    with pytest.warns(UserWarning, match=f"^{path} cannot be written, so each run measures anew: .*Not a directory"):
        assert load_or_measure(OPT, FLOAT32, 2) == fresh


def test_a_link_that_has_fallen_is_a_warning_where_a_profile_is_measured_or_read(gpu, monkeypatch):
    gpu(5, 8)
    monkeypatch.setattr(measuring, "measure", lambda *_: profile(machine=profiles.machine(OPT, FLOAT32, 2)))
    for _ in range(2):
        with pytest.warns(UserWarning, match="^The link has fallen to 8 of its 16 lanes"):
            load_or_measure(OPT, FLOAT32, 2)
    gpu(1, 16)
    load_or_measure(OPT, FLOAT32, 2)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("quiet, shown", [(False, "kvpr_jax.some: warning: there is\tless\n"), (True, "")])
def test_a_warning_of_a_command_is_one_line_and_none_where_it_is_quiet(quiet, shown, capsys):
    def command():
        command_line.Reporter(quiet)
        warnings.warn("there is\tless", stacklevel=1)
        return 0

    assert command_line.run("kvpr_jax.some", command) == 0
    assert capsys.readouterr().err == shown


def test_copies_between_two_sizes_are_on_the_line_through_both():
    """On logarithmic scales: a copy of twice the geometric mean's bytes takes as much longer as a smaller one less."""
    measured = profile(to_device=[(2**20, 8e-5), (2**24, 3.2e-4), (2**26, 1.2e-3)])
    for nbytes, seconds in (
        (1, 8e-5), (2**20, 8e-5), (2**22, 1.6e-4), (2**24, 3.2e-4), (2**26, 1.2e-3), (10 * 2**26, 1.2e-2)
    ):  # fmt: skip
        assert measured.copy_s(nbytes) == pytest.approx(seconds)
    assert measured.copy_s(2**21) * measured.copy_s(2**23) == pytest.approx(measured.copy_s(2**22) ** 2)


@given(st.lists(st.floats(1e-5, 1e-2), min_size=5, max_size=5))
def test_no_copy_takes_longer_than_a_larger_one(seconds):
    sizes = (2**16, 2**20, 2**22, 2**24, 2**26)
    measured = profile(to_device=list(zip(sizes, seconds, strict=True)))
    times = [measured.copy_s(2**power) for power in range(10, 30)]
    assert all(smaller <= larger * (1 + 1e-9) for smaller, larger in itertools.pairwise(times))
    assert all(measured.copy_s(size) <= second * (1 + 1e-9) for size, second in zip(sizes, seconds, strict=True))
    assert measured.copy_s(2**26) == pytest.approx(seconds[-1])


@pytest.mark.parametrize(
    "beside_s, most, calls, expected", [(1.1e-3, 9, 10, 0.1), (9e-4, 9, 10, 0.0), (1.1e-3, 3, 4, 0.1)]
)
def test_what_copies_take_from_layers_is_a_part_of_their_own_time(beside_s, most, calls, expected, monkeypatch):
    """Beside copies that take half as long again as the layers, of which 10 ms are issued if `most` allows it."""
    issued, arrived = [], []

    def trials_s(function, trials, warm_up):
        copies, count = issued[-1], function()
        assert (trials, warm_up, arrived.count(copies)) == (1, 0, issued.count(copies) - 1)  # they are still under way
        assert count == calls
        return [count * (beside_s if copies else 1e-3)]

    monkeypatch.setattr(link, "under_way", lambda copies: issued.append(copies) or copies)
    monkeypatch.setattr(jax, "block_until_ready", arrived.append)
    monkeypatch.setattr(measuring, "trials_s", trials_s)
    assert measuring._beside_copies(lambda count: count, 1e-3, 2e-3, most) == pytest.approx(expected)
    assert issued == arrived == [0, min(8, most)] * measuring.TURNS


def test_noise_is_no_time_of_a_copy(monkeypatch):
    few, many = link.COPIES["both"]
    seconds = {few: float(few), many: float(many)}
    monkeypatch.setattr(link, "copies_s", lambda way, size, copies: seconds[copies])
    assert link.copy_s("both", 1) == 1.0
    for few_s in (many - 0.1, many + 0.1):
        seconds[few] = few_s
        assert link.copy_s("both", 1) == 1.0


def test_copies_go_where_they_are_said_to(monkeypatch):
    moved = []
    for name in ("fetched", "to_host"):  # segments, and a segment
        monkeypatch.setattr(memory, name, lambda there, name=name: moved.append(name) or there)
    monkeypatch.setattr(link, "trials_s", lambda copies, _: [2.0, float(len(copies())), 3.0])
    for way, expected in (
        ("to_device", ["to_host", "fetched", "fetched"]),
        ("to_host", ["to_host"] * 2),
        ("both", ["to_host", "fetched", "to_host", "fetched", "to_host"]),
    ):
        moved.clear()
        assert link.copies_s(way, 2**10, 2) == 2.0  # the least
        assert moved == expected


@pytest.mark.parametrize("gpu, expected", [(True, link.TRIALS), (False, link.TRIALS_ON_CPU)])
def test_copies_are_tried_less_often_on_a_cpu(gpu, expected, monkeypatch):
    monkeypatch.setattr(memory, "device_memory_is_host_memory", lambda: not gpu)
    monkeypatch.setattr(memory, "to_host", lambda here: here)
    monkeypatch.setattr(link, "trials_s", lambda _, trials: [float(trials)])
    assert link.copies_s("to_device", 2**10, 2) == expected


def test_weights_and_segments_are_there_before_anything_is_measured(monkeypatch):
    """What still writes them would make the first measurement longer, from which all others are counted."""
    waited_for = []
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waited_for.extend(jax.tree.leaves(tree)) or tree)
    model = measuring._some(abstract(OPT, FLOAT32))
    segments = measuring._segments(model, 2, {("keys_values", 8): 1})
    made = jax.tree.leaves((nnx.state(model), segments))
    assert {*map(id, made)} == {*map(id, waited_for)}


def test_a_few_copies_are_under_way_at_once(monkeypatch):
    under_way, most = [], []

    def fetched(segments):
        under_way.append(segments)
        most.append(len(under_way))
        return segments

    monkeypatch.setattr(memory, "fetched", fetched)
    monkeypatch.setattr(jax, "block_until_ready", lambda _: under_way.pop())
    monkeypatch.setattr(link, "trials_s", lambda copies, _: [float(len(copies()))])
    assert link.copies_s("to_device", 2**10, 9) == link.UNDER_WAY  # those that are left to wait for
    assert len(most) == 9 and max(most) == link.UNDER_WAY


def test_progress_reaches_its_total(small):
    calls = []
    measuring.measure(OPT, FLOAT32, 2, lambda done, total: calls.append((done, total)))
    # A layer, the MLP, the head and segments; issuing a layer, one with a segment and a copy; copies each way, both.
    total = 3 + 10 + 3 + 6
    assert calls == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("enough_s, gpu, host", [(60.0, True, 1), (60.0, False, 1), (0.0, True, 10), (0.0, False, 10)])
@pytest.mark.parametrize("tight", [False, True])
def test_segments_are_measured_by_length(small, enough_s, gpu, host, tight, monkeypatch):
    """In any case the longest, and on a GPU shorter ones, projected where they have few rows; others as there is time.
    Many rows are projected for a while on a GPU.
    The one whose issuing is measured in a call of several layers, as they go in groups: on a GPU, where there is room
    for twice their weights."""
    costs = {"keys_values": (1e-4, 1e-6), "project": (0.0, 5e-6), "absorb": (-2.0, 2e-6)}
    base_s, events, in_groups, lasting = 5e-4, [], [], []

    class Calls:
        def __init__(self, model, batch, segments=(), recompute="project", layers=1):
            self.run_s = base_s + (layers - 1) * base_s / 2
            self.segments = segments
            self.dispatch_s = host * (1e-4 + 3e-5 * layers)
            if segments:
                segment = segments[0]
                begin_s, token_s = costs["keys_values" if isinstance(segment, KeysValues) else recompute]
                assert all(array.shape[:2] == (layers, 2) for array in segment.arrays.values())
                self.run_s += layers * (begin_s + token_s * segment.tokens)
                self.dispatch_s += layers * 1e-5
                if layers > 1:
                    in_groups.append(segment.tokens)
                shortest = isinstance(segment, KeysValues) and segment.tokens == (2 if gpu else 64)
                assert len({id(segment.slots) for segment in segments}) == len(segments) == 1 + shortest

        def __call__(self):
            events.append("compiled")
            clock.now += 3.0 if self.segments else 1.0  # what the layers share is compiled with the first of them
            return self

    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(measuring, "time", clock)
    for name in ("ENOUGH_S", "ENOUGH_ON_CPU_S"):
        monkeypatch.setattr(measuring, name, enough_s)
    of_weights = weights_bytes(dataclasses.replace(OPT, num_layers=measuring.SEVERAL), FLOAT32)
    free = 2 * of_weights - 1 if tight else 2**60
    several = measuring.SEVERAL if gpu and not tight else 1
    monkeypatch.setattr(measuring.memory, "free_device_bytes", lambda: free)
    monkeypatch.setattr(measuring, "_check_memory", lambda *_: None)  # which does not count tails that are not made
    monkeypatch.setattr(measuring, "PROBE_TOKENS", 256)
    monkeypatch.setattr(measuring, "LONGEST", 64)
    few_rows = not tight  # 2 tokens of 2 sequences
    monkeypatch.setattr(measuring, "FEW_ROWS", 5 if few_rows else 4)
    monkeypatch.setattr(measuring.memory, "device_memory_is_host_memory", lambda: not gpu)
    monkeypatch.setattr(measuring, "_layers", Calls)
    warm = []

    def run_s(calls, ahead, warm_up):
        events.append("measured")
        warm.extend([calls] * warm_up)
        return calls.run_s

    monkeypatch.setattr(measuring, "_run_s", run_s)
    monkeypatch.setattr(measuring, "_lasting_s", lambda calls, run_s: lasting.append(calls) or run_s + 1e-3)
    monkeypatch.setattr(measuring, "_dispatch_s", lambda calls, run_s: calls.dispatch_s + run_s / 1000)
    monkeypatch.setattr(measuring, "_beside_copies", lambda calls, run_s, copy_s, most: run_s + copy_s + most)
    monkeypatch.setattr(link, "copy_s", lambda way, size: size * 1e-9)
    for name in ("_mlp", "_head"):
        monkeypatch.setattr(measuring, name, lambda *_: Calls(*_))
    measured = measuring.measure(OPT, FLOAT32, 2)
    all_lengths = {"project": [2, 8, 16, 32, 64], "absorb": [2, 16, 64], "keys_values": [2, 64]}
    for form, (begin_s, token_s) in costs.items():
        few = {"project": [2, 8, 64] if few_rows else [64]}.get(form, [2, 64]) if gpu else [64]
        lengths = all_lengths[form] if enough_s else few
        curve = getattr(measured, form)
        assert [tokens for tokens, _ in curve] == lengths
        lasts = [gpu and form == "project" and 2 * tokens > measuring.FEW_ROWS for tokens in lengths]
        added = [begin_s + tokens * token_s + more / 1000 for tokens, more in zip(lengths, lasts, strict=True)]
        numbers = [2 * tokens * (OPT.kv_width if form == "keys_values" else OPT.hidden_size) for tokens in lengths]
        per_number_s = (
            0.0 if gpu else base_s / (models.nbytes(abstract(OPT, FLOAT32).layers[0]) / 4)
        )  # as weights at least
        least = [count * per_number_s for count in numbers]
        assert [seconds for _, seconds in curve] == pytest.approx([*map(max, least, added)])
    assert len(lasting) == sum(gpu and 2 * tokens > measuring.FEW_ROWS for tokens, _ in measured.project)
    assert in_groups == ([2] if several > 1 else [])
    assert (measured.compile_s, measured.base_s) == (pytest.approx(3.0), base_s)
    assert measured.further_s == pytest.approx(base_s / 2 if several > 1 else base_s)
    dispatch_s = 1.3e-4 * host + base_s / 1000  # on a CPU, where calls may return when they are done, a step at most
    dispatch_s = dispatch_s if gpu else min(dispatch_s, base_s)
    further_s = 3e-5 * host + base_s / 2000 if several > 1 else dispatch_s
    assert (measured.dispatch_s, measured.layer_dispatch_s) == pytest.approx((dispatch_s, further_s))
    most = max(1, free // measuring.BESIDE_SHARE // link.SIZES[-1])
    beside = base_s * (several + 1) / 2 + link.SIZES[-1] * 1e-9 + most  # of several layers, a copy, copies at once
    assert measured.beside_copies == (pytest.approx(beside) if gpu else 0.0)
    segment_s = 1e-5 + (1e-4 + (2 if gpu else 64) * 1e-6) / 1000
    assert measured.segment_dispatch_s == pytest.approx(segment_s)
    curves_of = (measured.keys_values, measured.project, measured.absorb)
    others = len({1, several}) + 2  # layers alone, the MLP, the head
    assert events == ["compiled", "measured"] * (others + sum(map(len, curves_of)))  # nothing compiled in vain
    assert len(warm) == (len(events) // 2 if gpu else 1) and not warm[0].segments  # what others are counted from


@pytest.mark.parametrize("gpu, batch, width, tokens, vocab_size", [
    (False, 4, 128, 128, 50272), (False, 4, 4096, 128, 16384), (False, 4, 8192, 32, 8192), (False, 999, 4096, 1, 16384),
    (True, 4, 8192, 4096, 50272), (True, 1000, 4096, 32, 50272),
])  # fmt: skip
def test_slow_shapes_are_measured_small_on_a_cpu(gpu, batch, width, tokens, vocab_size, monkeypatch):
    """Few tokens where projecting takes long, a part of the vocabulary where that is large; on a GPU all of both."""
    config = dataclasses.replace(
        OPT, hidden_size=width, embed_size=width, num_heads=64, num_kv_heads=64, head_dim=width // 64, vocab_size=50272
    )

    def shapes(model, batch, segments, functions):
        raise MemoryError(model.config.vocab_size, max(count for _, count in segments))

    monkeypatch.setattr(measuring.memory, "device_memory_is_host_memory", lambda: not gpu)
    monkeypatch.setattr(measuring, "_check_memory", shapes)
    with pytest.raises(MemoryError) as seen:
        measuring.measure(config, FLOAT32, batch)
    assert seen.value.args == (vocab_size, tokens)


def test_the_rest_of_the_vocabulary_takes_as_long(small, monkeypatch):
    monkeypatch.setattr(measuring, "HEAD_NUMBERS_ON_CPU", OPT.hidden_size * 10)
    monkeypatch.setattr(measuring, "ENOUGH_ON_CPU_S", 0.0)
    monkeypatch.setattr(measuring, "_run_s", lambda *_, **__: 1.0)
    assert measuring.measure(OPT, FLOAT32, 2).head_s == pytest.approx(OPT.vocab_size / 10)


def test_memory_is_checked_before_anything_is_made(small, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "_some", lambda _: pytest.fail("weights are made"))
    assert command.main(["--batch", "1000000000"]) == command_line.FAILURE
    printed, error = capsys.readouterr()
    assert printed == "" and error.count("\n") == 1
    assert "not enough memory to measure layers of batch 1000000000: " in error and error.count("GiB") == 2


@pytest.mark.parametrize("gpu, more", [(True, 0), (False, 1 / 7)])
def test_memory_that_is_enough_is_no_error(gpu, more, monkeypatch):
    """Weights, 10 tokens as activations and 20 as keys and values, three tails, and the logits or another tail."""
    model, batch = abstract(OPT, FLOAT32), 5
    tails = 3 * measuring.PROBE_TAIL
    numbers = 10 * OPT.hidden_size + (2 * 20 + tails) * OPT.kv_width + max(OPT.vocab_size, tails // 3 * OPT.kv_width)
    needed = round((models.nbytes(model) + batch * numbers * 4) * (1 + more))
    monkeypatch.setattr(measuring.memory, "device_memory_is_host_memory", lambda: not gpu)
    arguments = model, batch, {("activations", 10): 1, ("keys_values", 20): 2}, [1, 2]
    monkeypatch.setattr(measuring.memory, "free_device_bytes", lambda: needed + 8)
    measuring._check_memory(*arguments)
    monkeypatch.setattr(measuring.memory, "free_device_bytes", lambda: needed - 8)
    with pytest.raises(MemoryError, match="change --batch, the number of prompts or --dtype"):
        measuring._check_memory(*arguments)


def test_what_is_measured_is_compiled_whatever_the_cache_on_disk_holds(small, monkeypatch, tmp_path):
    """What comes behind is kept and read as before."""
    compiled = []

    def listen(event, **_):
        compiled.extend([event] * event.endswith(("/cache_hits", "/cache_misses")))

    jax.monitoring.register_event_listener(listen)
    kept = {name: getattr(jax.config, name) for name in (
        "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")}  # fmt: skip
    monkeypatch.setattr(measuring, "ENOUGH_ON_CPU_S", 0.0)
    try:
        for name, value in zip(kept, (str(tmp_path), 0.0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for expected in ("cache_misses", "cache_hits"):
            measuring.measure(OPT, FLOAT32, 2)
            assert not compiled
            jax.jit(lambda x: x + 5.0).lower(jax.ShapeDtypeStruct((5,), jnp.float32)).compile()
            assert compiled.pop().endswith(expected) and not compiled
    finally:
        for name, value in kept.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.monitoring.unregister_event_listener(listen)


def test_a_tail_lengthens_one_of_several_segments():
    curve = [(10, 1.0), (20, 2.0), (30, 6.0)]
    for form in ("keys_values", "project", "absorb"):
        machine = profile(**{form: curve})
        assert machine.segments_s(form, 20, 2) == 1 + 1
        assert machine.segments_s(form, 20, 2, tail=20) == 6 + 1
        assert machine.segments_s(form, 0, 0, tail=10) == 2 - 1


def test_a_layer_takes_what_its_group_and_its_segments_do():
    machine = profile(
        base_s=8.0, further_s=4.0, keys_values=[(64, 3.0), (128, 5.0)], project=[(64, 16.0)], absorb=[(64, 32.0)],
        dispatch_s=80.0, layer_dispatch_s=40.0, segment_dispatch_s=7.0, issue_s=100.0,
    )  # fmt: skip
    costs = {group: Costs(OPT, 4, 2, machine, group) for group in (1, 2, 4)}
    assert [of.compute_s(Held(0, 64), "project") for of in costs.values()] == [8 + 3, 6 + 3, 5 + 3]
    for held, way, whole in (
        (Held(0, 0), "project", 8), (Held(64, 0), "project", 8 + 16), (Held(64, 0), "absorb", 8 + 32),
        (Held(64, 64), "project", 8 + 16 + 3), (Held(0, 64, resident=64), "absorb", 8 + 3 + 3),
        (Held(128, 0, segments=(2, 5, 5)), "project", 8 + 2 * 16),
        (Held(0, 128, tail=32, segments=(1, 2, 1)), "project", 8 + 4 + 3),
        (Held(0, 64, tail=64), "project", 8 + 5),
        (Held(0, 0, tail=64), "project", 8 + 2),  # a layer without segments has such a tail: only its tokens count
        (Held(64, 0, tail=32), "project", 8 + 16 + 1),
        (Held(0, 64, tail=64, tail_is_activations=True), "project", 8 + 16 + 3),
        (Held(32, 64, tail=32, tail_is_activations=True), "absorb", 8 + 32 + 3),
    ):  # fmt: skip
        assert costs[1].compute_s(held, way) == pytest.approx(whole)
    for held, call, segments, copies in (
        (Held(0, 0, tail=9), 80, 0, 0), (Held(0, 5, tail=9), 80, 1, 2), (Held(5, 0), 80, 1, 1),
        (Held(5, 5, resident=5), 80, 3, 3), (Held(0, 0, resident=5), 80, 1, 0),
        (Held(0, 5, tail=9, tail_is_activations=True), 80, 2, 2),
        (Held(4, 9, resident=6, segments=(2, 3, 2)), 80, 7, 8), (Held(0, 0, segments=(2, 3, 2)), 80, 0, 0),
    ):  # fmt: skip
        assert costs[1].issue_s(held) == pytest.approx(call + 7 * segments + 100 * copies)
        assert costs[4].issue_s(held) == pytest.approx((call + 3 * 40 + 100 * copies) / 4 + 7 * segments)


@pytest.mark.parametrize("times, expected", [
    ([(8, 4.0)], {2: 1.0, 8: 4.0, 16: 8.0}),
    ([(8, 4.0), (16, 5.0)], {1: 3.125, 8: 4.0, 12: 4.5, 16: 5.0, 32: 7.0}),
    ([(8, 4.0), (16, 12.0), (32, 14.0)], {2: 1.0, 8: 4.0, 12: 8.0, 16: 12.0, 24: 13.0, 32: 14.0, 64: 18.0}),
    ([(32, 14.0), (8, 20.0), (16, 12.0)], {4: 12.0, 8: 12.0, 16: 12.0, 24: 13.0}),  # 20.0 was noise
])  # fmt: skip
def test_other_lengths_are_on_lines_through_those_measured(times, expected):
    assert {tokens: curves.of_segment(times, tokens) for tokens in expected} == pytest.approx(expected)


@given(st.lists(st.floats(0.0, 1e-2), min_size=1, max_size=4))
def test_no_segment_takes_longer_than_a_longer_one(seconds):
    lengths = (8, 64, 100, 512)
    times = [curves.of_segment([*zip(lengths, seconds, strict=False)], tokens) for tokens in range(1, 1000, 7)]
    assert all(0 <= shorter <= longer * (1 + 1e-9) + 1e-15 for shorter, longer in itertools.pairwise(times))


class Queue:
    """A device that takes what `ahead` and `calls` issue in the order of their issue, on a clock of its own; the host
    takes so long to issue each call, and goes on meanwhile."""

    def __init__(self, call_s, host_s, noise_s=(), ahead_s=measuring.AHEAD_S):
        self.call_s, self.host_s, self.ahead_s, self.noise_s = call_s, host_s, ahead_s, iter(noise_s)
        self.issued_s = self.done_s = 0.0
        self.asked = []

    def ahead(self):
        self.done_s += self.ahead_s

    def calls(self, count):
        self.asked.append(count)
        for _ in range(count):
            self.issued_s += self.host_s
            self.done_s = max(self.done_s, self.issued_s) + self.call_s

    def trials_s(self, function, trials=5, warm_up=2):
        seconds = []
        for _ in range(warm_up + trials):
            self.issued_s = self.done_s = 0.0
            function()
            seconds.append(self.done_s + next(self.noise_s, 0.0))
        return seconds[warm_up:]


@pytest.mark.parametrize("call_s, host_s, asked", [
    (0.5, 0.0, [1]), (0.1, 0.0, [1]),  # once
    (0.03, 1e-4, [1] * 5), (0.01, 1e-4, [1] + [2] * 4), (1e-4, 2e-5, [1] + [24] * 4), (1e-4, 4e-4, [1] + [24] * 4),
])  # fmt: skip
def test_a_call_takes_what_the_device_does_however_slow_the_host_is(call_s, host_s, asked, monkeypatch):
    queue = Queue(call_s, host_s)
    monkeypatch.setattr(measuring, "trials_s", queue.trials_s)
    monkeypatch.setattr(measuring.memory, "device_memory_is_host_memory", lambda: False)
    assert measuring._run_s(queue.calls, queue.ahead, warm_up=False) == pytest.approx(call_s) and queue.asked == asked


@pytest.mark.parametrize("call_s, noise_s, asked", [(0.2, [0.05, 0.01, 0.0], 3), (0.2, [0.4], 1), (0.6, [0.0], 1)])
def test_a_long_call_is_measured_again_on_a_cpu_while_there_is_time(call_s, noise_s, asked, monkeypatch):
    queue = Queue(call_s, 0.0, noise_s, ahead_s=0.0)
    monkeypatch.setattr(measuring, "trials_s", queue.trials_s)
    assert measuring._run_s(queue.calls, queue.ahead, warm_up=False) == pytest.approx(call_s + min(noise_s))
    assert queue.asked == [1] * asked


@pytest.mark.parametrize("noise_s, expected", [
    ([0, 0, 1, 1, 1, 2, 0, 2, 2], 1e-3), ([0] + [0.03] * 4, 1.2e-3)
])  # fmt: skip
def test_of_several_trials_the_shortest_counts_and_what_is_noise_is_no_time(noise_s, expected, monkeypatch):
    queue = Queue(1e-3, 2e-4, noise_s)
    monkeypatch.setattr(measuring, "trials_s", queue.trials_s)
    assert measuring._run_s(queue.calls, queue.ahead, warm_up=False) == pytest.approx(expected)


@pytest.mark.parametrize("warm_up, asked", [(True, [1] * 2 + [11] * 4), (False, [1])])
def test_the_first_call_is_not_taken_for_a_long_one(warm_up, asked, monkeypatch):
    queue = Queue(2e-3, 2e-4, noise_s=[0.5])
    monkeypatch.setattr(measuring, "trials_s", queue.trials_s)
    seconds = measuring._run_s(queue.calls, queue.ahead, warm_up)
    assert seconds == pytest.approx(2e-3 if warm_up else 0.5022) and queue.asked == asked


def test_a_clock_that_falls_has_fallen_before_what_lasts_is_measured(monkeypatch):
    """Here after 0.08 s of load; what the second trial is longer by is noise."""
    idle_s, lasting_s, falls_s = 1e-3, 1.25e-3, 0.08
    queue = Queue(idle_s, host_s=0.0, noise_s=[0, 0.05])

    def calls(count):
        for _ in range(count):
            queue.call_s = idle_s if len(queue.asked) * idle_s < falls_s else lasting_s
            queue.calls(1)

    monkeypatch.setattr(measuring, "trials_s", queue.trials_s)
    assert measuring._lasting_s(calls, idle_s) == pytest.approx(lasting_s)


def test_a_gpu_is_busy_ahead_of_what_is_measured(monkeypatch):
    """By so many calls as take `AHEAD_S`; on a CPU by none."""
    assert measuring._ahead()() is None
    issued = []
    monkeypatch.setattr(measuring.memory, "device_memory_is_host_memory", lambda: False)
    monkeypatch.setattr(measuring, "AHEAD_BYTES", 64)
    monkeypatch.setattr(measuring, "trials_s", lambda function: [function().size, 0.008])
    monkeypatch.setattr(jax, "jit", lambda function, donate_argnums: lambda x: issued.append(x.nbytes) or function(x))
    ahead = measuring._ahead()
    assert issued == [64] * measuring.CALLS and ahead().shape == (16,)
    assert len(issued) == measuring.CALLS + 10


def test_issuing_takes_the_median_of_its_trials():
    pauses = iter([0.3, 0.0, 0.1])
    assert 0.1 <= timing.issued_s(lambda: time.sleep(next(pauses)), trials=3) < 0.2


def test_what_takes_too_long_is_left_out(small, monkeypatch):
    """Copies to the host and both ways keep one size; what plans are made from is measured whole."""
    monkeypatch.setattr(link, "sizes", lambda way: (2**16, 2**18))
    monkeypatch.setattr(measuring, "ENOUGH_ON_CPU_S", 0.0)
    measured = measuring.measure(OPT, FLOAT32, 2)
    assert [[size for size, _ in copies] for copies in (measured.to_device, measured.to_host, measured.both)] == [
        [2**16, 2**18], [2**16], [2**16]
    ]  # fmt: skip


@pytest.mark.parametrize("visible, asked", [
    (None, ("index", 0)), ("", ("index", 0)), ("3,1", ("index", 3)), ("GPU-8f,GPU-1a", ("uuid", "GPU-8f")),
])  # fmt: skip
def test_the_gpu_that_is_asked_is_the_one_that_jax_uses(visible, asked, gpu, monkeypatch):
    gpu(5, 16)
    seen = []
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: seen.append(("index", index)))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: seen.append(("uuid", uuid)))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvidia.pcie()
    assert seen == [asked]


def test_a_link_that_has_fallen_to_a_lower_width_is_reported(gpu):
    """A lower generation is an idle GPU's, and makes no profile stale either."""
    gpu(5, 16)
    assert nvidia.pcie() == "PCIe 5.0 x16 now, 5.0 x16 at most"
    full = nvidia.driver()
    gpu(1, 16)
    assert nvidia.pcie() == "PCIe 1.0 x16 now, 5.0 x16 at most"
    gpu(5, 8)
    assert nvidia.pcie().startswith("PCIe 5.0 x8 now, 5.0 x16 at most. The link has fallen to 8 of its 16 lanes")
    assert nvidia.driver() == full == "580.95 PCIe 5.0 x16"


def test_a_gpu_that_does_not_tell_its_link_still_has_a_driver(gpu, monkeypatch):
    gpu(5, 16)

    def unknown(_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMaxPcieLinkWidth", unknown)
    assert nvidia.driver() == "580.95 PCIe unknown (Not Supported)"
    assert nvidia.pcie() == "unknown (Not Supported)"


def test_the_command_measures_stores_and_shows(small, gpu, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "ENOUGH_ON_CPU_S", 600.0)  # another process may use this machine
    gpu(5, 8)
    assert command.main(["--batch", "3"]) == 0
    printed, notes = capsys.readouterr()
    config, _ = checkpoint.read_config(checkpoint.BUNDLED)
    key = profiles.machine(config, FLOAT32, 3)
    stored = profiles.read(profiles.path_of(key), key)
    for line in ("tiny, float32, batch 3", "| device | cpu |",
                 "| link | PCIe 5.0 x8 now, 5.0 x16 at most. The link has",
                 "| free pinned host memory |", "| 0.0625 MiB |", "| and each further layer of a call |",
                 f"| a layer, its cache a short tail | {stored.base_s * 1e3:.3f} |",
                 *(f"| {tokens} tokens as activations, project | {seconds * 1e3:.3f} |"
                   for tokens, seconds in stored.project),
                 "There is no GPU"):  # fmt: skip
        assert line in printed
    cells = [
        f"{seconds * 1e3:.3f} ms, {size / seconds / 1e9:.1f} GB/s"
        for size, seconds in (copies[1] for copies in (stored.to_device, stored.to_host, stored.both))
    ]
    assert f"| 1 MiB | {' | '.join(cells)} |" in printed
    assert "measured in" in notes and f"stored in {profiles.path_of(key)}" in notes
    monkeypatch.setattr(measuring, "measure", lambda *_: pytest.fail("measured again"))
    for name in ("free_device_bytes", "free_pinned_bytes"):
        monkeypatch.setattr(memory, name, lambda: 7 * memory.GIB)
    assert command.main(["--batch", "3", "--show"]) == 0
    shown, notes = capsys.readouterr()
    assert shown.split("| copy |")[1] == printed.split("| copy |")[1] and notes == ""
    assert "| free device memory | 7.00 GiB |" in shown


def test_a_size_that_was_not_copied_is_a_dash():
    few = profile(to_device=[(2**20, 1e-4), (2**26, 6.4e-3)], to_host=[(2**20, 1e-4)], both=[(2**20, 2e-4)])
    rows = {row["copy"]: [*row.values()][1:] for row in command.copy_rows(few)}
    assert rows["64 MiB"] == ["6.400 ms, 10.5 GB/s", "-", "-"] and rows["1 MiB"][2] == "0.200 ms, 5.2 GB/s"


@pytest.mark.parametrize("few", [True, False])
def test_a_dash_is_explained_where_there_is_one(few, monkeypatch, capsys):
    times = [(2**20, 1e-4), (2**26, 6.4e-3)]
    measured = profile(to_device=times, to_host=times, both=times[:1] if few else times)
    monkeypatch.setattr(measuring, "measure", lambda *_: measured)
    assert command.main([]) == 0
    copies = capsys.readouterr().out.split("| copy |")[1].split("| compute |")[0]
    dashes, explained = copies.count("| - |"), copies.count("\n\nA dash stands for copies that were not measured")
    assert dashes == explained == few


def test_the_command_takes_a_released_size(monkeypatch, capsys):
    """In bfloat16 where there is a GPU, and what is stored already is measured anew."""
    asked = []

    def measure(config, dtype, batch, progress):
        asked.append((config.hidden_size, dtype.name, batch))
        return profile(machine=profiles.machine(config, dtype, batch), head_s=float(len(asked)))

    monkeypatch.setattr(measuring, "measure", measure)
    assert command.main(["--model", "opt-125m"]) == command.main(["--model", "facebook/opt-125m"]) == 0
    monkeypatch.setattr(memory, "device_memory_is_host_memory", lambda: False)
    assert command.main(["--model", "opt-125m"]) == command.main(["--model", "opt-125m", "--dtype", "float16"]) == 0
    assert asked == [(768, dtype, 1) for dtype in ("float32", "float32", "bfloat16", "float16")]
    headings = [f"opt-125m, {dtype}, batch 1" for _, dtype, _ in asked]
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("opt-125m")] == headings
    assert "| head: embedding, logits, next token | 2000.000 |" in printed


def test_nothing_to_show_names_the_command_that_measures(monkeypatch, capsys):
    assert command.main(["--show", "--model", "opt-125m", "--batch", "4"]) == command_line.FAILURE
    printed, error = capsys.readouterr()
    assert printed == "" and error.count("\n") == 1
    named = error[error.index("python -m kvpr_jax.profiling") :].removesuffix(" makes it\n")
    monkeypatch.setattr(
        measuring, "measure", lambda *key_and_progress: profile(machine=profiles.machine(*key_and_progress[:3]))
    )
    assert command.main(shlex.split(named)[3:]) == 0
    assert command.main(["--show", "--model", "opt-125m", "--batch", "4"]) == 0


@pytest.mark.parametrize("line, part", [
    ("--batch 0", "batch 0 must be at least 1"),
    ("--model opt-7b", "model 'opt-7b': neither a directory nor one of"),
])  # fmt: skip
def test_the_commands_errors_are_one_line(line, part, capsys):
    assert command.main(line.split()) == command_line.FAILURE
    printed, error = capsys.readouterr()
    assert printed == "" and part in error and error.count("\n") == 1


def test_a_profile_that_cannot_be_stored_is_printed(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(measuring, "measure", lambda *_: profile())
    assert command.main([]) == command_line.FAILURE
    printed, error = capsys.readouterr()
    assert "| compiling a layer | 500.000 |" in printed
    assert "cannot be written" in error and error.count("error:") == 1


def test_the_users_pinned_memory_limit_is_kept(monkeypatch):
    monkeypatch.setenv(memory.HOST_POOL_LIMIT, "7")
    memory.allow_pinned_memory()
    assert memory.os.environ[memory.HOST_POOL_LIMIT] == "7"
    monkeypatch.delenv(memory.HOST_POOL_LIMIT)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 100 * memory.GIB)
    memory.allow_pinned_memory()
    assert memory.os.environ[memory.HOST_POOL_LIMIT] == "90"


def test_a_control_group_limits_host_memory(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    real = memory.Path
    monkeypatch.setattr(memory, "Path", lambda p: tmp_path if p == "/sys/fs/cgroup" else real(p))
    assert memory.free_host_bytes() == 2_000_000_000
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 400000000\nactive_file 5\n")
    assert memory.free_host_bytes() == 2_400_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_host_bytes() > 2_000_000_000


@pytest.mark.parametrize("mount, listed, limit, used", [
    ("", "0::/user/job\n", "memory.max", "memory.current"),
    ("memory", "5:cpu,memory:/user/job\n3:pids:/\n0::/elsewhere\n", "memory.limit_in_bytes", "memory.usage_in_bytes"),
])  # fmt: skip
def test_the_least_of_a_process_own_control_groups_counts(mount, listed, limit, used, monkeypatch, tmp_path):
    places = {"/sys/fs/cgroup": tmp_path / "cgroup", "/proc/self/cgroup": tmp_path / "listed"}
    real = memory.Path
    monkeypatch.setattr(memory, "Path", lambda path: places.get(path, real(path)))
    (tmp_path / "listed").write_text(listed)
    root = tmp_path / "cgroup" / mount
    (root / "user" / "job").mkdir(parents=True)
    (root / "other").mkdir()
    for group, nbytes in (("", 4 * 10**9), ("user", 3 * 10**9), ("user/job", 2 * 10**9), ("other", 10**9)):
        (root / group / limit).write_text(f"{nbytes}\n")
        (root / group / used).write_text("500\n")
    assert memory.free_host_bytes() == 2 * 10**9 - 500
    (root / "user" / used).write_text(f"{2 * 10**9}\n")
    assert memory.free_host_bytes() == 10**9
    for name in (limit, used):  # a container that sees only its own group, as the root
        (root / "user" / "job" / name).unlink()
        (root / "user" / name).unlink()
    assert memory.free_host_bytes() == 4 * 10**9 - 500


def test_regions_of_pinned_memory_hold_all_arrays_and_are_the_least_that_do():
    rng = np.random.default_rng(0)
    for array, nbytes in zip(rng.integers(1, 40, 500).tolist(), rng.integers(1, 600, 500).tolist(), strict=True):
        sizes, arrays = memory.regions(nbytes, array), -(-nbytes // array)
        allowed = [2**power for power in range((max(array, nbytes // 64) - 1).bit_length(), 11)]
        enough = [
            sum(chosen) for count in range(1, len(allowed) + 1) for chosen in itertools.combinations(allowed, count)
            if sum(size // array for size in chosen) >= arrays
        ]  # fmt: skip
        assert sum(size // array for size in sizes) >= arrays and sum(sizes) == min(enough)
        assert sizes == sorted(set(sizes)) and set(sizes) <= set(allowed)


def test_pinned_memory_is_reserved_once(monkeypatch):
    """Two caches at once, then a third in the place of one that is gone."""
    asked = []
    monkeypatch.setattr(memory, "device_memory_is_host_memory", lambda: False)
    monkeypatch.setattr(memory, "_pool_bytes", 0)
    monkeypatch.setattr(memory.jax, "device_put", lambda array, _: asked.append(array.nbytes) or array)
    live = iter([0, 2**20, 2**20])
    monkeypatch.setattr(memory, "_live_pinned_bytes", lambda: next(live))
    for _ in range(3):
        memory.reserve_pinned(2**20, 2**16)
    assert asked == [2**20, 2**20] and memory._pool_bytes == 2**21
