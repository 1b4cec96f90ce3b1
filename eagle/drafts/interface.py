"""What a draft family is: everything in which kinds of drafts differ, as the stages ask for it.

    generate   `config`, and `features`: which tensors a record must hold, and how wide
    train      `reads`, `config`, `build`, `chosen`, `prepare`, `objective`, `starts`; for the memory plan the bytes
    decode     `build` by way of `eagle.drafts.saved`; the network itself does the rest
    vllm       `layouts`, `method`, `config_of`

A new family is a folder beside eagle1/ with a class like this one in it, and an entry in `eagle.drafts.families`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from eagle.drafts.choices import DraftChoices
from eagle.drafts.memory import Phase, Setting
from eagle.drafts.network import DraftNetwork
from eagle.drafts.objective import LossOptions, Objective
from eagle.drafts.starts import Start
from eagle.drafts.vllm_layout import Layout
from eagle.target.config import ModelConfig
from eagle.target.features import HIDDEN_STATE


class DraftFamily(ABC):
    """One kind of draft.

    name: in the table. describes: for messages ("an EAGLE-1 draft"). method: vLLM's name for it. starts: what a draft
    may start from, by the name that ``--init`` takes; the first is the default. layouts: the folders vLLM loads it
    from, by name, the newest first. same_as_target: fields of a draft's config that must be the target's.
    learning_rate: the peak one of a draft of width 576, which falls as 1/width (docs/recipes.md). defaults:
    training options of its own. recipes: named sets of training options. idle: training flags that do nothing for it,
    and why. targets_own: tensors that a saved draft may bring along though they are the target's. config_keys: what the
    family adds to a draft's config.json. has_own_vocabulary: whether ``--draft_vocab_size`` is a choice.
    """

    name: str
    describes: str
    method: str
    starts: dict[str, Start]
    layouts: dict[str, Layout]
    same_as_target: tuple[str, ...]
    learning_rate: float = 5e-4
    defaults: dict[str, object] = {}  # noqa: RUF012  (never changed)
    recipes: dict[str, dict[str, object]] = {}  # noqa: RUF012
    idle: dict[str, str] = {}  # noqa: RUF012
    targets_own: tuple[str, ...] = ("embed_tokens.weight", "lm_head.weight")
    config_keys: tuple[str, ...] = ()
    has_own_vocabulary: bool = False

    @abstractmethod
    def config(self, target: ModelConfig, configpath: Path | None, choices: DraftChoices) -> ModelConfig:
        """The draft's config for a target: derived, or the user's file once it is checked.

        Raises: RequestError naming every field in which the file does not fit the target, or a choice that is not the
        family's.
        """

    def choices(self, made: DraftChoices, widths: Mapping[str, int], where: str = "--tmpdir") -> DraftChoices:
        """The user's choices, and beside them what the features of a store come to. widths: theirs, none without a
        store. where: its name.

        Raises: RequestError for a store that no draft of the family can be trained on.
        """
        return made

    @abstractmethod
    def reads(self, config: ModelConfig) -> str:
        """The name of the features that a draft of this config reads."""

    def vocabulary(self, config: ModelConfig) -> int:
        """How many of the target's tokens a draft of this config chooses among."""
        return config.vocab_size

    def features(self, config: ModelConfig) -> dict[str, int]:
        """Widths of the features a record must hold, by name; the target's last hidden state is always among them.
        config: the draft's."""
        return {HIDDEN_STATE: config.hidden_size}

    @abstractmethod
    def config_of(self, target: ModelConfig, saved: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> ModelConfig:
        """The config to export a draft with: the target's numbers where they must be, the biases it really has.

        saved: what its config.json says. tensors: its own.
        """

    def completed(
        self, config: ModelConfig, tensors: Mapping[str, torch.Tensor], target: ModelConfig | None
    ) -> ModelConfig:
        """A saved draft's config with what it leaves to whoever reads it. target: None where it is not known.

        Raises: RequestError for what is not read here.
        """
        return config

    @abstractmethod
    def build(self, config: ModelConfig, embedding: torch.Tensor, names: Iterable[str] = ()) -> DraftNetwork:
        """The network with random weights. names: those of saved tensors it is to hold, where they decide its shape."""

    def chosen(self, config: ModelConfig, counts: Callable[[], np.ndarray]) -> np.ndarray | None:
        """The target's tokens ``[D]`` that a new draft of this config chooses among, ascending; None: all of them.

        counts: how often each of the target's tokens is supervised, ``[V]``.
        """
        return None

    def prepare(  # noqa: B027  (most families have nothing to do)
        self, network: DraftNetwork, head: torch.Tensor, norm: torch.Tensor, counts: Callable[[], np.ndarray]
    ) -> None:
        """Give a new draft what it takes over from the target and the records before it starts.

        head: the target's ``[V, H]``. norm: its final norm's weight ``[H]``. counts: as in `chosen`.
        """

    def canonical(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A saved draft's tensors under the names the network has, whichever public ones they came with."""
        return dict(state)

    def filled(
        self, config: ModelConfig, state: Mapping[str, torch.Tensor], head: Callable[[], torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """A saved draft's tensors, with those it leaves to the target. config: a completed one. head: gives the
        target's ``lm_head`` ``[V, H]``, None where it is not at hand.

        Raises: RequestError for what is no draft of this config.
        """
        return dict(state)

    @abstractmethod
    def objective(self, network: DraftNetwork, head: torch.Tensor, options: LossOptions) -> Objective:
        """The losses. head: the target's ``lm_head`` ``[V, H]``, frozen, on the device and in the dtype of the run."""

    @abstractmethod
    def recognises(self, names: Iterable[str]) -> bool:
        """Whether tensors of these (public) names are a draft of this family."""

    @abstractmethod
    def optional(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Tensors of a saved draft that are no part of what is trained and served, each with what to know about it.

        They are used where a saved draft is decoded with, and left out of training. Empty words: nothing is lost.
        """

    @abstractmethod
    def saved_bytes(self, setting: Setting, step: int) -> int:
        """Activations that unrolled step `step` (from 1) keeps for the backward pass."""

    @abstractmethod
    def flowing_bytes(self, setting: Setting) -> int:
        """Gradients of activations where the backward pass holds most of them."""

    @abstractmethod
    def validation_bytes(self, setting: Setting, depth: int) -> int:
        """Activations of `depth` steps without a backward pass."""

    @abstractmethod
    def start_phases(self, setting: Setting) -> list[Phase]:
        """What the start named in the setting holds."""

    def start_host_bytes(self, setting: Setting) -> dict[str, int]:
        """Host memory that the start takes where the device is a card, by name."""
        return {}

    def start_seconds(self, setting: Setting, device: torch.device) -> dict[str, float]:
        """What the parts of the start will take besides reading records, by a probe of a second at most; empty where
        there is nothing to wait for."""
        return {}
