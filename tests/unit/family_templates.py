"""Chat templates and tokenizers of the same shape as those of the families people run, small and made here.

Every template writes the special tokens, spaces, headers and refusals of its family, in words of our own; every
tokenizer is trained on a few lines and has its family's kind, special tokens and flags.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CORPUS


def byte_level(
    bos: str | None,
    eos: str,
    special: list[str],
    *,
    plain: tuple[str, ...] = (),
    strips: bool = False,
    nfc: bool = False,
) -> PreTrainedTokenizerFast:
    """As Llama 3, Qwen, Granite, SmolLM3, Phi-4 and R1 have it.

    plain: added tokens that are not special, such as ``<think>``. strips: special tokens take the white space at both
    sides with them.
    """
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    )
    return finished(tokenizer, bos, eos, special, plain=plain, lstrip=strips, rstrip=strips)


def sentence_pieces(
    bos: str | None, eos: str, special: list[str], *, spaces: str, plain: tuple[str, ...] = (), rstrip: bool = False
) -> PreTrainedTokenizerFast:
    """As sentencepiece's are converted, with byte fallback.

    spaces: where a space is put in front of a text: "every piece" between special tokens (the older conversion), at its
    "beginning", or "nowhere".
    """
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    # For training alone: pieces never span words.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=["<unk>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator([line for line in CORPUS if line.isascii() and "\n" not in line], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in bytes_]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    decoding: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.pre_tokenizer = None
    if spaces == "every piece":
        decoding.append(decoders.Strip(" ", 1, 0))
    elif spaces == "beginning":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(decoding)
    return finished(tokenizer, bos, eos, special, plain=plain, rstrip=rstrip, unk_token="<unk>")


def finished(
    tokenizer: Tokenizer,
    bos: str | None,
    eos: str,
    special: list[str],
    *,
    plain: tuple[str, ...] = (),
    lstrip: bool = False,
    rstrip: bool = False,
    **more: str,
) -> PreTrainedTokenizerFast:
    """With its added tokens; one that has a token for the beginning of a text puts it there by itself, too."""
    ends = [token for token in (bos, eos) if token and token not in special]
    tokenizer.add_special_tokens(ends)
    tokenizer.add_special_tokens([AddedToken(text, lstrip=lstrip, rstrip=rstrip, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in plain])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, **more)


def llama3_tokens() -> PreTrainedTokenizerFast:
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
    return byte_level("<|begin_of_text|>", "<|eot_id|>", marks)


def chatml_tokens() -> PreTrainedTokenizerFast:
    return byte_level(None, "<|im_end|>", ["<|endoftext|>", "<|im_start|>"], plain=("<think>", "</think>"), nfc=True)


def smollm3_tokens() -> PreTrainedTokenizerFast:
    return byte_level("<|begin_of_text|>", "<|im_end|>", ["<|im_start|>"], plain=("<think>", "</think>"))


def mistral_tokens() -> PreTrainedTokenizerFast:
    return sentence_pieces("<s>", "</s>", [], spaces="every piece")


def mistral3_tokens() -> PreTrainedTokenizerFast:
    return sentence_pieces("<s>", "</s>", ["[INST]", "[/INST]"], spaces="beginning")


def gemma_tokens() -> PreTrainedTokenizerFast:
    marks = ["<start_of_turn>", "<end_of_turn>"]
    return sentence_pieces("<bos>", "<eos>", marks, spaces="nowhere", plain=("\n", "\n\n", "\n\n\n", "\t"))


def phi3_tokens() -> PreTrainedTokenizerFast:
    marks = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    return sentence_pieces("<s>", "<|endoftext|>", marks, spaces="every piece", rstrip=True)


def phi4_tokens() -> PreTrainedTokenizerFast:
    return byte_level(None, "<|im_end|>", ["<|im_start|>", "<|im_sep|>", "<|im_end|>"], strips=True)


def granite_tokens() -> PreTrainedTokenizerFast:
    return byte_level(None, "<|end_of_text|>", ["<|start_of_role|>", "<|end_of_role|>"])


def r1_tokens() -> PreTrainedTokenizerFast:
    plain = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
    return byte_level("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", [], plain=plain)


ALTERNATE = (
    "{%- if (turn.role == 'user') != (loop.index0 is even) %}"
    "{{ raise_exception('roles have to alternate, a user first') }}{% endif %}"
)

LLAMA_3 = """
{%- for turn in messages %}
{{- (bos_token if loop.first else '') + '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' }}
{{- turn.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
# The first copies wrote the generation prompt whether it was asked for or not.
LLAMA_3_FIRST = LLAMA_3.replace("{%- if add_generation_prompt %}", "").removesuffix("{% endif %}")

_LLAMA_31 = """
{%- if date_string is not defined %}FALLBACK{% endif %}
{%- set own = messages[0].content | trim if messages[0].role == 'system' else '' %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none and tools %}{{ 'Environment: ipython\n' }}{% endif %}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' + own + '<|eot_id|>' }}
{%- for turn in messages if turn.role != 'system' %}
{{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' + turn.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LLAMA_31 = _LLAMA_31.replace("FALLBACK", "{% set date_string = '26 Jul 2024' %}")
LLAMA_32 = _LLAMA_31.replace(
    "FALLBACK",
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}",
)

QWEN_3 = """
{%- set ns = namespace(asked=0) %}
{%- for turn in messages %}{% if turn.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for turn in messages %}
{%- if turn.role != 'assistant' %}
{{- '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}
{%- else %}
{%- set said = turn.content %}
{%- set thought = '' %}
{%- if '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if loop.index0 > ns.asked and (loop.last or thought) %}
{{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + said.lstrip('\n') }}
{%- else %}
{{- '<|im_start|>assistant\n' + said }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
# A model that always reasons: its prompt begins that.
QWEN_3_THINKING = QWEN_3.replace(
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    "{{ '<think>\n' }}",
)

SMOLLM_3 = """
{%- set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}
{%- set own = messages[0].content if messages[0].role == 'system' else '' %}
{%- if '/no_think' in own %}{% set mode = '/no_think' %}{% elif '/think' in own %}{% set mode = '/think' %}{% endif %}
{%- set own = own.replace('/no_think', '').replace('/think', '').rstrip() %}
{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' + mode }}
{{- '\n\n## Custom Instructions\n\n' + (own or 'Be helpful.') + '\n\n<|im_end|>\n' }}
{%- for turn in messages %}
{%- if turn.role == 'user' %}
{{- '<|im_start|>user\n' + turn.content + '<|im_end|>\n' }}
{%- elif turn.role == 'assistant' %}
{%- generation %}
{{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if mode == '/no_think' else '') }}
{{- turn.content.lstrip('\n') + '<|im_end|>\n' }}
{%- endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if mode == '/no_think' else '') }}
{%- endif %}"""

MISTRAL_1 = (
    "{{ bos_token }}{% for turn in messages %}" + ALTERNATE + "{% if turn.role == 'user' %}"
    "{{ '[INST] ' + turn.content + ' [/INST]' }}{% else %}{{ turn.content + eos_token }}{% endif %}{% endfor %}"
)
# Also Mixtral's. The system prompt stands in the first question.
MISTRAL_2 = (
    "{% set own = messages[0].content if messages[0].role == 'system' else none %}{{ bos_token }}"
    "{% for turn in (messages[1:] if own is not none else messages) %}" + ALTERNATE + "{% if turn.role == 'user' %}"
    "{{ ' [INST] ' + (own + '\n\n' if own is not none and loop.first else '') + turn.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn.content + eos_token }}{% endif %}{% endfor %}"
)
# The system prompt stands in the last question, so in a conversation that ends with a reply nowhere.
MISTRAL_3 = (
    "{% set own = messages[0].content if messages[0].role == 'system' else none %}{{ bos_token }}"
    "{% for turn in (messages[1:] if own is not none else messages) %}" + ALTERNATE + "{% if turn.role == 'user' %}"
    "{{ '[INST] ' + (own + '\n\n' if own is not none and loop.last else '') + turn.content + '[/INST]' }}"
    "{% else %}{{ ' ' + turn.content | trim + eos_token }}{% endif %}{% endfor %}"
)

_GEMMA_TURNS = (
    ALTERNATE + "{{ '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\n' }}"
    "OWN{{ turn.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
    "{% for turn in messages %}" + _GEMMA_TURNS.replace("OWN", "")
)
GEMMA_3 = (
    "{{ bos_token }}{% set own = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for turn in (messages[1:] if messages[0].role == 'system' else messages) %}"
    + _GEMMA_TURNS.replace("OWN", "{{ own if loop.first else '' }}")
)

PHI_3 = (
    "{% for turn in messages %}{{ '<|' + turn.role + '|>\n' + turn.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_4 = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '<|im_sep|>' + turn.content + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

GRANITE_3 = """
{%- if messages[0].role != 'system' %}
{{- '<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\nToday\\'s Date: ' }}
{{- strftime_now('%B %d, %Y') + '.\nYou are Granite.' + (' Think first.' if thinking else '') + '<|end_of_text|>\n' }}
{%- endif %}
{%- for turn in messages %}
{{- '<|start_of_role|>' + turn.role + '<|end_of_role|>' + turn.content + '<|end_of_text|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_of_role|>assistant' + (' ' + controls | tojson if controls else '') + '<|end_of_role|>' }}
{%- endif %}"""

R1 = """
{%- set ns = namespace(own='') %}
{%- for turn in messages if turn.role == 'system' %}{% set ns.own = turn.content %}{% endfor %}
{{- bos_token + ns.own }}
{%- for turn in messages %}
{%- if turn.role == 'user' %}{{ '<｜User｜>' + turn.content }}{% endif %}
{%- if turn.role == 'assistant' %}{{ '<｜Assistant｜>' + turn.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"""


def whole(reply: str) -> str:
    return reply


def without_breaks(reply: str) -> str:
    return reply.lstrip("\n")


def behind_open_think(reply: str) -> str | None:
    """What is left to say where the prompt ends with ``<think>`` and a line break."""
    return reply.removeprefix("<think>").removeprefix("\n") if "</think>" in reply else None


def kept_thoughts(reply: str) -> str:
    return reply if "</think>" in reply else reply.lstrip("\n")


def answer(reply: str) -> str:
    return reply.split("</think>")[-1].lstrip() if "</think>" in reply else reply.lstrip("\n")


@dataclass(frozen=True, slots=True)
class Family:
    """A template with its tokenizer, and what is to hold for it.

    end: the end of turn. says: a reply as the model says it, None where it could not. system: whether it takes a system
    prompt. exact: whether decoding keeps the first space of a text.
    """

    tokens: Callable[[], PreTrainedTokenizerFast]
    template: str
    end: str
    says: Callable[[str], str | None] = whole
    system: bool = True
    exact: bool = True
    variables: dict[str, Any] = field(default_factory=dict)


OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}
FAMILIES = {
    "llama 3.0": Family(llama3_tokens, LLAMA_3, "<|eot_id|>", str.strip),
    "llama 3.0, first copies": Family(llama3_tokens, LLAMA_3_FIRST, "<|eot_id|>", str.strip),
    "llama 3.1": Family(llama3_tokens, LLAMA_31, "<|eot_id|>", str.strip),
    "llama 3.2": Family(llama3_tokens, LLAMA_32, "<|eot_id|>", str.strip),
    "llama 3.2, its date given": Family(
        llama3_tokens, LLAMA_32, "<|eot_id|>", str.strip, variables={"date_string": "01 Jan 2025"}
    ),
    "qwen3": Family(chatml_tokens, QWEN_3, "<|im_end|>", kept_thoughts),
    "qwen3, thinking on": Family(chatml_tokens, QWEN_3, "<|im_end|>", kept_thoughts, variables=ON),
    "qwen3, thinking off": Family(chatml_tokens, QWEN_3, "<|im_end|>", answer, variables=OFF),
    "qwen3, always thinking": Family(chatml_tokens, QWEN_3_THINKING, "<|im_end|>", behind_open_think),
    "smollm3": Family(smollm3_tokens, SMOLLM_3, "<|im_end|>", without_breaks),
    "smollm3, thinking off": Family(smollm3_tokens, SMOLLM_3, "<|im_end|>", answer, variables=OFF),
    "mistral 0.1": Family(mistral_tokens, MISTRAL_1, "</s>", system=False, exact=False),
    "mistral 0.2, mixtral": Family(mistral_tokens, MISTRAL_2, "</s>", exact=False),
    "mistral 0.3": Family(mistral3_tokens, MISTRAL_3, "</s>", str.strip, exact=False),
    "gemma 1, 2": Family(gemma_tokens, GEMMA_2, "<end_of_turn>", str.strip, system=False),
    "gemma 3": Family(gemma_tokens, GEMMA_3, "<end_of_turn>", str.strip),
    "phi 3": Family(phi3_tokens, PHI_3, "<|end|>", exact=False),
    "phi 4": Family(phi4_tokens, PHI_4, "<|im_end|>", str.rstrip),  # the end of turn takes white space with it
    "granite 3": Family(granite_tokens, GRANITE_3, "<|end_of_text|>"),
    "granite 3, thinking on": Family(granite_tokens, GRANITE_3, "<|end_of_text|>", variables={"thinking": True}),
    "deepseek r1": Family(r1_tokens, R1, "<｜end▁of▁sentence｜>", behind_open_think),
}
