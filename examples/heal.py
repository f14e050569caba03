"""Cut a model, and train what is left for a minute: only what pays, kept only if it is better.

python examples/heal.py                           # SmolLM2-135M, from the package index
python examples/heal.py --model MODEL --data text.txt --minutes 5
"""

import argparse

import ghostlayers
from ghostlayers.demo.model import demo_model
from ghostlayers.demo.reference_text import split_topics

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a folder, a hub id or a .gguf file [default: SmolLM2-135M]")
parser.add_argument("--data", help="a text of yours [default: the reference that Python carries]")
parser.add_argument("--layers", type=int, default=7, help="how many go [default: 7]")
parser.add_argument("--minutes", type=float, default=1.0, help="of training [default: 1]")
parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a window [256]")
parser.add_argument("--out", default="healed", help="the folder to make [default: healed]")
given = parser.parse_args()

text = given.data or list(split_topics()[0].documents)
pruned = ghostlayers.prune(
    given.model or str(demo_model()),
    layers=given.layers,
    repair="joint:x+z",  # the best start for training where an operator may stay
    data=text,
    windows=32,
    sequence_length=given.sequence_length,
)
healed = ghostlayers.heal(
    pruned, data=text, minutes=given.minutes, sequence_length=given.sequence_length
)
for look in healed.outcome.looks:  # the first before training; the best state is kept
    print(f"step {look.step}: {look.losses.loss_nats:.3f} nats a token on held-out text")
if healed.better:
    healed.save(given.out)
    print(f"saved: {given.out}")
else:
    print("no better than before, so nothing is saved: give it more minutes or other text")
