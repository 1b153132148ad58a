"""Reference texts from transformers' own PyTorch models: small random checkpoints, and the bundled one.

    python tests/make_golden.py             # writes all of tests/golden anew
    python tests/make_golden.py bundled     # only the named ones, here that of models/tiny after it was trained again

Each case is a checkpoint directory with `golden.npz` beside it:

    prompts (sum of lengths,), lengths (B,)   the prompts' tokens, one prompt after the other
    tokens (B, N)                             what greedy `generate` makes of them, padded on the left, in float32
    logits (N, B, V)                          what each token was taken from

The weights are random, but not as at the start of training: no scale is 1, no bias is 0, and attention is far from
uniform, so that a term that is left out or a mask that is wrong changes the text. Texts whose two best logits ever come
closer than `MARGIN` are thrown away: round-off must not decide. `test_oracle.py` builds the same checkpoints from other
seeds and asks transformers while it runs.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers

GOLDEN = Path(__file__).parent / "golden"
TINY = Path(__file__).parents[1] / "models" / "tiny"

MARGIN = 5e-3  # between the best and the second best logit; float32 round-off is a hundred times smaller and more
LENGTHS = (18, 7, 1)  # buckets(18) are 0, 16 and 18
NEW_TOKENS = 20
VOCAB = 97
SHAPES = {
    "vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = SHAPES | {"hidden_size": 44, "ffn_dim": 52, "dropout": 0.0}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
LLAMA = SHAPES | {"hidden_size": 40, "intermediate_size": 52, "rope_parameters": ROPE}
QWEN = LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 2}
NEOX = SHAPES | {"hidden_size": 64, "intermediate_size": 52, "rope_parameters": ROPE | {"partial_rotary_factor": 0.25}}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip


def as_before_version_5(directory: Path) -> None:
    """config.json with the names that checkpoints on the hub have: transformers 5 renamed them."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2) + "\n")


