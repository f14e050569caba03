"""The command line, from help to a whole run: what it says, where it says it, and how it ends."""

import contextlib
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import typing
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from conftest import NOUNS, make_documents
from gguf_models import a_header
from ghostlayers import PRESETS, Recipe, RunOptions, pipeline
from ghostlayers.checkpoint import saving
from ghostlayers.checkpoint.proof import Verification
from ghostlayers.cli import app, scores_screen, screen
from ghostlayers.cli.parameters import option_name
from ghostlayers.errors import ModelError, SpanError
from ghostlayers.plan.units import Plan, Predicted
from ghostlayers.repairs import METHODS
from ghostlayers.runtime.locks import holding
from ghostlayers.runtime.quiet import quiet_imports
from ghostlayers.runtime.settings import KEY, fields_of
from ghostlayers.selection.choices import SELECTIONS
from ghostlayers.spans import format_layers
from ghostlayers.text.corpora import document_hash

LENGTH = ("--sequence-length", "64")
SMALL = ("--windows", "12", "--held-out-windows", "2", *LENGTH, "--device", "cpu")


def call(*arguments, **environment):
    return CliRunner().invoke(app, [str(each) for each in arguments], env=environment)


def succeed(*arguments, **environment):
    result = call(*arguments, **environment)
    assert result.exit_code == 0, result.output
    return result


def words(text):
    """What a person reads: no frames, no colours, no line breaks."""
    return " ".join(click.unstyle(text).translate(dict.fromkeys(map(ord, "│┃╭╮╰╯─"), " ")).split())


