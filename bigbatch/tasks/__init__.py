"""What a model is for: how it is built, its loss as (sum, weight), and its metrics."""

from __future__ import annotations

from bigbatch.config.models import CausalLM, Classification, CustomTask, MaskedLM
from bigbatch.config.models import Task as TaskConfig
from bigbatch.spec import Spec

from .base import BaseTask, Pretrained, Task
from .classification import OWN, ClassificationTask
from .mlp import MLP
from .resnet_small import ResNetSmall

__all__ = ["MLP", "OWN", "BaseTask", "ClassificationTask", "Pretrained", "ResNetSmall", "Task", "build_task"]


def build_task(config: TaskConfig, spec: Spec) -> Task:
    """The task that ``config`` names, for data of this kind. Raises ValueError where they do not go together."""
    match config:
        case Classification():
            return ClassificationTask(config, spec)
        case MaskedLM() | CausalLM():
            from .language import LanguageTask

            return LanguageTask(config, spec)
        case CustomTask():
            from .custom import custom_task

            return custom_task(config, spec)
