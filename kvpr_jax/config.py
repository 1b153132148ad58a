"""Model shapes. Frozen and hashable, so that a config can be a static argument of `jax.jit`.

One legend of axis letters, used in types, einsums, comments and documentation:

    B batch        S cached tokens      T tokens of one segment    Q new tokens of one call (1 in a decode step)
    D model width  H query heads        K key/value heads          G = H / K query heads that share a key/value head
    d head width   L layers             F MLP width                V vocabulary
    N layers of a group, which are copied and computed together
    l split index: tokens [0, l) are held as activations, [l, S) as keys and values
"""

import dataclasses
from typing import Any, ClassVar

import transformers


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What every architecture has; each file in `models/` adds its own fields.

    Attributes:
        model_type: the checkpoint's `model_type`.
        vocab_size: V.
        num_layers: L.
        hidden_size: D.
        num_heads: H.
        num_kv_heads: K; K < H is grouped-query attention.
        head_dim: d.
        mlp_size: F.
        activation: the MLP's non-linearity, by its name in config.json.
        norm_epsilon: of every norm.
        max_positions: the longest sequence, prompt and new tokens together.
        tie_embeddings: whether the output head is the token embedding.
        eos_token_ids: tokens that end a sequence.
    """

    model_type: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    activation: str
    norm_epsilon: float
    max_positions: int
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]

    mlp_arrays: ClassVar[int] = 1  # arrays of width F that an MLP holds at once in prefill

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_size",
            "max_positions",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"config: {field} is {getattr(self, field)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config: {self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly"
            )

    @property
    def activation_width(self) -> int:
        """Numbers a token costs in each layer when held as activations: D."""
        return self.hidden_size

    @property
    def kv_width(self) -> int:
        """Numbers a token costs in each layer when held as keys and values: 2·K·d."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def activations_are_smaller(self) -> bool:
        """Whether holding activations saves anything: D < 2·K·d (equation 7 of the paper has D = K·d)."""
        return self.activation_width < self.kv_width


def common_fields(hf: transformers.PretrainedConfig) -> dict[str, Any]:
    """The fields of `ModelConfig` that go by one name in the transformers config of every architecture."""
    return {
        "model_type": hf.model_type,
        "vocab_size": hf.vocab_size,
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "num_heads": hf.num_attention_heads,
        "tie_embeddings": hf.tie_word_embeddings,
        "eos_token_ids": token_ids(hf.eos_token_id),
    }


def refuse(hf: transformers.PretrainedConfig, **supported: object) -> None:
    """Raises ValueError for a field of the transformers config with another value than the one that is supported."""
    for name, value in supported.items():
        if getattr(hf, name, value) != value:
            raise ValueError(f"config: {name} {getattr(hf, name)!r} is not supported; {value!r} is")


def width_of_heads(hidden_size: int, heads: int) -> int:
    """d where a config does not give it: D / H."""
    if heads < 1 or hidden_size % heads:
        raise ValueError(f"config: hidden_size {hidden_size} cannot be shared by {heads} attention heads evenly")
    return hidden_size // heads


def token_ids(eos: int | list[int] | None) -> tuple[int, ...]:
    """`eos_token_id` of a Hugging Face config, which may be one token, several or none."""
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
