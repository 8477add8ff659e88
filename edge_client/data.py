"""(being written)"""
from __future__ import annotations
import dataclasses
@dataclasses.dataclass(frozen=True)
class Example:
    text: str = ""
