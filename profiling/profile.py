"""What this machine takes to copy and compute: measured once, kept as JSON, measured again if it does not match."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvpr_jax import memory, steps
from kvpr_jax.config import ModelConfig
from kvpr_jax.models import Model
from kvpr_jax.models.attention import Recompute
from kvpr_jax.profiling import link
from kvpr_jax.profiling.timing import median_s
from kvpr_jax.segments import Activations, KeysValues, Place, Segment

VERSION = 1  # of the file's meaning
PROBE_TOKENS = 16384  # over the batch: tokens in the segment whose cost is measured
CALLS = 8  # layer steps dispatched together, as the engine does


@dataclasses.dataclass(frozen=True)
class Profile:
    """Measured costs of one model's layer for one batch on one machine. Times in seconds.

    Attributes:
        machine: everything that would make the profile stale if it changed.
        to_device, to_host: (bytes, seconds) of copies by size.
        base_s: one layer step whose cache is empty.
        keys_values_token_s, project_token_s, absorb_token_s: what a token of the cache adds to it, in each form.
        head_s: embedding and logits of a step.
        compile_s: tracing and compiling one layer step.
    """

    machine: dict[str, str]
    to_device: list[tuple[int, float]]
    to_host: list[tuple[int, float]]
    base_s: float
    keys_values_token_s: float
    project_token_s: float
    absorb_token_s: float
    head_s: float
    compile_s: float

    def copy_s(self, nbytes: int) -> float:
        """Seconds of one host-to-device copy."""
        per_copy, bandwidth = link.line(self.to_device)
        return per_copy + nbytes / bandwidth

    def layer_s(self, recompute: Recompute, activations: int, keys_values: int) -> float:
        """Seconds of one layer step over so many tokens in each form."""
        per_activation = self.project_token_s if recompute == "project" else self.absorb_token_s
        return self.base_s + activations * per_activation + keys_values * self.keys_values_token_s


def machine(config: ModelConfig, dtype: jnp.dtype, batch: int) -> dict[str, str]:
    """What identifies a profile."""
    return {
        "version": str(VERSION),
        "device": jax.local_devices()[0].device_kind,
        "driver": driver(),
        "host": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "jax": jax.__version__,
        "model": repr(config),
        "dtype": jnp.dtype(dtype).name,
        "batch": str(batch),
    }


def driver() -> str:
    """The NVIDIA driver and GPU as pynvml names them, or "none"."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return "none"
    try:
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(gpu)
        width = pynvml.nvmlDeviceGetMaxPcieLinkWidth(gpu)
        return f"{pynvml.nvmlSystemGetDriverVersion()} PCIe {generation}.0 x{width}"
    except pynvml.NVMLError as error:
        return f"unknown ({error})"
    finally:
        pynvml.nvmlShutdown()


def measure(config: ModelConfig, dtype: jnp.dtype, batch: int) -> Profile:
    """Measure copies, and one layer of the model (with random weights) over segments that are on the device."""
    one = Model(dataclasses.replace(config, num_layers=1), dtype=dtype, rngs=nnx.Rngs(0))
    layer = steps.split_module(one.layers[0])
    tokens = max(64, min(PROBE_TOKENS // batch, 2048))
    slots = jnp.arange(tokens, dtype=jnp.int32)
    x = jax.random.normal(jax.random.key(0), (batch, tokens, config.hidden_size), dtype)
    kv = jax.random.normal(jax.random.key(1), (batch, tokens, config.num_kv_heads, config.head_dim), dtype)
    activations, keys_values = memory.placed((Activations(x, slots), KeysValues(kv, kv, slots)))

    compile_s, base_s = _layer_s(layer, (), batch, config, dtype)
    token_s = {
        name: max(0.0, _layer_s(layer, (segment,), batch, config, dtype, way)[1] - base_s) / tokens
        for name, segment, way in (
            ("keys_values", keys_values, "project"),
            ("project", activations, "project"),
            ("absorb", activations, "absorb"),
        )
    }
    return Profile(
        machine=machine(config, dtype, batch),
        to_device=link.copy_times(to_device=True),
        to_host=link.copy_times(to_device=False),
        base_s=base_s,
        keys_values_token_s=token_s["keys_values"],
        project_token_s=token_s["project"],
        absorb_token_s=token_s["absorb"],
        head_s=_head_s(one, batch),
        compile_s=compile_s,
    )


def _layer_s(
    layer: tuple[steps.Definition, steps.Params],
    segments: tuple[Segment, ...],
    batch: int,
    config: ModelConfig,
    dtype: jnp.dtype,
    recompute: Recompute = "project",
) -> tuple[float, float]:
    """Seconds to compile one layer step over these segments, and to run it."""
    shape = (batch, 1, config.num_kv_heads, config.head_dim)
    place = Place(jnp.array([2**20], jnp.int32), None)
    h = memory.placed(jnp.ones((batch, 1, config.hidden_size), dtype))
    tail: Segment = memory.placed(KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.array(place.slots)))

    definition, params = layer

    def calls() -> jax.Array:
        nonlocal tail
        out = h
        for _ in range(CALLS):
            out, (tail,), _ = steps.decode_layers(
                definition, (params,), out, (segments,), (tail,), place, (), recompute=recompute
            )
        return out

    begin = time.perf_counter()
    jax.block_until_ready(calls())
    first_s, later_s = time.perf_counter() - begin, median_s(calls)
    return max(0.0, first_s - later_s), later_s / CALLS


def _head_s(model: Model, batch: int) -> float:
    """Seconds of what surrounds the layers in a step: embedding and logits."""
    embedder = steps.split_module(model.embedder)
    tokens, place = jnp.zeros((batch, 1), jnp.int32), Place(jnp.zeros(1, jnp.int32), None)
    return median_s(lambda: steps.logits(*embedder, steps.embed(*embedder, tokens, place)[0]))


def path_of(key: dict[str, str]) -> Path:
    """The file of a profile in the user's cache directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache / "kvpr_jax" / f"profile-{digest}.json"


def read(path: Path, key: dict[str, str]) -> Profile | None:
    """The stored profile, or None where there is none, it is damaged, or it describes something else."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        if fields["machine"] != key or set(fields) != {f.name for f in dataclasses.fields(Profile)}:
            return None
        for name in ("to_device", "to_host"):
            fields[name] = [(int(size), float(seconds)) for size, seconds in fields[name]]
        for name in set(fields) - {"machine", "to_device", "to_host"}:
            fields[name] = float(fields[name])
        return Profile(**fields)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(path: Path, profile: Profile) -> None:
    """Store a profile atomically: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump(dataclasses.asdict(profile), file, indent=1)
    os.replace(file.name, path)


def load_or_measure(config: ModelConfig, dtype: jnp.dtype, batch: int) -> Profile:
    """The stored profile of this machine for this model and batch, measured now if there is none that matches."""
    key = machine(config, dtype, batch)
    path = path_of(key)
    profile = read(path, key)
    if profile is None:
        profile = measure(config, dtype, batch)
        with contextlib.suppress(OSError):  # a home that cannot be written costs a measurement each time, no more
            write(path, profile)
    return profile
