"""The recipe: frozen models that hold everything a user may set. Unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from .duration import Duration
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


# --------------------------------------------------------------------------------------------- optimiser


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

# ---------------------------------------------------------------------------------------------- schedule


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

# --------------------------------------------------------------------------------------- clip, norm, task


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


class Classification(Section):
    name: Literal["classification"]
    model: str = Field(min_length=1, description="`bigbatch/resnet_small` or `timm/NAME`.")
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the model.")
    label_smoothing: Fraction1 = 0.0
    class_weights: tuple[Rate, ...] | None = Field(None, description="A weight for each class; default: 1.")
    channels_last: bool = False
    dropout: Literal["keyed", "torch"] = Field(
        "keyed",
        description="Masks drawn from (seed, step, position in the global batch), the same in every layout; or torch's "
        "own, which depend on the micro batch and keep attention fused.",
    )


Task = Classification

# ------------------------------------------------------------------------------------------------- data


class Augment(Section):
    """Random changes of training images, drawn from (seed, epoch, sample)."""

    shift: Annotated[int, Field(ge=0)] = Field(0, description="Largest shift in pixels, each axis.")
    flip: bool = Field(False, description="Left-right flip of half the samples.")
    erase: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="Probability of erasing a random rectangle.")
    mixup: Rate = Field(0.0, description="α of mixup, 0 for none (arXiv:1710.09412); with cutmix too, one of the two.")
    cutmix: Rate = Field(0.0, description="α of CutMix, 0 for none (arXiv:1905.04899).")


class _Data(Section):
    last: Literal["cross", "short", "drop"] = Field("cross", description="What becomes of an epoch's last window.")
    shuffle: Positive | Literal["all"] = Field(
        "all",
        description="Samples that are shuffled among each other: all, or windows of so many consecutive ones, the "
        "windows in random order too (for shards that are read as a stream).",
    )
    augment: Augment = Field(default_factory=lambda: Augment())
    size: Positive | None = Field(None, description="Training samples, where the data is not at hand to count.")


class Digits(_Data):
    name: Literal["digits"]


class Idx(_Data):
    name: Literal["idx"]
    path: Annotated[tuple[str, ...], Field(min_length=1)] | str = Field(
        description="Folder of the four idx files; of several, the first that has them."
    )
    validation: Positive = Field(5000, description="Training images at the end that validate.")
    download: Literal["fashion_mnist", "mnist"] | None = Field(None, description="Fetch into the first path.")


class Synthetic(_Data):
    name: Literal["synthetic"]
    size: Positive = 1024
    shape: tuple[Positive, Positive, Positive] = Field((3, 32, 32), description="Channels, height, width.")
    classes: Annotated[int, Field(gt=1, le=2**20)] = 10
    evaluation: Positive = Field(256, description="Samples of the validation and of the test part.")


Data = Annotated[Digits | Idx | Synthetic, Field(discriminator="name")]

# --------------------------------------------------------------------------------- evaluation and the rest


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
