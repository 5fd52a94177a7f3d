"""Two processes train what one process trains with the same batches."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from preloaded import TIMEOUT, Preloaded
from safetensors.torch import load_file

from rlaif.labeling.store import STORE, VerdictStore
from rlaif.locks import exclusive

REPO = Path(__file__).parents[2]
COMMON = ["policy.name=tiny", "policy.device=cpu", "feedback=human", "eval.enabled=false"]
REWARD = ["reward=labeler", "constitution=warm", "labeler=scripted", "labeler.scripted.utility=letters"]
PPO = [
    *REWARD,
    *("ppo.iterations=4", "ppo.rollouts=8", "ppo.minibatch_size=4", "ppo.max_new_tokens=8", "ppo.learning_rate=1e-3"),
    "ppo.lora.r=4",
]


def arguments(method: str, inputs: Path, output: Path, batch_size: int) -> list[str]:
    own = [f"{method}.batch_size={batch_size}", f"{method}.max_steps=4", f"{method}.learning_rate=1e-3"]
    own += [f"{method}.tuning=full"] if method == "sft" else [f"{method}.lora.r=4"]
    if method in ("rloo", "grpo"):
        own += [*REWARD, f"{method}.generations=4", f"{method}.max_new_tokens=8", f"prompts={inputs}/prompts.jsonl"]
    # Nothing is held out for the PM: batches are full, so two processes have the same.
    own += ["data.validation_fraction=0"]
    return [*COMMON, f"method={method}", f"preferences={inputs}/mixed", f"output_dir={output}", *own]


@pytest.fixture(scope="module", autouse=True)
def systems(inputs: Path) -> None:
    """Preferences of which most, or all, share a system message: some, or all, batches of one process begin alike."""
    lines = [json.loads(line) for line in (inputs / "preferences" / "train.jsonl").read_text().splitlines()]
    for name, without in (("mixed", (3, 9)), ("alike", ())):
        (inputs / name).mkdir()
        with (inputs / name / "train.jsonl").open("w", encoding="utf-8") as file:
            for number, line in enumerate(lines):
                system = [] if number in without else [{"role": "system", "content": "Answer in one short sentence."}]
                prompt = [*system, {"role": "user", "content": line["prompt"]}]
                file.write(json.dumps(line | {"prompt": prompt}) + "\n")


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ACCELERATE = ["accelerate.commands.launch", "--main_process_port=0"]
FLAGS = [*ACCELERATE, "--multi_gpu", "--num_processes=2"]
TRAIN = ["-m", "rlaif.train"]
SPREAD_ON_CPU = str(Path(__file__).with_name("spread_on_cpu.py"))
# Writes down what a launcher gives a process.
ENVIRONMENT = """
import json, os, sys
with open(os.path.join(sys.argv[1], os.environ["RANK"]), "w") as file:
    json.dump(dict(os.environ), file)