def as_the_first_gpt2(directory: Path) -> None:
    """Tensors without a prefix, and causal masks among them, as on the hub."""
    path = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    safetensors.torch.save_file(tensors | masks, path, metadata={"format": "pt"})


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint and the prompts it is given.

    Attributes:
        config: what it is.
        lengths: of the prompts.
        dtype: of the tensors in the file; all arithmetic is float32.
        shard_size: of each file, at most.
        prefix: whether tensors are named as in the whole model or as in its base model.
        edit: changes the directory after it is written.
    """

    config: transformers.PretrainedConfig
    lengths: tuple[int, ...] = LENGTHS
    dtype: torch.dtype = torch.float16
    shard_size: str = "1GB"
    prefix: bool = True
    edit: Callable[[Path], None] = lambda directory: None


def opt(**fields: Any) -> transformers.OPTConfig:
    return transformers.OPTConfig(**(OPT | fields))


def llama(**fields: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**(LLAMA | fields))


CASES = {
    "opt": Case(opt(num_hidden_layers=3), dtype=torch.float32),
    "opt-350m": Case(opt(do_layer_norm_before=False, word_embed_proj_dim=20), prefix=False),
    "opt-no-bias-untied": Case(opt(enable_bias=False, tie_word_embeddings=False), lengths=(18, 18)),
    "opt-no-affine": Case(opt(layer_norm_elementwise_affine=False, activation_function="gelu")),
    "llama": Case(llama(num_hidden_layers=3), dtype=torch.bfloat16),
    "llama-gqa-llama3": Case(
        llama(num_key_value_heads=2, rope_parameters=LLAMA3, rms_norm_eps=1e-5),
        dtype=torch.bfloat16, edit=as_before_version_5,
    ),
    "llama-linear": Case(
        llama(rope_parameters=ROPE | {"rope_type": "linear", "factor": 4.0}), shard_size="40KB",
    ),
    "llama-tied-biases": Case(llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama-head-dim": Case(llama(head_dim=14)),
    "mistral": Case(
        transformers.MistralConfig(**(LLAMA | {"num_key_value_heads": 4, "sliding_window": 6})), dtype=torch.bfloat16,
    ),
    "gpt2": Case(transformers.GPT2Config(**SHAPES, hidden_size=44), edit=as_the_first_gpt2),
    "gpt2-unscaled": Case(
        transformers.GPT2Config(
            **SHAPES, hidden_size=44, n_inner=52, activation_function="relu", scale_attn_weights=False,
            tie_word_embeddings=False,
        ),
    ),
    "gpt-neox": Case(transformers.GPTNeoXConfig(**NEOX)),
    "gpt-neox-serial": Case(
        transformers.GPTNeoXConfig(
            **(NEOX | {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}), use_parallel_residual=False,
            attention_bias=False,
        ),
        lengths=(18, 18),
    ),
    "phi": Case(transformers.PhiConfig(**(LLAMA | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.4}}))),
    "bloom": Case(
        transformers.BloomConfig(**(SHAPES | {"num_attention_heads": 6, "hidden_size": 48}), seq_length=64),
        prefix=False,
    ),
    "bloom-residual": Case(
        transformers.BloomConfig(**SHAPES, hidden_size=48, apply_residual_connection_post_layernorm=True, seq_length=64)
    ),
    "gemma": Case(transformers.GemmaConfig(**LLAMA, num_key_value_heads=4, head_dim=16), dtype=torch.bfloat16),
    "gemma-one-kv-head": Case(transformers.GemmaConfig(**LLAMA, num_key_value_heads=1, head_dim=10)),
    "olmo2": Case(transformers.Olmo2Config(**LLAMA)),
    "olmo2-gqa": Case(transformers.Olmo2Config(**LLAMA, num_key_value_heads=2)),
    "qwen2": Case(transformers.Qwen2Config(**(LLAMA | {"num_key_value_heads": 4}))),
    "qwen2-gqa-tied": Case(transformers.Qwen2Config(**QWEN)),
    "qwen3": Case(transformers.Qwen3Config(**QWEN, head_dim=14), dtype=torch.bfloat16),
}  # fmt: skip

BUNDLED_PROMPTS = (
    "The with statement is used to wrap the execution of a block",
    "Return",
    "If the optional argument is given,",
    "The class",
    "Raises ValueError if the string is not found. The start and end arguments",
    "A list of",
    "When an exception is raised in the try clause, the interpreter looks for",
    "This module defines",
    "Write the",
    "Dictionaries are not ordered by",
    "x.__add__(y)",
    "The return value",
)


POSITIONS = ("embed_positions.weight", "wpe.weight")
TOKENS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights that make hidden states, logits and attention scores of order 1, every one of them random."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter.shape[0 if ".c_" in name else -1]  # GPT-2 stores its kernels the other way round
        gemma = model.config.model_type == "gemma"  # its scales are stored less 1
        if name.endswith("word_embeddings_layernorm.weight") or (gemma and name == "model.norm.weight"):
            noise = noise - int(gemma)  # signs at random: embeddings this large would make every token follow itself
        elif name.endswith("norm.weight") or (".ln_" in name and name.endswith("weight")):
            noise = 0.3 * noise + int(not gemma)
        elif name.endswith("norm.bias") or ".ln_" in name:
            noise = 0.1 * noise  # of the last norm: the same for all tokens, so it must not decide alone
        elif name.endswith(("q_proj.bias", "k_proj.bias")):
            noise = 0.5 * noise
        elif parameter.ndim == 1:
            noise = 0.2 * noise
        elif name.endswith(POSITIONS) or (name.endswith(TOKENS) and not model.config.tie_word_embeddings):
            pass
        elif name.endswith(("q_proj.weight", "k_proj.weight", "query_key_value.weight", "c_attn.weight")):
            noise = 1.6 * noise / fan_in**0.5
        else:
            noise = 1.2 * noise / fan_in**0.5
        parameter.data.copy_(noise)


def random_prompts(case: Case, generator: torch.Generator) -> list[list[int]]:
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in case.lengths]


def reference_model(directory: Path, **options: Any) -> Any:
    """transformers' model, in float32 and with attention written out."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", **options
    )


def left_padded(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    }


