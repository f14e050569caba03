"""Variables of the environment, and what a shell completes: each in a process of its own."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ghostlayers.cli import app

COMMIT = "a" * 40
NAME = "someone/tiny"


class Hub(ThreadingHTTPServer):
    """A hub of one private model, on this machine."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.tokens: set[str | None] = set()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        token = self.headers.get("Authorization")
        self.server.tokens.add(token)
        path = self.path.partition("?")[0]
        if token != "Bearer secret":
            self.answer(401, b"{}")
        elif path.startswith(f"/api/models/{NAME}/tree"):
            files = [
                {"type": "file", "path": each.name, "size": each.stat().st_size, "oid": each.name}
                for each in self.server.folder.iterdir()
            ]
            self.answer(200, json.dumps(files).encode())
        elif path.startswith(f"/api/models/{NAME}"):
            names = [{"rfilename": each.name} for each in self.server.folder.iterdir()]
            about = {"_id": "1", "id": NAME, "sha": COMMIT, "private": True, "siblings": names}
            self.answer(200, json.dumps(about).encode())
        elif path.startswith(f"/{NAME}/resolve/"):
            file = self.server.folder / path.rpartition("/")[2]
            self.answer(200, file.read_bytes()) if file.is_file() else self.answer(404, b"{}")
        else:
            self.answer(404, b"{}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{self.path.rpartition("/")[2]}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tiny_folder: Path) -> Iterator[Hub]:
    server = Hub(tiny_folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The program, with no other variable of the hub or of ours than those given."""
    theirs = ("HF_", "HUGGING_FACE", "GHOSTLAYERS_")
    kept = {name: each for name, each in os.environ.items() if not name.startswith(theirs)}
    command = [sys.executable, "-m", "ghostlayers", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**kept, **variables}
    )


@pytest.mark.slow
def test_models_are_fetched_with_the_users_token_into_the_users_cache(
    hub: Hub, some_text: list[str], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(some_text))
    evaluate = ["eval", NAME, "--data", str(tmp_path / "text.txt"), "--max-windows", "1"]
    evaluate += ["--sequence-length", "64"]
    url = f"http://127.0.0.1:{hub.server_address[1]}"
    home = {"HF_HOME": str(tmp_path / "home")}
    done = call(*evaluate, HF_ENDPOINT=url, HF_TOKEN="secret", **home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Bearer secret" in hub.tokens  # without it, nothing is handed out
    snapshot = tmp_path / "home" / "hub" / "models--someone--tiny" / "snapshots" / COMMIT
    assert (snapshot / "model.safetensors").is_file()
    hub.tokens.clear()
    offline = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "1"}
    again = call(*evaluate, **offline, **home)
    assert again.returncode == 0, again.stdout + again.stderr
    empty = call(*evaluate, **offline, HF_HOME=str(tmp_path / "empty"))
    assert empty.returncode == 1
    assert "the model is not on this machine yet" in " ".join(empty.stderr.split())
    assert not hub.tokens  # nobody asked it


def measured(tmp_path: Path, *command: str, **variables: str) -> tuple[int, str, str]:
    """Exit status, what was said, and the type that a grid was measured in."""
    out = tmp_path / "speed.json"
    done = CliRunner().invoke(app, [*command], env=variables)
    found = json.loads(out.read_text())["dtype"] if out.exists() else ""
    out.unlink(missing_ok=True)
    return done.exit_code, " ".join(done.output.split()), found


@pytest.mark.parametrize("by_recipe", [False, True])
def test_variables_stand_in_for_options_and_options_win(
    by_recipe: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    grid = {"batch": "1", "length": "8", "new-tokens": 1, "repeats": 1}
    options = {**grid, "json": str(tmp_path / "speed.json")}

    def bench(given: dict[str, str], variable: str) -> tuple[int, str, str]:
        if by_recipe:
            recipe = {"command": "bench", "model": str(tiny_folder), **options, **given}
            (tmp_path / "bench.yaml").write_text(yaml.safe_dump(recipe))
            command = ["run", str(tmp_path / "bench.yaml")]
        else:
            typed = [f"--{name}={each}" for name, each in {**options, **given}.items()]
            command = ["bench", str(tiny_folder), *typed]
        return measured(tmp_path, *command, GHOSTLAYERS_DTYPE=variable)

    assert bench({}, "bfloat16")[2] == "bfloat16"
    assert bench({}, "")[2] == "float32"
    assert bench({"dtype": "float32"}, "bfloat16")[2] == "float32"
    status, said, _ = bench({}, "float8")
    assert status in {1, 2}
    assert "float8" in said
    assert "bfloat16" in said


def test_help_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = CliRunner().invoke(app, ["prune", "--help"]).output
    assert all(f"GHOSTLAYERS_{each}" in said for each in ("DTYPE", "DEVICE", "MAX_MEMORY"))


def completed(*words: str) -> list[str]:
    """What bash is told of a line that ends with these words."""
    line = {"COMP_WORDS": " ".join(["ghostlayers", *words]), "COMP_CWORD": str(len(words))}
    done = call(_GHOSTLAYERS_COMPLETE="complete_bash", **line)
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_a_shell_completes_commands_options_and_choices() -> None:
    assert completed("pr") == ["prune"]
    assert completed("prune", "model", "--off") == ["--offload"]
    assert completed("prune", "model", "--dtype", "b") == ["bfloat16"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_and_installed_for_the_program_by_its_name(
    shell: str, tmp_path: Path
) -> None:
    variables = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = call("--show-completion", shell, **variables)
    assert shown.returncode == 0, shown.stderr
    assert f"_GHOSTLAYERS_COMPLETE=complete_{shell}" in shown.stdout
    installed = call("--install-completion", shell, **variables)
    assert installed.returncode == 0, installed.stderr
    files = [each for each in tmp_path.rglob("*") if each.is_file()]
    assert any("_GHOSTLAYERS_COMPLETE" in each.read_text() for each in files)