@pytest.fixture(scope="module")
def place(tmp_path_factory, some_text):
    """A folder with texts in three formats."""
    folder = tmp_path_factory.mktemp("cli")
    lines = [json.dumps({"text": document}) + "\n" for document in some_text]
    (folder / "calibration.jsonl").write_text("".join(lines))
    (folder / "other.txt").write_text("\n\n".join(make_documents(10, seed=5)))
    pq.write_table(pa.table({"text": some_text[:20]}), folder / "half.parquet")
    return folder


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch):
    """Paths in these tests are short, so that no line of output breaks inside one."""
    monkeypatch.chdir(place)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise OSError("a test of the command line went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def _own_signals():
    """The commands change what a polite kill does; pytest keeps its own way."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def quick(monkeypatch):
    """Skip the proof in a fresh process."""
    monkeypatch.setattr(saving, "verify", lambda *_: Verification(True, 0.0, 32))


# Help


COMMANDS = [
    "prune",
    "materialize",
    "export",
    "push",
    "eval",
    "score",
    "compare",
    "run",
    "inspect",
    "demo",
]


def help_of(*command):
    """Help on a screen so wide that every option is one line."""
    return succeed(*command, "--help", COLUMNS="2000").stdout


def line_of(option, text):
    """What help says about one option."""
    rows = (words(line).removeprefix("* ") for line in text.splitlines())
    (line,) = [row for row in rows if row.split(" ")[0] == option]
    return line


def test_the_first_help_lists_the_commands():
    text = words(help_of())
    assert all(f" {command} " in text for command in COMMANDS)
    assert "Remove decoder layers from a language model" in text


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("prune", "Remove layers, repair every gap, write a checkpoint, and prove that it reloads"),
        ("eval", "Perplexity of any causal language model, and its divergence from a dense one"),
        ("score", "Score every layer, and every span of N layers"),
        ("push", "Share a checkpoint or an adapter on the Hugging Face Hub, with its model card"),
        ("export", "Write a checkpoint as a GGUF file, or one of each type, and prove what"),
        ("materialize", "Write the whole checkpoint that an adapter describes"),
        ("inspect", "What was removed, kept and repaired in a checkpoint, and on what evidence"),
        ("demo", "The whole pipeline on a real language model"),
    ],
)
def test_every_command_has_help(command, sentence):
    assert sentence in words(help_of(command))


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("prune", "--select", "[default: recoverable; ghosted: streamline]"),
        ("prune", "--keep-layers", "what the selection's paper protects; ghosted: first:1,last:1]"),
        ("prune", "--refit", "[default: all]"),
        ("prune", "--ridge", "[default: 1e-06; ghosted: 0.0]"),
        ("prune", "--fit-windows", "[default: 32]"),
        ("prune", "--iterative", "[default: off]"),
        ("prune", "--separator", "Joins documents; \\n is a line break. [default: a blank line]"),
        ("prune", "--data", "unless a preset names one."),
        ("prune", "--batch-size", "[default: about 1,024 tokens; 8,192 on an accelerator]"),
        ("prune", "--save", "[default: checkpoint]"),
        ("prune", "--overwrite", "[default: off]"),
        ("eval", "--sequence-length", "[x>=2] Tokens a window. [default: 2048]"),
        ("eval", "--bos", "[default: auto; ghosted: never]"),
        ("eval", "--tasks", "pip install 'ghostlayers[tasks]'"),
        ("compare", "--eval-separator", "[default: a blank line]"),
        ("compare", "--select", "[default: streamline,recoverable]"),
        ("score", "--cosine-axis", "[default: hidden; ghosted: tokens]"),
        ("demo", "--overwrite", "[default: off]"),
    ],
)
def test_help_names_defaults_and_the_papers_choices(command, option, values):
    assert values in line_of(option, help_of(command))


@pytest.mark.parametrize("owner", [Recipe, RunOptions])
def test_help_of_prune_says_of_every_field_what_the_field_says_of_itself(owner):
    text = help_of("prune")
    for name, field in fields_of(owner).items():
        line = line_of(option_name(name, field.metadata[KEY]), text)
        assert " ".join(field.metadata[KEY].text.split()) in line
        assert f"    {name}: " in owner.__doc__
        for value in typing.get_args(typing.get_type_hints(owner)[name]):
            assert not isinstance(value, str) or value in line


@pytest.mark.parametrize(("option", "names"), [("--select", SELECTIONS), ("--repair", METHODS)])
def test_help_of_prune_lists_what_there_is(option, names):
    line = line_of(option, help_of("prune")).split("[default:")[0]
    assert all(name in line for name in names)


def test_the_version_is_told():
    assert succeed("--version").stdout.startswith("ghostlayers 0.")


@pytest.mark.parametrize("command", ["prune", "heal", "compare"])
def test_help_on_a_narrow_screen_cuts_no_name(command):
    narrow = click.unstyle(succeed(command, "--help", COLUMNS="80").stdout)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "\\[" not in narrow
    names = set(re.findall(r"--[a-z][\w-]+", help_of(command)))
    assert len(names) > 20
    assert names <= set(re.findall(r"--[a-z][\w-]+", narrow))


def test_no_command_shows_help():
    result = call()
    assert result.exit_code == 2
    assert "Usage: ghostlayers" in words(result.output)


# Usage errors: exit code 2


ONE = ("prune", "-n", "1", "-d", "other.txt")
SOME = ("eval", "-d", "other.txt", *LENGTH)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((*ONE, "--repair", "ghst"), "unknown repair 'ghst'. Did you mean 'ghost'?"),
        ((*ONE, "--select", "best"), "unknown selection 'best'. Known: angular, lorp, "),
        ((*ONE, "--preset", "pager"), "unknown preset 'pager'. Did you mean 'paper'?"),
        ((*ONE, "--dtype", "int4"), "'int4' is not one of"),
        ((*ONE, "--batch-size", "-1"), "'--batch-size'"),
        ((*ONE, "--windows", "0"), "'windows' must be at least 1, got 0."),
        ((*ONE, "--remove", "1"), "give either --layers or --remove, not both."),
        ((*ONE, "--smaller", "20%"), "--layers and --smaller are given, but each of them"),
        ((*ONE, "--max-loss", "0.1"), "--layers and --max-loss are given"),
        (("prune", "-d", "other.txt", "--faster", "1x"), "such as 1.25x, got '1x'."),
        (("prune", "-d", "other.txt", "--fits", "much"), "--fits: 'much' is no size"),
        (("prune", "-d", "other.txt", "--max-loss", "nan"), "a positive number such as 0.1"),
        (("score", "-d", "other.txt", "--smaller", "0.2"), "is that a share or a percentage?"),
        ((*ONE, "--as", "q8_0"), "--as belongs to --fits, which is not given; drop it."),
        ((*ONE, "--layer", "1"), "No such option: --layer"),
        (("prune", "-n", "one", "-d", "other.txt"), "'--layers' / '-n'"),
        (("prune", "-d", "other.txt"), "say how many layers to remove (--layers) or which"),
        (("prune", "-n", "1"), "no calibration text: give --data a file of yours"),
        (("score", "-d", "other.txt"), "say how many layers to remove (--layers)"),
        (("score", "-n", "1"), "no calibration text: give --data a file of yours"),
        (("eval",), "say what to evaluate on: --data for text, --tasks for tasks, or both."),
        (("eval", "-d", ",", *LENGTH), "--data"),
        (("eval", "-d", "other.txt", "--sequence-length", "1"), "'--sequence-length'"),
        ((*SOME, "--max-windows", "0"), "'--max-windows'"),
        ((*SOME, "--device", "toaster"), "unknown device 'toaster'"),
        (
            (*SOME, "--separator", "a", "--separator", "b"),
            "2 separators for 1 corpora; give one for all, or one each.",
        ),
    ],
)
def test_usage_errors_exit_with_2(tiny_folder, place, arguments, text):
    command, *others = arguments
    output = ("-o", "never") if command == "prune" else ()
    result = call(command, tiny_folder, *output, *others)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 2
    assert text in words(result.stderr)
    assert result.stdout == ""
    assert not (place / "never").exists()


def test_a_missing_output_is_a_usage_error(tiny_folder):
    result = call("prune", tiny_folder, "-n", "1", "-d", "other.txt")
    assert result.exit_code == 2
    assert "Missing option '--output' / '-o'" in words(result.stderr)


# Input errors: exit code 1, one message


def error_of(*arguments):
    """The one message of a call that must fail."""
    result = call(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    first, *others = result.stderr.splitlines()
    assert others == []
    return first


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("-n", "6"), "cannot remove 6 of 6 decoder layers; remove between 1 and 5."),
        (("-n", "-1"), "cannot remove -1 of 6 decoder layers; remove between 1 and 5."),
        (("--remove", "5-6"), "layers 6 do not exist: the model has 6 decoder layers, 0 to 5."),
        (("--remove", "3-1"), "range '3-1' runs backwards; write 1-3."),
        (("--remove", "1,1"), "layers 1 are named twice; name each layer once."),
        (
            ("--smaller", "80%"),
            "--smaller 80% is out of reach: 5 layers are the most that may go. 5 layers less: "
            "213.6 KiB become 66.4 KiB, 68.9% smaller, the repair's 4.0 KiB included.",
        ),
        (
            ("-n", "1", "--sequence-length", "129"),
            "windows of 129 tokens exceed the model's 128 positions; the longest that works is "
            "--sequence-length 128.",
        ),
        (
            ("-n", "1", "--windows", "900"),
            "corpus 'calibration.jsonl' gives 238 windows of 64 tokens, 902 are needed; give more "
            "text, fewer --windows, or a shorter --sequence-length.",
        ),
        (
            ("-n", "1", "-d", "calibraton.jsonl"),
            "no corpus and no file is called 'calibraton.jsonl'. Known: c4, pg19, ptb, sec, "
            "slimpajama, wikitext2. Or give a .txt, .jsonl or .parquet file, or a data set on the "
            "hub as name:config:split.",
        ),
    ],
)
def test_input_errors_of_prune(tiny_folder, place, arguments, text):
    common = ("-o", "never", "-d", "calibration.jsonl", *SMALL)
    assert error_of("prune", tiny_folder, *common, *arguments) == f"Error: {text}"
    assert not (place / "never").exists()


def test_an_existing_output_is_refused_before_the_model_is_opened(place):
    (place / "there").mkdir()
    (place / "there" / "thesis.tex").write_text("years of work")
    message = error_of("prune", "no/such/model", "-o", "there", "-n", "1", "-d", "other.txt")
    assert message == "Error: 'there' exists already; choose another folder or pass --overwrite."


READS = ("-d", "other.txt", *LENGTH)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("eval", "M", *READS, "--json", "M/eval.json"), "--json 'M/eval.json' lies in MODEL 'M'"),
        (("eval", "M", *READS, "--json", "./M/../other.txt"), "is the same as --data 'other.txt'"),
        (("eval", "N", "--against", "M", *READS, "--json", "M/a"), "lies in --against 'M'"),
        (("score", "M", "-n", "1", *READS, "--png", "M/a.png"), "--png 'M/a.png' lies in MODEL"),
        (("prune", "M", "-n", "1", *READS, "--overwrite", "-o", "M"), "-o 'M' is the same as"),
        (("prune", "M", "-n", "1", *READS, "--overwrite", "-o", "."), "contains MODEL 'M'"),
        (("prune", "M", "-n", "1", *READS, "-o", "a", "--gguf", "a/b.gguf"), "-o 'a' contains"),
        (("compare", "M", "-n", "1", *READS, "--eval-data", "a.txt,M/b", "-o", "M/b"), "MODEL"),
        (("materialize", "M", "--overwrite", "-o", "M"), "-o 'M' is the same as ADAPTER 'M'"),
        (("export", "M", "--gguf", "M/a.gguf"), "--gguf 'M/a.gguf' lies in CHECKPOINT 'M'"),
        (("bench", "M", "--json", "M/a.json"), "--json 'M/a.json' lies in MODEL 'M'"),
    ],
)
def test_no_input_is_an_output(place, arguments, text):
    (place / "M").mkdir(exist_ok=True)
    before = sorted(place.rglob("*"))
    assert text in error_of(*arguments)
    assert sorted(place.rglob("*")) == before


def test_a_recipe_is_an_input_too(place):
    (place / "mine.yaml").write_text("{command: eval, model: M, data: other.txt}")
    assert "RECIPE 'mine.yaml'" in error_of("run", "mine.yaml", "--set", "json=mine.yaml")


@pytest.mark.slow
def test_names_in_any_script_are_shown_on_any_terminal(tmp_path):
    """What an encoding has not got is escaped."""
    command = [sys.executable, "-m", "ghostlayers", "inspect", str(tmp_path / "tëxt🙂")]
    for stream in ("ascii", "latin-1"):
        environment = {**os.environ, "PYTHONIOENCODING": stream}
        ended = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert ended.returncode == 1
        assert b"there is no folder" in ended.stderr.replace(b"\n", b" ")
        assert b"U0001f642" in ended.stderr


@pytest.mark.parametrize("by_recipe", [False, True])
def test_a_tilde_stands_for_the_home_folder(tiny_folder, place, tmp_path, monkeypatch, by_recipe):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    Path("home.yaml").write_text(
        f"command: score\nmodel: {tiny_folder}\ndata: other.txt\nwindows: 2\nlayers: 1\n"
        "sequence_length: 64\njson: ~/found.json\n"
    )
    options = ("-n", "1", "--data", "other.txt", "--windows", "2", *LENGTH, "--json=~/found.json")
    succeed(*(("run", "home.yaml") if by_recipe else ("score", tiny_folder, *options)))
    assert (tmp_path / "found.json").is_file()
    assert not Path("~").exists()


def test_an_existing_result_is_not_replaced_unasked(place, tiny_folder):
    arguments = ("eval", tiny_folder, *READS, "--device", "cpu", "--json", "mine.json")
    Path("mine.json").write_text("years of work")
    assert error_of(*arguments) == (
        "Error: 'mine.json' exists already; choose another name or pass --overwrite."
    )
    assert Path("mine.json").read_text() == "years of work"
    succeed(*arguments, "--overwrite")
    assert "results" in json.loads(Path("mine.json").read_text())


def test_a_pipe_is_written_to_and_stays_one(place, tiny_folder):
    os.mkfifo("pipe")
    with subprocess.Popen(["cat", "pipe"], stdout=subprocess.PIPE) as reader:
        succeed("eval", tiny_folder, *READS, "--device", "cpu", "--json", "pipe")
        assert "results" in json.loads(reader.communicate(timeout=60)[0])
    assert Path("pipe").is_fifo()


def test_a_second_run_with_the_same_output_is_told_who_is_at_it(place):
    with holding(Path("taken")):
        lock = Path(".taken.ghostlayers-lock")
        held = lock.read_text()
        code = "import sys; from filelock import FileLock; FileLock(sys.argv[1]).acquire(timeout=0)"
        done = subprocess.run(
            [sys.executable, "-c", code, lock], capture_output=True, text=True, check=False
        )
        assert "Timeout" in done.stderr
        assert lock.read_text() == held
    assert not lock.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("-o", "dangling"), "it is a link to nothing"),
        (("-o", "x" * 240), "its name has 240 bytes"),
        (("-o", "/proc/none"), "cannot"),
        (("-o", "other.txt/inside"), "is a file, not a folder"),
        (("-o", "new", "--gguf", "dangling.gguf"), "it is a link to nothing"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_refused_before_the_model_is_opened(
    place, arguments, text
):
    for name in ("dangling", "dangling.gguf"):
        if not os.path.lexists(name):
            Path(name).symlink_to("nowhere")
    before = sorted(place.iterdir())
    assert text in error_of("prune", "no/such/model", "-n", "1", "-d", "half.parquet", *arguments)
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("command", ["eval", "score", "prune"])
def test_a_missing_model_is_refused(command):
    more = {"eval": (), "score": ("-n", "1"), "prune": ("-n", "1", "-o", "never")}[command]
    assert error_of(command, "./missing", "-d", "other.txt", *more) == (
        "Error: './missing' is neither a model's folder, nor a .gguf file, nor a hub id such as "
        "HuggingFaceTB/SmolLM2-135M."
    )


def test_a_folder_without_a_record_cannot_be_inspected(tiny_folder):
    assert error_of("inspect", tiny_folder) == (
        f"Error: '{tiny_folder}' holds no ghostlayers.json: it was not made by Ghostlayers."
    )


@pytest.mark.parametrize("content", ["{ not json", "{}", '{"base_model": 3}'])
def test_a_damaged_record_cannot_be_inspected(tmp_path, content):
    path = tmp_path / "ghostlayers.json"
    path.write_text(content)
    assert error_of("inspect", tmp_path).startswith(f"Error: '{path}' cannot be read: ")


def test_a_json_file_that_cannot_be_written_is_refused(tiny_folder):
    result = call("eval", tiny_folder, "-d", "other.txt", *LENGTH, "--json", "no/such/place.json")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: cannot write 'no/such/place.json': there is no folder 'no/such'; make it.\n"
    )
    assert "Loading" not in result.stdout  # told before anything is computed


def test_a_picture_of_an_unknown_kind_is_refused(tiny_folder, place):
    arguments = ("-n", "2", "-d", "calibration.jsonl", *SMALL, "--png", "map.xyz")
    result = call("score", tiny_folder, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: cannot draw into 'map.xyz': '.xyz' is no kind of")
    assert "Loading" not in result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert not list(place.glob("*map*"))


@pytest.fixture
def log_of_datasets():
    """What the library that reads tables would write to the screen."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("datasets").addHandler(handler)
    yield records
    logging.getLogger("datasets").removeHandler(handler)


def test_a_damaged_table_gives_one_message(tiny_folder, place, log_of_datasets):
    (place / "broken.parquet").write_bytes(b"nothing of use")
    result = call("eval", tiny_folder, "-d", "broken.parquet", *LENGTH)
    assert result.exit_code == 1
    assert "Error: cannot read 'broken.parquet' as parquet: " in result.stderr
    assert [record.getMessage() for record in log_of_datasets] == []


def test_a_seed_beyond_all_bounds_is_refused(tiny_folder):
    arguments = ("-o", "never", "-n", "1", "-d", "calibration.jsonl", *SMALL, "--seed", 10**30)
    result = call("prune", tiny_folder, *arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2)
    assert "seed" in result.stderr


def test_debug_raises(tiny_folder):
    arguments = ("-o", "never", "-n", "6", "-d", "other.txt", *SMALL, "--debug")
    result = call("prune", tiny_folder, *arguments)
    assert isinstance(result.exception, SpanError)
    assert result.exc_info[2] is not None
    assert "Error:" not in result.output


LOWER = (
    "out of memory. Try a smaller --batch-size, a smaller --sequence-length, --offload disk, "
    "--max-memory with less than what is free, --dtype bfloat16."
)
ALLOCATOR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (
            KeyboardInterrupt,
            130,
            "interrupted; nothing was left half-written. Repeat the command to go on.",
        ),
        (MemoryError, 1, f"{LOWER} (MemoryError)"),
        (torch.OutOfMemoryError("of 80 GB"), 1, f"{LOWER} (of 80 GB)"),
        (RuntimeError(ALLOCATOR), 1, f"{LOWER} ({ALLOCATOR})"),
        (ModelError(f"cannot load: {ALLOCATOR}"), 1, f"{LOWER} (cannot load: {ALLOCATOR})"),
        (
            OSError(28, "No space left on device", "/x"),
            1,
            "the operating system refuses at '/x': No space left on device.",
        ),
    ],
)
def test_interruptions_end_with_one_message(tiny_folder, monkeypatch, raised, code, text):
    def prune(*args, **kwargs):
        raise raised

    monkeypatch.setattr(pipeline, "prune", prune)
    result = call("prune", tiny_folder, "-o", "never", "-n", "1", "-d", "other.txt")
    assert result.exit_code == code
    assert result.stderr == f"Error: {text}\n"


