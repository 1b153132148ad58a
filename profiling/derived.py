"""Devices that are not typed in: the one that was measured, and what others would be by their datasheets.

The measured one inverts the formulas of `device.py` for every profile in a folder of reports and takes medians; what
reading weights takes, and a layer beside it, is a line of least relative errors. A synthetic one has the same shares
of its datasheet's peaks, and the same times where the host sets them.
"""

import dataclasses
import json
import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from kvpr_jax.config import ModelConfig
from kvpr_jax.costs import TIMES_OF, Costs, Held
from kvpr_jax.profiling import curves, decode, settings
from kvpr_jax.profiling.device import Device, Weights
from kvpr_jax.profiling.profile import FORMS

RESULTS = Path(__file__).with_name("results") / "nvidia-h200"  # in a checkout only
MEMORY_RATES = ("weights_bytes_per_s", "keys_values_bytes_per_s", "activations_bytes_per_s")
HOST_TIMES = (*TIMES_OF["dispatch"], "compile_s")
DIGITS = 4  # of a derived figure: the spread of what is measured has no more


@dataclasses.dataclass(frozen=True)
class Datasheet:
    """Peaks as NVIDIA publishes them. GB is 1e9 bytes.

    Attributes:
        memory_gb, memory_gb_per_s: of the device.
        tflops: of dense bfloat16 products that sum in float32, without sparsity.
        pcie, lanes: generation and width of the link.
        document: where the figures stand.
    """

    name: str
    memory_gb: int
    memory_gb_per_s: int
    tflops: float
    pcie: int
    lanes: int
    document: str

    @property
    def link_bytes_per_s(self) -> float:
        """Of the lanes in one direction: 8 GT/s in generation 3, twice as many in each later one, 128 bits of 130."""
        return 8e9 * 2 ** (self.pcie - 3) * self.lanes * 128 / 130 / 8

    @property
    def peaks(self) -> str:
        return (
            f"{self.memory_gb} GB at {self.memory_gb_per_s} GB/s, {self.tflops:g} TFLOP/s, "
            f"PCIe {self.pcie}.0 x{self.lanes} ({self.document})"
        )


H200 = Datasheet("NVIDIA H200", 141, 4800, 989.5, 5, 16, "NVIDIA H200 datasheet, SXM, half of 1979 with sparsity")
OTHERS = (
    Datasheet("NVIDIA A100 80GB PCIe", 80, 1935, 312.0, 4, 16, "NVIDIA A100 datasheet"),
    Datasheet("NVIDIA RTX 4090", 24, 1008, 165.2, 4, 16, "NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090"),
    Datasheet("NVIDIA L4", 24, 300, 121.0, 4, 16, "NVIDIA L4 datasheet, half of 242 with sparsity"),
)


@dataclasses.dataclass(frozen=True)
class Report:
    """One report of the decode benchmark.

    Attributes:
        link_bytes_per_s: of large copies.
        profile: fields of the profile that was measured beside it.
        results: as the benchmark wrote them.
    """

    name: str
    config: ModelConfig
    dtype: jnp.dtype
    batch: int
    link_bytes_per_s: float
    profile: dict[str, Any]
    results: list[dict[str, Any]]

    @property
    def weights(self) -> Weights:
        return Weights.of(self.config, self.dtype)

    def rates(self) -> dict[str, float]:
        """What the formulas of `device.py` give for this report's profile alone, inverted."""
        config, n, measured = self.config, self.dtype.itemsize, self.profile
        weights, kv_numbers = self.weights, self.batch * config.num_kv_heads * config.head_dim
        kv_s, projected_s, absorbed_s = (segment_line(measured[form])[1] for form in FORMS)
        formed_s = (projected_s - kv_s) / 2
        reads_s = absorbed_s - weights.projected_dims / config.head_dim * (formed_s + kv_s / 2)

        def rate(count: int, seconds: float) -> float:
            return count / seconds if seconds > 0 else math.inf  # less than the noise, as one sequence's tokens are

        return {
            "link_bytes_per_s": self.link_bytes_per_s,
            "flops_per_s": rate(2 * kv_numbers * config.hidden_size, formed_s),
            "keys_values_bytes_per_s": rate(2 * kv_numbers * n, kv_s),
            "activations_bytes_per_s": rate(weights.reads * self.batch * config.hidden_size * n, reads_s),
            **{name: measured[name] for name in HOST_TIMES},
        }

    def step_s(self, result: dict[str, Any]) -> float:
        """Median of the measured steps that fetched what was planned: later ones fetch the flushed tails, too."""
        planned = result["plan"]["host_bytes_per_step"]
        return statistics.median(
            seconds
            for seconds, fetched in zip(result["step_s"], result["step_bytes"], strict=True)
            if fetched == planned
        )

    def predicted_s(self, result: dict[str, Any], device: Device) -> float:
        """The same step by the cost model, on a device."""
        plan, profile = result["plan"], device.profile(self.config, self.dtype, self.batch)
        costs = Costs(self.config, self.dtype.itemsize, self.batch, profile, plan["group"])
        keys_values = plan["cached_tokens"] - plan["resident_tokens"] - plan["split"]
        held = Held(plan["split"], keys_values, plan["resident_tokens"])
        return costs.step_s(held, plan["recompute"], plan["engine"])


