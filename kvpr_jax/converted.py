"""A converted model: its parameters as an Orbax checkpoint in `orbax/`, beside config.json and the tokenizer's files.

manifest.json has the size and the CRC-32 of every other file. They are checked before Orbax reads anything, since it
takes some changed bytes for weights.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from kvpr_jax.models import Model

PARAMETERS, MANIFEST = "orbax", "manifest.json"
AT_ONCE_BYTES = 2**28  # of parameters that are restored together, and with them in host memory
PIECE_BYTES = 2**24  # of a file, while it is checked

Progress = Callable[[int, int], None]
Shapes = dict[str, jax.ShapeDtypeStruct]


def is_converted(directory: Path) -> bool:
    return (directory / PARAMETERS).is_dir()


def write(model: Model, directory: Path, progress: Progress | None = None) -> None:
    """Add the parameters and the manifest to a directory that has all other files already.

    Args:
        progress: called with (bytes, bytes in all) while the files are read again for the manifest.

    Raises:
        OSError: the files cannot be written.
    """
    parameters = {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(directory.absolute() / PARAMETERS, unflatten_dict(parameters, sep="/"))
    except Exception as error:  # TensorStore raises errors of many kinds, and of many lines
        raise OSError(f"Orbax failed to save the parameters: {repr(error)[:300]}") from error
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    advance = _adding(progress, sum(path.stat().st_size for path in paths))
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "crc32": _checksum(path, advance)}
        for path in paths
    }
    manifest = {"dtype": model.dtype.name, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def read(directory: Path, shapes: Shapes, progress: Progress | None = None) -> Iterator[tuple[str, jax.Array]]:
    """The parameters of a model by their paths ("embedder/tokens/embedding"), as they come to the device.

    Args:
        shapes: of all parameters, with the dtype they are cast to and the sharding they get.
        progress: called with (bytes, bytes in all): those of the files, which are checked first, and of parameters.

    Raises:
        ValueError: a file is missing or damaged, or the parameters are not those of `shapes`; names it.
    """
    files = _manifest(directory)
    advance = _adding(progress, sum(size for size, _ in files.values()) + sum(map(_size, shapes.values())))
    for path, (_, checksum) in files.items():
        if _checksum(path, advance) != checksum:
            raise ValueError(f"{path} is damaged: its CRC-32 is not that of {MANIFEST}; convert the model again")
    path = directory.absolute() / PARAMETERS
    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            tree = checkpointer.metadata(path).item_metadata.tree
        except Exception as error:  # here and below: Orbax raises errors of many kinds, and of many lines
            raise ValueError(f"{path}: not a readable Orbax checkpoint ({repr(error)[:300]})") from error
        _check_shapes(path, {name: stored.shape for name, stored in _flat(tree).items()}, shapes)
        for batch in _batches(shapes):
            wanted = unflatten_dict(batch, sep="/")
            restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
            arguments = ocp.args.PyTreeRestore(wanted, restore_args, partial_restore=True)
            try:
                restored = jax.block_until_ready(checkpointer.restore(path, args=arguments))
            except Exception as error:
                raise ValueError(f"{path}: not a readable Orbax checkpoint ({repr(error)[:300]})") from error
            yield from _flat(restored).items()
            advance(sum(map(_size, batch.values())))


def _manifest(directory: Path) -> dict[Path, tuple[int, int]]:
    """The size and CRC-32 of every file, each of which is there and has that size."""
    path = directory / MANIFEST
    try:
        entries = json.loads(path.read_text())["files"].items()
        files = {directory / name: (int(entry["bytes"]), int(entry["crc32"])) for name, entry in entries}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; convert the model again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable manifest; convert the model again") from error
    for file, (size, _) in files.items():
        if not file.is_file():
            raise ValueError(f"{file} is missing, which {MANIFEST} names; convert the model again")
        if file.stat().st_size != size:
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes, {size} according to {MANIFEST}; convert the model again"
            )
    return files


def _check_shapes(path: Path, stored: dict[str, tuple[int, ...]], shapes: Shapes) -> None:
    for name in sorted(stored.keys() | shapes):
        if name not in stored:
            raise ValueError(f"{path}: parameter {name!r} is missing, which config.json asks for")
        if name not in shapes:
            raise ValueError(f"{path}: parameter {name!r} does not belong to the model of config.json")
        if stored[name] != shapes[name].shape:
            raise ValueError(
                f"{path}: parameter {name!r} has shape {list(stored[name])}; config.json asks for "
                f"{list(shapes[name].shape)}"
            )


def _flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def _batches(shapes: Shapes) -> Iterator[Shapes]:
    """Parameters up to `AT_ONCE_BYTES` together; one that is larger comes alone."""
    batch: Shapes = {}
    for name, shape in shapes.items():
        if batch and sum(map(_size, batch.values())) + _size(shape) > AT_ONCE_BYTES:
            yield batch
            batch = {}
        batch[name] = shape
    yield batch


def _checksum(path: Path, advance: Callable[[int], None]) -> int:
    """The CRC-32 of a file; `advance` is told of its bytes as they are read."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            checksum = zlib.crc32(piece, checksum)
            advance(len(piece))
    return checksum


def _adding(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function of the bytes done since the last call, for a `progress` of all so far."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return advance


def _size(shape: jax.ShapeDtypeStruct) -> int:
    return shape.size * shape.dtype.itemsize
