"""Loading: devices, precision, adapters and the revision of their base."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlaif.config import Dtype, LabelerConfig, LoraSettings, ModelConfig, SFTConfig, Tuning
from rlaif.methods.supervised import trainer_arguments
from rlaif.models import (
    adapter_base,
    arithmetic,
    autocasts,
    load_causal_lm,
    load_tokenizer,
    pick_device,
    pick_dtype,
    resolve_model,
)
from rlaif.policy import Policy, load_policy
from rlaif.records import UserError

TINY = ModelConfig(name="tiny", device="cpu")
SHORT = dataclasses.replace(TINY, dtype=Dtype.bfloat16)
LORA = LoraSettings(r=4, alpha=8)


def adapter(folder, config=TINY, fill=1e-3):
    policy = load_policy(config, Tuning.lora, LORA)
    with torch.no_grad():
        for name, value in policy.trainable():
            if "lora_B" in name:
                value.fill_(fill)
    policy.save(folder)
    return folder


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(20).unsqueeze(0)).logits.float()


@pytest.mark.parametrize("given_as", ["name", "adapter"])
def test_what_is_not_trained_keeps_its_adapter_beside_short_weights(tmp_path, given_as):
    """Merged into bfloat16, an update finer than the weights would be lost."""
    config = dataclasses.replace(SHORT, **{given_as: str(adapter(tmp_path))})
    model = load_causal_lm(config)
    base = load_causal_lm(SHORT)
    weights = dict(base.named_parameters())
    kept = {name.split("base_model.model.")[-1].replace(".base_layer", ""): v for name, v in model.named_parameters()}
    assert all(torch.equal(kept[name], value) for name, value in weights.items())
    assert not torch.equal(logits(model), logits(base))


def test_a_merged_start_is_merged_in_float32_and_then_rounded(tmp_path):
    folder = adapter(tmp_path, fill=0.05)
    exact = load_causal_lm(dataclasses.replace(TINY, adapter=str(folder)))
    start = load_causal_lm(dataclasses.replace(SHORT, adapter=str(folder)), merged=True)
    assert not hasattr(start, "peft_config")
    for (name, value), expected in zip(start.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(value, expected.to(torch.bfloat16)), name
    whole, plain = (dict(model.named_buffers()) for model in (start, load_causal_lm(SHORT)))
    assert {name: value.dtype for name, value in whole.items()} == {name: value.dtype for name, value in plain.items()}


def test_of_two_adapters_the_first_is_merged(tmp_path):
    first = adapter(tmp_path / "first", fill=0.05)
    second = adapter(tmp_path / "second", fill=-0.05)
    both = {"name": str(first), "adapter": str(second)}
    expected = logits(load_causal_lm(dataclasses.replace(TINY, **both)))
    torch.testing.assert_close(logits(load_causal_lm(dataclasses.replace(SHORT, **both))), expected, atol=0.3, rtol=0.1)


def test_a_policy_on_a_merged_start_is_saved_without_rounding(tmp_path):
    start = dataclasses.replace(SHORT, adapter=str(adapter(tmp_path / "sft", fill=0.05)))
    policy = load_policy(start, Tuning.lora, LORA)
    layer = next(module for module in policy.model.modules() if hasattr(module, "lora_B"))
    with torch.no_grad():
        for name, value in policy.trainable():
            value.fill_(1e-3 if "lora_B" in name else 0.01)
    expected = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
    Policy.save(policy, tmp_path / "policy")
    saved = load_causal_lm(dataclasses.replace(TINY, name=str(tmp_path / "policy"), dtype=Dtype.float32))
    weight = saved.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(weight, expected, atol=1e-7, rtol=1e-6)


def test_an_adapter_remembers_the_revision_of_its_base(tmp_path, monkeypatch):
    folder = adapter(tmp_path, dataclasses.replace(TINY, revision="v2"))
    assert adapter_base(folder) == (resolve_model("tiny"), "v2")
    asked = []
    plain = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda path, **o: asked.append(o["revision"]) or plain(path, **o)
    )
    load_causal_lm(dataclasses.replace(TINY, name=str(folder)))
    load_causal_lm(dataclasses.replace(TINY, name=str(adapter(tmp_path / "other")), revision="v1"))
    assert asked == ["v2", None, "v1"]


@pytest.mark.parametrize("value", [False, True, 3, 0.5, 'a "quoted" ü🙂\\n{{ x }} {% y %}', ""])
def test_variables_of_the_template_are_those_of_a_call(tmp_path, value):
    """And they go with the tokenizer wherever it is saved, once."""
    template = "\n  {% for m in messages %}<{{ m.content }}>\n{% endfor %}{% macro f() %}{{ switch }}{% endmacro %}"
    template += "{{ f() }}{{ switch is string }}"
    plain = load_tokenizer(ModelConfig(name="tiny"))
    plain.chat_template = template
    plain.save_pretrained(tmp_path / "plain")
    given = load_tokenizer(ModelConfig(name=str(tmp_path / "plain"), chat_template_kwargs={"switch": value}))
    given.save_pretrained(tmp_path / "given")
    saved = load_tokenizer(ModelConfig(name=str(tmp_path / "given")))
    again = load_tokenizer(ModelConfig(name=str(tmp_path / "given"), chat_template_kwargs={"switch": value}))
    messages = [{"role": "user", "content": "Hi"}]
    expected = plain.apply_chat_template(messages, tokenize=False, switch=value)
    for tokenizer in (given, saved, again):
        assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    assert saved.chat_template == again.chat_template


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"messages": "x"}, "'messages': is made here"),
        ({"a b": 1}, "'a b': is no name"),
        ({"a": [1]}, "must be true, false, a number or text"),
        ({"a": None}, "must be true, false, a number or text"),
    ],
)
def test_variables_that_no_template_could_take(variables, message):
    for config, where in ((ModelConfig, "policy"), (LabelerConfig, "labeler")):
        with pytest.raises(ValueError, match=rf"^{where}\.chat_template_kwargs: .*{message}"):
            config(chat_template_kwargs=variables)


def test_cuda_is_this_processs_gpu(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: 0)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pick_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("cuda") == torch.device("cuda", 3)
    assert pick_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("dtype", "able", "expected"),
    [
        (Dtype.auto, True, True),
        (Dtype.auto, False, False),
        (Dtype.float32, True, False),
        (Dtype.bfloat16, True, True),
    ],
)
def test_all_weights_train_in_bfloat16_where_that_is_asked_for_or_can_be(tmp_path, monkeypatch, dtype, able, expected):
    monkeypatch.delenv("RLAIF_AUTO_DTYPE")
    monkeypatch.setattr("rlaif.models.pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr("rlaif.methods.supervised.pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: able)
    start = ModelConfig(name="tiny", dtype=dtype)
    assert autocasts(start, Tuning.full) == expected
    assert not autocasts(start, Tuning.lora)
    assert arithmetic(start) is (torch.bfloat16 if expected else torch.float32)
    for tuning, value in {Tuning.full: expected, Tuning.lora: False}.items():
        assert trainer_arguments(SFTConfig(tuning=tuning), start, tmp_path, 0, 32)["bf16"] == value


def test_auto_is_bfloat16_on_a_cpu_that_multiplies_it_in_tiles(monkeypatch):
    monkeypatch.delenv("RLAIF_AUTO_DTYPE")
    for tiles, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda tiles=tiles: {"amx_bf16": tiles})
        assert pick_dtype(Dtype.auto, torch.device("cpu")) is expected
        assert pick_dtype(Dtype.float32, torch.device("cpu")) is torch.float32


def test_the_environment_says_what_auto_is(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setenv("RLAIF_AUTO_DTYPE", "float32")
    assert pick_dtype(Dtype.auto, torch.device("cpu")) is torch.float32
    monkeypatch.setenv("RLAIF_AUTO_DTYPE", "double")
    with pytest.raises(UserError, match="RLAIF_AUTO_DTYPE=double: unknown dtype; there are auto, float32"):
        pick_dtype(Dtype.auto, torch.device("cpu"))
    assert pick_dtype(Dtype.bfloat16, torch.device("cpu")) is torch.bfloat16


@pytest.mark.parametrize("rows", [1, 3])
def test_the_output_head_reads_rows_that_lie_side_by_side(monkeypatch, rows):
    """Else torch copies its weights for each row."""
    model, read = load_causal_lm(TINY), []
    head = model.get_output_embeddings()
    plain = head.forward
    monkeypatch.setattr(head, "forward", lambda states: read.append(states.stride()) or plain(states))
    ids = torch.arange(rows * 4).view(rows, 4)
    logits = model(input_ids=ids, logits_to_keep=1).logits
    size = model.config.hidden_size
    assert read == [(size, size, 1)]
    torch.testing.assert_close(logits[:, 0], model(input_ids=ids).logits[:, -1])


SAVE = """
import sys
from pathlib import Path
from peft import get_peft_model
from rlaif.config import LoraSettings, ModelConfig, Tuning
from rlaif.models import load_sequence_scorer, lora_config, save_model, seed_everything
from rlaif.policy import load_policy
from rlaif.preference_model import pm_identity

