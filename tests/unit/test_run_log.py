"""What a run tells its tracker."""

from __future__ import annotations

from types import SimpleNamespace

from eagle.train.run_log import RunLog
from eagle.train.validation import DEPTH, Validation


def test_a_tracker_gets_every_number_by_a_name_of_its_own(tmp_path):
    told = []
    tracker = SimpleNamespace(log=lambda values, step: told.append((step, values)))
    log = RunLog(tmp_path, active=True, total_steps=3, tracker=tracker)
    alpha, tau = ([base + 0.1 * depth for depth in range(DEPTH)] for base in (0.1, 1.1))
    log.validation(2, 0, "epoch 1", Validation(alpha, tau, 0.4, 0.5, 0.6, 70), 1.5)
    ((step, values),) = told
    assert step == 2 and all(isinstance(value, (int, float)) for value in values.values())
    assert [values[f"val_alpha_{n}"] for n in range(DEPTH)] == alpha
    assert [values[f"val_tau_{k}"] for k in range(1, DEPTH + 1)] == tau
    assert (values["val_top_3"], values["val_positions"], values["val_seconds"]) == (0.4, 70, 1.5)
