"""Small tokenizers built as those of well-known model families are, each with the control tokens of its template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """What a family's tokenizer is made of."""

    template: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    """Control tokens that the tokenizer does not call special."""
    normalizer: Any = None
    metaspace: bool = False


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = {
    "qwen": Family(
        CHATML,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"),
        normalizers.NFC(),
    ),
    "llama3": Family(
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "llama2": Family(
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
        ("<s>", "</s>", "<unk>"),
        metaspace=True,
    ),
    "mistral": Family(
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
    ),
    "gemma": Family(
        "<bos>{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        metaspace=True,
    ),
    "deepseek": Family(
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>{% for m in messages %}<\uff5c{{ m.role | capitalize }}\uff5c>"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<\uff5cAssistant\uff5c><think>\n{% endif %}",
        ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
        ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>"),
    ),
}
# One that looks for its control tokens in normalised text: <|IM_END|> is one, and so are full-width forms.
FOLDING = Family(CHATML, ("<|im_start|>", "<|im_end|>"), ("<think>",), normalizers.Sequence([normalizers.NFKC()]))


def build(family: Family, fold: bool = False) -> Any:
    """The tokenizer: one token a byte, and the family's control tokens."""
    letters = sorted({*pre_tokenizers.ByteLevel.alphabet(), "\u2581"})
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if family.metaspace:
        steps.insert(0, pre_tokenizers.Metaspace(prepend_scheme="first"))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    if family.normalizer is not None:
        core.normalizer = family.normalizer
    core.add_special_tokens([AddedToken(token, special=True, normalized=fold) for token in family.special])
    core.add_tokens([AddedToken(token, special=False, normalized=fold) for token in family.added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=family.special[-1])
    tokenizer.chat_template = family.template
    return tokenizer


def control_ids(tokenizer: Any, ids: list[int], family: Family) -> list[int]:
    """Those of the ids that are control tokens of the family, in order."""
    control = set(tokenizer.convert_tokens_to_ids([*family.special, *family.added]))
    return [token for token in ids if token in control]
