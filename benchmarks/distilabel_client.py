"""distilabel on the same prompts, in an environment of its own: ``python distilabel_client.py PROMPTS URL OUTPUT``.

PROMPTS is a JSONL file of ``{"messages": [...]}``. Imports nothing of this project.
"""

import json
import sys
from pathlib import Path

from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import ChatGeneration

BATCH = 500
"""Rows that its task is given at once, which it asks at once: more than its default of 50, to its advantage."""


def main() -> None:
    """Generate one token for each prompt with log-probabilities, and count the answers."""
    prompts, url, output = sys.argv[1:]
    rows = [json.loads(line) for line in Path(prompts).read_text(encoding="utf-8").splitlines()]
    llm = OpenAILLM(
        model="instant",
        base_url=url,
        api_key="none",
        generation_kwargs={"max_new_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": 20},
    )
    with Pipeline(name="labels") as pipeline:
        task = ChatGeneration(llm=llm, input_batch_size=BATCH)
        LoadDataFromDicts(data=rows, batch_size=BATCH) >> task
    found = pipeline.run(use_cache=False)["default"]["train"]
    answered = sum(generation is not None for generation in found["generation"])
    Path(output).write_text(json.dumps({"answered": answered}), encoding="utf-8")


if __name__ == "__main__":
    main()
