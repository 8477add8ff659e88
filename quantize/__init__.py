"""Quantized base models: made once, named by digest, opened in a fraction of the float model's memory. numpy only."""

from quantize.base_model import QuantizedBase, cached_base, open_base
from quantize.errors import QuantizeError

__all__ = ["QuantizeError", "QuantizedBase", "cached_base", "open_base"]
