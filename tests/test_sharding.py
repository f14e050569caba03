"""Healing a model that FSDP2 divides among processes gives what one process gives."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ghostlayers
import sharded
from conftest import make_byte_tokenizer, make_documents, make_tiny_llama
from forked import Fork, Forks
from ghostlayers.calibration import journal
from ghostlayers.errors import RecipeError, UnsupportedModelError
from ghostlayers.healed import check_save
from ghostlayers.healing import sharding, sharding_checks
from ghostlayers.healing.engine import Lesson
from ghostlayers.healing.sharding_checks import check_sharding, options_for_shards
from ghostlayers.model.dense import DenseModel
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime import launchers, parallel
from test_parallel import COMMAND, answers, assert_close, start_all

PROGRAM = Path(sharded.__file__)
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", launchers.FSDP_LOADS_ONCE: "true"}
"""What ``accelerate launch --use_fsdp --fsdp_version 2`` sets, and matters here."""

SHORT = {"text": "short", "tokens": "2500", "train": "operator+norms"}
CASES = {
    "two": (2, {}, {}),
    "three": (3, {"train": "all", "loss": "kl+ce"}, {}),
    "text again": (2, SHORT, {}),
    "layers again": (2, {"train": "suffix"}, {launchers.FSDP_CHECKPOINTS: "true"}),
}
"""Processes, recipe, and what else the launcher says."""


@pytest.fixture(scope="module")
def ours() -> Iterator[Forks]:
    """Forks of a process that has imported all that they need."""
    forks = Forks(["sharded"])
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, one cut from it, and texts."""
    here = tmp_path_factory.mktemp("sharded")
    make_tiny_llama(num_hidden_layers=8).save_pretrained(here / "dense")
    make_byte_tokenizer(bos=False).save_pretrained(here / "dense")
    for name, count, seed in (("text", 30, 2), ("short", 2, 2), ("held", 9, 5)):
        (here / f"{name}.txt").write_text("\n\n".join(make_documents(count, seed=seed)))
    pruned = ghostlayers.prune(
        str(here / "dense"), data=make_documents(40), remove="3-4", windows=21, fit_windows=21,
        held_out_windows=5, sequence_length=64,
    )  # fmt: skip
    pruned.save(here / "cut")
    return here


def start(
    forks: Forks, answer: Path, size: int, folder: Path, case: Any, *more: str, **variables: str
) -> list[Fork]:
    """So many processes that heal together."""
    given = (str(answer), str(folder), json.dumps(case), *more)
    return start_all(forks, size, PROGRAM, *given, **{**FSDP2, **variables})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_processes_with_shares_give_what_one_process_gives(
    tmp_path: Path, folder: Path, ours: Forks, name: str
) -> None:
    size, case, variables = CASES[name]
    answer, out = tmp_path / "found.json", tmp_path / "out"
    processes = start(ours, answer, size, folder, case, SAVE=str(out), **variables)
    alone = sharded.healed_of(folder, case)
    alone.save(tmp_path / "alone")
    shares = answers(answer, processes)
    held = [share.pop("held") for share in shares]
    assert all(share == shares[0] for share in shares)
    assert_close(shares[0], json.loads(json.dumps(sharded.told(alone))))  # to 2e-5

    before, one, several = (weights(path) for path in (folder / "cut", tmp_path / "alone", out))
    assert {n: (w.shape, w.dtype) for n, w in several.items()} == {
        n: (w.shape, w.dtype) for n, w in one.items()
    }
    changed = {n for n, w in one.items() if not torch.equal(w, before[n])}
    assert changed
    for each, want in one.items():
        if each in changed:
            moved = float((want - before[each]).norm())
            # The first steps follow signs of gradients, of which some are nearly zero.
            assert float((several[each] - want).norm()) <= 0.1 * moved, each
        else:
            assert torch.equal(several[each], want), each

    numbers, layers = alone.outcome.num_trained, _in_layers(folder)
    whole = 32 if any("model.norm" in n for n in changed) else 0  # the last norm
    assert sum(each["masters"] for each in held) == numbers + (size - 1) * whole
    assert sum(each["dense"] for each in held) == layers
    for each in held:
        assert each["masters"] == each["moments"] == each["best"] <= numbers / size + 600
        assert each["types"] == ["torch.float32"]
        assert each["dense"] <= 1.1 * layers / size
        assert each["shared"] == (0 if case.get("train") == "all" else 2)  # before the operator
        assert set(each["alone"]) == changed | (set(each["alone"]) & _unlike(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "case"),
    [
        (2, {"train": "operator+lora"}),
        (3, {"train": "lora", "rank": 3, "modules": "q_proj,v_proj"}),
        (3, {"train": "lora", "loss": "ce"}),
    ],
)
def test_adapters_beside_shares_give_what_one_process_gives(
    tmp_path: Path, folder: Path, ours: Forks, size: int, case: Any
) -> None:
    """Adapters are whole everywhere, and what is stored of a projection is a share; none is run."""
    answer, out = tmp_path / "found.json", tmp_path / "out"
    processes = start(ours, answer, size, folder, case, SAVE=str(out))
    alone = sharded.healed_of(folder, case)
    alone.save(tmp_path / "alone")
    shares = answers(answer, processes)
    held = [share.pop("held") for share in shares]
    assert all(share == shares[0] for share in shares)
    assert_close(shares[0], json.loads(json.dumps(sharded.told(alone))))

    before, one, several = (weights(path) for path in (folder / "cut", tmp_path / "alone", out))
    assert one.keys() == several.keys()
    changed = {n for n, w in one.items() if not torch.equal(w, before[n])}
    assert any("q_proj" in n for n in changed)
    for name, want in one.items():
        moved = float((want - before[name]).norm())
        assert float((several[name] - want).norm()) <= 0.1 * moved, name

    layers = _in_layers(folder)
    assert sum(each["dense"] for each in held) == layers
    for each in held:
        assert each["dense"] <= 1.1 * layers / size
        assert {n for n in each["alone"] if "lora_" not in n} <= _unlike(folder)
        assert each["shared"] == 0  # adapters stand on every layer


