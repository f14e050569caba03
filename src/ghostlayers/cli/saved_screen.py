"""What was saved, and what is known of it, on the screen."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostlayers.checkpoint.gguf_saving import SavedGguf
from ghostlayers.checkpoint.hub import Upload
from ghostlayers.checkpoint.proof import Verification, mode_of
from ghostlayers.checkpoint.record import packed_text
from ghostlayers.checkpoint.records import inspect
from ghostlayers.cli.scores_screen import show_contest
from ghostlayers.cli.screen import bold, duration, loss_cells, say, table, warn
from ghostlayers.pruned import PrunedModel
from ghostlayers.recipe.wish import is_packed
from ghostlayers.runtime.files import shown_name
from ghostlayers.spans import format_layers

if TYPE_CHECKING:
    from ghostlayers.checkpoint.quantise import Made


LOSSES = ("", "loss", "perplexity", "KL to dense", "agreement")


def show_adapter(pruned: PrunedModel, out_folder: Path, verification: Verification) -> None:
    """Where the adapter lies, how large it is, and what to do next."""
    size = sum(path.stat().st_size for path in out_folder.iterdir()) / 1e6
    place = str(out_folder)
    say("Saved: ", bold(place), f", {size:.1f} MB; the model made of it again has logits")
    say(f"{_equality(verification)}.")
    say()
    say("Next:")
    say(f'  ghostlayers.from_adapter("{place}")   # needs {pruned.dense.base.name}')
    say(f"  ghostlayers materialize {place} -o {place}-whole")


def show_upload(upload: Upload) -> None:
    """What was sent to the hub, or would be."""
    width = max(map(len, upload.files))
    for name, size in upload.files.items():
        say(f"  {name.ljust(width)}  {size / 1e6:10,.2f} MB")
    if upload.left:
        say(f"Not part of the model, and not sent: {', '.join(upload.left)}")
    total = sum(upload.files.values()) / 1e6
    if upload.url is None:
        say(f"{total:,.2f} MB would go to {upload.repo}; nothing was sent. Its card:")
        say(upload.card)
        return
    say(f"{total:,.2f} MB sent: {upload.url}")


def show_exported(file: Path) -> None:
    """Where the GGUF file lies, and how to use it."""
    size = file.stat().st_size / 1e6
    say("Saved: ", bold(file), f", {size:,.0f} MB, every tensor read again and equal.")
    small = file.with_name(f"{file.stem}-q4_k_m.gguf")
    say()
    say("Next:")
    say(f'  llama-cli -m {file} -p "..."')
    say(f"  llama-quantize {file} {small} Q4_K_M")


def show_copied(pruned: PrunedModel, saved: SavedGguf) -> None:
    """Where a file lies that was copied without some layers, and what was encoded anew in it."""
    if saved.types:
        counts = Counter(saved.types.values())
        changed = ", ".join(
            f"{count} from {before} to {after}" if before != after else f"{count} in {after}"
            for (before, after), count in counts.items()
        )
        say(f"Encoded anew, as the repair changed them: {changed}. All else is copied.")
    if saved.encoded is not None:
        before = pruned.evidence.get("repaired", pruned.evidence["cut"])
        say(
            f"Loss as the file is read: {saved.encoded.loss_nats:.3f} "
            f"(before its types rounded: {before.loss_nats:.3f}), "
            f"KL to dense {saved.encoded.kl_nats:.3f}."
        )
    count = f" in {len(saved.paths)} files" if len(saved.paths) > 1 else ""
    proof = f"read again, logits {_equality(saved.verification)}."
    say("Saved: ", bold(saved.paths[0]), f", {saved.size / 1e6:,.0f} MB{count}, {proof}")
    say()
    say("Next:")
    say(f'  llama-cli -m {saved.paths[0]} -p "..."')
    say(f"  ghostlayers eval {saved.paths[0]} --against {pruned.dense.base.name} --data wikitext2")


def show_family(made: "Iterable[Made]", command: str | None) -> None:
    """Every file as it comes: how large it is, and which types its tensors have."""
    for file in made:
        types = ", ".join(f"{count} {kind}" for kind, count in file.tensors.items())
        held = f"tensors: {types}" if types else "mean squares of what is multiplied"
        say("Saved: ", bold(file.path), f", {file.size_bytes / 1e6:,.1f} MB; {held}.")
    if command is not None:
        say()
        say("Further types with the same importance matrix, by llama.cpp's own program:")
        say(f"  {command}")


def show_materialized(out_folder: Path, verification: Verification) -> None:
    """Where the checkpoint lies, and how it was proved."""
    proof = f", reloaded in a fresh process, logits {_equality(verification)}"
    if verification.packed is not None:
        proof += f" expanded, to {verification.packed:.1e} as transformers reads it packed"
    say("Saved: ", bold(out_folder), f"{proof}.")


def _equality(verification: Verification) -> str:
    if verification.identical:
        return "equal bit for bit"
    return f"within {verification.largest_difference:.1e}"


ENGINES = {
    "stock": "A stock checkpoint: whatever runs the base model runs it (transformers, vLLM, "
    "llama.cpp, ...), with no flag.",
    "custom": "A custom checkpoint: transformers and vLLM run it, with trust_remote_code or with "
    "ghostlayers installed (in transformers, imported). For llama.cpp and others choose --for "
    "llama.cpp.",
}
"""Who loads a checkpoint of either kind."""


def show_saved(pruned: PrunedModel, out_folder: Path, verification: Verification) -> None:
    """Where the checkpoint lies, how it was proved, and what to do next."""
    show_materialized(out_folder, verification)
    saved = inspect(out_folder)
    if saved.get("packed"):
        say(packed_text(saved["packed"]))
    stock = mode_of(pruned.model) == "stock"
    trust = "" if stock else ", trust_remote_code=True"
    say(ENGINES["stock" if stock else "custom"])
    say()
    say("Next:")
    opens = pruned.record.get("loads_with", "AutoModelForCausalLM")
    say(f'  {opens}.from_pretrained("{out_folder}"{trust})')
    base = pruned.dense.base.name
    say(f"  ghostlayers eval {out_folder} --against {base} --data wikitext2")
    budget = pruned.decision
    if budget is not None and budget.counted == "seconds":  # what was foreseen can be measured
        place = f"--batch {budget.figures['batch']} --length {budget.figures['length']}"
        say(f"  ghostlayers bench {out_folder} --against {base} {place}")
    if budget is not None and is_packed(budget.figures.get("type")):  # what was counted
        kind = budget.figures["type"].upper()
        say(f"  ghostlayers export {out_folder} --gguf {out_folder}-{kind}.gguf --type {kind}")
    say(f"  ghostlayers inspect {out_folder}")


def show_healing(row: Mapping[str, Any]) -> None:
    """A record's entry of a training."""
    text = row["held_out"]
    corpora = ", ".join(
        f"{shown_name(corpus['corpus'])} ({corpus['share']:.0%})" for corpus in row["corpora"]
    )
    say(
        f"Trained {' + '.join(row['trained'])} ({row['num_trained']:,} numbers) on "
        f"{row['tokens']:,} tokens of {corpora}, {row['steps']:,} steps, in "
        f"{duration(row['seconds'])}."
    )
    rates = row.get("learning_rates", {})  # files of older versions say none
    if rates:
        say(
            "Learning rates: ", ", ".join(f"{part} {rate:.2g}" for part, rate in rates.items()), "."
        )
    rows = [[loss["model"], *loss_cells(loss)] for loss in row["evidence"]]
    table(LOSSES, rows, f"On {text['windows']} held-out windows of {shown_name(text['corpus'])}")
    dense, before, healed = (loss["loss_nats"] for loss in row["evidence"])
    if before > dense:
        say(f"Left of what was lost: {(healed - dense) / (before - dense):.0%}.")
    if row["best_step"] < row["steps"]:
        say(f"The best state was that behind step {row['best_step']:,}.")


