"""What NVIDIA's driver says of the GPU that JAX uses, through pynvml."""

import os
from collections.abc import Callable
from typing import Any

import pynvml


def driver() -> str:
    """The NVIDIA driver and the most that the GPU's link can be, as pynvml names them, or "none"."""
    version = _of_gpu(lambda _: pynvml.nvmlSystemGetDriverVersion())
    return version if version == "none" else f"{version} PCIe {_of_gpu(lambda gpu: _link(*_pcie_at_most(gpu)))}"


def memory_bytes() -> str:
    """All memory of the GPU, in bytes, or "none"."""
    return _of_gpu(lambda gpu: str(pynvml.nvmlDeviceGetMemoryInfo(gpu).total))


def pcie() -> str:
    """The GPU's link now and at most, or "none", and a sentence if it has fallen to a lower width.

    The generation falls while a GPU is idle and rises when it has work, which is no fault; the width does not.
    """

    def read(gpu: Any) -> str:
        now = pynvml.nvmlDeviceGetCurrPcieLinkGeneration(gpu), pynvml.nvmlDeviceGetCurrPcieLinkWidth(gpu)
        most = _pcie_at_most(gpu)
        text = f"PCIe {_link(*now)} now, {_link(*most)} at most"
        if now[1] < most[1]:
            text += f". The link has fallen to {now[1]} of its {most[1]} lanes: copies are slower than they should be."
        return text

    return _of_gpu(read)


def fallen() -> str:
    """That sentence alone, or nothing."""
    return pcie().partition(" at most. ")[2]


def _pcie_at_most(gpu: Any) -> tuple[int, int]:
    return pynvml.nvmlDeviceGetMaxPcieLinkGeneration(gpu), pynvml.nvmlDeviceGetMaxPcieLinkWidth(gpu)


def _link(generation: int, width: int) -> str:
    return f"{generation}.0 x{width}"


def _of_gpu(read: Callable[[Any], str]) -> str:
    """What `read` says of the GPU that JAX uses, as pynvml numbers it; "none" where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return "none"
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"  # an index, or a UUID
        by_index = visible.isdecimal()
        return read(
            pynvml.nvmlDeviceGetHandleByIndex(int(visible)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(visible)
        )
    except pynvml.NVMLError as error:
        return f"unknown ({error})"
    finally:
        pynvml.nvmlShutdown()