@pytest.mark.slow
def test_adapters_beside_shares_are_saved_for_peft(
    tmp_path: Path, folder: Path, ours: Forks
) -> None:
    more = ["--train", "lora", "--save", "peft", "--keep-worse"]
    ended, said, err = command(ours, *heal_command(folder, tmp_path / "out", *more))
    assert ended == [0, 0], err
    assert said.count("Saved:") == 1
    given = {"data": str(folder / "text.txt"), "held_out": str(folder / "held.txt")}
    alone = ghostlayers.heal(
        folder / "cut", against=str(folder / "dense"), **given, train="lora", tokens="700",
        sequence_length=32, held_out_windows=3,
    )  # fmt: skip
    adapters = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert adapters.keys() == alone.outcome.adapters.keys()
    for name, want in alone.outcome.adapters.items():
        assert float((adapters[name] - want).norm()) <= 0.1 * float(want.norm()), name


def _in_layers(folder: Path) -> int:
    return sum(w.numel() for n, w in weights(folder / "dense").items() if ".layers." in n)


def _unlike(folder: Path) -> set[str]:
    """Weights of the cut model that the dense one has not got."""
    return {n for n in weights(folder / "cut") if "repair_" in n}


@pytest.mark.slow
@pytest.mark.parametrize("when", ["0:before", "1:after", "adapters 1:before", "replicas 1:after"])
def test_killed_processes_go_on_to_the_same_bits(
    tmp_path: Path, folder: Path, ours: Forks, when: str
) -> None:
    """Whichever process is killed, and whether or not the others had kept as much."""
    how = {"ACCELERATE_USE_FSDP": "false"} if "replicas" in when else {}
    case = {"train": "operator+lora"} if "adapters" in when else {}
    keep = tmp_path / "kept"
    whole = answers(
        tmp_path / "once.json", start(ours, tmp_path / "once.json", 2, folder, case, **how)
    )
    answer, crash = tmp_path / "found.json", when.rpartition(" ")[2]
    killed = start(
        ours, answer, 2, folder, case, crash, KEEP=str(keep), GHOSTLAYERS_TIMEOUT="20", **how
    )
    other = 1 - int(crash[0])
    killed[other].communicate(timeout=120)
    killed[1 - other].communicate(timeout=120)
    said = json.loads(Path(f"{answer}.{other}").read_text())
    assert said["kind"] == "DistributedError"
    assert "start them all again with the same command" in said["error"]
    assert list(keep.glob("healing-*"))

    found = answers(answer, start(ours, answer, 2, folder, case, KEEP=str(keep), **how))
    assert all(each["held"]["digest"] for each in found)
    assert found == whole


