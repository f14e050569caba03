"""A model whose layers lie elsewhere gives what it gives in memory, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import ghostlayers
from conftest import make_tiny_llama
from ghostlayers.calibration.boundaries import BoundaryStore
from ghostlayers.checkpoint import proof, saving
from ghostlayers.errors import ModelError, RecipeError
from ghostlayers.model import offload, residency, stream
from ghostlayers.model.dense import DenseModel
from ghostlayers.model.loading import load_model
from ghostlayers.model.residency import is_offloaded
from ghostlayers.plan import probe
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime import machine
from ghostlayers.runtime.sizes import parse_memory

DISK = RunOptions(offload="disk", dtype="float32")
NONE = RunOptions(offload="none", dtype="float32")
CPU = torch.device("cpu")
RUN: dict[str, Any] = {
    "windows": 16,
    "fit_windows": 16,
    "held_out_windows": 4,
    "sequence_length": 64,
}


@pytest.fixture(scope="module", params=["tied", "untied", "bfloat16"])
def model_folder(
    request: pytest.FixtureRequest, byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Llama of eight layers in several files."""
    folder = tmp_path_factory.mktemp("models") / request.param
    model = make_tiny_llama(
        num_hidden_layers=8, hidden_size=64, tie_word_embeddings=request.param == "tied"
    )
    if request.param == "bfloat16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    byte_tokenizer.save_pretrained(folder)
    return folder


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


# The run


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        {"layers": 3, "select": "recoverable"},
        {"layers": 2, "select": "perplexity:one-shot", "repair": "refit:2"},
        {"layers": 2, "select": "taylor:unprotected", "repair": "normed"},
        {"remove": "2,5-6", "repair": "piecewise:2"},
        {"layers": 2, "select": "magnitude", "repair": "magnitude"},
        {"remove": "0", "repair": "ghost"},
        {"remove": "7", "repair": "none"},
    ],
    ids=lambda options: "-".join(str(v) for v in options.values()),
)
def test_an_offloaded_run_writes_the_same_bits(
    model_folder: Path, tmp_path: Path, some_text: list[str], choices: dict[str, Any]
) -> None:
    runs = {}
    for options in (NONE, DISK):
        pruned = ghostlayers.prune(
            str(model_folder), data=some_text, options=options, **RUN, **choices
        )
        assert is_offloaded(pruned.dense.network) == (options is DISK)
        out = tmp_path / options.offload
        out.mkdir()
        saving._write_weights(out, pruned.model, pruned.dense.stored_dtype)
        evidence = {name: vars(sums) for name, sums in pruned.evidence.items()}
        runs[options.offload] = (tensors_in(out), evidence, pruned.removed)
    one, two = runs["none"], runs["disk"]
    assert one[1:] == two[1:]
    assert one[0].keys() == two[0].keys()
    for name, tensor in one[0].items():
        assert torch.equal(tensor, two[0][name]), name


@pytest.mark.slow
def test_saved_and_reloaded_from_disk(
    model_folder: Path, tmp_path: Path, some_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "SHARD_OF_OFFLOADED", 100_000)
    monkeypatch.setattr(proof, "MEMORY_OF_A_RELOAD", 200_000)
    pruned = ghostlayers.prune(
        str(model_folder), data=some_text, options=DISK, remove="3-4", repair="ghost", **RUN
    )
    verification = pruned.save(tmp_path / "out")
    assert verification.largest_difference < 1e-4
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_a_repaired_checkpoint_runs_from_disk(
    model_folder: Path, tmp_path: Path, some_text: list[str]
) -> None:
    """As anyone would run it whose memory it does not fit."""
    pruned = ghostlayers.prune(
        str(model_folder), data=some_text, options=NONE, remove="3-4", repair="ghost", **RUN
    )
    out = tmp_path / "out"
    out.mkdir()
    saving._write_weights(out, pruned.model, torch.float32)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.rotary_emb": "cpu"} | {f"model.layers.{i}": "disk" for i in range(6)}
    ids = torch.arange(40)[None] % 256
    model = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, device_map=device_map, offload_folder=str(tmp_path / "elsewhere")
    ).eval()
    with torch.no_grad():
        got, expected = model(input_ids=ids).logits, pruned.model.float()(input_ids=ids).logits
    assert torch.equal(got, expected)


@pytest.mark.slow
def test_evaluation_and_scores_are_the_same(model_folder: Path, some_text: list[str]) -> None:
    runs = []
    for options in (NONE, DISK):
        (result,) = ghostlayers.evaluate(
            str(model_folder), data=[some_text], sequence_length=64, options=options
        )
        table = ghostlayers.score(
            str(model_folder),
            data=some_text,
            layers=2,
            select="recoverable",
            options=options,
            **RUN,
        )
        runs.append((result.to_dict(), table.spans, table.norms.norms.tolist()))
    assert runs[0] == runs[1]


