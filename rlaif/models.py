"""Finding and loading models: hub names, folders, and those that need neither (:mod:`rlaif.bundled`)."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlaif.bundled import embedded_model, tiny_model
from rlaif.chat import DEFAULT_TEMPLATE, turn_end, with_variables
from rlaif.config import Dtype, LoraSettings, ModelConfig, Tuning
from rlaif.loading import (
    adapter_config,
    check_generation_config,
    check_hub,
    check_layers,
    check_weights,
    loading,
    name_key,
    whole_adapter,
)
from rlaif.lora import lean
from rlaif.records import UserError, bounded_examples

log = logging.getLogger("rlaif")


def resolve_model(name: str | None, key: str = "policy.name") -> str:
    """The folder or hub name behind a model name.

    Raises:
        UserError: if no name is given, or the embedded model is not installed.
    """
    if not name:
        raise UserError(f"{key} is not set: name a hub model, a folder, or `embedded` (SmolLM2-135M-Instruct)")
    if name == "embedded":
        return str(embedded_model())
    if name == "tiny":
        return str(tiny_model())
    return name


def pick_device(name: str) -> torch.device:
    """``auto`` is this process's GPU if there is one; so is ``cuda``, which gets its number.

    Raises:
        UserError: if the device does not exist here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        float(torch.zeros((), device=device))  # "meta" makes tensors and holds no numbers
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"device={name}: not available here ({reason})") from None
    return device


def pick_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """``auto`` is what ``$RLAIF_AUTO_DTYPE`` says, else bfloat16 where the hardware multiplies that faster.

    Those are GPUs that support it and CPUs with AMX, which multiply it several times as fast as float32; CPUs without
    are slower at it.

    Raises:
        UserError: if the environment variable names no dtype.
    """
    if dtype is Dtype.auto:
        named = os.environ.get("RLAIF_AUTO_DTYPE")
        if named and named not in list(Dtype):
            raise UserError(f"RLAIF_AUTO_DTYPE={named}: unknown dtype; there are {', '.join(Dtype)}")
        dtype = Dtype(named or Dtype.auto)
    if dtype is Dtype.auto:
        if device.type == "cpu":
            faster = bool(torch.cpu.get_capabilities().get("amx_bf16"))
        else:
            faster = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if faster else torch.float32
    return {
        Dtype.float32: torch.float32,
        Dtype.bfloat16: torch.bfloat16,
        Dtype.float16: torch.float16,
    }[dtype]


def arithmetic(config: ModelConfig) -> torch.dtype:
    """What a model's layers compute in: ``dtype``. Weights that train are float32, and 4-bit ones are packed."""
    return pick_dtype(config.dtype, pick_device(config.device))


def autocasts(config: ModelConfig, tuning: Tuning) -> bool:
    """Whether training computes in bfloat16 on float32 weights: all of them train, and ``dtype`` says bfloat16."""
    return tuning is Tuning.full and arithmetic(config) is torch.bfloat16


def check_tuning(tuning: Tuning, config: ModelConfig, method: str) -> None:
    """Fail early where a tuning cannot work.

    Raises:
        UserError: for all weights in float16; for QLoRA without a CUDA GPU or bitsandbytes, and for QLoRA on a policy
            that starts from an adapter.
    """
    if tuning is Tuning.full and arithmetic(config) is torch.float16:
        raise UserError(
            f"{method}.tuning=full with policy.dtype=float16: gradients in float16 underflow without loss scaling, "
            "which rlaif does not do; give policy.dtype=bfloat16 or float32"
        )
    if tuning is not Tuning.qlora:
        return
    key = f"{method}.tuning=qlora"
    if pick_device(config.device).type != "cuda":
        raise UserError(f"{key} needs a CUDA GPU, and there is none here; use {method}.tuning=lora")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{key} needs bitsandbytes: pip install bitsandbytes, or use {method}.tuning=lora")
    if config.adapter or is_adapter(config.name):
        raise UserError(f"{key} starts from a whole model, not from an adapter; use {method}.tuning=lora")


