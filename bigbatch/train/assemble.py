"""Config and plan become the parts of a run: the one file that knows every room."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bigbatch.config import RunConfig
from bigbatch.config.models import CustomTask, Preprocess, Text
from bigbatch.data import (
    Dataset,
    ImagePipeline,
    Loader,
    Pipeline,
    PlainPipeline,
    Preprocessing,
    Stream,
    TextPipeline,
    load_data,
)
from bigbatch.data.preprocess import State
from bigbatch.dist import Runtime, Strategy, lost_contact
from bigbatch.dropout import KeyedDropout, draws_freely
from bigbatch.keyed import fold
from bigbatch.norm import BatchStats, convert_norm, zero_init_residual
from bigbatch.optim import build_optimizer
from bigbatch.plan import Plan, PlanWarning
from bigbatch.tasks import Task, build_task

from .finetune import freeze, start
from .scale import LossScale
from .state import Parts
from .statistics import fit


def assemble(
    config: RunConfig,
    plan: Plan,
    runtime: Runtime,
    *,
    preprocess: State | None = None,
    weights: Literal["start", "later"] = "start",
) -> Parts:
    """Build the parts. The order is law: preprocessing, which may change the input's shape → model → norm conversion →
    frozen parameters → parameter groups and optimiser → wrap (the strategy's business, since sharding replaces the
    parameters) → the weights to start from; ``later`` where others are loaded, or none but by `start`.

    ``preprocess``: the statistics that a run was begun with, instead of those of its training part today.

    Raises ValueError for what only the data or the model can tell is wrong: a missing file, an unknown model, a group
    rule that matches nothing.
    """
    loader, preprocessing, told = feed(config, plan, runtime, preprocess=preprocess)
    spec = loader.dataset.spec
    spec = replace(spec, shape=preprocessing.shape(spec.shape)) if preprocessing else spec
    task = build_task(config.task, spec)
    if config.checkpoint.best not in task.metric_names:
        raise ValueError(
            f"checkpoint.best = {config.checkpoint.best!r}: no metric of this task; choose one of {task.metric_names}"
        )

    # The initial weights are a function of the seed alone, the same on every process.
    torch.manual_seed(config.seed)
    # Of pretrained models, transformers fetches the configuration.
    with runtime.first_on_this_machine() if config.task.weights == "pretrained" else nullcontext():
        model = task.build_model().to(runtime.device, runtime.dtype)
    model = convert_norm(model, norm=config.norm, micro=plan.micro_batch, neighbours=runtime.neighbours)
    if config.norm.zero_init_residual:
        zero_init_residual(model)
    freeze(model, config.task.freeze)
    strategy = runtime.prepare(model, lambda model: build_optimizer(config.optim, model))
    dropout, own_buffers, warnings = _try(config, task=task, strategy=strategy, loader=loader, runtime=runtime)
    strategy.start()
    parts = Parts(
        config=config,
        plan=plan,
        runtime=runtime,
        task=task,
        loader=loader,
        model=model,
        strategy=strategy,
        stats=BatchStats(model),
        scale=LossScale() if config.precision == "fp16" else None,
        dropout=dropout,
        own_buffers=own_buffers,
        preprocessing=preprocessing,
        warnings=(*told, *warnings),
    )
    if weights == "start":
        start(parts)
    return parts


def feed(
    config: RunConfig, plan: Plan, runtime: Runtime, *, preprocess: State | None = None
) -> tuple[Loader, Preprocessing | None, tuple[PlanWarning, ...]]:
    """What the model is fed by, how its images are preprocessed, and warnings of that. Raises ValueError likewise."""
    with runtime.first_on_this_machine():
        data = load_data(config.data, seed=config.seed)
    _check_size(data, plan)
    loader = Loader(
        data,
        stream=Stream(
            plan.dataset_size, seed=config.seed, epoch_samples=plan.epoch_samples, shuffle=config.data.shuffle
        ),
        pipeline=PlainPipeline(seed=config.seed, device=runtime.device, dtype=torch.float64),
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )
    preprocessing, told = _preprocessing(config, loader, runtime, preprocess)
    loader.pipeline = _pipeline(config, data, preprocessing, runtime)
    return loader, preprocessing, told


def _preprocessing(
    config: RunConfig, loader: Loader, runtime: Runtime, known: State | None
) -> tuple[Preprocessing | None, tuple[PlanWarning, ...]]:
    """Of images: as ``known``, or else by statistics that are taken now, with warnings of them."""
    data = loader.dataset
    settings = getattr(config.data, "preprocess", Preprocess())
    if data.kind != "image":
        if settings != Preprocess():
            raise ValueError(f"data.preprocess: is for images, and this data is {data.kind}; leave it out")
        return None, ()
    warnings: tuple[PlanWarning, ...] = ()
    if not known:
        known, warnings = fit(settings, loader, runtime, seed=config.seed, batch=config.eval.batch)
    dtype = torch.promote_types(runtime.dtype, torch.float32)
    return Preprocessing(known, device=runtime.device, dtype=dtype), warnings


def _pipeline(config: RunConfig, data: Dataset, preprocessing: Preprocessing | None, runtime: Runtime) -> Pipeline:
    on: Any = {"seed": config.seed, "device": runtime.device, "dtype": runtime.dtype}
    settings = config.data
    if isinstance(settings, Text):
        return TextPipeline(mask=settings.mask, spec=data.spec, tokenizer=data.tokenizer, **on)
    if preprocessing:
        return ImagePipeline(shape=data.spec.shape, augment=settings.augment, preprocess=preprocessing, **on)
    return PlainPipeline(**on)


def _try(
    config: RunConfig, *, task: Task, strategy: Strategy, loader: Loader, runtime: Runtime
) -> tuple[KeyedDropout | None, frozenset[str], tuple[PlanWarning, ...]]:
    """Forward and backward on two samples, to see here and not in the first step what cannot work, and to pin how
    gradients are exchanged: its dropout keyed, the buffers that follow each process's own samples, and warnings of what
    therefore depends on the layout."""
    model = strategy.model
    stats, dropout, warnings = BatchStats(model), None, []
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def forward(samples: int = 2) -> Tensor:
        with runtime.autocast():
            loss, weight = task.loss(strategy.wrapped, loader.train(range(samples)))
        if task.weight_is_count and float(weight) != samples:
            raise ValueError(
                f"{config.task.what}: {samples} samples weigh {float(weight):g}; set weight_is_count = False in the "
                "task, whose weight is not their number"
            )
        return loss

    def passes() -> None:
        with strategy.exchange(when=True):
            with dropout.at(range(2), range(2)) if dropout else nullcontext():
                loss = forward()
            strategy.backward(loss)
        strategy.zero_grad()
        stats.check(2)

    def warn(code: str, message: str) -> None:
        warnings.append(PlanWarning(code, f"{message}; another layout is another run"))

    def evaluation() -> None:
        model.eval()
        with torch.no_grad(), runtime.autocast():
            for batch in loader.evaluate("validation", rank=0, world_size=1, batch=2):
                sums = task.evaluate(model, batch)
                task.metrics({name: float(total) for name, total in sums.items()})
                break
        model.train()

    try:
        free = draws_freely(passes, runtime.device)
        if free and config.task.dropout == "torch":
            warn("random_by_layout", "task.dropout = torch: masks follow the micro batch (set task.dropout=keyed)")
        elif free:
            dropout = KeyedDropout(fold(config.seed, 1))
            dropout.learn(forward)
            stats.discard()
            if draws_freely(passes, runtime.device):
                warn("random_by_layout", "the model draws random numbers that task.dropout = keyed does not reach")
        if runtime.world_size > 1:
            # The second pass is where DistributedDataParallel tells of parameters that the first did not reach.
            _check_reached(strategy, passes)
        if isinstance(config.task, CustomTask):
            evaluation()
    except (ValueError, dist.DistError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if lost_contact(error):
            raise
        under = f" under parallel.strategy = {config.parallel.strategy}" if runtime.world_size > 1 else ""
        raise ValueError(
            f"{config.task.what}: a training step on two samples{under} fails ({error}); change the "
            "model or its options"
        ) from error
    stats.discard()
    moved = frozenset(name for name, buffer in model.named_buffers() if not buffer.equal(before[name]))
    for name in moved:
        model.get_buffer(name).copy_(before[name])
    if moved:
        warn("buffers_by_layout", f"{min(moved)} follows each process's own samples, and the first one's is saved")
    return dropout, moved, tuple(warnings)


def _check_reached(strategy: Strategy, passes: Callable[[], None]) -> None:
    """Run the passes once more; ValueError for a parameter that they do not reach and that would still be stepped."""
    reached: set[str] = set()
    names = [name for name, p in strategy.model.named_parameters() if p.requires_grad] if strategy.fills_gaps else []
    parameters = [strategy.model.get_parameter(name) for name in names]
    hooks = [
        p.register_hook(lambda _, name=name: reached.add(name))  # type: ignore[no-untyped-call]
        for name, p in zip(names, parameters, strict=True)
    ]
    passes()
    for hook in hooks:
        hook.remove()
    if missing := [name for name in names if name not in reached]:
        raise ValueError(
            f"parallel.strategy = deepspeed: the loss does not reach {missing[0]}, which DeepSpeed would still step; "
            "freeze it, or use ddp, zero1 or fsdp2"
        )


def _check_size(data: Dataset, plan: Plan) -> None:
    if len(data.train) != plan.dataset_size:
        raise ValueError(
            f"data.size = {plan.dataset_size}: the training part has {len(data.train)} samples; set data.size to that "
            "or remove it"
        )
