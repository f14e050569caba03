"""Writing by what is asked alone, whatever a checkpoint's own settings of generation say."""

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from conftest import make_tiny_llama
from ghostlayers.errors import ModelError, NonFiniteError
from ghostlayers.evaluation.continuation import continue_text
from ghostlayers.evaluation.generating import end_tokens, plain_settings, write_behind
from ghostlayers.evaluation.written import continuations
from ghostlayers.model.dense import DenseModel
from ghostlayers.writing.authors import author_in_memory

OWN: list[dict[str, Any]] = [
    {"num_beams": 4, "min_p": 0.5, "suppress_tokens": list(range(20, 60))},
    {"do_sample": True, "temperature": 3.0, "top_k": 2, "top_p": 0.1, "typical_p": 0.2},
    {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[5], [6]]},
    {"forced_eos_token_id": 99999, "forced_bos_token_id": 3},
    {"stop_strings": ["a"], "penalty_alpha": 3.0},
    {"prompt_lookup_num_tokens": -1, "num_return_sequences": 0},
    {"cache_implementation": "quantized"},
    {"suppress_tokens": list(range(96)), "begin_suppress_tokens": [1, 2]},
    {"num_beams": 10**9, "max_time": 0.0, "max_length": 1, "min_length": 99},
    {"guidance_scale": 3.0, "sequence_bias": {(3,): 99.0}},
    {"exponential_decay_length_penalty": (1, 9.0)},
    {"epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "low_memory": True, "use_cache": False},
    {"assistant_early_exit": 1, "num_assistant_tokens": 0, "is_assistant": True},
]  # fmt: skip
"""Settings that a folder's generation_config.json may bring; some cannot even be carried out."""


@pytest.fixture(scope="module")
def tiny(byte_tokenizer: Any) -> DenseModel:
    return DenseModel(make_tiny_llama(), byte_tokenizer)


def all_that_is_written(dense: DenseModel) -> list[Any]:
    """By every way in which the package has a model write."""
    model, tokenizer = dense.network, dense.tokenizer
    prompts = torch.arange(3, 9).view(2, 3)
    author = author_in_memory(dense)
    texts = continuations(model, tokenizer, prompts, new_tokens=5, samples=2, seed=0)
    return [
        write_behind(model, prompts, plain_settings(5)).tolist(),
        texts.greedy.tolist(),
        texts.sampled.tolist(),
        continue_text(model, tokenizer, "abc", 5, at_least=5),
        author.write([[3, 4], [5, 6, 7]], 5, 0.7, 1),
        author.write([[3, 4], [5, 6, 7]], 5, 0.0, 1),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("own", OWN, ids=lambda own: next(iter(own)))
def test_nothing_of_the_models_own_settings_counts(tiny: DenseModel, own: dict[str, Any]) -> None:
    network: Any = tiny.network
    before = network.generation_config
    expected = all_that_is_written(tiny)
    settings = copy.deepcopy(before)
    for name, value in own.items():
        setattr(settings, name, value)
    network.generation_config = settings
    try:
        assert all_that_is_written(tiny) == expected
        assert network.generation_config is settings
    finally:
        network.generation_config = before


@pytest.mark.parametrize("value", ["x", 1.5, True, -1, [3, "x"], [[3]], {"a": 1}])
def test_tokens_that_end_a_text_are_numbers(tiny: DenseModel, value: Any) -> None:
    network: Any = tiny.network
    before, network.generation_config = network.generation_config, GenerationConfig()
    network.generation_config.eos_token_id = value
    try:
        with pytest.raises(ModelError, match="eos_token_id"):
            end_tokens(network, tiny.tokenizer)
    finally:
        network.generation_config = before


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers_does_not_write(byte_tokenizer: Any, spoilt: float) -> None:
    network = make_tiny_llama()
    with torch.no_grad():
        network.model.norm.weight[0] = spoilt
    dense = DenseModel(network, byte_tokenizer)
    for temperature in (0.0, 1.0):
        with pytest.raises(NonFiniteError, match="cannot write"):
            author_in_memory(dense).write([[3, 4]], 3, temperature, 0)