@pytest.mark.slow
def test_a_number_that_is_none_in_one_process_ends_all_by_name(
    tmp_path: Path, folder: Path, ours: Forks
) -> None:
    answer = tmp_path / "found.json"
    for process in start(ours, answer, 2, folder, {}, "1:nan"):
        process.communicate(timeout=120)
    said = [json.loads(Path(f"{answer}.{rank}").read_text()) for rank in range(2)]
    assert [each["kind"] for each in said] == ["NonFiniteError"] * 2
    assert "in another process" in said[0]["error"]
    assert "gave NaN or infinity in float32" in said[1]["error"]


@pytest.mark.slow
def test_minutes_are_timed_with_shares(tmp_path: Path, folder: Path, ours: Forks) -> None:
    answer = tmp_path / "found.json"
    case = {"tokens": None, "minutes": 0.02}
    shares = answers(answer, start(ours, answer, 2, folder, case))
    assert shares[0]["steps"] == shares[1]["steps"] >= 1


# The command line


def command(forks: Forks, *arguments: str, **variables: str) -> tuple[list[int | None], str, str]:
    """A command in two processes: how both ended, and what they said together."""
    both = start_all(forks, 2, COMMAND, *arguments, **{**FSDP2, **variables})
    said = [process.communicate(timeout=200) for process in both]
    out, err = (" ".join("".join(part).split()) for part in zip(*said, strict=True))
    return [process.returncode for process in both], out, err


def heal_command(folder: Path, out: Path, *more: str) -> list[str]:
    given = ["--data", str(folder / "text.txt"), "--held-out", str(folder / "held.txt")]
    sizes = ["--tokens", "700", "--sequence-length", "32", "--held-out-windows", "3"]
    dense = ["--against", str(folder / "dense"), "-o", str(out)]
    return ["heal", str(folder / "cut"), *dense, *given, *sizes, *more]


