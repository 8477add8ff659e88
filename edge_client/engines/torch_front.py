"""What a model is given before a text: nothing, a soft prompt, or keys and values in every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edge_client.adapters import Placement, Prefix, Prompt
from edge_client.engines.torch_linear import compute_in, tensor


class Front:
    """Nothing. `shown` is how many rows of a body's result are not the text's, `length` how much longer a pass is."""

    shown = 0
    length = 0

    def given(self, ids: torch.Tensor) -> dict[str, Any]:
        """What the body takes for `ids` [B, T]. It may be taken again, as a backward pass with checkpoints does."""
        return {"input_ids": ids}

    def begun(self, ids: torch.Tensor) -> dict[str, Any]:
        """The same for a pass that keeps keys and values for those after it."""
        return self.given(ids)


class PromptFront(Front):
    """Rows before the embedded text."""

    def __init__(self, embedding: Any, prompt: Prompt, device: torch.device) -> None:
        self._embedding = embedding
        self.shown = self.length = len(prompt.start)
        self._start = tensor(prompt.start, device)
        self._matrix = None if prompt.matrix is None else tensor(prompt.matrix, device)
        shape = prompt.start.shape if prompt.matrix is None else (prompt.matrix.shape[1],)
        self.tuned = nn.Parameter(torch.zeros(shape, device=device))

    def given(self, ids: torch.Tensor) -> dict[str, Any]:
        moved = self.tuned if self._matrix is None else (self._matrix @ self.tuned).view(self._start.shape)
        rows = (self._start + moved).expand(len(ids), -1, -1)
        return {"inputs_embeds": torch.cat([rows, self._embedding(ids)], dim=1)}


class PrefixFront(Front):
    """Keys and values of every layer, [B, heads, length, head], at the positions before the text."""

    def __init__(self, model: Any, prefix: Prefix, device: torch.device) -> None:
        self.length = len(prefix.tokens)
        self._start = _of_tokens(model, prefix.tokens, device)
        self.tuned = [
            nn.Parameter(torch.zeros(self.length, 2 * _width(keys), device=device)) for keys, _ in self._start
        ]
        for layer in model.model.layers:
            layer._can_checkpoint_with_cache = (
                True  # transformers would drop a cache, for fear that it is written twice
            )

    def given(self, ids: torch.Tensor) -> dict[str, Any]:
        from transformers import Cache

        layers = [_kept(keys, values) for keys, values in self._pairs(len(ids))]
        return {"input_ids": ids, "past_key_values": Cache(layers=layers)}

    def begun(self, ids: torch.Tensor) -> dict[str, Any]:
        from transformers import DynamicCache

        return {"input_ids": ids, "past_key_values": DynamicCache(self._pairs(len(ids)))}

    def rows(self) -> torch.Tensor:
        """Keys and values as peft keeps them, [length, layers · 2 · kv]: each layer's keys, then its values."""
        parts = [one[0].transpose(0, 1).reshape(self.length, -1) for pair in self._pairs(1) for one in pair]
        return torch.cat(parts, dim=1)

    def _pairs(self, copies: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        made = []
        for (keys, values), tuned in zip(self._start, self.tuned, strict=True):
            moved = tuned.view(self.length, 2, *keys.shape[:1], -1).permute(1, 2, 0, 3)
            both = (torch.stack([keys, values]) + moved)[:, None].expand(2, copies, -1, -1, -1)
            made.append((both[0], both[1]))
        return made


def front(model: Any, placement: Placement, device: torch.device) -> tuple[Front, dict[int, nn.Parameter]]:
    """What a placement puts before a text, and its parameters by where they start in the flat vector."""
    if placement.prompt is not None:
        prompt = PromptFront(model.get_input_embeddings(), placement.prompt, device)
        return prompt, {placement.prompt.place.start: prompt.tuned}
    if placement.prefix is not None:
        prefix = PrefixFront(model, placement.prefix, device)
        return prefix, {place.start: one for place, one in zip(placement.prefix.places, prefix.tuned, strict=True)}
    return Front(), {}


def _of_tokens(model: Any, tokens: tuple[int, ...], device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of a text of `tokens`, [heads, length, head] by layer."""
    compute_in(model, torch.float32)
    with torch.no_grad():
        past = model.model(input_ids=torch.tensor([tokens], device=device), use_cache=True).past_key_values
    return [(layer.keys[0].clone(), layer.values[0].clone()) for layer in past.layers]


def _width(keys: torch.Tensor) -> int:
    return keys.shape[0] * keys.shape[2]


def _kept(keys: torch.Tensor, values: torch.Tensor) -> Any:
    """A layer of a cache that gives what it holds and what is new, and keeps nothing new."""
    from transformers.cache_utils import DynamicLayer

    class Kept(DynamicLayer):
        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *given: Any, **named: Any) -> Any:
            return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    layer = Kept()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer
