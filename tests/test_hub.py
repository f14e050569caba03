"""Sharing, against a small stand-in for the hub on this machine."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import ghostlayers
from ghostlayers.checkpoint import saving
from ghostlayers.checkpoint.hub import push
from ghostlayers.checkpoint.proof import Verification
from ghostlayers.errors import ModelError, OutputError
from ghostlayers.runtime import outputs
from ghostlayers.runtime.files import shown_name


class Hub(ThreadingHTTPServer):
    """Takes commits whose files all come inline."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.summary = ""
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer secret" or self.server.refuses:
            self.answer(403, {"error": "this token may not write here"})
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self.answer(200, {"url": f"{self.server.url}/someone/small"})
        elif self.path == "/api/validate-yaml":  # of the card
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in files
            ]
            self.answer(200, {"files": modes})
        elif self.path.endswith("/commit/main"):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.server.summary = entry["value"]["summary"]
                elif entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[entry["value"]["path"]] = content
            url = f"{self.server.url}/someone/small/commit/abc"
            self.answer(200, {"commitUrl": url, "commitOid": "abc", "hookOutput": ""})
        else:
            self.answer(404, {"error": self.path})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(
    trained_llama: Any, byte_tokenizer: Any, some_text: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:  # fmt: skip
    monkeypatch.setattr(saving, "verify", lambda *_: Verification(True, 0.0, 32))
    pruned = ghostlayers.prune(
        trained_llama, remove="2-3", windows=8, sequence_length=64, held_out_windows=2,
        tokenizer=byte_tokenizer, data=some_text,
    )  # fmt: skip
    pruned.save(tmp_path / "small")
    return tmp_path / "small"


def test_everything_arrives_in_one_commit(folder: Path, hub: Hub) -> None:
    upload = push(folder, "someone/small", private=True, endpoint=hub.url, token="secret")
    assert upload.url == f"{hub.url}/someone/small/commit/abc"
    assert hub.made[0]["name"] == "small"
    assert hub.made[0]["organization"] == "someone"
    assert hub.summary == "Remove 2 decoder layers, repaired by ghost"
    assert hub.files.keys() == {path.name for path in folder.iterdir()} == upload.files.keys()
    assert upload.left == ()
    for path in folder.iterdir():
        if path.name not in {"README.md", "ghostlayers.json"}:
            assert hub.files[path.name] == path.read_bytes()
    card = hub.files["README.md"].decode()
    assert 'from_pretrained("someone/small", trust_remote_code=True)' in card
    assert '"PATH"' not in card


def test_what_is_no_part_of_a_model_stays_here(folder: Path, hub: Hub) -> None:
    for name in (".env", "notes.txt", "train.py"):
        (folder / name).write_text("secret")
    (folder / "LICENSE").write_text("Apache-2.0")
    upload = push(folder, "someone/small", endpoint=hub.url, token="secret")
    assert upload.left == (".env", "notes.txt", "train.py")
    assert not set(upload.left) & hub.files.keys()
    assert {"LICENSE", "config.json", "tokenizer.json", "modeling_ghostlayers.py"} <= set(hub.files)


def test_nobody_learns_where_files_lay(folder: Path, hub: Hub) -> None:
    record = json.loads((folder / "ghostlayers.json").read_text())
    record["base_model"]["name"] = "/home/somebody/models/base"
    record["recipe"]["data"] = "~/texts/a.txt+../b.parquet"
    (folder / "ghostlayers.json").write_text(json.dumps(record))
    push(folder, "someone/small", endpoint=hub.url, token="secret")
    sent = json.loads(hub.files["ghostlayers.json"])
    assert sent["base_model"]["name"] == "base"
    assert sent["recipe"]["data"] == "a.txt+b.parquet"
    record["base_model"]["name"], record["recipe"]["data"] = "base", "a.txt+b.parquet"
    assert sent == record


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/a/b c/d.txt", "d.txt"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("wikitext2", "wikitext2"),
        ("./x,/y/z", "x,z"),
        ("/", "/"),
    ],
)
def test_shown_name(given: str, shown: str) -> None:
    assert shown_name(given) == shown


def test_a_hub_that_is_not_there(folder: Path) -> None:
    with pytest.raises(OutputError, match="the hub refused 'someone/small'"):
        push(folder, "someone/small", endpoint="http://127.0.0.1:9", token="secret")
    (folder / "README.md").unlink()
    with pytest.raises(ModelError, match=r"README.md' is missing"):
        push(folder, "someone/small", dry_run=True)


