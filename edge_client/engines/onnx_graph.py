"""The graphs of the onnx engine: a Llama-family body whose adapters are an input, and a head that gives losses.

Body: embedded tokens and `adapter` [K, P] in, the normed hidden states of the wanted rows out; K adapters are K batches
over one set of frozen weights. Head: some of these rows and their targets in, negative log-likelihoods out; it is run on
few rows at a time, so that the logits of a whole batch never exist.

A 4-bit weight is scale · (code - 8) + offset in blocks of 32, so a product is a symmetric MatMulNBits plus the block sums
of x times the offsets, a product of 1/32 of the size: exact in float32, where float zero points would leave the fast kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_client.adapters import Bottleneck, LowRank, Placement
from edge_client.engines.onnx_file import CONTRIB, External, Graph
from quantize import QuantizedBase
from wire.delta import Layout
from wire.errors import BaseModelError

BLOCK = 32
MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral")
EXACT, FAST = 1, 4
"""accuracy_level of MatMulNBits: float32 activations, or activations rounded to 8 bits."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What of config.json the graph needs."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    epsilon: float
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Raises BaseModelError for an architecture this engine cannot compute."""
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise BaseModelError(f"--engine onnx computes {', '.join(MODEL_TYPES)}, not {kind!r}; use --engine torch")
        if config.get("hidden_act", "silu") != "silu":
            raise BaseModelError(f"--engine onnx knows no activation {config['hidden_act']!r}; use --engine torch")
        if config.get("use_sliding_window") or (kind == "mistral" and config.get("sliding_window")):
            raise BaseModelError("--engine onnx computes no sliding window; use --engine torch")
        heads = int(config["num_attention_heads"])
        return cls(
            hidden=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocabulary=int(config["vocab_size"]),
            epsilon=float(config["rms_norm_eps"]),
            tied=bool(config.get("tie_word_embeddings")),
        )


def body(
    base: QuantizedBase, shape: Shape, placement: Placement, layout: Layout, cached: bool, first: int = 0
) -> bytes:
    """The model from what enters layer `first` to normed rows. With `cached` it reads and writes keys and values, to
    generate."""
    return _Body(base, shape, placement, cached).above(layout, first)


def below(base: QuantizedBase, shape: Shape, first: int) -> bytes:
    """The layers before `first`, where nothing is tuned: embeddings to the hidden states that enter layer `first`."""
    return _Body(base, shape, Placement(), False).below(first)


def means(base: QuantizedBase, shape: Shape) -> bytes:
    """The base alone: embeddings of one sequence to the mean over its tokens of what leaves each layer, the last one's normed."""
    return _Body(base, shape, Placement(), False).means()


def head(base: QuantizedBase, shape: Shape) -> bytes:
    """Rows [N, D] and targets [N] in; `nll` [N] and `logits` [N, V] out."""
    graph = Graph("head")
    rows, targets = graph.input("rows", "float32", ["N", shape.hidden]), graph.input("targets", "int64", ["N", 1])
    name = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    logits = _two_term(graph, base, name, rows, shape)
    graph.rename(logits, "logits")
    total = graph.add("ReduceLogSumExp", [logits, graph.constant(np.array([1], np.int64))], keepdims=1)
    nll = graph.add("Sub", [total, graph.add("GatherElements", [logits, targets], axis=1)])
    graph.rename(nll, "nll")
    graph.output("nll", "float32", ["N", 1])
    graph.output("logits", "float32", ["N", shape.vocabulary])
    return graph.model()


