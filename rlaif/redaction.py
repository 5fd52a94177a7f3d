"""Secrets that stand where they shouldn't, hidden by their shape and by their name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

HIDDEN = "[hidden]"
_NAME = (
    r"(?:[\w.-]*[._-]key|(?:[\w.-]*[._-])?(?:apikey|access_key_id|token|secrets?|passw(?:or)?d|passphrase|pass|pwd|pw"
    r"|credentials?|cookies?|auth(?:orization)?)|[\w.-]*[a-z](?-i:Key|Token|Secret|Password|Credentials?))"
)
"""What names a secret by its last word: ``labeler.extra_body.api_key``, but not ``max_new_tokens``."""
_QUOTED = r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'"""
_VALUE = rf"""(?!\[hidden\])(?:{_QUOTED}|\[[^\]\n]*\]|\{{[^}}\n]*\}}|[^\s,;&}}\])]+)"""
_VARIABLE = r"[A-Z_][A-Z0-9_]*"
_INSIDE = r"""(?m:^|[{,])[ \t]*["']?"""


def _without_user(address: re.Match[str]) -> str:
    _, at, host = address[2].rpartition("@")
    return f"{address[1]}{HIDDEN}@{host}" if at else address[0]


_SECRETS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # An address with a user or a password; Hydra writes a colon in an override as \\:.
        (r"(?i)\b([a-z][a-z0-9+.-]{0,20}\\?:\\?/\\?/)([^\s'\"]*)", _without_user),
        (r"""(?i)\b(\w*url["']?[=:][ \t]*["']?)(?![a-z][a-z0-9+.-]{0,20}\\?:\\?/)([^\s'",}]*)""", _without_user),
        (
            r"(?i)([?&][\w.-]{0,40}?(?:key|token|secret|sig|signature|code|auth|pass\w{0,8}|pwd|credential)\\?=)"
            r"(?!\[hidden\])[^\s&#'\"]+",
            rf"\1{HIDDEN}",
        ),
        # The tokens of OpenAI, Anthropic and others, Hugging Face, GitHub, GitLab, Google, AWS, Slack, NVIDIA; JWTs.
        (
            r"\b(?:sk-[\w-]{10,}|(?:hf|gsk|xai|r8|ghp|gho|ghu|ghs|ghr|github_pat|nvapi|glpat)[_-][\w-]{16,}"
            r"|AIza[\w-]{30,}|A[KS]IA[A-Z0-9]{16}|xox[a-z]-[\w-]{10,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)",
            HIDDEN,
        ),
        (r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}", rf"\1{HIDDEN}"),
        (r"""(?i)\b(authorization["']?\s*[:=]\s*["']?\w+\s+)[\w.~+/=-]{4,}""", rf"\1{HIDDEN}"),
        # api_key=..., and {api_key: ...} or {"api_key": "..."} inside a mapping.
        (rf"(?i)((?<![\w.-]){_NAME}[ \t]?=[ \t]?){_VALUE}", rf"\1{HIDDEN}"),
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
    if value is None or isinstance(value, bool):
        return value
    if re.fullmatch(f"(?i){_NAME}", name):
        # Whatever is in it: a list of keys, or a mapping that holds one by another name.
        return [HIDDEN for _ in value] if isinstance(value, list) else HIDDEN
    if isinstance(value, dict):
        return {
            redacted(key) if isinstance(key, str) else key: redacted_settings(x, str(key)) for key, x in value.items()
        }
    if isinstance(value, list):
        return [redacted_settings(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if name == "api_key_env" and not re.fullmatch(_VARIABLE, value):
        return HIDDEN
    # With its name before it, a value can be told by that.
    return redacted(f"{name}={value}").partition("=")[2] if name.endswith("url") else redacted(value)