# A whole run


@pytest.fixture(scope="module")
def pruned(place, tiny_folder):
    """Run prune once; the checkpoint is in ``out``."""
    with contextlib.chdir(place):
        common = ("-n", "2", "-d", "calibration.jsonl", *SMALL)
        return succeed("prune", tiny_folder, "-o", "out", *common)


@pytest.fixture(scope="module")
def record(pruned, place):
    return json.loads((place / "out" / "ghostlayers.json").read_text())


def test_prune_says_what_it_removed_and_what_it_costs(pruned, record):
    text = words(pruned.stdout)
    cut = record["cut"]
    assert "Calibration text: " in text
    assert any(noun in text.partition("Calibration text: ")[2][:200] for noun in NOUNS)
    assert f"Removed: layers {format_layers(cut['removed'])} (2 of 6; counted from 0" in text
    assert f"Kept: layers {format_layers(cut['kept'])}" in text
    for row in record["evidence"]:
        assert f"{row['loss_nats']:.3f}" in text
        assert f"{row['perplexity']:.2f}" in text
    assert "On 2 held-out windows of 64 tokens" in text
    assert "reloaded in a fresh process, logits equal bit for bit" in text


def test_prune_removes_the_span_of_the_lowest_loss(record):
    measured = [each for each in record["scores"]["spans"] if each["loss_nats"] is not None]
    best = min(measured, key=lambda each: each["loss_nats"])
    assert record["cut"]["spans"] == [[best["start"], best["stop"]]]
    assert record["recipe"]["layers"] == 2


