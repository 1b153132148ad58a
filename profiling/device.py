"""A device by what it achieves: a machine profile for any model and batch, with nothing measured on it.

A decode step is a roofline. With B sequences, the symbols of the design page and `n` bytes a number, one token that
each sequence has in the cache adds to a layer's step

    keys and values   2·B·K·d·n / keys_values_bytes_per_s
    project           4·B·D·K·d / flops_per_s + the above: both are formed again, then attended to
    absorb            2·B·D·K·p / flops_per_s + B·K·p·n / keys_values_bytes_per_s + r·B·D·n / activations_bytes_per_s

where p are the dimensions of a head's keys that must be projected (`Attention.projected_dims`: all in Llama, none in
OPT) and r says how often activations are read: for values, and for scores too unless p = d. Apart from tokens

    a layer           layer_s + max(weights / weights_bytes_per_s, 2·B·parameters / flops_per_s)
    absorbing         absorb_s + the same for weights of D·K·(2·d - p) parameters, which query and output go through
    the head          head_s + V·width·n / weights_bytes_per_s
    a copy            bytes / link_bytes_per_s
"""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from kvpr_jax.checkpoint import DTYPES
from kvpr_jax.config import ModelConfig
from kvpr_jax.models import Model, abstract, nbytes
from kvpr_jax.profiling import link, profile
from kvpr_jax.profiling.profile import Profile

