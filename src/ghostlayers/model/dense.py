"""One dense model: the network, where it comes from, and how it is run, read and stored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model.anatomy import Anatomy, examine
from ghostlayers.model.residency import Memory
from ghostlayers.model.stream import LayerwiseModel
from ghostlayers.runtime.machine import memory_of
from ghostlayers.runtime.parallel import processes_here


@dataclass(frozen=True)
class BaseModel:
    """Where a model comes from.

    Attributes:
        name: folder, hub id or file, as the caller gave it.
        revision: commit on the hub, if any.
        licence: as the base model's card or file states it; None if it does not.
        title: the model's own name, where it states one.
        folder: where its files lie, if that is a folder.
        file: the GGUF file that it was read from, or one of several.
        on_hub: the name is an id on the hub.
        quantized: the format its weights were expanded from; None if they were plain.
    """

    name: str
    revision: str | None = None
    licence: str | None = None
    title: str | None = None
    folder: Path | None = None
    file: Path | None = None
    on_hub: bool = False
    quantized: str | None = None


class DenseModel(LayerwiseModel):
    """A model ready to be measured, a decoder layer at a time, and cut.

    Args:
        network: a causal language model, or the text part of a vision-language one
            (`multimodal.TextView`). It is put into evaluation mode and otherwise left as it is.
        tokenizer: its tokenizer; None where no text is read.
        base: where it comes from.
        stored_dtype: the type that most of its weights have on disk, and will have in a new
            checkpoint; what has another remembers it (see `weights`). The network's if not given.
        processor: files that a vision-language model has beside its tokenizer, by name.
        memory: how much a run may take beside the weights that stay in memory.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        base: BaseModel | None = None,
        *,
        stored_dtype: torch.dtype | None = None,
        processor: Mapping[str, str] | None = None,
        memory: Memory | None = None,
    ) -> None:
        super().__init__(network, memory)
        # Nobody asks for it where none was given: no text is read then.
        self.tokenizer: PreTrainedTokenizerBase = tokenizer  # type: ignore[assignment]
        self.base = base or BaseModel(type(network).__name__)
        self.stored_dtype = stored_dtype or network.dtype
        self.processor = dict(processor or {})

    @property
    def config(self) -> PreTrainedConfig:
        """The network's config."""
        config: PreTrainedConfig = self.network.config
        return config

    @cached_property
    def anatomy_or_reason(self) -> Anatomy | str:
        """How its decoder layers are built, probed once, or why that is not known."""
        return examine(self)

    @property
    def anatomy(self) -> Anatomy:
        """How its decoder layers are built.

        Raises:
            UnsupportedModelError: in another way than a repair could use; the message says how.
        """
        known = self.anatomy_or_reason
        if isinstance(known, str):
            raise UnsupportedModelError(f"{type(self.network).__name__}: {known}.")
        return known


def memory_for(model: DenseModel) -> float:
    """Bytes of memory that this process has for a model in all, or may have (``--max-memory``)."""
    sharing = processes_here() if model.device.type == "cpu" else 1
    limit = model.residency.memory.limit
    return min(memory_of(model.device) / sharing, math.inf if limit is None else limit)
