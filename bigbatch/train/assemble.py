"""Config and plan become the parts of a run: the one file that knows every room."""

from __future__ import annotations

import torch
from torch import nn

from bigbatch.config import RunConfig
from bigbatch.data import Dataset, Loader, Stream, load_data
from bigbatch.dist import Runtime
from bigbatch.dropout import KeyedDropout, draws_freely
from bigbatch.keyed import fold
from bigbatch.norm import BatchStats, convert_norm, zero_init_residual
from bigbatch.optim import build_optimizer
from bigbatch.plan import Plan, PlanWarning
from bigbatch.tasks import Task, build_task

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
    dropout, warnings = _try(config, task=task, model=model, loader=loader, runtime=runtime)
    return Parts(
        config=config,
        plan=plan,
        runtime=runtime,
        task=task,
        loader=loader,
        model=model,
        wrapped=runtime.wrap(model),
        optimizer=optimizer,
        stats=BatchStats(model),
        scale=LossScale() if config.precision == "fp16" else None,
        dropout=dropout,
        warnings=warnings,
    )


def _try(
    config: RunConfig, *, task: Task, model: nn.Module, loader: Loader, runtime: Runtime
) -> tuple[KeyedDropout | None, tuple[PlanWarning, ...]]:
    """Run the model on two samples. A model whose batch norms see other rows than the samples is refused here, not in
    its first step; one that draws random numbers has them keyed, or a warning."""
    batch, stats = loader.train(range(2)), BatchStats(model)

    def draws() -> bool:
        with torch.no_grad(), runtime.autocast():
            drawn = draws_freely(lambda: task.loss(model, batch), runtime.device)
        stats.check(2)
        return drawn

    def warning(message: str) -> tuple[PlanWarning]:
        return (PlanWarning("random_by_layout", f"{message}; until then another layout is another run"),)

    if not draws():
        return None, ()
    if config.task.dropout == "torch":
        return None, warning("task.dropout = torch: masks depend on the micro batch; set task.dropout=keyed")
    dropout = KeyedDropout(fold(config.seed, 1))
    with dropout.at(0, 2):
        unkeyed = draws()
    message = "the model draws random numbers that task.dropout = keyed does not reach; set those rates of it to 0"
    return dropout, warning(message) if unkeyed else ()


def _check_size(data: Dataset, plan: Plan) -> None:
    if len(data.train) != plan.dataset_size:
        raise ValueError(
            f"data.size = {plan.dataset_size}: the training part has {len(data.train)} samples; set data.size to that "
            "or remove it"
        )