def reference(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens (B, N) and the logits (N, B, V) they were taken from; no token ends a text."""
    inputs = left_padded(prompts)
    settings = transformers.GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    # `generate` fills in what is None from the model's own settings, the end of a text among it.
    model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    out = model.generate(**inputs, generation_config=settings)
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :].numpy().astype(np.int32)
    assert tokens.shape == (len(prompts), new_tokens)
    return tokens, torch.stack(out.logits).numpy()


def margins(logits: np.ndarray) -> np.ndarray:
    """How far the best logit is above the second best, without the last axis."""
    best = np.sort(logits, axis=-1)
    return best[..., -1] - best[..., -2]


def build(case: Case, directory: Path, seed: int) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Write a random checkpoint; returns prompts, tokens and logits as `reference` gives them.

    Takes the first weights of the seed whose texts have a clear winner at every step and do not repeat themselves.
    """
    for attempt in range(200):
        generator = torch.Generator().manual_seed(1000 * seed + attempt)
        model = transformers.AutoModelForCausalLM.from_config(case.config, dtype=torch.float32).eval()
        randomize(model, generator)
        prompts = random_prompts(case, generator)
        model = model.to(case.dtype)
        (model if case.prefix else model.base_model).save_pretrained(directory, max_shard_size=case.shard_size)
        case.edit(directory)
        tokens, logits = reference(reference_model(directory), prompts, NEW_TOKENS)
        varied = min(len(set(row.tolist())) for row in tokens) > NEW_TOKENS // 3
        if varied and margins(logits).min() > MARGIN and 0.5 < logits.std() < 3:
            return prompts, tokens, logits
        shutil.rmtree(directory)
    raise RuntimeError(f"{directory.name}: no weights give texts that are fit for a test")


def bundled() -> tuple[list[str], list[list[int]], np.ndarray, np.ndarray]:
    """Four prompts of different length for the bundled model: texts, tokens, new tokens and their logits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    model = reference_model(TINY)
    prompts = [tokenizer(text)["input_ids"] for text in BUNDLED_PROMPTS]
    _, logits = reference(model, prompts, NEW_TOKENS)
    chosen: dict[int, int] = {}  # by length
    for index in np.flatnonzero(margins(logits).min(0) > MARGIN):
        chosen.setdefault(len(prompts[index]), int(index))
    if len(chosen) < 4:
        raise RuntimeError(f"models/tiny: only {len(chosen)} prompts give texts that are fit for a test; add others")
    few = list(chosen.values())[:4]
    texts, prompts = [BUNDLED_PROMPTS[index] for index in few], [prompts[index] for index in few]
    tokens, logits = reference(model, prompts, NEW_TOKENS)
    assert margins(logits).min() > MARGIN / 2
    return texts, prompts, tokens, logits


def save(directory: Path, prompts: list[list[int]], tokens: np.ndarray, logits: np.ndarray, **more: np.ndarray) -> None:
    directory.mkdir(exist_ok=True)
    np.savez_compressed(
        directory / "golden.npz",
        prompts=np.concatenate(prompts).astype(np.int32),
        lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        tokens=tokens,
        logits=logits,
        **more,
    )


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)  # sums in the same order on every machine
    if unknown := set(names) - {*CASES, "bundled"}:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)} and bundled")
    if not names:
        shutil.rmtree(GOLDEN, ignore_errors=True)
        GOLDEN.mkdir()
    for seed, (name, case) in enumerate(CASES.items()):
        if name in (names or CASES):
            shutil.rmtree(GOLDEN / name, ignore_errors=True)
            prompts, tokens, logits = build(case, GOLDEN / name, seed)
            save(GOLDEN / name, prompts, tokens, logits)
            print(f"{name}: margin {margins(logits).min():.3f}, logits {logits.std():.2f}, {tokens[0].tolist()}")
    if "bundled" in (names or ["bundled"]):
        texts, prompts, tokens, logits = bundled()
        best = np.argsort(-logits, axis=-1, kind="stable")[..., :16].astype(np.int32)
        save(
            GOLDEN / "bundled", prompts, tokens, np.take_along_axis(logits, best, -1),
            logits_tokens=best, texts=np.array(texts), model_sha256=np.array(digest(TINY / "model.safetensors")),
        )  # fmt: skip
        print(f"bundled: margin {margins(logits).min():.3f}, logits {logits.std():.2f}, {texts}")


if __name__ == "__main__":
    main(sys.argv[1:])
