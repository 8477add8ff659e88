"""The onnx engine: forward passes of a 4-bit base under onnxruntime, for zeroth-order tuning. No torch on the device.

A device needs onnxruntime, numpy and tokenizers. The base's weights are mapped from its file; adapters are an input.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client.adapters import Adapter
from edge_client.data import Example
from edge_client.engines import IGNORE, Tokens, onnx_graph, unit
from edge_client.engines.kept import KEPT_BYTES, Kept
from edge_client.engines.memory import give_back
from edge_client.engines.onnx_graph import Shape
from edge_client.engines.text import Text
from quantize import QuantizedBase
from wire.delta import Layout, Vector
from wire.errors import BaseModelError, MachineError, SpecError

MIB = 1 << 20
TOKENS_AT_ONCE = 128
"""Tokens of one pass through the body: longer batches go through in parts."""
ROWS_AT_ONCE = 32
"""Rows of logits in memory at once: 6 MB each copy at a vocabulary of 49,152."""
RUNTIME_BYTES = 130 * MIB
"""A process that has imported onnxruntime, numpy, tokenizers and grpc, with the tokenizer loaded."""


class OnnxEngine:
    """One model in memory, on the CPU. All arithmetic is float32, from the base's 4-bit and 8-bit codes."""

    gradients = False
    cuts = False

    def __init__(self, base: QuantizedBase, adapter: Adapter, layout: Layout, threads: int, kept_bytes: int) -> None:
        self.layout = layout
        self._base, self._threads = base, threads
        self._config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
        self._shape = Shape.of(self._config)
        self._adapter = adapter
        self._kept: Kept[Vector] = Kept(kept_bytes)
        self.text = Text(base.folder)
        self._vector = np.zeros(layout.size, np.float32)
        self._table = base.parts("model.embed_tokens.weight")
        placement = adapter.placement(base)
        if placement.prefix is not None:
            raise SpecError("--engine onnx puts no keys and values before a text; use --engine torch, or tune a prompt")
        if placement.entries:
            raise SpecError("--engine onnx tunes no single entries of weights; use --engine torch, or tune lora")
        self._prompt = placement.prompt
        first = self._shape.layers if placement.lowest is None else placement.lowest
        base.give_back()
        self._below = self._session(onnx_graph.below(base, self._shape, first)) if first else None
        self._body = self._session(onnx_graph.body(base, self._shape, placement, layout, False, first))
        self._head = self._session(onnx_graph.head(base, self._shape))
        self._generator: Any = None
        base.give_back()
        give_back()

    @classmethod
    def load(
        cls,
        base: Any,
        adapter: Adapter,
        layout: Layout,
        max_memory: int | None = None,
        threads: int | None = None,
    ) -> OnnxEngine:
        """Raises BaseModelError for a base of another format, MachineError if `max_memory` bytes are too few."""
        if base.scheme("model.embed_tokens.weight") != "q8":
            raise BaseModelError(
                f"--engine onnx computes on bases of the format int4-onnx, this one is {base.format}; make one with"
                " `edgetune quantize MODEL --format int4-onnx`"
            )
        expected = expected_memory(base, layout.size)
        if max_memory is not None and expected > max_memory:
            raise MachineError(
                f"--max-memory {max_memory / MIB:.0f}M is too little for this base: {expected / MIB:.0f}M is the least"
            )
        return cls(
            base, adapter, layout, threads or cores(), KEPT_BYTES if max_memory is None else max_memory - expected
        )

    @classmethod
    def missing(cls) -> str | None:
        needed = ("onnxruntime", "tokenizers", "jinja2")
        return next((name for name in needed if importlib.util.find_spec(name) is None), None)

    def tokenize(self, examples: Sequence[Example], length: int) -> list[Tokens]:
        return self.text.sequences(examples, length)

    def write(self, vector: Vector) -> None:
        self._vector = vector.astype(np.float32, copy=True)

    def loss(self, sequences: Sequence[Tokens]) -> tuple[float, int]:
        total, count = self._summed(sequences, self._vector[None])
        return float(total[0]), count

    def features(self, sequences: Sequence[Tokens]) -> Vector:
        """Of the base alone, by a graph of its own that is let go again: until then it takes as much memory as the body."""
        graph = self._session(onnx_graph.means(self._base, self._shape))
        found = []
        for sequence in sequences:
            entering = self._embedded(sequence.ids[None].astype(np.int64))
            (means,) = graph.run(["means"], self._frame(entering, 1, 0))
            found.append(unit(np.concatenate([entering.mean(axis=1), means[0]])))
        del graph
        give_back()
        return np.stack(found)

    def losses(self, batch: Sequence[Tokens], adapters: Sequence[Vector]) -> npt.NDArray[np.float64]:
        """Adapters go through together while their tokens fit one pass: that saves a tenth of the time, no more."""
        tokens = len(batch) * max(len(s.ids) for s in batch)
        together = max(1, TOKENS_AT_ONCE // (2 * tokens))
        parts = []
        for at in range(0, len(adapters), together):
            total, count = self._summed(batch, np.stack(adapters[at : at + together]))
            parts.append(total / count)
        return np.concatenate(parts)

    def generate(self, prompt: str, max_new_tokens: int, temperature: float, seed: int, raw: bool) -> str:
        """The answer to `prompt`; with `raw`, its continuation. Temperature 0 takes the likeliest token each time."""
        if self._generator is None:
            self._generator = self._session(self._generating())
        chance = np.random.Generator(np.random.Philox(key=seed))
        given, answer = self.text.prompt(prompt, raw), list[int]()
        past = self._empty_past()
        seen = 0
        while len(answer) < max_new_tokens:
            logits, past, seen = self._continued(given, seen, past)
            token = drawn(logits, temperature, chance)
            if token == self.text.end:
                break
            answer.append(token)
            given = [token]
        return self.text.decoded(answer)

    def _generating(self) -> bytes:
        placement = self._adapter.placement(self._base)
        self._base.give_back()
        return onnx_graph.body(self._base, self._shape, placement, self.layout, cached=True)

    def _continued(self, given: list[int], seen: int, past: dict[str, Any]) -> tuple[Vector, dict[str, Any], int]:
        """Logits after `given` tokens, before which `seen` others came; the keys and values of all, and how many they are."""
        entering = self._embedded(np.array([given], np.int64))
        entering = entering if seen else self._after_prompts(entering, self._vector[None])
        feeds = self._feeds(entering, self._vector[None], np.array([entering.shape[1] - 1], np.int64), seen) | past
        names = [f"present_{part}_{n}" for n in range(self._shape.layers) for part in ("key", "value")]
        rows, *present = self._generator.run(["rows", *names], feeds)
        (logits,) = self._head.run(["logits"], {"rows": rows, "targets": np.zeros((1, 1), np.int64)})
        kept = {name.replace("present", "past"): value for name, value in zip(names, present, strict=True)}
        return logits[0], kept, seen + entering.shape[1]

    def _empty_past(self) -> dict[str, Any]:
        empty = np.zeros((1, self._shape.kv_heads, 0, self._shape.head), np.float32)
        return {f"past_{part}_{n}": empty for n in range(self._shape.layers) for part in ("key", "value")}

    def _summed(self, sequences: Sequence[Tokens], adapters: Vector) -> tuple[npt.NDArray[np.float64], int]:
        """Negative log-likelihood of all targets under each of `adapters` [K, P], float64 [K], and how many they are."""
        total, count = np.zeros(len(adapters)), 0
        for some in _within(sequences, TOKENS_AT_ONCE // len(adapters)):
            ids, wanted = _padded(some)
            entering = self._after_prompts(np.tile(self._entering(some, ids), (len(adapters), 1, 1)), adapters)
            wanted = np.pad(wanted, ((0, 0), (entering.shape[1] - ids.shape[1], 0)), constant_values=IGNORE)
            where = np.flatnonzero(wanted != IGNORE)
            every = np.concatenate([where + k * wanted.size for k in range(len(adapters))])
            (rows,) = self._body.run(["rows"], self._feeds(entering, adapters, every, 0))
            targets = np.tile(wanted.reshape(-1)[where], len(adapters))
            total += self._nll(rows, targets).reshape(len(adapters), -1).sum(axis=1, dtype=np.float64)
            count += len(where)
        return total, count

    def _entering(self, some: Sequence[Tokens], ids: npt.NDArray[np.int64]) -> Vector:
        """What enters the first tuned layer, float32 [B, T, D]. No adapter changes it, so it is computed once a sequence."""
        if self._below is None:
            return self._embedded(ids)
        held = [self._kept.get(sequence) for sequence in some]
        if all(hidden is not None for hidden in held):
            return _stacked([hidden for hidden in held if hidden is not None], ids.shape[1])
        (found,) = self._below.run(["hidden"], self._frame(self._embedded(ids), 1, 0))
        for sequence, hidden in zip(some, found, strict=True):
            self._kept.put(sequence, hidden[: len(sequence.ids)].copy())
        entering: Vector = found
        return entering

    def _after_prompts(self, entering: Vector, adapters: Vector) -> Vector:
        """[K · B, T, D] with each adapter's soft prompt before its B texts, where it has one."""
        if self._prompt is None:
            return entering
        prompts = np.stack([self._prompt.rows(adapter) for adapter in adapters])
        return np.concatenate([np.repeat(prompts, len(entering) // len(adapters), axis=0), entering], axis=1)

    def _nll(self, rows: Vector, targets: npt.NDArray[np.int64]) -> Vector:
        parts = []
        for at in range(0, len(rows), ROWS_AT_ONCE):
            some = slice(at, at + ROWS_AT_ONCE)
            (nll,) = self._head.run(["nll"], {"rows": rows[some], "targets": targets[some, None]})
            parts.append(nll[:, 0])
        return np.concatenate(parts)

    def _feeds(self, entering: Vector, adapters: Vector, where: npt.NDArray[np.int64], seen: int) -> dict[str, Any]:
        return self._frame(entering, len(adapters), seen) | {"adapter": adapters, "where": where}

    def _frame(self, entering: Vector, copies: int, seen: int) -> dict[str, Any]:
        """What every graph of layers is given: [copies · B, T, D], after `seen` tokens."""
        rows, length, _ = entering.shape
        cos, sin = self._rotation(seen + length)
        return {
            "entering": entering,
            "by_adapter": np.array([copies, rows // copies * length, -1], np.int64),
            "by_sequence": np.array([rows, length, -1], np.int64),
            "lengths": np.full(rows, seen + length - 1, np.int32),
            "total": np.array(seen + length, np.int32),
            "cos": cos,
            "sin": sin,
        }

    def _embedded(self, ids: npt.NDArray[np.int64]) -> Vector:
        codes = self._table[".codes"][ids].astype(np.float32) - np.float32(128)
        values: Vector = codes * self._table[".scales"][ids][..., None]
        return values.reshape(*ids.shape, -1)

    def _rotation(self, length: int) -> tuple[Vector, Vector]:
        """cos and sin of each position and frequency, float32 [length, head / 2]."""
        angles = np.outer(np.arange(length), frequencies(self._config, self._shape.head))
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def _session(self, graph: bytes) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # the arena keeps the largest pass for ever
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._base.folder))
        try:
            return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            last = str(error).strip().splitlines()[-1]
            raise MachineError(f"onnxruntime {onnxruntime.__version__} cannot compute this model: {last}") from error


def expected_memory(base: QuantizedBase, adapter_size: int) -> int:
    """Bytes of the whole process: the base's file, the packed copy that onnxruntime makes of it, one pass, the adapter."""
    return RUNTIME_BYTES + int(1.6 * base.bytes_on_disk) + 40 * MIB + 8 * adapter_size * 4


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def frequencies(config: Mapping[str, Any], head: int) -> npt.NDArray[np.float64]:
    """Rotary frequencies [head / 2]. Raises BaseModelError for a kind of scaling that is not known here."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    plain: npt.NDArray[np.float64] = theta ** (-np.arange(0, head, 2) / head)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / float(settings["factor"])
    if kind == "llama3":
        return _llama3(plain, settings)
    raise BaseModelError(f"--engine onnx knows no rotary scaling {kind!r}; use --engine torch")


def _llama3(plain: npt.NDArray[np.float64], settings: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Long waves are stretched by the factor, short ones kept, those between blended: Llama 3.1's rule."""
    length, factor = float(settings["original_max_position_embeddings"]), float(settings["factor"])
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    waves = length / (2 * math.pi / plain)
    smooth = np.clip((waves - low) / (high - low), 0.0, 1.0)
    blended: npt.NDArray[np.float64] = (1 - smooth) * plain / factor + smooth * plain
    return blended


def drawn(logits: Vector, temperature: float, chance: np.random.Generator) -> int:
    """A token by its logits [V]; temperature 0 takes the likeliest."""
    if temperature <= 0:
        return int(logits.argmax())
    raised = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return int(chance.choice(len(logits), p=raised / raised.sum()))


def _padded(some: Sequence[Tokens]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids [B, T] and what each position should predict, int64 [B, T] with IGNORE for nothing. Padding is at the end,
    where no earlier position looks."""
    length = max(len(s.ids) for s in some)
    ids = np.zeros((len(some), length), np.int64)
    wanted = np.full((len(some), length), IGNORE, np.int64)
    for row, sequence in enumerate(some):
        ids[row, : len(sequence.ids)] = sequence.ids
        wanted[row, : len(sequence.ids) - 1] = sequence.labels[1:]
    return ids, wanted


def _stacked(hidden: list[Vector], length: int) -> Vector:
    """[T, D] each to [B, `length`, D], zeros behind the shorter ones."""
    whole = np.zeros((len(hidden), length, hidden[0].shape[1]), np.float32)
    for row, one in enumerate(hidden):
        whole[row, : len(one)] = one
    return whole


def _within(sequences: Sequence[Tokens], tokens: int) -> Iterator[Sequence[Tokens]]:
    """`sequences` in parts of at most `tokens` padded tokens, and of at least one sequence."""
    part: list[Tokens] = []
    for sequence in sequences:
        longest = max(len(s.ids) for s in [*part, sequence])
        if part and longest * (len(part) + 1) > tokens:
            yield part
            part = []
        part.append(sequence)
    if part:
        yield part