DEVICES = Path(__file__).with_name("devices")  # those of this package


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device achieves, in bytes, floating-point operations and seconds.

    Attributes:
        name: as NVIDIA calls it.
        synthetic: whether nothing of it was measured.
        source: where the figures are from.
        memory_bytes: of the device.
        link_bytes_per_s: of large copies from pinned host memory.
        flops_per_s: of 16-bit matrix products that sum in float32.
        weights_bytes_per_s: at which a decode step reads weights.
        keys_values_bytes_per_s: at which it attends to keys and values.
        activations_bytes_per_s: at which it attends to activations without forming keys or values.
        layer_s: what a layer's step takes beside reading its weights.
        absorb_s: what an absorbed segment adds to it beside its tokens, and beside reading weights.
        head_s: what surrounds the layers in a step, beside reading the head's weights.
        dispatch_s, layer_dispatch_s, segment_dispatch_s, issue_s, compile_s: the host's times, as in `Profile`.
    """

    name: str
    synthetic: bool
    source: str
    memory_bytes: int
    link_bytes_per_s: float
    flops_per_s: float
    weights_bytes_per_s: float
    keys_values_bytes_per_s: float
    activations_bytes_per_s: float
    layer_s: float
    absorb_s: float
    head_s: float
    dispatch_s: float
    layer_dispatch_s: float
    segment_dispatch_s: float
    issue_s: float
    compile_s: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "memory_bytes" or field.name.endswith("_per_s"):
                if not 0 < value < math.inf:
                    raise ValueError(f"{field.name} {value} must be above 0 and finite")
            elif field.name.endswith("_s") and not 0 <= value < math.inf:
                raise ValueError(f"{field.name} {value} must be 0 or more and finite")

    def profile(self, config: ModelConfig, dtype: jnp.dtype, batch: int) -> Profile:
        """What `measure.measure` would find on the device, by the formulas above.

        Raises:
            ValueError: a dtype whose products are not 16-bit.
        """
        itemsize = jnp.dtype(dtype).itemsize
        if itemsize != 2:
            raise ValueError(
                f"dtype {jnp.dtype(dtype).name} must be bfloat16 or float16: {self.name} has no rates for others"
            )
        weights = Weights.of(config, dtype)
        weights_s = max(1 / self.weights_bytes_per_s, 2 * batch / itemsize / self.flops_per_s)  # a byte of them
        base_s = self.layer_s + weights.layer_bytes * weights_s
        kv_numbers = batch * config.num_kv_heads * config.head_dim  # of keys; as many of values
        keys_values_s = 2 * kv_numbers * itemsize / self.keys_values_bytes_per_s
        formed_s = 2 * kv_numbers * config.hidden_size / self.flops_per_s  # keys; as long for values
        share = weights.projected_dims / config.head_dim
        reads_s = weights.reads * batch * config.hidden_size * itemsize / self.activations_bytes_per_s
        absorbed_s = share * (formed_s + keys_values_s / 2) + reads_s
        absorbing_s = self.absorb_s + weights.absorbed_bytes * weights_s
        copies = [(size, size / self.link_bytes_per_s) for size in link.SIZES]
        return Profile(
            machine={
                "version": str(profile.VERSION),
                "device": f"{self.name} (synthetic)" if self.synthetic else self.name,
                "model": repr(config),
                "dtype": jnp.dtype(dtype).name,
                "batch": str(batch),
            },
            to_device=copies,
            to_host=copies,
            both=copies,  # PCIe carries both directions at once
            base_s=base_s,
            further_s=base_s,
            mlp_s=base_s * weights.mlp_bytes / weights.layer_bytes,
            keys_values=[(1, keys_values_s)],
            project=[(1, 2 * formed_s + keys_values_s)],
            absorb=[(tokens, absorbing_s + tokens * absorbed_s) for tokens in (1, 2)],  # a line, which goes on
            head_s=self.head_s + weights.head_bytes / self.weights_bytes_per_s,
            dispatch_s=self.dispatch_s,
            layer_dispatch_s=self.layer_dispatch_s,
            segment_dispatch_s=self.segment_dispatch_s,
            issue_s=self.issue_s,
            beside_copies=0.0,
            compile_s=self.compile_s,
        )


def parsed(fields: Any) -> Device:
    """The device that a JSON file holds.

    Raises:
        ValueError: a field is missing, foreign or of no use; names it.
    """
    profile.check_names(Device, fields)
    values = dict(fields)
    for field in dataclasses.fields(Device):
        value = values[field.name]
        if field.type is float and type(value) is int:
            values[field.name] = float(str(value))  # one too large is infinite
        elif type(value) is not field.type:
            raise ValueError(f"{field.name} {value!r} must be of type {field.type.__name__}")
    return Device(**values)


def shipped() -> list[str]:
    """Names of the devices of this package."""
    return sorted(path.stem for path in DEVICES.glob("*.json"))


def given(name_or_path: str, config: ModelConfig, dtype: jnp.dtype, batch: int) -> tuple[Profile, int]:
    """The profile that `--profile` names, and its device's memory in bytes.

    Args:
        name_or_path: a shipped device, the JSON file of a device, or that of a profile measured on any machine.

    Raises:
        ValueError: there is no such device or file, it holds neither, or a profile of something else.
    """
    found = _found(name_or_path)
    try:
        if isinstance(found, Device):
            return found.profile(config, dtype, batch), found.memory_bytes
        _check_match(found, config, dtype, batch)
        memory_bytes = found.machine.get("memory", "")
        if not memory_bytes.isdecimal():
            raise ValueError(f"memory {memory_bytes!r} must be a number of bytes")
        return found, int(memory_bytes)
    except ValueError as error:
        raise ValueError(f"profile {name_or_path!r}: {error}") from error


def default_dtype(name_or_path: str) -> str:
    """What is planned by `given` if nobody says otherwise: what a profile was measured in, bfloat16 for a device.

    Raises:
        ValueError: there is no such device or file, or it holds neither.
    """
    found = _found(name_or_path)
    stored = found.machine.get("dtype") if isinstance(found, Profile) else None
    return stored if stored in DTYPES else "bfloat16"


def _found(name_or_path: str) -> Device | Profile:
    path = DEVICES / f"{name_or_path}.json" if name_or_path in shipped() else Path(name_or_path)
    try:
        there = path.is_file()
        fields = json.loads(path.read_text()) if there else None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"profile {name_or_path!r} is no JSON file: {error}") from error
    if not there:
        raise ValueError(f"profile {name_or_path!r} is neither a file nor one of the devices {', '.join(shipped())}")
    try:
        return profile.parsed(fields) if isinstance(fields, dict) and "machine" in fields else parsed(fields)
    except ValueError as error:
        raise ValueError(f"profile {name_or_path!r}: {error}") from error


def _check_match(measured: Profile, config: ModelConfig, dtype: jnp.dtype, batch: int) -> None:
    """Raises ValueError for a profile of another version, model, dtype or batch; names what differs."""
    asked = {
        "version": str(profile.VERSION), "model": repr(config), "dtype": jnp.dtype(dtype).name, "batch": str(batch)
    }  # fmt: skip
    for name, wanted in asked.items():
        stored = measured.machine.get(name, "none")
        if stored != wanted:
            fields, others = (re.split(r", (?=\w+=)", text) for text in (stored, wanted))
            differ = [", ".join(f for f in a if f not in b) for a, b in ((fields, others), (others, fields))]
            raise ValueError(f"it was measured for {name} {differ[0]}, and this run has {differ[1]}")


@dataclasses.dataclass(frozen=True)
class Weights:
    """What of a model's shape the formulas ask for, beside its config.

    Attributes:
        layer_bytes, mlp_bytes: of one layer, and of its MLP.
        head_bytes: of what gives the logits.
        model_bytes: of all weights.
        projected_dims: dimensions of a head's keys that are formed even where the others are absorbed.
        absorbed_bytes: of what gives the other ones, and the values.
        reads: how often `absorb` reads the activations.
    """

    layer_bytes: int
    mlp_bytes: int
    head_bytes: int
    model_bytes: int
    projected_dims: int
    absorbed_bytes: int
    reads: int

    @classmethod
    @functools.cache
    def of(cls, config: ModelConfig, dtype: jnp.dtype) -> "Weights":
        model: Model = abstract(dataclasses.replace(config, num_layers=1), dtype)
        layer = model.layers[0]
        projected = layer.attention.projected_dims
        absorbed = config.num_kv_heads * (2 * config.head_dim - projected)  # dimensions, of keys and values
        return cls(
            layer_bytes=nbytes(layer),
            mlp_bytes=nbytes(layer.mlp),
            head_bytes=nbytes(model.embedder.tokens),  # the head is as large, where it is not the same
            model_bytes=nbytes(model.embedder) + config.num_layers * nbytes(layer),
            projected_dims=projected,
            absorbed_bytes=config.hidden_size * absorbed * dtype.itemsize,
            reads=1 if projected == config.head_dim else 2,
        )