def show_merged(row: Mapping[str, Any]) -> None:
    """A record's entry of a merge of two healed checkpoints."""
    names = {
        who: shown_name(parent["checkpoint"])
        for who, parent in zip(("first", "second"), row["parents"], strict=True)
    }
    both = " and ".join(f"{name} ({who})" for who, name in names.items())
    say(f"Merged {both}, at {row['merged_at']:g} of the way.")
    text = row["held_out"]
    rows = [[loss["model"], *loss_cells(loss)] for loss in row["evidence"]]
    table(LOSSES, rows, f"On {text['windows']} held-out windows of {shown_name(text['corpus'])}")
    best = min(row["tried"], key=lambda trial: float(trial["kl_nats"]))
    if row["kept"] != "merged":
        name = names.get(row["kept"], row["kept"])
        warn(
            f"the {row['kept']} alone is nearer to the dense model than anything between, so what "
            f"is kept is {name} as it was."
        )
    elif best["model"] != "merged":
        name = names.get(best["model"], best["model"])
        warn(
            f"{name} alone is nearer to the dense model than what was merged, which is kept "
            "because of --slerp; 'auto' would keep the former."
        )


def show_record(record: Mapping[str, Any]) -> None:
    """A checkpoint's record."""
    base, cut, recipe = record["base_model"], record["cut"], record["recipe"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    say(
        "Base model: ", bold(base["name"]), f"{revision}, licence {base['licence'] or 'not stated'}"
    )
    say("Removed: layers ", bold(format_layers(cut["removed"])))
    say("Kept:    layers ", bold(format_layers(cut["kept"])))
    chosen = "named by the user" if recipe["remove"] else f"chosen by {recipe['select']}"
    chosen += ", one at a time" if recipe.get("iterative") else ""
    say(f"Layers {chosen}; checkpoint mode: {record['mode']}")
    if record.get("budget"):
        say(bold(record["budget"]["asked"]), f": {record['budget']['said'][0]}")
    if record.get("packed"):
        say(packed_text(record["packed"]))
    rows = [
        [
            f"[{fit['span'][0]}, {fit['span'][1]})",
            fit["method"],
            f"{fit['num_tokens']:,}",
            "" if fit["relative_residual"] is None else f"{fit['relative_residual']:.3f}",
            "" if fit["condition_number"] is None else f"{fit['condition_number']:.1e}",
        ]
        for fit in record["repairs"]
    ]
    table(("gap", "repair", "fit tokens", "relative residual", "condition number"), rows)
    if record["evidence"]:
        losses = [[row["model"], *loss_cells(row)] for row in record["evidence"]]
        table(LOSSES, losses, "On held-out calibration windows")
    if record.get("contest"):
        show_contest(record["contest"])
    if record.get("healing"):
        show_healing(record["healing"])
    if record.get("merged"):
        show_merged(record["merged"])
    text = record["calibration"]
    say(
        f"Calibrated on {text['fit_windows']} of {text['windows']} windows of "
        f"{text['sequence_length']} tokens ({text['bos']}) of {text['corpus']}, "
        f"{len(text['documents'])} documents"
    )
    made_with = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    say(f"Made on {record['created']} with {made_with}")