BAR_CHARACTERS = ("\r", "\x1b", "%|", "it/s", "█", "━")


def test_nothing_but_the_result_is_written_when_nobody_looks(pruned):
    assert not any(each in pruned.stderr for each in BAR_CHARACTERS)
    assert "\r" not in pruned.stdout
    assert "\x1b" not in pruned.stdout


def results_in(file):
    return json.loads(Path(file).read_text())["results"]


@pytest.fixture(scope="module")
def evaluated(pruned, tiny_folder, place):
    """Evaluate the checkpoint on another text and on all of its calibration text."""
    more = ("--against", tiny_folder, *LENGTH, "--device", "cpu", "--json", "eval.json")
    with contextlib.chdir(place):
        return succeed("eval", "out", "-d", "other.txt, calibration.jsonl", *more)


def test_eval_writes_all_numbers_of_every_corpus(evaluated, tiny_folder):
    content = json.loads(Path("eval.json").read_text())
    assert content["model"] == "out"
    assert content["against"] == str(tiny_folder)
    for result in content["results"]:
        assert set(result) >= {
            "corpus",
            "num_tokens",
            "loss_nats",
            "perplexity",
            "kl_nats",
            "greedy_agreement",
        }
        assert result["perplexity"] == pytest.approx(math.exp(result["loss_nats"]))
        assert result["num_tokens"] == result["num_windows"] * 63
        assert result["kl_nats"] > 0
        assert 0 < result["greedy_agreement"] < 1
        assert result["acceptance"] == pytest.approx(1 - result["total_variation"])
        assert 0 < result["acceptance"] < 1 < result["tokens_a_verification"] < 5


