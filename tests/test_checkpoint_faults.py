"""A checkpoint appears whole or not at all, whatever goes wrong while it is written."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ghostlayers
from ghostlayers.checkpoint import proof, records, saving
from ghostlayers.checkpoint.proof import Verification
from ghostlayers.checkpoint.saving import checkpoint_bytes
from ghostlayers.errors import ModelError, NonFiniteError, OutputError, VerificationError
from ghostlayers.model.loading import load_model
from ghostlayers.recipe import RunOptions
from ghostlayers.runtime import drafts
from ghostlayers.runtime.outputs import check_output

DEAD_PID = 2**22 + 1  # beyond the largest process id that Linux gives


@pytest.fixture(scope="module")
def base_folder(tiny_folder, tmp_path_factory):
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("base") / "model")
    (folder / "LICENSE.txt").write_text("Do what you like.")
    return folder


@pytest.fixture(scope="module")
def pruned(base_folder, some_text):
    return ghostlayers.prune(
        str(base_folder),
        data=some_text,
        options=RunOptions(device="cpu"),
        layers=2,
        windows=12,
        fit_windows=12,
        held_out_windows=2,
        sequence_length=64,
    )


@pytest.fixture(scope="module")
def saved(pruned, tmp_path_factory):
    """The one checkpoint of this file that is really proved in a fresh process."""
    out = tmp_path_factory.mktemp("saved") / "new" / "out"
    assert pruned.save(out).identical
    return out


@pytest.fixture
def ours(saved, tmp_path):
    """A checkpoint that Ghostlayers made, alone in its folder."""
    return shutil.copytree(saved, tmp_path / "place" / "out")


@pytest.fixture
def quick(monkeypatch):
    """Skip the proof in a fresh process."""
    monkeypatch.setattr(saving, "verify", lambda *_: Verification(True, 0.0, 32))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What is there when nothing goes wrong


def test_a_checkpoint_is_complete_and_nothing_else_is_left(saved):
    assert names(saved.parent) == ["out"]
    assert names(saved) == [
        "LICENSE.txt",
        "README.md",
        "config.json",
        "generation_config.json",
        "ghostlayers.json",
        "model.safetensors",
        "modeling_ghostlayers.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_record_holds_the_hash_of_every_file(saved):
    digests = {name: hashlib.sha256(each).hexdigest() for name, each in contents(saved).items()}
    del digests["ghostlayers.json"]
    record = ghostlayers.inspect(saved)
    assert record["files"] == digests
    assert record["verification"] == {
        "identical": True,
        "largest_difference": 0.0,
        "num_tokens": 32,
    }


def test_others_may_read_the_folder(saved):
    assert saved.stat().st_mode & 0o777 == 0o755


def test_the_bytes_needed_are_those_of_the_weights(saved, pruned):
    stored = load_file(saved / "model.safetensors")
    expected = sum(tensor.nbytes for tensor in stored.values())
    assert checkpoint_bytes(pruned.model, torch.float32) == expected
    assert checkpoint_bytes(pruned.model, torch.bfloat16) == expected // 2


# Outputs that are refused


def test_an_existing_output_is_refused(pruned, ours):
    before = contents(ours)
    with pytest.raises(OutputError) as caught:
        pruned.save(ours)
    assert str(caught.value) == (
        f"'{ours}' exists already; choose another folder or pass --overwrite."
    )
    assert contents(ours) == before


def test_an_empty_folder_is_filled(pruned, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    pruned.save(out)
    assert (out / "ghostlayers.json").is_file()


def test_a_link_to_an_empty_folder_is_refused(pruned, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "empty")
    with pytest.raises(OutputError, match="exists already"):
        pruned.save(tmp_path / "out")
    assert not contents(tmp_path / "empty")


@pytest.mark.parametrize("held", [["thesis.tex"], [".hidden"]])
def test_a_folder_of_others_is_not_overwritten(pruned, tmp_path, held):
    out = tmp_path / "out"
    out.mkdir()
    for name in held:
        (out / name).write_text("years of work")
    with pytest.raises(OutputError) as caught:
        pruned.save(out, overwrite=True)
    assert str(caught.value) == (
        f"'{out}' was not made by Ghostlayers (it holds no ghostlayers.json), so it will not be "
        "overwritten; choose another folder."
    )
    assert names(out) == held
    assert names(tmp_path) == ["out"]


def test_a_file_is_not_overwritten(pruned, tmp_path):
    out = tmp_path / "out"
    out.write_text("years of work")
    with pytest.raises(OutputError, match="was not made by Ghostlayers"):
        pruned.save(out, overwrite=True)
    assert out.read_text() == "years of work"


@pytest.mark.parametrize("below", ["out", "deeper/out"])
def test_an_output_inside_a_file_is_refused(tmp_path, below):
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(OutputError, match=str(path)):
        check_output(path / below, overwrite=False, needed_bytes=0)


def test_a_name_that_no_disk_can_hold_is_refused(tmp_path):
    with pytest.raises(OutputError):
        check_output(tmp_path / ("x" * 300), overwrite=False, needed_bytes=0)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / "a" / "out", overwrite=False, needed_bytes=0)
    assert str(caught.value) == f"cannot write into '{tmp_path}'; choose another folder."


def free_bytes(monkeypatch, number):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - number, number))


def test_a_disk_that_is_too_full_is_refused(tmp_path, monkeypatch):
    free_bytes(monkeypatch, 10**9)
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / "a" / "out", overwrite=False, needed_bytes=25 * 10**8)
    assert str(caught.value) == (
        f"'{tmp_path}' has 1,000 MB free, the checkpoint needs 2,500 MB; free some space or choose "
        "another disk."
    )


def test_nothing_is_written_on_a_disk_that_is_too_full(pruned, tmp_path, monkeypatch):
    free_bytes(monkeypatch, checkpoint_bytes(pruned.model, torch.float32) - 1)
    with pytest.raises(OutputError, match="free some space or choose another disk"):
        pruned.save(tmp_path / "a" / "out")
    assert names(tmp_path) == []


def test_a_disk_with_just_enough_room_is_accepted(pruned, tmp_path, monkeypatch):
    needed = checkpoint_bytes(pruned.model, torch.float32)
    free_bytes(monkeypatch, needed)
    check_output(tmp_path / "out", overwrite=False, needed_bytes=needed)


# Failures in the middle


def failing_write(error):
    def write(folder, model, stored_dtype):
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise error

    return write


def failing_verify(error):
    def verify(folder, *_):
        assert (folder / "model.safetensors").is_file()
        raise error

    return verify


FAULTS = {
    "disk full": (
        "_write_weights",
        failing_write(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        OutputError,
    ),
    "interrupted": ("_write_weights", failing_write(KeyboardInterrupt()), KeyboardInterrupt),
    "interrupted while proving": ("verify", failing_verify(KeyboardInterrupt()), KeyboardInterrupt),
    "not proved": ("verify", failing_verify(VerificationError("differs")), VerificationError),
}


@pytest.fixture(params=FAULTS.values(), ids=FAULTS)
def fault(request, monkeypatch):
    """Something that goes wrong; the exception that comes out."""
    name, replacement, expected = request.param
    monkeypatch.setattr(saving, name, replacement)
    return expected


def test_a_failure_leaves_nothing_behind(pruned, tmp_path, fault):
    with pytest.raises(fault):
        pruned.save(tmp_path / "new" / "deeper" / "out")
    assert names(tmp_path) == []


def test_a_failure_leaves_folders_that_were_there(pruned, tmp_path, fault):
    (tmp_path / "there").mkdir()
    with pytest.raises(fault):
        pruned.save(tmp_path / "there" / "new" / "out")
    assert names(tmp_path) == ["there"]
    assert names(tmp_path / "there") == []


def test_a_failure_leaves_the_older_checkpoint_intact(pruned, ours, fault):
    before = contents(ours)
    with pytest.raises(fault):
        pruned.save(ours, overwrite=True)
    assert contents(ours) == before
    assert names(ours.parent) == ["out"]


def test_a_full_disk_is_said(pruned, tmp_path, monkeypatch):
    name, replacement, _ = FAULTS["disk full"]
    monkeypatch.setattr(saving, name, replacement)
    with pytest.raises(OutputError) as caught:
        pruned.save(tmp_path / "out")
    assert str(caught.value) == (f"cannot write '{tmp_path / 'out'}': No space left on device.")


@contextlib.contextmanager
def largest_file(num_bytes):
    """Let the system refuse to write larger files, as a quota does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_that_the_system_refuses_to_write_are_an_output_error(pruned, tmp_path):
    out = tmp_path / "new" / "out"
    with largest_file(50_000), pytest.raises(OutputError, match=f"'{out}': .*File too large"):
        pruned.save(out)
    assert names(tmp_path) == []


