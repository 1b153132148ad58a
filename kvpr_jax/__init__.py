"""LLM decoding in JAX with the KV cache in pinned host memory, part of it held as the smaller activations."""

import os

# transformers is here for tokenizers and configs; that it finds no torch is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from kvpr_jax import memory
from kvpr_jax._version import __version__

memory.allow_pinned_memory()  # before JAX starts its backend

from kvpr_jax.generate import Output, Stream, generate, load, stream  # noqa: E402
from kvpr_jax.plan import Plan, Request  # noqa: E402
from kvpr_jax.runtime import Decoder  # noqa: E402
from kvpr_jax.sampling import Sampling  # noqa: E402

__all__ = ["Decoder", "Output", "Plan", "Request", "Sampling", "Stream", "__version__", "generate", "load", "stream"]
