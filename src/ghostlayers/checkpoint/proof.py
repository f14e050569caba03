"""Proving that a checkpoint reloads: in a fresh process, compared with the model in memory."""

import copy
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ghostlayers import modeling
from ghostlayers.checkpoint import readiness
from ghostlayers.errors import (
    NonFiniteError,
    VerificationError,
)
from ghostlayers.model import multimodal
from ghostlayers.model.expanding import expand_into, turned_in
from ghostlayers.model.quantized import is_readable
from ghostlayers.model.residency import is_offloaded
from ghostlayers.runtime.scratch import Scratch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEMORY_OF_A_RELOAD = 10**9
"""Bytes of weights that the fresh process holds where the model is offloaded here."""


TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit, that a reload may show.

On a processor the same weights and the same code give the same bits; accelerators may choose other
kernels in another process."""


TOLERANCE_AS_READ = 2e-2
"""The same in a shorter type, where a reload and the model in memory may sum in another order."""


TOLERANCE_PACKED = 0.1
"""The same where a reader works with packed weights, and may round activations to eight bits."""


PROBE = "Layers 3-7 went; \u00e9t\u00e9, \u4e2d\u6587, 12,345.\n\tThe rest stays."
"""Text by which a saved tokenizer is compared with the one in memory."""


@dataclass(frozen=True)
class Verification:
    """How a reloaded checkpoint compares with the model in memory.

    Attributes:
        identical: every logit is equal bit for bit.
        largest_difference: between two logits.
        num_tokens: positions compared.
        packed: the largest difference where transformers reads packed weights as they are, and may
            quantise activations; None where there are none, or it cannot read them here.
    """

    identical: bool
    largest_difference: float
    num_tokens: int
    packed: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a record holds it: without what was not compared."""
        return {name: value for name, value in vars(self).items() if value is not None}


def mode_of(model: "PreTrainedModel") -> str:
    """``custom`` for a checkpoint that carries operators, else ``stock``."""
    return "custom" if hasattr(model.config, "repaired_boundaries") else "stock"


def device_of(model: "PreTrainedModel") -> torch.device:
    """Where a model takes its tokens."""
    embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return embedding.device


def plain_dtype(dtype: torch.dtype) -> str:
    """As configs write it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def verify(
    folder: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    stored_dtype: torch.dtype | None = None,
) -> Verification:
    """Load a folder in a fresh process, as its readers will, and compare with a model in memory.

    Args:
        folder: a checkpoint.
        model: what it must be.
        tokenizer: what the folder's must be; not compared if not given.
        stored_dtype: the type of the weights in the folder, in which readers compute unless they
            say otherwise; the model's own if not given.

    Raises:
        VerificationError: it does not load, gives other logits (in the type that the model computes
            in, or in that of the folder), or other tokens.
    """
    ids = some_tokens(model)
    text = "" if tokenizer is None else PROBE
    answer, types = _ask_fresh_process(folder, model, ids, text)
    if tokenizer is not None and answer["tokens"].tolist() != tokenizer(text)["input_ids"]:
        raise VerificationError(
            "the tokenizer that was saved splits text otherwise than the one in memory; nothing "
            "was kept. Please report this with the model's name."
        )
    if "as_read" in answer and stored_dtype is not None and stored_dtype != model.dtype:
        twin = _in_types(model, stored_dtype, types)
        _compare(answer["as_read"], _logits(twin, ids), TOLERANCE_AS_READ)
    return _compare(answer["logits"], _logits(model, ids))


def verify_packed(
    folder: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    stored_dtype: torch.dtype,
) -> Verification:
    """`verify` a folder of packed weights by what their numbers stand for.

    They are expanded here, in the way in which the base's were, and a fresh process loads that. It
    also loads the folder as it is, where transformers can read its format on this machine.

    Arguments and errors as for `verify`.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with Scratch("expand") as plain:
        expand_into(Path(plain), folder, config, stored_dtype, turned_in(model))
        verification = verify(Path(plain), model, tokenizer, stored_dtype)
    if is_offloaded(model) or not is_readable(config):
        return verification
    ids = some_tokens(model)
    answer, _ = _ask_fresh_process(folder, model, ids, "", once=True)
    read = _compare(answer["as_read"], _logits(model, ids), TOLERANCE_PACKED)
    return replace(verification, packed=read.largest_difference)


