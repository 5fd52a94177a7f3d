"""A planted bias and temperature are recovered, and a labeler that knows nothing is refused."""

import numpy as np
import pytest

from rlaif.labeling.aggregate import sigmoid
from rlaif.labeling.audit import Comparison
from rlaif.labeling.calibration import fit, measure, read_calibration
from rlaif.records import Label, Prompt, UserError, write_json

USER = ({"role": "user", "content": "q"},)


def label(name, first, p, principle="k"):
    second = "b" if first == "a" else "a"
    return Label(name, "pairwise", principle, "l", "logprob", p, first=first, second=second)


def people(n, temperature=2.0, bias=1.0, noise=0.0, seed=0, informative=True):
    """Comparisons of which people choose a with p = sigmoid(l / temperature); the labeler says l, plus its bias."""
    rng = np.random.default_rng(seed)
    comparisons, labels = [], []
    for number in range(n):
        value = rng.normal() * 3
        truth = 1 if rng.random() < sigmoid(value / temperature if informative else 0.0) else -1
        name = f"c{number}"
        comparisons.append(Comparison(name, Prompt(f"p{number // 2}", USER), "x", "yy", truth))
        labels.append(label(name, "a", sigmoid(value + bias + noise * rng.normal())))
        labels.append(label(name, "b", sigmoid(-value + bias + noise * rng.normal())))
    return comparisons, labels


def test_the_regression_by_hand():
    # Three of four choices follow a logit of 1, and its mirror image: Platt's targets are 5/6 and 1/6 (4 and 4 choices
    # of each kind, mirrored). The mean target at logit 1 is (3 * 5/6 + 1/6) / 4 = 2/3: slope log 2 = 0.693147.
    found = fit([1.0] * 4, [True, True, True, False], list("abcd"), with_bias=False, resamples=10)
    assert found.slope.value == pytest.approx(0.693147, abs=1e-4)
    assert found.temperature.value == pytest.approx(1.442695, abs=1e-3)
    assert found.bias is None
    assert found.slope.n == 4


def test_a_labeler_that_is_always_right_has_a_finite_temperature():
    found = fit([3.0, 2.0, -2.0, -3.0], [True, True, False, False], list("abcd"), with_bias=True, resamples=50)
    assert 0 < found.temperature.value < 5
    assert np.isfinite(found.slope.high)


def test_planted_bias_and_temperature_are_recovered():
    comparisons, labels = people(800, noise=0.1)
    calibration, record = measure("me", comparisons, labels, {"k": 1.0})
    assert calibration.temperature == pytest.approx(2.0, rel=0.2)
    assert calibration.single_temperature == pytest.approx(2.0, rel=0.2)
    assert calibration.bias == pytest.approx(1.0, abs=0.15)
    for name in ("temperature", "single_temperature", "bias", "slope"):
        assert record[f"{name}_low"] < record[name] < record[f"{name}_high"]
        # Two comparisons a prompt.
        assert record[f"{name}_n"] == 400
    assert record["bias_low"] < 1.0 < record["bias_high"]


def test_single_orders_are_noisier_than_both():
    comparisons, labels = people(1000, noise=3.0)
    calibration, _ = measure("me", comparisons, labels, {"k": 1.0})
    # Slope of people's logit on the labeler's: 1/2 * 9 / (9 + 9) for one order, 1/2 * 9 / (9 + 4.5) for both.
    assert calibration.single_temperature == pytest.approx(4.0, rel=0.2)
    assert calibration.temperature == pytest.approx(3.0, rel=0.2)


def test_principles_are_weighed_first():
    comparisons, labels = people(300)
    twice = [row for one in labels for row in (one, Label(**{**vars(one), "principle": "other", "p": 0.5}))]
    one, _ = measure("me", comparisons, labels, {"k": 1.0})
    two, _ = measure("me", comparisons, twice, {"k": 1.0, "other": 1.0})
    assert two.temperature == pytest.approx(one.temperature / 2, rel=1e-3)
    assert two.bias == pytest.approx(one.bias / 2, rel=1e-3)


@pytest.mark.parametrize("informative", [False, None], ids=["noise", "contrary"])
def test_a_labeler_no_better_than_chance_is_refused(informative):
    comparisons, labels = people(200, informative=informative is None)
    if informative is None:
        labels = [Label(**{**vars(one), "p": 1 - one.p}) for one in labels]
    with pytest.raises(UserError, match=r"labeling.calibrate: the logits of me do not clearly follow .* \(slope -?\d"):
        measure("me", comparisons, labels, {"k": 1.0})


def test_no_verdict_at_all():
    comparisons, labels = people(3)
    with pytest.raises(UserError, match="me gave no verdict on any pair"):
        measure("me", comparisons, [Label(**{**vars(one), "p": None}) for one in labels], {"k": 1.0})


def test_pointwise_labels_have_no_bias():
    comparisons, labels = people(500, bias=0.0)
    points = [
        Label(one.prompt_id, "pointwise", "k", "l", "logprob", p, candidate=name)
        for one in labels[::2]
        for name, p in (("a", one.p), ("b", 0.5))
    ]
    calibration, record = measure("me", comparisons, points, {"k": 1.0})
    assert calibration.temperature == pytest.approx(2.0, rel=0.25)
    assert calibration.bias == 0
    assert "bias" not in record


def test_the_record_is_read_back(tmp_path):
    comparisons, labels = people(300)
    calibration, record = measure("me", comparisons, labels, {"k": 1.0})
    write_json(tmp_path / "calibration.json", record)
    found = read_calibration(tmp_path)
    assert vars(found) == pytest.approx(vars(calibration), abs=1e-5)
    (tmp_path / "calibration.json").write_text('{"temperature": "hot"}')
    with pytest.raises(UserError, match=r"calibration.json: not a calibration"):
        read_calibration(tmp_path)
    assert vars(read_calibration(tmp_path / "none")) == {"temperature": 1, "bias": 0, "single_temperature": 1}
