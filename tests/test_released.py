"""The released sizes: our modules have as many parameters as published, and models/README.md is what they give."""

import dataclasses
import math

import jax.numpy as jnp
import pytest
from flax import nnx

from kvpr_jax import checkpoint
from kvpr_jax.config import ModelConfig
from kvpr_jax.models import ARCHITECTURES, Model, __main__, architecture, released
from kvpr_jax.profiling import settings

Shapes = dict[str, tuple[int, ...]]
SMALLEST = {
    model_type: min(
        (hub_id for hub_id, release in released.RELEASED.items() if release.model_type == model_type),
        key=lambda hub_id: released.RELEASED[hub_id].config.num_layers,
    )
    for model_type in ARCHITECTURES
}


def shapes(config: ModelConfig, layers: int) -> Shapes:
    """The shape of each parameter of a model with so many layers, which takes no memory."""
    config = dataclasses.replace(config, num_layers=layers)
    abstract = nnx.eval_shape(lambda: Model(config, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0)))
    return {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(abstract))}


def count(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def assert_published(parameters: int, published: int | str) -> None:
    """Exactly, or to the digits that are published: 65.7e9 is "66B"."""
    if isinstance(published, str):
        decimals = len(published.removesuffix("B").partition(".")[2])
        assert f"{parameters / 1e9:.{decimals}f}B" == published
    else:
        assert parameters == published


@pytest.mark.parametrize("hub_id", released.RELEASED)
def test_every_size_has_the_published_number_of_parameters(hub_id):
    """Layers are alike, so that two models, of one layer and of two, give the number for all of them."""
    release = released.RELEASED[hub_id]
    one, two = (count(shapes(release.config, layers)) for layers in (1, 2))
    assert_published(one + (release.config.num_layers - 1) * (two - one), release.parameters)


@pytest.mark.parametrize("hub_id", SMALLEST.values())
def test_whole_models_have_it_too_and_a_checkpoint_holds_each_parameter_once(hub_id):
    release = released.RELEASED[hub_id]
    config = release.config
    whole = shapes(config, config.num_layers)
    assert_published(count(whole), release.parameters)
    names = architecture(config.model_type).checkpoint_names(config)
    assert sorted(whole) == sorted(path for entry in names.values() for path in entry.paths)
    stored = {name: entry.shape([whole[path] for path in entry.paths]) for name, entry in names.items() if entry.paths}
    assert count(stored) == count(whole)


def test_every_architecture_has_a_released_size():
    assert {release.model_type for release in released.RELEASED.values()} == set(ARCHITECTURES)


def test_the_page_is_current():
    assert __main__.PAGE.read_text() == __main__.page(), "python -m kvpr_jax.models"


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-2-7b-hf", "META-LLAMA/llama-2-7B-HF", "Llama-2-7b-hf", "llama-2-7b", "LLAMA-2-7B"]
)
def test_a_size_goes_by_its_hub_id_or_a_part_of_it(name):
    assert released.release(name).config == released.RELEASED["meta-llama/Llama-2-7b-hf"].config


@pytest.mark.parametrize("name", ["opt-6.7b", "opt-13b", "opt-30b", "llama-2-7b", "llama-2-13b", "llama-3-8b"])
def test_the_sizes_to_profile_have_short_names(name):
    assert released.release(name).config.num_layers in (32, 40, 48)


def test_short_names_are_unique():
    assert len({released.short_name(hub_id) for hub_id in released.RELEASED}) == len(released.RELEASED)


@pytest.mark.parametrize(
    "name, near", [("llama-2-7", "llama-2-7b"), ("Qwen/Qwen4-8B", "qwen3-8b"), ("facebook/llama-2-7b", "llama-2-7b")]
)
def test_an_unknown_name_lists_those_near_to_it(name, near):
    with pytest.raises(ValueError, match=rf"model '{name}': neither .*\b{near}\b"):
        released.release(name)


def test_a_name_near_to_none_points_to_the_page():
    with pytest.raises(ValueError, match=r"'xyz': .* one of those in kvpr_jax/models/"):
        released.release("xyz")


def test_configs_hold_more_than_shapes():
    """What no number of parameters shows: positions, norms, rotary embeddings, ends of text."""
    llama = released.release("llama-3.2-1b").config
    assert (llama.max_positions, llama.norm_epsilon, llama.eos_token_ids) == (131072, 1e-5, (128001,))
    assert (llama.rope.kind, llama.rope.factor, llama.rope.theta) == ("llama3", 32.0, 5e5)
    assert (released.release("phi-2").config.rope.width, released.release("pythia-1b").config.rope.width) == (32, 64)
    assert released.release("mistral-7b-v0.1").config.window == 4096
    assert not released.release("opt-350m").config.norm_first


def test_the_benchmark_takes_a_name_a_directory_or_a_config_json():
    bundled, _ = checkpoint.read_config(checkpoint.BUNDLED)
    assert settings.shape(str(checkpoint.BUNDLED), None) == bundled
    assert settings.shape(str(checkpoint.BUNDLED / "config.json"), 2) == dataclasses.replace(bundled, num_layers=2)
    assert settings.shape("llama-3-8b", None) == released.release("llama-3-8b").config
