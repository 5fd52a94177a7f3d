"""What users get wrong: one line that says what, where and what would be right; exit status 2; nothing left over."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

TINY = "model@policy=tiny"
CONSTITUTION = """\
name: mine
version: 1
description: A test.
principles:
  - id: kind
    question: Which is kinder?
"""

# Files that the cases name, by file name: text of the file.
FILES = {
    "broken.jsonl": '{"prompt": "one"}\n{"prompt": "two"\n',
    "list.jsonl": '["one"]\n',
    "empty_prompt.jsonl": '{"prompt": "one"}\n{"prompt": "  "}\n',
    "no_prompt.jsonl": '{"text": "one"}\n',
    "duplicates.jsonl": '{"prompt": "one", "prompt_id": 7}\n{"prompt": "two", "prompt_id": "7"}\n',
    "role.jsonl": '{"prompt": [{"role": "human", "content": "one"}]}\n',
    "assistant_last.jsonl": '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    "nothing.jsonl": "",
    "alike.jsonl": '{"prompt": "one two"}\n{"prompt": "One, two!"}\n',
    "yaml.jsonl": "- prompt: [one\n",
    "many_completions.jsonl": json.dumps({"prompt": "one", "completions": [f"text {n}" for n in range(27)]}) + "\n",
    "one_completion.jsonl": '{"prompt": "one", "completions": ["a"]}\n',
    "no_completions.jsonl": '{"prompt": "one"}\n',
    "constitution_key.yaml": CONSTITUTION + "    wieght: 2\n",
    "constitution_yaml.yaml": CONSTITUTION + "  - id: [open\nname: x\n",
    "constitution_plain.yaml": CONSTITUTION,
    "constitution_weight.yaml": CONSTITUTION + "    weight: heavy\n",
    "p_chosen/train.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c", "p_chosen": 2}\n',
    "no_rejected/train.jsonl": '{"prompt": "a", "chosen": "b"}\n',
    "human/train.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c", "feedback": "human"}\n',
    "no_split/other.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "empty_split/train.jsonl": "\n",
    "not_parquet/train.parquet": "no\n",
    "not_a_model/readme.txt": "no\n",
}

SAMPLE = ["prompts={inputs}/prompts.jsonl", TINY]
LABEL = ["candidates={inputs}/candidates.jsonl", "constitution=warm", "labeler=scripted"]
TRAIN = ["preferences={inputs}/preferences", "feedback=human", TINY, "eval.enabled=false", "method=dpo"]
RUN = ["experiment=smoke"]
REPORT: list[str] = []
OPENAI = [*LABEL[:2], "labeler=openai"]

CASES = {
    # Configuration
    "unknown_key": ("train", [*TRAIN, "ppo.kl_coeff=0.1"], ["ppo.kl_coeff", "did you mean ppo.kl_coef"]),
    "unknown_top_level_key": ("label", [*LABEL, "constituton=warm"], ["constituton", "did you mean constitution"]),
    "unknown_experiment": ("run", ["experiment=smok"], ["experiment/smok", "smoke"]),
    "unknown_labeler": ("label", [*LABEL[:2], "labeler=gpt"], ["labeler/gpt", "scripted"]),
    "wrong_type": ("train", [*TRAIN, "ppo.iterations=many"], ["ppo.iterations", "many", "Integer"]),
    "wrong_choice": ("train", [*TRAIN, "method=raft"], ["method", "raft", "sft", "dpo"]),
    "wrong_boolean": ("train", [*TRAIN, "ppo.linear_decay=perhaps"], ["ppo.linear_decay", "perhaps"]),
    "fraction_above_one": ("sample", [*SAMPLE, "data.test_fraction=2"], ["data.test_fraction=2", "between 0 and 1"]),
    "nothing_to_train_on": (
        "sample",
        [*SAMPLE, "data.test_fraction=0.6", "data.validation_fraction=0.4"],
        ["data.validation_fraction + data.test_fraction", "below 1"],
    ),
    "negative_rate": ("train", [*TRAIN, "dpo.learning_rate=-1"], ["dpo.learning_rate=-1", "above 0"]),
    "not_a_multiple": ("train", [*TRAIN, "ppo.rollouts=10"], ["ppo.rollouts=10", "multiple"]),
    "sampler_over_4_bits": (
        "train",
        [*TRAIN, "ppo.sampler=vllm", "ppo.tuning=qlora"],
        ["ppo.sampler=vllm with ppo.tuning=qlora", "ppo.sampler=hf"],
    ),
    "sampler_not_installed": (
        "train",
        [*TRAIN, "method=ppo", "ppo.sampler=vllm", "ppo.vllm.python={here}/none"],
        ["ppo.vllm.python={here}/none", "no such file"],
    ),
    "sampler_nobody_serves": (
        "train",
        [*TRAIN, "method=ppo", "ppo.sampler=vllm", "ppo.vllm.url=http://127.0.0.1:1/v1"],
        ["ppo.vllm.url=http://127.0.0.1:1/v1", "cannot be reached"],
    ),
    "negative_seed": ("sample", [*SAMPLE, "seed=-1"], ["seed=-1", "between 0"]),
    "style_without_completions": ("sample", [*SAMPLE, "sampling.styles.plain.n=0"], ["n=0", "above 0"]),
    "not_an_override": ("sample", [*SAMPLE, "verbose"], ["verbose", "key=value"]),
    "broken_override": ("sample", [*SAMPLE, "seed=[1"], ["seed=[1"]),
    "sweep_without_m": ("train", [*TRAIN, "seed=1,2"], ["seed", "-m"]),
    "m_without_sweep": ("train", [*TRAIN, "-m"], ["-m", "seed=1,2,3"]),
    # Prompts
    "prompts_unset": ("sample", [TINY], ["prompts is not set", "prompts=FILE"]),
    "prompts_missing": ("sample", ["prompts=no.jsonl", TINY], ["prompts=no.jsonl", "no such file"]),
    "prompts_folder": ("sample", ["prompts={here}", TINY], ["prompts={here}", "is a folder, expected a file"]),
    "prompts_broken_line": ("sample", ["prompts={here}/broken.jsonl", TINY], ["broken.jsonl, line 2", "JSON"]),
    "prompts_not_objects": ("sample", ["prompts={here}/list.jsonl", TINY], ["list.jsonl, line 1", "JSON object"]),
    "prompts_empty_text": ("sample", ["prompts={here}/empty_prompt.jsonl", TINY], ["line 2", "prompt is empty"]),
    "prompts_no_prompt": ("sample", ["prompts={here}/no_prompt.jsonl", TINY], ["line 1", '"prompt"', "found: text"]),
    "prompts_duplicates": ("sample", ["prompts={here}/duplicates.jsonl", TINY], ["line 2", "'7'", "unique"]),
    "prompts_unknown_role": ("sample", ["prompts={here}/role.jsonl", TINY], ["line 1", "'human'", "assistant"]),
    "prompts_assistant_last": ("sample", ["prompts={here}/assistant_last.jsonl", TINY], ["line 1", "user turn"]),
    "prompts_empty_file": ("sample", ["prompts={here}/nothing.jsonl", TINY], ["nothing.jsonl", "no prompts"]),
    "prompts_too_few": (
        "run",
        [*RUN, "prompts={here}/alike.jsonl"],
        ["no prompt falls into the test split", "2 prompts make 1 groups of near-duplicates", "data.test_fraction=0.2"],
    ),
    "prompts_not_in_the_split": (
        "sample",
        ["prompts={here}/alike.jsonl", TINY, "sampling.splits=[test,validation]"],
        ["alike.jsonl: none of its prompts falls into sampling.splits=[test,validation]"],
    ),
    "prompts_yaml": ("run", [*RUN, "prompts={here}/yaml.jsonl"], ["yaml.jsonl, line 1", "not valid JSON"]),
    # Candidates, constitution and labeler
    "candidates_missing": ("label", ["candidates=no.jsonl", *LABEL[1:]], ["candidates=no.jsonl", "no such file"]),
    "candidates_one": ("label", ["candidates={here}/one_completion.jsonl", *LABEL[1:]], ["line 1", "at least 2"]),
    "candidates_none": ("label", ["candidates={here}/no_completions.jsonl", *LABEL[1:]], ["line 1", "completions"]),
    "constitution_unset": ("label", [LABEL[0], LABEL[2]], ["constitution is not set", "constitution=NAME"]),
    "constitution_unknown": ("label", [LABEL[0], LABEL[2], "constitution=nice"], ["constitution=nice", "harmless"]),
    "constitution_unknown_in_run": ("run", [*RUN, "constitution=nice"], ["constitution=nice", "harmless"]),
    "constitution_unknown_key": (
        "label",
        [LABEL[0], LABEL[2], "constitution={here}/constitution_key.yaml"],
        ["constitution_key.yaml, line 7", "wieght", "weight"],
    ),
    "constitution_bad_value": (
        "label",
        [LABEL[0], LABEL[2], "constitution={here}/constitution_weight.yaml"],
        ["constitution_weight.yaml, line 7", "weight must be a number", "heavy"],
    ),
    "constitution_not_yaml": (
        "label",
        [LABEL[0], LABEL[2], "constitution={here}/constitution_yaml.yaml"],
        ["constitution_yaml.yaml, line"],
    ),
    "contrast_without_texts": (
        "label",
        [LABEL[0], LABEL[2], "constitution={here}/constitution_plain.yaml", "labeling.mode=contrastive"],
        ["constitution mine", "encourage and discourage", "kind has none"],
    ),
    "contrast_by_api": (
        "label",
        [*OPENAI, "labeler.model=m", "labeling.mode=contrastive"],
        ["labeling.mode=contrastive needs labeler=hf or labeler=vllm"],
    ),
    "contrast_by_api_in_run": (
        "run",
        [*RUN, "labeler=openai", "labeler.model=m", "labeling.mode=contrastive"],
        ["labeling.mode=contrastive needs labeler=hf or labeler=vllm"],
    ),
    "list_too_long": (
        "label",
        [
            "candidates={here}/many_completions.jsonl",
            "data.test_fraction=0",
            "data.validation_fraction=0",
            *LABEL[1:],
            "labeling.mode=listwise",
        ],
        ["labeling.mode=listwise", "up to 26", "27"],
    ),
    "words_for_all_principles": (
        "label",
        [*LABEL, "labeling.mode=pointwise", "labeling.principles=together"],
        ["labeling.principles=together", "labeling.mode=score"],
    ),
    "labeler_unset": ("label", LABEL[:2], ["labeler is not set", "labeler=scripted"]),
    "labeler_model_unset": ("label", OPENAI, ["labeler.model is not set", "labeler=openai"]),
    "labeler_unknown_utility": ("label", [*LABEL, "labeler.scripted.utility=wit"], ["'wit'", "letters"]),
    "api_unreachable": (
        "label",
        [*OPENAI, "labeler.base_url=http://127.0.0.1:{closed_port}/v1", "labeler.model=m"],
        ["127.0.0.1:{closed_port}"],
    ),
    "api_no_key": (
        "label",
        [*OPENAI, "labeler.base_url=https://api.example.com/v1", "labeler.model=m"],
        ["OPENAI_API_KEY"],
    ),
    "api_bad_url": ("label", [*OPENAI, "labeler.base_url=localhost", "labeler.model=m"], ["labeler.base_url", "http"]),
    "gold_unknown": ("label", [*LABEL, "gold=taste"], ["'taste'", "vader"]),
    "gold_unknown_in_run": ("run", [*RUN, "gold=taste"], ["'taste'", "vader"]),
    "feedback_human_label": ("label", [*LABEL, "feedback=human"], ["feedback=human", "rlaif.train", "preferences=DIR"]),
    "annotator_without_gold": ("label", [*LABEL, "feedback=simulated_human"], ["gold=vader"]),
    # Training
    "method_unset": ("train", TRAIN[:-1], ["method is not set", "method=sft|critique_revision|pm|ppo|dpo"]),
    "policy_unset": ("train", [*TRAIN[:2], *TRAIN[3:]], ["policy.name is not set", "embedded"]),
    "preferences_unset": ("train", TRAIN[1:], ["preferences is not set", "preferences=DIR"]),
    "preferences_missing": ("train", [*TRAIN, "preferences=no"], ["preferences=no", "no such folder"]),
    "preferences_other_feedback": (
        "train",
        [*TRAIN, "preferences={here}/human", "feedback=ai"],
        ["human labels", "feedback=ai", "give feedback=human"],
    ),
    "preferences_feedback_unknown": (
        "train",
        [TRAIN[0], *TRAIN[2:]],
        ["do not say who labelled them", "give feedback=ai or feedback=human"],
    ),
    "drop_leaked_without_prompts": ("train", [*TRAIN, "drop_leaked=true"], ["drop_leaked=true", "give prompts=FILE"]),
    "preferences_no_split": ("train", [*TRAIN, "preferences={here}/no_split"], ["no_split", "train.parquet"]),
    "preferences_empty_split": ("train", [*TRAIN, "preferences={here}/empty_split"], ["empty_split", "empty"]),
    "preferences_bad_row": (
        "train",
        [*TRAIN, "preferences={here}/p_chosen"],
        ["train.jsonl, line 1", "p_chosen", "between 0 and 1"],
    ),
    "preferences_no_rejected": (
        "train",
        [*TRAIN, "preferences={here}/no_rejected"],
        ["train.jsonl, line 1", '"rejected"', "found: chosen, prompt"],
    ),
    "preferences_not_parquet": ("train", [*TRAIN, "preferences={here}/not_parquet"], ["train.parquet", "parquet"]),
    "prompts_unset_for_evaluation": (
        "train",
        [*TRAIN, "eval.enabled=true"],
        ["prompts is not set", "prompts=FILE", "eval.enabled=false"],
    ),
    "preference_model_missing": (
        "train",
        [*TRAIN, "method=ppo", "preference_model=no"],
        ["preference_model=no", "no such folder"],
    ),
    "preference_model_not_a_model": (
        "train",
        [*TRAIN, "method=ppo", "preference_model={here}/not_a_model"],
        ["preference_model={here}/not_a_model", "config.json"],
    ),
    # Models and devices
    "model_unknown_offline": (
        "train",
        [*TRAIN, "policy.name=nobody/no-such-model"],
        ["policy.name=nobody/no-such-model", "no such folder"],
    ),
    "model_folder_without_model": (
        "train",
        [*TRAIN, "policy.name={here}/not_a_model"],
        ["policy.name={here}/not_a_model", "does not hold a loadable model"],
    ),
    "device_missing": ("train", [*TRAIN, "policy.device=cuda"], ["device=cuda", "not available"]),
    # Other commands
    "evaluate_policy_unset": ("evaluate", ["prompts={inputs}/prompts.jsonl"], ["policy.name is not set"]),
    "evaluate_gold_unknown": (
        "evaluate",
        ["prompts={inputs}/prompts.jsonl", TINY, "eval.gold=taste"],
        ["'taste'", "vader"],
    ),
    "audit_comparisons_unset": ("audit", ["constitution=warm", "labeler=scripted"], ["comparisons is not set"]),
    "audit_compare_without_an_audit": (
        "audit",
        ["constitution=warm", "labeler=scripted", "comparisons={inputs}/preferences/train.jsonl", "compare=[{inputs}]"],
        ["compare=", "no comparisons.jsonl in it"],
    ),
    "audit_not_comparisons": (
        "audit",
        ["constitution=warm", "labeler=scripted", "comparisons={inputs}/prompts.jsonl"],
        ["prompts.jsonl, line 1", 'has no "response_a"'],
    ),
    "gate_without_pairs": (
        "label",
        ["candidates={inputs}/candidates.jsonl", "constitution=warm", "labeler=scripted", "labeler.min_agreement=0.6"],
        ["labeler.min_agreement=0.6", "labeler.audit=FILE"],
    ),
    "report_runs_missing": ("report", ["runs=[no/such]"], ["runs=no/such", "no such folder"]),
    "run_no_arms": ("run", [*RUN, "~arms"], ["arms"]),
    "run_human_without_preferences": (
        "run",
        [*RUN, "+arms.rlhf={{method: ppo, feedback: human}}"],
        ["feedback=human", "human_preferences=DIR"],
    ),
}


@pytest.fixture(scope="module")
def values(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the placeholders in the cases stand for."""
    here = tmp_path_factory.mktemp("bad")
    for name, text in FILES.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(text, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"here": str(here), "inputs": str(inputs), "closed_port": str(port)}


