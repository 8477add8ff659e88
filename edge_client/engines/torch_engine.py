"""The torch engine: LoRA through peft on an NF4, int8 or bfloat16 base, on CUDA, Apple's GPU or the CPU."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_client.adapters import Adapter
from edge_client.data import Example
from edge_client.engines import (
    IGNORE,
    Optimizer,
    Tokens,
    cuts,
    torch_cut,
    torch_loss,
    torch_memory,
    torch_model,
    tuned_numbers,
    unit,
)
from edge_client.engines.cuts import Cut
from edge_client.engines.kept import KEPT_BYTES
from edge_client.engines.memory import give_back
from edge_client.engines.text import Text
from edge_client.engines.torch_linear import compute_in
from edge_client.engines.torch_lower import Lower
from quantize import QuantizedBase
from wire.delta import Layout, Vector, layer_number
from wire.errors import MachineError

MEASURED_AT_ONCE = 2
"""Sequences a forward pass of `loss`: a fixed number, so that a loss does not depend on who asks."""


class TorchEngine:
    """One model in memory. The residual stream is float32; frozen layers multiply in bfloat16 to train, float32 to measure."""

    gradients = True
    cuts = True
    keeps = True
    """Whether what enters the lowest tuned layer is computed once a sequence."""

    def __init__(
        self, base: QuantizedBase, adapter: Adapter, layout: Layout, max_memory: int | None, device: torch.device
    ):
        self.layout, self._device, self._limit = layout, device, max_memory
        self._base_bytes = torch_memory.resident(base)
        self.text = Text(base.folder)
        self._model, self._factors, self._front = torch_model.build(base, adapter.placement(base), layout, device)
        inner = self._model.base_model.model if hasattr(self._model, "peft_config") else self._model
        self._body = inner.model
        self._head: torch.Tensor = self._model.get_output_embeddings().weight
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        self._plan: torch_memory.Plan | None = None
        self._checkpointing = False
        self._entered: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._cut = cuts.WHOLE
        self._tuned: list[int] = []
        self._lower: Lower | None = None
        self.start(Optimizer())
        give_back()

    @classmethod
    def load(
        cls,
        base: QuantizedBase,
        adapter: Adapter,
        layout: Layout,
        max_memory: int | None = None,
        threads: int | None = None,
    ) -> TorchEngine:
        """`max_memory` bounds the whole process, in bytes. Raises BaseModelError for a base the architecture cannot use."""
        if threads:
            torch.set_num_threads(threads)
        return cls(base, adapter, layout, max_memory, best_device())

    @classmethod
    def missing(cls) -> str | None:
        needed = ("torch", "transformers", "peft")
        return next((name for name in needed if importlib.util.find_spec(name) is None), None)

    def tokenize(self, examples: Sequence[Example], length: int) -> list[Tokens]:
        return self.text.sequences(examples, length)

    def write(self, vector: Vector) -> None:
        if self._lower is not None and self._changes_below(vector):
            self._lower.forget()
        self._write(vector, len(self._factors))

    def _write(self, vector: Vector, count: int) -> None:
        with torch.no_grad():
            for factor, (tensor, place) in zip(self._factors[:count], self.layout.slices(), strict=False):
                factor.copy_(torch.tensor(vector[place]).view(tensor.shape))

    def _changes_below(self, vector: Vector) -> bool:
        """Whether `vector` says something else of the layers below the lowest tuned one."""
        lowest = self._lowest
        beneath = [
            (factor, vector[place])
            for factor, (tensor, place) in zip(self._factors, self.layout.slices(), strict=True)
            if (layer := layer_number(tensor.name)) is not None and layer < lowest
        ]
        return any(not np.array_equal(held.detach().cpu().numpy().reshape(-1), new) for held, new in beneath)

    def _upper(self) -> list[Any]:
        return [self._factors[number] for number in self._tuned]

    def read(self) -> Vector:
        return np.concatenate([factor.detach().cpu().numpy().reshape(-1) for factor in self._factors])

    def loss(self, sequences: Sequence[Tokens]) -> tuple[float, int]:
        self._model.eval()
        compute_in(self._model, torch.float32)
        total, count = 0.0, 0
        with torch.no_grad():
            head = self._head.float()
            for some in _cut(sequences, MEASURED_AT_ONCE):
                hidden, wanted = self._rows(some)
                total += torch_loss.summed(hidden, head, wanted)
                count += len(wanted)
        return total, count

    def features(self, sequences: Sequence[Tokens]) -> Vector:
        self._model.eval()
        compute_in(self._model, torch.float32)
        with torch.no_grad():
            return np.stack([unit(self._means(sequence)) for sequence in sequences])

    def _means(self, sequence: Tokens) -> Vector:
        """Of each layer the mean over a sequence's tokens, float32 [layers + 1, D]; the last one's is normed."""
        given = self._front.given(self._ids([sequence.ids.tolist()]))
        states = self._body(**given, use_cache=False, output_hidden_states=True).hidden_states
        found: Vector = torch.stack([state[0, self._front.shown :].mean(dim=0) for state in states]).cpu().numpy()
        return found

    def losses(self, batch: Sequence[Tokens], adapters: Sequence[Vector]) -> npt.NDArray[np.float64]:
        """One adapter after the other, in float32: on a CPU it costs no more, and the memory stays that of one pass."""
        found = []
        for adapter in adapters:
            self.write(adapter)
            total, count = self.loss(batch)
            found.append(total / count)
        return np.array(found)

    def start(self, optimizer: Optimizer, chosen: Sequence[int] | None = None) -> None:
        self._begin(optimizer, cuts.WHOLE, tuned_numbers(self.layout, chosen))

    def start_above(self, optimizer: Optimizer, layers: int | None, batch: int, length: int) -> int:
        config = self._model.config
        every = int(config.num_hidden_layers)
        wanted = layers or torch_memory.affordable(config, self._fixed(), self.layout.size, batch, length, self._limit)
        cut = cuts.at(self.layout, max(0, every - wanted), every)
        self._begin(optimizer, cut, [number for number in tuned_numbers(self.layout) if number >= cut.tensors])
        return self._cut.tensors

    def _begin(self, optimizer: Optimizer, cut: Cut, tuned: list[int]) -> None:
        if (cut, tuned) != (self._cut, self._tuned):
            self._cut, self._tuned, self._plan, self._lower = cut, tuned, None, None
            for number, factor in enumerate(self._factors):
                factor.requires_grad_(number in tuned)
        self._clip = optimizer.clip_norm
        if optimizer.id == "sgd":
            self._optimizer: Any = torch.optim.SGD(self._upper(), lr=0.0, weight_decay=optimizer.weight_decay)
            return
        betas = (optimizer.beta1, optimizer.beta2)
        self._optimizer = torch.optim.AdamW(
            self._upper(), lr=0.0, betas=betas, eps=optimizer.epsilon, weight_decay=optimizer.weight_decay
        )

    def step(self, batch: Sequence[Tokens], learning_rate: float) -> float:
        self._model.train()
        compute_in(self._model, torch.bfloat16)
        self._fit(batch)
        self._entered = []
        targets = sum(sequence.targets for sequence in batch)
        loss = sum(self._backward(some, targets) for some in _cut(batch, self._planned().sequences))
        norm = float(torch.nn.utils.clip_grad_norm_(self._upper(), self._clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise MachineError("the training loss is not finite; lower the run's learning_rate")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def share_below(self) -> float:
        return self._cut.layer / int(self._model.config.num_hidden_layers)

    def surrogates(self, adapters: Sequence[Vector]) -> npt.NDArray[np.float64]:
        compute_in(self._model, torch.float32)
        found = []
        for adapter in adapters:
            self.write_below(adapter)
            with torch.no_grad():
                terms = [
                    (by.double() * torch_cut.entering(self._body, self._cut, self._front.given(ids))[0].double()).sum()
                    for ids, by in self._entered
                ]
            found.append(float(sum(terms)))
        return np.array(found)

    def write_below(self, vector: Vector) -> None:
        self._write(vector, self._cut.tensors)

    def generate(self, prompt: str, max_new_tokens: int, temperature: float, seed: int, raw: bool) -> str:
        """The answer to `prompt`; with `raw`, its continuation. Temperature 0 takes the likeliest token each time."""
        self._model.eval()
        chance = torch.Generator().manual_seed(seed)
        given = self.text.prompt(prompt, raw)
        answer: list[int] = []
        past = None
        with torch.no_grad():
            while len(answer) < max_new_tokens:
                ids = self._ids([given])
                told = self._front.begun(ids) if past is None else {"input_ids": ids, "past_key_values": past}
                out = self._body(**told, use_cache=True)
                logits = (out.last_hidden_state[0, -1].to(self._head.dtype) @ self._head.T).float().cpu()
                token = _drawn(logits, temperature, chance)
                if token == self.text.end:
                    break
                answer.append(token)
                past, given = out.past_key_values, [token]
        return self.text.decoded(answer)

    def expected_memory(self, batch: int, length: int) -> torch_memory.Plan:
        """How a step of `batch` sequences of `length` tokens would be computed, and the bytes it would need."""
        layers = int(self._model.config.num_hidden_layers) - max(self._cut.layer, self._lowest)
        return torch_memory.plan(
            self._model.config, self._fixed(), self.layout.size, batch, length + self._front.length, self._limit, layers
        )

    def _fixed(self) -> int:
        return self._base_bytes if self._device.type == "cpu" else 0

    def _fit(self, batch: Sequence[Tokens]) -> None:
        if self._plan is None:
            self._plan = self.expected_memory(len(batch), max(len(s.ids) for s in batch))
            if self._plan.checkpoint:
                self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                self._model.enable_input_require_grads()
            elif self._checkpointing:
                self._model.gradient_checkpointing_disable()
            self._checkpointing = self._plan.checkpoint
            if self._lowest and not self._cut.layer:
                spare = KEPT_BYTES if self._limit is None else max(0, self._limit - self._plan.expected)
                self._lower = Lower(self._body, self._lowest, spare)

    @property
    def _lowest(self) -> int:
        """The layer below which nothing is tuned and nothing comes before the text; 0 where the whole is computed at once."""
        if not self.keeps or self._front.length:
            return 0
        return cuts.lowest(self.layout, self._tuned, int(self._model.config.num_hidden_layers))

    def _planned(self) -> torch_memory.Plan:
        assert self._plan is not None, "_fit comes first"
        return self._plan

    def _backward(self, some: Sequence[Tokens], targets: int) -> float:
        ids, labels = self._padded(some)
        there = labels != IGNORE
        hidden = self._hidden(some, ids)
        loss = torch_loss.RowLoss.apply(hidden[there], self._head, labels[there]) / targets
        loss.backward()
        return float(loss.detach())

    def _hidden(self, some: Sequence[Tokens], ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states [B, T, D], with a gradient; below a cut there is none, and what enters above it is kept."""
        if self._lower is not None:
            return self._lower.last_hidden(some, self._device)
        if not self._cut.layer:
            return self._whole(ids)
        given = self._front.given(ids)
        with torch.no_grad():
            entering, settings = torch_cut.entering(self._body, self._cut, given)
        entering.requires_grad_().register_hook(lambda by: self._entered.append((ids, by.detach())))
        return torch_cut.above(self._body, self._cut, entering, settings)[:, self._front.shown :]

    def _whole(self, ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states [B, T, D] of a pass through all layers."""
        hidden: torch.Tensor = self._body(**self._front.given(ids), use_cache=False).last_hidden_state
        return hidden[:, self._front.shown :]

    def _rows(self, some: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [N, D] that predict, and what they should predict, int64 [N]."""
        ids, labels = self._padded(some)
        hidden = self._whole(ids)
        there = labels != IGNORE
        return hidden[there], labels[there]

    def _padded(self, some: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and what each position should predict, int64 [B, T] each. Shorter sequences are padded at the end, where no
        earlier position looks: no attention mask is needed."""
        length = max(len(s.ids) for s in some)
        ids = self._ids([[*s.ids.tolist(), *[0] * (length - len(s.ids))] for s in some])
        labels = self._ids([[*s.labels[1:].tolist(), *[IGNORE] * (length - len(s.ids) + 1)] for s in some])
        return ids, labels

    def _ids(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _cut(sequences: Sequence[Tokens], size: int) -> Iterator[Sequence[Tokens]]:
    for at in range(0, len(sequences), size):
        yield sequences[at : at + size]


def _drawn(logits: torch.Tensor, temperature: float, chance: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=chance))
