"""Models from a directory or a hub id into a `Model`: in Hugging Face format (and back), or as `converted`.

Loading is strict: a tensor that is missing, extra or wrongly shaped is an error that names it. Tensors are read from
mapped files and moved to the device one by one, so that the host holds about one file beside the model.
"""

import json
import re
import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import transformers
from flax import nnx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jax.sharding import SingleDeviceSharding

from kvpr_jax import converted, memory
from kvpr_jax.config import ModelConfig
from kvpr_jax.converted import Progress, Shapes
from kvpr_jax.models import Model, abstract, architecture
from kvpr_jax.models.names import Stored

BUNDLED = Path(__file__).parent / "models" / "tiny"
DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or shards, with an index: model.safetensors.index.json
OTHER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
ON_THEIR_WAY = 4  # tensors that are copied to the device at once
# Constants that old checkpoints store: frequencies of rotary embeddings, causal masks.
NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")


def find(model: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The directory of a model: `model` itself, or the local copy of that hub id (downloaded if need be).

    The hub's own settings hold, as for transformers: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN or the token of `hf auth login`.

    Args:
        revision: branch, tag or commit of a hub id; None is its main branch. A directory has none.
        weights: whether they are needed, or only the config and the tokenizer.

    Raises:
        ValueError: there is no such directory and the hub has, or gives, no such model or revision.
    """
    path = Path(model)
    if str(model) and path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"model {str(model)!r} is a file; give the directory that holds config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) or str(model).startswith("."):
        raise ValueError(f"model {str(model)!r}: no such directory, and not a hub id of the form owner/name")

    def download(*files: str) -> Path:
        patterns, others = [*OTHER_FILES, *files], ["*/*", "consolidated*"]
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=patterns, ignore_patterns=others))

    try:
        directory = download(*["*.safetensors"] * weights)
        found = not weights or any(directory.glob("*.safetensors"))
        return directory if found else download("pytorch_model*.bin")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise ValueError(
            f"model {str(model)!r}{at}: no such directory, and the hub did not give it: {_one_line(error)}"
        ) from error


def read_config(directory: Path) -> tuple[ModelConfig, Any]:
    """The model's shapes, and the transformers config they came from.

    Raises:
        ValueError: no readable config.json, or a model that is not supported.
    """
    path = directory / "config.json"
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"model {str(directory)!r} has no config.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ValueError(f"{path}: no model_type")
    module = architecture(str(fields["model_type"]))
    try:
        hf = transformers.AutoConfig.from_pretrained(directory)
        path = directory / "generation_config.json"
        if path.is_file():
            generation = transformers.GenerationConfig.from_pretrained(directory)
            hf.eos_token_id = generation.eos_token_id if generation.eos_token_id is not None else hf.eos_token_id
        path = directory / "config.json"
        return module.Config.from_hf(hf), hf
    except Exception as error:  # transformers' own checks raise errors of many kinds
        raise ValueError(f"{path}: {_one_line(error)}") from error


def load_tokenizer(directory: Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in `directory`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        if not any((directory / name).is_file() for name in TOKENIZER_FILES):  # transformers would make an empty one
            raise ValueError(f"none of {', '.join(TOKENIZER_FILES)} is there")
        return transformers.AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise ValueError(f"model {str(directory)!r}: the tokenizer cannot be loaded: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def stored_dtype(hf: Any) -> str:
    """The dtype that config.json names, float32 where it names none of `DTYPES`."""
    stored = str(getattr(hf, "dtype", None)).removeprefix("torch.")
    return stored if stored in DTYPES else "float32"


def default_dtype(hf: Any) -> str:
    """The checkpoint's own dtype on an accelerator; float32 on a CPU, where narrower types only cost accuracy."""
    return stored_dtype(hf) if jax.default_backend() != "cpu" else "float32"


def load_model(directory: Path, dtype: str | None = None, progress: Progress | None = None) -> Model:
    """The model in `directory`, on the default device.

    Args:
        directory: holds config.json and one of: model.safetensors; pytorch_model.bin (which takes PyTorch to read);
            shards of either with an index; what `kvpr_jax.convert` writes.
        dtype: "float32", "bfloat16" or "float16"; None: see `default_dtype`.
        progress: called with (bytes read, bytes in all) after each tensor.

    Raises:
        ValueError: damaged files, or tensors that do not fit config.json; names the file and the tensor.
    """
    config, hf = read_config(directory)
    dtype = dtype or default_dtype(hf)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; known: {', '.join(DTYPES)}")
    graphdef, state = nnx.split(abstract(config, jnp.dtype(dtype)))
    wanted = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    device = SingleDeviceSharding(jax.local_devices()[0])
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for path, leaf in wanted.items()}
    if converted.is_converted(directory):
        parameters = converted.read(directory, shapes, progress)
    else:
        parameters = _read(directory, config, shapes, progress)
    for path, parameter in parameters:
        wanted[path].set_value(parameter)
    return nnx.merge(graphdef, state)


