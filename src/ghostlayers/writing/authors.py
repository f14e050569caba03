"""Who writes: the dense model in memory by transformers, or by name in vLLM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from ghostlayers.calibration.fingerprint import model_fingerprint
from ghostlayers.errors import DependencyError
from ghostlayers.evaluation.generating import end_tokens, plain_settings, write_behind
from ghostlayers.model.dense import DenseModel
from ghostlayers.recipe import RunOptions
from ghostlayers.recipe.writing import WritingRecipe
from ghostlayers.runtime.machine import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = Sequence[int]

IN_MEMORY, IN_VLLM = (8, 32), 256
"""Texts at a time, on a processor and an accelerator; vLLM batches by itself."""


@dataclass(frozen=True)
class Author:
    """A model that continues tokens.

    Attributes:
        name: of the model.
        tokenizer: its tokenizer.
        positions: tokens that it can see; None if it does not say.
        stops: tokens that end a text.
        batch: texts at a time, if nothing is said.
        identity: all that its words depend on beside what it is asked, as plain values.
        write: new tokens behind each of several prompts: so many at most, at a temperature (0
            takes the most likely), drawn by a seed.
    """

    name: str
    tokenizer: "PreTrainedTokenizerBase"
    positions: int | None
    stops: frozenset[int]
    batch: int
    identity: dict[str, Any]
    write: Callable[[Sequence[Ids], int, float, int], list[list[int]]]


def author_in_memory(dense: DenseModel) -> Author:
    """A model in memory, run by transformers."""
    stops = frozenset(end_tokens(dense.network, dense.tokenizer))

    def write(prompts: Sequence[Ids], new: int, temperature: float, seed: int) -> list[list[int]]:
        return generate(dense, prompts, new, temperature, seed, stops)

    identity = {
        "engine": "transformers",
        "model": model_fingerprint(dense),
        "dtype": str(dense.network.dtype),
        "device": dense.device.type,
        "versions": versions(),
    }
    return Author(
        dense.base.name,
        dense.tokenizer,
        getattr(dense.config, "max_position_embeddings", None),
        stops,
        IN_MEMORY[dense.device.type != "cpu"],
        identity,
        write,
    )


@torch.no_grad()
def generate(
    dense: DenseModel,
    prompts: Sequence[Ids],
    new_tokens: int,
    temperature: float,
    seed: int,
    stops: frozenset[int],
) -> list[list[int]]:
    """New tokens behind each prompt, up to the first that ends it, which is among them.

    Shorter prompts are padded at their left, and the padding is masked.
    """
    length = max(map(len, prompts))
    pad = min(stops, default=0)
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    drawn = {"temperature": temperature} if temperature > 0 else {}
    ends = {"eos_token_id": sorted(stops) or None, "pad_token_id": pad}
    how = plain_settings(new_tokens, sampled=temperature > 0, **drawn, **ends)
    before = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        sequences = write_behind(
            dense.network, ids.to(dense.device), how, attention_mask=mask.to(dense.device)
        )
    finally:
        torch.random.set_rng_state(before)
    return [_up_to_stop(row, stops) for row in sequences[:, length:].tolist()]


def _up_to_stop(ids: list[int], stops: frozenset[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids, 1) if token in stops), len(ids))
    return ids[:end]


def takes_vllm(recipe: WritingRecipe, name: Any, options: RunOptions) -> bool:
    """Whether vLLM is to run a model, which it opens by its name.

    Raises:
        DependencyError: it is asked for and not installed.
    """
    there = find_spec("vllm") is not None
    if recipe.engine == "vllm" and not there:
        raise DependencyError(
            "--engine vllm needs vLLM, which is not installed: pip install vllm, or take --engine "
            "transformers."
        )
    if recipe.engine != "auto":
        return recipe.engine == "vllm"
    named = isinstance(name, str) and not name.endswith(".gguf")
    return there and named and options.device != "cpu" and torch.accelerator.is_available()


def author_in_vllm(name: str, revision: str | None, options: RunOptions) -> Author:
    """A model by its name, run by vLLM, which holds it alone."""
    from vllm import LLM, SamplingParams

    model = LLM(
        name,
        revision=revision,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        seed=0,
    )
    tokenizer, config = model.get_tokenizer(), model.llm_engine.model_config
    stops = frozenset(end_tokens(None, tokenizer))

    def write(prompts: Sequence[Ids], new: int, temperature: float, seed: int) -> list[list[int]]:
        how = [
            SamplingParams(temperature=temperature, top_p=1.0, max_tokens=new, seed=seed + number)
            for number in range(len(prompts))
        ]
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        answers = [answer.outputs[0] for answer in model.generate(asked, how, use_tqdm=False)]
        # Of a text that it ended itself, vLLM may leave out the token that says so.
        return [
            [*answer.token_ids, *([min(stops)] if _lacks_stop(answer, stops) else [])]
            for answer in answers
        ]

    identity = {
        "engine": "vllm",
        "model": [name, revision],
        "dtype": options.dtype,
        "versions": versions(),
    }
    return Author(name, tokenizer, config.max_model_len, stops, IN_VLLM, identity, write)


def _lacks_stop(output: Any, stops: frozenset[int]) -> bool:
    ended = output.finish_reason == "stop" and stops
    return bool(ended) and (not output.token_ids or output.token_ids[-1] not in stops)
