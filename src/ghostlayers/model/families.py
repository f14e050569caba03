"""Which model families can be cut, and the classes that carry their repairs.

Nothing here is written a family: transformers knows which classes make one up. What cannot be cut
at all is refused by name.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ghostlayers import modeling
from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model import multimodal
from ghostlayers.model.auto_classes import PREFIX as PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLASS_PREFIX = "Repaired"
"""Before the names of the classes that carry them."""

_SHARED_CACHE = "some of its layers read the attention cache of others, which a cut would take away"
_PER_LAYER_EMBEDDINGS = "its layers read embeddings of their own beside the residual stream"
_CROSSED = "some of its layers attend to the image alone, and text passes them by"
_STREAMS = "it keeps several residual streams, and a repair here is a map of one"

REFUSED: dict[str, str] = {
    "gemma3n": _SHARED_CACHE,
    "gemma3n_text": _SHARED_CACHE,
    "gemma4": _PER_LAYER_EMBEDDINGS,
    "gemma4_text": _PER_LAYER_EMBEDDINGS,
    "gemma4_unified": _PER_LAYER_EMBEDDINGS,
    "gemma4_unified_text": _PER_LAYER_EMBEDDINGS,
    "qwen4_exp": _PER_LAYER_EMBEDDINGS,
    "qwen4_exp_text": _PER_LAYER_EMBEDDINGS,
    "deepseek_v4": _STREAMS,
    "blt": "it has several stacks of decoder layers",
    "rwkv": "its layers pass a state of their own beside the residual stream",
    "bart": "it is an encoder and a decoder",
    "whisper": "it is an encoder and a decoder",
}
"""Model types that are never cut, with the reason."""

REFUSED_IF: dict[str, str] = {
    "num_kv_shared_layers": _SHARED_CACHE,
    "kv_source_layers": _SHARED_CACHE,
    "hidden_size_per_layer_input": _PER_LAYER_EMBEDDINGS,
    "cross_attention_layers": _CROSSED,
    "is_encoder_decoder": "it is an encoder and a decoder",
}
"""Config entries that rule out a cut wherever they are set."""


@dataclass(frozen=True)
class Family:
    """The classes that make up a family.

    Attributes:
        model_type: as in the config.
        config: config class.
        model: base-model class.
        causal_lm: class of the causal language model.
    """

    model_type: str
    config: type
    model: type
    causal_lm: type

    @property
    def repaired_model_type(self) -> str:
        """The model type of a checkpoint that carries operators."""
        return f"{PREFIX}{self.model_type}"

    def repaired_classes(self) -> tuple[Any, Any, Any]:
        """Config, base model and causal model with room for repairs, made once a process."""
        return _repaired_classes(self)


@functools.cache
def _repaired_classes(family: Family) -> tuple[Any, Any, Any]:
    made = modeling.repaired_classes(family.config, family.model, family.causal_lm, __name__)
    globals().update({cls.__name__: cls for cls in made})  # where pickle looks for them
    _register(family.repaired_model_type, *made)
    return made


def __getattr__(name: str) -> Any:
    """A repaired class by its name, for a process that unpickles what another one made."""
    family = None if name.startswith("__") else repaired_family(name)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return next(cls for cls in family.repaired_classes() if cls.__name__ == name)


def repaired_family(class_name: str) -> Family | None:
    """The family of which a repaired class of that name is one; None if there is none."""
    from transformers.models.auto import configuration_auto
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    parent = class_name.removeprefix(CLASS_PREFIX)
    if parent == class_name:
        return None
    configs: Any = configuration_auto
    mappings = (
        configs.CONFIG_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
    families = [
        family
        for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if any(mapping.get(model_type) == parent for mapping in mappings)
        and (family := find_family(model_type)) is not None
    ]
    return max(families, key=_owns_its_classes, default=None)


def _owns_its_classes(family: Family) -> tuple[bool, bool]:
    """Tells Llama from InternLM 3, which runs Llama's class under a config of its own."""
    package = f".models.{family.model_type}."
    return package in family.causal_lm.__module__, family.model_type == getattr(
        family.config, "model_type", ""
    )


