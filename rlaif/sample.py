"""``python -m rlaif.sample``: prompts -> candidates.jsonl."""

from __future__ import annotations

from pathlib import Path

from rlaif.artifacts import model_inputs, run_stage
from rlaif.cli import launch
from rlaif.config import SampleConfig
from rlaif.records import UserError, find_prompts
from rlaif.splits import read_splits

USAGE = """
Sample candidate completions for prompts.

  python -m rlaif.sample prompts=FILE output_dir=DIR policy.name=MODEL [key=value ...] [-m]

  prompts=FILE                    JSONL: {"prompt": text or messages, "prompt_id": optional} a line; or `everyday`
  output_dir=DIR                  gets candidates.jsonl and provenance.json
  policy.name=MODEL               hub name, folder, or `embedded`; model@policy=embedded is the same
  sampling.styles.plain.n=4       completions per prompt in the style `plain`
  '+sampling.styles.warm={system: "Be warm.", n: 1}'
                                  another style, under a system prompt of its own
  sampling.max_new_tokens=128     sampling.temperature=1.0    sampling.top_p=1.0
  data.test_fraction=0.2          data.validation_fraction=0.1    data.max_prompts=100
  seed=0                          seed=1,2,3 -m sweeps
"""


def run_sample(config: SampleConfig, output: Path) -> Path:
    """Sample candidates into ``output``; returns the path of candidates.jsonl."""
    file = find_prompts(config.prompts)
    prompts, splits = read_splits(file, config.data)
    wanted = [prompt for prompt in prompts if splits[prompt.prompt_id] in config.sampling.splits]
    if not wanted:
        raise UserError(f"{file}: none of its prompts falls into sampling.splits=[{','.join(config.sampling.splits)}]")

    def make(folder: Path) -> None:
        from rlaif.engines.hf import HFEngine
        from rlaif.sampling import sample_candidates

        with HFEngine(config.policy, batch_size=config.sampling.batch_size) as engine:
            sample_candidates(wanted, splits, engine, config.sampling, folder, config.seed)

    # The policy is an input.
    settings = {
        "sampling": config.sampling,
        "data": config.data,
        "trust_remote_code": config.policy.trust_remote_code,
    }
    run_stage("sample", output, settings, {"prompts": file, **model_inputs("policy", config.policy)}, make, config.seed)
    return output / "candidates.jsonl"


def main(config: SampleConfig, output: Path) -> None:
    """Entry of the command."""
    run_sample(config, output)


if __name__ == "__main__":
    launch("sample", main, USAGE)
