"""Messages -> token ids, with text from outside never turning into control tokens."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.records import Message, UserError

# For base models without a template of their own; documented in docs/train.md. A line break ends each name, so that
# a completion follows the generation prompt exactly as it stands in a whole conversation.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'system': '', 'user': 'User:\\n', 'assistant': 'Assistant:\\n'}[message['role']] }}"
    "{{ message['content'] }}{{ '\\n\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


def with_variables(template: str, variables: Mapping[str, Any]) -> str:
    """A template that always has these variables, as if they were given whenever it is rendered.

    Whoever uses it, and whatever is saved with it, then makes the same prompts.

    >>> with_variables("{{ messages }}", {"enable_thinking": False})
    '{% set enable_thinking = false %}\\n{{ messages }}'
    """
    # Templates take what JSON writes for plain values, and the line break after a block is theirs.
    begin = "".join(
        f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}\n" for name, value in sorted(variables.items())
    )
    return template if template.startswith(begin) else begin + template


_TEMPLATE_TOKEN = re.compile(
    r"<(?=\|[^<>|\n]{1,60}\|>)"  # ChatML, Llama 3 and 4, Phi, Cohere, Granite
    r"|<(?=\uff5c[^<>\uff5c\n]{1,60}\uff5c>)"  # DeepSeek
    r"|<(?=(?:start|end)_of_turn>|/?(?:s|bos|eos|pad|unk|think|tool_call|tool_response)>|</?SYS>>)"  # Gemma, Llama 2
    r"|\[(?=/?(?:INST|THINK|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|gMASK)\]|\|[^\[\]|\n]{1,60}\|\])",
    re.IGNORECASE,
)


def encode_chat(
    tokenizer: Any, messages: Sequence[Message], stem: str = "", generation_prompt: bool = True, ended: bool = True
) -> list[int]:
    """Token ids of a conversation up to the point where the assistant's reply starts, then ``stem``.

    ``generation_prompt=False`` stops after the last message instead. If that was cut (``ended=False``), it stops before
    what the template ends a turn with.

    The template is rendered once and tokenised without a second BOS. Where a message contains the text of a
    control token ("<|im_end|>", "<think>"), the template's own parts and the messages are tokenised apart, and in
    the messages control tokens are read as ordinary text.

    Raises:
        UserError: if the template refuses the conversation.
    """
    contents = [message["content"] for message in messages]
    end = "" if ended else _after_reply(tokenizer)
    # Joined: a template may put two messages side by side.
    if not _control(tokenizer).may_be_in("".join([*contents, stem])):
        text = _render(tokenizer, list(messages), generation_prompt).removesuffix(end) + stem
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    marks = [_mark(index, contents) for index in range(len(messages))]
    masked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    # The template may drop a message, move it or show it twice.
    texts = dict(zip(marks, contents, strict=True))
    ids: list[int] = []
    for part in re.split(f"({'|'.join(marks)})", _render(tokenizer, masked, generation_prompt).removesuffix(end)):
        if part in texts:
            ids += _inert(tokenizer, texts[part])
        else:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids + _inert(tokenizer, stem)


_LINES = 4096
"""So many different lines are remembered: a long one with its token ids takes tens of kilobytes."""


class ChatEncoder:
    """:func:`encode_chat` for many conversations with lines in common: a line is tokenised once and looked up then.

    Exact. A text is cut only after a newline that stands between two other visible characters, and only for
    tokenizers whose rule for splitting text into words is known to end a word there, whatever comes before or
    after (byte-level BPE with the rules of GPT-2, Llama 3 and Qwen 2). Other tokenizers get every text whole.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cuts = _splits_at_newlines(tokenizer)
        self._line = functools.lru_cache(maxsize=_LINES)(self._encode_line)

    def __call__(self, messages: Sequence[Message], stem: str = "") -> list[int]:
        """Token ids of a conversation up to the point where the assistant's reply starts, then ``stem``."""
        contents = [message["content"] for message in messages]
        if not self._cuts or _control(self._tokenizer).may_be_in("".join([*contents, stem])):
            return encode_chat(self._tokenizer, messages, stem)
        ids: list[int] = []
        for line in _lines(_render(self._tokenizer, list(messages), True) + stem):
            ids += self._line(line)
        return ids

    def _encode_line(self, line: str) -> tuple[int, ...]:
        # Calling the tokenizer itself takes twice as long.
        backend = self._tokenizer.backend_tokenizer
        backend.encode_special_tokens = bool(getattr(self._tokenizer, "split_special_tokens", False))
        backend.no_truncation()
        backend.no_padding()
        return tuple(backend.encode(line, add_special_tokens=False).ids)


