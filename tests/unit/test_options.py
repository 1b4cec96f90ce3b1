"""The options of step 4: a recipe's defaults, and what is given beside it."""

from __future__ import annotations

import pytest

from eagle.errors import RequestError
from eagle.train.arguments import parse_args
from eagle.train.options import TrainOptions, rate_as_in

REQUIRED = ["--tmpdir", "features", "--cpdir", "checkpoints", "--basepath", "model"]


def options(*words: str) -> TrainOptions:
    return TrainOptions(**vars(parse_args([*REQUIRED, *words])))


def test_a_recipe_sets_the_published_hyperparameters():
    ours, published = options(), options("--recipe", "eagle1")
    assert (published.lr, published.num_epochs, published.ploss_weight, published.init) == (3e-5, 20, 0.1, "random")
    assert ours.lr is None and ours.init == "closed_form"
    # Those the published trainer and ours have in common.
    for chosen in (ours, published):
        assert (chosen.vloss_weight, chosen.beta1, chosen.beta2, chosen.grad_clip) == (1.0, 0.9, 0.95, 0.5)


@pytest.mark.parametrize("words", [["--recipe", "eagle1", "--lr", "1e-4"], ["--lr", "1e-4", "--recipe=eagle1"]])
def test_a_flag_beside_a_recipe_wins(words):
    found = options(*words)
    assert found.lr == found.learning_rate(4096) == 1e-4 and found.num_epochs == 20


def test_wider_drafts_have_a_smaller_learning_rate():
    """EAGLE-3's is twice EAGLE-1's."""
    assert options().learning_rate(576) == pytest.approx(5e-4)
    assert options().learning_rate(4096) == pytest.approx(5e-4 * 576 / 4096)
    assert options("--draft", "eagle3").learning_rate(288) == pytest.approx(2e-3)


def test_a_run_whose_default_rate_was_another_is_not_gone_on_with():
    """Runs that said none meant 5e-4 at width 576; those of today say the number."""
    assert rate_as_in(None, 5e-4, 576) == 5e-4
    assert rate_as_in({"lr": None}, 5e-4, 576) is None, "the same run"
    assert rate_as_in({"lr": None}, 1e-3, 576) == 1e-3, "which is not what that run says"
    assert rate_as_in({"lr": 1e-3}, 5e-4, 576) == 5e-4
    assert rate_as_in(None, options().learning_rate(4096), 4096) == 7.03125e-05, "as one would type it"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--lr", "nan"), "--lr nan: expected a number"),
        (("--grad_clip", "nan"), "--grad_clip nan"),
        (("--noise", "inf"), "--noise inf"),
        (("--seed", "-1"), "--seed -1: expected 0 to 4,294,967,295"),
        (("--seed", "4294967296"), "--seed 4294967296"),
        (("--data_seed", "-1"), "--data_seed -1: expected 0 to 4,294,967,295"),
    ],
)
def test_numbers_that_nothing_can_be_done_with_are_refused(words, says):
    with pytest.raises(RequestError, match=says):
        options(*words)
