"""The matrix-product rate of the device: what the share of peak in the benchmarks is a share of."""

import jax
import jax.numpy as jnp

from kvpr_jax import memory
from kvpr_jax.profiling.timing import median_s

SHAPES = ((8192, 8192, 8192), (32768, 4096, 16384), (16384, 8192, 16384))  # rows, inner, columns
SMALLER_ON_CPU = 8
CALLS = 8  # dispatched together


def flops_per_s(dtype: jnp.dtype) -> float:
    """Floating-point operations a second of large products in `dtype`: the best of several shapes."""
    smaller = SMALLER_ON_CPU if memory.device_memory_is_host_memory() else 1
    product, rates = jax.jit(jnp.matmul), []
    for shape in SHAPES:
        rows, inner, columns = (size // smaller for size in shape)
        a, b = (jax.random.normal(jax.random.key(0), shape, dtype) for shape in ((rows, inner), (inner, columns)))
        seconds = median_s(lambda a=a, b=b: [product(a, b) for _ in range(CALLS)])
        rates.append(CALLS * 2 * rows * inner * columns / seconds)
    return max(rates)
