"""Features from vLLM: its kernels, its tensor and pipeline parallelism, in the worker's own process or started from it.

An engine of this process is given every sequence as a prompt whose reply is one token. The hidden states come back from
inside it (`eagle.generate.states_connector`): the inputs of layers as they are, and what the last layer gives, to which
the final norm is applied here.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eagle.dtypes import dtype_name
from eagle.engines import ENVIRONMENT
from eagle.errors import WorkError
from eagle.files import ROOT
from eagle.generate.engine_check import FIXED, check_engine_family
from eagle.generate.handover import Folder, Handover, clean_up
from eagle.generate.source_options import SourceOptions
from eagle.target.config import ModelConfig, load_config
from eagle.target.features import HIDDEN_STATE, aux_layers, check_features
from eagle.target.quantization import Use
from eagle.target.trunk import least_context, load_final_norm
from eagle.target.weights import Weights

#: The engine in this process, which may serve longer sequences than the target was made for; its log on stderr.
_IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
#: Positions that have to be free behind a sequence: of its reply, and of what is drafted behind that. vLLM leaves out
#: the states of a whole batch where one sequence has fewer.
_BEHIND = 8


class VllmSource:
    """A vLLM engine.

    Raises: RequestError for features that it does not give, or a target that it does not read them of; WorkError where
    it does not start.
    """

    def __init__(self, options: SourceOptions) -> None:
        check_features(options.features)
        config = load_config(options.model, use=Use.SERVED)
        model_impl = check_engine_family(config)
        read = {layer for name in options.features for layer in aux_layers(name) or ()}
        self.names, self.last = options.features, config.num_hidden_layers
        # vLLM sorts them too.
        self.layers = sorted(read | {self.last})
        self.dtype = options.dtype
        self.norm = load_final_norm(Weights(options.model), config, options.dtype, options.device)
        clean_up()
        backend = options.engine.arguments.get("distributed_executor_backend", "uni")
        folder = Folder().path if options.engine.cards > 1 or backend != "uni" else None
        self.handover, self._keys = Handover(folder), itertools.count()
        longest = options.longest or config.max_position_embeddings
        os.environ.update(_IN_PROCESS)
        several = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # by itself it wants a NUMA node for each
        for name, value in {**ENVIRONMENT, **(several if options.engine.cards > 1 else {})}.items():
            os.environ.setdefault(name, value)
        arguments = {
            "enforce_eager": True,  # graphs are for decoding
            **options.engine.arguments,
            "model": str(options.model),
            "dtype": dtype_name(options.dtype),
            "hf_overrides": _overrides(config, model_impl),
            "max_model_len": max(longest + _BEHIND, least_context(config)),
            "tensor_parallel_size": options.engine.tensor_parallel_size,
            "pipeline_parallel_size": options.engine.pipeline_parallel_size,
            "enable_prefix_caching": False,  # every position is computed, and is in the blocks of its own request
            "async_scheduling": False,
            "skip_tokenizer_init": True,
            "seed": 0,
            "speculative_config": {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": self.layers}},
            },
            "kv_transfer_config": {
                "kv_connector": "StatesConnector",
                "kv_connector_module_path": "eagle.generate.states_connector",
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {"eagle_folder": str(folder)} if folder else {},
            },
        }
        assert arguments.keys() - {"enforce_eager", *options.engine.arguments} == FIXED
        self.engine = _start(arguments)

    def features(self, sequences: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """One sequence after the other is in the answer as it was in the engine, however that batched them."""
        from vllm import SamplingParams

        keys = [str(next(self._keys)) for _ in sequences]
        sampling = [
            SamplingParams(
                temperature=0.0,
                max_tokens=1,
                ignore_eos=True,
                detokenize=False,
                extra_args={"kv_transfer_params": {"eagle_key": key}},
            )
            for key in keys
        ]
        prompts = [{"prompt_token_ids": sequence.tolist()} for sequence in sequences]
        try:
            self.engine.generate(prompts, sampling, use_tqdm=False)
        except Exception as error:  # anything that its workers or kernels raise
            raise WorkError(f"vLLM ended while it computed features: {_spelled(error)}") from error
        return self._collect([self.handover.take(key) for key in keys], list(map(len, sequences)))

    @torch.inference_mode()
    def _collect(self, states: list[torch.Tensor], lengths: list[int]) -> dict[str, torch.Tensor]:
        """states: ``[T, layers, H]`` each, of so many positions."""
        shapes = [tuple(one.shape[:2]) for one in states]
        if shapes != [(length, len(self.layers)) for length in lengths] or states[0].dtype != self.dtype:
            raise WorkError(
                f"vLLM handed over hidden states of {shapes[:4]} positions and layers in {states[0].dtype}; expected "
                f"{lengths[:4]} positions and {len(self.layers)} layers in {self.dtype}."
            )
        padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        rows = torch.arange(padded.shape[1], device=padded.device)
        inside = rows < torch.tensor(lengths, device=padded.device)[:, None]
        if not (padded.any(-1).any(-1) | ~inside).all():
            raise WorkError(
                "vLLM left hidden states of some positions out: they are zeros. Another release of vLLM may not, and "
                "--feature_source transformers does not."
            )
        place = {layer: at for at, layer in enumerate(self.layers)}
        found = {}
        for name in self.names:
            if name == HIDDEN_STATE:
                found[name] = self.norm.to(padded.device)(padded[:, :, place[self.last]])
            else:
                found[name] = padded[:, :, [place[layer] for layer in aux_layers(name) or ()]].flatten(2)
        return found


def _start(arguments: dict[str, Any]) -> Any:
    """Raises: WorkError with what it said."""
    from vllm import LLM

    # Processes that it spawns import the command and the connector: behind the libraries, as the package is otherwise.
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    try:
        return LLM(**arguments)
    except Exception as error:  # anything that its workers or kernels raise
        raise WorkError(f"vLLM did not start on {arguments['model']}: {_spelled(error)}") from error


def _overrides(config: ModelConfig, model_impl: str) -> dict[str, Any]:
    """Of what config.json says, to have the target run by that code.

    Not vLLM's option model_impl, by which it would look for its own model that keeps the states there as well.
    """
    if model_impl == "auto":
        return {}
    experts = any("experts" in key for key in config.to_json())
    return {"architectures": ["TransformersMoEForCausalLM" if experts else "TransformersForCausalLM"]}


def _spelled(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
