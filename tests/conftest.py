"""Set-up for all tests: a CPU, cheap compilation, strict numerics, a machine profile that is given, not measured."""

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Each of these halves the time to compile; JAX 0.12 does not know the second one.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "")
)
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

from helpers import profile
from kvpr_jax.profiling import profile as profiles


@pytest.fixture(autouse=True)
def _strict_numerics():
    """An implicit change of rank or dtype in our code is a mistake."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True)
def _given_profile(monkeypatch, tmp_path):
    """No test measures the machine unless it is about measuring; none reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(profiles, "load_or_measure", lambda config, dtype, batch: profile())


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_code():
    """Compiled functions of one module are of no use to the next, and their number is limited by the system."""
    yield
    jax.clear_caches()
