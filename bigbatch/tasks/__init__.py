"""What a model is for: how it is built, its loss as (sum, weight), and its metrics."""

from __future__ import annotations

from bigbatch.config.models import Task as TaskConfig

from .base import Task
from .classification import ClassificationTask
from .resnet_small import ResNetSmall

__all__ = ["ClassificationTask", "ResNetSmall", "Task", "build_task"]


def build_task(config: TaskConfig, *, shape: tuple[int, int, int], classes: int) -> Task:
    """The task that ``config`` names, for images of ``shape`` (C, H, W) in ``classes`` classes."""
    return ClassificationTask(config, shape=shape, classes=classes)
