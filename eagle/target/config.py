"""config.json of targets and drafts, whichever transformers wrote it, as one frozen dataclass.

transformers 4 writes ``rope_theta`` / ``rope_scaling`` / ``torch_dtype``; transformers 5 writes
``rope_parameters`` / ``dtype``. vLLM's EAGLE drafts add two shapes of their own: nested (``{"model": {...}}``)
and a Llama config with ``qkv_bias``. All are read alike here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle.errors import RequestError
from eagle.files import read_json
from eagle.target.families import LLAMA, TARGET_FAMILIES, TargetFamily
from eagle.target.quantization import Quantization, Use, quantization_beside, quantization_in
from eagle.target.refusals import other_kind_of_model


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers a decoder layer is built from. `family` is the target's model_type.

    logit_scale: what the head's products are multiplied by. own: further keys of the target's family that change what
    it computes. extra: keys that a draft family adds to its drafts' config.json, as they stand there. quantization: of
    a target's weights, which no draft inherits.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    hidden_act: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    initializer_range: float
    dtype: str | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    logit_scale: float = 1.0
    own: dict[str, Any] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise RequestError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}: the config is damaged."
            )

    @property
    def shares_head(self) -> bool:
        """Whether the target's ``lm_head``, as its logits are computed, is its embedding: one tensor then, not two."""
        return self.tie_word_embeddings and self.logit_scale == 1.0

    @property
    def window(self) -> int | None:
        """To how many positions vLLM limits what the draft's layer attends to; None: to none."""
        found = self.own.get(TARGET_FAMILIES[self.family].window or "")
        return found if found is not None and found < self.max_position_embeddings else None

    def digest(self) -> str:
        """sha256 over everything that changes what the model computes (ids and dtype do not)."""
        ignored = {
            "dtype",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "initializer_range",
            "extra",
            "quantization",
        }
        content = {k: v for k, v in dataclasses.asdict(self).items() if k not in ignored}
        # Digests of targets that have none of these are as they were before there were any.
        content["own"] = {key: value for key, value in self.own.items() if value is not None}
        if not content["own"]:
            del content["own"]
        if self.logit_scale == 1.0:
            del content["logit_scale"]
        if self.quantization:
            content["quantization"] = self.quantization.content
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def differences(self, base: ModelConfig, names: Iterable[str]) -> list[str]:
        """In what a draft's config differs from its base model's, of these fields, in words."""
        return [
            f"{name} is {getattr(self, name)!r}, the base model's is {getattr(base, name)!r}"
            for name in names
            if getattr(self, name) != getattr(base, name)
        ]

    def to_json(self, *, as_llama: bool = False) -> dict[str, Any]:
        """A plain Hugging Face config. Both theta keys are written, equal: old readers take one, new the other.

        `as_llama` writes a draft of a Qwen2 model as a Llama with ``qkv_bias``, the only form of it that vLLM's
        EAGLE class loads.
        """
        family = LLAMA if as_llama else self.family
        scaled = {"logit_scale": self.logit_scale} if self.logit_scale != 1.0 and family == LLAMA else {}
        rope = dict(self.rope_scaling or {"rope_type": "default"})
        config: dict[str, Any] = {
            "architectures": [TARGET_FAMILIES[family].architecture],
            "model_type": family,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            # A copy: transformers writes rope_theta into the dict it is given.
            "rope_scaling": dict(self.rope_scaling) if self.rope_scaling else None,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "hidden_act": self.hidden_act,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "torch_dtype": self.dtype,
        }
        biases = TARGET_FAMILIES[family].keys(self.qkv_bias, self.o_bias, self.mlp_bias)
        return config | biases | scaled | self.own | self.extra

    def draft(self) -> ModelConfig:
        """The draft's config: a single layer of this model's sizes, of Llama's kind where its own is another.

        The draft learns its own attention, so that it need not have what only the target's has: a part of a head
        without rope, or longrope, of which vLLM and transformers choose the factors differently.
        """
        layer = dataclasses.replace(self, num_hidden_layers=1, own={}, quantization=None)
        if layer.rope_scaling and layer.rope_scaling["rope_type"] == "longrope":
            layer = dataclasses.replace(layer, rope_scaling=None)
        if TARGET_FAMILIES[self.family].as_itself:
            return layer
        return dataclasses.replace(layer, family=LLAMA, hidden_act="silu")