def _read(
    directory: Path, config: ModelConfig, shapes: Shapes, progress: Progress | None
) -> Iterator[tuple[str, jax.Array]]:
    """The parameters of a checkpoint in Hugging Face format by their paths, as they come to the device.

    A few tensors are on their way at once: pages of a mapped file are slow to touch one after the other.
    """
    with ThreadPoolExecutor(ON_THEIR_WAY) as pool:
        waiting: deque[tuple[Stored, Future[list[jax.Array]], int]] = deque()
        files = _files(directory)
        tensors, total, done = _checked(files, directory, config, shapes), sum(p.stat().st_size for p in files), 0
        while True:
            following = next(tensors, None)
            if following is not None:
                entry, tensor = following
                waiting.append((entry, pool.submit(_placed, entry, tensor, shapes), tensor.nbytes))
            if not waiting:
                return
            if following is None or len(waiting) > ON_THEIR_WAY:
                entry, placed, nbytes = waiting.popleft()
                yield from zip(entry.paths, placed.result(), strict=True)
                done += nbytes
                if progress is not None:
                    progress(min(done, total), total)


def _placed(entry: Stored, tensor: np.ndarray, shapes: Shapes) -> list[jax.Array]:
    """The parameters in a tensor, on the device: finished copies, since `tensor` is a view of a mapped file."""
    wanted = [shapes[path] for path in entry.paths]
    if memory.device_memory_is_host_memory():
        parts = zip(entry.unpack(tensor), wanted, strict=True)
        arrays = [jnp.array(part, dtype=shape.dtype) for part, shape in parts]
    else:  # as it lies in the file: the device transposes faster
        parts = zip(entry.unpack(jax.device_put(tensor, wanted[0].sharding)), wanted, strict=True)
        arrays = [part.astype(shape.dtype) for part, shape in parts]
    return jax.block_until_ready(arrays)


def _checked(
    files: dict[Path, set[str]], directory: Path, config: ModelConfig, shapes: Shapes
) -> Iterator[tuple[Stored, np.ndarray]]:
    """The tensors that make up the model, each once and in the shape that it must have."""
    module = architecture(config.model_type)
    names = module.checkpoint_names(config)
    covered = [path for entry in names.values() for path in entry.paths]
    assert sorted(shapes) == sorted(covered), "checkpoint_names does not cover the module"
    seen = set()
    for path, promised in files.items():
        for stored, tensor in _tensors(path):
            promised.discard(stored)
            name = stored if stored in names else module.BASE + stored  # saved as the base model, without its head
            if NOT_WEIGHTS.search(name):
                continue
            if name not in names:
                raise ValueError(f"{path}: tensor {stored!r} does not belong to model_type {config.model_type!r}")
            if name in seen:
                raise ValueError(f"{path}: tensor {stored!r} appears twice")
            seen.add(name)
            if not jnp.issubdtype(tensor.dtype, jnp.floating):
                raise ValueError(f"{path}: tensor {stored!r} holds {tensor.dtype} numbers, not floating-point ones")
            entry = names[name]
            if not entry.paths:
                continue
            shape = entry.shape([shapes[target].shape for target in entry.paths])
            if tensor.shape != shape:
                raise ValueError(
                    f"{path}: tensor {stored!r} has shape {list(tensor.shape)}; config.json asks for {list(shape)}"
                )
            yield entry, tensor
        if promised:
            raise ValueError(f"{path}: tensor {min(promised)!r} is missing, which the index says is there")
    missing = sorted(name for name, entry in names.items() if entry.paths and name not in seen)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{directory}: tensor {missing[0]!r}{more} is missing from the checkpoint")


