"""Columns of the report's tables: key in the JSON file, head, meaning, and how the value is shown."""

from __future__ import annotations

Terms = tuple[tuple[str, str, str, bool | None], ...]
"""``(key, head, meaning, plain)``; ``plain``: False for an estimate, True for a number, None for text."""

OVER: Terms = (
    (
        "gold_gain",
        "gold gain",
        "Mean difference in gold score to the baseline, paired on the same prompts. This is the result.",
        False,
    ),
    (
        "win_rate",
        "win rate",
        "Share of prompts where the gold judge prefers this row to the baseline; ties count half.",
        False,
    ),
    ("pm_gain", "PM gain", "Paired difference in PM score to the baseline.", False),
)
"""Over the baseline, from both rows' samples."""

START: Terms = (
    (
        "gold_gain",
        "gold gain over start",
        "Mean difference in gold score to the policy that this row's training started from.",
        False,
    ),
    (
        "win_rate",
        "win rate over start",
        "Share of prompts where the gold judge prefers this row to the policy it started from.",
        False,
    ),
    ("pm_gain", "PM gain over start", "Paired difference in PM score to the policy it started from.", False),
)
"""Over the policy that a row started from, which its own evaluation measured."""

COMPARISON: Terms = (
    (
        "gold_score",
        "gold score",
        "Mean score by the gold judge, the programmatic truth of a controlled experiment.",
        False,
    ),
    (
        "pm_score",
        "PM score",
        "Mean score by a preference model (PM). It can rise while the gold score falls, "
        "and two rows compare only if they were scored by the same PM.",
        False,
    ),
    (
        "preference_model",
        "PM",
        "The preference model behind the PM score: whose labels it learnt, its seed, and a hash of its files.",
        None,
    ),
    (
        "kl",
        "KL",
        "Distance from the reference policy, in nats per completion.",
        False,
    ),
    (
        "kl_bound",
        "KL bound",
        "Best of n: its KL to the policy it samples from is at most log n - (n - 1) / n nats.",
        True,
    ),
    ("length", "length", "Mean completion length in tokens. Check that a gain is not just length.", False),
    (
        "eos_rate",
        "EOS rate",
        "Share of completions that the policy ended by itself before the token limit.",
        False,
    ),
    (
        "guide_accuracy",
        "guide’s accuracy",
        "Held-out accuracy of the preference model that guided the training. A coin has 0.5.",
        False,
    ),
)

QUALITY: Terms = (
    ("labeler", "labeler", "", None),
    ("mode", "mode", "", None),
    (
        "agreement",
        "agreement",
        "Share of pairs where the label prefers the completion that the gold judge prefers; "
        "gold ties are left out. 0.5 is what a coin would reach.",
        False,
    ),
    (
        "audit_agreement",
        "agreement with people",
        "Share of the pairs in labeler.audit on which the labeler prefers what people preferred.",
        False,
    ),
    (
        "agreement_clear",
        "agreement, clear pairs",
        "Agreement on the pairs whose gold scores differ by a clear margin.",
        False,
    ),
    (
        "longer_wins",
        "longer wins",
        "Share of pairs where the gold judge prefers the longer completion: "
        "what a rule that only looks at length would reach.",
        False,
    ),
    (
        "same_position_rate",
        "same position",
        "Pairwise: share of pairs where the labeler chose the same position in both orders: "
        "position decided, not content.",
        False,
    ),
    (
        "position_bias",
        "position bias",
        "Pairwise: mean logit in favour of the completion shown first. 0 is none.",
        False,
    ),
    (
        "verdict_bias",
        "verdict bias",
        "Pointwise: mean logit of the favourable verdict. Far from 0, it nearly always says the same.",
        False,
    ),
    (
        "ece",
        "ECE",
        "Expected calibration error of the label probabilities against the gold judge. 0 is perfect.",
        False,
    ),
    (
        "option_mass_mean",
        "option mass",
        "Mean probability on the allowed verdicts. If low, the labeler wanted to say something else.",
        True,
    ),
    ("n_pairs", "pairs", "", True),
    ("n_verdicts", "verdicts", "", True),
    ("n_preferences", "preferences", "Pairs that became training preferences.", True),
    ("failed", "failed", "Verdicts that could not be had or parsed; kept and counted, never guessed.", True),
    ("content_filter", "filtered", "Verdicts that the labeler's content filter withheld; kept, not asked again.", True),
    ("uncovered", "uncovered", "Verdicts with too little probability on the allowed words.", True),
    (
        "missing_weight_mean",
        "missing weight",
        "Mean share of the principles' weight that is without a verdict on a labelled pair.",
        True,
    ),
    ("dropped", "dropped", "Pairs left out of the preferences, by reason.", True),
    (
        "verdicts_per_s",
        "verdicts per s",
        "Verdicts a second of the newest run that asked; loading the labeler counts, audit and calibration do not.",
        True,
    ),
)

PREFERENCE_MODEL: Terms = (
    (
        "accuracy",
        "accuracy",
        "Share of held-out preferences where the PM scores the chosen completion higher.",
        False,
    ),
    (
        "gold_accuracy",
        "gold accuracy",
        "Share of held-out pairs where the PM prefers what the gold judge prefers.",
        False,
    ),
    ("nll", "NLL", "Negative log-likelihood of held-out preferences. A coin has 0.693.", False),
    ("ece", "ECE", "Expected calibration error. 0 is perfect.", False),
    (
        "longer_wins",
        "longer wins",
        "Share of held-out pairs whose chosen completion is the longer one: what length alone reaches.",
        False,
    ),
    (
        "gain_over_longer",
        "over longer wins",
        "Accuracy less what length alone reaches, paired on the same pairs.",
        False,
    ),
    ("train_pairs", "training pairs", "", True),
    ("dropped_long", "dropped (too long)", "Pairs too long for the PM.", True),
    (
        "temperature",
        "temperature",
        "Score differences divided by it would be calibrated; it is reported, not applied.",
        True,
    ),
)