def load_tokenizer(config: ModelConfig, key: str = "policy") -> Any:
    """The tokenizer of a model, padding on the left, with a pad token and a chat template with its variables set.

    Raises:
        UserError: if there is none under that name.
    """
    from transformers import AutoTokenizer

    path = resolve_model(config.name, name_key(key))
    check_hub(path, config.revision, config.name, name_key(key))
    with loading(config.name, name_key(key)):
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ValueError("its tokenizer has no vocabulary")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name_key(key)}={config.name}: its tokenizer has no end token (eos), so nothing could end")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        log.warning("%s has no chat template: using the default one (User: / Assistant:)", config.name)
        tokenizer.chat_template = DEFAULT_TEMPLATE
    with loading(config.name, name_key(key)):
        template = tokenizer.get_chat_template()
    if config.chat_template_kwargs:
        tokenizer.chat_template = with_variables(template, config.chat_template_kwargs)
    return tokenizer


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that makes tokens which the model has no embeddings for, as another model's may.

    Raises:
        UserError: naming the tokenizer's folder.
    """
    embeddings = model.get_input_embeddings()
    # Added tokens that no text turns into may lie beyond (Gemma 3's of images).
    used = max(tokenizer.vocab_size - 1, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if embeddings is not None and used >= embeddings.num_embeddings:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has token {used}, but the model has {embeddings.num_embeddings} "
            "embeddings: it is another model's; copy the files of both anew"
        )


def context_length(config: ModelConfig) -> int | None:
    """How many tokens a causal language model takes at most; None where its configuration does not say."""
    from transformers import AutoConfig

    path, revision = resolve_model(config.name), config.revision
    if is_adapter(path):
        path, found = adapter_base(path)
        revision = found or revision
    check_hub(path, revision, config.name, "policy.name")
    with loading(config.name, "policy.name"):
        loaded = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=config.trust_remote_code)
    return getattr(loaded.get_text_config(), "max_position_embeddings", None)


def load_causal_lm(
    config: ModelConfig, key: str = "policy", trainable: bool = False, quantized: bool = False, merged: bool = False
) -> Any:
    """A causal language model in evaluation mode on its device, with its adapters.

    Adapters are merged, in float32. What is not trained further keeps the last one beside weights of a shorter float,
    into which its update would be rounded; a start of training has it merged, and is then rounded unless it trains.

    Args:
        config: the model.
        key: the section of the configuration that errors name.
        trainable: float32 weights, as all-weights training needs them: most steps are finer than a shorter float can
            hold beside the weight. Adapters merged.
        quantized: 4-bit weights, frozen, as QLoRA trains on them (Dettmers et al. 2023; see :func:`check_tuning`).
        merged: every adapter merged, as a start of training needs them.

    Raises:
        UserError: if it cannot be found or loaded.
    """
    from transformers import AutoModelForCausalLM

    device = pick_device(config.device)
    path, adapters = resolve_model(config.name, name_key(key)), []
    if is_adapter(path):
        adapters.append(path)
        path, revision = adapter_base(path)
        config = replace(config, revision=revision or config.revision)
    if config.adapter:
        if not is_adapter(config.adapter):
            raise UserError(f"{key}.adapter={config.adapter}: not a PEFT adapter folder")
        adapters.append(config.adapter)
    arguments = _load_arguments(config, device)
    if trainable:
        arguments["dtype"] = torch.float32
    if quantized:
        arguments |= _four_bit(config, device)
    dtype = arguments["dtype"]
    beside = adapters.pop() if adapters and dtype != torch.float32 and not (merged or trainable) else None
    if adapters:
        arguments["dtype"] = torch.float32
    check_hub(path, config.revision, config.name, name_key(key))
    with loading(config.name, name_key(key), path):
        check_layers(path)
        check_generation_config(path)
        model, found = AutoModelForCausalLM.from_pretrained(path, **arguments)
        check_weights(found)
    model = _with_whole_rows(model)
    for adapter in adapters:
        model = _with_adapter(model, adapter, config, key, merged=True)
    if adapters:
        _cast(model, dtype)
    if beside:
        model = lean(_with_adapter(model, beside, config, key))
    if trainable:
        # PEFT freezes what it adapts, and merging leaves it so.
        model.requires_grad_(True)
    return _frozen(model) if quantized else model.to(device).eval()


def _with_adapter(model: Any, folder: str, config: ModelConfig, key: str, merged: bool = False) -> Any:
    from peft import PeftModel

    with loading(folder, f"{key}.adapter" if folder == config.adapter else name_key(key)), whole_adapter():
        model = PeftModel.from_pretrained(model, folder)
        return model.merge_and_unload() if merged else model


def _with_whole_rows(model: Any) -> Any:
    """Let the output head read states that lie side by side; returns the model.

    Of the last positions of several rows torch would make a batch of products, and in bfloat16 copy the head's weights
    for each of them: on a CPU most of the time that labeling or a prompt takes.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_side_by_side)
    return model


def _side_by_side(head: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    # A single row is contiguous in torch's eyes whatever its strides say, and its products are not.
    return tuple(states.flatten(0, -2).contiguous().view(states.shape) for states in arguments)


def save_model(model: Any, folder: Path, **settings: Any) -> None:
    """Save a model, or its adapter, for anybody who uses transformers; equal ones make equal files.

    PEFT writes the sets of an adapter's configuration in the order of their hashes, which each process draws anew.
    """
    for config in getattr(model, "peft_config", {}).values():
        for name, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, name, sorted(value))
    model.save_pretrained(folder, **settings)


