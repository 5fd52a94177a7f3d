"""Other people's text made harmless for terminals, logs and pages, and its words.

Chinese, Japanese, Thai, Lao, Khmer and Burmese put no spaces between words: there a regular expression
takes a whole clause for one.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

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
_GRAM = 3


@cache
def _word_or_clause() -> re.Pattern[str]:
    """Clauses without spaces, and words with their combining marks, which regular expressions take for no letters."""
    marks = "".join(sorted(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c)[0] == "M"))
    letter = rf"[^\W{_SPACELESS}]"
    return re.compile(rf"[{_SPACELESS}]+|{letter}(?:{letter}|[{marks}])*")


def words_of(text: str) -> list[str]:
    """Words in the order of the text, in lower case, as near-duplicates are compared by.

    Where a script has no spaces, a character counts as a word the first time, and from then on with the two that follow
    it: long texts use all the same characters, but not in the same order. What looks the same is the same: invisible
    characters do not count, nor does the width or the composition of letters. A text without words has its symbols:
    emoji.
    """
    if text.isascii():
        found = _WORD.findall(text.lower())
    else:
        visibly = (c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
        found = _words_in("".join(visibly).lower())
    return found or [character for character in text if unicodedata.category(character)[0] == "S"]


def _words_in(text: str) -> list[str]:
    words, seen = [], set[str]()
    for piece in _word_or_clause().findall(text):
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
