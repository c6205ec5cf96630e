"""Config and plan become the parts of a run: the one file that knows every room."""

from __future__ import annotations

import torch

from bigbatch.config import RunConfig
from bigbatch.data import Dataset, Loader, Stream, load_data
from bigbatch.dist import Runtime
from bigbatch.norm import BatchStats, convert_norm, zero_init_residual
from bigbatch.optim import build_optimizer
from bigbatch.plan import Plan
from bigbatch.tasks import build_task

from .scale import LossScale
from .state import Parts


def assemble(config: RunConfig, plan: Plan, runtime: Runtime) -> Parts:
    """Build the parts. The order is law: model → norm conversion → parameter groups → optimiser → wrap.

    Raises ValueError for what only the data or the model can tell is wrong: a missing file, an unknown model, a group
    rule that matches nothing.
    """
    with runtime.first_on_this_machine():
        data = load_data(config.data, seed=config.seed)
    _check_size(data, plan)
    task = build_task(config.task, shape=data.shape, classes=data.classes)
    if config.checkpoint.best not in task.metric_names:
        raise ValueError(
            f"checkpoint.best = {config.checkpoint.best!r}: no metric of this task; choose one of {task.metric_names}"
        )

    # The initial weights are a function of the seed alone, the same on every process.
    torch.manual_seed(config.seed)
    model = task.build_model().to(runtime.device, runtime.dtype)
    model = convert_norm(model, norm=config.norm, micro=plan.micro_batch, neighbours=runtime.neighbours)
    if config.norm.zero_init_residual:
        zero_init_residual(model)
    optimizer = build_optimizer(config.optim, model)
    stats = BatchStats(model)
    loader = Loader(
        data,
        stream=Stream(
            plan.dataset_size, seed=config.seed, epoch_samples=plan.epoch_samples, shuffle=config.data.shuffle
        ),
        augment=config.data.augment,
        seed=config.seed,
        device=runtime.device,
        dtype=runtime.dtype,
    )
    # A model whose batch norms see other rows than the samples is refused here, not in its first step.
    with torch.no_grad(), runtime.autocast():
        task.loss(model, loader.train(range(2)))
    stats.check(2)
    return Parts(
        config=config,
        plan=plan,
        runtime=runtime,
        task=task,
        loader=loader,
        model=model,
        wrapped=runtime.wrap(model),
        optimizer=optimizer,
        stats=stats,
        scale=LossScale() if config.precision == "fp16" else None,
    )


def _check_size(data: Dataset, plan: Plan) -> None:
    if len(data.train) != plan.dataset_size:
        raise ValueError(
            f"data.size = {plan.dataset_size}: the training part has {len(data.train)} samples; set data.size to that "
            "or remove it"
        )
