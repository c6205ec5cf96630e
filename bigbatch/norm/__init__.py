"""Normalisation: the batch-norm span, other kinds in its place, running statistics, zero-initialised residuals."""

from .batch import SpanBatchNorm
from .convert import convert_norm
from .init import zero_init_residual
from .kernel import Reduce
from .stats import BatchStats

__all__ = ["BatchStats", "Reduce", "SpanBatchNorm", "convert_norm", "zero_init_residual"]
