"""``python -m rlaif.audit``: a labeler against pairs that people have labelled."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.artifacts import has_failures, labeler_inputs, plain, run_stage
from rlaif.cli import launch
from rlaif.config import AuditConfig, PriceConfig
from rlaif.constitution import check_mode, find_constitution, load_constitution
from rlaif.labeling.store import STORE, STORE_FILES
from rlaif.records import UserError, existing_dir, existing_file, read_json, read_jsonl, write_json, write_jsonl

if TYPE_CHECKING:
    from rlaif.engines.base import Engine
    from rlaif.labeling.audit import Comparison
    from rlaif.labeling.modes import Setup
    from rlaif.labeling.store import VerdictStore

log = logging.getLogger("rlaif")

USAGE = """
Measure a labeler on pairs that people have labelled, before training on its labels.

  python -m rlaif.audit comparisons=FILE output_dir=DIR constitution=NAME_OR_FILE labeler=... [key=value ...] [-m]

  comparisons=FILE                JSONL (or .gz): "prompt" with "chosen" and "rejected", or with "response_a",
                                  "response_b" and "label" (a, b or tie), and "annotators" where they are known
  output_dir=DIR                  gets audit.json, audit.md, reliability.svg, comparisons.jsonl, labels.jsonl
  labeler=hf labeler.model=NAME   as for rlaif.label: hf, vllm, openai or scripted
  labeling.mode=pairwise          as for rlaif.label
  max_pairs=200                   only so many pairs, spread evenly over the file
  compare=[DIR1,DIR2]             earlier audits on the same pairs: agreement between all these labelers

To refuse labels of a labeler that is not good enough: rlaif.label ... labeler.audit=FILE labeler.min_agreement=0.65
"""

COMPARISONS = "comparisons.jsonl"


def measure(
    comparisons: Sequence[Comparison],
    setup: Setup,
    engine: Engine,
    store: VerdictStore,
    folder: Path,
    price: PriceConfig,
    others: Sequence[Path] = (),
) -> dict[str, Any]:
    """Ask the labeler about every comparison and write the audit into ``folder``.

    Args:
        comparisons: what people said.
        setup: how the labeler is asked.
        engine: whom to ask.
        store: what is known already.
        folder: where to write.
        price: of tokens.
        others: folders of earlier audits, for the agreement between labelers.
    """
    from rlaif.labeling.audit import audit, trainable, verdict
    from rlaif.labeling.label import Labeling
    from rlaif.labeling.live import agreement_with_people
    from rlaif.reporting.audit import audit_markdown
    from rlaif.reporting.plots import reliability_diagram

    lines = [comparison.candidates() for comparison in comparisons]
    labeling = Labeling(lambda: lines, setup, engine, store, agreement_with_people(comparisons))
    labeling.ask(len(lines) * setup.expected(2), len(lines))
    labels = [label for _, found in labeling.labels() for label in found]
    pairs, _ = setup.pairs(labels)
    result = {
        "labeler": engine.name,
        "mode": setup.config.mode.value,
        "constitution": setup.constitution.name,
        "seed": setup.seed,
        **audit(comparisons, labels, pairs, price),
    }
    if engine.spent is not None:
        result["spent"] = {name: round(value, 6) for name, value in engine.spent._asdict().items()}
    result["trainable"], result["verdict"] = trainable(result), verdict(result)
    folder.mkdir(parents=True, exist_ok=True)
    logits = {pair.prompt_id: pair.logit for pair in pairs}
    truth = {comparison.name: comparison.truth for comparison in comparisons}
    write_jsonl(folder / COMPARISONS, ({"id": name, "truth": truth[name], "logit": logits.get(name)} for name in truth))
    write_jsonl(folder / "labels.jsonl", (label.to_json() for label in labels))
    if others:
        own = {"folder": ".", "labeler": engine.name, "mode": result["mode"]}
        result["labelers"] = [own, *(_labeler(other) for other in others)]
        result["between_labelers"] = between_labelers(folder, others, comparisons)
    write_json(folder / "audit.json", result)
    (folder / "audit.md").write_text(audit_markdown(result), encoding="utf-8")
    if result["reliability"]:
        (folder / "reliability.svg").write_text(reliability_diagram(result["reliability"]), encoding="utf-8")
    return result


def tell(result: Mapping[str, Any]) -> None:
    """Print an audit."""
    from rlaif.reporting.audit import audit_text

    log.log(logging.INFO if result["trainable"] else logging.WARNING, "%s", audit_text(result))


def between_labelers(own: Path, others: Sequence[Path], comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Agreement of every two labelers on the pairs that both labelled with a side; 0 pairs where there are none.

    Args:
        own: folder of this audit.
        others: folders of earlier ones.
        comparisons: the pairs of this audit, which tell the prompt of each.
    """
    from rlaif.evaluation.statistics import clustered_share, pairs_agreement

    prompts = {comparison.name: comparison.prompt.prompt_id for comparison in comparisons}
    logits = {".": _logits(own)} | {str(folder): _logits(folder) for folder in others}
    result = []
    for (one, mine), (other, theirs) in itertools.combinations(logits.items(), 2):
        shared = sorted(name for name in prompts if mine.get(name) and theirs.get(name))
        agreed = pairs_agreement([mine[name] or 0.0 for name in shared], [theirs[name] or 0.0 for name in shared])
        estimate = clustered_share(agreed, [prompts[name] for name in shared])
        figures = estimate.flat("agreement") if estimate else {"agreement_n": 0}
        result.append({"one": one, "other": other, **figures})
    return result


