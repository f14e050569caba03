"""Tasks through lm-evaluation-harness, against log-likelihoods worked out by hand."""

import contextlib
import importlib.util
import json
import logging
import math
import random
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from conftest import NOUNS, make_byte_tokenizer, make_documents, make_tiny_llama
from ghostlayers import pipeline
from ghostlayers.cli import app
from ghostlayers.errors import (
    CorpusError,
    DependencyError,
    InputError,
    ModelError,
    RecipeError,
    WindowError,
)
from ghostlayers.evaluation import (
    compare_tasks,
    evaluate_tasks,
    harness,
    open_tasks,
    tokens_to_answer,
)
from ghostlayers.runtime.progress import shown_by
from task_texts import COUNT, questions, write_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files that read what lies beside them."""
    place = tmp_path_factory.mktemp("tasks")
    write_task(place, "nouns", questions(), "acc", "acc_norm")
    write_task(place, "plain", questions()[:9], "acc")
    long = [{**row, "question": "so " * 60 + row["question"]} for row in questions()[:2]]
    write_task(place, "long", long, "acc")
    write_task(place, "text", questions(), "word_perplexity", kind="loglikelihood_rolling")
    write_task(place, "lost", questions(), "acc")
    (place / "lost.jsonl").unlink()
    return place


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise OSError("a local task went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def log_likelihood(model, tokenizer, text: str, option: str) -> float:
    """Of an option, after a text and a space, token by token."""
    start = len(tokenizer(text)["input_ids"])
    ids = tokenizer(f"{text} {option}")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    log_p = logits.double().log_softmax(dim=-1)
    return sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids)))


def by_hand(model, tokenizer, rows: list[dict]) -> tuple[list[float], list[float]]:
    """Whether each question is answered right, with plain and with normalised likelihoods."""
    plain, normalised = [], []
    for row in rows:
        scores = [log_likelihood(model, tokenizer, row["question"], o) for o in row["choices"]]
        scaled = [s / len(option) for s, option in zip(scores, row["choices"], strict=True)]
        plain.append(float(scores.index(max(scores)) == row["label"]))
        normalised.append(float(scaled.index(max(scaled)) == row["label"]))
    return plain, normalised


@pytest.mark.parametrize("batch_size", [1, 8])
def test_accuracy_is_that_of_likelihoods_by_hand(folder, byte_tokenizer, batch_size) -> None:
    model = make_tiny_llama(seed=3)
    names = ["nouns", "plain"]
    first, second = evaluate_tasks(
        model, byte_tokenizer, names, tasks_path=folder, batch_size=batch_size
    )
    acc, acc_norm = by_hand(model, byte_tokenizer, questions())
    assert 0 < sum(acc) < COUNT
    assert acc != acc_norm
    assert first.acc.values == tuple(acc)
    assert first.acc_norm is not None
    assert first.acc_norm.values == tuple(acc_norm)
    assert first.acc.mean == pytest.approx(sum(acc) / COUNT)
    share = sum(acc) / COUNT
    assert first.acc.error == pytest.approx(math.sqrt(share * (1 - share) / (COUNT - 1)))
    assert (first.task, first.version, first.num_fewshot) == ("nouns", "3.0", 0)
    assert first.num_documents == first.available_documents == len(set(first.documents)) == COUNT
    assert first.num_truncated == 0
    assert second.acc.values == tuple(acc[:9])
    assert second.acc_norm is None
    assert second.documents == first.documents[:9]


def test_a_bos_token_is_put_where_the_tokenizer_puts_it(folder, bos_tokenizer) -> None:
    model = make_tiny_llama(seed=3)
    (result,) = evaluate_tasks(model, bos_tokenizer, ["nouns"], tasks_path=folder)
    assert result.acc.values == tuple(by_hand(model, bos_tokenizer, questions())[0])


def test_hooks_of_the_model_stay_in_force(folder, byte_tokenizer) -> None:
    model = make_tiny_llama(seed=3)
    before = by_hand(model, byte_tokenizer, questions())
    noise = torch.randn(32, generator=torch.Generator().manual_seed(0))
    model.model.layers[2].register_forward_hook(lambda _, __, out: out + noise)
    (result,) = evaluate_tasks(model, byte_tokenizer, ["nouns"], tasks_path=folder)
    after = by_hand(model, byte_tokenizer, questions())
    assert after != before
    assert result.acc_norm is not None
    assert (list(result.acc.values), list(result.acc_norm.values)) == after


def test_a_limit_takes_the_first_documents(folder, byte_tokenizer) -> None:
    model = make_tiny_llama()
    (every,) = evaluate_tasks(model, byte_tokenizer, ["nouns"], tasks_path=folder)
    (some,) = evaluate_tasks(model, byte_tokenizer, ["nouns"], tasks_path=folder, limit=4)
    (one,) = evaluate_tasks(model, byte_tokenizer, ["nouns"], tasks_path=folder, limit=1)
    assert (some.num_documents, some.available_documents) == (4, COUNT)
    assert some.documents == every.documents[:4]
    assert some.acc.values == every.acc.values[:4]
    assert math.isnan(one.acc.error)
    assert one.to_dict()["acc_error"] is None
    json.dumps(one.to_dict(), allow_nan=False)


def test_prompts_longer_than_the_model_are_counted(folder, byte_tokenizer) -> None:
    (result,) = evaluate_tasks(make_tiny_llama(), byte_tokenizer, ["long"], tasks_path=folder)
    assert result.num_truncated == 6  # two questions of three options


def test_nothing_global_changes_and_nothing_is_printed(folder, byte_tokenizer, capfd) -> None:
    tokenizer = make_byte_tokenizer(bos=False)
    logging.getLogger("lm_eval").setLevel(logging.INFO)
    random.seed(5)
    model, state = make_tiny_llama(), random.getstate()
    evaluate_tasks(model, tokenizer, ["nouns"], tasks_path=folder)
    assert tokenizer.pad_token is None
    assert random.getstate() == state
    assert logging.getLogger("lm_eval").level == logging.INFO
    logging.getLogger("lm_eval").setLevel(logging.NOTSET)
    assert capfd.readouterr() == ("", "")


class Watcher:
    def __init__(self) -> None:
        self.stages: list[list] = []

    @contextlib.contextmanager
    def stage(self, description, total):
        self.stages.append([description, total, 0])
        print("a bar", file=sys.stderr)

        def advance(units=1):
            self.stages[-1][2] += units

        yield advance


def test_progress_counts_every_option_and_is_seen(folder, byte_tokenizer, capfd) -> None:
    watcher = Watcher()
    names = ["plain", "nouns"]
    with shown_by(watcher):
        evaluate_tasks(make_tiny_llama(), byte_tokenizer, names, tasks_path=folder, limit=5)
    assert watcher.stages == [["Answering plain, nouns", 30, 30]]
    assert capfd.readouterr() == ("", "a bar\n")


def test_tasks_that_were_opened_run_on_several_models(folder, byte_tokenizer) -> None:
    tasks = open_tasks(["nouns"], tasks_path=folder)
    models = [make_tiny_llama(seed=seed) for seed in (3, 4)]
    results = [evaluate_tasks(model, byte_tokenizer, tasks)[0] for model in models]
    for model, result in zip(models, results, strict=True):
        assert result.acc.values == tuple(by_hand(model, byte_tokenizer, questions())[0])
    assert results[0].documents == results[1].documents


def test_two_models_are_compared_pair_by_pair(folder, byte_tokenizer) -> None:
    ours, theirs = make_tiny_llama(seed=3), make_tiny_llama(seed=4)
    report = pipeline.evaluate_on_tasks(
        ours, ["nouns", "plain"], against=theirs, tasks_path=folder, tokenizer=byte_tokenizer
    )
    seen = [(comparison.tasks, comparison.metric) for comparison in report.comparisons]
    both = ("nouns", "plain")
    assert seen == [
        (("nouns",), "acc"),
        (("nouns",), "acc_norm"),
        (("plain",), "acc"),
        (both, "acc"),
        (both, "acc_norm"),
    ]
    nouns, plain = report.results
    mean = report.comparisons[-1]
    assert nouns.acc_norm is not None
    assert mean.mean == pytest.approx((nouns.acc_norm.mean + plain.acc.mean) / 2)
    assert mean.paired.difference == pytest.approx(mean.mean - mean.against)
    assert mean.paired.num_documents == COUNT + 9
    assert json.loads(json.dumps(report.to_dict()))["comparisons"][0]["tasks"] == ["nouns"]


DOCS = Path(__file__).parents[1] / "docs" / "how-to" / "evaluate.md"


def write_documented(folder: Path, name: str, rows: list[dict], **changes: str) -> None:
    """A task file as the documentation has it, and the local files that it names."""
    (text,) = re.findall(rf"```yaml\n# tasks/{name}\.yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    for before, after in {
        "{data_files:": f'{{cache_dir: "{folder}", data_files:',
        **changes,
    }.items():
        assert before in text
        text = text.replace(before, after)
    (folder / f"{name}.yaml").write_text(text)
    for file in re.findall(r"\w+\.jsonl", text):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_word_to_guess_is_read_from_a_local_file(
    tmp_path, trained_llama, byte_tokenizer, monkeypatch
) -> None:
    """As LAMBADA has it: right if each token of the last word is the likeliest."""
    sentences = [text.split(". ")[1] + "." for text in make_documents(9, seed=3)]
    texts = [  # which noun comes first, nobody can know
        " ".join(sentence.split()[: 2 if place % 2 else 99])
        for place, sentence in enumerate(sentences)
    ]
    write_documented(tmp_path, "lambada", [{"text": text} for text in texts])
    monkeypatch.chdir(tmp_path)
    (result,) = evaluate_tasks(
        trained_llama, byte_tokenizer, ["lambada_local"], tasks_path=tmp_path
    )
    right = []
    for text in texts:
        ids = byte_tokenizer(text)["input_ids"]
        start = len(byte_tokenizer(text.rpartition(" ")[0])["input_ids"])
        with torch.no_grad():
            likeliest = trained_llama(input_ids=torch.tensor([ids])).logits[0].argmax(1).tolist()
        right.append(float(likeliest[start - 1 : -1] == ids[start:]))
    assert 0 < sum(right) < len(right)
    assert result.acc.values == tuple(right)
    assert (result.measure, result.acc_norm) == ("acc", None)


def sums() -> list[dict]:
    """Questions of the small language; the answer stands behind a mark, as in GSM8K."""
    return [
        {"question": f"The {NOUNS[place]}?", "answer": f"It is so. #### {place}"}
        for place in range(5)
    ]


def write_gsm8k(folder: Path, room: int) -> None:
    changes = {"num_fewshot: 5": "num_fewshot: 1", "max_gen_toks: 256": f"max_gen_toks: {room}"}
    write_documented(folder, "gsm8k", sums(), **changes)


class Speaker:
    """Stands in for a model's writing: answers by the question's own row, some of them wrong."""

    def __init__(self, right: list[int]) -> None:
        self.right, self.prompts = right, []

    def answer(self, context, **_) -> torch.Tensor:
        tokenizer = make_byte_tokenizer(bos=False)
        texts = []
        for row in context:
            prompt = tokenizer.decode(row)
            self.prompts.append(prompt)
            place = next(
                n for n in range(5) if f"Question: The {NOUNS[n]}?\nAnswer:" in prompt[-40:]
            )
            number = place if place in self.right else 7
            texts.append(f" Well. #### {number}.\n\nQuestion: The")
        new = [tokenizer(text)["input_ids"] for text in texts]
        return torch.cat([context, torch.tensor(new)], dim=1)


def test_an_answer_to_write_is_read_from_a_local_file(
    tmp_path, byte_tokenizer, monkeypatch, capfd
) -> None:
    """As GSM8K has it: the number behind the mark, by the first of two filters."""
    write_gsm8k(tmp_path, room=20)
    with (tmp_path / "gsm8k.yaml").open("a") as file:
        file.write("  - {name: loose, filter: [{function: take_first}]}\n")
    monkeypatch.chdir(tmp_path)
    speaker, watcher = Speaker([1, 4]), Watcher()
    monkeypatch.setattr(harness.QuietModel, "_model_generate", speaker.answer)
    with shown_by(watcher):
        (result,) = evaluate_tasks(
            make_tiny_llama(), byte_tokenizer, ["gsm8k_local"], tasks_path=tmp_path
        )
    assert result.acc.values == (0.0, 1.0, 0.0, 0.0, 1.0)
    assert (result.measure, result.num_fewshot) == ("exact_match", 1)
    assert all(prompt.count("Answer:") == 2 for prompt in speaker.prompts)
    assert result.num_truncated == 0
    assert watcher.stages == [["Answering gsm8k_local", 5, 5]]
    assert capfd.readouterr() == ("", "a bar\n")
    assert result.to_dict()["acc_values"] == [0.0, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.slow
def test_a_model_writes_its_own_answers(tmp_path, byte_tokenizer, monkeypatch) -> None:
    """The tiny model says its last byte again and again: no mark, so no answer."""
    write_gsm8k(tmp_path, room=40)
    monkeypatch.chdir(tmp_path)
    tasks = open_tasks(["gsm8k_local"], tasks_path=tmp_path)
    counted = tokens_to_answer(tasks, byte_tokenizer, None)
    lengths = [len(instance.args[0]) for instance in tasks.tasks["gsm8k_local"].instances]
    assert counted == sum(lengths) + 5 * 40
    model = make_tiny_llama(max_position_embeddings=40 + min(lengths))
    (result,) = evaluate_tasks(model, byte_tokenizer, tasks)
    assert result.acc.values == (0.0,) * 5
    assert 0 < result.num_truncated == sum(length > min(lengths) for length in lengths) < 5
    (same,) = pipeline.evaluate_on_tasks(
        model, tasks, against=model, tokenizer=byte_tokenizer
    ).comparisons
    assert (same.metric, same.paired.difference) == ("acc", 0.0)


def test_more_to_write_than_a_model_has_positions_for(
    tmp_path, byte_tokenizer, monkeypatch
) -> None:
    write_gsm8k(tmp_path, room=128)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WindowError, match="'gsm8k_local' lets a model write 128 tokens"):
        evaluate_tasks(make_tiny_llama(), byte_tokenizer, ["gsm8k_local"], tasks_path=tmp_path)


def test_results_on_other_documents_are_not_compared(folder, byte_tokenizer) -> None:
    model = make_tiny_llama()
    some = evaluate_tasks(model, byte_tokenizer, ["nouns"], tasks_path=folder, limit=3)
    more = evaluate_tasks(model, byte_tokenizer, ["nouns"], tasks_path=folder, limit=4)
    with pytest.raises(InputError, match="documents of task 'nouns' differ"):
        compare_tasks(some, more)


# What cannot work


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        ([], RecipeError, "name at least one task, and each once; got: ."),
        (["nouns", "nouns"], RecipeError, "each once; got: nouns, nouns."),
        (["text"], RecipeError, "task 'text' measures word_perplexity; only tasks that measure"),
        (["lost"], CorpusError, "cannot read task 'lost': "),
    ],
)
def test_tasks_that_cannot_run_are_refused(folder, names, error, text) -> None:
    with pytest.raises(error) as caught:
        open_tasks(names, tasks_path=folder)
    assert text in str(caught.value)


def test_an_unknown_task_is_told_its_neighbours(folder, monkeypatch) -> None:
    every = harness.TaskManager  # the harness's own index takes ten seconds to build
    monkeypatch.setattr(
        harness,
        "TaskManager",
        lambda include_path, **_: every(include_path=include_path, include_defaults=False),
    )
    with pytest.raises(RecipeError) as caught:
        open_tasks(["nouns", "plane"], tasks_path=folder)
    assert str(caught.value).endswith(
        f"knows no task 'plane', nor in '{folder}'. Did you mean plain? 5 names are known."
    )


def test_a_folder_that_does_not_exist_is_refused(tmp_path) -> None:
    with pytest.raises(CorpusError, match="there is no folder"):
        open_tasks(["nouns"], tasks_path=tmp_path / "nowhere")


def test_without_the_harness_the_message_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install 'ghostlayers\[tasks\]'"):
        open_tasks(["arc_easy"])


def test_a_limit_below_one_is_refused(folder, byte_tokenizer) -> None:
    with pytest.raises(RecipeError, match="'limit' must be at least 1, got 0"):
        evaluate_tasks(make_tiny_llama(), byte_tokenizer, ["nouns"], tasks_path=folder, limit=0)


def test_a_tokenizer_without_special_tokens_is_refused(folder) -> None:
    tokenizer = make_byte_tokenizer(bos=False)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a BOS nor an EOS token"):
        evaluate_tasks(make_tiny_llama(), tokenizer, ["nouns"], tasks_path=folder)


# The command line


def call(*arguments):
    return CliRunner().invoke(
        app, ["eval", *(str(argument) for argument in arguments)], env={"COLUMNS": "200"}
    )


@pytest.fixture
def run(tiny_folder, folder, tmp_path, monkeypatch):
    """One call of eval in an empty folder; its screen and its file."""
    monkeypatch.chdir(tmp_path)

    def succeed(*arguments):
        more = ("--tasks-path", folder, "--device", "cpu", "--json", "result.json")
        result = call(tiny_folder, *arguments, *more)
        assert result.exit_code == 0, result.output
        return result, json.loads(Path("result.json").read_text())

    return succeed


def test_tasks_alone_are_enough(run) -> None:
    result, content = run("--tasks", "nouns, plain", "--limit", 5)
    assert content["results"] == content["comparisons"] == content["tasks_against"] == []
    assert [task["task"] for task in content["tasks"]] == ["nouns", "plain"]
    first, second = content["tasks"]
    assert first["num_documents"] == len(first["acc_values"]) == len(first["documents"]) == 5
    assert second["acc_norm"] is None
    for task in content["tasks"]:
        assert f"{100 * task['acc']:.2f} ± {100 * task['acc_error']:.2f}" in result.stdout
    assert f"{50 * (first['acc_norm'] + second['acc']):.2f} ± " in result.stdout
    assert "mean of tasks" in result.stdout
    assert "zero-shot; the first documents only: nouns 5 of 14, plain 5 of 9" in result.stdout
    assert "Means of acc_norm take acc for plain, which has none." in result.stdout
    assert result.stderr == ""


def test_a_model_against_itself_differs_nowhere(run, tiny_folder) -> None:
    result, content = run("--tasks", "nouns", "--against", tiny_folder)
    assert content["tasks"] == content["tasks_against"]
    assert [comparison["difference"] for comparison in content["comparisons"]] == [0, 0]
    assert "+0.00 ± 0.00" in result.stdout
    assert "paired bootstrap, 10,000 resamples" in result.stdout
    assert "zero-shot; all documents" in result.stdout
    assert "mean of tasks" not in result.stdout


def test_text_and_tasks_go_together(run, tmp_path) -> None:
    (tmp_path / "some.txt").write_text("The river carries the letter. " * 20)
    more = ("-d", "some.txt", "--sequence-length", 64)
    result, content = run("--tasks", "long", *more)
    assert [result["corpus"] for result in content["results"]] == ["some.txt"]
    assert [task["task"] for task in content["tasks"]] == ["long"]
    assert "6 prompts of long were longer than the model's positions" in result.stderr


def test_one_of_text_and_tasks_is_needed(tiny_folder) -> None:
    result = call(tiny_folder)
    assert result.exit_code == 2
    assert "say what to evaluate on: --data for text, --tasks for tasks" in result.stderr


def test_options_of_tasks_are_not_ignored_without_them(tiny_folder) -> None:
    result = call(tiny_folder, "-d", "other.txt", "--limit", 3)
    assert result.exit_code == 2
    assert "--tasks-path, --trust-tasks and --limit mean nothing without --tasks." in result.stderr


# Code in task files


def mark(path: Path) -> str:
    """Python that leaves a marker."""
    return f"open({str(path)!r}, 'w').close()"


def with_code(folder, marker, **changes):
    """A task's file with other entries, beside Python that marks that it was run."""
    write_task(folder, "evil", questions(), "acc")
    (folder / "code.py").write_text(f"{mark(marker)}\ndef run(*_, **__): return _[0]\n")
    for suffix in ("evil.py", "data/data.py"):
        (folder / suffix).parent.mkdir(exist_ok=True)
        (folder / suffix).write_text(mark(marker))
    text = (folder / "evil.yaml").read_text()
    for key, value in changes.items():
        text = re.sub(rf"^{key}:.*\n( .*\n)*", "", text, flags=re.MULTILINE) + f"{key}: {value}\n"
    (folder / "evil.yaml").write_text(text)


