"""Load a repaired checkpoint by the code in it, and save it again. Run as a program.

usage: python saver.py CHECKPOINT FOLDER

It imports transformers, never ghostlayers.
"""

import sys
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM


def main(checkpoint: str, out: str) -> None:
    place = Path(out)
    AutoConfig.from_pretrained(checkpoint, trust_remote_code=True).save_pretrained(place / "config")
    AutoModel.from_pretrained(checkpoint, trust_remote_code=True)  # it marks the class as its own
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    model.save_pretrained(place / "once-repaired")
    model = AutoModelForCausalLM.from_pretrained(place / "once-repaired", trust_remote_code=True)
    model.save_pretrained(place / "twice-repaired")
    model.save_pretrained(place / "twice-repaired")
    assert "ghostlayers" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])
