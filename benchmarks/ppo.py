"""PPO against TRL 1.12.0's (the last release that has one), side by side on the embedded model at equal settings.

    python -m benchmarks.ppo [--quick] [--maths] [--dtype bfloat16] [--device cuda] [--repeats 3] [--rounds 3]

Both run in a process of their own on the same torch and transformers, with the same weights' precision, LoRA r=16, 2
epochs in minibatches of 16, the same prompts and the same preference model. TRL is installed into a folder of its own
in the cache. Its value model is a whole second model, as it needs one; ``trl_lean`` freezes that model's layers and
trains its head alone, as ours does. The processes take turns, and the first round of each is not counted.
On a GPU, memory is what torch had allocated on it at most. ``fraction_of_peak`` is of the operations a second that a
large product reaches on the device. ``--maths`` only compares our losses, advantages and rewards with what TRL's own
training loop computed. ``--quick`` leaves that, ``trl_lean`` and the cost by the number of prompts out.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import finish, parser, say
from rlaif.bundled import cache_dir

TRL = "1.12.0"
WORKER = "benchmarks.ppo_worker"


def trl_folder() -> Path:
    """TRL of that version alone, to be put before the installed one on the path; what it needs is shared."""
    folder = cache_dir() / f"trl-{TRL}"
    if not (folder / f"trl-{TRL}.dist-info").is_dir():
        say(f"installing trl=={TRL} into {folder}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"trl=={TRL}"], check=True)
    return folder


def work(task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a worker process says in the last line of its output."""
    paths = [str(trl_folder())] if task.startswith("trl") else []
    paths += [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", WORKER, task, json.dumps(settings)], capture_output=True, text=True, env=environment
    )
    if result.returncode:
        raise SystemExit(f"{task} failed:\n{result.stderr[-3000:]}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


def compare(settings: dict[str, Any], repeats: int, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Speed and memory of ours, TRL's and TRL's lean variant."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", "trl", "trl_lean")[: 2 if quick else 3]}
    for _ in range(repeats):
        for name, found in runs.items():
            started = time.perf_counter()
            found.append(work(name, settings))
            say(f"{name}: {found[-1]['rounds']} s a round, {found[-1]['peak_mb']} MB, "
                f"{time.perf_counter() - started:.0f} s in all")  # fmt: skip
    rate = {
        name: settings["rollouts"] / statistics.median(seconds for one in found for seconds in one["rounds"])
        for name, found in runs.items()
    }
    memory = {name: statistics.median(one["peak_mb"] for one in found) for name, found in runs.items()}
    one = runs["ours"][0]
    parts = one["parts"]
    peers = list(runs)[1:]
    ratios = {
        "episodes_per_s": round(rate["ours"], 3),
        **{f"episodes_per_s_vs_{name}": round(rate["ours"] / rate[name], 2) for name in peers},
        "peak_memory_mb": memory["ours"],
        **{f"peak_memory_vs_{name}": round(memory["ours"] / memory[name], 3) for name in peers},
        "fraction_of_peak": round(
            runs["ours"][0]["operations"]
            / settings["rollouts"]
            * rate["ours"]
            / runs["ours"][0]["peak_operations_per_s"],
            3,
        ),
        **{f"time_{name}": round(statistics.median(run["parts"][name] for run in runs["ours"]), 3) for name in parts},
    }
    return ratios, {"runs": runs}


def start_up(folder: Path, count: int, settings: dict[str, Any], times: int) -> float:
    """Seconds that ``rlaif.train method=ppo`` takes for all but its one small round; the last time counts."""
    prompts = folder / f"prompts-{count}.jsonl"
    rng = random.Random(0)
    words = [f"{first}{second}" for first in ("ba", "de", "fi", "go", "lu") for second in "bcdfghjklmnpqrstvwxyz"]
    with prompts.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = f"Tell me about {' '.join(rng.choices(words, k=8))} {number}."
            file.write(json.dumps({"prompt": text}) + "\n")
    command = [sys.executable, "-m", "rlaif.train", "method=ppo", "model@policy=embedded", "ppo.iterations=1"]
    command += [f"policy.dtype={settings['dtype']}", f"policy.device={settings['device']}", "eval.enabled=false"]
    command += [f"preference_model={folder / 'pm'}", f"prompts={prompts}", "ppo.rollouts=4", "ppo.minibatch_size=4"]
    command += ["ppo.max_new_tokens=4", "ppo.report_to=[]"]
    for turn in range(times):
        output = folder / f"start-{count}-{turn}"
        started = time.perf_counter()
        subprocess.run([*command, f"output_dir={output}"], check=True, capture_output=True)
        seconds = time.perf_counter() - started
    line = json.loads((output / "ppo" / "training.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return round(seconds - float(line["seconds"]), 2)


def main() -> None:
    """Entry of the command."""
    arguments = parser(__doc__)
    arguments.add_argument("--maths", action="store_true", help="only compare the maths with TRL's")
    arguments.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights, in both"
    )
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="for both")
    arguments.add_argument("--repeats", type=int, default=3, help="processes of each, taking turns")
    arguments.add_argument("--rounds", type=int, default=3, help="of 64 episodes that count, in each process")
    options = arguments.parse_args()
    ratios: dict[str, Any] = {}
    if options.maths or not options.quick:
        ratios["maths_difference_to_trl"] = work("trl_maths", {})
    if options.maths:
        say(json.dumps(ratios))
        return
    if not options.quick:
        ratios |= work("prompts", {"counts": [1_000, 100_000], "rounds": 30})
    settings: dict[str, Any] = {"rollouts": 64, "max_new_tokens": 32, "minibatch_size": 16}
    settings["iterations"] = options.rounds + 1
    if options.quick:
        settings = {"rollouts": 4, "max_new_tokens": 4, "iterations": 2, "minibatch_size": 4}
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"folder": folder, "dtype": options.dtype, "device": options.device}
        work("make_pm", settings)
        speed, details = compare(settings, 1 if options.quick else options.repeats, options.quick)
        for name, count in ({"": 1_000} | ({} if options.quick else {"_100k": 100_000})).items():
            speed[f"command_start_s{name}"] = start_up(Path(folder), count, settings, 1 if options.quick else 2)
    packages = ("torch", "transformers", "peft", "accelerate")
    details |= {"settings": {name: value for name, value in settings.items() if name != "folder"}, "trl_version": TRL}
    finish("ppo", speed | ratios, details, packages, options.quick, options.dtype)


if __name__ == "__main__":
    main()
