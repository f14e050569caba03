"""What the header of a GGUF file must say after some layers went.

A header speaks of layers by their number, in arrays with one entry a layer, in counts of layers at
either end, and in every-nth-layer rules. The first three are rewritten. A rule cannot be, so the
layers that stay must still obey it; and llama.cpp has a few rules that no header speaks of.
"""

from collections.abc import Sequence
from typing import Any

from gguf import GGUFValueType

from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model.gguf_families import GGUF_FAMILIES, query_factor, window_entries
from ghostlayers.model.gguf_file import GgufFile, Value, header_entries

NOT_BY_LAYER = frozenset({"rope.dimension_sections"})
"""Arrays whose length may be the number of layers by chance."""

FIRST_LAYERS = frozenset({"leading_dense_block_count"})
"""So many layers at the start are of some kind."""

LAST_LAYERS = frozenset({"attention.shared_kv_layers"})
"""The same at the end."""

EVERY_NTH = (
    "full_attention_interval", "interleave_moe_layer_step", "moe_every_n_layers",
    "rescale_every_n_layers", "attention.sliding_window_pattern",
)  # fmt: skip
"""Every layer whose number, counted from one, this divides is of some kind."""

UNSAID = {"gpt-oss": 2}
"""By architecture: rules of the same kind that llama.cpp has without an entry of the header."""


def header_after(
    file: GgufFile, before: Any, after: Any, kept_layers: Sequence[int]
) -> dict[str, Value | None]:
    """The entries of a header that a cut changes.

    Args:
        file: of the dense model.
        before: the dense model's config.
        after: the cut model's.
        kept_layers: those that stay, in the dense model's numbering.

    Returns:
        By full name; None for one that must go.

    Raises:
        UnsupportedModelError: no header could say what the layers that stay are.
    """
    check_kept(file, before, after, kept_layers)
    depth = int(file.entry("block_count"))
    changed: dict[str, Value | None] = {}
    for key, (value, kind, inner) in header_entries(file.parts):
        prefix, _, name = key.partition(".")
        if prefix != file.architecture:
            continue
        if kind == GGUFValueType.ARRAY:
            if len(value) == depth and name not in NOT_BY_LAYER:
                changed[key] = ([value[index] for index in kept_layers], kind, inner)
        elif name == "block_count":
            changed[key] = (len(kept_layers), kind, None)
        elif name in FIRST_LAYERS:
            changed[key] = (sum(index < value for index in kept_layers), kind, None)
        elif name in LAST_LAYERS:
            changed[key] = (sum(index >= depth - value for index in kept_layers), kind, None)
    return changed | _windows(file, after)


def check_kept(file: GgufFile, before: Any, after: Any, kept_layers: Sequence[int]) -> None:
    """Refuse a cut that no header could tell of; the arguments are those of `header_after`.

    Raises:
        UnsupportedModelError: with the reason.
    """
    _check_rules(file, kept_layers)
    _check_family(before, after)


def scaled_queries(config: Any) -> tuple[str, float]:
    """The part of attention that takes up another scale, and by how much; one where none does.

    llama.cpp takes the scale of some families from the number of layers.

    Args:
        config: of the cut model.
    """
    row = GGUF_FAMILIES.get(str(config.model_type))
    return ("", 1.0) if row is None else (row.scaled, query_factor(config, row))


def _windows(file: GgufFile, config: Any) -> dict[str, Value | None]:
    """Which layers have windows, where llama.cpp otherwise takes a pattern for granted."""
    row = GGUF_FAMILIES.get(str(config.model_type))
    if row is None or not row.windows or file.entry("attention.sliding_window") is None:
        return {}
    window, pattern = (
        f"{file.architecture}.attention.{name}"
        for name in ("sliding_window", "sliding_window_pattern")
    )
    said = dict(window_entries(config, row))
    if not said:
        return {window: None, pattern: None}
    return {
        window: (said["sliding_window"], GGUFValueType.UINT32, None),
        pattern: (said["sliding_window_pattern"], GGUFValueType.ARRAY, GGUFValueType.BOOL),
    }


def _check_rules(file: GgufFile, kept_layers: Sequence[int]) -> None:
    """Refuse a cut after which an every-nth-layer rule names other layers than before."""
    if file.entry("nextn_predict_layers"):
        raise UnsupportedModelError(
            f"'{file.path}' holds layers that predict further tokens (nextn_predict_layers), which "
            "transformers does not read."
        )
    for name in file.sizes:
        if name.startswith("per_layer_"):
            raise UnsupportedModelError(
                f"'{name}' of the GGUF file holds numbers of all layers in one tensor, which is "
                "not cut here."
            )
    rules = {name: file.entry(name) for name in EVERY_NTH}
    rules[file.architecture] = UNSAID.get(file.architecture)
    for name, period in rules.items():
        if not isinstance(period, int) or period < 2:
            continue
        for new, old in enumerate(kept_layers):
            if ((old + 1) % period == 0) != ((new + 1) % period == 0):
                raise UnsupportedModelError(
                    f"llama.cpp computes one of {period} layers of this model otherwise ({name}), "
                    f"wherever the layers come from, and layer {new} of the cut model would be of "
                    f"the other kind; remove whole groups of {period} layers."
                )


def _check_family(before: Any, after: Any) -> None:
    """Refuse what llama.cpp decides by a family's name or its depth, where the cut changed it."""
    row = GGUF_FAMILIES.get(str(after.model_type))
    if row is None:
        return
    reason = row.refusal(after)
    if reason is not None and row.refusal(before) is None:
        raise UnsupportedModelError(f"this cut cannot be written as GGUF: {reason}.")