@pytest.mark.slow
def test_the_command_line_with_shares(tmp_path: Path, folder: Path, ours: Forks) -> None:
    out = tmp_path / "out"
    ended, said, err = command(ours, *heal_command(folder, out, "--plan"))
    assert ended == [0, 0], err
    assert "Training operator + norms + all" in said
    assert not out.exists()
    ended, said, err = command(ours, *heal_command(folder, out, "--keep-worse"))
    assert ended == [0, 0], err
    assert said.count("Saved:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
def test_another_version_of_fsdp_is_refused(tmp_path: Path, folder: Path, ours: Forks) -> None:
    ended, _, said = command(ours, *heal_command(folder, tmp_path / "out"), FSDP_VERSION="1")
    assert ended == [2, 2]
    assert "asks for version 1, accelerate's default; add --fsdp_version 2" in said


@pytest.mark.slow
def test_other_commands_go_on_with_replicas(tmp_path: Path, folder: Path, ours: Forks) -> None:
    """Whatever version is asked for; every process has all weights, not the first one alone."""
    given = ["--data", str(folder / "text.txt"), "--windows", "8", "--sequence-length", "64"]
    prune = ["prune", str(folder / "dense"), "-o", str(tmp_path / "out"), "--remove", "3-4", *given]
    ended, _, said = command(ours, *prune, "--heal", "400k")
    assert ended == [2, 2]
    assert "prune without --heal, then `ghostlayers heal` the folder" in said
    assert not (tmp_path / "out").exists()
    ended, said, err = command(ours, *prune, FSDP_VERSION="1")
    assert ended == [0, 0], err
    pruned = ghostlayers.prune(
        str(folder / "dense"), data=str(folder / "text.txt"), windows=8, sequence_length=64,
        remove="3-4",
    )  # fmt: skip
    for name, weight in weights(tmp_path / "out").items():
        torch.testing.assert_close(weight, pruned.model.state_dict()[name], rtol=1e-4, atol=1e-5)


# What is refused


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As one of two processes that a launcher started with FSDP2."""
    monkeypatch.setattr(sharding_checks, "shards", lambda: 2)
    monkeypatch.setattr("ghostlayers.healed.shards", lambda: 2)
    monkeypatch.setenv("FSDP_VERSION", "2")
    return monkeypatch


def test_what_cannot_be_divided_is_refused_by_name(folder: Path, two: pytest.MonkeyPatch) -> None:
    cut, dense = folder / "cut", folder / "dense"
    check_sharding(cut, dense)
    with pytest.raises(RecipeError, match=r"'m.gguf' is a GGUF file; heal against the model that"):
        check_sharding(cut, "m.gguf")
    network = make_tiny_llama()
    for against in (network, DenseModel(network), None):
        with pytest.raises(RecipeError, match="one of these is in memory: save it"):
            check_sharding(cut, against)
    two.setenv(launchers.FSDP_OFFLOADS, "true")
    with pytest.raises(RecipeError, match="--fsdp_offload_params true; leave it away"):
        check_sharding(cut, dense)


def test_packed_weights_are_refused_by_name(folder: Path, two: pytest.MonkeyPatch) -> None:
    two.setattr(
        sharding_checks, "read_config", lambda _: {"quantization_config": {"quant_method": "awq"}}
    )
    with pytest.raises(RecipeError, match="is packed by awq; heal against the model that it was"):
        check_sharding(folder / "cut", folder / "dense")


@pytest.mark.parametrize(
    ("options", "name"),
    [({"offload": "disk"}, "--offload"), ({"max_memory": "4GiB"}, "--max-memory")],
)
def test_places_of_layers_are_refused(
    options: dict[str, Any], name: str, two: pytest.MonkeyPatch
) -> None:
    assert options_for_shards(RunOptions()).offload == "disk"
    with pytest.raises(RecipeError, match=f"{name} does not go with FSDP"):
        options_for_shards(RunOptions(**options))


def test_an_adapter_is_not_written_of_shares(two: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="--save adapter compares the whole model"):
        check_save("adapter", None, "custom")


def test_layers_that_share_weights_are_refused() -> None:
    model = DenseModel(make_tiny_llama())
    model.layers[1].mlp = model.layers[0].mlp
    with pytest.raises(UnsupportedModelError, match="share weights, which FSDP cannot divide"):
        sharding._check_apart(model)


def test_a_layer_of_several_types_is_refused() -> None:
    model = DenseModel(make_tiny_llama().bfloat16())
    layer = model.layers[0]
    assert sharding._policy(layer, model, ["mlp.down_proj.weight"]).param_dtype == torch.bfloat16
    layer.mlp.up_proj.float()
    assert sharding._policy(layer, model, []).param_dtype is None
    with pytest.raises(UnsupportedModelError, match=r"bfloat16 and torch.float32, but FSDP brings"):
        sharding._policy(layer, model, ["mlp.down_proj.weight"])


# A single process


def test_one_process_does_as_it_does_without(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert launchers.asks_for_shards()
    assert parallel.shards() == 1
    check_sharding(None, None)
    assert options_for_shards(RunOptions(offload="cpu")).offload == "cpu"
    healed = sharded.healed_of(folder, {"tokens": "400"})
    assert healed.outcome.steps


def test_windows_that_fill_a_share_count_nothing() -> None:
    ids, positions = torch.arange(6).view(2, 3), torch.tensor([[0, 1], [1, 0]])
    lesson = Lesson(ids, positions, torch.randn(2, 3, 4), None)
    assert lesson.filled(2) is lesson
    filled = lesson.filled(3)
    assert torch.equal(filled.input_ids, ids[[0, 1, 0]])
    assert filled.weights is not None
    assert filled.weights.tolist() == [[1, 1], [1, 1], [0, 0]]


def test_alone_a_pass_in_step_keeps_as_others_do(tmp_path: Path) -> None:
    kept = journal.Journal(tmp_path, 0.0, "r")
    sums = {"a": torch.tensor([1.0])}
    record = kept.next_pass("training", in_step=True)
    record.note(3, sums)
    record.end(4, {"a": torch.tensor([2.0])})
    again = journal.Journal(tmp_path, 0.0, "r").next_pass("training", in_step=True)
    again.restore(sums)
    assert again.done == 4
    assert float(sums["a"]) == 2.0
    assert [path.name for path in tmp_path.iterdir()] == [again.share.name]


@pytest.mark.slow
def test_accelerates_own_launcher(tmp_path: Path, folder: Path) -> None:
    """As people start it."""
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    how = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    asked = ["--use_fsdp", "--fsdp_version", "2", "-m", "ghostlayers"]
    given = heal_command(folder, tmp_path / "out", "--keep-worse")
    done = subprocess.run(
        [sys.executable, *launcher, *how, *asked, *given],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        text=True, capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved:") == 1