def segment_line(curve: Sequence[Sequence[int | float]]) -> tuple[float, float]:
    """What a segment adds to a layer beside its tokens, and what each of them adds: from the shortest one to the
    longest."""
    (few, few_s), (many, many_s) = curve[0] if len(curve) > 1 else (0, 0.0), curve[-1]
    token_s = (many_s - few_s) / (many - few)
    return max(0.0, few_s - few * token_s), token_s


def reports() -> list[Report]:
    """The committed reports of the decode benchmark.

    Raises:
        ValueError: there are none, as where the package is installed without them.
    """
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        fields = json.loads(path.read_text())
        if fields["command"].split()[2] == decode.parser().prog.split()[2]:
            given = decode.parser().parse_args(shlex.split(fields["command"])[3:])
            config, dtype = settings.shape(given.model, given.layers), jnp.dtype(given.dtype)
            link_bytes_per_s = fields["link_gb_per_s"] * 1e9
            results = [result for result in fields["results"] if "plain" not in result]  # of which nothing is predicted
            found.append(Report(path.stem, config, dtype, given.batch, link_bytes_per_s, fields["profile"], results))
    if not found:
        raise ValueError(f"{str(RESULTS)!r} has no reports to derive devices from: it is part of a checkout only")
    return found


def measured(reports: list[Report]) -> Device:
    """The H200 that these reports were measured on."""
    rates = [report.rates() for report in reports]
    layer_s, weights_bytes_per_s = curves.line([(r.weights.layer_bytes, r.profile["base_s"]) for r in reports])
    heads_s = [r.profile["head_s"] - r.weights.head_bytes / weights_bytes_per_s for r in reports]
    absorbing_s = [
        segment_line(r.profile["absorb"])[0] - r.weights.absorbed_bytes / weights_bytes_per_s for r in reports
    ]
    return _rounded(
        Device(
            name=H200.name,
            synthetic=False,
            source=f"measured: {len(reports)} reports of profiling/results/{RESULTS.name}; peaks: {H200.peaks}",
            memory_bytes=H200.memory_gb * 10**9,
            weights_bytes_per_s=weights_bytes_per_s,
            layer_s=layer_s,
            absorb_s=statistics.median(absorbing_s),
            head_s=statistics.median(heads_s),
            **{name: statistics.median(rate[name] for rate in rates) for name in rates[0]},
        )
    )


def synthetic(datasheet: Datasheet, like: Device) -> Device:
    """A device by its datasheet that reaches the same shares of its peaks as the measured one."""
    ratios = {
        "link_bytes_per_s": datasheet.link_bytes_per_s / H200.link_bytes_per_s,
        "flops_per_s": datasheet.tflops / H200.tflops,
        **dict.fromkeys(MEMORY_RATES, datasheet.memory_gb_per_s / H200.memory_gb_per_s),
    }
    return _rounded(
        dataclasses.replace(
            like,
            name=datasheet.name,
            synthetic=True,
            source=f"{datasheet.peaks}; the shares of peaks, and the times, of an {H200.name}",
            memory_bytes=datasheet.memory_gb * 10**9,
            **{name: getattr(like, name) * ratio for name, ratio in ratios.items()},
        )
    )


def shares(device: Device) -> dict[str, float]:
    """What the measured device reached of its datasheet's peaks."""
    peaks = {
        "link_bytes_per_s": H200.link_bytes_per_s,
        "flops_per_s": H200.tflops * 1e12,
        **dict.fromkeys(MEMORY_RATES, H200.memory_gb_per_s * 1e9),
    }
    return {name: getattr(device, name) / peak for name, peak in peaks.items()}


def devices() -> list[Device]:
    """All that are shipped."""
    h200 = measured(reports())
    return [h200, *(synthetic(datasheet, h200) for datasheet in OTHERS)]


def _rounded(device: Device) -> Device:
    figures = {
        f.name: float(f"{getattr(device, f.name):.{DIGITS}g}") for f in dataclasses.fields(Device) if f.type is float
    }
    return dataclasses.replace(device, **figures)
