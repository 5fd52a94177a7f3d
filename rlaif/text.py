"""Text made harmless for terminals, logs and pages: other people's, and secrets that stand where they shouldn't.

Also its words. Chinese, Japanese, Thai, Lao, Khmer and Burmese put no spaces between words: there a regular expression
takes a whole clause for one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Any

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def visible(text: str) -> str:
    r"""``text`` with every control, bidirectional and other invisible character written out, as ``\u202e``.

    Newlines and tabs stay. So do combining marks, which a page keeps inside their cell.
    """
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if unicodedata.category(character) not in _INVISIBLE and code & 0xFFFE != 0xFFFE:
        return character
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


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


_HAN_AND_KANA = (
    "\u3005\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_THAI_TO_KHMER = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ecf\u0edc-\u0edf"
    "\u1000-\u103f\u1050-\u108f\u109a-\u109f\uaa60-\uaa7f\ua9e0-\ua9ef\u1780-\u17d3\u17d7\u17dc-\u17dd"
)
_SPACELESS = _HAN_AND_KANA + _THAI_TO_KHMER
_CLAUSE = re.compile(f"[{_SPACELESS}]+")
_WORD = re.compile(r"\w+")
_WORD_OR_CLAUSE = re.compile(rf"[{_SPACELESS}]+|[^\W{_SPACELESS}]+")
_GRAM = 3


def words_of(text: str) -> list[str]:
    """Words in the order of the text, in lower case, as near-duplicates are compared by.

    Where a script has no spaces, a character counts as a word the first time, and from then on with the two that follow
    it: long texts use all the same characters, but not in the same order.
    """
    text = text.lower()
    if not _CLAUSE.search(text):
        return _WORD.findall(text)
    words, seen = [], set[str]()
    for piece in _WORD_OR_CLAUSE.findall(text):
        if not _CLAUSE.match(piece):
            words.append(piece)
            continue
        for place, character in enumerate(piece):
            words.append(piece[place : place + _GRAM] if character in seen else character)
            seen.add(character)
    return words


def count_words(text: str) -> int:
    """Pieces between spaces; letters where a script has no spaces, without vowel signs and tones."""
    if not _CLAUSE.search(text):
        return len(text.split())
    count = 0
    for piece in text.split():
        clauses = _CLAUSE.findall(piece)
        if not clauses:
            count += 1
            continue
        letters = (character for clause in clauses for character in clause)
        count += sum(unicodedata.category(character)[0] != "M" for character in letters)
        count += len(_WORD.findall(_CLAUSE.sub(" ", piece)))
    return count