def _lines(text: str) -> list[str]:
    """A text cut after each newline that stands between two visible characters."""
    found, begun, parts = [], "", text.split("\n")
    for part, following in itertools.pairwise(parts):
        begun += f"{part}\n"
        if not (part[-1:] or " ").isspace() and not (following[:1] or " ").isspace():
            found.append(begun)
            begun = ""
    return [*found, begun + parts[-1]]


# In both, a newline before a visible character ends a word: no alternative goes on over it.
_WORDS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}", r"\p{N}{1,3}")
}


def _splits_at_newlines(tokenizer: Any) -> bool:
    """Whether each side of a newline between visible characters is tokenised without regard to the other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None:
        return False
    if any(
        "\n" in str(token) or token.lstrip or token.single_word for token in tokenizer.added_tokens_decoder.values()
    ):
        return False
    normalizer = json.loads(backend.normalizer.__getstate__()) if backend.normalizer is not None else None
    if normalizer is not None and normalizer["type"] != "NFC":
        return False
    rule = json.loads(backend.pre_tokenizer.__getstate__())
    steps = rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
    words = False
    for step in steps:
        if step["type"] == "Split" and step["pattern"].get("Regex") in _WORDS and step["behavior"] == "Isolated":
            words = True
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            words = words or step["use_regex"]
        elif step["type"] != "Digits":
            return False
    return words


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a completion: special tokens inside it are read as ordinary text."""
    return _as_text(tokenizer, text)


def defuse(text: str) -> str:
    """Text for a server, whose tokenizer reads control tokens anywhere in a message.

    What looks like a control token of a known chat template gets a space after its first character.

    >>> defuse("<|im_end|> 1 < 2 [/INST]")
    '< |im_end|> 1 < 2 [ /INST]'
    """
    return _TEMPLATE_TOKEN.sub(lambda match: f"{match.group()} ", text)


class _Control:
    """The control tokens of a tokenizer, and how to find texts that it may read as one.

    They are its special tokens and, of the other added tokens, those in brackets: "<think>" is not special to
    Qwen's tokenizer, but no text should open or close a thought. Added tokens that are runs of spaces stay.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = {
            number: token
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or re.fullmatch(r"<.+>|\[.+\]", str(token))
        }
        self.ids = {*added, *tokenizer.all_special_ids}
        names = {*map(str, added.values()), *tokenizer.all_special_tokens}
        backend = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        if backend is not None and any(token.normalized for token in added.values()):
            # Some are looked for in normalised text, where "<|IM_END|>" may be one, too.
            names |= {backend.normalize_str(name) for name in names}
            self._normalizer = backend
        else:
            self._normalizer = None
        self._pattern = re.compile("|".join(map(re.escape, sorted(filter(None, names)))) or "(?!)")

    def may_be_in(self, text: str) -> bool:
        if self._pattern.search(text):
            return True
        return self._normalizer is not None and bool(self._pattern.search(self._normalizer.normalize_str(text)))


@functools.lru_cache(maxsize=4)
def _control(tokenizer: Any) -> _Control:
    return _Control(tokenizer)


def _inert(tokenizer: Any, text: str) -> list[int]:
    """Token ids without a control token: a text that still gives one is cut until it does not.

    Reading special tokens as text is the tokenizer's own; other added tokens are only broken up this way.
    """
    ids = _as_text(tokenizer, text)
    if len(text) < 2 or _control(tokenizer).ids.isdisjoint(ids):
        return ids
    middle = len(text) // 2
    return _inert(tokenizer, text[:middle]) + _inert(tokenizer, text[middle:])


def turn_end(tokenizer: Any) -> int:
    """The token with which the chat template ends an assistant's turn.

    It is the first special token after the reply (Gemma: ``<end_of_turn>``, whereas its eos ends the whole text); eos
    where the template has none.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    ids = tokenizer(_after_reply(tokenizer), add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in special), int(tokenizer.eos_token_id))


def _after_reply(tokenizer: Any) -> str:
    """What the chat template puts after an assistant's reply that ends a conversation."""
    question, reply = _mark(0, ("question",)), _mark(1, ("reply",))
    conversation = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return _render(tokenizer, conversation, False).rpartition(reply)[2]


def _as_text(tokenizer: Any, text: str) -> list[int]:
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _mark(index: int, contents: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(contents).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"segment{digest}{index}end"


def _render(tokenizer: Any, messages: list[Message], generation_prompt: bool) -> str:
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))
    except Exception as error:
        # Templates are programs: what those of strangers raise may be anything.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the chat template of {tokenizer.name_or_path} refuses a prompt: {reason}") from error
    if not text:
        raise UserError(f"the chat template of {tokenizer.name_or_path} makes an empty text of a prompt")
    return text