def save_weights(model: Model, path: Path, dtype: str) -> None:
    """Write the model's weights as safetensors that `load_model` and transformers read."""
    _, state = nnx.split(model)
    leaves = {"/".join(map(str, p)): leaf.get_value() for p, leaf in nnx.to_flat_state(state)}
    names = architecture(model.config.model_type).checkpoint_names(model.config)
    tensors = {
        name: entry.pack([np.asarray(leaves[target].astype(dtype)) for target in entry.paths])
        for name, entry in names.items()
        if entry.paths
    }
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def _files(directory: Path) -> dict[Path, set[str]]:
    """The files of a checkpoint, each of which exists, and the tensors that an index names for it."""
    for name in WEIGHTS:
        if (directory / name).is_file():
            return {directory / name: set()}
        if (directory / f"{name}.index.json").is_file():
            return _shards(directory / f"{name}.index.json")
    known = ", ".join(name for single in WEIGHTS for name in (single, f"{single}.index.json"))
    raise ValueError(
        f"model {str(directory)!r} has none of {known}, nor the {converted.PARAMETERS}/ of a converted one"
    )


def _shards(index: Path) -> dict[Path, set[str]]:
    files: dict[Path, set[str]] = {}
    try:
        for tensor, name in sorted(json.loads(index.read_text())["weight_map"].items(), key=lambda item: item[1]):
            files.setdefault(index.parent / name, set()).add(tensor)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: not a readable index of shards") from error
    for path in files:
        if not path.is_file():
            raise ValueError(f"{index} names {path.name!r}, which is not there")
    return files


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    return _safetensors(path) if path.suffix == ".safetensors" else _pytorch(path)


def _safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Views of the mapped file: the library checks it, but would copy each tensor."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            data = np.memmap(path, np.uint8, mode="r", offset=file.tell()) if names else np.empty(0, np.uint8)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    for name in names:
        begin, end = header[name]["data_offsets"]
        yield name, data[begin:end].view(_numpy_dtype(header[name]["dtype"])).reshape(header[name]["shape"])


def _numpy_dtype(name: str) -> np.dtype:
    """The dtype that safetensors calls "F32", "BF16", "I64" …; single bytes for those that NumPy does not know."""
    try:
        return np.dtype(jnp.bfloat16) if name == "BF16" else np.dtype(f"{name[0].lower()}{int(name[1:]) // 8}")
    except (TypeError, ValueError):
        return np.dtype(np.uint8)


def _pytorch(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        import torch
    except ImportError:
        raise ValueError(f"{path}: PyTorch is needed to read this file: pip install torch") from None
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("damaged, or written by a PyTorch older than 1.6: not a zip archive")
        for name, tensor in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items():
            if tensor.dtype == torch.bfloat16:  # unknown to NumPy
                yield name, tensor.detach().view(torch.int16).numpy().view(jnp.bfloat16)
            else:
                yield name, tensor.detach().numpy()
    except Exception as error:  # torch raises errors of many kinds
        raise ValueError(f"{path}: not a readable PyTorch file ({_one_line(error)})") from error