def test_eval_tells_what_both_models_write(evaluated):
    content = json.loads(Path("eval.json").read_text())
    assert len(content["prefixes"]) == 16
    for rows in (content["writing"], content["writing_against"]):
        assert [(row["manner"], row["num_continuations"]) for row in rows] == [
            ("greedy", 16),
            ("sampled", 20),
        ]
        assert all(row["new_tokens"] == 64 for row in rows)
    assert content["writing"][0]["agreement_tokens"] < 64
    assert content["writing_against"][0]["agreement_tokens"] == 64
    text = words(evaluated.stdout)
    assert "Every model continued 16 stretches of the texts by 64 tokens" in text
    assert "4-grams that stood in the text before" in text
    assert re.search(r"other.txt: total variation 0\.\d+; as a draft of the dense model", text)
    assert words(content["prefixes"][0])[:20] in text


def test_eval_keeps_the_order_of_corpora(evaluated):
    corpora = [each["corpus"] for each in results_in("eval.json")]
    assert corpora == ["other.txt", "calibration.jsonl"]
    text = evaluated.stdout
    assert text.index("other.txt: all") < text.index("calibration.jsonl: all")


def test_eval_reports_documents_that_served_as_calibration(evaluated, record):
    shared = len(record["calibration"]["documents"])
    assert shared > 0
    overlaps = [each["calibration_overlap"] for each in results_in("eval.json")]
    assert overlaps == [0, shared]
    assert words(evaluated.stdout).count("no document served as calibration") == 1
    assert words(evaluated.stderr) == (
        f"Warning: {shared} documents of calibration.jsonl also served as calibration of this "
        "model: its loss there flatters it."
    )


