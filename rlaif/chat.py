"""Messages -> token ids, with text from outside never turning into control tokens."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from rlaif.records import Message, UserError

# For base models without a template of their own; documented in docs/train.md.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'system': '', 'user': 'User: ', 'assistant': 'Assistant: '}[message['role']] }}"
    "{{ message['content'] }}{{ '\\n\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def encode_chat(
    tokenizer: Any, messages: Sequence[Message], stem: str = "", generation_prompt: bool = True
) -> list[int]:
    """Token ids of a conversation up to the point where the assistant's reply starts, then ``stem``.

    ``generation_prompt=False`` stops after the last message instead.

    The template is rendered once and tokenised without a second BOS. Where a message contains the text of a
    special token ("<|im_end|>"), the template's own parts and the messages are tokenised apart, and in the
    messages special tokens are read as ordinary text.

    Raises:
        UserError: if the template refuses the conversation.
    """
    contents = [message["content"] for message in messages]
    specials = [token for token in tokenizer.all_special_tokens if token]
    specials += [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    hostile = any(special in content for special in set(specials) for content in [*contents, stem])
    if not hostile:
        text = _render(tokenizer, list(messages), generation_prompt) + stem
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    marks = [_mark(index, contents) for index in range(len(messages))]
    masked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    # The template may drop a message, move it or show it twice.
    texts = dict(zip(marks, contents, strict=True))
    ids: list[int] = []
    for part in re.split(f"({'|'.join(marks)})", _render(tokenizer, masked, generation_prompt)):
        if part in texts:
            ids += _as_text(tokenizer, texts[part])
        else:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids + _as_text(tokenizer, stem)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a completion: special tokens inside it are read as ordinary text."""
    return _as_text(tokenizer, text)


def _as_text(tokenizer: Any, text: str) -> list[int]:
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _mark(index: int, contents: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(contents).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"segment{digest}{index}end"


def _render(tokenizer: Any, messages: list[Message], generation_prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))
    except TemplateError as error:
        raise UserError(f"the chat template of {tokenizer.name_or_path} refuses a prompt: {error}") from None
