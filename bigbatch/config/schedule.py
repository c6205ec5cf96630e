"""Scaling, warmup and decay of the learning rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .duration import Duration
from .section import Factor, Positive, PositiveFloat, Rate, Section


class Scaling(Section):
    rule: Literal["linear", "sqrt", "none"] = "none"
    base_batch: Positive | None = Field(None, description="Global batch that optim.lr was tuned for.")


class Warmup(Section):
    kind: Literal["gradual", "constant", "none"] = "none"
    duration: Duration | None = None
    start: Rate | Literal["base", "zero"] = Field("base", description="Rate at step 0: unscaled LR, 0, or a number.")


class _Decay(Section):
    by: Literal["lr", "batch"] = Field("lr", description="`batch` (step, multistep): grow the batch by 1/factor.")


class Constant(_Decay):
    kind: Literal["constant"]


class Linear(_Decay):
    kind: Literal["linear"]
    end: Rate = Field(0.0, description="Final rate as a share of the peak.")


class Step(_Decay):
    kind: Literal["step"]
    every: Duration
    factor: Factor = 0.1


class MultiStep(_Decay):
    kind: Literal["multistep"]
    at: tuple[Duration, ...] = Field(min_length=1)
    factor: Factor = 0.1


class Exponential(_Decay):
    kind: Literal["exponential"]
    every: Duration
    factor: Factor = 0.1


class InverseTime(_Decay):
    kind: Literal["inverse_time"]
    every: Duration = Field(description="Samples after which the rate has fallen by the first 1/(1+rate).")
    rate: PositiveFloat = 1.0


class Cosine(_Decay):
    kind: Literal["cosine"]
    end: Rate = 0.0


class Poly(_Decay):
    kind: Literal["poly"]
    power: PositiveFloat = 2.0
    end: Rate = 0.0


class OneCycle(_Decay):
    kind: Literal["one_cycle"]
    up: Duration = Field(Duration.parse("30%"), description="Length of the rise.")
    start: Rate = Field(0.04, description="First rate as a share of the peak.")
    end: Rate = Field(4e-6, description="Last rate as a share of the peak.")


class WarmRestarts(_Decay):
    kind: Literal["warm_restarts"]
    first: Duration = Field(description="Length of the first cycle.")
    multiply: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    end: Rate = 0.0


Decay = Annotated[
    Constant | Linear | Step | MultiStep | Exponential | InverseTime | Cosine | Poly | OneCycle | WarmRestarts,
    Field(discriminator="kind"),
]
