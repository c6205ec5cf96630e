"""What every section of a recipe has in common, and the kinds of numbers in it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from .redact import redact

Positive = Annotated[int, BeforeValidator(lambda value: str(value) if value is True else value), Field(gt=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, le=1)]
Fraction1 = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every section: immutable, and closed to keys it does not know and to secrets.

    What a recipe says is copied into the run's directory, its checkpoints and its trackers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _no_secret(cls, value: Any) -> Any:
        if not isinstance(value, Section) and redact(str(value)) != str(value):
            raise PydanticCustomError(
                "secret",
                "looks like a password or a token, and every copy of the recipe would hold it; take it out: libraries "
                "find theirs in the environment (WANDB_API_KEY, HF_TOKEN)",
            )
        return value
