"""Loading is strict: what does not fit config.json, or is damaged, is one error that names it; the rest is exact."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpr_jax
from helpers import CONFIGS, GQA, LLAMA, OPT, random_model
from kvpr_jax import checkpoint
from kvpr_jax.models import Model, opt
from kvpr_jax.models.positions import Rope

TINY = checkpoint.BUNDLED  # for its tokenizer
ONE_LAYER = {name: dataclasses.replace(config, num_layers=1) for name, config in CONFIGS.items()}


def hf_fields(config) -> dict:
    """config.json of a model, as transformers names its fields."""
    common = {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": list(config.eos_token_ids),
    }
    if config.model_type == "opt":
        return common | {
            "ffn_dim": config.mlp_size,
            "word_embed_proj_dim": config.embed_size,
            "do_layer_norm_before": config.norm_first,
            "layer_norm_elementwise_affine": config.norm_affine,
            "enable_bias": config.bias,
            "activation_function": config.activation,
        }
    return common | {
        "intermediate_size": config.mlp_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope.theta,
        "hidden_act": config.activation,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def write(directory: Path, model, dtype: str = "float32") -> Path:
    """A checkpoint directory without a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_fields(model.config)))
    checkpoint.save_weights(model, directory / "model.safetensors", dtype)
    return directory


def write_tokenizer(directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, directory)
    return directory


def tensors(directory: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(directory / "model.safetensors")


def save(stored: dict[str, np.ndarray], path: Path) -> None:
    safetensors.numpy.save_file(stored, path, metadata={"format": "pt"})


def save_shards(stored: dict[str, np.ndarray], directory: Path, owner=lambda index: index % 3) -> None:
    """The tensors in three files with an index, in place of model.safetensors."""
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"model-{owner(i) + 1:05}-of-00003.safetensors" for i, name in enumerate(stored)}
    for shard in set(weight_map.values()):
        save({name: tensor for name, tensor in stored.items() if weight_map[name] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_config(directory: Path, **fields) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_equal(model, expected) -> None:
    assert model.config == expected.config
    for (path, leaf), (_, other) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(expected)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(leaf[...]), np.asarray(other[...]), err_msg=str(path))
        assert leaf[...].dtype == other[...].dtype


@pytest.fixture(scope="module", params=["opt-350m", "llama"])
def sound(request, tmp_path_factory):
    """A good checkpoint of one layer, to be copied and broken; with and without transposed and optional tensors."""
    model = random_model(ONE_LAYER[request.param])
    return write(tmp_path_factory.mktemp(request.param), model)


@pytest.fixture
def broken(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "broken"))


# What loads


@pytest.mark.parametrize("config, dtype", [
    *((config, "float32") for config in CONFIGS.values()),
    (ONE_LAYER["opt-350m"], "float16"),
    (ONE_LAYER["llama"], "bfloat16"),
], ids=["opt", "opt-350m", "llama", "llama-gqa", "opt-350m float16", "llama bfloat16"])  # fmt: skip
def test_saved_weights_load_as_they_were(config, dtype, tmp_path):
    model = random_model(config, dtype)
    assert_equal(checkpoint.load_model(write(tmp_path, model, dtype), dtype), model)


def test_untied_embeddings_and_models_without_biases_load(tmp_path):
    config = dataclasses.replace(OPT, num_layers=1, tie_embeddings=False, bias=False, norm_affine=False)
    model = random_model(config)
    stored = tensors(write(tmp_path, model))
    assert "lm_head.weight" in stored and not [name for name in stored if name.endswith(".bias")]
    assert_equal(checkpoint.load_model(tmp_path), model)


