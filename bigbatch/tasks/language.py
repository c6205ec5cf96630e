"""Language modelling with transformers models."""

from __future__ import annotations

from bigbatch.config.models import CausalLM, MaskedLM
from bigbatch.spec import Spec

from .base import Task


def LanguageTask(config: MaskedLM | CausalLM, spec: Spec) -> Task:
    raise NotImplementedError
