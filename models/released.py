"""Released sizes of every architecture: their configs, and how many parameters they are published with.

    released.release("opt-6.7b").config      # or "facebook/opt-6.7b"; "llama-2-7b" or "meta-llama/Llama-2-7b-hf"

`python -m kvpr_jax.models` writes what these shapes mean for the cache to README.md.
"""

import dataclasses
import difflib
from typing import Any

import transformers

from kvpr_jax.config import ModelConfig
from kvpr_jax.models import architecture


@dataclasses.dataclass(frozen=True)
class Release:
    """One released size.

    Attributes:
        model_type: of its config.json.
        parameters: as published: all of them where the hub, the model's card or code that counted its weights gives the
            exact number, otherwise the paper's rounded one ("66B"). A head that is the token embedding counts once,
            even where the checkpoint holds it twice (Qwen1.5-0.5B).
        fields: of config.json: the shapes, and what else differs from transformers' defaults and `from_hf` reads.
    """

    model_type: str
    parameters: int | str
    fields: dict[str, Any]

    @property
    def hf(self) -> transformers.PretrainedConfig:
        return transformers.CONFIG_MAPPING[self.model_type](**self.fields)

    @property
    def config(self) -> ModelConfig:
        return architecture(self.model_type).Config.from_hf(self.hf)


def _sizes(model_type: str, columns: str, rows: dict[str, tuple[Any, ...]], **fields: Any) -> dict[str, Release]:
    """Releases by hub id: a row is the parameters, then the columns' fields; `fields` are the same in all rows."""
    return {
        hub_id: Release(model_type, parameters, fields | dict(zip(columns.split(), values, strict=True)))
        for hub_id, (parameters, *values) in rows.items()
    }


OPT = _sizes(
    "opt",
    "num_hidden_layers hidden_size num_attention_heads ffn_dim word_embed_proj_dim do_layer_norm_before",
    {
        "facebook/opt-125m": (125_239_296, 12, 768, 12, 3072, 768, True),
        "facebook/opt-350m": (331_196_416, 24, 1024, 16, 4096, 512, False),
        "facebook/opt-1.3b": (1_315_758_080, 24, 2048, 32, 8192, 2048, True),
        "facebook/opt-2.7b": (2_651_596_800, 32, 2560, 32, 10240, 2560, True),
        "facebook/opt-6.7b": (6_658_473_984, 32, 4096, 32, 16384, 4096, True),
        "facebook/opt-13b": (12_853_473_280, 40, 5120, 40, 20480, 5120, True),
        "facebook/opt-30b": (29_974_540_288, 48, 7168, 56, 28672, 7168, True),
        "facebook/opt-66b": ("66B", 64, 9216, 72, 36864, 9216, True),
    },
)

_LLAMA = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size "

