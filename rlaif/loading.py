"""What can be wrong with a model that is to be loaded, in one line: folders are copied by halves, or are strangers'."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rlaif.records import UserError, bounded_examples, read_json


def name_key(key: str) -> str:
    """The configuration key that names the model of a config section."""
    return {"labeler": "labeler.model", "preference_model": "preference_model", "pm.model": "pm.model"}.get(
        key, f"{key}.name"
    )


def check_hub(path: str, revision: str | None, name: str | None, key: str) -> None:
    """One request before loading from the hub: the libraries try for a minute if it cannot be reached."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if Path(path).exists():
        return
    if Path(path).is_absolute():
        of = "" if path == name else f" {path}, which its adapter_config.json names as base_model_name_or_path"
        raise UserError(f"{key}={name}: no such folder{of}")
    try:
        if not isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
            HfApi().model_info(path, revision=revision, timeout=10)
    except (HfHubHTTPError, ValueError):
        return  # It can be reached; what is wrong is said best by what is loaded.
    except Exception as error:
        raise UserError(f"{key}={name}: no such folder, and the hub did not give it ({_reason(error)})") from None


@contextlib.contextmanager
def loading(name: str | None, key: str, base: str | None = None) -> Iterator[None]:
    """Turn a library's many ways of saying that it cannot load something into one line.

    Libraries take files by their word: what they raise on broken ones may be anything.

    Args:
        name: the model's name, which may be a folder.
        key: the setting that has it.
        base: where its weights really come from, if that is another place.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = _reason(error)
        folders = [Path(place) for place in dict.fromkeys((name, base)) if place and Path(place).is_dir()]
        broken = next(((folder, what) for folder in folders if (what := _broken_file(folder))), None)
        if broken is not None:
            where = "" if broken[0] == folders[0] else f"{broken[0]}: "
            why = f"{where}{broken[1]}; copy it anew"
        elif "trust_remote_code" in str(error):
            why = "it needs code that comes with the model; read it, then set trust_remote_code=true"
        elif folders:
            why = f"the folder does not hold a loadable model ({text})"
        else:
            why = f"no such folder, and the hub did not give it ({text})"
        raise UserError(f"{key}={name}: {why}") from error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    # What lookups and the interpreter itself raise says nothing without its kind.
    plain = isinstance(error, OSError | ValueError | RuntimeError) and not isinstance(error, RecursionError)
    return (text if plain and text else f"{type(error).__name__}: {text}")[:200]


_JSON_FILES = (
    *("config.json", "adapter_config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)


def _broken_file(folder: Path) -> str | None:
    """Which file of a folder is not even of its format, and in what way: an accident of copying, most of the time."""
    from safetensors import safe_open

    for file in (folder / name for name in _JSON_FILES):
        if not file.exists():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return f"{file.name} is not valid JSON"
        if not isinstance(found, dict):
            return f"{file.name} does not hold a JSON object"
    if (folder / "adapter_config.json").exists() and not any(folder.glob("adapter_model.*")):
        return "the adapter's weights (adapter_model.safetensors) are missing"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception:
            return f"{file.name} is cut, or no safetensors file"
    return None


def check_weights(found: Mapping[str, Any], but: str | None = None) -> None:
    """Refuse a model of whose weights transformers made some up: its files do not hold them, or of another shape.

    Args:
        found: what ``from_pretrained`` says of its loading.
        but: the module that may be new.

    Raises:
        ValueError: naming some of them.
    """

    def is_new(name: str) -> bool:
        return but is not None and name.split(".")[0] == but

    if lost := sorted(name for name in found["missing_keys"] if not is_new(name)):
        raise ValueError(f"its files lack {len(lost)} of its weights: {bounded_examples(lost, 2)}")
    if other := sorted(
        f"{name} is {tuple(held)}, not {tuple(wanted)}"
        for name, held, wanted in found["mismatched_keys"]
        if not is_new(name)
    ):
        raise ValueError(f"{len(other)} of its weights are not of the shape that config.json says: {other[0]}")


@contextlib.contextmanager
def whole_adapter() -> Iterator[None]:
    """Within the block, PEFT refuses an adapter whose file lacks some of its weights, of which it would only warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        yield


_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_MOST_LAYERS = 10_000


def check_layers(path: str) -> None:
    """Refuse a number of layers that fills the memory, which transformers does before it looks at the weights.

    Raises:
        ValueError: if ``config.json`` names one.
    """
    try:
        found = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # What is loaded next says it best.
    for key in _LAYERS if isinstance(found, dict) else ():
        if isinstance(found.get(key), int | float) and found[key] > _MOST_LAYERS:
            raise ValueError(f"config.json: {key} is more than {_MOST_LAYERS}")


def check_generation_config(path: str) -> None:
    """Refuse a broken ``generation_config.json``, which transformers passes over: it says where completions end.

    Raises:
        ValueError: if it is none.
    """
    file = Path(path) / "generation_config.json"
    if not file.exists():
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    ends = found["eos_token_id"] if isinstance(found, dict) and found.get("eos_token_id") is not None else []
    if not isinstance(found, dict) or not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends])):
        raise ValueError("generation_config.json: eos_token_id must be the number of a token, or a list of such")


def adapter_config(path: str | Path) -> Any:
    """PEFT's configuration of an adapter folder.

    Raises:
        UserError: if it is broken.
    """
    from peft import PeftConfig

    try:
        found = PeftConfig.from_pretrained(path)
        base = found.base_model_name_or_path
        if not isinstance(base, str) or not base:
            raise ValueError(f"base_model_name_or_path must name a model, not {json.dumps(base)}")
    except Exception as error:
        broken = _broken_file(Path(path))
        why = f"{broken}; copy it anew" if broken else f"not an adapter that peft can read ({_reason(error)})"
        raise UserError(f"{path}: {why}") from error
    return found


def json_object(file: Path, **kinds: type | tuple[type, ...]) -> Mapping[str, Any]:
    """A JSON file of ours with the keys that are needed of it, each of its kind.

    Raises:
        UserError: naming the file and the key.
    """
    found = read_json(file)
    for key, kind in kinds.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise UserError(
                f"{file}: is not what rlaif.train wrote: {key} is missing, or of another kind; copy it anew"
            )
    return found
