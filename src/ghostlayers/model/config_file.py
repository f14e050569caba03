"""A model's config.json, looked at before anything is made of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ghostlayers.errors import ModelError
from ghostlayers.runtime.documents import Checked, brief, check, parse_json, read_json, read_text

MOST_BYTES = 2**24
"""Of a config.json."""

LEAST_BITS = 1
"""Of a weight on the disk; the densest packing takes more."""

Size = Annotated[int, Field(ge=1, le=2**31)]
Count = Annotated[int, Field(ge=0, le=2**31)]
Depth = Annotated[int, Field(ge=1, le=100_000)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Type = Literal["float64", "float32", "bfloat16", "float16"]

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
NAMES = ("text_config", "llm_config", "language_config")
"""What families call the number of layers, the width of the stream, and the part with both."""


def _whole_number(text: str) -> str:
    if not text.isdecimal():
        raise ValueError(f"expected a whole number for a key, got {brief(text)}")
    return text


Number = Annotated[str, AfterValidator(_whole_number)]
"""A key that stands for a number, as JSON has no other keys than text."""


class Positions(Checked):
    """What is checked of how positions are turned and scaled, for all layers or by their kind."""

    __pydantic_extra__: dict[str, "Positions | bool | int | float | str | list[Any] | None"]

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    partial_rotary_factor: Annotated[float, Field(ge=0, le=1)] | None = None
    original_max_position_embeddings: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    attention_factor: Positive | None = None
    alpha: Positive | None = None
    mscale: NotNegative | None = None
    mscale_all_dim: NotNegative | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None

    @model_validator(mode="after")
    def _is_scaled_by_something(self) -> Self:
        kind = self.rope_type or self.type
        if kind in ("linear", "dynamic", "llama3") and self.factor is None:
            raise ValueError(f"expected a factor above 0 for positions of kind '{kind}', got none")
        return self


class Part(Checked):
    """What is checked of a model's config, or of its text part's."""

    model_type: str | None = None
    architectures: list[str] | None = None
    dtype: Type | None = None
    torch_dtype: Type | None = None
    num_hidden_layers: Depth | dict[str, Any] | None = None  # a checkpoint of ours guards it
    n_layer: Depth | dict[str, Any] | None = None
    n_layers: Depth | dict[str, Any] | None = None
    hidden_size: Size | dict[str, Any] | None = None
    n_embd: Size | None = None
    d_model: Size | None = None
    vocab_size: Size | None = None
    num_attention_heads: Size | None = None
    n_head: Size | None = None
    num_key_value_heads: Size | list[int | None] | None = None
    intermediate_size: Count | list[int | None] | None = None
    head_dim: Size | None = None
    num_experts: Count | None = None
    num_local_experts: Count | None = None
    max_position_embeddings: Size | None = None
    n_positions: Size | None = None
    tie_word_embeddings: bool | None = None
    rms_norm_eps: NotNegative | None = None
    layer_norm_eps: NotNegative | None = None
    layer_norm_epsilon: NotNegative | None = None
    rope_theta: Positive | None = None
    rope_parameters: Positions | None = None
    rope_scaling: Positions | None = None
    num_labels: Count | None = None
    id2label: dict[Number, Any] | None = None
    label2id: dict[str, Any] | None = None
    layer_types: list[str] | None = None
    return_dict: bool | None = None
    use_cache: bool | None = None
    output_hidden_states: bool | int | list[int] | None = None
    output_attentions: bool | int | list[int] | None = None
    auto_map: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None


class Added(Checked):
    """A token beside the vocabulary."""

    content: str
    single_word: bool | None = None
    lstrip: bool | None = None
    rstrip: bool | None = None
    normalized: bool | None = None
    special: bool | None = None


class Template(Checked):
    """One of several templates of chats."""

    name: str
    template: str


Token = str | Added


class TokenizerSettings(Checked):
    """What is checked of a tokenizer_config.json: entries that code computes with."""

    model_max_length: float | None = None
    tokenizer_class: str | None = None
    padding_side: str | None = None
    truncation_side: str | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    model_input_names: list[str] | None = None
    split_special_tokens: bool | None = None
    bos_token: Token | None = None
    eos_token: Token | None = None
    unk_token: Token | None = None
    pad_token: Token | None = None
    sep_token: Token | None = None
    cls_token: Token | None = None
    mask_token: Token | None = None
    additional_special_tokens: list[Token] | None = None
    extra_special_tokens: list[Token] | dict[str, Token] | None = None
    added_tokens_decoder: dict[Number, Added] | None = None
    chat_template: str | list[Template] | dict[str, str] | None = None
    auto_map: dict[str, Any] | None = None


BESIDE: dict[str, Any] = {
    "generation_config.json": dict,
    "tokenizer_config.json": TokenizerSettings,
    "tokenizer.json": dict,
    "added_tokens.json": dict[str, Annotated[int, Field(strict=True, ge=0)]],
}
"""Files of settings that lie beside it, if they are there, and what they must hold."""


def check_folder(folder: Path) -> None:
    """Refuse a folder whose settings are damaged, those of tokenizer and generation included.

    Raises:
        ModelError: the message names the entry, what was expected and what was got.
    """
    check_settings(folder)
    for name, shape in BESIDE.items():
        if (folder / name).exists():
            check(read_json(folder / name, ModelError), shape, f"'{folder / name}'", ModelError)


def check_settings(folder: Path) -> None:
    """Refuse a folder whose config is damaged, or speaks of more than its weights can hold.

    Raises:
        ModelError: the message names the entry, what was expected and what was got.
    """
    path = folder / "config.json"
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())
    text = read_text(path, ModelError, MOST_BYTES)
    # Families write infinities, as limits.
    values = parse_json(text, f"'{path}'", ModelError, refused=("NaN",))
    check_config(values, f"'{path}'", weights or None)


def check_config(values: Any, where: str, weights: int | None = None) -> dict[str, Any]:
    """Refuse a config that no model can be made of.

    Args:
        values: the content of the file.
        where: what messages call it.
        weights: bytes of the weights beside it, if they are known.

    Returns:
        The same values.

    Raises:
        ModelError: the message names the entry, what was expected and what was got.
    """
    if not isinstance(values, dict):
        raise ModelError(
            f"{where} must hold a model's settings, such as model_type, got {brief(values)}."
        )
    text = next((values[name] for name in NAMES if isinstance(values.get(name), dict)), values)
    for part in (values, text):
        check(part, Part, where, ModelError)
    if weights is not None:
        check_sizes(text, where, 8 * weights // LEAST_BITS)
    return values


def check_sizes(values: Mapping[str, Any], where: str, numbers: int) -> None:
    """Refuse sizes that would make a model of more numbers than its file can hold.

    No family's layer has fewer numbers than a square of half the width of the stream.

    Args:
        values: with ``num_hidden_layers``, ``hidden_size`` and ``vocab_size``, as far as they are
            known, under any family's names.
        where: what messages call them.
        numbers: at most so many are in the file.

    Raises:
        ModelError: with the sizes, and how many numbers there are.
    """
    depth, width = (_first(values, names) for names in (DEPTHS, WIDTHS))
    words = values.get("vocab_size") or 1
    rows = max(words, _first(values, ("intermediate_size",)), _first(values, ("n_positions",)))
    if depth * (width * width // 4) > numbers or rows * width > numbers:
        raise ModelError(
            f"{where} speaks of {depth:,} layers, {width:,} channels and {rows:,} tokens or inner "
            f"channels, but the weights can hold {numbers:,} numbers at most: the config was "
            "changed, or belongs to another model. Get both again."
        )


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> int:
    return next((int(values[name]) for name in names if isinstance(values.get(name), int)), 1)
