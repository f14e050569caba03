"""Several processes that share a run give what one gives."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import together
from forked import Fork, Forks
from ghostlayers.errors import DistributedError
from ghostlayers.runtime import launchers, parallel
from ghostlayers.runtime.parallel import World

PROGRAM = Path(__file__).with_name("together.py")
COMMAND = Path(parallel.__file__).parents[1] / "__main__.py"
ROUNDING = 2e-5
"""Relative. Sums are float64 and agree to 1e-12; weights are rounded to float32 behind them, and
losses measured in float32 through those."""


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def start(forks: Forks, answer: Path, size: int, *more: str, **variables: str) -> list[Fork]:
    """So many processes on this machine that prune together."""
    return start_all(forks, size, PROGRAM, str(answer), *more, **variables)


def start_all(
    forks: Forks, size: int, program: Path, *arguments: str, **variables: str
) -> list[Fork]:
    """A program in so many processes, with what a launcher tells them."""
    port = str(free_port())
    processes = []
    for rank in range(size):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        environment = {
            **os.environ,
            **{name: str(value) for name, value in places.items()},
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            **variables,
        }
        processes.append(forks.start(str(program), arguments, environment))
    return processes


@pytest.fixture(scope="module")
def ours() -> Iterator[Forks]:
    """Forks of a process that has imported all that they need."""
    forks = Forks(["together"])
    yield forks
    forks.close()


def answers(
    answer: Path, processes: Sequence[Fork | subprocess.Popen[str]], seconds: float = 200
) -> Any:
    """What each of them found."""
    for process in processes:
        _, errors = process.communicate(timeout=seconds)
        assert process.returncode == 0, errors
    return [json.loads(Path(f"{answer}.{rank}").read_text()) for rank in range(len(processes))]


def assert_close(got: Any, expected: Any, where: str = "") -> None:
    """Numbers to rounding, all else exactly."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key in expected:
            assert_close(got[key], expected[key], f"{where} {key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for index, pair in enumerate(zip(got, expected, strict=True)):
            assert_close(*pair, f"{where} {index}")
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING), where
    else:
        assert got == expected, where


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    results = {name: together.found_by(case) for name, case in together.CASES.items()}
    offloaded = together.offloaded(tmp_path_factory.mktemp("models"))
    assert_close(offloaded["spans"], together.scores()["spans"])
    found = {"scores": together.scores(), "healed": together.healed()}
    return {**results, **found, "offloaded": offloaded}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_find_what_one_finds(
    tmp_path: Path, alone: dict[str, Any], ours: Forks, size: int
) -> None:
    answer = tmp_path / "found.json"
    shares = answers(answer, start(ours, answer, size))
    assert shares[0]["whole"]["removed"] == alone["whole"]["removed"]
    for rank, share in enumerate(shares):
        assert share == shares[0], f"process {rank} holds something else than the first"
    assert_close(shares[0], json.loads(json.dumps(alone)))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_one_that_dies_stops_the_others_and_the_run_goes_on(
    tmp_path: Path, alone: dict[str, Any], ours: Forks, how: str
) -> None:
    answer, keep = tmp_path / "found.json", str(tmp_path / "kept")
    seconds = "5"
    processes = start(ours, answer, 2, f"1:{how}", KEEP=keep, GHOSTLAYERS_TIMEOUT=seconds)
    began = time.monotonic()
    processes[0].communicate(timeout=120)
    assert processes[0].returncode == 3
    assert time.monotonic() - began < 60
    processes[1].kill()
    processes[1].communicate()
    said = json.loads(Path(f"{answer}.0").read_text())["error"]
    assert "process 0 of 2" in said
    assert "one of them stopped, or cannot be reached" in said
    assert "start them all again with the same command" in said
    assert list(Path(keep).glob("*-of-process-0-2.safetensors"))

    shares = answers(answer, start(ours, answer, 2, KEEP=keep))
    assert_close(shares[0]["whole"], json.loads(json.dumps(alone["whole"])))


