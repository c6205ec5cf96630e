"""Workers of verify with a fault in them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from bigbatch.analysis import Trace, replay
from bigbatch.analysis import replay as _  # noqa: F401  (the module of the same name is patched below)