def check_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One ``error:`` line that holds all parts, and no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr[-4000:]
    assert "Traceback" not in result.stderr, result.stderr[-4000:]
    assert result.stderr.rstrip().splitlines()[-1] == lines[0], f"something follows the error:\n{result.stderr}"
    missing = [part for part in parts if part not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"


def left_over(folder: Path) -> list[str]:
    """Every file below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(case, values, run_command, tmp_path):
    command, overrides, expected = CASES[case]
    filled = [override.format(**values) for override in overrides]
    started = time.perf_counter()
    result = run_command(command, *filled, f"output_dir={tmp_path}/out", expect=2)
    assert time.perf_counter() - started < 30
    check_error(result, *(part.format(**values) for part in expected))
    assert left_over(tmp_path) == []


@pytest.mark.slow
def test_unknown_model_with_the_hub_allowed(run_command, inputs, tmp_path):
    """No hub is reachable through a dead proxy; the message must come soon all the same."""
    dead = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    started = time.perf_counter()
    result = run_command(
        "sample",
        f"prompts={inputs}/prompts.jsonl",
        "policy.name=nobody/no-such-model",
        f"output_dir={tmp_path}/out",
        env={**dead, "HF_HUB_OFFLINE": None},
        expect=2,
    )
    assert time.perf_counter() - started < 30
    check_error(result, "policy.name=nobody/no-such-model", "the hub")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("command", ["sample", "label", "audit", "train", "evaluate", "report", "run"])
def test_output_dir_unset(command, run_command):
    check_error(run_command(command, expect=2), "output_dir is not set", "output_dir=DIR")


def test_output_dir_is_a_file(run_command, inputs, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    result = run_command("sample", f"prompts={inputs}/prompts.jsonl", TINY, f"output_dir={file}", expect=2)
    check_error(result, f"output_dir={file}", "is a file, expected a folder")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("output", ["{file}/out", "/proc/rlaif/out"])
@pytest.mark.parametrize("command", ["sample", "label", "train", "run"])
def test_output_dir_cannot_be_written(command, output, values, run_command, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    overrides = {"sample": SAMPLE, "label": LABEL, "train": TRAIN, "run": RUN}[command]
    target = output.format(file=file)
    filled = [override.format(**values) for override in overrides]
    check_error(run_command(command, *filled, f"output_dir={target}", expect=2), "output_dir=", "cannot be written")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("command", ["sample", "label"])
def test_foreign_files_are_not_replaced(command, values, run_command, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    overrides = [override.format(**values) for override in {"sample": SAMPLE, "label": LABEL}[command]]
    result = run_command(command, *overrides, f"output_dir={tmp_path}", expect=2)
    check_error(result, f"output_dir={tmp_path}", "was not made by rlaif", "choose another")
    assert left_over(tmp_path) == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "size"),
    [("sample", "16k"), ("label", "64k"), ("train", "256k")],
)
def test_full_disk(command, size, values, run_command, tmp_path):
    """A disk that fills up in the middle of a stage. The mount is private to the command."""
    unshare = shutil.which("unshare")
    script = f'mount -t tmpfs -o size={size} none "{tmp_path}" && exec "$@"'
    prefix = (str(unshare), "-m", "sh", "-c", script, "sh")
    if unshare is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no private mounts here")
    overrides = {"sample": SAMPLE, "label": LABEL, "train": TRAIN}[command]
    filled = [override.format(**values) for override in overrides]
    check_error(run_command(command, *filled, f"output_dir={tmp_path}/out", prefix=prefix, expect=2))
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("command", ["sample", "label", "audit", "train", "evaluate", "report", "run"])
def test_help_is_fast_and_light(command, command_env, tmp_path):
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"rlaif.{command}", "--help"],
        env=command_env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.perf_counter() - started < 2
    assert result.returncode == 0
    assert f"python -m rlaif.{command}" in result.stdout
    assert "output_dir=DIR" in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "rlaif.cli" in imported
    heavy = {"torch", "vllm", "transformers", "datasets", "trl", "peft", "openai"}
    assert not imported & heavy


def test_an_error_in_one_job_of_a_sweep(run_command, inputs, tmp_path):
    """The failed job keeps its row and says why; the others go on; the status is 1."""
    result = run_command(
        "label",
        f"candidates={inputs}/candidates.jsonl",
        "labeler=scripted",
        "constitution=warm,nice,helpful",
        f"output_dir={tmp_path}",
        "-m",
        expect=1,
    )
    check_error(result, "1 job(s) of the sweep failed", "constitution=nice", "harmless")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"constitution={x}" for x in ("helpful", "nice", "warm")
    ]
    failed = json.loads((tmp_path / "constitution=nice" / "failed.json").read_text())
    assert "constitution=nice: no such constitution" in failed["error"]
    assert "constitution=nice" in failed["overrides"]
    for good in ("warm", "helpful"):
        assert (tmp_path / f"constitution={good}" / "labels.jsonl").is_file()
