"""vLLM serves repaired checkpoints: the entry point of group ``vllm.general_plugins``.

vLLM runs a model that it has no code of its own for through transformers: it takes the model's
class from transformers, puts its own linear layers, attention and cache in place of the originals,
and leaves the rest, our operators included, as it stands. All that a repaired checkpoint needs is
that its architecture's name leads there. Without this plugin, ``--trust-remote-code`` leads to the
same place through the code file in the checkpoint.

vLLM is imported only when vLLM itself calls.
"""

from typing import Any

from ghostlayers.model.families import repaired_architectures, repaired_family


def register() -> None:
    """Tell vLLM about repaired checkpoints of every family. Safe to call again."""
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    for name in repaired_architectures():
        if name not in known:
            ModelRegistry.register_model(name, f"{__name__}:{name}")


def __getattr__(name: str) -> Any:
    """The class of vLLM's that runs an architecture, by the architecture's name."""
    family = None if name.startswith("__") else repaired_family(name)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.model_executor.models import transformers as backend

    dense, experts = backend.TransformersForCausalLM, backend.TransformersMoEForCausalLM
    return experts if _has_experts(family.config) else dense


_NUMBERS_OF_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")


def _has_experts(config_class: Any) -> bool:
    config = config_class()
    return any(hasattr(config, name) for name in _NUMBERS_OF_EXPERTS)
