"""Entries of a GGUF header that something is computed with: their types, and what they may hold."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from gguf import GGUFValueType
from gguf.gguf_reader import ReaderField, ReaderTensor
from pydantic import create_model

from ghostlayers.errors import ModelError
from ghostlayers.model.config_file import Count, NotNegative, Positive, Size
from ghostlayers.runtime.documents import Checked, brief, check

Heads = Size | list[Count]
"""Of every layer, or one a layer."""

SETTINGS: dict[str, Any] = {
    "context_length": Size,
    "embedding_length": Size,
    "block_count": Size,
    "vocab_size": Size,
    "feed_forward_length": Heads,
    "expert_count": Count,
    "expert_used_count": Count,
    "attention.head_count": Heads,
    "attention.head_count_kv": Heads,
    "attention.key_length": Size,
    "attention.value_length": Size,
    "attention.layer_norm_epsilon": NotNegative,
    "attention.layer_norm_rms_epsilon": NotNegative,
    "attn_logit_softcapping": NotNegative,
    "final_logit_softcapping": NotNegative,
    "rope.dimension_count": Size,
    "rope.freq_base": Positive,
    "rope.freq_base_swa": Positive,
    "rope.scale_linear": NotNegative,
    "rope.scaling.type": str,
    "rope.scaling.factor": NotNegative,
    "rope.scaling.attn_factor": NotNegative,
    "rope.scaling.original_context_length": Count,
    "rope.scaling.yarn_beta_fast": Positive,
    "rope.scaling.yarn_beta_slow": Positive,
}
"""What the file says of the model, behind the name of its family."""

LISTS = {
    "tokens": {GGUFValueType.STRING},
    "merges": {GGUFValueType.STRING},
    "scores": {GGUFValueType.FLOAT32},
    "token_type": {GGUFValueType.INT32, GGUFValueType.UINT32},
}
"""What the file says of every token, and in which types."""

SPECIAL = ("bos", "eos", "unknown", "padding")
"""Tokens that transformers' reader looks up by their number."""

Fields = Mapping[str, ReaderField]


class _Entries(Checked):
    """All that the file says of the model; floats without a bound must be finite at least."""

    __pydantic_extra__: dict[str, bool | int | float | str | list[bool | int | float | str]]


_Settings: Any = create_model(
    "_Settings", __base__=_Entries, **{name: (shape, None) for name, shape in SETTINGS.items()}
)  # type: ignore[call-overload]


def check_header(where: str, fields: Fields, architecture: str) -> None:
    """Refuse entries of other types or outside the bounds of what is computed with them.

    Args:
        where: what messages call the file.
        fields: its entries.
        architecture: the family that it names.

    Raises:
        ModelError: the message names the entry, what was expected and what was got.
    """
    prefix = f"{architecture}."
    said = {
        key.removeprefix(prefix): field.contents()
        for key, field in fields.items()
        if key.startswith(prefix)
    }
    check({architecture: said}, dict[str, _Settings], where, ModelError)
    _check_lists(where, fields)
    _check_special(where, fields)


def _check_lists(where: str, fields: Fields) -> None:
    """Refuse lists of tokens of different lengths, or of what is none."""
    lengths = {}
    for name, kinds in LISTS.items():
        field = fields.get(f"tokenizer.ggml.{name}")
        if field is None:
            continue
        if field.types[0] != GGUFValueType.ARRAY or field.types[-1] not in kinds:
            expected = " or ".join(sorted(kind.name for kind in kinds))
            raise ModelError(
                f"{where} cannot be read: tokenizer.ggml.{name}: expected a list of {expected}, "
                f"got {' of '.join(kind.name for kind in field.types)}. Get it again."
            )
        lengths[name] = len(field.data)
    lengths.pop("merges", None)
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{count:,} in '{name}'" for name, count in lengths.items())
        raise ModelError(f"{where} tells of different numbers of tokens: {said}. Get it again.")


def _check_special(where: str, fields: Fields) -> None:
    """Refuse special tokens that are none of the vocabulary's."""
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        return
    count = len(tokens.data)
    for name in SPECIAL:
        key = f"tokenizer.ggml.{name}_token_id"
        got = fields[key].contents() if key in fields else 0
        if type(got) is not int or not 0 <= got < count:
            raise ModelError(
                f"{where} cannot be read: {key}: expected the number of one of its {count:,} "
                f"tokens, 0 to {count - 1}, got {brief(got)}. Correct it, or get the file again."
            )


def check_turned(
    where: str, architecture: str, tensors: Sequence[ReaderTensor], entry: Callable[[str], Any]
) -> None:
    """Refuse queries and keys whose rows are not those of heads: some families reorder them.

    Args:
        where: what messages call the file.
        architecture: the family that it names.
        tensors: all.
        entry: reads what the header says of the model under a key.

    Raises:
        ModelError: with the tensor, and how many rows were expected.
    """
    keys: dict[Literal["q", "k"], str] = {"q": "attention.head_count"}
    keys["k"] = "attention.head_count_kv" if entry("attention.head_count_kv") else keys["q"]
    for part, key in keys.items():
        heads = entry(key)
        if not isinstance(heads, int):  # one a layer, or none
            continue
        for tensor in tensors:
            rows = int(tensor.shape[-1])
            if f".attn_{part}." in tensor.name and rows % (2 * heads):
                raise ModelError(
                    f"{where} cannot be read: '{tensor.name}' has {rows:,} rows, expected a "
                    f"multiple of {2 * heads:,}: heads of an even width, and {architecture}.{key} "
                    f"names {heads:,} of them. Get it again, or start from the checkpoint that the "
                    "file was made of."
                )
