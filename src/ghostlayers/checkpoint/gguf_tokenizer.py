"""The tokens of a checkpoint as a GGUF file wants them.

llama.cpp splits text and merges tokens by rules of its own, chosen by names in the file: what
cannot be said by such a name is refused, because a file with the wrong one loads and then reads
every text slightly differently.
"""

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from ghostlayers.errors import ModelError, RecipeError, UnsupportedModelError
from ghostlayers.runtime.documents import brief

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CAPITAL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_WITH_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(after: str, numbers: str) -> str:
    """Words split where a capital follows a small letter."""
    return f"{_CAPITAL}*{_SMALL}+{after}|{_CAPITAL}+{_SMALL}*{after}|{numbers}{_REST_WITH_SLASHES}"


PATTERNS = {
    (_WORDS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_WORDS + r"\p{N}{1,3}" + _REST, False): "dbrx",
    (_WORDS + r"\p{N}" + _REST, False): "qwen2",
    (_cased("", r"\p{N}"), True): "tekken",
    (_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"), False): "gpt-4o",
}
"""Whole patterns by which tokenizers split text, and whether a word that is a token stays whole
without merging (``ignore_merges``): llama.cpp's names for the two together."""

SPACE = "\u2581"
"""What SentencePiece writes for a space."""


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The content of ``tokenizer.json``.

    Raises:
        UnsupportedModelError: there is none, or its kind is not written here.
        ModelError: it is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedModelError(
            f"'{folder}' has no tokenizer.json, which the tokens of a GGUF file are read from."
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = content["model"]["type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"'{path}' is damaged: {error!r}.") from error
    _check_kind(kind)
    return content


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, pre_tokenizer: str | None) -> None:
    """Refuse an open tokenizer whose `tokenizer.json` could not be written as GGUF.

    Args:
        tokenizer: as transformers opens it.
        pre_tokenizer: llama.cpp's name for how it splits text; None where it must be known.

    Raises:
        UnsupportedModelError: its kind is not written here, or nobody knows how it splits text.
        RecipeError: the name is none.
    """
    check_splitting(pre_tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # what has none is told by the folder that is written
        return
    content = json.loads(backend.to_str())
    _check_kind(content["model"]["type"])
    splitting_name(content, pre_tokenizer)


def _check_kind(kind: str) -> None:
    if kind != "BPE":
        raise UnsupportedModelError(
            f"a tokenizer of type {kind} is not written as GGUF here: expected BPE."
        )


def check_splitting(given: str | None) -> None:
    """Refuse a name for how text is split that llama.cpp cannot have; it has a list of plain words.

    Raises:
        RecipeError: with what a name looks like.
    """
    if given is not None and not re.fullmatch(r"[a-z0-9._-]{1,64}", given):
        raise RecipeError(
            "--pre-tokenizer: expected a name that llama.cpp knows, such as llama-bpe or qwen2: up "
            f"to 64 small letters, digits, dots, dashes and underscores, got {brief(given)}."
        )


def splitting_name(content: dict[str, Any], given: str | None = None) -> str:
    """llama.cpp's name for how a tokenizer splits text into words.

    Args:
        content: of ``tokenizer.json``.
        given: the name, where it need not be found out.

    Raises:
        UnsupportedModelError: the pattern is none of those known here.
        RecipeError: the name is none.
    """
    check_splitting(given)
    if given is not None:
        return given
    if is_sentencepiece(content):
        return "default"
    outer = content.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    kinds = [step.get("type") for step in steps]
    if kinds == ["Split", "ByteLevel"]:
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        way = (pattern, bool(content["model"].get("ignore_merges")))
        if way in PATTERNS and not steps[1].get("use_regex", True):
            return PATTERNS[way]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    raise UnsupportedModelError(
        "it is not known what llama.cpp calls the way in which this tokenizer splits text; name it "
        "with --pre-tokenizer (llama-bpe, qwen2, tekken, gpt-4o, gpt-2, smollm, ...: see its "
        "converter), or let llama.cpp's own converter take the folder."
    )


def is_sentencepiece(content: dict[str, Any]) -> bool:
    """Characters that no token has become bytes, as in SentencePiece and unlike in GPT-2."""
    return bool(content["model"].get("byte_fallback"))


def add_tokenizer(
    writer: Any,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    content: dict[str, Any],
    splits: str,
    vocab_size: int,
) -> None:
    """Write tokens, their kinds, and how to merge them.

    Args:
        writer: a `gguf.GGUFWriter`.
        folder: of the checkpoint, for the special tokens.
        tokenizer: as transformers opens it, for what it puts around a text.
        content: of ``tokenizer.json``.
        splits: see `splitting_name`.
        vocab_size: rows of the embedding; places that no token has are marked unused.
    """
    logging.getLogger("gguf.vocab").addFilter(_is_no_remark_on_pairs)
    tokens, kinds = _tokens(content, vocab_size)
    writer.add_tokenizer_pre(splits)
    writer.add_tokenizer_model("llama" if is_sentencepiece(content) else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    scored = is_sentencepiece(content)
    if scored:
        writer.add_token_scores(merge_scores(content, tokens))
        writer.add_add_space_prefix(puts_space_first(content))
    special = gguf.SpecialVocab(folder, load_merges=not scored, n_vocab=vocab_size)
    special.add_special_token.update(_around_a_text(tokenizer))
    special.add_to_gguf(writer, quiet=True)


def _around_a_text(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether the tokenizer itself puts its first and its last token around a text."""
    ids = tokenizer("a")["input_ids"]
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        "bos": first is not None and ids[0] == first,
        "eos": last is not None and ids[-1] == last,
    }


def _is_no_remark_on_pairs(record: logging.LogRecord) -> bool:
    """Templates of two texts at once are nothing that a language model reads."""
    return "TemplateProcessing<pair>" not in record.getMessage()


def _tokens(content: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens in the order of their ids, and what they are."""
    model = content["model"]
    words = {index: word for word, index in model["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    words.update({index: token["content"] for index, token in added.items()})
    bytes_too = is_sentencepiece(content)
    tokens = [words.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    kinds = []
    for index, word in enumerate(tokens):
        if index not in words:
            kind = gguf.TokenType.UNUSED
        elif bytes_too and word == model.get("unk_token"):
            kind = gguf.TokenType.UNKNOWN
        elif index in added:
            special = added[index].get("special")
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        elif bytes_too and _is_byte(word):
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        kinds.append(int(kind))
    return tokens, kinds


def _is_byte(word: str) -> bool:
    return len(word) == 6 and word.startswith("<0x") and word.endswith(">")


def merge_scores(content: dict[str, Any], tokens: list[str]) -> list[float]:
    """By which llama.cpp merges: of all neighbours, those whose token has the highest score.

    A BPE tokenizer merges those first whose rule stands first, so a token's score is the negative
    place of the first rule that makes it.

    Raises:
        UnsupportedModelError: the rules say more than scores can.
    """
    rules = [
        tuple(rule.split(" ") if isinstance(rule, str) else rule)
        for rule in content["model"].get("merges", [])
    ]
    place: dict[str, int] = {}
    for index, (left, right) in enumerate(rules):
        place.setdefault(left + right, index)
    _check_rules(set(rules), place, set(tokens))
    return [-float(place.get(token, len(rules))) for token in tokens]


def _check_rules(rules: set[tuple[str, ...]], made: Iterable[str], tokens: set[str]) -> None:
    """llama.cpp merges whatever two neighbours spell a token: each such pair needs its rule."""
    for token in made:
        for middle in range(1, len(token)):
            pair = (token[:middle], token[middle:])
            if pair not in rules and pair[0] in tokens and pair[1] in tokens:
                raise UnsupportedModelError(
                    f"the tokenizer never merges '{pair[0]}' and '{pair[1]}' into '{token}', but "
                    "llama.cpp would: its files hold a score a token, not rules. Serve this model "
                    "with another engine."
                )


def puts_space_first(content: dict[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    outer = content.get("normalizer") or {}
    steps = outer.get("normalizers", [outer])
    if any(step.get("type") == "Prepend" and step.get("prepend") == SPACE for step in steps):
        return True
    outer = content.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    return any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in steps
    )
