"""The onnx engine computes the same function as torch from the same codes, on every architecture and adapter it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edge_client.adapters import ADAPTERS, Adapter, whole_layout
from edge_client.data import Example, Message
from edge_client.engines import Tokens, onnx_graph
from edge_client.engines.kept import Kept
from edge_client.engines.onnx_engine import OnnxEngine, expected_memory
from edge_client.engines.torch_engine import TorchEngine
from quantize import QuantizedBase, QuantizeError
from quantize.base_model import build
from tests.models import tiny_llama
from wire import spec
from wire.errors import BaseModelError, MachineError

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases-untied": {"biases": True, "tied": False},
    "llama3-rotary": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qwen2": {"kind": "qwen2"},
    "qwen3": {"kind": "qwen3"},
}  # fmt: skip
TABLES: dict[str, dict[str, Any]] = {
    "lora": {"id": "lora", "rank": 4},
    "lora-b": {"id": "lora", "rank": 4, "tuned": "B", "targets": ["q_proj", "down_proj"]},
    "lora-terms": {"id": "lora", "rank": 4, "history": 2, "keeps": "pair", "start": "leading"},
    "lora_sb": {"id": "lora_sb", "rank": 4},
    "bottleneck": {"id": "bottleneck", "width": 4},
    "prompt": {"id": "prompt", "length": 5},
    "projected_prompt": {"id": "projected_prompt", "length": 3, "dimensions": 10},
    "norms": {"id": "norms"},
    "norms-last": {"id": "norms", "layers": 1},
}
EXAMPLES = [
    Example(text="The quick brown fox jumps over the lazy dog. " * 3),
    Example(messages=(Message("user", "Hi"), Message("assistant", "Yes."))),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, QuantizedBase]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: build(str(tiny_llama(folder / f"{name}-float", **more)), "int4-onnx", folder / name)
        for name, more in MODELS.items()
    }


def moved(adapter: Adapter, base: QuantizedBase) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    layout = whole_layout(adapter, base)
    chance = np.random.Generator(np.random.Philox(key=3))
    start = adapter.initial(layout, 5, base)
    return [start + np.float32(0.05 * k) * chance.standard_normal(layout.size).astype(np.float32) for k in range(3)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tuned", TABLES)
def test_both_engines_find_the_same_losses(bases: dict[str, QuantizedBase], model: str, tuned: str) -> None:
    adapter: Adapter = spec.build(ADAPTERS, TABLES[tuned])
    base = bases[model]
    layout = whole_layout(adapter, base)
    fast, slow = OnnxEngine.load(base, adapter, layout, threads=1), TorchEngine.load(base, adapter, layout)
    batch = fast.tokenize(EXAMPLES, 48)
    assert [t.ids.tolist() for t in batch] == [t.ids.tolist() for t in slow.tokenize(EXAMPLES, 48)]
    adapters = moved(adapter, base)
    found, wanted = fast.losses(batch, adapters), slow.losses(batch, adapters)
    assert np.abs(found - wanted).max() < 1e-3
    assert np.ptp(wanted) > 1e-3, "the adapter changes nothing: the test could not fail"


def test_both_engines_find_the_same_losses_under_tuned_biases(bases: dict[str, QuantizedBase]) -> None:
    adapter: Adapter = spec.build(ADAPTERS, {"id": "biases"})
    for base in (bases["llama-biases-untied"], bases["qwen2"]):
        layout = adapter.layout(base)
        fast, slow = OnnxEngine.load(base, adapter, layout, threads=1), TorchEngine.load(base, adapter, layout)
        batch, adapters = fast.tokenize(EXAMPLES, 48), moved(adapter, base)
        wanted = slow.losses(batch, adapters)
        assert np.abs(fast.losses(batch, adapters) - wanted).max() < 1e-3 < np.ptp(wanted)


def test_adapters_together_and_one_by_one_give_the_same(bases: dict[str, QuantizedBase]) -> None:
    adapter: Adapter = spec.build(ADAPTERS, TABLES["lora_sb"])
    base = bases["llama"]
    engine = OnnxEngine.load(base, adapter, adapter.layout(base), threads=1)
    batch = engine.tokenize(EXAMPLES, 24)
    adapters = moved(adapter, base)
    together = engine.losses(batch[:2], adapters)
    apart = [float(engine.losses(batch[:2], [one])[0]) for one in adapters]
    assert together == pytest.approx(apart, abs=1e-6)


def test_the_loss_of_a_sequence_does_not_depend_on_its_company(bases: dict[str, QuantizedBase]) -> None:
    adapter: Adapter = spec.build(ADAPTERS, TABLES["norms"])
    base = bases["qwen2"]
    engine = OnnxEngine.load(base, adapter, adapter.layout(base), threads=1)
    batch: list[Tokens] = engine.tokenize(EXAMPLES, 40)
    alone = sum(engine.loss([one])[0] for one in batch)
    assert engine.loss(batch)[0] == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("tuned", ["lora", "prompt"])
def test_the_answer_is_the_one_that_torch_gives(bases: dict[str, QuantizedBase], tuned: str) -> None:
    adapter: Adapter = spec.build(ADAPTERS, TABLES[tuned])
    base = bases["qwen3"]
    layout = adapter.layout(base)
    engines: list[Any] = [OnnxEngine.load(base, adapter, layout, threads=1), TorchEngine.load(base, adapter, layout)]
    for engine in engines:
        engine.write(moved(adapter, base)[1])
    answers = [engine.generate("Hello", 12, 0.0, 0, raw=False) for engine in engines]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("cached", [False, True])
def test_the_graphs_are_what_onnx_calls_well_formed(bases: dict[str, QuantizedBase], cached: bool) -> None:
    adapter: Adapter = spec.build(ADAPTERS, TABLES["lora"])
    base = bases["qwen3"]
    shape = onnx_graph.Shape.of({"model_type": "qwen3", **_config(base)})
    graph = onnx_graph.body(base, shape, adapter.placement(base), adapter.layout(base), cached)
    for content in (graph, onnx_graph.head(base, shape)):
        model = onnx.load_model_from_string(content)
        assert model.SerializeToString(deterministic=True)
        names = [name for node in model.graph.node for name in node.output]
        assert len(names) == len(set(names))


def _config(base: QuantizedBase) -> dict[str, Any]:
    import json

    table: dict[str, Any] = json.loads((base.folder / "config.json").read_text())
    return table


def test_another_architecture_another_format_and_too_little_memory_are_refused(
    bases: dict[str, QuantizedBase], tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match="not 'gemma'"):
        onnx_graph.Shape.of({"model_type": "gemma"})
    adapter: Adapter = spec.build(ADAPTERS, TABLES["norms"])
    other = build(str(tiny_llama(tmp_path / "float")), "nf4", tmp_path / "nf4")
    with pytest.raises(BaseModelError, match="int4-onnx"):
        OnnxEngine.load(other, adapter, adapter.layout(other))
    with pytest.raises(MachineError, match="is the least"):
        OnnxEngine.load(bases["llama"], adapter, adapter.layout(bases["llama"]), max_memory=1 << 20)


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    from quantize.formats import scheme_for

    with pytest.raises(QuantizeError, match="no whole blocks of 32"):
        scheme_for("model.layers.0.self_attn.q_proj.weight", (64, 40), "int4-onnx")


def test_the_engine_needs_no_torch(bases: dict[str, QuantizedBase]) -> None:
    """In a process where torch, transformers and peft cannot be imported."""
    line = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'onnx', 'bitsandbytes'): sys.modules[name] = None\n"
        "import quantize; from pathlib import Path\n"
        "from edge_client.adapters import ADAPTERS; from wire import spec\n"
        "from edge_client.engines.onnx_engine import OnnxEngine\n"
        "from edge_client.data import Example\n"
        f"base = quantize.open_base(Path({str(bases['llama'].folder)!r}))\n"
        "row = spec.build(ADAPTERS, {'id': 'norms'}); layout = row.layout(base)\n"
        "engine = OnnxEngine.load(base, row, layout, threads=1)\n"
        "print(engine.loss(engine.tokenize([Example(text='hello there')], 16))[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "11"), done.stderr


def test_the_gguf_blocks_of_a_source_are_taken_as_they_are() -> None:
    """Q4_1, Q4_0 and Q8_0 blocks against the dequantizer of the gguf package itself."""
    import gguf
    from gguf.quants import dequantize
    from gguf.quants import quantize as encode

    from quantize.formats import SCHEMES
    from quantize.gguf_source import _BLOCKS

    values = np.random.Generator(np.random.Philox(key=1)).standard_normal((6, 64)).astype(np.float32)
    for name, scheme in (("Q4_1", "q4"), ("Q4_0", "q4"), ("Q8_0", "q8")):
        kind = gguf.GGMLQuantizationType[name]
        raw = encode(values, kind)
        pack = SCHEMES[scheme].pack
        assert pack is not None
        found = SCHEMES[scheme].decode(pack(_BLOCKS[name](raw)), (6, 64))
        np.testing.assert_allclose(found, dequantize(raw, kind), rtol=1e-6, atol=1e-6)


LAST = {"id": "lora_sb", "rank": 4, "layers": 1}


def test_what_lies_below_the_adapter_is_computed_once_a_sequence(bases: dict[str, QuantizedBase]) -> None:
    adapter: Adapter = spec.build(ADAPTERS, LAST)
    layout = adapter.layout(bases["llama"])
    engine = OnnxEngine.load(bases["llama"], adapter, layout, threads=1)
    slow = TorchEngine.load(bases["llama"], adapter, layout)
    runs = _counted(engine)
    batch, adapters = engine.tokenize(EXAMPLES, 48), moved(adapter, bases["llama"])
    first = engine.losses(batch, adapters)
    once = len(runs)
    again = engine.losses(list(reversed(batch)), adapters)
    assert 0 < once == len(runs)
    assert np.abs(first - slow.losses(batch, adapters)).max() < 1e-3
    assert np.abs(first - again).max() < 1e-6


def test_hidden_states_are_kept_within_their_bytes(bases: dict[str, QuantizedBase]) -> None:
    adapter: Adapter = spec.build(ADAPTERS, LAST)
    layout = adapter.layout(bases["llama"])
    least = expected_memory(bases["llama"], layout.size)
    tight = OnnxEngine.load(bases["llama"], adapter, layout, max_memory=least, threads=1)
    runs = _counted(tight)
    batch = tight.tokenize(EXAMPLES, 48)
    found = [tight.losses(batch, moved(adapter, bases["llama"])) for _ in range(2)]
    assert len(runs) > len(batch) / 2 and np.array_equal(found[0], found[1])
    kept: Kept[Any] = Kept(100)
    some = [(tokens, np.zeros((3, 4), np.float32)) for tokens in batch[:3]]
    for tokens, hidden in some:
        kept.put(tokens, hidden)
    assert [kept.get(tokens) is not None for tokens, _ in some] == [False, True, True]
    kept.put(batch[0], np.zeros((30, 4), np.float32))
    assert kept.get(batch[0]) is None and kept.get(batch[1]) is not None


def _counted(engine: OnnxEngine) -> list[int]:
    runs: list[int] = []
    below: Any = engine._below

    class Counting:
        def run(self, *given: Any) -> Any:
            runs.append(1)
            return below.run(*given)

    engine._below = Counting()
    return runs