def test_eval_counts_shared_documents_in_another_format_too(pruned, record, some_text):
    shared = set(map(document_hash, some_text[:20])) & set(record["calibration"]["documents"])
    succeed("eval", "out", "-d", "half.parquet", *LENGTH, "--json", "half.json")
    (result,) = results_in("half.json")
    assert result["calibration_overlap"] == len(shared)
    assert 0 < len(shared) < len(record["calibration"]["documents"])


def test_eval_is_quiet_when_nobody_looks(evaluated):
    assert not any(each in evaluated.stderr for each in BAR_CHARACTERS)


def test_eval_says_how_many_windows_it_took(tiny_folder, place):
    result = succeed("eval", tiny_folder, "-d", "other.txt", *LENGTH, "--max-windows", "3")
    available = len((place / "other.txt").read_text()) // 64
    assert (
        f"other.txt: the first 3 of {available} windows of 64 tokens, not overlapping, no BOS"
        in words(result.stdout)
    )


def test_eval_of_all_windows_says_so(tiny_folder, place):
    result = succeed("eval", tiny_folder, "-d", "other.txt", *LENGTH)
    available = len((place / "other.txt").read_text()) // 64
    assert f"other.txt: all of {available} windows of 64 tokens" in words(result.stdout)
    assert "calibration" not in result.stdout


