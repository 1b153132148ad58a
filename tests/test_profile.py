"""The machine profile: measured for real on small shapes, stored atomically, never trusted when it does not match."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from helpers import OPT, profile
from kvpr_jax import memory
from kvpr_jax.profiling import link
from kvpr_jax.profiling import profile as profiles

FLOAT32 = jnp.dtype("float32")
load_or_measure = profiles.load_or_measure  # before the fixture that replaces it


@pytest.fixture
def key():
    return profiles.machine(OPT, FLOAT32, 2)


def test_a_measured_profile_is_plausible_and_read_back(monkeypatch):
    monkeypatch.setattr(link, "SIZES", (2**16, 2**20))
    monkeypatch.setattr(profiles, "PROBE_TOKENS", 128)
    measured = load_or_measure(OPT, FLOAT32, 2)
    assert [size for size, _ in measured.to_device] == [2**16, 2**20]
    assert all(seconds > 0 for _, seconds in measured.to_device + measured.to_host)
    assert measured.base_s > 0 and measured.head_s > 0 and measured.compile_s > measured.base_s
    assert min(measured.keys_values_token_s, measured.project_token_s, measured.absorb_token_s) >= 0
    monkeypatch.setattr(profiles, "measure", lambda *_: pytest.fail("measured again"))
    assert load_or_measure(OPT, FLOAT32, 2) == measured


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2],
    lambda text: "[]",
    lambda text: text.replace('"base_s"', '"base"'),
    lambda text: text.replace('"batch": "2"', '"batch": "3"'),
    lambda text: text.replace('"head_s": 0.001', '"head_s": "fast"'),
], ids=["truncated", "not an object", "renamed field", "other batch", "not a number"])  # fmt: skip
def test_a_damaged_or_foreign_file_is_measured_again(damage, key, monkeypatch):
    path = profiles.path_of(key)
    fresh = profile(machine=key)
    profiles.write(path, fresh)
    assert profiles.read(path, key) == fresh
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    assert profiles.read(path, key) is None
    monkeypatch.setattr(profiles, "measure", lambda *_: fresh)
    assert load_or_measure(OPT, FLOAT32, 2) == fresh == profiles.read(path, key)


def test_another_machine_model_or_batch_has_another_file(key):
    others = [
        profiles.machine(dataclasses.replace(OPT, hidden_size=88, embed_size=88), FLOAT32, 2),
        profiles.machine(OPT, jnp.dtype("bfloat16"), 2),
        profiles.machine(OPT, FLOAT32, 4),
        key | {"driver": "another"},
    ]
    assert len({profiles.path_of(k) for k in [key, *others]}) == 5


def test_an_interrupted_write_leaves_the_old_file(key, monkeypatch):
    path = profiles.path_of(key)
    old = profile(machine=key)
    profiles.write(path, old)
    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            profiles.write(path, profile(machine=key, base_s=1.0))
    assert profiles.read(path, key) == old


def test_a_cache_directory_that_cannot_be_written_is_no_error(key, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fresh = profile(machine=key)
    monkeypatch.setattr(profiles, "measure", lambda *_: fresh)
    assert load_or_measure(OPT, FLOAT32, 2) == fresh


def test_the_line_through_copies():
    per_copy, bandwidth = link.line([(2**20, 30e-6 + 2**20 / 54e9), (2**26, 30e-6 + 2**26 / 54e9)])
    assert per_copy == pytest.approx(30e-6) and bandwidth == pytest.approx(54e9)
    assert profile(to_device=[(2**20, 30e-6 + 2**20 / 54e9), (2**26, 30e-6 + 2**26 / 54e9)]).copy_s(
        54 * 10**6
    ) == pytest.approx(1.03e-3)


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
