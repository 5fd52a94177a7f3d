"""Completions of one prompt in one row have the scores, and give the gradients, of rows of their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.config import ModelConfig
from rlaif.models import load_sequence_scorer
from rlaif.preference_model import last_hidden, training_scores
from rlaif.prefix import positions_after
from rlaif.siblings import joinable, lay_out, visible

TINY = ModelConfig(name="tiny", device="cpu")
SYSTEM = list(range(40, 52))
GROUPS = [
    [[*SYSTEM, 5, 6, 7, 20, 21], [*SYSTEM, 5, 6, 7, 22], [*SYSTEM, 5, 6, 7, 20, 23, 24, 25]],
    [[*SYSTEM, 8, 9, 30, 31, 32, 33, 34]],
    [[*SYSTEM, 10, 11], [*SYSTEM, 12, 13, 14, 15]],
]

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@settings(deadline=None)
@given(
    st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=4)), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([None, 1, 10**6]),
)
def test_every_sequence_can_be_read_off_its_row(prompts, share, hidden):
    groups = [[[*range(10, 19), *prompt, *completion] for completion in completions] for prompt, completions in prompts]
    batch = lay_out(groups, 99, share, hidden)
    prefix = batch["prefix"].tolist() if "prefix" in batch else []
    assert bool(prefix) == (share and sum(map(len, groups)) > 1)
    found = []
    for row, column in zip(batch["row"].tolist(), batch["column"].tolist(), strict=True):
        ids, part, positions = (batch[name][row] for name in ("input_ids", "part", "positions"))
        own = (part == 0) | (part == part[column])
        assert own[: column + 1].nonzero().max() == column
        assert positions[own].tolist() == list(range(len(prefix), len(prefix) + int(own.sum())))
        found.append([*prefix, *ids[own].tolist()])
        # What its last token sees is what stands in it.
        mask = visible(batch["part"])
        assert (mask[row, 0, column] if mask.ndim == 4 else mask[row].bool()).tolist() == own.tolist()
    assert found == [sequence for group in groups for sequence in group]
    if hidden is None:
        assert batch["row"].tolist() == list(range(len(found)))


@pytest.mark.parametrize("share", [False, True])
def test_scores_and_gradients_are_those_of_rows_of_their_own(share):
    model = load_sequence_scorer(TINY, new_head=True)
    torch.nn.init.normal_(model.score.weight)
    model.config.pad_token_id = 256
    assert joinable(model)
    found, slopes = [], []
    for hidden in (None, 10**6):
        batch = lay_out(GROUPS, 256, share, hidden)
        asked = visible(batch["part"]), batch["positions"], batch.get("prefix")
        scores = training_scores(model, batch["input_ids"], *asked)[batch["row"], batch["column"]]
        model.zero_grad()
        (scores * torch.arange(1.0, 7.0)).sum().backward()
        found.append(scores.detach())
        slopes.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for number, sequence in enumerate(sequence for group in GROUPS for sequence in group):
            row = torch.tensor([sequence])
            mask = torch.ones_like(row)
            state = last_hidden(model, row, mask)
            assert float(model.score(state)) == pytest.approx(float(found[1][number]), abs=1e-4)
            assert training_scores(model, row, mask, positions_after(None, mask)).shape == row.shape
    assert sum(float(slope.abs().sum()) for slope in slopes[0].values()) > 0
    for name, slope in slopes[0].items():
        torch.testing.assert_close(slopes[1][name], slope, rtol=1e-3, atol=1e-4)


def test_completions_are_joined_while_what_is_saved_is_more_than_attention_costs():
    """A prompt of 30 tokens saves 30 tokens a completion; 8 completions of 100 attend to one another in vain."""
    prompt, completions = list(range(30)), [[100 + number] * 100 for number in range(8)]
    wide, narrow = (lay_out([[prompt + each for each in completions]], 0, False, hidden) for hidden in (10**6, 64))
    assert len(wide["input_ids"]) == 1
    # 64 wide: T + T^2 / 384 is 174 for one of 130 and 368 for two in a row of 230, which is more than twice 174.
    assert len(narrow["input_ids"]) == 8
    between = lay_out([[prompt + each for each in completions]], 0, False, 400)["input_ids"]
    # 400 wide: 130 alone costs 137; 230 costs 252 (22 less), 330 costs 375 (14 less), 430 costs 507 (5 less);
    # a fifth would bring it to 647, 3 more than a row of its own.
    assert between.shape == (2, 430)


def test_no_mask_is_larger_than_it_may_be():
    long = [[7] * 100 + [100 + number] * 1500 for number in range(4)]
    assert lay_out([long], 0, False, 10**6)["input_ids"].shape == (2, 3100)
