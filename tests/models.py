"""A tiny Llama with random weights, as a Hugging Face folder: every real code path, in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from quantize import tensors

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCAB = 128, 192, 2, 4, 2, 258
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_llama(
    folder: Path,
    seed: int = 0,
    biases: bool = False,
    kind: str = "llama",
    tied: bool = True,
    layers: int = LAYERS,
    **more: Any,
) -> Path:
    """A Llama of 0.3 million weights; with `biases`, on the attention's layers. `kind` "qwen2" has biases on q, k and v,
    "qwen3" norms of its heads; `more` goes into config.json."""
    folder.mkdir(parents=True)
    chance = np.random.Generator(np.random.Philox(key=seed))
    shapes = _shapes(biases, kind, tied, layers)
    values = [_value(name, shape, chance) for name, shape in shapes.items()]
    tensors.write(folder / "model.safetensors", {n: ("F32", s) for n, s in shapes.items()}, values)
    config = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "attention_bias": biases,
        "bos_token_id": VOCAB - 1,
        "eos_token_id": VOCAB - 1,
    } | more
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer(folder)
    return folder


def _shapes(biases: bool, kind: str, tied: bool, layers: int) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        if kind == "qwen3":
            shapes |= {f"{attention}.{name}.weight": (HIDDEN // HEADS,) for name in ("q_norm", "k_norm")}
        for name, rows in (("q_proj", HIDDEN), ("k_proj", kv), ("v_proj", kv), ("o_proj", HIDDEN)):
            shapes[f"{attention}.{name}.weight"] = (rows, HIDDEN)
            if biases or (kind == "qwen2" and name != "o_proj"):
                shapes[f"{attention}.{name}.bias"] = (rows,)
        shapes[f"{mlp}.gate_proj.weight"] = shapes[f"{mlp}.up_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{mlp}.down_proj.weight"] = (HIDDEN, INNER)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes | {"model.norm.weight": (HIDDEN,)}


def _value(name: str, shape: tuple[int, ...], chance: np.random.Generator) -> np.ndarray:
    if "norm" in name:
        return np.ones(shape, np.float32)
    return chance.standard_normal(shape, np.float32) * np.float32(0.08)


def _tokenizer(folder: Path) -> None:
    alphabet = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    bpe = Tokenizer(BPE(vocab=alphabet, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    bpe.add_special_tokens(["<|pad|>", "<|end|>"])
    bpe.save(str(folder / "tokenizer.json"))
    table = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