def test_the_files_are_in_the_format_of_hugging_face(tmp_path):
    """Names and orientation as transformers stores them: a linear layer is (out, in), its tensors under "model."."""
    stored = tensors(write(tmp_path, random_model(ONE_LAYER["opt-350m"])))
    assert stored["model.decoder.layers.0.fc1.weight"].shape == (53, 44)
    assert stored["model.decoder.project_in.weight"].shape == (44, 22)
    assert stored["model.decoder.embed_positions.weight"].shape == (113 + 2, 44)
    stored = tensors(write(tmp_path, random_model(dataclasses.replace(GQA, num_layers=1))))
    assert stored["model.layers.0.self_attn.k_proj.weight"].shape == (20, 60)
    assert stored["model.layers.0.mlp.down_proj.weight"].shape == (60, 53)
    assert stored["lm_head.weight"].shape == (89, 60)


@pytest.mark.parametrize("stored, loaded", [("float16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")])
def test_weights_are_converted_to_the_dtype_asked_for(stored, loaded, tmp_path):
    model = random_model(ONE_LAYER["opt"], scale=1.0)
    converted = jax.tree.map(lambda leaf: leaf.astype(stored).astype(loaded), nnx.to_pure_dict(nnx.state(model)))
    read = nnx.to_pure_dict(nnx.state(checkpoint.load_model(write(tmp_path, model, stored), loaded)))
    jax.tree.map(np.testing.assert_array_equal, read, converted)
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype(loaded)}


def test_on_a_cpu_the_default_is_float32(tmp_path):
    write(tmp_path, random_model(ONE_LAYER["opt"], "float16"), "float16")
    change_config(tmp_path, dtype="float16")
    assert checkpoint.load_model(tmp_path).dtype == jnp.float32


def test_shards_with_an_index_equal_a_single_file(broken):
    expected = checkpoint.load_model(broken)
    save_shards(tensors(broken), broken)
    assert_equal(checkpoint.load_model(broken), expected)


def test_tensors_may_lack_the_leading_model(broken):
    """A checkpoint of the base model (OPTModel) rather than the language model."""
    expected = checkpoint.load_model(broken)
    save({name.removeprefix("model."): t for name, t in tensors(broken).items()}, broken / "model.safetensors")
    assert_equal(checkpoint.load_model(broken), expected)


def test_tensors_that_are_not_weights_are_passed_over(tmp_path):
    """The copy of a tied head, and the frequencies that old Llama checkpoints store."""
    tied = dataclasses.replace(LLAMA, num_layers=1, tie_embeddings=True)
    model = random_model(tied)
    stored = tensors(write(tmp_path, model))
    extra = {
        "lm_head.weight": np.full((89, 60), 7, np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.full(5, 7, np.float32),
    }
    save(stored | extra, tmp_path / "model.safetensors")
    assert_equal(checkpoint.load_model(tmp_path), model)


def test_rope_and_eos_of_the_files_are_used(tmp_path):
    """No default wins over a value of config.json; generation_config.json, where there is one, names the ends."""
    write(tmp_path, random_model(ONE_LAYER["llama"]))
    assert checkpoint.read_config(tmp_path)[0].rope == Rope(10, theta=100.0)
    change_config(tmp_path, rope_theta=5000.0, rms_norm_eps=1e-3, eos_token_id=[5, 6])
    config, _ = checkpoint.read_config(tmp_path)
    assert (config.rope.theta, config.norm_epsilon, config.eos_token_ids) == (5000.0, 1e-3, (5, 6))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert checkpoint.read_config(tmp_path)[0].eos_token_ids == (7, 8)


def test_progress_rises_to_the_size_of_the_files(broken):
    save_shards(tensors(broken), broken)
    seen: list[tuple[int, int]] = []
    checkpoint.load_model(broken, progress=lambda done, total: seen.append((done, total)))
    (total,) = {total for _, total in seen}
    done = [done for done, _ in seen]
    assert total == sum(path.stat().st_size for path in broken.glob("*.safetensors"))
    assert done == sorted(done) and 0 < done[0] < done[-1] <= total and len(done) == len(tensors_of_shards(broken))
    assert done[-1] == sum(tensor.nbytes for tensor in tensors_of_shards(broken).values())


def tensors_of_shards(directory: Path) -> dict[str, np.ndarray]:
    return {
        name: tensor
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in safetensors.numpy.load_file(path).items()
    }


def test_load_gives_the_bundled_model_by_default():
    model, tokenizer = kvpr_jax.load()
    assert model.config.model_type == "opt" and model.config.vocab_size >= len(tokenizer)
    assert tokenizer.eos_token_id in model.config.eos_token_ids
    assert tokenizer.decode(tokenizer("The with statement")["input_ids"], skip_special_tokens=True).startswith("The")


# Tensors that do not fit


def test_every_missing_tensor_is_named(broken):
    stored = tensors(broken)
    for name in stored:
        save({other: tensor for other, tensor in stored.items() if other != name}, broken / "model.safetensors")
        with pytest.raises(ValueError, match=f"tensor '{name}'.*missing") as error:
            checkpoint.load_model(broken)
        assert str(broken) in str(error.value)


def test_several_missing_tensors_are_counted(broken):
    stored = tensors(broken)
    save(dict(list(stored.items())[:-4]), broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"and 3 more .*missing"):
        checkpoint.load_model(broken)


def test_every_wrongly_shaped_tensor_is_named_with_both_shapes(broken):
    stored = tensors(broken)
    for name, tensor in stored.items():
        wrong = np.zeros((*tensor.shape[:-1], tensor.shape[-1] + 1), np.float32)
        save(stored | {name: wrong}, broken / "model.safetensors")
        with pytest.raises(ValueError) as error:
            checkpoint.load_model(broken)
        for part in ("model.safetensors", repr(name), str(list(wrong.shape)), str(list(tensor.shape))):
            assert part in str(error.value)


def test_a_transposed_tensor_is_refused(broken):
    stored = tensors(broken)
    name = next(name for name, tensor in stored.items() if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1])
    save(stored | {name: np.ascontiguousarray(stored[name].T)}, broken / "model.safetensors")
    with pytest.raises(ValueError, match=name):
        checkpoint.load_model(broken)