ESCAPES = [
    "{{ cycler.__init__.__globals__.os.open('MARK', 65) }}",
    "{{ lipsum.__globals__['os'].open('MARK', 65) }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARK', 'w') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ question|attr('__class__') }}",
    "{{ '{0.__class__}'.format(question) }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ 1 / 0 }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_cannot_leave_their_sandbox(tmp_path, template, byte_tokenizer) -> None:
    marker = tmp_path / "marker"
    text = json.dumps(template.replace("MARK", str(marker)))
    with_code(tmp_path, tmp_path / "other", doc_to_text=text)
    before = harness.lm_eval.utils.env
    with pytest.raises(CorpusError, match="template cannot be filled in"):
        open_tasks(["evil"], tasks_path=tmp_path)
    assert harness.lm_eval.utils.env is before
    assert not marker.exists()


def test_a_template_that_fails_later_is_refused_too(tmp_path, byte_tokenizer) -> None:
    last = "{{ cycler.__init__ if question.startswith('13.') else question }}"
    with_code(tmp_path, tmp_path / "marker", doc_to_text=json.dumps(last))
    with pytest.raises(CorpusError, match="template cannot be filled in"):
        evaluate_tasks(make_tiny_llama(), byte_tokenizer, ["evil"], tasks_path=tmp_path)


CODE = {
    "a function": {"process_docs": "!function code.run"},
    "a function of an installed package": {"process_docs": "!function os.getcwd"},
    "a function inside": {"metadata": "{version: 1, deep: [{a: !function code.run}]}"},
    "a data set": {"custom_dataset": "!function code.run"},
    "a class": {"class": "!function code.run"},
    "an object": {"metadata": "!!python/object/apply:os.getcwd []"},
    "a script": {"dataset_path": "evil.py"},
    "pickles": {"dataset_path": "pandas"},
    "a hub's metric": {"metric_list": "[{metric: acc}, {metric: evil, hf_evaluate: true}]"},
    "a data set's code": {"dataset_kwargs": "{trust_remote_code: true}"},
    "unsafe": {"unsafe_code": "true"},
    "a file system": {"dataset_kwargs": "{storage_options: {protocol: python}}"},
}


@pytest.mark.parametrize("changes", CODE.values(), ids=CODE)
def test_files_with_code_are_refused_before_they_are_read(tmp_path, changes, monkeypatch) -> None:
    marker = tmp_path / "marker"
    with_code(tmp_path, marker, **changes)
    monkeypatch.setattr(harness, "find_tasks", lambda *_: pytest.fail("the harness was asked"))
    with pytest.raises(RecipeError, match=r"evil.yaml: .*--trust-tasks"):
        open_tasks(["evil"], tasks_path=tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("where", ["beside", "elsewhere", "linked", "in a group", "merged"])
def test_code_in_files_that_are_included_is_found(tmp_path, where) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "tasks"
    folder.mkdir()
    with_code(folder, marker)
    hidden = tmp_path / "hidden.txt"
    hidden.write_text("process_docs: !function code.run\n")
    (tmp_path / "code.py").write_text(mark(marker))
    task = folder / "evil.yaml"
    if where == "linked":
        (folder / "link.yaml").symlink_to(hidden)
    elif where == "in a group":
        (folder / "group.yaml").write_text(
            "group: all\ntask: [{task: evil, process_docs: !function code.run}]\n"
        )
    elif where == "merged":
        task.write_text(task.read_text() + "x: &x {process_docs: !function code.run}\n<<: *x\n")
    else:
        name = "../hidden.txt" if where == "beside" else hidden
        task.write_text(task.read_text() + f"include: [{name}]\n")
    with pytest.raises(RecipeError, match="--trust-tasks"):
        open_tasks(["evil"], tasks_path=folder)
    assert not marker.exists()


def test_metrics_of_the_hub_do_not_run(tmp_path) -> None:
    marker = tmp_path / "marker"
    with_code(tmp_path, marker, metric_list="[{metric: acc}, {metric: EVIL, aggregation: mean}]")
    task, script = tmp_path / "evil.yaml", tmp_path / "evil.py"
    task.write_text(task.read_text().replace("EVIL", str(script)))
    with pytest.raises(RecipeError, match="not among lm-evaluation-harness's own metrics"):
        open_tasks(["evil"], tasks_path=tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("content", ["[" * 500 + "]" * 500, "include: /dev/zero"])
def test_files_that_cannot_be_read_safely_are_refused(folder, tmp_path, content) -> None:
    write_task(tmp_path, "nouns", questions(), "acc")
    (tmp_path / "more.yaml").write_text(content)
    with pytest.raises(CorpusError, match=r"nests lists|is no task file"):
        open_tasks(["nouns"], tasks_path=tmp_path)


def test_trusted_files_run_and_the_screen_says_so(tmp_path, tiny_folder) -> None:
    marker = tmp_path / "marker"
    with_code(tmp_path, marker, process_docs="!function code.run")
    asked = (tiny_folder, "--tasks", "evil", "--tasks-path", tmp_path, "--device", "cpu")
    refused = call(*asked)
    assert (refused.exit_code, marker.exists()) == (2, False), refused.output
    assert "evil.yaml: process_docs: !function code.run" in refused.stderr
    trusted = call(*asked, "--trust-tasks")
    assert (trusted.exit_code, marker.exists()) == (0, True), trusted.output
    assert "code of task files runs: evil.yaml: process_docs" in trusted.stderr


def test_a_comparison_asks_for_trust_too(tmp_path, tiny_folder) -> None:
    with_code(tmp_path, tmp_path / "marker", process_docs="!function code.run")
    (tmp_path / "text.txt").write_text("The river carries the letter. " * 200)
    out = tmp_path.parent / f"{tmp_path.name}-out"
    arguments = [tiny_folder, "-n", 1, "-d", tmp_path / "text.txt", "-o", out]
    arguments += ["--tasks", "evil", "--tasks-path", tmp_path, "--device", "cpu"]
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert "--trust-tasks" in result.stderr
    assert not (tmp_path / "marker").exists()