@pytest.mark.slow
def test_a_model_does_not_differ_from_itself(tiny_folder):
    more = ("--against", tiny_folder, *LENGTH, "--max-windows", "3", "--json", "self.json")
    succeed("eval", tiny_folder, "-d", "other.txt", *more)
    (result,) = results_in("self.json")
    assert result["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert result["greedy_agreement"] == 1
    assert result["acceptance"] == pytest.approx(1, abs=1e-6)
    assert result["calibration_overlap"] is None
    content = json.loads(Path("self.json").read_text())
    assert content["writing"] == content["writing_against"]
    assert len(content["prefixes"]) == 3  # windows as long as a prefix


def test_eval_writes_nothing_unless_asked_and_beside_a_dense_model(tiny_folder):
    alone = ("--max-windows", "1", *LENGTH, "--json", "alone.json")
    for more in ((), ("--against", tiny_folder, "--continuations", "0")):
        succeed("eval", tiny_folder, "-d", "other.txt", *alone, *more, "--overwrite")
        assert "writing" not in json.loads(Path("alone.json").read_text())


def test_each_corpus_can_have_its_separator(tiny_folder, some_text):
    more = ("--separator", " ", "--separator", "\\n\\n\\n", *LENGTH, "--json", "separated.json")
    succeed("eval", tiny_folder, "-d", "half.parquet,calibration.jsonl", *more)
    results = results_in("separated.json")
    expected = [len(" ".join(some_text[:20])) // 64, len("\n\n\n".join(some_text)) // 64]
    assert [each["num_windows"] for each in results] == expected


@pytest.mark.slow
def test_an_adapter_and_the_checkpoint_made_of_it(tiny_folder, place, quick):
    out = succeed(
        "prune",
        tiny_folder,
        "-o",
        "small",
        "-n",
        "1",
        "-d",
        "calibration.jsonl",
        *SMALL,
        "--save",
        "adapter",
    ).stdout
    assert "small" in out
    assert "the model made of it again has logits equal bit for bit" in words(out)
    assert "ghostlayers materialize small -o small-whole" in words(out)
    assert not (place / "small" / "config.json").exists()
    out = succeed("materialize", "small", "-o", "small-whole", "--device", "cpu").stdout
    assert "reloaded in a fresh process" in words(out)
    assert (place / "small-whole" / "config.json").is_file()
    assert "--overwrite" in error_of("materialize", "small", "-o", "small-whole")


def test_the_calibration_text_is_shown_as_one_harmless_line(capsys):
    from ghostlayers.cli import screen

    screen.show_text("[/x] [red]a\x1b[31m\nb\u202e c\\")
    assert capsys.readouterr().out == "Calibration text: [/x] [red]a[31m b c\\\n"


def test_inspect_shows_the_record(pruned, record):
    text = words(succeed("inspect", "out").stdout)
    cut = record["cut"]["removed"]
    assert f"Removed: layers {cut[0]}-{cut[1]}" in text
    assert "Layers chosen by recoverable; checkpoint mode: custom" in text
    assert f"[{cut[0]}, {cut[1] + 1}) ghost 768" in text
    for row in record["evidence"]:
        assert f"{row['model']} {row['loss_nats']:.3f} {row['perplexity']:.2f}" in text
    assert "Calibrated on 12 of 12 windows of 64 tokens (no BOS)" in text
    assert f"{len(record['calibration']['documents'])} documents" in text


def test_inspect_prints_the_whole_record_as_json(pruned, record):
    assert json.loads(succeed("inspect", "out", "--json").stdout) == record


@pytest.mark.slow
def test_score_writes_every_span_and_a_picture(tiny_folder, place):
    files = ("--json", "score.json", "--png", "map.png")
    result = succeed("score", tiny_folder, "-n", "2", "-d", "calibration.jsonl", *SMALL, *files)
    table = json.loads((place / "score.json").read_text())
    assert [(each["start"], each["stop"]) for each in table["spans"]] == [
        (start, start + 2) for start in range(5)
    ]
    assert len(table["block_influence"]) == table["num_layers"] == 6
    assert [len(row) for row in table["similarity"]] == [7] * 7
    assert all(each["residual"] is not None for each in table["spans"])
    assert (place / "map.png").read_bytes().startswith(b"\x89PNG\r\n")
    text = words(result.stdout)
    assert "Every span of 2 layers" in text
    assert all(f"{each['cosine']:.4f}" in text for each in table["spans"])
    assert "Heat map: map.png" in text
    assert not any(each in result.stderr for each in BAR_CHARACTERS)
    assert not [path.name for path in place.iterdir() if "part" in path.name]


# Choices on the command line reach the recipe


@pytest.fixture
def recipe_of(monkeypatch, tiny_folder):
    """The recipe that prune would be called with."""

    class StopError(Exception):
        pass

    def run(*arguments):
        seen = []

        def prune(model, recipe, **kwargs):
            seen.append(recipe)
            raise StopError

        monkeypatch.setattr(pipeline, "prune", prune)
        result = call("prune", tiny_folder, "-o", "never", "--debug", *arguments)
        assert isinstance(result.exception, StopError), result.output
        return seen[0]

    return run


def test_without_options_the_recipe_is_the_default(recipe_of):
    assert recipe_of("-n", "2", "-d", "other.txt") == Recipe(layers=2, data="other.txt")


def test_the_preset_makes_the_papers_choices(recipe_of):
    made = recipe_of("-n", "2", "--preset", "paper")
    assert made == Recipe(layers=2, preset="ghosted", **PRESETS["ghosted"].choices)


def test_explicit_choices_win_over_the_preset(recipe_of):
    recipe = recipe_of("-n", "2", "--preset", "paper", "-d", "mine.txt", "--ridge", "0.5")
    assert (recipe.data, recipe.ridge, recipe.select) == ("mine.txt", 0.5, "streamline")


def test_every_option_reaches_the_recipe(recipe_of):
    choices = {
        "remove": "1-2",
        "select": "shortgpt",
        "repair": "linearpatch-diag",
        "data": "other.txt",
        "text_column": "body",
        "windows": 20,
        "fit_windows": 10,
        "search_windows": 9,
        "held_out_windows": 3,
        "sequence_length": 77,
        "bos": "never",
        "seed": 5,
        "cosine_axis": "tokens",
        "keep_layers": "first:1,last:2",
        "sampling": "random",
        "race_windows": 12,
        "inputs": "original",
        "token_weight": "uniform",
        "ridge": 0.5,
        "absolute_ridge": 0.25,
        "export": "custom",
        "quantized": "expand",
    }
    options = [each for k, v in choices.items() for each in (f"--{k.replace('_', '-')}", v)]
    recipe = recipe_of(*options, "--separator", "a\\nb\\tc", "--for", "vllm")
    more = {"layers": None, "iterative": False, "refit": "all", "preset": None, "overhead": None}
    more["engine"] = "vllm"
    budgets = "smaller faster at speed fits context as_type max_loss"
    more |= dict.fromkeys(budgets.split())
    more["separator"] = "a\nb\tc"
    assert recipe.to_dict() == {**choices, **more}


def test_what_a_contest_may_cost_reaches_the_recipe(recipe_of):
    recipe = recipe_of("-n", "2", "-d", "other.txt", "--overhead", "0.5%")
    assert (recipe.repair, recipe.overhead, recipe.engine) == ("auto", "0.5%", "any")


def test_iterative_reaches_the_recipe(recipe_of):
    recipe = recipe_of("-n", "2", "-d", "other.txt", "--select", "taylor:norms", "--iterative")
    assert (recipe.select, recipe.iterative) == ("taylor:norms", True)


# Names that are awkward on a screen


@pytest.fixture
def long_place(tmp_path):
    folder = tmp_path / ("a" * 60) / ("b" * 60)
    folder.mkdir(parents=True)
    return folder


@pytest.mark.slow
def test_numbers_stay_readable_beside_a_long_name(tiny_folder, long_place):
    path = long_place / "text.txt"
    path.write_text("\n\n".join(make_documents(4, seed=5)))
    more = (*LENGTH, "--against", tiny_folder, "--json", "long.json")
    text = words(succeed("eval", tiny_folder, "-d", path, *more).stdout)
    (result,) = results_in("long.json")
    assert f"{result['num_tokens']:,}" in text
    assert f"{result['loss_nats']:.4f}" in text
    assert f"{result['perplexity']:.2f}" in text


def test_commands_to_copy_are_not_broken_over_lines(tiny_folder, long_place, quick):
    out = long_place / "out"
    more = ("--remove", "3", "-d", "calibration.jsonl", *SMALL)
    lines = succeed("prune", tiny_folder, "-o", out, *more).stdout.splitlines()
    assert f"  ghostlayers inspect {out}" in lines


@pytest.mark.parametrize("name", ["notes[en].txt", "notes[/b].txt"])
def test_brackets_in_the_name_of_a_corpus_are_shown(tiny_folder, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(make_documents(4, seed=5)))
    result = succeed("eval", tiny_folder, "-d", name, *LENGTH)
    assert words(result.stdout).count(name) == 2


def test_brackets_in_the_name_of_calibration_text_are_shown(tiny_folder, place, quick):
    name = "calibration[en].jsonl"
    (place / name).write_bytes((place / "calibration.jsonl").read_bytes())
    more = ("-o", "brackets", "--remove", "3", "-d", name, *SMALL)
    assert f"tokens of {name} (no BOS)" in words(succeed("prune", tiny_folder, *more).stdout)


@pytest.mark.slow
def test_brackets_in_the_name_of_a_picture_are_shown(tiny_folder):
    more = ("-n", "2", "-d", "calibration.jsonl", *SMALL, "--png", "map[a].png")
    assert "Heat map: map[a].png" in words(succeed("score", tiny_folder, *more).stdout)


def test_a_gguf_file_is_asked_for_only_where_one_can_be_made(tiny_folder, place):
    def refused(text, *more):
        common = ("-n", "1", "-d", "calibration.jsonl", "-o", "never")
        result = call("prune", tiny_folder, *common, *more)
        assert result.exit_code != 0
        assert text in result.stderr
        assert not (place / "never").exists()

    target = ("--gguf", "never.gguf")
    refused("'ghost' adds an operator", "--repair", "ghost", *target)
    refused("drop --save adapter", "--repair", "refit:1", "--save", "adapter", *target)
    refused("should end in .gguf", "--repair", "refit:1", "--gguf", "never.bin")
    refused("no --gguf FILE is asked for", "--repair", "refit:1", "--pre-tokenizer", "gpt-2")


def test_a_cut_becomes_a_gguf_file_in_one_command(tiny_folder, place):
    options = ("--remove", "2-3", "--repair", "refit:1", "--pre-tokenizer", "gpt-2", *SMALL)
    out = ("-o", "for-llama", "--gguf", "for-llama.gguf")
    text = succeed("prune", tiny_folder, "-d", "calibration.jsonl", *options, *out).stdout
    assert "every tensor read again and equal" in words(text)
    assert (place / "for-llama.gguf").is_file()
    assert (place / "for-llama" / "config.json").is_file()


def test_other_libraries_say_nothing_while_they_are_imported() -> None:
    """torchao, where it is installed, warns of kernels that this processor has no use for."""
    done = subprocess.run(
        [sys.executable, "-m", "ghostlayers", "--version"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("ghostlayers ")
    assert not done.stderr


def test_loggers_are_as_they_were_afterwards() -> None:
    logger = logging.getLogger("torchao")
    before = logger.level
    with quiet_imports():
        assert logger.level == logging.ERROR
    assert logger.level == before


def test_inspect_says_what_else_was_given(tmp_path):
    file = a_header("llama", 2, tmp_path)
    said = call("inspect", file).output.replace("\n", " ")
    assert "holds no record of its making" in said
    empty = tmp_path / "empty.gguf"
    empty.touch()
    assert "cannot be read as a GGUF file" in call("inspect", empty).output.replace("\n", " ")
    assert "there is no folder" in call("inspect", tmp_path / "nothing").output
    assert "there is no file" in call("inspect", tmp_path / "nothing.gguf").output


def test_a_plan_that_does_not_fit_says_so(capsys):
    lines = (Predicted("a", 1.0, 1.0, 2**30, 0), Predicted("b", 1.0, 1.0, 3 * 2**30, 0))
    screen.show_plan(Plan(lines, available=3.0 * 2**30))
    assert "may not fit" not in capsys.readouterr().err
    screen.show_plan(Plan(lines, available=2.5 * 2**30))
    assert "than there is for it (2.50 GiB), so it may not fit" in capsys.readouterr().err


def test_a_later_command_of_a_process_starts_its_own_clock(monkeypatch, capsys):
    monkeypatch.setattr(screen, "_began", 0.0)
    screen.show_plan(Plan([]))
    assert "Beside the 0 s" not in capsys.readouterr().out
    screen.begin_anew()
    screen.show_plan(Plan([]))
    assert "Beside the 0 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("repair", "advice"),
    [
        ("refit:3", "--repair refit:3:ridge=auto"),
        ("ghost", "--repair ghost:ridge=auto"),
        ("refit:3:ridge=auto", ""),
        ("linearpatch-diag", ""),
    ],
)
def test_what_to_do_about_a_harmful_repair(repair, advice):
    assert advice in scores_screen._damped(repair)
    assert bool(advice) == bool(scores_screen._damped(repair))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
def test_a_full_place_of_the_output_ends_with_the_status_of_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ghostlayers", "methods"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_a_wide_table_is_whole_in_a_pipe() -> None:
    """A table that no terminal shows has no edge to be cut at."""
    program = (
        "from ghostlayers.cli import screen\n"
        "columns = ['which', *(f'column {n}' for n in range(12))]\n"
        "screen.table(columns, [['first', *(f'a long value {n}' for n in range(12))]], 'a title')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert all(f"column {n}" in ran.stdout for n in range(12))
    assert all(f"a long value {n}" in ran.stdout for n in range(12))
    assert "first" in ran.stdout