@pytest.mark.parametrize("extra", ["model.decoder.layers.1.fc1.weight", "score.weight", "weird name 🙂"])
def test_an_extra_tensor_is_named(broken, extra):
    save(tensors(broken) | {extra: np.zeros((2, 2), np.float32)}, broken / "model.safetensors")
    with pytest.raises(ValueError, match="does not belong to model_type") as error:
        checkpoint.load_model(broken)
    assert repr(extra) in str(error.value)


def test_a_head_beside_tied_embeddings_is_passed_over_but_an_untied_one_is_needed(tmp_path):
    write(tmp_path, random_model(ONE_LAYER["opt"]))
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"'lm_head\.weight'.*missing"):
        checkpoint.load_model(tmp_path)


def test_a_tensor_that_is_there_twice_is_named(broken):
    """Under both of the names that one tensor may have, in one file, or in two shards."""
    stored = tensors(broken)
    name = next(name for name in stored if name.startswith("model."))
    twice = stored | {name.removeprefix("model."): stored[name]}
    save(twice, broken / "model.safetensors")
    with pytest.raises(ValueError, match="appears twice") as error:
        checkpoint.load_model(broken)
    assert name.removeprefix("model.") in str(error.value)
    save_shards(stored, broken)
    save({name: stored[name]}, broken / "model-00004-of-00003.safetensors")
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    index["weight_map"]["again"] = "model-00004-of-00003.safetensors"
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="appears twice") as error:
        checkpoint.load_model(broken)
    assert name in str(error.value)


def test_integers_are_not_taken_for_weights(broken):
    """A quantised checkpoint has tensors of the right names and shapes that mean something else."""
    stored = tensors(broken)
    name = next(name for name, tensor in stored.items() if tensor.ndim == 2)
    save(stored | {name: np.ones(stored[name].shape, np.int8)}, broken / "model.safetensors")
    with pytest.raises(ValueError, match="int8") as error:
        checkpoint.load_model(broken)
    assert name in str(error.value)


