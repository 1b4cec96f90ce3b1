"""Feature sources: what turns token sequences into the features of a record.

    transformers    the frozen target's trunk, in this process
    vllm            a vLLM engine (`eagle.generate.vllm_source`)

Chosen by name in `FEATURE_SOURCES`. Workers, and training without a store, use what `FeatureSource` says and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from eagle.generate.source_options import FeatureSource, SourceOptions
from eagle.generate.vllm_source import VllmSource
from eagle.streams import to_card
from eagle.target.compiled import LENGTH_STEP, compile_trunk, should_compile
from eagle.target.config import load_config
from eagle.target.cpu_attention import attention_for
from eagle.target.cpu_trunk import packed_trunk
from eagle.target.features import HIDDEN_STATE, aux_layers, check_features, features_of
from eagle.target.packing import pack
from eagle.target.pipeline import overlap_batches
from eagle.target.trunk import load_trunk, parts_of


class TrunkSource:
    """The target's trunk in this process: no ``lm_head``, no logits.

    Raises: RequestError as `load_trunk` does, for features that a trunk does not give, or where ``--compile on`` cannot
    be.
    """

    def __init__(self, options: SourceOptions) -> None:
        check_features(options.features)
        self.device, self.names, self.step = options.device, options.features, 1
        kind, dtype = options.device.type, options.dtype
        # Layers whose inputs are watched are no whole to compile.
        alone = all(aux_layers(name) is None for name in options.features)
        compiling = options.cards == 1 and alone and should_compile(options.compile, kind, options.tokens)
        self.trunk = load_trunk(
            options.model,
            dtype,
            options.device,
            attention="sdpa" if compiling else attention_for(options.device, dtype),
            spread=options.cards > 1 and kind != "cpu",
        )
        overlap_batches(self.trunk)
        compiled = compile_trunk(self.trunk, options.device) if compiling else None
        self.masked = compiled is None
        if compiled is not None:
            self.trunk, self.step = compiled, LENGTH_STEP
        packs = kind == "cpu" and compiled is None
        packs = packs and all(name == HIDDEN_STATE or aux_layers(name) for name in options.features)
        self.packed = packed_trunk(self.trunk, parts_of(self.trunk, load_config(options.model))) if packs else None

    @torch.inference_mode()
    def features(self, sequences: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Padding stands on the right, where a causal model never looks, so no mask is needed.

        None at all would not do: then transformers 4.53 to 4.57 look for packed sequences, and give every layer a whole
        mask, for which there are no flash kernels. One that masks nothing is dropped, but not by a compiled trunk.
        """
        if self.packed is not None:
            return self.packed.features(sequences, self.names)
        ids = np.zeros((len(sequences), self._padded(sequences)), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
        input_ids = to_card(torch.from_numpy(ids), self.device)
        mask = torch.ones_like(input_ids) if self.masked else None
        return features_of(self.trunk, self.names, input_ids=input_ids, attention_mask=mask, use_cache=False)

    def positions(self, sequences: Sequence[np.ndarray]) -> int:
        """How many positions a batch makes it compute: padding counts, what is computed for several counts once."""
        if self.packed is not None:
            return len(pack(sequences).ids)
        return len(sequences) * self._padded(sequences)

    def _padded(self, sequences: Sequence[np.ndarray]) -> int:
        return -(-max(map(len, sequences)) // self.step) * self.step


FEATURE_SOURCES: dict[str, Callable[[SourceOptions], FeatureSource]] = {
    "transformers": TrunkSource,
    "vllm": VllmSource,
}

#: Those that start an engine, which may live in another environment.
ENGINES = ("vllm",)

#: The source of the documented commands.
DEFAULT_SOURCE = "transformers"


def open_source(options: SourceOptions, name: str = DEFAULT_SOURCE) -> FeatureSource:
    """The source of that name, ready to compute."""
    return FEATURE_SOURCES[name](options)