folder, start, lora = Path(sys.argv[1]), ModelConfig(name="tiny", device="cpu"), LoraSettings(r=2)
seed_everything(0)
load_policy(start, Tuning.lora, lora).save(folder / "policy")
scorer = load_sequence_scorer(start, new_head=True)
save_model(get_peft_model(scorer, lora_config(lora, scorer, "SEQ_CLS", ["score"])), folder / "pm")
print(pm_identity(folder / "pm")["preference_model_id"])
"""


def test_equal_adapters_make_equal_files(tmp_path: Path, command_env: dict[str, str]) -> None:
    """Whatever order a process keeps sets in: what hashes a folder must not see another one."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE, str(tmp_path / seed)],
            env=command_env | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    ids = []
    for process in started:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-4000:]
        ids.append(out.splitlines()[-1])
    assert ids[0] == ids[1]
    files = [
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "1", tmp_path / "2")
    ]
    assert {"policy/adapter_config.json", "pm/adapter_model.safetensors"} < files[0].keys()
    assert files[0] == files[1]


def test_any_of_several_processes_makes_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them is first is chance, and what it made stays in the cache."""
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.distributed.mixin._is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr("transformers.distributed.mixin._get_torch_distributed_rank", lambda: 1)
    assert (Path(resolve_model("tiny")) / "config.json").is_file()
    assert load_causal_lm(ModelConfig(name="tiny", device="cpu")).config.num_hidden_layers == 2
