"""The contract that every family keeps: what goes, what stays, what is saved, what is generated.

Each family is a tiny random model of five decoder layers. `tests/families.py` says how it is built.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import families_table
import stranger
from families import FAMILIES, PATTERNED, build
from ghostlayers.checkpoint import saving
from ghostlayers.errors import UnsupportedModelError
from ghostlayers.model import agreement
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.families import PREFIX
from ghostlayers.model.stream import find_decoder_layers
from ghostlayers.spans import Span, kept_layers
from ghostlayers.surgery import removal
from oracles import CUTS, GENERATION, literal_repaired, logits, operators, token_ids

ALLOWED = [
    (name, cut) for name in FAMILIES for cut in CUTS if cut in PATTERNED.get(name, set(CUTS))
]
FORBIDDEN = [(name, cut) for name in PATTERNED for cut in CUTS if cut not in PATTERNED[name]]
UNCACHED = {"mamba", "falcon_mamba"}
"""Families whose generation without a cache is another computation in transformers."""
INEXACT = {"mamba", "falcon_mamba", "flex_olmo"}
"""Families whose kernels give other last bits where the same weights lie elsewhere in memory."""


def assert_same(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    if name in INEXACT:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(got, want)


NO_ATTENTION_LEFT = {"jamba": {"two gaps"}}
"""Cuts that leave only recurrent layers, for which transformers generates without a cache alone."""


def cut_of(name: str) -> str:
    """A cut of two gaps where the family allows it."""
    allowed = PATTERNED.get(name, set(CUTS)) - NO_ATTENTION_LEFT.get(name, set())
    return "two gaps" if "two gaps" in allowed else max(allowed)


@pytest.mark.parametrize(("name", "cut"), ALLOWED)
def test_a_repaired_cut_is_the_dense_model_with_layers_skipped(name: str, cut: str) -> None:
    dense, spans = build(name), CUTS[cut]
    repaired = removal.prune_layers(DenseModel(dense), spans, operators(spans))
    want = literal_repaired(dense, spans, token_ids())
    assert torch.equal(logits(repaired, token_ids()), want)
    assert not torch.allclose(
        logits(removal.prune_layers(DenseModel(dense), spans), token_ids()), want
    )


@pytest.mark.parametrize(("name", "cut"), ALLOWED)
def test_the_config_alone_says_what_the_layers_are(name: str, cut: str) -> None:
    """Built anew from the config and filled with the weights, it is the same model."""
    dense, spans = build(name), CUTS[cut]
    pruned = removal.prune_layers(DenseModel(dense), spans)
    assert type(pruned) is type(dense)
    config = type(pruned.config).from_dict(copy.deepcopy(pruned.config.to_dict()))
    anew = type(dense)(config).eval()
    anew.load_state_dict(pruned.state_dict())
    assert_same(name, logits(anew, token_ids()), logits(pruned, token_ids()))
    kept = kept_layers(spans, 5)
    assert config.num_hidden_layers == len(kept)
    layers = [find_decoder_layers(dense)[index] for index in kept]
    for one, other in zip(layers, find_decoder_layers(anew), strict=True):
        assert type(one) is type(other)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_cut_is_the_identity(name: str) -> None:
    dense = build(name)
    config = dense.config.to_dict()
    pruned = removal.prune_layers(DenseModel(dense), ())
    assert torch.equal(logits(pruned, token_ids()), logits(dense, token_ids()))
    assert dense.config.to_dict() == config


@pytest.mark.parametrize(("name", "cut"), FORBIDDEN)
def test_a_cut_that_breaks_a_formula_is_refused(name: str, cut: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"formula|could not be loaded again"):
        removal.prune_layers(DenseModel(build(name)), CUTS[cut])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_a_cache_samples_and_pads(name: str) -> None:
    spans = CUTS[cut_of(name)]
    model = removal.prune_layers(DenseModel(build(name)), spans, operators(spans))
    ids = token_ids(length=9)
    options = {"attention_mask": torch.ones_like(ids), **GENERATION}
    cached = model.generate(ids, use_cache=True, **options)
    assert cached.shape == (2, 21)
    if name not in UNCACHED:
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    torch.manual_seed(0)
    sampled = model.generate(ids, **{**options, "do_sample": True})
    assert sampled.shape == (2, 21)
    padded = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), torch.ones_like(ids)], dim=1)
    left = model.generate(padded, **{**options, "attention_mask": mask})
    assert left.shape == (2, 24)
    assert torch.equal(left[:, 3:], cached)


@pytest.mark.parametrize("name", FAMILIES)
def test_ties_are_kept(name: str) -> None:
    dense = build(name, tie_word_embeddings=True)
    if dense.get_output_embeddings() is None:
        pytest.skip("it has no head of its own")
    tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    spans = CUTS[cut_of(name)]
    pruned = removal.prune_layers(DenseModel(dense), spans, operators(spans))
    head, embedding = pruned.get_output_embeddings(), pruned.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied


@pytest.mark.parametrize("kind", ["repaired", "bare"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_came_from_a_checkpoint_goes_into_one(
    name: str, kind: str, tmp_path: Path
) -> None:
    """Loaded models remember how checkpoints of their family name and split weights."""
    build(name).save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    spans = CUTS[cut_of(name)]
    model = removal.prune_layers(
        DenseModel(dense), spans, operators(spans) if kind == "repaired" else None
    )
    (tmp_path / "out").mkdir()
    saving._write_weights(tmp_path / "out", model, torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    got, want = again.state_dict(), model.state_dict()
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Every family's cut model, repaired and bare, on disk, and what a stranger's process gets."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in FAMILIES:
        spans = CUTS[cut_of(name)]
        for kind, repairs in (("repaired", operators(spans)), ("bare", None)):
            model = removal.prune_layers(DenseModel(build(name)), spans, repairs)
            path = folder / f"{name}-{kind}"
            path.mkdir()
            saving._write_weights(path, model, torch.float32)
    work = tmp_path_factory.mktemp("stranger")
    save_file({"input_ids": token_ids()}, work / "ids")
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(work),
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": "1",  # as here: another number of threads adds in another order
    }
    arguments = [str(folder), str(work / "ids"), str(work / "answers")]
    done = subprocess.run(
        [sys.executable, "-P", stranger.__file__, *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, load_file(work / "answers")


@pytest.mark.parametrize("kind", ["repaired", "bare"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_stranger_loads_it(name: str, kind: str, saved: Any) -> None:
    """In a process that has never heard of this package, with trust_remote_code alone."""
    spans = CUTS[cut_of(name)]
    repairs = operators(spans) if kind == "repaired" else None
    want = removal.prune_layers(DenseModel(build(name)), spans, repairs)
    assert_same(name, saved[1][f"{name}-{kind}"], logits(want, token_ids()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stock_class_refuses_a_repaired_checkpoint(name: str, saved: Any) -> None:
    assert bool(saved[1][f"{name}-repaired refused"])


@pytest.mark.parametrize("name", FAMILIES)
def test_importing_the_package_is_enough(name: str, saved: Any) -> None:
    path = saved[0] / f"{name}-repaired"
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    assert model.config.model_type == f"{PREFIX}{name}"
    assert_same(name, logits(model, token_ids()), saved[1][path.name])
    assert type(AutoModel.from_pretrained(path)).__name__.startswith("Repaired")


@pytest.mark.slow
def test_the_table_of_families_is_current() -> None:
    """``python tests/families_table.py`` writes it."""
    if families_table.written_with() != transformers.__version__:
        pytest.skip("written with another version of transformers, which knows other families")
    text = families_table.PATH.read_text(encoding="utf-8")
    assert text == families_table.render(), "run: python tests/families_table.py"


def test_agreement_names_the_first_difference() -> None:
    one, other = build("gemma3_text"), build("gemma3_text")
    layer = find_decoder_layers(one)[0]
    assert agreement.layer_difference(layer, find_decoder_layers(other)[0]) == ""
    other_layer = find_decoder_layers(other)[2]
    assert agreement.layer_difference(layer, other_layer) == "'layer_idx' is 0 against 2"
    assert "against" in agreement.layer_difference(layer, build("llama").model.layers[0])


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"num_kv_shared_layers": 2}, "read the attention cache of others"),
        ({"hidden_size_per_layer_input": 8}, "embeddings of their own"),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
    ],
)
def test_what_can_never_be_cut_is_refused_by_name(entry: dict[str, Any], reason: str) -> None:
    model = build("llama")
    for name, value in entry.items():
        setattr(model.config, name, value)
    with pytest.raises(UnsupportedModelError, match=f"type 'llama' cannot be cut: .*{reason}"):
        removal.prune_layers(DenseModel(model), (Span(1, 2),))
