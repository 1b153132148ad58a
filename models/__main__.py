"""`python -m kvpr_jax.models` writes README.md beside this file: what the released sizes mean for the cache."""

from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
from flax import nnx

from kvpr_jax.config import ModelConfig
from kvpr_jax.models import ARCHITECTURES, released

PAGE = Path(__file__).with_name("README.md")
BYTES = jnp.dtype("bfloat16").itemsize

HEADER = """\
This page is what `python -m kvpr_jax.models` writes, from `released.py`.

# Models

A token in the cache is either the activations that a layer's keys and values are computed from, D numbers, or those
keys and values, 2·K·d numbers ([symbols](../kvpr_jax/README.md#symbols)). Where activations are smaller, fewer bytes
cross the link, and the device turns them back into attention: recompute pays (KVPR,
[arXiv 2411.17089](https://arxiv.org/abs/2411.17089)). Where query heads share key/value heads, keys and values are
mostly the smaller form, and nothing is recomputed.

`project` forms keys and values again, in every model. `absorb` moves the projections to the query's side, where nothing
stands between projection and product ([attention over segments](../kvpr_jax/README.md#attention-over-segments)): always
for values, and for those dimensions of a head's keys that are neither rotated nor normalised.

Bytes are those of one token in one layer in bfloat16; the ratio is keys and values over activations. Parameters are as
published, a head that is the token embedding counted once; `tests/test_released.py` holds our modules against them. The
name after the slash, as in `opt-6.7b`, is also what `python -m kvpr_jax.profiling.decode --model` takes.
"""

COLUMNS = (
    "model", "parameters", "L", "D", "H", "K", "d", "activations (bytes)", "keys and values (bytes)", "ratio",
    "`absorb` absorbs", "recompute pays",
)  # fmt: skip


def absorbed(config: ModelConfig) -> str:
    """What `absorb` need not form of a segment held as activations."""
    module = ARCHITECTURES[config.model_type]
    layer = nnx.eval_shape(lambda: module.DecoderLayer(config, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0)))
    free = config.head_dim - layer.attention.projected_dims
    if free == config.head_dim:
        return "keys and values"
    return f"{free} of a key's {config.head_dim} dimensions, and values" if free else "values only"


def row(hub_id: str, release: released.Release) -> tuple[object, ...]:
    config, published = release.config, release.parameters
    ratio = f"{config.kv_width / config.activation_width:.2f}"
    return (
        f"[{hub_id}](https://huggingface.co/{hub_id})",
        published if isinstance(published, str) else f"{published:,}",
        config.num_layers,
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.activation_width * BYTES,
        config.kv_width * BYTES,
        ratio,
        absorbed(config),
        f"yes, up to {ratio}x fewer bytes" if config.activations_are_smaller else "no",
    )


def section(module: ModuleType) -> str:
    """The sizes of one architecture's file, under the first line of its docstring."""
    name = f"{module.__name__.rpartition('.')[2]}.py"
    rows = [
        row(hub_id, release)
        for hub_id, release in released.RELEASED.items()
        if ARCHITECTURES[release.model_type] is module
    ]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    table = "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)
    return f"## [{name}]({name})\n\n{(module.__doc__ or '').splitlines()[0]}\n\n{table}\n"


def page() -> str:
    return "\n".join([HEADER, *(section(module) for module in dict.fromkeys(ARCHITECTURES.values()))])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE}: {len(released.RELEASED)} released sizes")