@pytest.fixture
def two_hosts() -> Iterator[list[tuple[list[str], str]]]:
    """Two network namespaces joined by a cable: what runs a command in each, and its interface.

    They see neither each other's loopback nor this machine's network.
    """
    names = [f"ghost{os.getpid()}{side}" for side in "ab"]
    links = [f"gl{os.getpid() % 10000}{side}" for side in "ab"]
    steps = [["ip", "netns", "add", name] for name in names]
    steps.append(["ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1]])
    for number, (name, link) in enumerate(zip(names, links, strict=True)):
        inside = ["ip", "-n", name]
        steps += [
            ["ip", "link", "set", link, "netns", name],
            [*inside, "addr", "add", f"10.77.0.{number + 1}/24", "dev", link],
            [*inside, "link", "set", link, "up"],
            [*inside, "link", "set", "lo", "up"],
        ]
    try:
        for step in steps:
            try:
                subprocess.run(step, check=True, capture_output=True, timeout=10)
            except (OSError, subprocess.SubprocessError):
                pytest.skip("network namespaces cannot be made here")
        yield [
            (["ip", "netns", "exec", name], link) for name, link in zip(names, links, strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_hosts_find_what_one_process_finds(
    tmp_path: Path, alone: dict[str, Any], two_hosts: list[tuple[list[str], str]]
) -> None:
    answer = tmp_path / "found.json"
    processes = []
    for rank, (inside, link) in enumerate(two_hosts):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": link,
        }  # fmt: skip
        command = [*inside, sys.executable, str(PROGRAM), str(answer)]
        processes.append(
            subprocess.Popen(
                command,
                env={**os.environ, **variables},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    shares = answers(answer, processes)
    assert_close(shares[0], json.loads(json.dumps(alone)))


# The command line


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As `torchrun --nproc-per-node 2 -m ghostlayers ...`."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command = [sys.executable, *launcher, str(free_port()), "-m", "ghostlayers", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=variables, text=True, capture_output=True, timeout=200, check=False
    )


def command(forks: Forks, *arguments: str) -> tuple[list[int | None], str, str]:
    """The same in forks: how both ended, and what they said together."""
    both = start_all(forks, 2, COMMAND, *arguments)
    said = [process.communicate(timeout=200) for process in both]
    out, err = ("".join(part) for part in zip(*said, strict=True))
    return [process.returncode for process in both], out, err


@pytest.mark.slow
def test_the_command_line_in_two_processes(
    tmp_path: Path, tiny_folder: Path, some_text: list[str], ours: Forks
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n\n".join(some_text))
    given = ["--data", str(text), "--windows", "16", "--sequence-length", "64", "--layers", "2"]
    done = launch("prune", str(tiny_folder), "-o", str(out), *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved:") == 1
    assert done.stdout.count("Removed:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]
    ended, _, said = command(ours, "prune", str(tiny_folder), "-o", str(out), *given)
    assert ended == [1, 1]
    assert "exists already" in said
    results = tmp_path / "eval.json"
    evaluate = ["eval", str(out), "--data", str(text), "--sequence-length", "64"]
    ended, _, said = command(ours, *evaluate, "--json", str(results))
    assert ended == [0, 0], said
    assert json.loads(results.read_text())["results"][0]["num_tokens"] > 0


def test_what_is_for_one_process_is_refused(tmp_path: Path, tiny_folder: Path, ours: Forks) -> None:
    out = tmp_path / "out"
    ended, _, said = command(ours, "compare", str(tiny_folder), "--layers", "2", "-o", str(out))
    assert ended == [1, 1]
    assert "runs in one process" in " ".join(said.split())
    assert not (tmp_path / "out").exists()


# A single process


def test_alone_nothing_is_exchanged() -> None:
    total = torch.tensor([1.0, 2.0])
    parallel.add_up([total])
    assert total.tolist() == [1.0, 2.0]
    assert parallel.world() == World(0, 1)
    assert parallel.from_first("a") == "a"
    assert parallel.by_first(lambda: 3) == 3
    assert parallel.all_hold(True)
    assert not parallel.all_hold(False)
    parallel.check_same("number", 1)


def test_work_is_dealt_out_in_turn() -> None:
    dealt = [[index for index in range(7) if World(rank, 3).takes(index)] for rank in range(3)]
    assert dealt == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_program_started_by_one_of_several_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("SOMETHING", "else")
    assert parallel.launched()
    environment = launchers.alone()
    assert "WORLD_SIZE" not in environment
    assert "RANK" not in environment
    assert environment["SOMETHING"] == "else"


@pytest.mark.parametrize("text", ["soon", "0", "-3"])
def test_a_timeout_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(parallel.TIMEOUT_VARIABLE, text)
    with pytest.raises(DistributedError, match=f"GHOSTLAYERS_TIMEOUT.*'{text}'"):
        parallel.join()
