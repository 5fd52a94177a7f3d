"""Model folders and adapters as accidents and strangers leave them, made by damaging good ones."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], None]


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda file: (file.write_bytes(change(file.read_bytes())), None)[1]


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


ANY_FILE: dict[str, Callable[[Path], None]] = {
    "gone": Path.unlink,
    "empty": _bytes(lambda old: b""),
    "half": _bytes(lambda old: old[: len(old) // 2]),
    "nul": _bytes(lambda old: b"\0" * len(old)),
    "words": _bytes(lambda old: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "latin": _bytes(lambda old: b'{"a": "\xff\xfe"}'),
    "folder": _folder,
}
"""What befalls a file of any kind."""
ANY_JSON = {
    "list": _bytes(lambda old: b"[1, 2]"),
    "null": _bytes(lambda old: b"null"),
    "number": _bytes(lambda old: b"7"),
    "deep": _bytes(lambda old: b"[" * 50_000 + b"]" * 50_000),
}
"""JSON of another kind than is expected."""


def _keys(**changes: Any) -> Callable[[Path], None]:
    """Other values in a JSON object; a key with ``...`` is taken out."""

    def change(file: Path) -> None:
        old = json.loads(file.read_text(encoding="utf-8"))
        new = {key: value for key, value in {**old, **changes}.items() if value is not ...}
        file.write_text(json.dumps(new), encoding="utf-8")

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda file: save_file(change(load_file(file)), file, metadata={"format": "pt"})


def _some(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(tensors.items())[: len(tensors) // 2])


CONFIG = {
    "dtype_unknown": {"dtype": "float17"},
    "dtype_number": {"dtype": 3},
    "type_unknown": {"model_type": "tapir"},
    "type_missing": {"model_type": ...},
    "type_of_images": {"model_type": "vit"},
    "architecture_unknown": {"architectures": ["TapirForCausalLM"], "model_type": "tapir"},
    "hidden_size_other": {"hidden_size": 64},
    "hidden_size_text": {"hidden_size": "many"},
    "hidden_size_null": {"hidden_size": None},
    "hidden_size_negative": {"hidden_size": -4},
    "vocab_smaller": {"vocab_size": 100},
    "vocab_larger": {"vocab_size": 300},
    "layers_more": {"num_hidden_layers": 3},
    "layers_huge": {"num_hidden_layers": 10**23},
    "layers_text": {"num_hidden_layers": "two"},
    "heads_zero": {"num_attention_heads": 0},
    "heads_odd": {"num_attention_heads": 5, "head_dim": ...},
    "activation_unknown": {"hidden_act": "wobble"},
    "rope_unknown": {"rope_parameters": {"rope_type": "twist", "rope_theta": 1e4}},
    "rope_text": {"rope_parameters": "wide"},
    "remote_code": {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
                    "model_type": "tapir"},
    "quantized_unknown": {"quantization_config": {"quant_method": "squash"}},
    "quantized_list": {"quantization_config": [1]},
    "eos_text": {"eos_token_id": "end"},
}  # fmt: skip
GENERATION = {
    "eos_text": {"eos_token_id": "end"},
    "eos_mixed": {"eos_token_id": [258, "end"]},
    "eos_nested": {"eos_token_id": [[258]]},
    "eos_object": {"eos_token_id": {"a": 1}},
    "temperature_text": {"do_sample": True, "temperature": "hot"},
}
TOKENIZER = {
    "model_missing": {"model": ...},
    "model_unknown": {"model": {"type": "Tapir"}},
    "vocab_list": {"model": {"type": "BPE", "vocab": [], "merges": []}},
    "vocab_empty": {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []},
    "version_unknown": {"version": "9.0"},
}  # fmt: skip
TOKENIZER_CONFIG = {
    "class_unknown": {"tokenizer_class": "TapirTokenizer", "backend": ...},
    "eos_unset": {"eos_token": None},
    "eos_number": {"eos_token": 7},
    "length_text": {"model_max_length": "long"},
    "template_number": {"chat_template": 7},
    "templates_without_default": {"chat_template": [{"name": "tools", "template": "x"}]},
}
TEMPLATES = {
    "syntax": "{% for message in messages %}{{ message.content }",
    "raises": "{{ raise_exception('system messages are not supported') }}",
    "type_error": "{{ 1 + 'a' }}",
    "zero_division": "{{ 1 / 0 }}",
    "index_error": "{{ messages[7].content }}",
    "undefined_attribute": "{{ messages[0].a.b.c }}",
    "include": "{% include 'other.jinja' %}",
    "import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "escape": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "unknown_filter": "{{ messages | wobble }}",
    "unknown_function": "{{ wobble(messages) }}",
    "value_error": "{{ 'a' | int(base=99) }}{{ '%d' | format('a') }}",
    "overflow": "{{ 'a' * 9999999999999999999999 }}",
    "nothing": "{{ messages.__class__ }}",
}
ADAPTER = {
    "peft_type_unknown": {"peft_type": "TAPIR"},
    "peft_type_missing": {"peft_type": ...},
    "peft_type_number": {"peft_type": 7},
    "base_missing": {"base_model_name_or_path": ...},
    "base_null": {"base_model_name_or_path": None},
    "base_number": {"base_model_name_or_path": 7},
    "base_gone": {"base_model_name_or_path": "/no/such/model"},
    "rank_other": {"r": 3},
    "rank_zero": {"r": 0},
    "rank_text": {"r": "high"},
    "targets_unknown": {"target_modules": ["nothing"]},
    "targets_null": {"target_modules": None},
    "targets_number": {"target_modules": 7},
    "targets_other": {"target_modules": ["q_proj"]},
    "layers_text": {"layers_to_transform": "top"},
    "task_unknown": {"task_type": "TAPIR"},
}


def model_damages() -> Iterator[tuple[str, Damage]]:
    """Of a whole model's folder, by name."""
    files = {name: name.removesuffix(".json").removesuffix(".jinja") for name in (
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja")}  # fmt: skip
    yield from _of_files(files)
    yield from _of_keys("config.json", CONFIG)
    yield from _of_keys("generation_config.json", GENERATION)
    yield from _of_keys("tokenizer.json", TOKENIZER)
    yield from _of_keys("tokenizer_config.json", TOKENIZER_CONFIG)
    yield "tokenizer: of a larger model", _larger_vocabulary
    for name, template in TEMPLATES.items():
        yield f"template: {name}", lambda folder, t=template: (folder / "chat_template.jinja").write_text(t)  # type: ignore[misc]
    yield "weights: some", lambda folder: _tensors(_some)(folder / "model.safetensors")
    yield "weights: none", lambda folder: _tensors(lambda _: {})(folder / "model.safetensors")
    yield (
        "weights: of another model",
        lambda folder: _tensors(lambda _: {"a.weight": torch.ones(2, 2)})(folder / "model.safetensors"),
    )
    yield "weights: a pickle", lambda folder: _as_pickle(folder, "model.safetensors", "pytorch_model.bin")
    yield "weights: a shard is missing", _lost_shard


def adapter_damages() -> Iterator[tuple[str, Damage]]:
    """Of an adapter's folder, by name."""
    yield from _of_files({"adapter_config.json": "adapter_config", "adapter_model.safetensors": "adapter_model"})
    yield from _of_keys("adapter_config.json", ADAPTER)
    yield "adapter weights: some", lambda folder: _tensors(_some)(folder / "adapter_model.safetensors")
    yield "adapter weights: none", lambda folder: _tensors(lambda _: {})(folder / "adapter_model.safetensors")
    yield (
        "adapter weights: a pickle",
        lambda folder: _as_pickle(folder, "adapter_model.safetensors", "adapter_model.bin"),
    )


def pm_damages() -> Iterator[tuple[str, Damage]]:
    """Of the files that only a preference model has."""
    yield from _of_files({"calibration.json": "calibration"}, ANY_JSON)
    yield "ensemble: a list", lambda folder: (folder / "ensemble.json").write_text("[1]") and None
    yield "ensemble: cut", lambda folder: (folder / "ensemble.json").write_text('{"members": ["m') and None
    yield "ensemble: without members", lambda folder: (folder / "ensemble.json").write_text("{}") and None
    yield "ensemble: of none", lambda folder: (folder / "ensemble.json").write_text('{"members": []}') and None
    yield "ensemble: member gone", lambda folder: (folder / "ensemble.json").write_text('{"members": ["m"]}') and None
    yield (
        "head: gone",
        lambda folder: _tensors(lambda found: {name: value for name, value in found.items() if "score" not in name})(
            folder / "adapter_model.safetensors"
        ),
    )


def _of_files(files: Mapping[str, str], json_kinds: Mapping[str, Callable[[Path], None]] = ANY_JSON) -> Any:
    for file, short in files.items():
        kinds = {**ANY_FILE, **(json_kinds if file.endswith(".json") else {})}
        for name, damage in kinds.items():
            yield f"{short}: {name}", lambda folder, d=damage, f=file: d(folder / f)


def _of_keys(file: str, cases: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Damage]]:
    for name, changes in cases.items():
        yield (
            f"{file.removesuffix('.json')}: {name}",
            lambda folder, c=changes: _keys(**c)(folder / file),  # type: ignore[misc]
        )


def _larger_vocabulary(folder: Path) -> None:
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = found["model"]["vocab"]
    vocabulary |= {f"\u0120{number}": len(vocabulary) + number for number in range(100)}
    for place, token in enumerate(found["added_tokens"]):
        token["id"] = len(vocabulary) + place
    file.write_text(json.dumps(found), encoding="utf-8")


class Alarm:
    """What a pickle runs where it is read."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("code-was-run"),))


def _as_pickle(folder: Path, old: str, new: str) -> None:
    (folder / old).unlink()
    (folder / new).write_bytes(pickle.dumps(Alarm()))


def _lost_shard(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00002-of-00002.safetensors")}
    shutil.move(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
