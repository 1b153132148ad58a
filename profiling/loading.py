"""How fast a checkpoint comes to the device: `python -m kvpr_jax.profiling.loading`.

Writes a random checkpoint of a released shape in shards, reads the files alone (from the page cache), loads them, and
does the same with what `kvpr_jax.convert` makes of them.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from kvpr_jax import checkpoint, convert
from kvpr_jax.models import abstract, architecture, released
from kvpr_jax.profiling import report

SHARD_BYTES = 4 * 10**9
BLOCK_BYTES = 16 * 2**20  # of one read
TRIALS = 3


def write_checkpoint(model: str, directory: Path) -> None:
    """A checkpoint in bfloat16 whose tensors are all random, in shards with an index."""
    release = released.release(model)
    config, hf = release.config, release.hf
    hf.dtype = "bfloat16"
    hf.save_pretrained(directory)
    state = nnx.state(abstract(config, jnp.dtype(jnp.bfloat16)))
    leaves = {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}
    rng, shard, held, weight_map = np.random.default_rng(0), {}, 0, {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())):05}.safetensors"
        safetensors.numpy.save_file(shard, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, stored in architecture(config.model_type).checkpoint_names(config).items():
        if not stored.paths:
            continue
        size = stored.shape([leaves[path] for path in stored.paths])
        noise = rng.integers(0, 2**16, np.prod(size), np.uint16) & 0xBFFF  # no infinity, no NaN
        shard[name] = noise.view(jnp.bfloat16).reshape(size)
        held += shard[name].nbytes
        if held > SHARD_BYTES:
            flush()
            held = 0
    flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_files(directory: Path) -> None:
    """Every byte of the files, into one small buffer."""
    buffer = bytearray(BLOCK_BYTES)
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def seconds(function: Callable[[], Any]) -> list[float]:
    """Of each trial; one before them warms the page cache."""
    times = []
    for _ in range(TRIALS + 1):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - begin)
    return times[1:]


def timed(directory: Path) -> tuple[int, list[float], list[float]]:
    """Bytes of the files in `directory`, seconds to read them, seconds to load the model."""
    nbytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    read_s = seconds(lambda: read_files(directory))
    return nbytes, read_s, seconds(lambda: nnx.state(checkpoint.load_model(directory, "bfloat16")))


def row(what: str, nbytes: int, read_s: list[float], load_s: list[float]) -> dict[str, str]:
    read, loaded = min(read_s), min(load_s)
    return {
        "format": what,
        "GB": f"{nbytes / 1e9:.2f}",
        "reading the files (s)": ", ".join(f"{s:.2f}" for s in read_s),
        "loading (s)": ", ".join(f"{s:.2f}" for s in load_s),
        "loading, best (GB/s)": f"{nbytes / loaded / 1e9:.2f}",
        "of reading": f"{read / loaded:.0%}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m kvpr_jax.profiling.loading", description=__doc__)
    parser.add_argument("--model", default="opt-6.7b", help="a name of models/README.md")
    parser.add_argument("--out", type=Path, help="JSON file for every trial")
    arguments = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="kvpr_jax-loading-"))
    try:
        stored, converted = directory / "safetensors", directory / "orbax"
        stored.mkdir()
        write_checkpoint(arguments.model, stored)
        results = {"safetensors, in shards": timed(stored)}
        if convert.main([str(stored), str(converted)]):
            return 1
        results["converted (Orbax)"] = timed(converted)
        rows = [row(what, *result) for what, result in results.items()]
    except ValueError as error:
        print(f"kvpr_jax.profiling.loading: error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory)
    trials = {what: {"read_s": read_s, "load_s": load_s} for what, (_, read_s, load_s) in results.items()}
    if arguments.out is not None:
        report.write(arguments.out, report.header("loading", argv) | {"trials": trials, "table": rows})
    print(f"{arguments.model}, bfloat16; {jax.local_devices()[0].device_kind}\n\n{report.table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