def merge(model: Any) -> Any:
    """The model with its adapter merged, in float32: a shorter float would round the update away."""
    _cast(model, torch.float32)
    return model.merge_and_unload()


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Turn weights to another precision; buffers, the frequencies of rotary positions among them, keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _four_bit(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """NF4 with double quantisation, as in Dettmers et al. (2023)."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=pick_dtype(config.dtype, device),
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def _frozen(model: Any) -> Any:
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False).eval()


def is_adapter(path: str | Path | None) -> bool:
    """Whether a model name is a folder with a PEFT adapter."""
    return path is not None and (Path(path) / "adapter_config.json").is_file()


def adapter_base(path: str | Path) -> tuple[str, str | None]:
    """Name or folder, and hub revision, of the model that an adapter was trained on.

    Raises:
        UserError: if its configuration is broken.
    """
    config = adapter_config(path)
    return resolve_model(config.base_model_name_or_path), config.revision


def _load_arguments(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "revision": config.revision,
        "dtype": pick_dtype(config.dtype, device),
        "trust_remote_code": config.trust_remote_code,
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # to say which
    }
    if config.attn_implementation:
        arguments["attn_implementation"] = config.attn_implementation
    return arguments


def load_sequence_scorer(
    config: ModelConfig, key: str = "policy", new_head: bool = False, quantized: bool = False
) -> Any:
    """A sequence-classification model with one output (a preference model), or a base given a new head.

    A folder with a PEFT adapter is loaded onto the base that the adapter names; under a new head the adapters of a
    policy are merged.

    Raises:
        UserError: if it cannot be found or loaded.
    """
    from transformers import AutoModelForSequenceClassification

    device = pick_device(config.device)
    path = base = resolve_model(config.name, name_key(key))
    if is_adapter(path):
        base, revision = adapter_base(path)
        config = replace(config, revision=revision or config.revision)
    arguments = _load_arguments(config, device) | {"num_labels": 1}
    if quantized:
        arguments |= _four_bit(config, device)
    check_hub(base, config.revision, config.name, name_key(key))
    with loading(config.name, name_key(key), base):
        check_layers(base)
        model, found = AutoModelForSequenceClassification.from_pretrained(base, **arguments)
        # The head of an adapter's base is new, and the adapter's own takes its place.
        check_weights(found, but="score" if new_head or is_adapter(path) else None)
    if is_adapter(path) and not new_head:
        model = lean(_with_adapter(model, path, config, key))
    if new_head and (is_adapter(path) or config.adapter):
        # The adapters of a policy fit a language model only; what they make of its body is taken over.
        model.base_model.load_state_dict(load_causal_lm(config, key, merged=True).base_model.state_dict())
    if not hasattr(inner(model), "score"):
        raise UserError(
            f"{name_key(key)}={config.name}: transformers has no sequence classifier with a `score` head for "
            f"{type(inner(model)).__name__}; give another base with pm.model=MODEL"
        )
    if quantized:
        model = _frozen(model)
    if new_head:
        # A zero head starts every pair at p = 0.5 and makes the start independent of the seed.
        with torch.no_grad():
            for parameter in model.score.parameters():
                parameter.zero_()
    return model if quantized else model.to(device).eval()


def inner(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper (whose layers are replaced in place), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lora_config(
    settings: LoraSettings,
    model: Any,
    task: str,
    modules_to_save: list[str] | None = None,
    revision: str | None = None,
) -> Any:
    """PEFT's configuration for a LoRA adapter on ``model``.

    ``task`` is ``CAUSAL_LM`` or ``SEQ_CLS``; ``revision`` the hub revision of ``model``, by which it is found again.

    Raises:
        UserError: if ``lora.target_modules`` names what the model has no linear layers of, or ``lora.r`` is above the
            rank that any of them can have.
    """
    from peft import LoraConfig

    names = settings.target_modules or _linear_names(model)
    unknown = [name for name in names if not _adaptable(model, name)]
    if unknown:
        raise UserError(
            f"lora.target_modules: the model has no linear layer named {bounded_examples(unknown)}; it has "
            f"{', '.join(_linear_names(model))}"
        )
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    if width is not None and settings.r > width:
        raise UserError(f"lora.r={settings.r}: the model's layers have at most rank {width}, its hidden size")
    layers = None
    if settings.top_layers < 1:
        depth = model.config.get_text_config().num_hidden_layers
        first = round(depth * (1 - settings.top_layers))
        layers = list(range(min(first, depth - 1), depth))
    return LoraConfig(
        task_type=task,
        revision=revision,
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=names,
        layers_to_transform=layers,
        modules_to_save=modules_to_save,
    )


def _adaptable(model: Any, name: str) -> bool:
    """Whether all layers of a name, of which there are some, are of a kind that LoRA adapts."""
    named = [module for path, module in model.named_modules() if f".{path}".endswith(f".{name}")]
    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return bool(named) and all(isinstance(each, kinds) or type(each).__name__ == "Conv1D" for each in named)


def _linear_names(model: Any) -> list[str]:
    heads = {"lm_head", "score", "classifier", "embed_out"}
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    }
    return sorted(names - heads)


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: eos, the template's end of a turn, and those of the generation config.

    Raises:
        UserError: if the tokenizer is another model's.
    """
    check_vocabulary(model, tokenizer)
    ids = {tokenizer.eos_token_id, turn_end(tokenizer)}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids |= set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return sorted(token for token in ids if token is not None)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    from transformers import set_seed

    set_seed(seed)