def _labeler(folder: Path) -> dict[str, Any]:
    """Whom an earlier audit measured."""
    found = read_json(folder / "audit.json")
    if not isinstance(found, dict) or not {"labeler", "mode"} <= found.keys():
        raise UserError(f"compare={folder}: audit.json is not what rlaif.audit writes")
    return {"folder": str(folder), "labeler": found["labeler"], "mode": found["mode"]}


def _logits(folder: Path) -> dict[str, float | None]:
    """An audit's logit for each pair; ``None`` where it has no label."""

    def parse(line: dict[str, Any]) -> tuple[str, float | None]:
        logit = line.get("logit")
        number = isinstance(logit, int | float) and not isinstance(logit, bool) and abs(logit) < 1e300
        if "id" not in line or not (logit is None or number):
            raise ValueError("not a pair as rlaif.audit writes it, with id and logit")
        return str(line["id"]), logit

    return dict(read_jsonl(folder / COMPARISONS, parse))


def main(config: AuditConfig, output: Path) -> None:
    """Entry of the command."""
    from rlaif.labeling.audit import read_comparisons

    file = existing_file(config.comparisons, "comparisons")
    comparisons = read_comparisons(file, config.max_pairs)
    constitution = load_constitution(config.constitution)
    check_mode(constitution, config.labeling.mode, config.labeling.exemplars)
    others = [existing_dir(folder, "compare") for folder in config.compare]
    for folder in others:
        if not (folder / COMPARISONS).is_file():
            raise UserError(f"compare={folder}: no {COMPARISONS} in it; give the output_dir of an earlier rlaif.audit")
        if not _logits(folder).keys() & {comparison.name for comparison in comparisons}:
            raise UserError(f"compare={folder}: no pair in common with this audit")
        _labeler(folder)

    def make(folder: Path) -> None:
        from rlaif.engines import build_labeler
        from rlaif.labeling.modes import Setup
        from rlaif.labeling.store import VerdictStore

        with build_labeler(config.labeler, config.seed) as engine, VerdictStore(folder / STORE) as store:
            setup = Setup(constitution, engine.name, config.labeling, config.seed)
            measure(comparisons, setup, engine, store, folder, config.labeler.price, others)

    # Prices change no label, but what an audit says.
    settings = {"labeler": config.labeler} | plain(
        labeling=config.labeling,
        max_pairs=config.max_pairs,
        price=config.labeler.price,
    )
    inputs = {
        "comparisons": file,
        "constitution": find_constitution(config.constitution),
        **{f"compare_{place}": folder / COMPARISONS for place, folder in enumerate(others)},
        **labeler_inputs(config.labeler),
    }
    run_stage(
        "audit", output, settings, inputs, make, config.seed, STORE_FILES, lambda f: has_failures(f / "audit.json")
    )
    tell(read_json(output / "audit.json"))


if __name__ == "__main__":
    launch("audit", main, USAGE)