def test_a_failure_at_the_last_step_leaves_the_older_checkpoint_intact(
    pruned, ours, quick, monkeypatch
):
    before, rename, failed = contents(ours), os.rename, []

    def fail_once(source, target, **more):
        if os.fspath(target) == str(ours) and not failed:
            failed.append(source)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target, **more)

    monkeypatch.setattr(drafts, "_exchanged", lambda *_: False)
    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OutputError):
        pruned.save(ours, overwrite=True)
    assert failed
    assert names(ours.parent) == ["out"]
    assert contents(ours) == before


# Overwriting


def test_our_own_checkpoint_is_replaced_whole(pruned, ours, quick):
    number = ours.stat().st_ino
    pruned.save(ours, overwrite=True)
    assert ours.stat().st_ino != number
    assert "model.embed_tokens.weight" in load_file(ours / "model.safetensors")
    assert names(ours.parent) == ["out"]


OTHERS = ["notes.txt", "checkpoint-500/model.safetensors", ".git/HEAD", "empty/", "link"]


@pytest.mark.parametrize("other", OTHERS)
def test_what_others_put_into_our_folder_is_not_removed(pruned, ours, other):
    path = ours / other
    if other == "link":
        path.symlink_to(ours.parent)
    elif other.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text("years of work")
    before = sorted(ours.rglob("*"))
    with pytest.raises(OutputError) as caught:
        pruned.save(ours, overwrite=True)
    assert f"holds what its record does not list: {other.rstrip('/')}. Only" in str(caught.value)
    assert sorted(ours.rglob("*")) == before


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_what_others_changed_is_not_removed(pruned, ours, name):
    with (ours / name).open("ab") as file:
        file.write(b"mine")
    with pytest.raises(OutputError, match=rf"does not list: {name} \(changed\)\."):
        pruned.save(ours, overwrite=True)
    assert (ours / name).read_bytes().endswith(b"mine")