def _in_types(
    model: "PreTrainedModel", main: torch.dtype, types: Mapping[str, str]
) -> "PreTrainedModel":
    """The model as its readers have it: every parameter in the type that they got it in."""
    from transformers.initialization import no_init_weights

    whole, default = multimodal.whole_of(model), torch.get_default_dtype()
    torch.set_default_dtype(main)
    try:
        with no_init_weights(), device_of(model):
            twin = type(whole)(copy.deepcopy(whole.config))
    finally:
        torch.set_default_dtype(default)
    state = {
        name: tensor.to(getattr(torch, types[name].removeprefix("torch.")))
        if name in types
        else tensor
        for name, tensor in whole.state_dict().items()
    }
    twin.load_state_dict(state, assign=True, strict=False)
    twin.tie_weights()
    viewed: PreTrainedModel = multimodal.text_view(twin.eval())
    return viewed


def compare_logits(
    made: "PreTrainedModel", model: "PreTrainedModel", tolerance: float = TOLERANCE
) -> Verification:
    """Compare two models in memory as `verify` compares a folder.

    Raises:
        VerificationError: they give other logits.
    """
    ids = some_tokens(model)
    return _compare(_logits(made, ids), _logits(model, ids), tolerance)


def logits_of_some_tokens(model: "PreTrainedModel") -> torch.Tensor:
    """What `verify` compares, [1, tokens, vocabulary]."""
    return _logits(model, some_tokens(model))


def some_tokens(model: "PreTrainedModel") -> torch.Tensor:
    """Token ids for a comparison of logits, [1, 32]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (1, 32), generator=generator)


@torch.no_grad()
def _logits(model: "PreTrainedModel", ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids.to(device_of(model)), use_cache=False).logits
    return logits.float().cpu()


def _compare(
    got: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE
) -> Verification:
    difference = float((got - expected).abs().max())
    if not math.isfinite(difference):
        raise NonFiniteError(
            "the repaired model gives NaN or infinity instead of logits, so that nothing can be "
            "proved; nothing was kept. Look for such numbers in the base model's weights, or "
            "compute in float32."
        )
    if not difference <= tolerance * max(1.0, float(expected.abs().max())):
        raise VerificationError(
            f"what was saved reloads, but its logits differ by {difference:.3g} from the model in "
            "memory; nothing was kept. Please report this with the model's name."
        )
    return Verification(bool(torch.equal(got, expected)), difference, got.shape[1])


def _ask_fresh_process(
    folder: Path, model: "PreTrainedModel", ids: torch.Tensor, text: str, *, once: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What a fresh process finds in the folder, and the types that its parameters have there."""
    ready = readiness.taken()
    with ready.scratch if ready else Scratch("reload") as scratch:
        request, answer = Path(scratch, "request.json"), Path(scratch, "answer.safetensors")
        asked = {
            "folder": str(folder),
            "answer": str(answer),
            "ids": ids[0].tolist(),
            "text": text,
            "dtype": plain_dtype(model.dtype),
            "device": str(device_of(model)),
            "room": MEMORY_OF_A_RELOAD if is_offloaded(model) else 0,
            "code": _code_hash(model),
            "once": once,
            "sees": multimodal.whole_of(model) is not model,
        }
        request.write_text(json.dumps(asked), encoding="utf-8")
        if ready:
            done = ready.answer(request)
        else:
            done = _run_alone(
                readiness.RELOAD_CHECK, [str(request)], readiness.environment(scratch)
            )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise VerificationError(
                f"the saved checkpoint does not reload in a fresh process: {reason}"
            )
        with safe_open(answer, framework="pt") as file:
            types = json.loads((file.metadata() or {}).get("types", "{}"))
        return load_file(answer), types


def _code_hash(model: "PreTrainedModel") -> str | None:
    """Of the one file of code that a checkpoint of the model carries; None if it carries none."""
    if mode_of(model) == "stock":
        return None
    code = modeling.travelling_code(model.config.stock_classes, type(model.config).__module__)
    return hashlib.sha256(code.encode()).hexdigest()


def _run_alone(
    program: str, arguments: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """A Python program that does not see this package's folder."""
    command = [sys.executable, "-P", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