"""


def launch(
    env: dict[str, str], *overrides: str, expect: int = 0, by: Sequence[str] = FLAGS, what: Sequence[str] = TRAIN
) -> str:
    """Two processes from scratch, by a launcher."""
    result = subprocess.run(
        [sys.executable, "-m", *by, *what, *overrides],
        env=env,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (result.returncode == 0) == (expect == 0), result.stderr[-4000:]
    return result.stderr


@pytest.fixture(scope="module")
def forked(
    command_env: dict[str, str], preloaded: Preloaded, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """As ``launch``, in processes that have the libraries: in the environments that the launcher gives its own."""
    known: dict[tuple[str, ...], list[dict[str, str]]] = {}

    def environments(by: Sequence[str]) -> list[dict[str, str]]:
        # What a launcher's file says counts, not its name.
        key = tuple(Path(part[len("--config_file=") :]).read_text() if "config_file" in part else part for part in by)
        if key not in known:
            folder = tmp_path_factory.mktemp("environments")
            script = folder / "environment.py"
            script.write_text(ENVIRONMENT, encoding="utf-8")
            launch(command_env, str(folder), by=by, what=[str(script)])
            given = [json.loads((folder / str(rank)).read_text(encoding="utf-8")) for rank in (0, 1)]
            known[key] = [
                # The launcher is no longer there to be met by its processes.
                {name: value for name, value in each.items() if not name.startswith("TORCHELASTIC_")}
                for each in given
            ]
        return known[key]

    def run(*overrides: str, by: Sequence[str] = FLAGS, what: str = "train") -> str:
        ended = preloaded.run_group(what, list(overrides), environments(by))
        said = "".join(process.stderr for process in ended)
        assert [process.returncode for process in ended] == [0, 0], said[-4000:]
        return said

    return run


@pytest.fixture(scope="module")
def alone(
    inputs: Path, run_command: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """What one process makes of such settings, made once: its output folder."""
    folders: dict[tuple[str, ...], Path] = {}

    def run(method: str, *own: str) -> Path:
        if (method, *own) not in folders:
            folder = tmp_path_factory.mktemp("one")
            run_command("train", *arguments(method, inputs, folder, 8), *own)
            folders[method, *own] = folder
        return folders[method, *own]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "pm", "dpo", "rloo", "grpo"])
def test_two_processes_are_one_with_twice_the_batch(
    method: str, inputs: Path, forked: Callable[..., str], alone: Callable[..., Path], tmp_path: Path
) -> None:
    folders = alone(method), tmp_path
    forked(*arguments(method, inputs, tmp_path, 4))
    close(*(folder / result_of(method) for folder in folders))
    provenance = json.loads((tmp_path / method / "provenance.json").read_text())
    assert provenance["config"]["processes"] == 2
    curves = [
        [json.loads(line) for line in (folder / method / "training.jsonl").read_text().splitlines()]
        for folder in folders
    ]
    assert len(curves[0]) == len(curves[1]) == 4
    losses = [[line["loss"] for line in curve] for curve in curves]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    if method in ("rloo", "grpo"):
        scores = [[line["score"] for line in curve] for curve in curves]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    else:
        assert losses[0][-1] < losses[0][0]
    assert not list(tmp_path.rglob(".*"))


def result_of(method: str) -> str:
    return "pm/preference_model" if method == "pm" else f"{method}/policy"


def close(one: Path, two: Path) -> None:
    """The two folders hold the same weights up to rounding."""
    (left,), (right,) = (list(folder.glob("*.safetensors")) for folder in (one, two))
    expected, found = load_file(left), load_file(right)
    assert set(expected) == set(found)
    for key, value in expected.items():
        # Adam turns gradients that are only rounding into steps of full size: single weights may differ.
        assert float((value - found[key]).norm()) <= 2e-3 * float(value.norm()), key


@pytest.mark.slow
@pytest.mark.parametrize("by", ["torchrun", "file"])
def test_other_ways_to_start_them(
    by: str, inputs: Path, command_env: dict[str, str], alone: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\n")
    start = TORCHRUN if by == "torchrun" else [*ACCELERATE, f"--config_file={file}"]
    settings = arguments("dpo", inputs, tmp_path / "two", 4)
    launch(command_env, *settings, by=start)
    close(alone("dpo") / result_of("dpo"), tmp_path / "two" / result_of("dpo"))
    if by == "torchrun":
        # Given again, it is up to date, and every process sees so.
        assert "up to date, skipped" in launch(command_env, *settings, by=start)


@pytest.mark.slow
def test_processes_of_ppo_share_its_batches(
    inputs: Path, command_env: dict[str, str], run_command: Callable[..., Any], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # Both are given the same; the labeler is asked by one process for both.
    shared = [*COMMON, *PPO, f"prompts={inputs}/prompts.jsonl", "method=ppo"]
    settings = {folder: [*shared, f"output_dir={folder}"] for folder in (one, two)}
    run_command("train", *settings[one])
    launch(command_env, *settings[two])
    close(one / "ppo" / "policy", two / "ppo" / "policy")
    assert not list(two.rglob(".*"))
    left, right = (
        [json.loads(line) for line in (folder / "ppo" / "training.jsonl").read_text().splitlines()]
        for folder in (one, two)
    )
    for key in ("score", "kl", "reward", "policy_loss", "grad_norm"):
        assert [line[key] for line in left] == pytest.approx([line[key] for line in right], rel=1e-3, abs=1e-4)
    # How many processes made it decides nothing.
    assert "up to date, skipped" in run_command("train", *settings[two]).stderr


SPREAD = {
    "fsdp": "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}",
    "deepspeed": "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2}",
}


# With a reference of its own.
RLOO = "rloo rloo.tuning=full rloo.learning_rate=1e-4"


def spreading(what: str, env: dict[str, str]) -> dict[str, str]:
    """The environment for it; skips where DeepSpeed is not installed."""
    if what != "deepspeed":
        return env
    # `make test` puts it where nothing else imports it. On CPUs it compiles a file, with ninja.
    beside = Path(sys.prefix) / "deepspeed"
    path = os.pathsep.join([str(beside / "bin"), env["PATH"]])
    found = {**env, "PATH": path, "PYTHONPATH": os.pathsep.join([str(REPO), str(beside)]), "DS_ACCELERATOR": "cpu"}
    looked = [sys.executable, "-c", "import deepspeed"]
    if not shutil.which("g++") or subprocess.run(looked, env=found, capture_output=True, check=False).returncode:
        pytest.skip("DeepSpeed (make test installs it) or g++ is missing")
    return found


def spread(what: str, folder: Path, more: str = "") -> list[str]:
    """What starts two processes between which the training is spread, with more settings of that kind."""
    file = folder / "accelerate.yaml"
    file.write_text(f"compute_environment: LOCAL_MACHINE\nnum_processes: 2\n{SPREAD[what][:-1]}{more}}}\n")
    return [*ACCELERATE, f"--config_file={file}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "settings"),
    [
        *(("fsdp", each) for each in ("sft", "pm", "dpo", "dpo dpo.tuning=full", "rloo", RLOO)),
        # Weights are there for whole passes: none is left out, and none is split behind a common beginning.
        ("fsdp", "dpo preferences={inputs}/alike dpo.lora.top_layers=0.5"),
        ("fsdp", "pm preferences={inputs}/alike pm.tuning=full"),
        *(("deepspeed", each) for each in ("sft", "pm", "dpo dpo.tuning=full", RLOO)),
    ],
)
def test_training_that_is_spread_over_processes_is_that_of_one(
    what: str,
    settings: str,
    inputs: Path,
    command_env: dict[str, str],
    forked: Callable[..., str],
    alone: Callable[..., Path],
    tmp_path: Path,
) -> None:
    env = spreading(what, command_env)
    method, *own = settings.format(inputs=inputs).split()
    one, two = alone(method, *own), tmp_path / "two"
    by = spread(what, tmp_path)
    asked = [*arguments(method, inputs, two, 4), *own]
    if what == "deepspeed":
        # Where the libraries were imported it was not beside them.
        launch(env, *asked, by=by, what=[SPREAD_ON_CPU])
    else:
        forked(*asked, by=by, what=SPREAD_ON_CPU)
    close(one / result_of(method), two / result_of(method))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ("ppo.lora.top_layers=0.5 ppo.value_adapter=true", ""),
        (
            "ppo.tuning=full ppo.learning_rate=1e-4 ppo.value_backprop=true ppo.micro_batch_size=1",
            ", fsdp_reshard_after_forward: false",
        ),
        ("ppo.tuning=full ppo.learning_rate=1e-4 ppo.relative_reward=true ppo.gradient_checkpointing=true", ""),
        # No update passes through the policy.
        ("ppo.tuning=full ppo.warmup_iterations=4", ""),
        # The PM as an adapter on the policy's base, and as a model of its own. One of two processes has no prompt.
        (
            "reward=pm preference_model={pm} ppo.value_init=pm ppo.eval_every=1 ppo.eval_prompts=1 "
            "data.validation_fraction=0.3",
            "",
        ),
        ("reward=pm preference_model={pm} ppo.tuning=full ppo.learning_rate=1e-4", ""),
    ],
)
def test_ppo_that_is_spread_over_processes_is_that_of_one(
    settings: str,
    more: str,
    inputs: Path,
    forked: Callable[..., str],
    run_command: Callable[..., Any],
    alone: Callable[..., Path],
    tmp_path: Path,
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    own = settings.format(pm=alone("pm") / result_of("pm") if "{pm}" in settings else None).split()
    shared = [*COMMON, *PPO, f"prompts={inputs}/prompts.jsonl", "method=ppo", *own]
    run_command("train", *shared, f"output_dir={one}")
    said = forked(*shared, f"output_dir={two}", by=spread("fsdp", tmp_path, more), what=SPREAD_ON_CPU)
    held, total = map(int, re.search(r"holds (\d+) of (\d+) weights of \w*CausalLM", said).groups())
    assert total == 66576
    assert held == pytest.approx(total / 2, rel=0.1)
    close(one / "ppo" / "policy", two / "ppo" / "policy")
    left, right = (
        [json.loads(line) for line in (folder / "ppo" / "training.jsonl").read_text().splitlines()]
        for folder in (one, two)
    )
    for key in ("score", "kl", "reward", "policy_loss", "value_loss", "grad_norm", "value_grad_norm"):
        assert [line[key] for line in left] == pytest.approx([line[key] for line in right], rel=1e-3, abs=1e-4), key


@pytest.mark.slow
def test_ppo_whose_optimizer_is_shared_is_that_of_one(
    inputs: Path, command_env: dict[str, str], run_command: Callable[..., Any], tmp_path: Path
) -> None:
    env = spreading("deepspeed", command_env)
    one, two = tmp_path / "one", tmp_path / "two"
    shared = [*COMMON, *PPO, f"prompts={inputs}/prompts.jsonl", "method=ppo", "ppo.tuning=full"]
    shared += ["ppo.learning_rate=1e-4"]
    run_command("train", *shared, f"output_dir={one}")
    said = launch(env, *shared, f"output_dir={two}", by=spread("deepspeed", tmp_path), what=[SPREAD_ON_CPU])
    held, total = map(int, re.search(r"ZeRO, by rlaif itself: .* state of (\d+) of (\d+) weights", said).groups())
    assert held == pytest.approx(total / 2, rel=0.1)
    close(one / "ppo" / "policy", two / "ppo" / "policy")


@pytest.mark.slow
def test_ppo_whose_weights_are_spread_goes_on_where_it_was_killed(
    inputs: Path, command_env: dict[str, str], tmp_path: Path
) -> None:
    shared = [*COMMON, *PPO, f"prompts={inputs}/prompts.jsonl", "method=ppo", "ppo.tuning=full", "ppo.iterations=8"]
    shared += ["ppo.save_every=1", "ppo.keep=best", "ppo.eval_every=1", "ppo.eval_prompts=3"]
    shared += ["data.validation_fraction=0.3"]
    by = spread("fsdp", tmp_path)
    launch(command_env, *shared, f"output_dir={tmp_path / 'one'}", by=by, what=[SPREAD_ON_CPU])
    two = tmp_path / "two"
    command = [sys.executable, "-m", *by, SPREAD_ON_CPU, *shared, f"output_dir={two}"]
    process = psutil.Popen(command, env=command_env, cwd=REPO, stderr=subprocess.DEVNULL)
    while not list(two.rglob("iteration-0000*[1-9]")):
        assert process.poll() is None
        time.sleep(0.02)
    killed = [process, *process.children(recursive=True)]
    for each in killed:
        each.kill()
    psutil.wait_procs(killed)
    said = launch(command_env, *shared, f"output_dir={two}", by=by, what=[SPREAD_ON_CPU])
    assert "going on from iteration" in said
    left, right = (load_file(folder / "ppo" / "policy" / "model.safetensors") for folder in (tmp_path / "one", two))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["policy", "labeler"])
def test_processes_share_the_critiques_and_revisions(
    critic: str, inputs: Path, forked: Callable[..., str], run_command: Callable[..., Any], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    shared = [*COMMON, "method=critique_revision", "constitution=harmless", f"prompts={inputs}/prompts.jsonl"]
    shared += [f"critique_revision.critic={critic}", "labeler=scripted", "data.validation_fraction=0.3"]
    shared += [
        "critique_revision.max_new_tokens=6",
        "critique_revision.critique_tokens=6",
        "critique_revision.lora.r=4",
    ]
    shared += ["critique_revision.max_steps=2", "critique_revision.learning_rate=1e-3"]
    run_command("train", *shared, "critique_revision.batch_size=8", f"output_dir={one}")
    forked(*shared, "critique_revision.batch_size=4", f"output_dir={two}")
    revisions = [folder / "critique_revision" / "revisions.jsonl" for folder in (one, two)]
    assert revisions[0].read_text() == revisions[1].read_text()
    close(one / "critique_revision" / "policy", two / "critique_revision" / "policy")
    stored = []
    for folder in (one, two):
        with VerdictStore(folder / "critique_revision" / STORE) as store:
            stored.append(dict(store.connection.execute("SELECT key, value FROM verdicts")))
    assert stored[0] == stored[1]
    assert stored[0]


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["pm", "labeler"])
def test_processes_share_the_samples_of_an_evaluation(
    reward: str,
    inputs: Path,
    forked: Callable[..., str],
    run_command: Callable[..., Any],
    alone: Callable[..., Path],
    tmp_path: Path,
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    shared = [*COMMON[:-1], "method=best_of_n", "best_of_n.n=4", f"prompts={inputs}/prompts.jsonl", "eval.gold=letters"]
    shared += ["eval.max_prompts=3", "eval.max_new_tokens=6"]
    shared += REWARD if reward == "labeler" else [f"preference_model={alone('pm') / result_of('pm')}"]
    run_command("train", *shared, f"output_dir={one}")
    said = forked(*shared, f"output_dir={two}")
    for name in ("samples.jsonl", "metrics.json"):
        assert (one / "evaluation" / name).read_text() == (two / "evaluation" / name).read_text()
    assert said.count("evaluate: done") == 1
    assert not list(two.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["somebody's files", "another run"])
def test_an_error_ends_all_processes(inputs: Path, command_env: dict[str, str], tmp_path: Path, problem: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if problem == "another run":
        with exclusive(out / ".dpo.lock", out / "dpo"):
            text = launch(command_env, *arguments("dpo", inputs, out, 4), expect=2)
        assert f"output_dir={out}/dpo: process {os.getpid()} on " in text
        return
    (out / "dpo").mkdir()
    (out / "dpo" / "mine.txt").write_text("mine")
    text = launch(command_env, *arguments("dpo", inputs, out, 4), expect=2)
    assert "was not made by rlaif.dpo" in text
