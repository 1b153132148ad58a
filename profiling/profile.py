"""What a machine takes to copy and compute: a profile, kept as JSON in the user's cache directory."""

import dataclasses
import hashlib
import json
import math
import os
import platform
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp

from kvpr_jax import memory
from kvpr_jax.config import ModelConfig
from kvpr_jax.models.attention import Recompute
from kvpr_jax.profiling import curves, files, link, nvidia
from kvpr_jax.profiling.curves import Curve

VERSION = 21  # of the file's meaning
FORMS: dict[str, tuple[str, Recompute]] = {  # by their curves: how a segment is held, and what is done with it
    "keys_values": ("keys_values", "project"),
    "project": ("activations", "project"),
    "absorb": ("activations", "absorb"),
}


@dataclasses.dataclass(frozen=True)
class Profile:
    """Measured costs of one model's layer for one batch on one machine. Times in seconds.

    Attributes:
        machine: everything that would make the profile stale if it changed.
        to_device, to_host: (bytes, seconds) of copies by size.
        both: the same of one copy each way, where copies cross in both directions at once.
        base_s, further_s: one layer step whose cache is a short tail (projections, norms, MLP, and attention at its
            least), and each further layer in one call.
        mlp_s: the MLP's part of one.
        keys_values, project, absorb: (tokens, seconds) that a segment of the cache adds to it in each form, by length.
        head_s: embedding, logits and sampling of a step on the device, of many in a row.
        dispatch_s, layer_dispatch_s: what the host needs to issue a layer step, and each further layer in one call.
        segment_dispatch_s: what it needs more for each segment of a layer's cache; measured as keys and values.
        issue_s: what it needs to issue one of several copies.
        beside_copies: how much longer layers take for each second of copies to the device beside them, which share its
            memory.
        compile_s: tracing and compiling a layer step with a segment; a median.
    """

    machine: dict[str, str]
    to_device: Curve
    to_host: Curve
    both: Curve
    base_s: float
    further_s: float
    mlp_s: float
    keys_values: Curve
    project: Curve
    absorb: Curve
    head_s: float
    dispatch_s: float
    layer_dispatch_s: float
    segment_dispatch_s: float
    issue_s: float
    beside_copies: float
    compile_s: float

    def copy_s(self, nbytes: int) -> float:
        """Seconds that one host-to-device copy adds to others under way."""
        return curves.of_copy(self.to_device, nbytes)

    def layer_s(self, group: int) -> float:
        """Seconds of one of `group` layers in one call, its cache a short tail."""
        return (self.base_s + (group - 1) * self.further_s) / group

    def segments_s(self, form: str, tokens: int, segments: int, tail: int = 0) -> float:
        """Seconds that so many tokens in equally long segments (0: none) add to a layer in this form, and so many of
        its tail."""
        curve = getattr(self, form)
        if not segments:
            shortest, _ = min(curve)
            return curves.of_segment(curve, shortest + tail) - curves.of_segment(curve, shortest)
        each = tokens / segments
        return curves.of_segment(curve, each + tail) + (segments - 1) * curves.of_segment(curve, each)


def machine(config: ModelConfig, dtype: jnp.dtype, batch: int) -> dict[str, str]:
    """What identifies a profile; "memory" is the device's, all of it, in bytes."""
    on_cpu = memory.device_memory_is_host_memory()
    return {
        "version": str(VERSION),
        "device": jax.local_devices()[0].device_kind,
        "driver": nvidia.driver(),
        "memory": str(memory.total_host_bytes()) if on_cpu else nvidia.memory_bytes(),
        "host": _processor(),
        "cores": str(os.cpu_count()),
        "jax": jax.__version__,
        "model": repr(config),
        "dtype": jnp.dtype(dtype).name,
        "batch": str(batch),
    }


def _processor() -> str:
    """The model of the CPU, where Linux names it, or its architecture."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def cache_directory() -> Path:
    """Where this package keeps files of the user's that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvpr_jax"


def path_of(key: dict[str, str]) -> Path:
    """The file of a profile in the user's cache directory."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_directory() / f"profile-{digest}.json"


def read(path: Path, key: dict[str, str]) -> Profile | None:
    """The stored profile, or None where there is none, it is damaged, or it describes something else."""
    try:
        profile = parsed(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError):
        return None
    return profile if profile.machine == key else None


def parsed(fields: Any) -> Profile:
    """The profile that a JSON file holds.

    Raises:
        ValueError: a field is missing, foreign or of no use; names it.
    """
    check_names(Profile, fields)
    values, name = dict(fields), "machine"
    try:
        if not all(isinstance(value, str) for value in values[name].values()):
            raise ValueError("texts are wanted")
        for name in get_args(link.Way):
            values[name] = _curve(values[name])
            if min(map(min, values[name])) <= 0:
                raise ValueError("copies take bytes and seconds")
        for name in FORMS:
            values[name] = _curve(values[name])
            if min(tokens for tokens, _ in values[name]) <= 0:
                raise ValueError("segments have tokens")
        for name in {field.name for field in dataclasses.fields(Profile) if field.type is float}:
            values[name] = _seconds(values[name])
        if not values[name := "base_s"]:
            raise ValueError("no step takes no time")
    except (AttributeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} {fields[name]!r} is of no use: {error}") from error
    return Profile(**values)


def check_names(of: type, fields: Any) -> None:
    """Raises ValueError if what a JSON file holds has not just the fields of a dataclass; names those."""
    if not isinstance(fields, dict):
        raise ValueError(f"a {of.__name__} is a JSON object, not {fields!r}")
    there, wanted = set(fields), {field.name for field in dataclasses.fields(of)}
    if there != wanted:
        parts = {"lacks": wanted - there, "has no use for": there - wanted}
        raise ValueError(
            f"a {of.__name__} "
            + " and ".join(f"{how} {', '.join(sorted(names))}" for how, names in parts.items() if names)
        )


def _curve(pairs: Any) -> Curve:
    """Stored times by size; ValueError for none at all, for two of one size, and for a size that nothing has."""
    curve = [(int(size), _seconds(seconds)) for size, seconds in pairs]
    if not curve or len(curve) > len(dict(curve)):
        raise ValueError("times of different sizes are wanted")
    if max(curve)[0] >= 2**63:
        raise ValueError("nothing is so large")
    return curve


def _seconds(value: Any) -> float:
    """A stored time; ValueError for what no time can be."""
    seconds = float(value)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{seconds} s")
    return seconds


def write(path: Path, profile: Profile) -> None:
    """Store a profile, as `files.write` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(dataclasses.asdict(profile), indent=1))