# Damaged files


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One directory for all examples of a property, and the bytes of its weights."""
    config = dataclasses.replace(ONE_LAYER["opt"], vocab_size=7, hidden_size=4, embed_size=4, num_heads=2,
                                 num_kv_heads=2, head_dim=2, mlp_size=3, max_positions=5)  # fmt: skip
    directory = write(tmp_path_factory.mktemp("small"), random_model(config))
    return directory, (directory / "model.safetensors").read_bytes()


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused_wherever_it_ends(small, share):
    directory, whole = small
    path = directory / "model.safetensors"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="not a readable safetensors file") as error:
        checkpoint.load_model(directory)
    assert str(path) in str(error.value)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_header_with_a_changed_byte_is_refused_or_means_the_same(small, data):
    directory, whole = small
    path = directory / "model.safetensors"
    path.write_bytes(whole)
    expected = checkpoint.load_model(directory)
    header = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.integers(0, header - 1))
    bit = data.draw(st.integers(0, 7))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    try:
        model = checkpoint.load_model(directory)
    except ValueError as error:
        assert str(directory) in str(error)  # its tensors may be named in bytes that were changed
    else:
        assert_equal(model, expected)


@pytest.mark.parametrize("content", [
    b"",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"\0" * 64,
    b"PK\3\4" * 16,
], ids=["empty", "git-lfs pointer", "zeros", "zip"])  # fmt: skip
def test_a_file_of_another_kind_is_refused(broken, content):
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable safetensors file") as error:
        checkpoint.load_model(broken)
    assert "model.safetensors" in str(error.value)


def test_a_damaged_shard_is_named(broken):
    save_shards(tensors(broken), broken)
    shard = broken / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a readable safetensors file") as error:
        checkpoint.load_model(broken)
    assert str(shard) in str(error.value)


def test_an_absent_shard_is_named_before_anything_is_read(broken):
    save_shards(tensors(broken), broken)
    (broken / "model-00003-of-00003.safetensors").unlink()
    read: list[int] = []
    with pytest.raises(ValueError, match=r"'model-00003-of-00003\.safetensors', which is not there") as error:
        checkpoint.load_model(broken, progress=lambda done, total: read.append(done))
    assert "index.json" in str(error.value) and not read


@pytest.mark.parametrize("index", [
    "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": null, "b": "c"}}', "\xff",
])  # fmt: skip
def test_an_index_that_is_none_is_named(broken, index):
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors.index.json").write_bytes(index.encode("latin-1"))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        checkpoint.load_model(broken)


def test_a_tensor_that_only_the_index_names_is_named(broken):
    save_shards(tensors(broken), broken)
    path = broken / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.absent.weight"] = "model-00002-of-00003.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors: tensor 'model\.absent\.weight'"):
        checkpoint.load_model(broken)


def test_a_shard_whose_header_is_damaged_is_named(broken):
    save_shards(tensors(broken), broken)
    shard = broken / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[8] ^= 1  # the opening brace
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable safetensors file") as error:
        checkpoint.load_model(broken)
    assert str(shard) in str(error.value)


def test_a_directory_without_weights_is_named(broken):
    (broken / "model.safetensors").rename(broken / "model.gguf")
    with pytest.raises(ValueError, match=r"none of model\.safetensors, .*pytorch_model\.bin") as error:
        checkpoint.load_model(broken)
    assert str(broken) in str(error.value)


# PyTorch's files


def save_bin(directory: Path, shards: bool = False) -> None:
    """pytorch_model.bin, or two shards of it with an index, in place of model.safetensors."""
    torch = pytest.importorskip("torch", reason="pytorch_model.bin needs PyTorch")
    load = pytest.importorskip("safetensors.torch").load_file
    stored = load(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = list(stored)
    for index, part in enumerate((names[::2], names[1::2]) if shards else (names,), start=1):
        name = f"pytorch_model-{index:05}-of-00002.bin" if shards else "pytorch_model.bin"
        torch.save({key: stored[key] for key in part}, directory / name)
    if shards:
        weight_map = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(names)}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", checkpoint.DTYPES)
def test_pytorch_files_hold_what_safetensors_hold(tmp_path, dtype, shards):
    model = random_model(ONE_LAYER["opt"], dtype)
    save_bin(write(tmp_path, model, dtype), shards)
    assert_equal(checkpoint.load_model(tmp_path, dtype), model)


def test_weights_outlive_the_pytorch_file_they_are_mapped_from(broken):
    """On a CPU an array may be a view of the memory that it is made from."""
    expected = checkpoint.load_model(broken)
    save_bin(broken)
    model = checkpoint.load_model(broken)
    with (broken / "pytorch_model.bin").open("r+b") as file:
        file.write(bytes((broken / "pytorch_model.bin").stat().st_size))
    assert_equal(model, expected)


def test_safetensors_come_before_pytorch_files(broken):
    (broken / "pytorch_model.bin").write_bytes(b"")
    checkpoint.load_model(broken)


def test_without_pytorch_its_files_are_one_clear_error(broken, monkeypatch):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: PyTorch is needed .* pip install torch"):
        checkpoint.load_model(broken)


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "directory changed", "not tensors"])
def test_a_damaged_pytorch_file_is_named(broken, damage):
    torch = pytest.importorskip("torch", reason="pytorch_model.bin needs PyTorch")
    save_bin(broken)
    path = broken / "pytorch_model.bin"
    content = path.read_bytes()
    if damage == "not tensors":
        torch.save({"model.decoder.embed_tokens.weight": [1.0]}, path)
    else:
        path.write_bytes({
            "empty": b"",
            "truncated": content[:-100],
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "directory changed": content.replace(b"PK\1\2", b"PK\1\3"),
        }[damage])  # fmt: skip
    with pytest.raises(ValueError, match="not a readable PyTorch file") as error:
        checkpoint.load_model(broken)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_tensor_of_a_pytorch_file_is_named(broken):
    torch = pytest.importorskip("torch", reason="pytorch_model.bin needs PyTorch")
    save_bin(broken)
    stored = torch.load(broken / "pytorch_model.bin", weights_only=True)
    name, _ = stored.popitem()
    torch.save(stored, broken / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"tensor '{name}' is missing"):
        checkpoint.load_model(broken)


# Memory

# VmHWM, since ru_maxrss begins with the size of the process that started this one.
PEAK = """
import re, sys
from pathlib import Path
import jax, jax.numpy as jnp
from flax import nnx
from kvpr_jax import checkpoint

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

