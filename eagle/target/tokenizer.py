"""The target's tokenizer, and whether every token it makes has a row in the target's embedding."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from eagle.errors import RequestError
from eagle.files import check_no_pointer, read_json
from eagle.target.config import ModelConfig
from eagle.versions import transformers_release

#: What a tokenizer may consist of.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


#: Spaces, several scripts and line breaks: what a tokenizer loses that was put together wrongly.
_PROBE = "Hello world, \u4f60\u597d.\n  x = 1"


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a model folder. A ``tokenizer.model`` alone is converted (sentencepiece, protobuf).

    Raises: RequestError.
    """
    import transformers
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    there = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for name in there:
        check_no_pointer(folder / name)
    where = f"--model_name {folder}: its tokenizer cannot be loaded"
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(there):
        raise RequestError(
            f"{where}: there is none. A model folder holds tokenizer.json (or tokenizer.model) and "
            "tokenizer_config.json; fetch them from where the weights came from."
        )
    if "tokenizer.model" in there and "tokenizer.json" not in there:
        _check_sentencepiece(folder / "tokenizer.model", where)
    try:
        tokenizer = _of_any_class(folder, there)
        # Text is what the tokens say: vLLM takes no space out of it either, whatever tokenizer_config.json has.
        tokenizer.clean_up_tokenization_spaces = False
        if "tokenizer.json" not in there:
            return tokenizer
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
        own.no_padding()
        own.no_truncation()
        made = f"note: transformers {transformers.__version__} makes of {folder} a {type(tokenizer).__name__}, which"
        if _is_rebuilt_wrongly(tokenizer, own):
            print(f"{made} is not what its tokenizer.json says; tokenizer.json is used", file=sys.stderr)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), clean_up_tokenization_spaces=False)
        elif text := _tokenised_otherwise(tokenizer, own):
            said, file = tokenizer.tokenize(text, add_special_tokens=False), own.encode(text, add_special_tokens=False)
            print(
                f"{made} tokenises {text!r} as {said}, and its tokenizer.json as {file.tokens}. Another version of "
                "transformers may follow the file: train with the one that you serve with",
                file=sys.stderr,
            )
        return tokenizer
    except Exception as error:  # the tokenizers library raises plain exceptions of its own
        raise RequestError(f"{where}: {_reason(folder, there, error)}") from error


def _of_any_class(folder: Path, there: list[str]) -> Any:
    """What transformers makes of a tokenizer, or of its tokenizer.json where it takes a class that is none of its own.

    transformers 4.57 has mistral_common's for Mistral's models that name no class, where that is installed (vLLM brings
    it): it lacks most of what a tokenizer can do, and finds only files of its own.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False)
    except ValueError as error:
        if "tokenizer.json" not in there or "No tokenizer file found" not in str(error):
            raise
        tokenizer = None
    if isinstance(tokenizer, PreTrainedTokenizerBase) or "tokenizer.json" not in there:
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def _check_sentencepiece(path: Path, where: str) -> None:
    """transformers 5 takes a damaged file for one of tiktoken's, and makes a tokenizer of a few tokens of it.

    Raises: RequestError.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise RequestError(
            f"{where}: reading tokenizer.model takes sentencepiece and protobuf; pip install them."
        ) from error
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        raise RequestError(
            f"{where}: {path.name} is no whole sentencepiece model. Fetch it again, or save a fast tokenizer beside "
            "the model (a tokenizer.json)."
        ) from error


def _is_rebuilt_wrongly(tokenizer: Any, own: Any) -> bool:
    """Whether text survives tokenizer.json (`own`) and does not survive what transformers makes of it.

    transformers 5 builds some classes anew from the vocabulary alone: a byte-level tokenizer that calls itself
    LlamaTokenizerFast, as those of some Llama-3 models do, then loses spaces.
    """
    if own.decode(own.encode(_PROBE, add_special_tokens=False).ids) != _PROBE:
        return False
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False) != _PROBE


