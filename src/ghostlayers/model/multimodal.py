"""Vision-language models: their text part is cut, and the whole of them is saved.

A whole model (image tower, projector, text part, head) is given to the rest of the package as a
`TextView`: it has the config and the decoder layers of the text part, and is called as the whole
is. So scores, fits and cuts see a causal language model, what they compute on text is what the
whole model computes, and nothing has to be put back before the whole is saved.
"""

import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ghostlayers.errors import ModelError, RecipeError, UnsupportedModelError
from ghostlayers.modeling import decoder_layers
from ghostlayers.spans import Span, format_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LOADS_WITH = "AutoModelForImageTextToText"
"""The class by which transformers opens a whole model."""

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""What turns pictures and conversations into a model's inputs, beside its tokenizer."""

FED_BY = "deepstack_visual_indexes"
"""Where the config of an image tower lists the tower's layers whose outputs are added to the stream
behind as many of the first decoder layers (DeepStack)."""


class TextView(nn.Module):
    """A vision-language model as a causal language model: its text part's config and layers.

    Everything else, calling it included, is the whole model's.

    Attributes:
        whole: the vision-language model.
    """

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.whole = whole
        self.training = whole.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name == "whole":
                raise
        return getattr(self.whole, name)

    @property
    def text_part(self) -> Any:
        """The module that holds the decoder layers, with a config of its own."""
        return self.whole.get_decoder()

    @property
    def config(self) -> Any:
        """The text part's."""
        return self.text_part.config

    @property
    def speaker(self) -> Any:
        """What answers to text: the text part where it has a head of its own, as Llama 4's has."""
        part = self.text_part
        return self.whole if part.get_output_embeddings() is None else part

    @property
    def forward(self) -> Any:  # type: ignore[override]
        """The speaker's, whose arguments tell what it can do."""
        return self.speaker.forward

    @property
    def generate(self) -> Any:
        """The speaker's."""
        return self.speaker.generate

    @property
    def base_model(self) -> Any:
        """What runs everything but the head."""
        return self.speaker.base_model


def auto_class(config: "PretrainedConfig") -> Any:
    """The Auto class that opens a model of this config with all that it has.

    Args:
        config: as transformers reads it.

    Raises:
        UnsupportedModelError: transformers makes no language model of it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if is_whole(config):
        _check_config(config)
        return AutoModelForImageTextToText
    own = getattr(config, "auto_map", None) or {}
    if _classes("CAUSAL_LM", config) or "AutoModelForCausalLM" in own:
        return AutoModelForCausalLM
    raise UnsupportedModelError(
        f"models of type '{config.model_type}' cannot be measured or cut: transformers has neither "
        "a causal language model of that type, nor one of images and text whose config holds a "
        "decoder-only text part ('text_config')."
    )


def is_whole(config: "PretrainedConfig") -> bool:
    """Whether a config is that of a vision-language model, and not of its text part alone."""
    whole, alone = _classes("IMAGE_TEXT_TO_TEXT", config), _classes("CAUSAL_LM", config)
    if not whole or text_entry(config) is None:
        return False
    named = set(getattr(config, "architectures", None) or [])
    return not alone or bool(named & whole.keys()) or not named & alone.keys()


def _classes(task: str, config: "PretrainedConfig") -> dict[str, type]:
    """The classes that transformers has for a config's type and a task, by name."""
    from transformers.models.auto import modeling_auto

    mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING")
    known = mapping.get(type(config), ())
    listed = known if isinstance(known, tuple) else (known,)
    return {cls.__name__: cls for cls in listed}


def text_entry(config: "PretrainedConfig") -> str | None:
    """The name under which a config holds that of the text part; None if it holds none."""
    for name in getattr(config, "sub_configs", {}):
        if name == "text_config" and getattr(config, name, None) is not None:
            return str(name)
    return None


def text_view(model: "PreTrainedModel") -> Any:
    """A view of the text part of a vision-language model; any other model as it is.

    Raises:
        UnsupportedModelError: it has no single stack of decoder layers that text passes.
    """
    config = getattr(model, "config", None)
    if isinstance(model, TextView) or config is None or not is_whole(config):
        return model
    _check_config(config)
    _check_class(model)
    kind, text = config.model_type, config.get_text_config()
    view = TextView(model)
    part = view.text_part
    count = getattr(getattr(part, "config", None), "num_hidden_layers", None)
    if not isinstance(part, nn.Module) or count is None or decoder_layers(part, count) is None:
        raise _refusal(kind, "its text part is no single stack of decoder layers")
    if type(part.config) is not type(text):
        raise _refusal(kind, "its text part is built from another config than its own")
    taken = inspect.signature(view.speaker.forward).parameters.values()
    # What comes by position, and has to: the kinds below 2.
    needed = [p.name for p in taken if p.default is p.empty and p.kind.value < 2]
    if set(needed) - {"input_ids"}:
        raise _refusal(kind, f"it does not answer to text alone (it wants {', '.join(needed)})")
    return view


def _check_config(config: "PretrainedConfig") -> None:
    """Refuse a whole model that does not read text from left to right, from its config alone."""
    for part in (config, config.get_text_config()):
        if getattr(part, "is_encoder_decoder", False):
            raise _refusal(config.model_type, "it is an encoder and a decoder")
        if getattr(part, "use_bidirectional_attention", None) in (True, "all"):
            reason = "its text part reads in both directions, so that no token is predicted"
            raise _refusal(config.model_type, reason)


def _refusal(kind: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"vision-language models of type '{kind}' cannot be measured or cut: {reason}."
    )


