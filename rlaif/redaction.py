"""Secrets that stand where they shouldn't, hidden by their shape and by their name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

HIDDEN = "[hidden]"
_NAME = r"(?:[\w.-]*[._-]key|(?:[\w.-]*[._-])?(?:apikey|token|secret|passw(?:or)?d|passphrase|pwd|auth(?:orization)?))"
"""What names a secret by its last word: ``labeler.extra_body.api_key``, but not ``max_new_tokens``."""
_VALUE = r"""(?!\[hidden\])(?:"[^"]*"|'[^']*'|[^\s,;&}\])]+)"""
_VARIABLE = r"[A-Z_][A-Z0-9_]*"
_INSIDE = r"""(?m:^|[{,])[ \t]*["']?"""


def _without_user(address: re.Match[str]) -> str:
    _, at, host = address[2].rpartition("@")
    return f"{address[1]}{HIDDEN}@{host}" if at else address[0]


_SECRETS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # An address with a user or a password.
        (r"(?i)\b([a-z][a-z0-9+.-]{0,20}://)([^\s'\"]*)", _without_user),
        # The tokens of OpenAI, Anthropic and others, Hugging Face, GitHub, GitLab, Google, AWS, Slack, NVIDIA; JWTs.
        (
            r"\b(?:sk-[\w-]{10,}|(?:hf|gsk|xai|r8|ghp|gho|ghu|ghs|ghr|github_pat|nvapi|glpat)[_-][\w-]{16,}"
            r"|AIza[\w-]{30,}|A[KS]IA[A-Z0-9]{16}|xox[a-z]-[\w-]{10,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)",
            HIDDEN,
        ),
        (r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}", rf"\1{HIDDEN}"),
        (r"""(?i)\b(authorization["']?\s*[:=]\s*["']?\w+\s+)[\w.~+/=-]{4,}""", rf"\1{HIDDEN}"),
        # api_key=..., and {api_key: ...} or {"api_key": "..."} inside a mapping.
        (rf"(?i)((?<![\w.-]){_NAME}=){_VALUE}", rf"\1{HIDDEN}"),
        (rf"""(?i)({_INSIDE}{_NAME}["']?\s*:\s*){_VALUE}""", rf"\1{HIDDEN}"),
        # The name of a variable is told; anything else there is the key itself, set by mistake.
        (rf"(api_key_env=)(?!{_VARIABLE}(?:[\s,;]|$)){_VALUE}", rf"\1{HIDDEN}"),
        (rf"""({_INSIDE}api_key_env["']?\s*:\s*)(?!["']?{_VARIABLE}["']?(?:[\s,;}}]|$)){_VALUE}""", rf"\1{HIDDEN}"),
    )
]


def redacted(text: str) -> str:
    """``text`` without what is a secret by its shape (a token, a password in an address) or by its name."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def redacted_settings(value: Any, name: str = "") -> Any:
    """Settings for a file: as they are, but without secrets."""
    if isinstance(value, dict):
        return {key: redacted_settings(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted_settings(item, name) for item in value]
    if not isinstance(value, str):
        return value
    named = re.fullmatch(f"(?i){_NAME}", name) or (name == "api_key_env" and not re.fullmatch(_VARIABLE, value))
    return HIDDEN if named else redacted(value)
