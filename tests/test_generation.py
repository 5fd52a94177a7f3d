"""Tokens are drawn from the model's distribution, each completion from its own random numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlaif.chat import encode_chat
from rlaif.config import ModelConfig
from rlaif.generation import Generation, draw, generate, left_pad
from rlaif.models import eos_ids, load_causal_lm, load_tokenizer
from rlaif.records import UserError

# Probabilities 1/2, 0, 1/4, 1/4: exact in binary, so the boundaries are exact too.
LOGITS = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log()


def what(generations):
    """Tokens and endings: log-probabilities differ by rounding between batches."""
    return [(generation.tokens, generation.ended) for generation in generations]


def drawn(points, temperature=1.0, top_p=1.0, logits=LOGITS):
    return draw(logits.expand(len(points), -1), torch.tensor(points), temperature, top_p)[0].tolist()


def test_left_pad():
    ids, mask = left_pad([[1, 2, 3], [4]], 9, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_draw_inverts_the_cumulative_distribution():
    largest = float(np.nextafter(np.float32(1), np.float32(0)))
    below_half = float(np.nextafter(np.float32(0.5), np.float32(0)))
    # Each token owns [mass before it, mass up to it).
    assert drawn([0.0, 0.25, below_half, 0.5, 0.74, 0.75, largest]) == [0, 0, 0, 2, 2, 3, 3]


def test_a_token_without_mass_is_never_drawn():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    largest = float(np.nextafter(np.float32(1), np.float32(0)))
    assert drawn([0.0, 0.5, largest], logits=logits) == [1, 1, 1]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        # Masses in order 0.5, 0.25, 0.25, 0: the smallest set that reaches top_p.
        (0.3, {0}),
        (0.5, {0}),
        (0.51, {0, 2}),
        (0.75, {0, 2}),
        (0.76, {0, 2, 3}),
        (1.0, {0, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set(top_p, kept):
    logits = torch.tensor([[0.5, 1e-12, 0.2500001, 0.2499999]]).log()
    points = [i / 64 for i in range(64)]
    assert set(drawn(points, top_p=top_p, logits=logits)) == kept


def test_top_p_renormalises():
    # 0.5 and 0.25 of 0.75: the boundary moves to 2/3.
    logits = torch.tensor([[0.5, 0.0, 0.2500001, 0.2499999]]).log()
    assert drawn([0.66, 0.67], top_p=0.75, logits=logits) == [0, 2]


def test_temperature():
    assert drawn([0.0, 0.99], temperature=0) == [0, 0]
    # At temperature 1/2 the odds are squared: 4 : 1 : 1, so the first owns 2/3.
    assert drawn([0.66, 0.67], temperature=0.5) == [0, 2]


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=9), st.floats(0, 1, exclude_max=True, width=32))
def test_draw_agrees_with_a_loop(values, point):
    logits = torch.tensor([values])
    token = draw(logits, torch.tensor([point]), 1.0)[0].item()
    ends = torch.softmax(logits.double(), -1)[0].cumsum(-1).tolist()
    start = ends[token - 1] if token else 0.0
    assert start - 1e-6 <= point <= ends[token] + 1e-6


@pytest.fixture(scope="module")
def tiny():
    config = ModelConfig(name="tiny", device="cpu")
    tokenizer = load_tokenizer(config)
    prompts = [
        encode_chat(tokenizer, [{"role": "user", "content": text}]) for text in ("Hi", "Tell me a story", "Why? " * 9)
    ]
    model = load_causal_lm(config)
    return model, prompts, {"eos": eos_ids(model, tokenizer), "pad": tokenizer.pad_token_id}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)])
def test_a_completion_does_not_depend_on_its_batch(tiny, temperature, top_p):
    model, prompts, ends = tiny
    settings = {"max_new_tokens": 12, "temperature": temperature, "top_p": top_p, **ends}
    jobs = [(prompt, (7, number)) for prompt in prompts for number in range(4)]
    together = generate(model, [prompt for prompt, _ in jobs], [seed for _, seed in jobs], **settings)
    alone = [generate(model, [prompt], [seed], **settings)[0] for prompt, seed in jobs]
    assert what(together) == what(alone)
    turned = generate(model, [prompt for prompt, _ in jobs[::-1]], [seed for _, seed in jobs[::-1]], **settings)
    assert what(turned[::-1]) == what(together)
    assert (len({tuple(generation.tokens) for generation in together}) > 3) == (temperature > 0)


def test_greedy_takes_the_most_likely_token_each_step(tiny):
    model, prompts, ends = tiny
    [generation] = generate(model, [prompts[1]], [[0]], max_new_tokens=5, temperature=0, **ends)
    ids = list(prompts[1])
    with torch.inference_mode():
        for token in generation.tokens:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_frequencies_match_the_softmax(tiny):
    model, prompts, ends = tiny
    n, temperature = 4000, 0.5
    found = generate(
        model, [prompts[0]] * n, [[1, i] for i in range(n)], max_new_tokens=1, temperature=temperature, **ends
    )
    counts = np.bincount([generation.tokens[0] for generation in found], minlength=259)
    with torch.inference_mode():
        logits = model(torch.tensor([prompts[0]])).logits[0, -1].double()
    expected = n * torch.softmax(logits / temperature, -1).numpy()
    often = expected >= 5
    observed = [*counts[often], counts[~often].sum()]
    wanted = np.array([*expected[often], expected[~often].sum()])
    chi_square = float(((np.array(observed) - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert freedom > 20
    # Mean k, variance 2k: four standard deviations above the mean.
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_finish_reasons(tiny):
    model, prompts, ends = tiny
    jobs = [(prompts[0], (3, number)) for number in range(400)]
    found = generate(model, [p for p, _ in jobs], [seed for _, seed in jobs], max_new_tokens=8, temperature=1.0, **ends)
    assert {generation.finish_reason for generation in found} == {"stop", "length"}
    for generation in found:
        if generation.ended:
            assert generation.tokens[-1] in ends["eos"]
            assert 1 <= len(generation.tokens) <= 8
        else:
            assert len(generation.tokens) == 8
            assert generation.tokens[-1] not in ends["eos"]
        assert not set(generation.tokens[:-1]) & set(ends["eos"])
    assert Generation([1], True, [0.0]).finish_reason == "stop"


def test_any_end_token_ends(tiny):
    model, prompts, ends = tiny
    [plain] = generate(model, [prompts[0]], [[0]], max_new_tokens=6, temperature=0, **ends)
    [cut] = generate(
        model,
        [prompts[0]],
        [[0]],
        max_new_tokens=6,
        temperature=0,
        eos=[*ends["eos"], plain.tokens[0]],
        pad=ends["pad"],
    )
    assert (cut.tokens, cut.finish_reason) == (plain.tokens[:1], "stop")


def test_log_probabilities_are_those_of_the_drawn_tokens(tiny):
    model, prompts = tiny[0], [[5, 6, 7], [8]]
    generations = generate(
        model, prompts, [(0,), (1,)], max_new_tokens=5, temperature=0.7, eos=[], pad=0, observe=lambda h: h.sum(-1)
    )
    for prompt, generation in zip(prompts, generations, strict=True):
        with torch.no_grad():
            output = model(torch.tensor([prompt + generation.tokens]), output_hidden_states=True)
        logps = torch.log_softmax(output.logits[0, len(prompt) - 1 : -1] / 0.7, dim=-1)
        expected = logps.gather(-1, torch.tensor(generation.tokens)[:, None]).squeeze(-1)
        assert generation.logps == pytest.approx(expected.tolist(), abs=1e-4)
        states = output.hidden_states[-1][0, len(prompt) - 1 : -1].sum(-1)
        assert generation.values == pytest.approx(states.tolist(), abs=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_no_numbers_are_refused(temperature):
    """An adapter or a model whose training diverged, or a file with holes: its tokens would mean nothing."""
    config = ModelConfig(name="tiny", device="cpu")
    model = load_causal_lm(config)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(UserError, match="gives NaN for what comes next"):
        generate(model, [[1, 2]], [[0, 1]], max_new_tokens=4, temperature=temperature, eos=[0], pad=0)