def parse_config(
    raw: dict[str, Any],
    source: str = "config.json",
    extra: Iterable[str] = (),
    use: Use = Use.PLAIN,
    quantization: Quantization | None = None,
) -> ModelConfig:
    """Read a config dict of either transformers generation, or of an exported draft (plain or nested).

    extra: keys to keep as they are. use: what the model is for, which a quantized one may not do. quantization: what a
    file beside the config says of it.

    Raises: RequestError for an architecture that is not supported, a missing size, or a quantized model.
    """
    if raw.get("speculators_model_type") and isinstance(raw.get("transformer_layer_config"), dict):
        # As the speculators library writes a draft: the layer's numbers inside, the draft's own around them.
        layer = {**raw["transformer_layer_config"], "norm_before_residual": True, "num_hidden_layers": 1}
        own = {key: value for key, value in raw.items() if value is not None}
        raw = layer | {key: own[key] for key in own.keys() - {"architectures", "model_type", "auto_map"}}
    if raw.get("model_type") == "eagle" or ("model" in raw and "hidden_size" not in raw):
        inner = raw.get("model")
        if not isinstance(inner, dict):
            raise RequestError(f"{source}: model_type is 'eagle' but there is no 'model' object inside it.")
        raw = {"torch_dtype": raw.get("torch_dtype"), **inner}
    family = _family(raw, source)
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(key) or {}, dict):
            raise RequestError(f"{source}: {key} is {raw[key]!r}; expected an object, or null.")
    raw = family.understood(raw)
    for refusal in family.refusals:
        if reason := refusal(raw):
            raise RequestError(f"{source}: {reason}")

    quantization = quantization_in(raw) or quantization
    if quantization:
        quantization.check(use, source if quantization.file in source else f"{source}, by {quantization.file}")

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise RequestError(f"{source} has no {key!r}; a {family.name} config must name it.")
        if type(raw[key]) is not int or raw[key] < 1:
            raise RequestError(f"{source}: {key} is {raw[key]!r}; expected a whole number above 0.")
        return raw[key]

    def optional(key: str, default: int) -> int:
        return need(key) if raw.get(key) else default

    heads = need("num_attention_heads")
    for key in family.needed:
        need(key)
    qkv_bias, o_bias = family.biases(raw)
    theta, scaling = _rope(raw, source, family.rope_theta)
    return ModelConfig(
        family=family.name,
        hidden_size=need("hidden_size"),
        intermediate_size=need("intermediate_size"),
        num_hidden_layers=need("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=optional("num_key_value_heads", heads),
        head_dim=optional("head_dim", need("hidden_size") // heads),
        vocab_size=need("vocab_size"),
        max_position_embeddings=optional("max_position_embeddings", family.max_position_embeddings),
        rms_norm_eps=raw.get("rms_norm_eps", family.rms_norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
        hidden_act=raw.get("hidden_act", "silu"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tie_word_embeddings=family.tied if (tied := raw.get("tie_word_embeddings")) is None else bool(tied),
        initializer_range=raw.get("initializer_range", 0.02),
        dtype=raw.get("dtype") or raw.get("torch_dtype"),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw.get("eos_token_id"),
        pad_token_id=raw.get("pad_token_id"),
        logit_scale=_logit_scale(raw, family, source),
        own={key: raw[key] for key in family.own_keys if key in raw},
        extra={key: raw[key] for key in extra if key in raw},
        quantization=quantization,
    )


def _family(raw: dict[str, Any], source: str) -> TargetFamily:
    """Raises: RequestError for a model of none."""
    family = TARGET_FAMILIES.get(raw.get("model_type", ""))
    if family is None or raw.get("is_encoder_decoder"):
        if reason := other_kind_of_model(raw):
            raise RequestError(f"{source}: {reason}")
        architectures = raw.get("architectures") or []
        named = architectures[0] if architectures else raw.get("model_type")
        raise RequestError(
            f"{source}: the architecture {named!r} is not supported; expected one of "
            f"{', '.join(known.describes for known in TARGET_FAMILIES.values())}, whose config.json says model_type "
            f"{', '.join(map(repr, TARGET_FAMILIES))}."
        )
    return family


def _logit_scale(raw: dict[str, Any], family: TargetFamily, source: str) -> float:
    """Drafts say it as vLLM reads it, targets as their family does."""
    key = family.divisor or "logit_scale"
    found = raw.get(key) if family.divisor or family.name == LLAMA else None
    value = 1.0 if found is None else found
    if not isinstance(value, int | float) or not value > 0:
        raise RequestError(f"{source}: {key} is {value!r}; expected a number above 0.")
    return 1.0 / value if family.divisor else float(value)


def _rope(raw: dict[str, Any], source: str, default: float) -> tuple[float, dict[str, Any] | None]:
    """theta and scaling from either generation's keys; a plain rotary embedding has no scaling."""
    parameters = dict(raw.get("rope_parameters") or {})
    scaling = {**(raw.get("rope_scaling") or {}), **parameters}
    theta_new, theta_old = scaling.pop("rope_theta", None), raw.get("rope_theta")
    if theta_new is not None and theta_old is not None and float(theta_new) != float(theta_old):
        raise RequestError(
            f"{source}: rope_theta is {theta_old} but rope_parameters says {theta_new}; they must agree. "
            "Keep the one the model was trained with."
        )
    theta = theta_new if theta_new is not None else theta_old
    kind = scaling.pop("type", None)  # the name transformers 4 used first
    scaling.setdefault("rope_type", kind or "default")
    if scaling["rope_type"] == "longrope" and (original := raw.get("original_max_position_embeddings")):
        scaling.setdefault("original_max_position_embeddings", original)  # beside it, in the form of transformers 4
    return float(theta or default), None if scaling["rope_type"] == "default" else scaling


def load_config(path: str | Path, extra: Iterable[str] = (), use: Use = Use.PLAIN) -> ModelConfig:
    """The config of a model folder, or of a config.json given by itself. extra, use: as in `parse_config`."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file. A Hugging Face model folder holds a config.json.")
    raw = read_json(file, "a model's config.json")
    beside = None if quantization_in(raw) else quantization_beside(file.parent)
    return parse_config(raw, str(file), extra, use, beside)
