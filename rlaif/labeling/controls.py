"""Labels that no labeler made, for controls: what does the labeler add to what the candidates give away anyway?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from rlaif.labeling.aggregate import PairLabel, logit
from rlaif.records import Candidates, UserError, content_hash


def style_order_pairs(line: Candidates, order: Sequence[str]) -> list[PairLabel]:
    """Label every pair of a prompt's candidates by their styles alone: the one named earlier in ``order`` is better.

    This is how RLCD labels (Yang et al. 2023). The labels are hard. Two candidates of one style have no label.

    Raises:
        UserError: naming the prompt and the style, if a candidate's style is unknown or not in ``order``.
    """
    place: dict[str | None, int] = {style: number for number, style in enumerate(order)}
    styles = {candidate.candidate_id: candidate.style for candidate in line.candidates}
    for name, style in styles.items():
        if style not in place:
            raise UserError(
                f"style_order={list(order)}: candidate {name!r} of prompt {line.prompt.prompt_id!r} has "
                f"{f'style {style!r}' if style else 'no style'}; every style of the candidates must be named"
            )
    result = []
    for one, other in itertools.combinations(sorted(styles), 2):
        ahead = place[styles[other]] - place[styles[one]]
        if ahead:
            hard = logit(1.0 if ahead > 0 else 0.0)
            result.append(PairLabel(line.prompt.prompt_id, one, other, hard, {"style_order": hard}))
    return result


def shuffled_pairs(pairs: Sequence[PairLabel], seed: int) -> list[PairLabel]:
    """Give every label a direction by a fair coin, and leave it as strong as it was.

    The coin is a function of the seed and the pair. What is trained on such labels learns nothing of the labeler.
    """

    def turned(pair: PairLabel) -> PairLabel:
        if int(content_hash("shuffled", seed, pair.prompt_id, pair.one, pair.other)[:8], 16) % 2:
            return pair
        principles = {name: -value for name, value in pair.principles.items()}
        return replace(pair, logit=-pair.logit, principles=principles)

    return [turned(pair) for pair in pairs]
