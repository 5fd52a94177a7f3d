"""Other people's text made harmless for terminals, logs and pages."""

from __future__ import annotations

import unicodedata

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
