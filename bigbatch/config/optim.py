"""Optimisers and their parameter groups."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import Fraction1, PositiveFloat, Rate, Section


class GroupRule(Section):
    """One parameter group. Rules are tried in order and the first match wins."""

    match: str = Field(min_length=1, description="`bias_and_norm`, `rest`, or a regular expression on the name.")
    weight_decay: Rate | None = Field(None, description="Overrides optim.weight_decay.")
    lr_scale: Rate = Field(1.0, description="Multiplies the scheduled learning rate.")
    adapt: bool = Field(True, description="Layer-wise adaptation (LARS, LAMB); no effect on other optimisers.")


class _Optim(Section):
    lr: PositiveFloat = Field(description="Learning rate at scaling.base_batch.")
    weight_decay: Rate = 0.0
    groups: tuple[GroupRule, ...] | None = Field(None, description="Default: bias and norm without decay; the rest.")


class SGD(_Optim):
    name: Literal["sgd"]
    momentum: Fraction1 = 0.9
    dampening: Fraction1 = 0.0
    nesterov: bool = False


class LARS(_Optim):
    name: Literal["lars"]
    momentum: Fraction1 = 0.9
    nesterov: bool = False
    trust_coefficient: PositiveFloat = Field(0.001, description="η of You et al. 2017 (arXiv:1708.03888).")
    eps: Rate = 0.0
    lr_placement: Literal["inside", "outside"] = Field("inside", description="LR within the momentum buffer, or after.")
    momentum_correction: bool = Field(False, description="Goyal et al. 2017, remark 2; needs lr_placement inside.")
    denominator: Literal["sum", "joint"] = Field("sum", description="‖g‖+λ‖w‖ (paper) or ‖g+λw‖.")
    clip_ratio: bool = Field(False, description="LARC: layer rate never above the scheduled one.")


class LAMB(_Optim):
    name: Literal["lamb"]
    betas: tuple[Fraction1, Fraction1] = (0.9, 0.999)
    eps: PositiveFloat = 1e-6
    bias_correction: bool = True
    clamp_weight_norm: PositiveFloat | None = Field(None, description="φ(z)=min(z, clamp); the paper's tests used 10.")
    prenormalize: bool = Field(False, description="Divide by the global gradient norm first (NVIDIA's LAMB).")


class Adagrad(_Optim):
    name: Literal["adagrad"]
    eps: PositiveFloat = 1e-10
    lr_decay: Rate = 0.0
    initial_accumulator_value: Rate = 0.0


class RMSprop(_Optim):
    name: Literal["rmsprop"]
    alpha: Fraction1 = 0.99
    eps: PositiveFloat = 1e-8
    momentum: Fraction1 = 0.0
    centered: bool = False


class Adadelta(_Optim):
    name: Literal["adadelta"]
    rho: Fraction1 = 0.9
    eps: PositiveFloat = 1e-6


class _Adam(_Optim):
    betas: tuple[Fraction1, Fraction1] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class Adam(_Adam):
    name: Literal["adam"]
    amsgrad: bool = False


class AdamW(_Adam):
    name: Literal["adamw"]
    amsgrad: bool = False


class RAdam(_Adam):
    name: Literal["radam"]


class NAdam(_Adam):
    name: Literal["nadam"]
    momentum_decay: Rate = 4e-3


Optim = Annotated[
    SGD | LARS | LAMB | Adagrad | RMSprop | Adadelta | Adam | AdamW | RAdam | NAdam, Field(discriminator="name")
]
