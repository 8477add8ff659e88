"""GGUF files of the Llama architecture as a float source: names, row order and tokenizer put back as Hugging Face has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantize.errors import QuantizeError
from quantize.formats import Blocks
from quantize.sources import file_digest

Array = npt.NDArray[Any]
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3
"""The token type that GGUF gives to special tokens."""


class GgufSource:
    """One .gguf file. Raises QuantizeError for another architecture, or a tensor whose name is not known."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise QuantizeError("gguf is not installed: pip install 'edgetune[client]'") from error
        try:
            reader = GGUFReader(path)
            self._keys = {key: field.contents() for key, field in reader.fields.items()}
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise QuantizeError(f"{path}: not a GGUF file, or damaged: {error}") from error
        if (found := self._keys.get("general.architecture")) != "llama":
            raise QuantizeError(
                f"{path}: architecture {found!r}; only 'llama' is read from GGUF, use a Hugging Face folder"
            )
        self._tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
        self.digest = file_digest(path)

    def config(self) -> dict[str, Any]:
        head, ids = self._llama, self._ids()
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": len(self._keys["tokenizer.ggml.tokens"]),
            "hidden_size": head("embedding_length"),
            "num_hidden_layers": head("block_count"),
            "intermediate_size": head("feed_forward_length"),
            "num_attention_heads": head("attention.head_count"),
            "num_key_value_heads": head("attention.head_count_kv"),
            "max_position_embeddings": head("context_length"),
            # stored as float32: the shortest decimal that rounds to it is what was meant
            "rms_norm_eps": float(str(np.float32(head("attention.layer_norm_rms_epsilon")))),
            "rope_theta": float(head("rope.freq_base")),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            **ids,
        }

    def side_files(self) -> dict[str, bytes]:
        tokens = self._keys["tokenizer.ggml.tokens"]
        named = {key.replace("_id", ""): tokens[number] for key, number in self._ids().items() if number is not None}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._llama("context_length"),
            "chat_template": self._keys.get("tokenizer.chat_template"),
            **named,
        }
        return {
            "tokenizer.json": self._tokenizer().encode(),
            "tokenizer_config.json": json.dumps(config, indent=1).encode(),
            "generation_config.json": json.dumps(self._ids()).encode(),
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Array:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        return self._ordered(name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))

    def blocks(self, name: str) -> Blocks | None:
        tensor = self._tensors[name]
        reader = _BLOCKS.get(tensor.tensor_type.name)
        if reader is None or len(tensor.shape) != 2:
            return None
        return reader(self._ordered(name, np.asarray(tensor.data).reshape(int(tensor.shape[1]), -1)))

    def _ordered(self, name: str, rows: Array) -> Array:
        """Rows as Hugging Face has them; a row of blocks moves whole."""
        if name.endswith("q_proj.weight"):
            return _halves(rows, self._llama("attention.head_count"))
        if name.endswith("k_proj.weight"):
            return _halves(rows, self._llama("attention.head_count_kv"))
        return rows

    def _llama(self, key: str) -> Any:
        return self._keys[f"llama.{key}"]

    def _ids(self) -> dict[str, int | None]:
        names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        return {key: self._keys.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}

    def _tokenizer(self) -> str:
        if self._keys.get("tokenizer.ggml.model") != "gpt2" or self._keys.get("tokenizer.ggml.pre") != "smollm":
            raise QuantizeError("this GGUF's tokenizer is not known here; use the model's Hugging Face folder")
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens, kinds = self._keys["tokenizer.ggml.tokens"], self._keys["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in self._keys["tokenizer.ggml.merges"]]
        made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        # Digits one by one: part of `smollm` pre-tokenization that readers of GGUF commonly forget
        digits = pre_tokenizers.Digits(individual_digits=True)
        made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        made.decoder = decoders.ByteLevel()
        special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
        made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        return str(made.to_str())


def _name(gguf_name: str) -> str:
    """Hugging Face's name of a tensor.

    >>> _name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    if gguf_name in TOP:
        return TOP[gguf_name]
    parts = gguf_name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in LAYER:
        raise QuantizeError(f"tensor {gguf_name!r} of this GGUF is not known here; use the model's Hugging Face folder")
    return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"


def _halves(rows: Array, heads: int) -> Array:
    """GGUF keeps the rows of q and k in pairs for its rotary embedding; Hugging Face wants each head's two halves."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _halfs(raw: Array) -> Array:
    """Half-precision numbers from bytes [..., 2]."""
    numbers: Array = np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float32)
    return numbers


def _nibbles(raw: Array) -> Array:
    """[..., 16] bytes to [..., 32] codes: GGUF keeps the first half of a block in the low halves of its bytes."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _q4_1(rows: Array) -> Blocks:
    """20 bytes a block: scale d, minimum m, 32 codes; weight = d · q + m."""
    raw = rows.reshape(len(rows), -1, 20)
    scales, low = _halfs(raw[..., 0:2]), _halfs(raw[..., 2:4])
    return Blocks(4, _nibbles(raw[..., 4:]), scales, low + 8 * scales)


def _q4_0(rows: Array) -> Blocks:
    """18 bytes a block: scale d, 32 codes; weight = d · (q - 8)."""
    raw = rows.reshape(len(rows), -1, 18)
    scales = _halfs(raw[..., 0:2])
    return Blocks(4, _nibbles(raw[..., 2:]), scales, np.zeros_like(scales))


def _q8_0(rows: Array) -> Blocks:
    """34 bytes a block: scale d, 32 signed codes; weight = d · q."""
    raw = rows.reshape(len(rows), -1, 34)
    scales = _halfs(raw[..., 0:2])
    return Blocks(8, raw[..., 2:] ^ np.uint8(128), scales, np.zeros_like(scales))


_BLOCKS = {"Q4_1": _q4_1, "Q4_0": _q4_0, "Q8_0": _q8_0}