def _two_term(graph: Graph, base: QuantizedBase, name: str, rows: str, shape: Shape) -> str:
    """Logits by the 8-bit kernel, which rounds activations to 8 bits a block: what the first pass rounds off goes through
    a second one. Two fast products are exact to 1e-5; the exact kernel unpacks the whole head for every call."""
    blocks = graph.constant(np.array([0, shape.hidden // BLOCK, BLOCK], np.int64))
    flat = graph.constant(np.array([0, shape.hidden], np.int64))
    cut = graph.add("Reshape", [rows, blocks])
    peak = graph.add("ReduceMax", [graph.add("Abs", [cut]), graph.constant(np.array([2], np.int64))], keepdims=1)
    step = graph.add("Max", [graph.add("Mul", [peak, _float(graph, 1 / 127)]), _float(graph, 1e-30)])
    coarse = graph.add("Mul", [graph.add("Round", [graph.add("Div", [cut, step])]), step])
    rest = graph.add("Sub", [cut, coarse])
    codes, scales = _external(graph, base, name, ".codes"), _external(graph, base, name, ".scales")
    sizes = {"K": shape.hidden, "N": shape.vocabulary, "bits": 8, "block_size": BLOCK, "accuracy_level": FAST}
    products = [
        graph.add("MatMulNBits", [graph.add("Reshape", [term, flat]), codes, scales], CONTRIB, **sizes)
        for term in (coarse, rest)
    ]
    return graph.add("Add", products)


def _float(graph: Graph, value: float) -> str:
    return graph.constant(np.array(value, np.float32))


def _external(graph: Graph, base: QuantizedBase, name: str, suffix: str) -> str:
    file, offset, array = base.place(name + suffix)
    where = External(file, offset, array.nbytes, str(array.dtype), array.shape)
    return graph.external(name + suffix, where)


class _Body:
    """Writes the body, layer by layer. Hidden states are [K, M, D] with M = sequences · tokens, and [K·B, T, ·] in attention."""

    def __init__(self, base: QuantizedBase, shape: Shape, placement: Placement, cached: bool) -> None:
        self._base, self._shape, self._placement, self._cached = base, shape, placement, cached
        self._graph = g = Graph("body")
        self._names = set(base.names())
        self._by_adapter = g.input("by_adapter", "int64", [3])
        self._by_sequence = g.input("by_sequence", "int64", [3])
        self._lengths = g.input("lengths", "int32", ["S"])
        self._total = g.input("total", "int32", [])
        self._cos = g.input("cos", "float32", ["C", shape.head // 2])
        self._sin = g.input("sin", "float32", ["C", shape.head // 2])
        self._parts: dict[int, str] = {}

    def below(self, first: int) -> bytes:
        hidden = self._layers(range(first))
        self._graph.rename(self._graph.add("Reshape", [hidden, self._by_sequence]), "hidden")
        self._graph.output("hidden", "float32", ["S", "T", self._shape.hidden])
        return self._graph.model()

    def means(self) -> bytes:
        g, found = self._graph, []
        hidden = self._entering()
        for number in range(self._shape.layers):
            hidden = self._layer(number, hidden)
            shown = hidden if number + 1 < self._shape.layers else self._norm("model.norm", hidden)
            rows = g.add("Reshape", [shown, self._by_sequence])
            found.append(g.add("ReduceMean", [rows, g.constant(np.array([1], np.int64))], keepdims=1))
        g.rename(g.add("Concat", found, axis=1), "means")
        g.output("means", "float32", ["S", self._shape.layers, self._shape.hidden])
        return g.model()

    def above(self, layout: Layout, first: int) -> bytes:
        g = self._graph
        self._parts = self._split(g.input("adapter", "float32", ["K", layout.size]), layout)
        hidden = self._layers(range(first, self._shape.layers))
        normed = self._norm("model.norm", hidden)
        flat = g.add("Reshape", [normed, g.constant(np.array([-1, self._shape.hidden], np.int64))])
        rows = g.add("Gather", [flat, g.input("where", "int64", ["N"])], axis=0)
        g.rename(rows, "rows")
        g.output("rows", "float32", ["N", self._shape.hidden])
        return g.model()

    def _layers(self, numbers: range) -> str:
        hidden = self._entering()
        for number in numbers:
            hidden = self._layer(number, hidden)
        return hidden

    def _entering(self) -> str:
        entering = self._graph.input("entering", "float32", ["S", "T", self._shape.hidden])
        return self._graph.add("Reshape", [entering, self._by_adapter])

    def _split(self, adapter: str, layout: Layout) -> dict[int, str]:
        """The adapter's tensors by where they start in the flat vector, each [K, *shape]."""
        g = self._graph
        sizes = g.constant(np.array([tensor.size for tensor in layout.tensors], np.int64))
        pieces = g.split("Split", [adapter, sizes], len(layout.tensors), axis=1)
        found = {}
        for (tensor, place), piece in zip(layout.slices(), pieces, strict=True):
            shape = tensor.shape if len(tensor.shape) == 2 else (1, *tensor.shape)
            found[place.start] = g.add("Reshape", [piece, g.constant(np.array([-1, *shape], np.int64))])
        return found

    def _layer(self, number: int, hidden: str) -> str:
        g, path = self._graph, f"model.layers.{number}"
        hidden = g.add("Add", [hidden, self._attention(number, self._norm(f"{path}.input_layernorm", hidden))])
        normed = self._norm(f"{path}.post_attention_layernorm", hidden)
        gate, up = self._linear(f"{path}.mlp.gate_proj", normed), self._linear(f"{path}.mlp.up_proj", normed)
        inner = g.add("Mul", [g.add("Mul", [gate, g.add("Sigmoid", [gate])]), up])
        return g.add("Add", [hidden, self._linear(f"{path}.mlp.down_proj", inner)])

    def _attention(self, number: int, normed: str) -> str:
        g, s, path = self._graph, self._shape, f"model.layers.{number}.self_attn"
        q = self._sequences(self._head_norm(f"{path}.q_norm", self._linear(f"{path}.q_proj", normed), s.heads))
        k = self._sequences(self._head_norm(f"{path}.k_norm", self._linear(f"{path}.k_proj", normed), s.kv_heads))
        v = self._sequences(self._linear(f"{path}.v_proj", normed))
        past = self._past(number)
        inputs = [q, k, v, *past, self._lengths, self._total, self._cos, self._sin]
        heads = {"num_heads": s.heads, "kv_num_heads": s.kv_heads, "do_rotary": 1, "scale": 1 / math.sqrt(s.head)}
        seen, *present = g.split("GroupQueryAttention", inputs, 3, CONTRIB, **heads)
        self._keep(number, present)
        return self._linear(f"{path}.o_proj", g.add("Reshape", [seen, self._by_adapter]))

    def _past(self, number: int) -> list[str]:
        if not self._cached:
            return ["", ""]
        shape: list[int | str] = ["S", self._shape.kv_heads, "P", self._shape.head]
        return [self._graph.input(f"past_{part}_{number}", "float32", shape) for part in ("key", "value")]

    def _keep(self, number: int, present: list[str]) -> None:
        if self._cached:
            for part, name in zip(("key", "value"), present, strict=True):
                self._graph.rename(name, f"present_{part}_{number}")
                shape: list[int | str] = ["S", self._shape.kv_heads, "Q", self._shape.head]
                self._graph.output(f"present_{part}_{number}", "float32", shape)

    def _sequences(self, x: str) -> str:
        return self._graph.add("Reshape", [x, self._by_sequence])

    def _head_norm(self, module: str, x: str, heads: int) -> str:
        """Qwen3's norm of each head; the identity where a model has none."""
        if f"{module}.weight" not in self._names:
            return x
        g = self._graph
        split = g.add("Reshape", [x, g.constant(np.array([0, 0, heads, self._shape.head], np.int64))])
        normed = self._gained(module, self._scaled(module, split), 4)
        return g.add("Reshape", [normed, self._by_adapter])

    def _norm(self, module: str, x: str) -> str:
        return self._gained(module, self._scaled(module, x), 3)

    def _scaled(self, module: str, x: str) -> str:
        gain = _external(self._graph, self._base, f"{module}.weight", "")
        return self._graph.add("SimplifiedLayerNormalization", [x, gain], axis=-1, epsilon=self._shape.epsilon)

    def _gained(self, module: str, x: str, dimensions: int) -> str:
        """x · (1 + tuned), where this norm is tuned."""
        place = self._placement.gains.get(module)
        if place is None:
            return x
        g, tuned = self._graph, self._parts[place.start]
        if dimensions == 4:
            tuned = g.add("Unsqueeze", [tuned, g.constant(np.array([1], np.int64))])
        return g.add("Add", [x, g.add("Mul", [x, tuned])])

    def _linear(self, module: str, x: str) -> str:
        g = self._graph
        y = self._frozen(f"{module}.weight", x)
        if f"{module}.bias" in self._names:
            y = g.add("Add", [y, _external(g, self._base, f"{module}.bias", "")])
        if (bias := self._placement.biases.get(module)) is not None:
            y = g.add("Add", [y, self._parts[bias.start]])
        for term in self._placement.linears.get(module, ()):
            y = g.add("Add", [y, self._low_rank(term, x)])
        following = self._placement.bottlenecks.get(module)
        return y if following is None else g.add("Add", [y, self._bottleneck(following, y)])

    def _bottleneck(self, part: Bottleneck, y: str) -> str:
        g = self._graph
        inner = g.add("Gelu", [g.add("MatMul", [y, self._transposed(part.down)])])
        return g.add("MatMul", [inner, self._transposed(part.up)])

    def _low_rank(self, tuned: LowRank, x: str) -> str:
        g = self._graph
        h = g.add("MatMul", [x, self._transposed(tuned.a)])
        if tuned.core is not None:
            h = g.add("MatMul", [h, self._transposed(tuned.core)])
        h = g.add("Mul", [h, _float(g, tuned.scale)])
        return g.add("MatMul", [h, self._transposed(tuned.b)])

    def _transposed(self, part: Any) -> str:
        """A tuned part as [K, columns, rows], a fixed one as [columns, rows]."""
        if isinstance(part, slice):
            return self._graph.add_transposed(self._parts[part.start])
        return self._graph.constant(np.ascontiguousarray(part.T))

    def _frozen(self, name: str, x: str) -> str:
        """x times a frozen weight: 4-bit blocks, or float32 where a base keeps it."""
        g, (rows, columns) = self._graph, self._base.shape(name)
        if self._base.scheme(name) != "q4":
            raise BaseModelError(
                f"--engine onnx computes on bases made with --format int4-onnx, this one is {self._base.format}"
            )
        sizes = {"K": columns, "N": rows, "bits": 4, "block_size": BLOCK, "accuracy_level": EXACT}
        codes, scales = _external(g, self._base, name, ".codes"), _external(g, self._base, name, ".scales")
        product = g.add("MatMulNBits", [x, codes, scales], CONTRIB, **sizes)
        cut = g.add("Reshape", [x, g.constant(np.array([0, 0, columns // BLOCK, BLOCK], np.int64))])
        sums = g.add("ReduceSum", [cut, g.constant(np.array([3], np.int64))], keepdims=0)
        return g.add("Add", [product, g.add("MatMul", [sums, _external(g, self._base, name, ".offsets")])])
