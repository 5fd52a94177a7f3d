"""Tiny models with random weights of the families that people use, each with a chat template of its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
    "+ '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
_GLM = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Family: chat template, special tokens (bos, eos, others), and the token with which a turn ends.
FAMILIES: dict[str, tuple[str | None, tuple[str | None, str, tuple[str, ...]], str]] = {
    "llama": (_LLAMA, ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")), "<|eot_id|>"),
    "smollm3": (_CHATML, (None, "<|im_end|>", ("<|im_start|>",)), "<|im_end|>"),
    "qwen2": (_CHATML, (None, "<|endoftext|>", ("<|im_start|>", "<|im_end|>")), "<|im_end|>"),
    "qwen3": (_CHATML, (None, "<|im_end|>", ("<|im_start|>",)), "<|im_end|>"),
    "mistral": (_MISTRAL, ("<s>", "</s>", ("[INST]", "[/INST]")), "</s>"),
    "gemma": (_GEMMA, ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")), "<end_of_turn>"),
    "gemma2": (_GEMMA, ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")), "<end_of_turn>"),
    "gemma3_text": (_GEMMA, ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")), "<end_of_turn>"),
    "phi3": (_PHI, (None, "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>")), "<|end|>"),
    "glm": (_GLM, (None, "<|endoftext|>", ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>")), "<|endoftext|>"),
    "glm4": (_GLM, (None, "<|endoftext|>", ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>")), "<|endoftext|>"),
    "bloom": (None, ("<s>", "</s>", ()), "</s>"),
    "gpt_neox": (None, (None, "<|endoftext|>", ()), "<|endoftext|>"),
}


def family(name: str, folder: Path) -> Path:
    """Save a model of a family, with its tokenizer, into ``folder``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    template, (bos, eos, others), _ = FAMILIES[name]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Another order than that of the tiny model: equal ids would hide a mix-up of tokenizers.
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters[::-1])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", bos, eos, *others) if token])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token="<pad>")
    tokenizer.chat_template = template
    arguments: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if name == "bloom":
        arguments |= {"n_layer": 2, "n_head": 4}
    if name in ("bloom", "gpt_neox"):
        for key in ("num_key_value_heads", "head_dim"):
            del arguments[key]
    if name == "bloom":
        for key in ("intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            del arguments[key]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **arguments))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
