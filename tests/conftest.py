"""Set-up for all tests: a CPU, cheap compilation, strict numerics, a machine profile that is given, not measured."""

import importlib.metadata
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# The first and the last halve the time to compile; JAX 0.12 does not know the last one. Other cores have other tests.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "")
)
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

from helpers import profile
from kvpr_jax import compiling, costs, evaluate
from kvpr_jax.generate import __main__ as generate_cli
from kvpr_jax.profiling import measure as measuring

# An implicit change of rank or dtype in our code is a mistake, in the thread that compiles too.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Here steps wait for what is compiled beside them, and changing threads often makes that a tenth slower.
compiling.GIVE_WAY_S = sys.getswitchinterval()

MAPS = Path("/proc/self/maps")  # of this process, one a line
MOST_MAPS = 20_000  # Linux allows 65,530, behind which compiling ends in a segmentation fault


@pytest.fixture(autouse=True)
def _given_profile(monkeypatch, tmp_path):
    """No test measures the machine unless it is about measuring; none reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "load_or_measure", lambda config, dtype, batch, progress=None: profile())
    for module in (generate_cli, evaluate):
        monkeypatch.setattr(module, "keep_compiled", lambda arguments: None)


@pytest.fixture(autouse=True)
def _layer_by_layer(monkeypatch):
    """Functions of several layers take long to compile here: layers go in groups in tests that ask for it."""
    monkeypatch.setattr(costs, "GROUP", 1)


@pytest.fixture(autouse=True)
def _free_compiled_code():
    """The system limits the memory maps of a process, and compiled functions take many each.

    Few are of use to another test, so all of them are given up before they are too many.
    """
    yield
    if MAPS.is_file() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
