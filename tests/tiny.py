"""Tiny random targets, tokenizers and conversations for tests: real files in the real layouts, made in a second."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from eagle.generate.worker import Share, Worker, source_for

VOCAB = 400
CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "你好，世界。 Les élèves étudient à l'école. Straße, naïve, 日本語, emoji 🎉👩‍👩‍👧.",
    "USER: hello ASSISTANT: hi there, how are you today? [INST] question [/INST] answer",
    "The quick brown fox jumps over the lazy dog. 0123456789 \t\n  spaces   and\n\nnewlines",
]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in the style of Qwen2's, ChatML tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE with byte fallback in the style of Llama's: a leading space belongs to the word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False)
    # Without this split whole sentences would become tokens; Llama's never span words.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    tokenizer.train_from_iterator([line for line in CORPUS if line.isascii() and "\n" not in line], trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    content = json.loads(tokenizer.to_str())
    # The byte tokens are plain vocabulary, not special ones, or decoding would show their names.
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sentencepiece_model() -> bytes:
    """What Llama-1 and Llama-2 bring as ``tokenizer.model``: a BPE with byte fallback, trained on the plain corpus."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in CORPUS if line.isascii() and "\n" not in line] * 4),
        model_writer=out,
        model_type="bpe",
        vocab_size=VOCAB,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        minloglevel=2,
    )
    return out.getvalue()


def keep_only_tokenizer_model(folder: Path) -> Path:
    """Give a Llama a ``tokenizer.model`` and nothing else of a tokenizer but what its config says of it."""
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return folder


def make_target(
    folder: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    kv_heads: int = 2,
    layers: int = 2,
    hidden: int = 32,
    layout: str = "safetensors",
    max_shard_size: str = "1GB",
    seed: int = 0,
    **config: Any,
) -> Path:
    """A tiny random target with its tokenizer, as a Hugging Face folder.

    layout: 'safetensors' or 'bin'; `max_shard_size` below the model's size gives a sharded model with an index.
    """
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB + 24,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,  # large enough that the random model's choices are not all alike
        **config,
    }
    if int(transformers.__version__.split(".")[0]) < 5 and "rope_parameters" in sizes:
        scaling = dict(sizes.pop("rope_parameters"))  # the caller's own is used again for the next target
        sizes |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    if family == "llama":
        model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**sizes))
        tokenizer = word_piece_tokenizer()
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        tokenizer = byte_level_tokenizer()
        with torch.no_grad():  # a fresh model's biases are zero, which would hide a lost one
            for name, parameter in model.named_parameters():
                if name.endswith("_proj.bias"):
                    parameter.normal_(std=0.2)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "safetensors":
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        save_pickled(model, folder, shards=2 if max_shard_size != "1GB" else 1)
    tokenizer.save_pretrained(folder)
    return folder


def save_pickled(model: torch.nn.Module, folder: Path, shards: int) -> None:
    """Save as ``pytorch_model.bin`` (transformers 5 no longer writes it, old models come in it)."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names, weight_map = list(state), {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        own = names[shard::shards]
        torch.save({name: state[name] for name in own}, folder / file)
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def conversations(count: int, turns: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """ShareGPT records of varied lengths made from the corpus."""
    generator = torch.Generator().manual_seed(seed)

    def text() -> str:
        picks = torch.randint(len(CORPUS), (int(torch.randint(1, 4, (1,), generator=generator)),), generator=generator)
        return " ".join(CORPUS[pick] for pick in picks.tolist())

    return [
        {
            "id": f"c{number}",
            "conversations": [{"from": speaker, "value": text()} for _ in range(turns) for speaker in ("human", "gpt")],
        }
        for number in range(count)
    ]


def write_sharegpt(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def cpu_worker(outdir: Path, number: int) -> Worker:
    """A worker of a claimed and encoded job, in this process."""
    share = Share(outdir, number)
    return Worker(share, source_for(share, "cpu", cards=1, compile_mode="off"))