LLAMA = (
    _sizes(
        "llama",
        _LLAMA + "rms_norm_eps",
        {
            "huggyllama/llama-7b": (6_738_415_616, 32, 4096, 32, 32, 11008, 1e-6),
            "huggyllama/llama-13b": (13_015_864_320, 40, 5120, 40, 40, 13824, 1e-6),
            "huggyllama/llama-30b": (32_528_943_616, 60, 6656, 52, 52, 17920, 1e-6),
            "huggyllama/llama-65b": (65_285_660_672, 80, 8192, 64, 64, 22016, 1e-5),
        },
    )
    | _sizes(
        "llama",
        _LLAMA,
        {
            "meta-llama/Llama-2-7b-hf": (6_738_415_616, 32, 4096, 32, 32, 11008),
            "meta-llama/Llama-2-13b-hf": (13_015_864_320, 40, 5120, 40, 40, 13824),
            "meta-llama/Llama-2-70b-hf": (68_976_648_192, 80, 8192, 64, 8, 28672),
        },
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    | _sizes(
        "llama",
        _LLAMA,
        {
            "meta-llama/Meta-Llama-3-8B": (8_030_261_248, 32, 4096, 32, 8, 14336),
            "meta-llama/Meta-Llama-3-70B": (70_553_706_496, 80, 8192, 64, 8, 28672),
        },
        vocab_size=128256,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        bos_token_id=128000,
        eos_token_id=128001,
    )
    | _sizes(
        "llama",
        _LLAMA + "head_dim",
        {
            "meta-llama/Llama-3.2-1B": (1_235_814_400, 16, 2048, 32, 8, 8192, 64),
            "meta-llama/Llama-3.2-3B": (3_212_749_824, 28, 3072, 24, 8, 8192, 128),
        },
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
    )
)

MISTRAL = _sizes(
    "mistral",
    _LLAMA,
    {"mistralai/Mistral-7B-v0.1": (7_241_732_096, 32, 4096, 32, 8, 14336)},
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    sliding_window=4096,
)

GPT2 = _sizes(
    "gpt2",
    "n_layer n_embd n_head",
    {
        "openai-community/gpt2": (124_439_808, 12, 768, 12),
        "openai-community/gpt2-medium": (354_823_168, 24, 1024, 16),
        "openai-community/gpt2-large": (774_030_080, 36, 1280, 20),
        "openai-community/gpt2-xl": (1_557_611_200, 48, 1600, 25),
    },
)

GPT_NEOX = _sizes(
    "gpt_neox",
    "num_hidden_layers hidden_size num_attention_heads intermediate_size vocab_size",
    {
        "EleutherAI/pythia-70m": (70_426_624, 6, 512, 8, 2048, 50304),
        "EleutherAI/pythia-160m": (162_322_944, 12, 768, 12, 3072, 50304),
        "EleutherAI/pythia-410m": (405_334_016, 24, 1024, 16, 4096, 50304),
        "EleutherAI/pythia-1b": (1_011_781_632, 16, 2048, 8, 8192, 50304),
        "EleutherAI/pythia-1.4b": (1_414_647_808, 24, 2048, 16, 8192, 50304),
        "EleutherAI/pythia-2.8b": (2_775_208_960, 32, 2560, 32, 10240, 50304),
        "EleutherAI/pythia-6.9b": (6_857_302_016, 32, 4096, 32, 16384, 50432),
        "EleutherAI/pythia-12b": (11_846_072_320, 36, 5120, 40, 20480, 50688),
    },
    rotary_pct=0.25,
    eos_token_id=0,
) | _sizes(
    "gpt_neox",
    "num_hidden_layers hidden_size num_attention_heads intermediate_size vocab_size",
    {"EleutherAI/gpt-neox-20b": (20_554_567_680, 44, 6144, 64, 24576, 50432)},
    rotary_pct=0.25,
    hidden_act="gelu_fast",
)

PHI = _sizes(
    "phi",
    "num_hidden_layers hidden_size num_attention_heads intermediate_size partial_rotary_factor eos_token_id",
    {
        "microsoft/phi-1": (1_418_270_720, 24, 2048, 32, 8192, 0.5, None),
        "microsoft/phi-1_5": (1_418_270_720, 24, 2048, 32, 8192, 0.5, None),
        "microsoft/phi-2": (2_779_683_840, 32, 2560, 32, 10240, 0.4, 50256),
    },
)

BLOOM = _sizes(
    "bloom",
    "n_layer hidden_size n_head",
    {
        "bigscience/bloom-560m": (559_214_592, 24, 1024, 16),
        "bigscience/bloom-1b1": (1_065_314_304, 24, 1536, 16),
        "bigscience/bloom-1b7": (1_722_408_960, 24, 2048, 16),
        "bigscience/bloom-3b": (3_002_557_440, 30, 2560, 32),
        "bigscience/bloom-7b1": (7_069_016_064, 30, 4096, 32),
        "bigscience/bloom": (176_247_271_424, 70, 14336, 112),
    },
)

GEMMA = _sizes(
    "gemma",
    _LLAMA + "head_dim",
    {
        "google/gemma-2b": (2_506_172_416, 18, 2048, 8, 1, 16384, 256),
        "google/gemma-7b": (8_537_680_896, 28, 3072, 16, 16, 24576, 256),
    },
)

OLMO2 = _sizes(
    "olmo2",
    _LLAMA,
    {
        "allenai/OLMo-2-0425-1B": (1_484_916_736, 16, 2048, 16, 16, 8192),
        "allenai/OLMo-2-1124-7B": (7_298_617_344, 32, 4096, 32, 32, 11008),
        "allenai/OLMo-2-1124-13B": (13_716_198_400, 40, 5120, 40, 40, 13824),
        "allenai/OLMo-2-0325-32B": (32_234_279_936, 64, 5120, 40, 8, 27648),
    },
    vocab_size=100352,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=500000.0,
    pad_token_id=100277,
    eos_token_id=100257,
)

QWEN2 = _sizes(
    "qwen2",
    _LLAMA + "vocab_size tie_word_embeddings rope_theta",
    {
        "Qwen/Qwen1.5-0.5B": (463_987_712, 24, 1024, 16, 16, 2816, 151936, True, 1e6),
        "Qwen/Qwen1.5-1.8B": (1_836_828_672, 24, 2048, 16, 16, 5504, 151936, False, 1e6),
        "Qwen/Qwen1.5-4B": (3_950_369_280, 40, 2560, 20, 20, 6912, 151936, False, 5e6),
        "Qwen/Qwen1.5-7B": (7_721_324_544, 32, 4096, 32, 32, 11008, 151936, False, 1e6),
        "Qwen/Qwen1.5-14B": (14_167_290_880, 40, 5120, 40, 40, 13696, 152064, False, 1e6),
        "Qwen/Qwen1.5-32B": (32_512_218_112, 64, 5120, 40, 8, 27392, 152064, False, 1e6),
        "Qwen/Qwen1.5-72B": (72_287_920_128, 80, 8192, 64, 64, 24576, 152064, False, 1e6),
    },
    eos_token_id=151643,
) | _sizes(
    "qwen2",
    _LLAMA + "vocab_size tie_word_embeddings max_position_embeddings rms_norm_eps",
    {
        "Qwen/Qwen2-0.5B": (494_032_768, 24, 896, 14, 2, 4864, 151936, True, 131072, 1e-6),
        "Qwen/Qwen2-1.5B": (1_543_714_304, 28, 1536, 12, 2, 8960, 151936, True, 131072, 1e-6),
        "Qwen/Qwen2-7B": (7_615_616_512, 28, 3584, 28, 4, 18944, 152064, False, 131072, 1e-6),
        "Qwen/Qwen2-72B": (72_706_203_648, 80, 8192, 64, 8, 29568, 152064, False, 131072, 1e-5),
        "Qwen/Qwen2.5-0.5B": (494_032_768, 24, 896, 14, 2, 4864, 151936, True, 32768, 1e-6),
        "Qwen/Qwen2.5-1.5B": (1_543_714_304, 28, 1536, 12, 2, 8960, 151936, True, 131072, 1e-6),
        "Qwen/Qwen2.5-3B": (3_085_938_688, 36, 2048, 16, 2, 11008, 151936, True, 32768, 1e-6),
        "Qwen/Qwen2.5-7B": (7_615_616_512, 28, 3584, 28, 4, 18944, 152064, False, 131072, 1e-6),
        "Qwen/Qwen2.5-14B": (14_770_033_664, 48, 5120, 40, 8, 13824, 152064, False, 131072, 1e-5),
        "Qwen/Qwen2.5-32B": (32_763_876_352, 64, 5120, 40, 8, 27648, 152064, False, 131072, 1e-5),
        "Qwen/Qwen2.5-72B": (72_706_203_648, 80, 8192, 64, 8, 29568, 152064, False, 131072, 1e-5),
    },
    rope_theta=1e6,
    eos_token_id=151643,
)

QWEN3 = _sizes(
    "qwen3",
    _LLAMA + "tie_word_embeddings",
    {
        "Qwen/Qwen3-0.6B": (596_049_920, 28, 1024, 16, 8, 3072, True),
        "Qwen/Qwen3-1.7B": (1_720_574_976, 28, 2048, 16, 8, 6144, True),
        "Qwen/Qwen3-4B": (4_022_468_096, 36, 2560, 32, 8, 9728, True),
        "Qwen/Qwen3-8B": (8_190_735_360, 36, 4096, 32, 8, 12288, False),
        "Qwen/Qwen3-14B": (14_768_307_200, 40, 5120, 40, 8, 17408, False),
        "Qwen/Qwen3-32B": (32_762_123_264, 64, 5120, 64, 8, 25600, False),
    },
    head_dim=128,
    max_position_embeddings=40960,
    rope_theta=1e6,
    eos_token_id=151645,
)

RELEASED = OPT | LLAMA | MISTRAL | GPT2 | GPT_NEOX | PHI | BLOOM | GEMMA | OLMO2 | QWEN2 | QWEN3


def short_name(hub_id: str) -> str:
    """What a size is called in commands: "llama-2-7b" for "meta-llama/Llama-2-7b-hf"."""
    return hub_id.split("/")[-1].lower().removeprefix("meta-").removesuffix("-hf")


def release(name: str) -> Release:
    """A released size by its hub id, the part of it behind the slash, or its short name, in any case.

    Raises:
        ValueError: unknown, with the names near to it.
    """
    for hub_id, found in RELEASED.items():
        if name.lower() in (hub_id.lower(), hub_id.split("/")[1].lower(), short_name(hub_id)):
            return found
    names = [short_name(hub_id) for hub_id in RELEASED]
    near = difflib.get_close_matches(short_name(name), names, n=8, cutoff=0.5)
    listed = [known for known in names if known in near] or ["those in kvpr_jax/models/README.md"]
    raise ValueError(f"model {name!r}: neither a directory nor one of {', '.join(listed)}")
