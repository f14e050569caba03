"""Comparisons on a small trained model: cells against models built one by one, and resuming."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import ghostlayers
from families import build
from ghostlayers import study
from ghostlayers.calibration.cuts import unrepaired
from ghostlayers.calibration.passes import Runner
from ghostlayers.cli.compare import show
from ghostlayers.compare import Comparison, compare, engine, writing
from ghostlayers.compare.choices import expected_jobs
from ghostlayers.compare.correlate import spearman
from ghostlayers.compare.experiment import short_names
from ghostlayers.compare.files import write_report
from ghostlayers.compare.store import REPORT, Store, write_report_file
from ghostlayers.errors import InputError, OutputError, RecipeError, WindowError
from ghostlayers.evaluation import evaluate_tasks, open_tasks, tokens_to_answer
from ghostlayers.pipeline import continue_texts, evaluate
from ghostlayers.recipe import Recipe
from ghostlayers.repairs import ALL
from ghostlayers.spans import format_layers, removed_layers
from ghostlayers.surgery import removal
from task_texts import questions, write_task

CALIBRATION = {
    "windows": 16,
    "fit_windows": 16,
    "held_out_windows": 2,
    "sequence_length": 64,
}
REPAIRS = (
    "none",
    "magnitude",
    "linearpatch-diag",
    "refit:2",
    "ghost",
    "joint:x+o+z",
    "piecewise:2",
)


def request(**changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "layers": [1, 3],
        "select": ["streamline", "shortgpt"],
        "repair": REPAIRS,
        "max_windows": 3,
        "prompt": "abc",
        "continuations": 0,
        "new_tokens": 4,
        "eval_data": [],
        "tasks": [],
        **CALIBRATION,
        **changes,
    }
    return Comparison.from_dict(values)


@pytest.fixture(scope="module")
def texts(some_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files of held-out text."""
    folder = tmp_path_factory.mktemp("texts")
    paths = []
    for name, part in (("one.jsonl", some_text[-6:-3]), ("two.jsonl", some_text[-3:])):
        path = folder / name
        path.write_text("".join(json.dumps({"text": each}) + "\n" for each in part))
        paths.append(str(path))
    return paths


def run(
    model: Any, tokenizer: Any, text: list[str], texts: list[str], out: Path, **more: Any
) -> Any:
    changes = {key: more.pop(key) for key in list(more) if key not in {"overwrite", "say"}}
    asked = request(eval_data=texts, **changes)
    return compare(model, asked, out, tokenizer=tokenizer, data=text[:-6], **more)