def test_what_an_older_record_does_not_list_is_not_removed(pruned, ours):
    record = json.loads((ours / "ghostlayers.json").read_text())
    record["files"] = {"model.safetensors": record["files"]["model.safetensors"]}
    (ours / "ghostlayers.json").write_text(json.dumps(record))
    with pytest.raises(OutputError, match=r"not list: LICENSE.txt, README.md, .* and 1 more\."):
        pruned.save(ours, overwrite=True)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"files": 3}', '{"files": [1]}'])
def test_a_record_that_tells_nothing_allows_nothing(pruned, ours, content):
    (ours / "ghostlayers.json").write_text(content)
    with pytest.raises(OutputError, match="does not tell what was written there"):
        pruned.save(ours, overwrite=True)


def test_what_comes_while_it_is_replaced_is_put_back(pruned, ours, quick, monkeypatch):
    exchange = drafts.exchange

    def late(draft, path):
        if not (path / "notes.txt").exists():
            (path / "notes.txt").write_text("years of work")
        return exchange(draft, path)

    monkeypatch.setattr(drafts, "exchange", late)
    with pytest.raises(OutputError, match=r"does not list: notes.txt\."):
        pruned.save(ours, overwrite=True)
    assert (ours / "notes.txt").read_text() == "years of work"
    assert names(ours.parent) == ["out"]


def test_the_model_is_not_an_output(pruned, base_folder):
    for out in (base_folder, base_folder.parent, base_folder / "out"):
        with pytest.raises(OutputError, match="What is read is never written to"):
            pruned.save(out, overwrite=True)


def test_two_runs_do_not_write_the_same_folder(pruned, ours):
    lock = ours.with_name(".out.ghostlayers-lock")
    code = "import sys; from filelock import FileLock; one = FileLock(sys.argv[1]); one.acquire(); "
    code += "print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, lock], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="is being written by another run"):
            pruned.save(ours, overwrite=True)
        other.communicate(b"\n")


def test_overwrite_does_not_need_anything_to_overwrite(pruned, tmp_path, quick):
    pruned.save(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "ghostlayers.json").is_file()


def test_overwriting_through_a_link_leaves_no_rubbish(pruned, ours, quick):
    link = ours.parent / "link"
    link.symlink_to(ours)
    pruned.save(link, overwrite=True)
    assert names(ours.parent) == ["link", "out"]


