"""Which draft a run trains: what the command, a config file, a saved draft and the store say, checked to agree."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

from eagle.drafts.coverage import Coverage
from eagle.drafts.families import DRAFT_FAMILIES, check_served
from eagle.drafts.layers import biases_among
from eagle.drafts.saved import draft_names, load_draft_config, start_folder
from eagle.errors import RequestError
from eagle.target.config import ModelConfig, load_config
from eagle.target.features import aux_layers, describe_feature, holder_of, states_in
from eagle.target.quantization import Use
from eagle.target.weights import Weights
from eagle.train.options import TrainOptions


def draft_config(options: TrainOptions, target: ModelConfig, widths: Mapping[str, int]) -> ModelConfig:
    """The draft's config. widths: of the features that ``--tmpdir`` holds, by name; none without a store.

    Raises: FileNotFoundError, RequestError for what does not fit the base model or is not in the store.
    """
    family = options.family
    check_served(family, target)
    choices = family.choices(options.choices, widths, f"--tmpdir {options.tmpdir}")
    file = config_file(options)
    config = family.config(target, file, choices)
    if file and file != options.configpath:  # it goes on as the network that its weights were trained in
        saved = load_draft_config(file.parent, family)
        own = {name: getattr(saved, name) for name in ("rope_theta", "rope_scaling", "rms_norm_eps")}
        names = draft_names(Weights(file.parent, flag="--init"))
        config = dataclasses.replace(config, **own, **biases_among(names))
    if target.window is not None and options.max_len > target.window:
        raise RequestError(
            f"--max_len {options.max_len}: the base model attends to the last {target.window} tokens, and vLLM limits "
            f"its draft alike, which is not so in training. Cut the records to that: --max_len {target.window}."
        )
    if widths:
        check_widths(widths, family.features(config), options)
    return config


def config_file(options: TrainOptions) -> Path | None:
    """The file that says what draft to train: ``--configpath``, or that of a draft which is gone on from, be it the
    run's own checkpoint in place of the one that the run began with.

    Raises: FileNotFoundError, RequestError (that draft is none, or of another family).
    """
    family, given = options.family, options.configpath
    if given and not family.config_keys:
        for other in DRAFT_FAMILIES.values():
            if named := load_config(given, other.config_keys, Use.SERVED).extra:
                raise RequestError(
                    f"--configpath {given} is the config of {other.describes} ({', '.join(named)}), and this run "
                    f"trains {family.describes}. Add --draft {other.name}, or leave --configpath out."
                )
    if given or options.init in family.starts or not family.config_keys:
        return given
    folder = options.last_state or start_folder(Path(options.init), "--init", family)
    return folder / "config.json"


def check_widths(found: Mapping[str, int], expected: Mapping[str, int], options: TrainOptions) -> None:
    """Raises: RequestError where a store has not the features that the draft is trained on."""
    for name, width in expected.items():
        holder = holder_of(name, found)
        if holder is None:
            raise RequestError(_lacking(name, found, options))
        held = found[holder] // states_in(holder) * states_in(name)
        if held != width:
            raise RequestError(
                f"--tmpdir {options.tmpdir} holds {name} of size {held}, but a draft of --basepath "
                f"{options.basepath} needs {width}. They are of different models."
            )


def _lacking(name: str, found: Mapping[str, int], options: TrainOptions) -> str:
    """What to say of a store without the features of that name."""
    said = (
        f"--tmpdir {options.tmpdir} holds {' and '.join(map(describe_feature, found))}, and "
        f"{options.family.describes} is to read {describe_feature(name)}."
    )
    wanted, held = set(aux_layers(name) or ()), {layer for other in found for layer in aux_layers(other) or ()}
    if not held:
        return f"{said} Train one that reads what is there, or make another store with allocation.py."
    missing, every = (",".join(map(str, sorted(layers))) for layers in (wanted - held, held | wanted))
    return (
        f"{said} A draft may read some of a store's layers, and this one has no {missing}. Name others, or make a "
        f"store of all of them with allocation.py --draft {options.draft} --aux_layers {every}."
    )


def warn_of_coverage(found: Coverage, options: TrainOptions) -> None:
    """Say where the draft's vocabulary is too small for the records it is trained on, and what helps."""
    if not found.is_low:
        return
    cure = f"raise --draft_vocab_size (to {found.enough:,} for 90%)"
    if options.init not in options.family.starts:
        cure = f"--init {options.init} brings its vocabulary along; start from another draft, or leave --init out"
    print(
        f"warning: at {1 - found.share:.1%} of the supervised positions the draft cannot be right, since the token is "
        f"none of the {found.drafted:,} that it chooses among: {cure}",
        file=sys.stderr,
    )