@pytest.fixture(scope="module")
def results(
    trained_llama: Any,
    byte_tokenizer: Any,
    some_text: list[str],
    texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    out = tmp_path_factory.mktemp("compare") / "out"
    found = run(trained_llama, byte_tokenizer, some_text, texts, out)
    return found, out


def test_there_is_one_cell_for_every_combination_and_corpus(results: Any) -> None:
    found, _ = results
    names = [(c["layers"], c["select"], c["repair"], c["corpus"]) for c in found["cells"]]
    assert len(set(names)) == len(names)
    for corpus in ("one.jsonl", "two.jsonl"):
        assert (0, "", "dense", corpus) in names
        for layers in (1, 3):
            for select in ("streamline", "shortgpt"):
                for repair in REPAIRS:
                    assert (layers, select, repair, corpus) in names
                assert (2, select, "ghost", corpus) in names  # the yardstick
    keys = {"layers", "select", "repair", "removed", "corpus", "num_tokens", "loss_nats", "kl_nats"}
    assert all(keys <= set(each) for each in found["cells"])
    assert all(each["num_tokens"] == 3 * 63 for each in found["cells"])


@pytest.mark.slow
def test_cells_are_those_of_models_pruned_one_by_one(
    results: Any, trained_llama: Any, byte_tokenizer: Any, some_text: list[str], texts: list[str]
) -> None:
    found, _ = results
    for repair in ("none", "linearpatch-diag", "ghost", "refit:2", "piecewise:2"):
        pruned = ghostlayers.prune(
            trained_llama,
            Recipe(layers=3, select="streamline", repair=repair, **CALIBRATION),
            tokenizer=byte_tokenizer,
            data=some_text[:-6],
        )
        want = evaluate(
            pruned.model,
            data=texts,
            tokenizer=byte_tokenizer,
            against=trained_llama,
            sequence_length=64,
            max_windows=3,
        )
        for one in want:
            (cell,) = [
                each
                for each in found["cells"]
                if (each["layers"], each["select"], each["repair"]) == (3, "streamline", repair)
                and each["corpus"] == Path(one.corpus).name
            ]
            assert cell["loss_nats"] == pytest.approx(one.sums.loss_nats, rel=1e-5)
            assert cell["kl_nats"] == pytest.approx(one.sums.kl_nats, rel=1e-3)


def test_models_tell_size_speed_and_form(results: Any) -> None:
    found, _ = results
    kinds = {each["repair"]: each["checkpoint"] for each in found["models"]}
    assert kinds["refit:2"] == kinds["none"] == kinds["magnitude"] == "stock"
    assert kinds["ghost"] == kinds["piecewise:2"] == "custom"
    assert kinds["joint:x+o+z"] == "not savable"
    dense = next(each for each in found["models"] if each["repair"] == "dense")
    for each in found["models"]:
        assert each["prefill_ms"] > 0
        assert isinstance(each["continuation"], str)
        if each["repair"] != "dense":
            removed = each["layers"]
            assert each["kv_bytes_per_token"] == dense["kv_bytes_per_token"] * (8 - removed) // 8
            assert each["num_parameters"] < dense["num_parameters"]
            assert each["boundary_residual"]
    shares = [each for each in found["operators"] if each["repair"] == "ghost"]
    for each in shares:
        squares = each["symmetric_share"] ** 2 + each["antisymmetric_share"] ** 2
        assert squares == pytest.approx(1.0)
        assert each["singular_values"] == sorted(each["singular_values"], reverse=True)


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_where_it_stopped(
    results: Any,
    trained_llama: Any,
    byte_tokenizer: Any,
    some_text: list[str],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = results
    real, count = engine.cut_part, 0

    def stops(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(engine, "cut_part", stops)
    with pytest.raises(KeyboardInterrupt):
        run(trained_llama, byte_tokenizer, some_text, texts, tmp_path / "out")
    fitted: list[int] = []
    many = study.fit_many
    monkeypatch.setattr(engine, "cut_part", real)
    monkeypatch.setattr(study, "fit_many", lambda *a, **k: fitted.append(1) or many(*a, **k))
    again = run(trained_llama, byte_tokenizer, some_text, texts, tmp_path / "out")
    cuts = len({each["removed"] for each in whole["cells"]} - {"none"})
    assert len(fitted) == cuts - 2
    assert again["cells"] == whole["cells"]
    assert json.loads((tmp_path / "out" / "request.json").read_text())["request"]["layers"] == [
        1,
        3,
    ]


def test_another_comparisons_folder_is_refused(
    results: Any, trained_llama: Any, byte_tokenizer: Any, some_text: list[str], texts: list[str]
) -> None:
    _, out = results
    arguments = (trained_llama, byte_tokenizer, some_text, texts)
    with pytest.raises(OutputError, match=r"another comparison \(it differs in request.layers"):
        run(*arguments, out, layers=[2])
    foreign = out.parent / "foreign"
    foreign.mkdir()
    (foreign / "precious").write_text("")
    with pytest.raises(OutputError, match="was not made by a comparison"):
        run(*arguments, foreign)
    assert (foreign / "precious").exists()


@pytest.mark.slow
def test_what_a_model_lacks_is_skipped_for_all_and_refused_by_name(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], texts: list[str], tmp_path: Path
) -> None:
    from families import build

    gemma = build("gemma3_text", vocab_size=256, num_hidden_layers=5)
    arguments = (gemma, byte_tokenizer, some_text, texts)
    small = {"layers": [1], "select": ["streamline"], "yardstick": False, "max_windows": 1}
    found = run(*arguments, tmp_path / "all", repair=["all"], **small)
    skipped = {each["repair"] for each in found["skipped"]}
    assert skipped == {
        name for name in ALL if any(f in name for f in ("replaceme", "+m", "z")) or "refit=" in name
    }
    assert {each["repair"] for each in found["models"]} == {"dense", *ALL} - skipped
    written = {path.name: path.read_text() for path in write_report(found, tmp_path)}
    assert "replaceme, every cut" in written["report.html"]
    with pytest.raises(InputError, match=r"'joint:x\+z' reads z .* Use ghost"):
        run(*arguments, tmp_path / "named", repair=["ghost", "joint:x+z"], **small)
    assert not (tmp_path / "named").exists()


@pytest.mark.slow
def test_a_repair_with_more_unknowns_than_tokens_is_not_begun(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], texts: list[str], tmp_path: Path
) -> None:
    arguments = (trained_llama, byte_tokenizer, some_text, texts)
    hidden, inner = trained_llama.config.hidden_size, trained_llama.config.intermediate_size
    few = {
        "layers": [1], "select": ["streamline"], "yardstick": False, "max_windows": 1,
        "windows": 1, "fit_windows": 1, "sequence_length": 128,
    }  # fmt: skip
    found = run(*arguments, tmp_path / "all", repair=["all"], **few)
    skipped = {each["repair"]: each["reason"] for each in found["skipped"]}
    assert "joint:x+z" in skipped
    assert "ghost" not in skipped
    assert f"solves for {hidden + inner} unknowns a channel" in skipped["joint:x+z"]
    with pytest.raises(WindowError, match=r"hold 128 tokens; repair 'joint:x\+z'"):
        run(*arguments, tmp_path / "named", repair=["joint:x+z"], **few)
    assert not (tmp_path / "named").exists()


@pytest.mark.slow
def test_a_selection_may_be_iterated(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], texts: list[str], tmp_path: Path
) -> None:
    found = run(
        trained_llama, byte_tokenizer, some_text, texts, tmp_path / "out",
        layers=[3], select=["shortgpt", "shortgpt:iterative"], repair=["ghost"],
        yardstick=False, max_windows=1, speed=False, prompt="",
    )  # fmt: skip
    for select, iterative in (("shortgpt", False), ("shortgpt:iterative", True)):
        recipe = Recipe(
            layers=3, select="shortgpt", repair="ghost", iterative=iterative, **CALIBRATION
        )
        pruned = ghostlayers.prune(
            trained_llama, recipe, tokenizer=byte_tokenizer, data=some_text[:-6]
        )
        (removed,) = {each["removed"] for each in found["models"] if each["select"] == select}
        assert removed == format_layers(pruned.record["cut"]["removed"])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("a/x.txt", "b/y.txt"), ("x.txt", "y.txt")),
        (("a/x.txt", "b/x.txt"), ("a/x.txt", "b/x.txt")),
        (("a/c/x.txt", "b/c/x.txt", "y.txt"), ("a/c/x.txt", "b/c/x.txt", "y.txt")),
        (("wikitext2", "c4"), ("wikitext2", "c4")),
    ],
)
def test_corpora_of_one_name_are_told_apart(paths: tuple[str, ...], names: tuple[str, ...]) -> None:
    assert tuple(short_names(paths).values()) == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": ["lorp:iterative"]}, "'lorp' cannot be combined with 'iterative'"),
        ({"layers": []}, "at least one number of layers"),
        ({"layers": [0]}, "each at least 1"),
        ({"repair": ["gost"]}, "Did you mean 'ghost'"),
        ({"select": ["streamlin"]}, "Did you mean 'streamline'"),
        ({"eval_data": []}, "nothing to evaluate on"),
        ({"eval_separators": [" ", "\n", "x"]}, "3 separators for 2 corpora"),
        ({"limit": 3}, "'limit' mean nothing without 'tasks'"),
        ({"tasks": ["a"], "limit": 0}, "'limit' must be at least 1, got 0"),
        ({"tasks": ["a"], "task_repair": ["normed"]}, "'normed', which is not among the repairs"),
        ({"heal": "soon"}, "is no budget"),
        ({"heal_repair": ["ghost"]}, "nothing without 'heal'"),
        ({"heal": "2min", "heal_repair": ["normed"]}, "'normed', which is not among"),
        ({"max_windows": 0}, "'max_windows' must be at least 1, got 0"),
        ({"new_tokens": 0}, "'new_tokens' must be at least 1, got 0"),
        ({"held_out_windows": 0}, "'held_out_windows' must be at least 1"),
        ({"layer": [3]}, "unknown key 'layer' in a comparison. Did you mean 'layers'"),
    ],
)
def test_requests_that_mean_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        request(**{"eval_data": ["a", "b"], **changes})


