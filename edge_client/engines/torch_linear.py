"""Frozen quantized linear layers in torch: bitsandbytes' where it can compute, an own one everywhere else."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from quantize import QuantizedBase
from quantize.formats import BLOCK, NF4, SCHEMES, SMALL

_PAIRS = torch.stack([torch.from_numpy(NF4)[torch.arange(256) >> 4], torch.from_numpy(NF4)[torch.arange(256) & 15]], -1)
"""Byte -> its two weights, float32 [256, 2]."""


def linear(base: QuantizedBase, module: str, device: torch.device) -> nn.Linear:
    """The frozen layer of `module`, sharing memory with the base's file where the device is the CPU."""
    weight, bias = f"{module}.weight", f"{module}.bias"
    rows, columns = base.shape(weight)
    scheme = base.scheme(weight)
    parts = {suffix: tensor(part, device) for suffix, part in base.parts(weight).items()}
    made: nn.Linear
    if scheme == "bf16":
        made = nn.Linear(columns, rows, bias=False, device="meta", dtype=torch.bfloat16)
        made.weight = nn.Parameter(parts[""].view(torch.bfloat16), requires_grad=False)
        made = Bfloat16Linear.of(made)
    elif scheme == "nf4" and _has_bitsandbytes(device):
        made = _bitsandbytes(parts, rows, columns)
    else:
        made = PortableLinear(scheme, parts, rows, columns)
    if bias in base.names():
        made.bias = nn.Parameter(tensor(base.dequantized(bias), device), requires_grad=False)
    return made


def tensor(array: Any, device: torch.device) -> torch.Tensor:
    """A numpy array as a tensor. On the CPU it shares the file's pages, which are read-only: nothing here writes them."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).to(device)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """The precision that frozen layers multiply in: bfloat16 to train, float32 to measure."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype  # type: ignore[assignment]  # a plain attribute, which nn.Module does not tell
        state = getattr(module, "quant_state", None)
        if state is not None:
            state.dtype = dtype  # what bitsandbytes dequantizes to, before it multiplies


def _has_bitsandbytes(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda") and importlib.util.find_spec("bitsandbytes") is not None


def _bitsandbytes(parts: dict[str, torch.Tensor], rows: int, columns: int) -> nn.Linear:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    made = Linear4bit(
        columns,
        rows,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    # On CPUs with avx512_bf16, bitsandbytes repacks a weight that was evaluated, and the repacked path has no gradient:
    # a client that measures and then trains would learn nothing, without an error.
    made.support_avx512bf16_for_cpu = False
    device = parts[".codes"].device
    state = QuantState(
        absmax=parts[".absmax"],
        shape=torch.Size((rows, columns)),
        code=torch.from_numpy(NF4.copy()).to(device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    made.weight = Params4bit(
        parts[".codes"].view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=False,
        quant_type="nf4",
        quant_storage=torch.uint8,
        module=made,
        bnb_quantized=True,
    )
    made.quant_state = state
    made.compute_type_is_set = True
    layer: nn.Linear = made
    return layer


class Bfloat16Linear(nn.Linear):
    """A bfloat16 weight under float32 activations."""

    compute_dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(cls, layer: nn.Linear) -> Bfloat16Linear:
        layer.__class__ = cls
        return layer  # type: ignore[return-value]  # it is one now

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype)).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Float32Embedding(nn.Embedding):
    """A bfloat16 table that starts a float32 residual stream: norms and rotations round to what they are given."""

    @classmethod
    def of(cls, layer: nn.Embedding) -> None:
        layer.__class__ = cls

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).float()


class PortableLinear(nn.Linear):
    """NF4, int8 or the onnx engine's 4-bit blocks in plain torch, on any device. Dequantizes in forward and again in
    backward: nothing float is kept."""

    def __init__(self, scheme: str, parts: dict[str, torch.Tensor], rows: int, columns: int) -> None:
        super().__init__(columns, rows, bias=False, device="meta")
        self.compute_dtype = torch.bfloat16
        self._scheme = scheme
        self.weight = nn.Parameter(parts.pop(".codes"), requires_grad=False)
        for suffix, part in parts.items():
            self.register_buffer(suffix.removeprefix("."), part, persistent=False)
        if scheme not in SCHEMES:
            raise ValueError(scheme)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, [out, in]."""
        values: torch.Tensor
        if self._scheme == "q4":
            return self._q4().to(dtype)
        absmax: Any = self.absmax  # a registered buffer
        if self._scheme == "nf4":
            values = _PAIRS.to(self.weight.device, dtype)[self.weight.int()].view(-1, BLOCK) * absmax.to(dtype)[:, None]
        else:
            values = self.weight.view(-1, BLOCK).to(dtype) * (absmax / 127).to(dtype)[:, None]
        return values.view(self.out_features, self.in_features)

    def _q4(self) -> torch.Tensor:
        """The same function that onnxruntime multiplies by: scale · (code - 8) + offset, in float32."""
        scales: Any = self.scales
        offsets: Any = self.offsets
        pairs = torch.stack([self.weight & 15, self.weight >> 4], -1)
        codes = pairs.view(self.out_features, -1, SMALL).float().sub_(8)
        return codes.mul_(scales[..., None]).add_(offsets.T[..., None]).view(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Frozen.apply(x, self)
        return y if self.bias is None else y + self.bias


class _Frozen(torch.autograd.Function):
    """x W^T with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PortableLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, layer.compute_dtype
        return functional.linear(x.to(ctx.dtype), layer.dequantized(ctx.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return (grad.to(ctx.dtype) @ ctx.layer.dequantized(ctx.dtype)).to(grad.dtype), None