def whole_of(model: "PreTrainedModel") -> Any:
    """The vision-language model behind a view; any other model as it is."""
    return model.whole if isinstance(model, TextView) else model


def name_in_whole(name: str) -> str:
    """What a view's module or parameter is called in the whole model, and in its files."""
    return name.removeprefix("whole.")


def adopt_config(view: Any) -> None:
    """Let the whole model know of the text part's rewritten config."""
    if not isinstance(view, TextView):
        return
    entry = text_entry(view.whole.config)
    assert entry is not None
    before, after = getattr(view.whole.config, entry), view.config
    for module in view.whole.modules():
        if vars(module).get("config") is before:
            module.config = after
    setattr(view.whole.config, entry, after)


def _check_class(whole: "PreTrainedModel") -> None:
    """Refuse a whole model that is not transformers' own, or has no head."""
    known = _classes("IMAGE_TEXT_TO_TEXT", whole.config)
    if type(whole) not in known.values():
        raise UnsupportedModelError(
            f"{type(whole).__name__} cannot be measured or cut: expected the class that "
            f"transformers has for '{whole.config.model_type}' ({' or '.join(known)}), as "
            f"{LOADS_WITH} gives it."
        )


def fed_layers(model: "PreTrainedModel") -> int:
    """How many of the first decoder layers get image features behind them, by their number.

    Raises:
        UnsupportedModelError: some do, and the config does not say how many.
    """
    if not isinstance(model, TextView):
        return 0
    accepted = inspect.signature(model.text_part.forward).parameters
    if not any("deepstack" in name for name in accepted):
        return 0
    config = model.whole.config
    parts = [getattr(config, name, None) for name in config.sub_configs]
    listed = [layers for part in parts if (layers := getattr(part, FED_BY, None)) is not None]
    if len(listed) != 1:
        raise _refusal(
            config.model_type, "its decoder layers get image features in a way not known here"
        )
    return len(listed[0])


def check_spans(model: "PreTrainedModel", spans: Sequence[Span]) -> None:
    """Refuse to remove layers behind which image features are added.

    Raises:
        UnsupportedModelError: the message names them.
    """
    fed = fed_layers(model)
    gone = [layer for span in spans for layer in span.layers if layer < fed]
    if gone:
        raise UnsupportedModelError(
            f"decoder layers {format_layers(gone)} cannot go: this model adds features of the "
            f"image to the stream behind each of its first {fed}, by their numbers. Remove later "
            f"ones (--keep-layers first:{fed})."
        )


def check_recipe(model: "PreTrainedModel", form: str, export: str, repair: str) -> None:
    """Refuse a repair for which a whole model has no place, before anything is computed.

    Args:
        model: a view; any other model passes.
        form: of the repair: ``fold`` or another.
        export: in what form it is wanted.
        repair: its name.

    Raises:
        RecipeError: the message names repairs that fold.
    """
    if isinstance(model, TextView) and (form != "fold" or export == "stock-layer"):
        raise RecipeError(
            f"repair '{repair}' adds an operator, for which a vision-language model "
            f"('{model.whole.config.model_type}') has no place. Take one that folds into its "
            "weights: --repair refit:3:ridge=auto (nearest to ghost), replaceme, magnitude, none."
        )


def check_gguf(config: "PretrainedConfig") -> None:
    """Refuse to write a whole model as GGUF.

    Raises:
        UnsupportedModelError: the message says how llama.cpp does it.
    """
    if is_whole(config):
        raise UnsupportedModelError(
            f"a vision-language model ('{config.model_type}') is two GGUF files, text part and "
            "image tower. Save it as a checkpoint, and let llama.cpp's convert_hf_to_gguf.py write "
            "them: once as it is, and once with --mmproj."
        )


def split_processor(given: Any) -> tuple[Any, dict[str, str]]:
    """The tokenizer of a processor, and what is saved beside it; a tokenizer comes alone."""
    from transformers import ProcessorMixin

    if not isinstance(given, ProcessorMixin):
        return given, {}
    with tempfile.TemporaryDirectory() as folder:
        given.save_pretrained(folder)
        return given.tokenizer, read_processor(Path(folder))


def read_processor(folder: Path) -> dict[str, str]:
    """The files of a model's processor, by name.

    Raises:
        ModelError: one of them is damaged.
    """
    paths = (folder / name for name in PROCESSOR_FILES)
    return {path.name: _read_file(path) for path in paths if path.is_file()}


def _read_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            json.loads(text)
        return text
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"'{path.name}', which prepares images for the model, cannot be read: {error}. Get the "
            "model's folder again."
        ) from error


def write_processor(folder: Path, files: Mapping[str, str]) -> None:
    """Write a processor's files beside a tokenizer, whose own stay as they are."""
    for name, text in files.items():
        if not (folder / name).exists():
            (folder / name).write_text(text, encoding="utf-8")


def with_one_dtype(content: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config file's content with one type of weights, in the parts of a whole model, too."""
    parts = {
        name: {**part, "dtype": dtype}
        for name, part in content.items()
        if name.endswith("_config") and isinstance(part, dict) and "dtype" in part
    }
    return {**content, **parts, "dtype": dtype}


def described(model: "PreTrainedModel") -> dict[str, str]:
    """What a record says of a whole model: the class that opens it. Nothing of others."""
    return {"loads_with": LOADS_WITH} if isinstance(model, TextView) else {}


def processor_of(view: Any, folder: Path | None) -> dict[str, str]:
    """The files of a whole model's processor, where it comes from a folder."""
    if not isinstance(view, TextView) or folder is None:
        return {}
    return read_processor(folder)