def test_the_card_tells_metrics_as_the_hub_reads_them(folder: Path) -> None:
    record = ghostlayers.inspect(folder)
    (repaired,) = [row for row in record["evidence"] if row["model"] == "repaired"]
    data = ModelCard.load(folder / "README.md").data
    found = {each.metric_type: each.metric_value for each in data.eval_results}
    assert found["perplexity"] == pytest.approx(repaired["perplexity"], abs=1e-4)
    assert found["kl_divergence"] == pytest.approx(repaired["kl_nats"], abs=1e-4)
    assert {each.task_type for each in data.eval_results} == {"text-generation"}


def test_a_rehearsal_sends_nothing(folder: Path, hub: Hub) -> None:
    upload = push(folder, "someone/small", dry_run=True, endpoint=hub.url, token="secret")
    assert upload.url is None
    assert upload.files["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert '"someone/small"' in upload.card
    assert not hub.made
    assert not hub.files


def test_what_cannot_be_shared_is_refused(folder: Path, hub: Hub, tmp_path: Path) -> None:
    def refuse(error: type[Exception], match: str, path: Path, repo: str) -> None:
        with pytest.raises(error, match=match):
            push(path, repo, endpoint=hub.url, token="secret")
        assert not hub.files

    refuse(ModelError, "not made by Ghostlayers", tmp_path, "someone/small")
    refuse(OutputError, "no repository id", folder, "some one/small")
    hub.refuses = True
    refuse(OutputError, r"the hub refused 'someone/small': .*403", folder, "someone/small")
    hub.refuses = False
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    refuse(ModelError, "changed after it was made", folder, "someone/small")
    weights.unlink()
    refuse(ModelError, "is missing", folder, "someone/small")


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="LICENSE' is a link out of the folder"):
        push(folder, "someone/small", endpoint=hub.url, token="secret")
    assert not hub.files


def list_all_files(folder: Path) -> None:
    """Have the record vouch for every file that was written, as newer ones do."""
    record = json.loads((folder / "ghostlayers.json").read_text())
    paths = [
        each for each in folder.iterdir() if each.name not in {"README.md", "ghostlayers.json"}
    ]
    record["files"] = {each.name: outputs.file_hash(each) for each in paths}
    (folder / "ghostlayers.json").write_text(json.dumps(record))


@pytest.mark.parametrize("name", ["config.json", "modeling_ghostlayers.py", "tokenizer.json"])
def test_what_was_changed_is_not_sent(name: str, folder: Path, hub: Hub) -> None:
    list_all_files(folder)
    push(folder, "someone/small", endpoint=hub.url, token="secret", dry_run=True)
    path = folder / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ModelError, match=f"{name}' is not the file that its record describes"):
        push(folder, "someone/small", endpoint=hub.url, token="secret")
    assert not hub.files


@pytest.mark.parametrize("name", ["tokenizer.py", "tokenizer.pkl", "extra.safetensors"])
@pytest.mark.parametrize("newer", [True, False])
def test_what_was_added_is_not_sent(name: str, newer: bool, folder: Path, hub: Hub) -> None:
    if newer:
        list_all_files(folder)
    (folder / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=f"does not vouch for '.*{name}'"):
        push(folder, "someone/small", endpoint=hub.url, token="secret")
    assert not hub.files


def test_older_records_vouch_for_weights_alone(folder: Path, hub: Hub) -> None:
    record = json.loads((folder / "ghostlayers.json").read_text())
    record["files"] = {n: h for n, h in record["files"].items() if n.endswith(".safetensors")}
    (folder / "ghostlayers.json").write_text(json.dumps(record))
    push(folder, "someone/small", endpoint=hub.url, token="secret", dry_run=True)
    code, config = folder / "modeling_ghostlayers.py", folder / "config.json"
    known = code.read_bytes()
    code.write_bytes(known + b"\nimport os\n")
    with pytest.raises(ModelError, match="does not vouch for"):
        push(folder, "someone/small", endpoint=hub.url, token="secret")
    code.write_bytes(known)
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "auto_map": {"AutoModel": "evil--repo.Evil"}}))
    with pytest.raises(ModelError, match="names code that is not this package's"):
        push(folder, "someone/small", endpoint=hub.url, token="secret")
    assert not hub.files


def test_nothing_that_is_sent_names_a_folder_of_this_machine(folder: Path, hub: Hub) -> None:
    push(folder, "someone/small", message="two\nlines\x1b[0m", endpoint=hub.url, token="secret")
    assert hub.summary == "two lines[0m"
    for name, content in hub.files.items():
        if not name.endswith((".safetensors", "tokenizer.json")):
            for place in (str(folder.parent), str(Path.home())):
                assert place not in content.decode(), name
