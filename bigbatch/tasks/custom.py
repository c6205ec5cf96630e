"""The user's own tasks."""

from __future__ import annotations

from bigbatch.config.models import CustomTask
from bigbatch.spec import Spec

from .base import Task


def custom_task(config: CustomTask, spec: Spec) -> Task:
    raise NotImplementedError
