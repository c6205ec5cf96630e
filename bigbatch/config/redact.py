"""Passwords and tokens in text, so that none is shown or written down."""

from __future__ import annotations

import re
import sys
from contextlib import suppress

_SECRET = re.compile(
    r"(https?://)[^\s/?#@'\"]+(?=@)"  # who asks, before the host of a web address
    r"|(\w://[^\s/:@'\"]*:)[^\s/@'\"]+(?=@)"  # the password alone of another address
    r"|([?&;][\w.-]*(?:credential|key|password|secret|sig|signature|token)=)[^\s&;#'\"]+"  # a signed address
    r"|((?:(?:access|api|auth|secret)_?(?:key|token)|password|passwd|secret)['\"]?\s*[=:]\s*['\"]?)[^\s'\"&;,})]+"
    r"|\b((?:hf|gh[oprsu]|github_pat|wandb_v1)_|glpat-)[a-z0-9]{20,}\w*",  # tokens that say what they are
    re.IGNORECASE,
)


def say(text: str, *, who: str = "bigbatch") -> None:
    """One message on standard error, without secrets; nothing where standard error itself is gone."""
    with suppress(OSError, ValueError):
        print(redact(f"{who}: {text}"), file=sys.stderr, flush=True)


def redact(text: str) -> str:
    """``text`` with ``***`` for whatever looks like a password or a token."""
    return _SECRET.sub(r"\1\2\3\4\5***", text)
