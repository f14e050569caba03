"""What llama.cpp computes from our files is what transformers computes: needs llama-cpp-python.

`pip install llama-cpp-python` builds it; where it is not installed these tests are skipped, and
`test_gguf.py` holds the files to what transformers reads from them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gguf_models import IDS, VARIANTS, family, with_a_merge, write
from ghostlayers.checkpoint.gguf_export import export_gguf
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.gguf_families import GGUF_FAMILIES
from ghostlayers.spans import Span
from ghostlayers.surgery import removal
from oracles import fitted, logits

llama_cpp = pytest.importorskip("llama_cpp")


def computed(file: Path, ids: torch.Tensor) -> np.ndarray:
    llama = llama_cpp.Llama(str(file), n_ctx=128, logits_all=True, verbose=False)
    llama.eval(ids[0].tolist())
    return np.array(llama.scores[: ids.shape[1]])


def check(model: Any, tokenizer: Any, folder: Path, *, exported: Any = None) -> None:
    """A file of ``exported``, by default the model itself, computes what the model does."""
    write(exported or model, tokenizer, folder / "model")
    with_a_merge(folder / "model")
    file = export_gguf(folder / "model", folder / "model.gguf", pre_tokenizer="gpt-2")
    want = logits(model, IDS)[0].float().numpy()
    got = computed(file, IDS)
    # llama.cpp keeps keys and values in float16
    worst = np.abs(got - want).max()
    assert worst < 4e-3 * np.abs(want).max() * max(1.0, model.config.num_hidden_layers / 16)


@pytest.mark.parametrize("name", sorted(GGUF_FAMILIES))
def test_a_family_computes_the_same(name: str, byte_tokenizer: Any, tmp_path: Path) -> None:
    check(family(name), byte_tokenizer, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_computes_the_same(name: str, byte_tokenizer: Any, tmp_path: Path) -> None:
    kind, changes = VARIANTS[name]
    check(family(kind, **changes), byte_tokenizer, tmp_path)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_a_projection_refitted_with_its_norm_computes_the_same(
    name: str, byte_tokenizer: Any, tmp_path: Path
) -> None:
    dense, spans = family(name), (Span(2, 3),)
    built = removal.prune_layers(DenseModel(dense), spans, fitted(dense, "refit:1", spans))
    check(built, byte_tokenizer, tmp_path)
    with pytest.raises(AssertionError):
        check(
            removal.prune_layers(DenseModel(dense), spans),
            byte_tokenizer,
            tmp_path / "bare",
            exported=built,
        )


def test_the_check_sees_a_wrong_file(byte_tokenizer: Any, tmp_path: Path) -> None:
    """Windows in other layers are one of the smallest things that a file could say wrongly."""
    model = family("gemma3_text")
    other = family("gemma3_text", layer_types=model.config.layer_types[::-1])
    other.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError):
        check(model, byte_tokenizer, tmp_path, exported=other)