def repaired_architectures() -> list[str]:
    """Names of the repaired causal language models of every family that may be cut."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = {n for t, n in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if t not in REFUSED}
    return sorted(f"{CLASS_PREFIX}{name}" for name in names)


def check_config(config: Any) -> None:
    """Refuse a family that cannot be cut, from its config alone.

    Args:
        config: a config object, or the dictionary in its file.

    Raises:
        UnsupportedModelError: the message says why.
    """

    def entry(name: str) -> Any:
        return config.get(name) if isinstance(config, dict) else getattr(config, name, None)

    model_type = str(entry("model_type"))
    if model_type.startswith(PREFIX):
        raise UnsupportedModelError(
            f"the model is of type '{model_type}': its layers were removed and repaired before. "
            "Start from its base model instead, and remove all layers at once."
        )
    reasons = [REFUSED[model_type]] if model_type in REFUSED else []
    reasons += [reason for name, reason in REFUSED_IF.items() if entry(name)]
    if reasons:
        raise UnsupportedModelError(
            f"models of type '{model_type}' cannot be cut: {reasons[0]}. Scores and evaluation may "
            "still work."
        )


def family_of(model: "PreTrainedModel") -> Family:
    """The family of a model, or a refusal that says why its layers cannot be removed.

    Raises:
        UnsupportedModelError: see `check_config`; or its classes are not transformers' own.
    """
    config = model.config
    check_config(config)
    if isinstance(model, multimodal.TextView):
        multimodal.fed_layers(model)
        return Family(config.model_type, type(config), type(model.text_part), type(model.whole))
    known = find_family(config.model_type)
    if known is None or type(config) is not known.config or type(model) is not known.causal_lm:
        if _is_foreign(config) or _is_foreign(model):
            raise UnsupportedModelError(_foreign_code(config.model_type, known))
        expected = "none" if known is None else known.causal_lm.__name__
        raise UnsupportedModelError(
            f"{type(model).__name__} of type '{config.model_type}' cannot be cut: expected a "
            "causal language model as transformers itself builds it from that type "
            f"({expected}). Load it with AutoModelForCausalLM."
        )
    return known


def _is_foreign(thing: Any) -> bool:
    """Whether its class came with a model's files, not with transformers."""
    return type(thing).__module__.partition(".")[0] == "transformers_modules"


def _foreign_code(model_type: str, known: Family | None) -> str:
    if known is not None:
        return (
            f"the model of type '{model_type}' was loaded with the code in its own folder, but "
            "transformers has that family itself: leave out --trust-remote-code "
            "(trust_remote_code=False)."
        )
    return (
        f"the model runs on code in its own folder (type '{model_type}', which transformers does "
        "not know), and results carry no such code, so none could be loaded: it cannot be cut. "
        "Scores and evaluation may still work."
    )


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that a result could not be loaded with.

    Raises:
        UnsupportedModelError: it runs on code of its own, which results do not carry.
    """
    if _is_foreign(tokenizer):
        raise UnsupportedModelError(
            f"the tokenizer ({type(tokenizer).__name__}) runs on code in the model's own folder, "
            "and results carry no such code, so none could be loaded: save it as a "
            "PreTrainedTokenizerFast, and start from a folder with that one."
        )


def find_family(model_type: str) -> Family | None:
    """A family by its model type; None where transformers has no causal language model of it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING,
    )

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    config = CONFIG_MAPPING[model_type]
    model: Any = MODEL_MAPPING[config]
    causal_lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    if isinstance(model, tuple) or isinstance(causal_lm, tuple):
        return None
    return Family(model_type, config, model, causal_lm)


def family_to_repair(model_type: str) -> Family:
    """The family of a model type that may be cut.

    Raises:
        AttributeError: there is none: its repaired classes, which Auto classes look for, are not.
    """
    family = None if model_type in REFUSED else find_family(model_type)
    if family is None:
        raise AttributeError(f"no language model of type '{model_type}' can be cut")
    return family


def _register(model_type: str, config: Any, model: Any, causal_lm: Any) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    AutoConfig.register(model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