def test_what_a_killed_run_left_is_removed(pruned, tmp_path, quick):
    """The lock says that no run is at it, whatever numbers processes have here."""
    stale = [f".out.ghostlayers-{os.getpid()}-abc", ".out.ghostlayers-0123456789abcdef"]
    foreign = [".out.2024-01", ".out.ghostlayers-notebook", f".other.ghostlayers-{DEAD_PID}-a"]
    for name in (*stale, *foreign):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    pruned.save(tmp_path / "out")
    assert names(tmp_path) == sorted([*foreign, "out"])


def test_what_was_killed_between_the_two_names_is_put_back(pruned, ours, monkeypatch):
    """Overwriting moves the old folder away before the new one takes its name."""
    before = (ours / "model.safetensors").read_bytes()
    ours.rename(ours.parent / f".out.ghostlayers-{DEAD_PID}-abc.old")

    def fail(*_):
        raise VerificationError("no")

    monkeypatch.setattr(saving, "verify", fail)
    with pytest.raises(VerificationError):
        pruned.save(ours, overwrite=True)
    assert names(ours.parent) == ["out"]
    assert (ours / "model.safetensors").read_bytes() == before


# Checkpoints that were edited


@pytest.fixture
def edited(saved, tmp_path):
    """A copy of the checkpoint, and its tensors to change."""
    folder = shutil.copytree(saved, tmp_path / "edited")
    return folder, load_file(folder / "model.safetensors")


def write_weights(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_changed_weight_is_noticed(edited, pruned):
    folder, tensors = edited
    tensors["model.layers.1.mlp.down_proj.weight"][3] += 1.0
    write_weights(folder, tensors)
    with pytest.raises(VerificationError, match=r"reloads, but its logits differ by \d") as caught:
        proof.verify(folder, pruned.model)
    assert "nothing was kept" in str(caught.value)


@pytest.mark.usefixtures("fresh_processes")
def test_a_checkpoint_that_does_not_load_is_noticed(saved, pruned, monkeypatch):
    def fail(*args, **kwargs):
        return subprocess.CompletedProcess(args, 1, "", "Traceback ...\nOSError: no weights\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(VerificationError) as caught:
        proof.verify(saved, pruned.model)
    assert str(caught.value) == (
        "the saved checkpoint does not reload in a fresh process: OSError: no weights"
    )


@pytest.mark.parametrize("logits", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_noticed(saved, pruned, monkeypatch, logits):
    def got(folder, model, ids, text):
        return {"logits": torch.full((1, 32, 256), logits)}, {}

    monkeypatch.setattr(proof, "_ask_fresh_process", got)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        proof.verify(saved, pruned.model)


def without_repair(folder, tensors):
    repairs = [name for name in tensors if ".repair_" in name]
    assert len(repairs) == 1
    write_weights(folder, {name: t for name, t in tensors.items() if name not in repairs})


def test_a_deleted_repair_makes_transformers_stop(edited):
    folder, tensors = edited
    without_repair(folder, tensors)
    with pytest.raises(RuntimeError, match=r"the checkpoint lacks '.*repair_"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_deleted_repair_makes_ghostlayers_stop(edited):
    folder, tensors = edited
    without_repair(folder, tensors)
    with pytest.raises(ModelError, match=f"cannot load the model '{folder}': the checkpoint lacks"):
        load_model(str(folder), RunOptions(device="cpu"))


def test_an_intact_copy_loads(edited):
    folder, tensors = edited
    write_weights(folder, tensors)
    loaded = load_model(str(folder), RunOptions(device="cpu"))
    repair = next(name for name in tensors if ".repair_" in name)
    assert torch.equal(loaded.network.state_dict()[repair], tensors[repair])


# Records


@pytest.mark.parametrize("content", ["{ not json", "[]", "", "\xff"])
def test_a_damaged_record_is_refused(tmp_path, content):
    path = tmp_path / "ghostlayers.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError) as caught:
        ghostlayers.inspect(tmp_path)
    assert str(caught.value).startswith(f"'{path}' cannot be read: ")


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(ModelError) as caught:
        ghostlayers.inspect(tmp_path)
    assert str(caught.value) == (
        f"'{tmp_path}' holds no ghostlayers.json: it was not made by Ghostlayers."
    )


def test_calibration_documents_are_those_of_the_record(saved, tmp_path, pruned):
    documents = records.calibration_documents(saved)
    assert documents == pruned.record["calibration"]["documents"]
    assert documents
    assert records.calibration_documents(tmp_path) is None