directory = Path(sys.argv[1])
checkpoint.read_config(directory)
jax.block_until_ready(jnp.zeros(5) + 1)
before = peak()
model = checkpoint.load_model(directory)
print(peak() - before - sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_holds_no_more_than_a_shard_beside_the_model(tmp_path):
    """And the few tensors on their way. All of the 8 shards, equal but for the embeddings', are four times the bound.

    glibc returns freed blocks of any size above a fixed threshold at once; by default what it keeps for later ones
    varies by 70 MiB from run to run.
    """
    config = dataclasses.replace(OPT, vocab_size=2000, num_layers=16, hidden_size=512, embed_size=512, num_heads=8,
                                 num_kv_heads=8, head_dim=64, mlp_size=4096)  # fmt: skip
    names = opt.checkpoint_names(config)
    abstract = nnx.eval_shape(lambda: Model(config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    shapes = {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(abstract))}
    rng = np.random.default_rng(0)
    stored = {
        name: rng.random(entry.shape([shapes[path] for path in entry.paths]), np.float32)
        for name, entry in names.items()
        if entry.paths
    }
    (tmp_path / "config.json").write_text(json.dumps(hf_fields(config)))
    (tmp_path / "model.safetensors").touch()
    save_shards(stored, tmp_path, lambda index: index * 8 // len(stored))
    shards = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    process = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    on_their_way = checkpoint.ON_THEIR_WAY * max(tensor.nbytes for tensor in stored.values())
    bound = max(shards) + on_their_way
    assert 4 * bound < sum(shards)
    assert int(process.stdout) < bound


# config.json


@pytest.fixture
def config_only(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_fields(OPT)))
    return tmp_path


def test_a_config_that_is_not_there_is_named(config_only):
    (config_only / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json") as error:
        checkpoint.read_config(config_only)
    assert str(config_only) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{bad", b"\xff\xfe{}", b"[]", b"null", b"{}", b'"opt"'])
def test_a_config_that_is_none_is_named(config_only, content):
    (config_only / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: (not readable as JSON|no model_type)"):
        checkpoint.read_config(config_only)


@pytest.mark.parametrize("model_type", ["t5", "", None, [], {}, 5], ids=repr)
def test_an_unknown_model_type_is_named_with_the_known_ones(config_only, model_type):
    change_config(config_only, model_type=model_type)
    with pytest.raises(ValueError, match="llama, mistral, olmo2, opt, phi") as error:
        checkpoint.read_config(config_only)
    assert repr(model_type) in str(error.value)


@pytest.mark.parametrize("fields, named", [
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": -60}, "hidden_size"),
    ({"hidden_size": "60"}, "hidden_size"),
    ({"hidden_size": 60.5}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": [60]}, "hidden_size"),
    ({"vocab_size": 0, "bos_token_id": None, "eos_token_id": None}, "vocab_size"),
    ({"num_hidden_layers": 0}, "num_layers"),
    ({"num_hidden_layers": -1}, "num_layers"),
    ({"num_attention_heads": 0}, "heads"),
    ({"num_attention_heads": None}, "heads"),
    ({"num_attention_heads": 7}, "7"),
    ({"eos_token_id": "end"}, "eos_token_id"),
    ({"max_position_embeddings": 0}, "position"),
    ({"max_position_embeddings": -3}, "position"),
], ids=str)  # fmt: skip
def test_values_that_make_no_model_are_named(config_only, fields, named):
    change_config(config_only, **fields)
    with pytest.raises(ValueError, match=named) as error:
        checkpoint.read_config(config_only)
    message = str(error.value)
    assert "config.json" in message and len(message.splitlines()) == 1
    assert str(next(iter(fields.values()))) in message


@pytest.mark.parametrize("fields, message", [
    ({"num_key_value_heads": 4}, "6 query heads cannot share 4 key/value heads"),
    ({"num_attention_heads": 7}, "7"),
    ({"num_key_value_heads": 0}, "num_kv_heads is 0"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
    ({"head_dim": 9}, "head_dim.*9"),
], ids=str)  # fmt: skip
def test_values_that_make_no_llama_are_named(tmp_path, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(hf_fields(LLAMA)))
    change_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.read_config(tmp_path)
    assert "config.json" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_an_unknown_activation_is_named(broken):
    change_config(broken, activation_function="snake", hidden_act="snake")
    with pytest.raises(ValueError, match=r"'snake' is not known; known: .*relu"):
        checkpoint.load_model(broken)


@pytest.mark.parametrize("content", ["{bad", "[]"])
def test_a_damaged_generation_config_is_named(config_only, content):
    (config_only / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        checkpoint.read_config(config_only)


@pytest.mark.parametrize("fields, named", [
    ({"hidden_size": 120}, r"120\b"),
    ({"vocab_size": 90}, "90"),
    ({"num_hidden_layers": 2}, r"layers\.1\..*missing"),
    ({"max_position_embeddings": 114}, "116"),
])  # fmt: skip
def test_a_config_that_disagrees_with_the_weights_is_refused(tmp_path, fields, named):
    write(tmp_path, random_model(ONE_LAYER["opt"]))
    change_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=named):
        checkpoint.load_model(tmp_path)


def test_an_unknown_dtype_is_named_with_the_known_ones(config_only):
    with pytest.raises(ValueError, match="'float64' is not known; known: float32, bfloat16, float16"):
        checkpoint.load_model(config_only, "float64")


# Where a model is looked for


def test_a_model_that_is_nowhere_is_named(tmp_path):
    for name in (str(tmp_path / "absent"), "absent", "./absent", "a/b/c", "a b/c", " "):
        with pytest.raises(ValueError, match="no such directory") as error:
            checkpoint.find(name)
        assert repr(name) in str(error.value)


def test_an_empty_name_is_not_the_working_directory(monkeypatch, sound):
    monkeypatch.chdir(sound)
    with pytest.raises(ValueError, match="model ''"):
        checkpoint.find("")


def test_a_file_is_not_a_model(broken):
    with pytest.raises(ValueError, match=r"is a file; give the directory that holds config\.json"):
        checkpoint.find(broken / "model.safetensors")


@pytest.mark.parametrize("name", ["nobody/nothing", "no--body/nothing"])
def test_a_hub_id_that_the_hub_does_not_give_is_named(name):
    """HF_HUB_OFFLINE is set by conftest: the hub answers from the local cache alone."""
    with pytest.raises(ValueError, match=f"{name}.*the hub did not give it") as error:
        checkpoint.find(name)
    assert len(str(error.value).splitlines()) == 1


def test_a_hub_id_is_a_directory_if_there_is_one(monkeypatch, tmp_path, sound):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sound, tmp_path / "owner" / "name")
    assert checkpoint.find("owner/name") == Path("owner/name")


def test_the_hubs_cache_and_settings_are_used(sound, tmp_path):
    """HF_HOME and HF_HUB_OFFLINE, which are read once in a process; and a branch, a commit, and neither."""
    hub = tmp_path / "hub" / "models--owner--name"
    commits = {"main": "1" * 40, "old": "2" * 40}
    (hub / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        shutil.copytree(sound, hub / "snapshots" / commit)
        (hub / "refs" / name).write_text(commit)
    script = """
from kvpr_jax import checkpoint
for revision in (None, "old", "1" * 40, "absent"):
    print(checkpoint.find("owner/name", revision).name)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert process.stdout.split() == ["1" * 40, "2" * 40, "1" * 40], process.stderr
    assert "'owner/name' at revision 'absent'" in process.stderr


@pytest.mark.parametrize("weights, needed, downloads", [
    ("model.safetensors", True, 1), ("pytorch_model.bin", True, 2), ("model.safetensors", False, 1),
])  # fmt: skip
def test_only_weights_that_are_needed_are_downloaded(monkeypatch, tmp_path, weights, needed, downloads):
    """PyTorch's where there are no safetensors, and none for a plan."""
    repository = {"config.json", "tokenizer.json", weights, "pytorch_model.bin", "training_args.bin", "tf_model.h5"}
    seen = []

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns):
        seen.append((repo_id, revision))
        for name in filter_repo_objects(repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    assert checkpoint.find("owner/name", "v1", needed) == tmp_path
    assert seen == [("owner/name", "v1")] * downloads
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "tokenizer.json", *[weights] * needed}


def test_load_takes_a_revision(monkeypatch, sound, tmp_path):
    model = write_tokenizer(Path(shutil.copytree(sound, tmp_path / "model")))
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *_, revision, **__: str(model / revision / ".."))
    (model / "v1").mkdir()
    assert_equal(kvpr_jax.load("owner/name", revision="v1")[0], checkpoint.load_model(sound))


@pytest.mark.parametrize("change", [
    lambda d: (d / "tokenizer.json").unlink(),
    lambda d: [(d / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
    lambda d: (d / "tokenizer.json").write_text("{bad"),
    lambda d: (d / "tokenizer.json").write_text("{}"),
    lambda d: (d / "tokenizer.json").write_bytes((d / "tokenizer.json").read_bytes()[:5000]),
    lambda d: (d / "tokenizer_config.json").write_text("{bad"),
], ids=["no tokenizer.json", "no files", "not JSON", "empty object", "truncated", "config not JSON"])  # fmt: skip
def test_a_tokenizer_that_is_absent_or_damaged_is_an_error(tmp_path, change):
    write(tmp_path, random_model(ONE_LAYER["opt"]))
    change(write_tokenizer(tmp_path))
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded") as error:
        checkpoint.load_tokenizer(tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message and len(message.splitlines()) == 1 and not message.rstrip().endswith(":")