@pytest.mark.slow
def test_streams_in_a_file_take_half_of_what_is_free(
    model_folder: Path, some_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer windows visit a layer together then, and the scores are the same."""
    runs = []
    groups: list[int] = []
    begin = DenseModel.begin

    def note(self: Any, ids: torch.Tensor, *rest: Any) -> Any:
        groups.append(len(ids))
        return begin(self, ids, *rest)

    monkeypatch.setattr(DenseModel, "begin", note)
    for room in (machine.room_for_streams(on_disk=True), 3 * 9 * 64 * 64 * 4):
        groups.clear()
        monkeypatch.setattr(stream, "room_for_streams", lambda *, on_disk, room=room: room)
        table = ghostlayers.score(
            str(model_folder), data=some_text, layers=2, select="streamline", options=DISK, **RUN
        )
        runs.append((table.spans, max(groups)))
    assert runs[0][0] == runs[1][0]
    assert (runs[0][1], runs[1][1]) == (16, 3)


# Where weights are


def test_every_layer_is_brought_in_once_a_pass(model_folder: Path) -> None:
    model = load_model(str(model_folder), DISK)
    brought: list[int] = []
    bring = residency.Residency.bring

    def note(self: Any, index: int) -> Any:
        if self._held != index:
            brought.append(index)
        return bring(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residency.Residency, "bring", note)
        batch, stream = model.begin(torch.arange(8 * 64).view(8, 64) % 256)
        for layer in range(model.num_layers):
            stream = model.run_layer(layer, batch, stream)
    assert brought == list(range(8))
    held = [layer for layer in model.layers if not next(layer.parameters()).is_meta]
    assert len(held) <= 1
    model.residency.release()
    assert all(p.is_meta for layer in model.layers for p in layer.parameters())


def test_embeddings_norm_and_head_stay(model_folder: Path) -> None:
    model = load_model(str(model_folder), DISK).network
    elsewhere = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert elsewhere == {n for n, _ in model.named_parameters() if n.startswith("model.layers.")}


def test_what_fits_stays(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_offloaded(load_model(str(model_folder), RunOptions()).network)
    size = offload.weights_on_disk(model_folder)
    assert size is not None

    class Little:
        available = size

    monkeypatch.setattr(offload.psutil, "virtual_memory", Little)
    config = LlamaConfig.from_pretrained(model_folder)
    placed = offload.place_weights(config, torch.float32, RunOptions(), CPU)
    assert placed.elsewhere == "disk"
    assert placed.device_map is not None


def test_a_limit_below_the_weights_offloads_unasked(model_folder: Path) -> None:
    config = LlamaConfig.from_pretrained(model_folder)
    placed = offload.place_weights(config, torch.float32, RunOptions(max_memory="100KB"), CPU)
    assert placed.elsewhere == "disk"
    roomy = offload.place_weights(config, torch.float32, RunOptions(max_memory="1GB"), CPU)
    assert roomy.device_map is None
    assert roomy.total == placed.total
    assert placed.resident < placed.total


@pytest.mark.parametrize("device", ["cuda:0", "mps", "cpu"])
def test_places_are_named_as_safetensors_knows_them(model_folder: Path, device: str) -> None:
    """accelerate opens files with the place it was given, and they take no `torch.device`."""
    config = LlamaConfig.from_pretrained(model_folder)
    placed = offload.place_weights(config, torch.float32, DISK, torch.device(device))
    assert placed.device_map is not None
    assert set(map(repr, placed.device_map.values())) == {repr(device), "'disk'"}


def test_a_limit_that_cannot_be_kept_says_what_is_needed(model_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"--max-memory 10MB is too little: the program itself"):
        load_model(str(model_folder), RunOptions(max_memory="10MB"))


def test_offloading_to_the_processor_that_computes_is_refused(model_folder: Path) -> None:
    with pytest.raises(RecipeError, match="--offload disk"):
        load_model(str(model_folder), RunOptions(offload="cpu", device="cpu"))


def test_sizes() -> None:
    assert parse_memory(None) is None
    assert parse_memory("4GiB") == 2**32
    assert parse_memory("500 MB") == 500_000_000
    with pytest.raises(RecipeError, match="'plenty' is no size"):
        parse_memory("plenty")


# Saving


@pytest.mark.slow
def test_an_offloaded_model_is_saved_as_it_is_stored(
    model_folder: Path, tmp_path: Path, some_text: list[str]
) -> None:
    """Computed in float32, stored as it was: every weight that was not folded into is the same."""
    pruned = ghostlayers.prune(
        str(model_folder), data=some_text, options=DISK, remove="3", repair="ghost", **RUN
    )
    saving._write_weights(tmp_path, pruned.model, pruned.dense.stored_dtype)
    before, after = tensors_in(model_folder), tensors_in(tmp_path)
    assert torch.equal(
        after["model.layers.5.mlp.up_proj.weight"], before["model.layers.6.mlp.up_proj.weight"]
    )
    kinds = {tensor.dtype for tensor in after.values()}
    assert kinds == {tensor.dtype for tensor in before.values()}
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_gguf_cannot_be_offloaded(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises((ModelError, RecipeError)):
        load_model(str(path), DISK)


# The stream in a file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_in_a_file_is_the_one_in_memory(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    memory = BoundaryStore((3, 20, 8), dtype)
    file = BoundaryStore((3, 20, 8), dtype, on_disk=True)
    for boundary in range(3):
        for start in (0, 12):
            rows = torch.randn(8, 8, generator=generator).to(dtype)
            memory.write(boundary, start, rows)
            file.write(boundary, start, rows)
    for boundary in range(3):
        assert torch.equal(memory[boundary], file[boundary])  # rows 8 to 11 are zero
    assert torch.equal(memory.stretch(5, 15), file.stretch(5, 15))
    assert file.tensor is None
    assert memory.tensor is not None


def test_the_probe_times_no_layer_that_was_read_ahead(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(model_folder), DISK)
    brought: list[int] = []
    bring = residency.Residency.bring

    def note(self: Any, index: int) -> Any:
        brought.append(index)
        return bring(self, index)

    monkeypatch.setattr(residency.Residency, "bring", note)
    assert probe._bring_seconds(model) > 0
    assert brought == [0, 2, 4]
