"""The recipe: frozen models that hold everything a user may set. Unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .data import (
    Augment,
    CustomData,
    Data,
    Digits,
    Folder,
    Hub,
    Idx,
    Mask,
    Preprocess,
    Shards,
    Synthetic,
    Text,
    Tokenizer,
)
from .duration import Duration
from .optim import LAMB, LARS, SGD, GroupRule, Optim
from .schedule import (
    Constant,
    Decay,
    Exponential,
    InverseTime,
    MultiStep,
    OneCycle,
    Scaling,
    Step,
    WarmRestarts,
    Warmup,
)
from .section import Positive, PositiveFloat, Section
from .task import CausalLM, Classification, CustomTask, MaskedLM, Task

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "Augment",
    "Batch",
    "CausalLM",
    "Checkpoint",
    "Classification",
    "Clip",
    "Constant",
    "CustomData",
    "CustomTask",
    "Data",
    "Decay",
    "Digits",
    "Eval",
    "Exponential",
    "Folder",
    "GroupRule",
    "Hub",
    "Idx",
    "InverseTime",
    "Mask",
    "MaskedLM",
    "MultiStep",
    "Norm",
    "OneCycle",
    "Optim",
    "Parallel",
    "Preprocess",
    "Run",
    "RunConfig",
    "Scaling",
    "Section",
    "Shards",
    "Step",
    "Synthetic",
    "Task",
    "Text",
    "Tokenizer",
    "Tracking",
    "Wandb",
    "WarmRestarts",
    "Warmup",
]  # fmt: skip


class Run(Section):
    dir: str = Field("runs/default", min_length=1, description="Directory the run owns; the same directory resumes it.")
    stop_after: Duration | None = Field(None, description="Save and stop here; the same run goes on without this key.")
    nonfinite_limit: Positive = Field(20, description="Consecutive steps with a non-finite gradient before giving up.")
    grace: PositiveFloat = Field(60.0, description="Seconds from SIGTERM or SIGUSR1 to a saved, ended run.")
    lease: PositiveFloat = Field(30.0, description="Seconds without a sign of its owner before the directory is free.")


class Batch(Section):
    global_: Positive = Field(alias="global", le=2**31, description="Samples per optimiser step, over all processes.")
    micro: Positive | Literal["auto"] = Field("auto", description="Samples per process and backward pass.")
    micro_limit: Positive = Field(2048, description="Largest micro batch that `auto` may choose.")
    max: Positive | None = Field(None, description="Largest global batch of decay.by=batch; then the rate falls.")


class Clip(Section):
    kind: Literal["none", "norm", "value", "adaptive"] = "none"
    max: PositiveFloat | None = Field(None, description="Largest norm, largest |value|, or AGC's λ.")


class Norm(Section):
    kind: Literal["batch", "group", "layer", "instance"] = "batch"
    span: Positive | Literal["micro"] = Field("micro", description="Samples that batch statistics are taken over.")
    groups: Positive = Field(32, description="Groups of norm.kind group.")
    zero_init_residual: bool = Field(
        False, description="γ = 0 in each residual branch's last norm; false leaves the model as it was made."
    )


class Eval(Section):
    every: Duration = Duration.parse("1ep")
    batch: Positive = Field(512, description="Samples per process and forward pass.")


class Checkpoint(Section):
    every: Duration = Duration.parse("1ep")
    keep: Positive = Field(2, description="Newest checkpoints kept, besides the best.")
    write: Literal["background", "foreground"] = Field("background", description="While training goes on, or before.")
    best: str = Field("accuracy", description="Validation metric whose best checkpoint is kept too.")
    best_is: Literal["max", "min"] = "max"


class Wandb(Section):
    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "bigbatch"
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()


class Tracking(Section):
    every: Duration = Duration.parse("1st")
    console: Literal["auto", "bar", "lines", "none"] = "auto"
    wandb: Wandb = Wandb()


class Parallel(Section):
    strategy: Literal["ddp", "zero1", "fsdp2", "deepspeed"] = Field(
        "ddp",
        description="ddp: everything on each process. zero1: optimiser state split by whole parameters. fsdp2: "
        "parameters, gradients and state sharded (torch's fully_shard). deepspeed: ZeRO, by zero_stage.",
    )
    zero_stage: Literal[0, 1, 2, 3] | None = Field(None, description="Stage of strategy deepspeed; 1 where not given.")
    compression: Literal["none", "bf16", "fp16", "powersgd"] = Field(
        "none", description="How gradients travel: as they are, rounded, or as low-rank factors (arXiv:1905.13727)."
    )
    powersgd_rank: Positive = Field(4, description="Rank of the factors of compression powersgd.")
    expect_world_size: Positive | None = None
    timeout: PositiveFloat = Field(1800.0, le=1e7, description="Seconds a collective may take.")
    heartbeat: PositiveFloat = Field(5.0, description="Seconds between two signs of life of a process.")
    straggler: Annotated[float, Field(gt=1)] = Field(
        2.0, description="Name a process whose own part of a step takes so many times the median."
    )
    check_every: Duration | None = Field(
        Duration.parse("1ep"),
        description="Compare all processes' parameters, plan and clock so often, and at each checkpoint; null: never.",
    )


class RunConfig(Section):
    """A whole recipe."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    run: Run = Run()
    duration: Duration
    batch: Batch
    optim: Optim
    scaling: Scaling = Scaling()
    warmup: Warmup = Warmup()
    decay: Decay = Field(default_factory=lambda: Constant(kind="constant"))
    clip: Clip = Clip()
    norm: Norm = Norm()
    task: Task
    data: Data
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    parallel: Parallel = Parallel()
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    debug: bool = False

    @model_validator(mode="after")
    def _task_fits_text(self) -> RunConfig:
        if isinstance(self.data, Text) and not isinstance(self.task, CustomTask):
            fits = "causal_lm" if self.data.mask is None else "masked_lm"
            if self.task.name != fits:
                mask = "data.mask=null" if self.data.mask is None else "data.mask"
                raise ValueError(
                    f"task.name = {self.task.name!r}: text with {mask} is for {fits}; change one of the two"
                )
        return self
