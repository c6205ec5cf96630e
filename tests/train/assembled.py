"""Parts of a small run on digits, in this process."""

from typing import Any

from bigbatch.config import RunConfig, merge
from bigbatch.data import size_of
from bigbatch.dist import Runtime
from bigbatch.plan import resolve
from bigbatch.train import Parts, assemble

BASE: dict[str, Any] = {
    "duration": "2ep",
    "batch": {"global": 96},
    "optim": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "task": {"name": "classification", "model": "bigbatch/resnet_small", "options": {"widths": [8, 16]}},
    "data": {"name": "digits"},
    "precision": "fp64",
}


def assembled(**sections: Any) -> Parts:
    config = RunConfig.model_validate(merge(BASE, sections))
    runtime = Runtime(precision=config.precision, parallel=config.parallel)
    plan = resolve(config, world_size=runtime.world_size, dataset_size=size_of(config.data))
    return assemble(config, plan, runtime)


def gradients(parts: Parts) -> dict[str, Any]:
    return {name: p.grad.clone() for name, p in parts.model.named_parameters() if p.grad is not None}