def _tokenised_otherwise(tokenizer: Any, own: Any) -> str | None:
    """A text of which transformers makes other tokens than tokenizer.json (`own`) says; None where none is found.

    Llama's class of transformers 5 puts no space in front of what stands behind a special token (Phi-3's replies), and
    none in front of a space (Mistral's first question).
    """
    added = tokenizer.added_tokens_decoder.items()  # its class may have added some that the file does not know
    special = [token.content for number, token in added if token.special and own.token_to_id(token.content) == number]
    for text in (*(f"{token}{space}hello" for token in special[:16] for space in ("", " ", "\n")), "hello", " hello"):
        if tokenizer(text, add_special_tokens=False)["input_ids"] != own.encode(text, add_special_tokens=False).ids:
            return text
    return None


def _reason(folder: Path, there: list[str], error: Exception) -> str:
    """Why, and what to do about it."""
    for name in there:
        if name.endswith(".json"):
            try:
                content = read_json(folder / name, "part of a tokenizer")
            except RequestError:
                return f"{name} is no whole JSON file: it was cut short or edited. Fetch it again."
            if name == "tokenizer_config.json" and content.get("auto_map"):
                return (
                    f"it is code of its own ({content['auto_map']}), which is not run here. Save a fast tokenizer "
                    "beside the model (a tokenizer.json), and take auto_map out of tokenizer_config.json."
                )
            listed = isinstance(content.get("extra_special_tokens"), list)
            if name == "tokenizer_config.json" and listed and transformers_release() < (5,):
                return (
                    "transformers 5 saved it, and this one is older, as a server's beside it may be. Rename "
                    "extra_special_tokens in tokenizer_config.json to additional_special_tokens, and set "
                    "tokenizer_class to PreTrainedTokenizerFast where there is a tokenizer.json; or update "
                    "transformers."
                )
    said = (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")[:200]
    if re.search(r"Tokenizer class \w+ does not exist", said):
        return (
            f"{said}: it was saved by a newer transformers. Update transformers, or set tokenizer_class in "
            "tokenizer_config.json to PreTrainedTokenizerFast where there is a tokenizer.json."
        )
    if re.search(r"did not match any variant|unknown variant|missing field|invalid type|expected", said):
        import tokenizers

        return (
            f"tokenizer.json is of another version of the tokenizers library than {tokenizers.__version__}, which is "
            f"here, or damaged ({said}). Update tokenizers and transformers, or fetch the file again."
        )
    return f"{said}. A model folder holds tokenizer.json (or tokenizer.model) and tokenizer_config.json."


def tokens_without_row(tokenizer: Any, rows: int) -> dict[str, int]:
    """The tokens whose id lies beyond an embedding of so many rows, by their text. (More rows than tokens are fine.)"""
    return {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}


def check_rows(tokenizer: Any, template: str, config: ModelConfig, folder: str | Path) -> None:
    """The tokens that a conversation is sure to have must have rows in the embedding.

    An added token beyond them that nothing uses (the padding token of many Llama-2 copies) is let be.

    Raises: RequestError.
    """
    beyond = tokens_without_row(tokenizer, config.vocab_size)
    if not beyond:
        return
    own = beyond.keys() - tokenizer.get_added_vocab().keys()
    if own:
        raise RequestError(
            f"--model_name {folder}: its tokenizer numbers tokens up to {max(beyond.values())}, but the embedding has "
            f"{config.vocab_size} rows (vocab_size in config.json). They are not of the same model: take the tokenizer "
            "that was published with the weights."
        )
    ends = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    used = sorted(token for token in beyond if token in ends or token in template)
    if used:
        named = ", ".join(f"{token} ({beyond[token]})" for token in used)
        raise RequestError(
            f"--model_name {folder}: the chat template writes {named}, but the embedding has only {config.vocab_size} "
            "rows (vocab_size in config.json): the tokens were added to the tokenizer and not to the model. Use the "
            "model that was trained with them, or another --chat_template."
        )
