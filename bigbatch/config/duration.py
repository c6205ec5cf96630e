"""Lengths of training with their unit: ``"10ep"``, ``"500st"``, ``"1.2e6ex"``, ``"50%"``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

Unit = Literal["ep", "st", "ex", "%"]

_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,2})?)\s*(ep|st|ex|%)\s*")
_HELP = 'write a number and a unit: "10ep" (epochs), "500st" (steps), "1.2e6ex" (samples) or "50%" (of the run)'


@dataclass(frozen=True)
class Duration:
    """A length of training. The clock counts samples; every other unit is converted once, by the plan."""

    value: Fraction
    unit: Unit

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Read ``"10ep"`` and its like. Raises ValueError with the legal forms for anything else."""
        if isinstance(text, Duration):
            return text
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"not a duration; {_HELP}")
        return cls(Fraction(match[1]), match[2])  # type: ignore[arg-type]

    def samples(self, *, epoch: int, batch: int, whole: int | None = None) -> int:
        """The same length in samples, rounded up.

        ``epoch`` and ``batch`` are samples per epoch and per step; ``whole`` is the run's length in samples,
        without which a percentage has no meaning (ValueError).
        """
        if self.unit == "%":
            if whole is None:
                raise ValueError(f"{self} is a share of the run and cannot be its own measure; use ep, st or ex")
            return math.ceil(self.value * whole / 100)
        return math.ceil(self.value * {"ep": epoch, "st": batch, "ex": 1}[self.unit])

    def __str__(self) -> str:
        number = self.value.numerator if self.value.denominator == 1 else float(self.value)
        return f"{number}{self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "pattern": "^" + _PATTERN.pattern + "$", "description": _HELP}