def test_distances_behind_a_cut_are_those_of_hooked_models(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    from ghostlayers.calibration.distances import stream_distances
    from ghostlayers.calibration.fits import Fitting
    from ghostlayers.calibration.fitting import fit_gaps
    from ghostlayers.model.dense import DenseModel
    from ghostlayers.repairs import find_method
    from ghostlayers.spans import Span
    from ghostlayers.text.tokens import make_windows

    corpus = ghostlayers.text.corpora.Corpus("text", tuple(some_text))
    windows = make_windows(corpus, byte_tokenizer, sequence_length=64, count=20, seed=0)
    layerwise, span = DenseModel(trained_llama), Span(2, 4)
    fits = fit_gaps(Runner(layerwise), windows, [span], Fitting(find_method("ghost")))
    got = stream_distances(Runner(layerwise), windows.first(2), {"ghost": fits})["ghost"]
    assert sorted(got) == [4, 5, 6, 7, 8]

    def streams(model: Any) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        keep = lambda _, args: seen.append(args[0].double())  # noqa: E731
        handles = [each.register_forward_pre_hook(keep) for each in model.model.layers]
        handles.append(model.model.norm.register_forward_pre_hook(keep))
        with torch.no_grad():
            logits = model(input_ids=windows.input_ids[:2], use_cache=False).logits
        assert float(cross_entropy(logits[0, :-1], windows.input_ids[0, 1:])) > 0
        for handle in handles:
            handle.remove()
        return seen

    dense, cut = (
        streams(trained_llama),
        streams(removal.prune_layers(DenseModel(trained_llama), [span], fits)),
    )
    for boundary, value in got.items():
        want, far = dense[boundary], cut[boundary - 2] - dense[boundary]
        ratio = far.square().sum(-1) / want.square().sum(-1)
        assert value == pytest.approx(float(ratio.mean()), rel=1e-4)


def test_gates_behind_a_cut_are_those_of_hooked_models(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str]
) -> None:
    from ghostlayers.calibration.fits import Fitting
    from ghostlayers.calibration.fitting import fit_gaps
    from ghostlayers.calibration.gates import gate_shifts
    from ghostlayers.model.dense import DenseModel
    from ghostlayers.repairs import find_method
    from ghostlayers.spans import Span
    from ghostlayers.text.tokens import make_windows

    corpus = ghostlayers.text.corpora.Corpus("text", tuple(some_text))
    windows = make_windows(corpus, byte_tokenizer, sequence_length=64, count=20, seed=0)
    layerwise, span = DenseModel(trained_llama), Span(2, 4)
    fits = fit_gaps(Runner(layerwise), windows, [span], Fitting(find_method("ghost")))
    asked = {"ghost": fits, "none": unrepaired([span])}
    got = gate_shifts(Runner(layerwise), windows.first(2), asked)

    def activations(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every layer, g and act(g) u, by the weights themselves."""
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def note(mlp: Any, args: Any) -> None:
            gate, up = mlp.gate_proj(args[0]), mlp.up_proj(args[0])
            written = torch.nn.functional.silu(gate) * up
            seen.append((gate.flatten(0, 1).double(), written.flatten(0, 1).double()))

        handles = [each.mlp.register_forward_pre_hook(note) for each in model.model.layers]
        with torch.no_grad():
            model(input_ids=windows.input_ids[:2], use_cache=False)
        for handle in handles:
            handle.remove()
        return seen

    def dead(written: torch.Tensor) -> float:
        return sum(
            float((row.abs() < 0.01 * row.square().mean().sqrt()).double().mean())
            for row in written
        ) / len(written)

    dense = activations(trained_llama)
    for name, repairs in asked.items():
        cut = activations(removal.prune_layers(DenseModel(trained_llama), [span], repairs))
        assert [shift.layer for shift in got[name]] == [4, 5, 6, 7]
        for shift in got[name]:
            (want, wrote), (found, writes) = dense[shift.layer], cut[shift.layer - 2]
            units = (found.mean(0) - want.mean(0)) / want.std(0, correction=0)
            assert shift.mean_shift == pytest.approx(float(units.square().mean().sqrt()), rel=1e-3)
            spreads = [each.var(0, correction=0).sum().sqrt() for each in (found, want)]
            assert shift.spread == pytest.approx(float(spreads[0] / spreads[1]), rel=1e-3)
            assert shift.dead == pytest.approx(dead(writes), abs=2e-3)
            assert shift.dense_dead == pytest.approx(dead(wrote), abs=1e-9)
    assert got["ghost"] != got["none"]


@pytest.mark.parametrize(
    ("name", "known"),
    [("llama", True), ("gemma3_text", True), ("gpt2", True), ("phi3", True), ("mixtral", False)],
)
def test_gates_are_known_in_families_with_one_mlp(name: str, known: bool) -> None:
    from ghostlayers.calibration.gates import gate_shifts
    from ghostlayers.model.dense import DenseModel
    from ghostlayers.spans import Span
    from ghostlayers.text.tokens import Windows

    ids = torch.arange(40).view(2, 20) + 3
    runner, cut = Runner(DenseModel(build(name))), {"none": unrepaired([Span(1, 2)])}
    (shifts,) = gate_shifts(runner, Windows(ids, False, 2, ()), cut).values()
    assert [shift.layer for shift in shifts] == ([2, 3, 4] if known else [])


def test_spearman_is_the_correlation_of_ranks() -> None:
    assert spearman([1, 2, 3, 10], [5, 6, 7, 8]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 0 1.5 1.5 3 against 0 1 2 3, by hand.
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) != spearman([1, 1, 1], [1, 2, 3])  # NaN


@pytest.mark.slow
def test_every_span_is_measured_and_ranked(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], texts: list[str], tmp_path: Path
) -> None:
    found = run(
        trained_llama, byte_tokenizer, some_text, texts, tmp_path / "out",
        layers=[3], select=["recoverable", "every"], repair=["none", "ghost"], yardstick=False,
        prompt="", speed=False,
    )  # fmt: skip
    spans = {each["select"] for each in found["cells"]} - {"", "recoverable"}
    assert spans == {f"every:{start}-{start + 2}" for start in range(6)}
    told = {(each["repair"], each["score"]) for each in found["correlations"]}
    assert told == {(r, s) for r in ("none", "ghost") for s in ("cosine", "residual")}
    assert all(-1 <= each["spearman"] <= 1 for each in found["correlations"])


def test_a_plan_counts_the_tokens_of_tasks(byte_tokenizer: Any, tmp_path: Path) -> None:
    write_task(tmp_path, "nouns", questions(), "acc", "acc_norm")
    tasks = open_tasks(["nouns"], tasks_path=tmp_path)
    asked = tasks.tasks["nouns"]
    asked.build_all_requests(limit=None, rank=0, world_size=1)
    exact = sum(len(byte_tokenizer("".join(each.args))["input_ids"]) for each in asked.instances)
    before = torch.get_rng_state(), random.getstate()
    assert tokens_to_answer(tasks, byte_tokenizer, None) == pytest.approx(exact, rel=0.2)
    part = tokens_to_answer(tasks, byte_tokenizer, 4)
    assert part == pytest.approx(exact * 4 / len(asked.eval_docs), rel=0.2)
    assert random.getstate() == before[1]


def test_an_overwritten_comparison_loses_its_report_at_once(tmp_path: Path) -> None:
    first = Store(tmp_path / "out", {"a": 1})
    first.put("x", {"y": 2})
    for name in REPORT:
        write_report_file(tmp_path / "out" / name, "old")
    with pytest.raises(OutputError, match="holds another comparison"):
        Store(tmp_path / "out", {"a": 2})
    assert (tmp_path / "out" / "results.json").is_file()
    again = Store(tmp_path / "out", {"a": 2}, overwrite=True)
    assert again.get("x") is None
    assert not any((tmp_path / "out" / name).exists() for name in REPORT)


@pytest.mark.parametrize("name", REPORT)
def test_a_report_that_was_changed_is_not_overwritten(tmp_path: Path, name: str) -> None:
    Store(tmp_path / "out", {"a": 1}).put("x", {"y": 2})
    write_report_file(tmp_path / "out" / name, "ours")
    Store(tmp_path / "out", {"a": 1})
    (tmp_path / "out" / name).write_text("annotated")
    for request in (1, 2):
        with pytest.raises(OutputError, match="was changed"):
            Store(tmp_path / "out", {"a": request}, overwrite=True)
    assert (tmp_path / "out" / name).read_text() == "annotated"


@pytest.mark.parametrize("stranger", ["notes.txt", "0123456789abcdef.json", "more/notes.txt"])
def test_parts_of_others_are_not_overwritten(tmp_path: Path, stranger: str) -> None:
    folder = tmp_path / "out"
    file = folder / "parts" / stranger
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    (folder / "request.json").write_text("{}")
    with pytest.raises(OutputError, match="what no comparison wrote"):
        Store(folder, {"a": 1}, overwrite=True)
    assert file.read_text() == "{}"


def test_nothing_is_overwritten_through_a_link(tmp_path: Path) -> None:
    Store(tmp_path / "out", {"a": 1}).put("x", {"y": 2})
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(OutputError, match="is a link"):
        Store(tmp_path / "link", {"a": 2}, overwrite=True)
    (tmp_path / "out" / "parts").rename(tmp_path / "parts")
    (tmp_path / "out" / "parts").symlink_to(tmp_path / "parts")
    with pytest.raises(OutputError, match="is a link"):
        Store(tmp_path / "out", {"a": 1})
    assert len(list((tmp_path / "parts").iterdir())) == 1


def test_notes_beside_a_comparison_stay(tmp_path: Path) -> None:
    Store(tmp_path / "out", {"a": 1}).put("x", {"y": 2})
    (tmp_path / "out" / "notes.txt").write_text("years of work")
    assert Store(tmp_path / "out", {"a": 2}, overwrite=True).get("x") is None
    assert (tmp_path / "out" / "notes.txt").read_text() == "years of work"


@pytest.mark.slow
def test_tasks_are_answered_by_the_models_that_are_asked(
    trained_llama: Any,
    byte_tokenizer: Any,
    some_text: list[str],
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_task(tmp_path, "nouns", questions(), "acc", "acc_norm")
    write_task(tmp_path, "plain", questions()[:9], "acc")
    found = run(
        trained_llama, byte_tokenizer, some_text, texts, tmp_path / "out",
        layers=[3], select=["streamline"], repair=["none", "magnitude", "ghost"], yardstick=False,
        prompt="", speed=False, tasks=["nouns", "plain"], tasks_path=str(tmp_path), limit=8,
        task_repair=["none", "ghost"],
    )  # fmt: skip
    show(found)
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Mean of nouns, plain", shown)
    assert "minus Ghost's" in shown
    assert all(re.search(rf"│ {name}\b[^│]*│ +\d+\.\d% │", shown) for name in ("dense", "ghost"))
    assert re.search(r"│ none\b[^│]*│ +\d+\.\d% │ +[+-]\d[^│]*│[^│]*│ +(≈|better|worse)", shown)
    rows = {(each["repair"], each["task"]): each for each in found["tasks"]}
    assert set(rows) == {(r, t) for r in ("dense", "none", "ghost") for t in ("nouns", "plain")}
    pruned = ghostlayers.prune(
        trained_llama,
        Recipe(layers=3, select="streamline", **CALIBRATION),
        tokenizer=byte_tokenizer,
        data=some_text[:-6],
    )
    want = evaluate_tasks(
        pruned.model, byte_tokenizer, ["nouns", "plain"], tasks_path=tmp_path, limit=8
    )
    for each in want:
        row = rows["ghost", each.task]
        assert row["acc"] == pytest.approx(each.acc.mean)
        assert row["acc_stderr"] == pytest.approx(each.acc.error)
        assert row["num_documents"] == 8
    told = [
        (each["a"]["repair"], each["b"]["repair"], each["metric"]) for each in found["comparisons"]
    ]
    assert told == [("none", "ghost", "acc"), ("none", "ghost", "acc_norm")]
    mean = {r: (rows[r, "nouns"]["acc"] + rows[r, "plain"]["acc"]) / 2 for r in ("none", "ghost")}
    assert found["comparisons"][0]["difference"] == pytest.approx(mean["none"] - mean["ghost"])


def test_every_span_is_a_cut_of_its_own_in_the_plan() -> None:
    def jobs_of(**changes: Any) -> Any:
        wanted = request(
            layers=[3], select=["streamline", "every"], repair=["none", "ghost"],
            eval_data=["a"], **changes,
        )  # fmt: skip
        return expected_jobs(wanted, 6, ("none", "ghost"))

    jobs = jobs_of()
    assert [repairs for _, repairs in jobs] == [*[("none", "ghost")] * 5, ("ghost",)]
    assert [format_layers(removed_layers(spans)) for spans, _ in jobs[1:5]] == [
        "0-2", "1-3", "2-4", "3-5"
    ]  # fmt: skip
    inside = jobs_of(keep_layers="first:1,last:1", yardstick=False)
    assert [format_layers(removed_layers(spans)) for spans, _ in inside[1:]] == ["1-3", "2-4"]


def test_a_plan_counts_the_sums_of_every_stage(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], texts: list[str], tmp_path: Path
) -> None:
    def fitting_flops(*repairs: str) -> float:
        plans = []
        one_cut = {"layers": [2], "select": ["streamline"], "yardstick": False}
        asked = request(eval_data=texts, repair=list(repairs), **one_cut)
        compare(
            trained_llama, asked, tmp_path / "out", tokenizer=byte_tokenizer,
            data=some_text[:-6], show_plan=lambda plan: plans.append(plan) or False,
        )  # fmt: skip
        (found,) = [s.flops for s in plans[0].lines if s.name == "Fitting the repairs"]
        return float(found)

    one = fitting_flops("refit:1")
    shared = fitting_flops("refit:1", "replaceme") - one
    staged = fitting_flops("refit:1", "refit:3") - one
    assert shared < 0.2 * one  # one sweep is enough for both
    assert staged > one  # three fits, each with sums of its own


WRITES = {"layers": [3], "select": ["streamline"], "repair": ["none", "ghost"], "yardstick": False}


@pytest.mark.slow
def test_models_write_what_they_write_when_pruned_one_by_one(
    trained_llama: Any,
    byte_tokenizer: Any,
    some_text: list[str],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, asked = tmp_path / "out", {**WRITES, "continuations": 3}
    found = run(trained_llama, byte_tokenizer, some_text, texts, out, **asked)
    assert len(found["prefixes"]) == 3
    rows = {(row["repair"], row["manner"]): row for row in found["writing"]}
    assert list(rows) == [
        (repair, manner)
        for repair in ("dense", "none", "ghost")
        for manner in ("greedy", "sampled")
    ]
    for repair in ("none", "ghost"):
        pruned = ghostlayers.prune(
            trained_llama,
            Recipe(layers=3, select="streamline", repair=repair, **CALIBRATION),
            tokenizer=byte_tokenizer,
            data=some_text[:-6],
        )
        how = {"tokenizer": byte_tokenizer, "against": trained_llama}
        read = evaluate(pruned.model, data=texts, sequence_length=64, max_windows=3, **how)
        report = continue_texts(pruned.model, read, continuations=3, **how)
        assert list(report.prefixes) == found["prefixes"]
        for whose, figures in ((repair, report.figures), ("dense", report.dense)):
            for each in figures:
                want, row = each.to_dict(), rows[whose, each.manner]
                loss = pytest.approx(want.pop("dense_loss_nats"), rel=1e-4)
                assert {key: row[key] for key in want} == want
                assert row["dense_loss_nats"] == loss
    assert rows["dense", "greedy"]["agreement_tokens"] == 64
    assert rows["none", "greedy"]["agreement_tokens"] < 64

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was written already")

    monkeypatch.setattr(writing, "continuations", never)
    for path in (out / "parts").iterdir():  # a cut that was killed behind its writing
        if json.loads(path.read_text())["key"].startswith("cut"):
            path.unlink()
    again = run(trained_llama, byte_tokenizer, some_text, texts, out, **asked)
    assert again["writing"] == found["writing"]


@pytest.mark.parametrize("presets", [(), ("streamline",)])
def test_a_plan_counts_what_is_written(
    trained_llama: Any,
    byte_tokenizer: Any,
    some_text: list[str],
    texts: list[str],
    tmp_path: Path,
    presets: tuple[str, ...],
) -> None:
    def flops(continuations: int) -> float:
        plans: list[Any] = []
        choices = {"layers": [3], "presets": ["llm-streamline"]} if presets else WRITES
        asked = {"eval_data": texts, **CALIBRATION, **choices, "continuations": continuations}
        compare(
            trained_llama,
            Comparison.from_dict(asked),
            tmp_path / "out",
            tokenizer=byte_tokenizer,
            data=some_text[:-6],
            show_plan=lambda plan: plans.append(plan) or False,
        )
        return float(plans[0].flops)

    without, some, more = map(flops, (0, 1, 17))  # 17 prefixes; behind three of them ten texts
    assert (more - without) / (some - without) == pytest.approx((17 + 30) / 11, rel=1e-6)


@pytest.mark.slow
def test_every_span_alone_and_a_cut_that_no_repair_fits(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], texts: list[str], tmp_path: Path
) -> None:
    """Nothing folds in front of the first layer, so that cut has no model."""
    found = run(
        trained_llama, byte_tokenizer, some_text, texts, tmp_path / "out",
        layers=[1], select=["every"], repair=["refit:1"], yardstick=False, max_windows=1,
    )  # fmt: skip
    cuts = {each["removed"] for each in found["models"] if each["repair"] == "refit:1"}
    depth = trained_llama.config.num_hidden_layers
    assert cuts == {str(index) for index in range(1, depth)}
    assert [each["select"] for each in found["skipped"]] == ["every:0"]
    write_report(found, tmp_path)


def test_no_file_of_a_comparison_says_where_the_texts_lie(results: Any, texts: list[str]) -> None:
    _, out = results
    written = [path for path in out.rglob("*") if path.is_file()]
    assert any(path.parent.name == "parts" for path in written)
    folder = str(Path(texts[0]).parent)
    assert not [path.name for path in written if folder in path.read_text(errors="replace")]


@pytest.mark.slow
def test_healed_models_stand_beside_closed_forms(
    trained_llama: Any,
    byte_tokenizer: Any,
    some_text: list[str],
    texts: list[str],
    tmp_path: Path,
) -> None:
    """Rows of trained models, as one who prunes and heals them one by one gets them."""
    out = tmp_path / "out"
    asked = {**WRITES, "continuations": 2, "heal": "2k", "heal_repair": ["ghost"]}
    found = run(trained_llama, byte_tokenizer, some_text, texts, out, **asked)
    losses = {row["repair"]: row["loss_nats"] for row in found["cells"]}
    assert list(losses) == ["dense", "none", "ghost", "ghost+heal"]
    assert losses["dense"] < losses["ghost+heal"] < losses["ghost"]
    rows = {row["repair"]: row for row in found["models"]}
    healing = rows["ghost+heal"]["healing"]
    assert healing["tokens"] >= 2000
    assert healing["trained"] == ["operator", "norms", "all"]
    assert rows["ghost"].get("healing") is None
    assert rows["ghost+heal"]["added_parameters"] == rows["ghost"]["added_parameters"]
    assert {row["repair"] for row in found["writing"]} == set(losses)
    pruned = ghostlayers.prune(
        trained_llama,
        Recipe(layers=3, select="streamline", repair="ghost", **CALIBRATION),
        tokenizer=byte_tokenizer,
        data=some_text[:-6],
    )
    healed = ghostlayers.heal(
        pruned, data=some_text[:-6], tokens="2k", sequence_length=64, separator="\n\n"
    )
    alone = evaluate(
        healed.model, data=texts, sequence_length=64, max_windows=3, tokenizer=byte_tokenizer
    )
    cells = [row["loss_nats"] for row in found["cells"] if row["repair"] == "ghost+heal"]
    assert cells == pytest.approx([each.sums.loss_nats for each in alone], rel=1e-3)
    write_report(found, out)
    assert "ghost+heal" in (out / "report.html").read_text()
    assert "2,048 tokens" in (out / "results.md").read_text()
