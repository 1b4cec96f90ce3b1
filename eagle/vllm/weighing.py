"""What `eagle.vllm.verify` makes of step costs: the draft that it measured, weighed against what steps cost."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eagle.decode.serving_choice import Measured, asked_of, of_report, refuse_without_costs, serving_report
from eagle.decode.smaller_vocabulary import order_of, smaller
from eagle.decode.step_costs import Shape, StepCosts, read_step_costs
from eagle.device import choose_kind, describe, torch_device
from eagle.drafts.saved import load_draft, state_of
from eagle.errors import RequestError
from eagle.target.check import CheckedTarget
from eagle.target.weights import read_head
from eagle.vllm.cost_plan import shape_of_saved
from eagle.vllm.costs_file import is_eager
from eagle.vllm.engine import EngineRequest, EngineResult
from eagle.vllm.serving import AUTO


@dataclass(frozen=True, slots=True)
class Weighing:
    """What a draft's acceptance is weighed against. shape: the draft's, None where it cannot be read here and nothing
    is weighed. others: drafts of other reports. order: its tokens, the most frequent first, where a store says so."""

    costs: StepCosts | None
    shape: Shape | None
    asked: dict[str, Any]
    target: str
    others: list[Measured]
    order: np.ndarray | None

    def add_to(self, report: dict[str, Any], request: EngineRequest, result: EngineResult) -> None:
        """Into verify's report. request, result: of an engine that ran.

        Raises: RequestError where the costs are of another engine.
        """
        report |= {"target": self.target, "asked": self.asked}
        if self.shape is not None:
            report["shape"] = self.shape.to_json()
        if self.costs is None or self.shape is None:
            return
        self.costs.check_engine(
            vllm=result.vllm,
            device=result.device,
            dtype=result.dtype,
            tensor_parallel_size=request.tensor_parallel_size,
            enforce_eager=is_eager(request.enforce_eager, result.device),
        )
        mine = Measured.of(report, self.shape)
        estimates = [] if self.order is None else smaller(mine, self.costs.shapes, self.order, result.outputs)
        report["serving"] = serving_report(self.costs, [mine, *self.others, *estimates]) if mine.drafts else None


def open_weighing(args: argparse.Namespace, checked: CheckedTarget, draft: Path, request: EngineRequest) -> Weighing:
    """Raises: FileNotFoundError, RequestError."""
    if args.step_costs is None:
        refuse_without_costs(args.against)
    asked = asked_of(request.prompts, request.max_new_tokens)
    target = checked.identity.current
    costs = read_step_costs(args.step_costs) if args.step_costs else None
    try:
        shape = shape_of_saved(draft, checked)
    except RequestError:
        if costs:
            raise
        shape = None  # vLLM may serve what is not read here
    others = [of_report(path, asked, target, costs.engine["dtype"]) for path in args.against or ()] if costs else []
    order = None
    if costs and shape:
        costs.check_target(checked.identity)
        hardware = describe(torch_device(choose_kind()))
        known = {"tensor_parallel_size": request.tensor_parallel_size, "hardware": hardware}
        costs.check_engine(**known, **({} if request.dtype == AUTO else {"dtype": request.dtype}))
        for one in (shape, *(other.shape for other in others)):
            costs.check_shape(one)
        if args.tmpdir:
            run = state_of(args.trained_path).get("run", {}) if args.trained_path else {}
            own, cut = _tokens_of(draft, checked), args.max_len or run.get("max_len")
            order = order_of(args.tmpdir, checked.identity, checked.config.vocab_size, own, cut)
    return Weighing(costs, shape, asked, target, others, order)


def _tokens_of(draft: Path, checked: CheckedTarget) -> list[int] | None:
    """The tokens that an exported draft chooses among; None: all of them."""
    config, weights = checked.config, checked.weights
    embedding = torch.empty(config.vocab_size, config.hidden_size, device="meta")
    ids = load_draft(draft, embedding, config, lambda: read_head(weights, config)).ids
    return None if ids is None else ids.tolist()
