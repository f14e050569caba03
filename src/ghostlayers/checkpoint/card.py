"""The model card of a pruned checkpoint."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ghostlayers.checkpoint.record import base_title, packed_text
from ghostlayers.errors import counted
from ghostlayers.recipe.healing import HealingRecipe
from ghostlayers.runtime.files import shown_name
from ghostlayers.runtime.shown import code, markdown, one_line
from ghostlayers.spans import format_layers

_NAMES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
    bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
    cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr
    llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
    ofl-1.1 openrail openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib
    """
LICENCES = frozenset(_NAMES.split())
"""What the hub takes for the name of a licence; any other is ``other``, with a name of its own."""

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ base }} without decoder layers {{ removed }} ({{ num_removed }} of {{ num_layers }}), made by
Ghostlayers {{ version }}{{ how }}.

| | layers |
|---|---|
| removed | {{ removed }} |
| kept | {{ kept }} |

## What it costs

{{ losses }}

{% if healing %}## How it was healed

{{ healing }}

{% endif %}## How to load it

{{ loading }}

## How it was made

{{ fits }}
The recipe, the versions, the hashes of the calibration text and of the weights, and every measured
candidate are in `ghostlayers.json`.

## Licence

{{ licence }}
"""


def render_card(record: Mapping[str, Any]) -> str:
    """The card of a record as `checkpoint` writes it into ``ghostlayers.json``."""
    base = record["base_model"]
    cut = record["cut"]
    title = f"{one_line(base_title(base))}, {counted(len(cut['removed']), 'layer')} removed"
    licence, named = _licence_entries(base["licence"])
    data = ModelCardData(
        model_name=title,
        eval_results=_metrics(record) or None,
        license=licence,
        license_name=named,
        base_model=base["name"] if base["on_hub"] and _HUB_ID.match(base["name"]) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["ghostlayers", "layer-pruning", one_line(record["recipe"]["repair"])],
    )
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=markdown(title),
        base=_base_name(record),
        removed=format_layers(cut["removed"]),
        kept=format_layers(cut["kept"]),
        num_removed=len(cut["removed"]),
        num_layers=len(cut["removed"]) + len(cut["kept"]),
        version=markdown(record["versions"].get("ghostlayers", "of an unknown version")),
        how=_how(record),
        losses=loss_table(record),
        healing=_trained(record),
        loading=_loading(record),
        fits=_fits(record),
        licence=_licence(base),
    )
    return str(card.content)


_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?\Z", re.ASCII)


def _licence_entries(stated: str | None) -> tuple[str, str | None]:
    """What the card's header says of the licence, and its name where the hub knows none."""
    name = one_line(stated or "see-base-model").lower()
    if name in LICENCES:
        return name, None
    named = re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name) and name != "other"
    return "other", name if named else "see-base-model"


def _metrics(record: Mapping[str, Any]) -> list[EvalResult]:
    """The repaired model's measurements, as the hub's leaderboards read them."""
    merged = record.get("merged")
    healing = merged or record.get("healing")
    evidence, last = (healing or record)["evidence"], "healed" if healing else "repaired"
    last = merged["kept"] if merged else last
    rows = [row for row in evidence if row["model"] == last]
    if not rows:
        return []
    text = healing["held_out"] if healing else record["evidence_text"]
    corpus = one_line(shown_name(text["corpus"]))
    measured = {
        "perplexity": ("Perplexity", rows[0]["perplexity"]),
        "kl_divergence": ("KL to the dense model (nats a token)", rows[0]["kl_nats"]),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=corpus,
            dataset_name=f"{corpus}, held-out windows",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for kind, (name, value) in measured.items()
    ]


def _how(record: Mapping[str, Any]) -> str:
    repair = record["recipe"]["repair"]
    if repair == "none":
        return ", not repaired"
    trained = record.get("healing") or record.get("merged")
    after = "then trained against the dense model" if trained else "without training"
    return f", each gap repaired in closed form by `{code(repair)}`, {after}"


def loss_table(record: Mapping[str, Any]) -> str:
    """Loss, divergence and agreement on the held-out calibration windows, as Markdown."""
    evidence = record["evidence"]
    if not evidence:
        return "Not measured (no held-out windows were asked for)."
    note = (
        f"On {_windows(record['evidence_text'])} that nothing was fitted on "
        f"({markdown(record['evidence_text']['bos'])}){_decided(record)}."
    )
    return "\n".join([_loss_rows(evidence), "", note])


def _loss_rows(evidence: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        "| | loss (nats a token) | perplexity | KL to dense (nats) | same next token |",
        "|---|---|---|---|---|",
        *(
            f"| {markdown(row['model'])} | {row['loss_nats']:.3f} | {row['perplexity']:.2f} | "
            f"{row['kl_nats']:.3f} | {row['greedy_agreement']:.1%} |"
            for row in evidence
        ),
    ]
    return "\n".join(rows)


def _windows(text: Mapping[str, Any]) -> str:
    return (
        f"{text['windows']} windows of {text['sequence_length']} tokens of "
        f"`{code(shown_name(text['corpus']))}`"
    )


def _trained(record: Mapping[str, Any]) -> str:
    """What was trained, or merged of what was; nothing, where neither was done."""
    parts = [_healing(record["healing"])] if record.get("healing") else []
    if record.get("merged"):
        row = record["merged"]
        names = " and ".join(f"`{code(shown_name(p['checkpoint']))}`" for p in row["parents"])
        clauses = {"merged": f"at {row['t']:g} of the way from the first to the second"}
        said = clauses.get(
            row["kept"], f"of which the {markdown(row['kept'])} alone was kept, the better one"
        )
        parts.append(
            f"Two trained checkpoints of this cut, {names}, were merged by spherical "
            f"interpolation of every weight, {said}. Both trainings stand in `ghostlayers.json`."
        )
    return "\n\n".join(parts)


def _healing(healing: Mapping[str, Any]) -> str:
    """What was trained on what, and what it won, as Markdown."""
    corpora = ", ".join(
        f"`{code(shown_name(corpus['corpus']))}` ({corpus['share']:.0%})"
        for corpus in healing["corpora"]
    )
    text = healing["held_out"]
    whose = "another text" if text["of_another_text"] else "windows of the same text"
    trained = markdown(", ".join(healing["trained"]))
    command = f"ghostlayers heal CUT --against DENSE -o OUT {_options(healing['recipe'])}"
    return "\n\n".join(
        [
            f"Trained after the cut against the dense model: {trained} "
            f"({healing['num_trained']:,} numbers), on {healing['tokens']:,} tokens of {corpora}, "
            f"in {healing['steps']:,} steps and {healing['seconds']:,.0f} seconds "
            f"({markdown(healing['processor'])}).",
            _loss_rows(healing["evidence"]),
            f"On {_windows(text)}, {whose}, on which the best state was chosen "
            f"({markdown(text['bos'])}). The losses above are those before training.",
            f"```bash\n{command}\n```",
        ]
    )


def _options(recipe: Mapping[str, Any]) -> str:
    """What was chosen, as one would type it."""
    plain = HealingRecipe().to_dict()
    chosen = {name: value for name, value in recipe.items() if value != plain.get(name)}
    return code(
        " ".join(
            f"--{name.replace('_', '-')}"
            + ("" if value is True else f" {shlex.quote(shown_name(str(value)))}")
            for name, value in chosen.items()
        )
    )


def _decided(record: Mapping[str, Any]) -> str:
    """Whether the layers were chosen on these windows, too."""
    recipe = record["recipe"]
    chosen = recipe["remove"] is None and recipe["select"].startswith("recoverable")
    chosen = chosen or record.get("contest") is not None
    return "; the choice between the best candidates was made on them" if chosen else ""


def _loading(record: Mapping[str, Any]) -> str:
    if record["mode"] == "adapter":
        return (
            "An adapter: it holds what distinguishes the model from its base, and needs that base "
            "and the `ghostlayers` package.\n\n```python\nimport ghostlayers\n\n"
            'model = ghostlayers.from_adapter("PATH")\n```\n\n'
            "`ghostlayers materialize PATH -o OUT` writes the whole checkpoint."
        )
    if record["mode"] == "peft":
        return (
            "Adapters for the checkpoint of the cut model, which `adapter_config.json` names:\n\n"
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM"
            '\n\nmodel = AutoModelForCausalLM.from_pretrained("CUT", trust_remote_code=True)\n'
            'model = PeftModel.from_pretrained(model, "PATH")\n```'
        )
    if record["mode"] != "custom":
        opens = record.get("loads_with", "AutoModelForCausalLM")
        sees = "loads_with" in record
        reads = "AutoProcessor" if sees else "AutoTokenizer"
        return (
            "A stock checkpoint: any engine that runs the base model runs it.\n\n```python\n"
            f"from transformers import {opens}, {reads}\n\n"
            f'model = {opens}.from_pretrained("PATH")\n'
            f'{"processor" if sees else "tokenizer"} = {reads}.from_pretrained("PATH")\n```'
        )
    return (
        "The repairs need code that travels in this folder, or the `ghostlayers` package:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)\n'
        "# or, trusting the installed package instead:  import ghostlayers\n```\n\n"
        '`vllm serve "PATH" --trust-remote-code` serves it; the flag is not needed where '
        "`ghostlayers` is installed beside vLLM."
    )


def contest_lines(record: Mapping[str, Any]) -> list[str]:
    """Which repair held-out windows chose, why, and what the others lose, as Markdown."""
    contest = record.get("contest")
    if contest is None:
        return []
    tried = ", ".join(
        f"`{code(contestant['repair'])}` {contestant['loss_nats']:.3f}"
        for contestant in contest["contestants"]
    )
    return [
        f"- The repair was chosen on held-out windows: `{code(contest['winner'])}`, because "
        f"{markdown(contest['reason'])}. Losses there (dense {contest['dense_loss_nats']:.3f}): "
        f"{tried}."
    ]


def _budget(budget: Mapping[str, Any]) -> Iterator[str]:
    """What a budget asked for, what was chosen for it, and what quantising would have done."""
    yield f"- Asked for: `{code(budget['asked'])}`. {markdown(' '.join(budget['said']))}"
    other = budget.get("quantising")
    if other:
        yield (
            f"- For the same budget the whole model in {markdown(other['type'].upper())} has a "
            f"loss of {other['loss_nats']:.3f} on {other['windows']} held-out windows, this one "
            f"{other['cut_loss_nats']:.3f}."
        )


def _fits(record: Mapping[str, Any]) -> str:
    lines = [*_budget(record["budget"])] if record.get("budget") else []
    lines += contest_lines(record)
    for fit in record["repairs"]:
        start, stop = fit["span"]
        condition, left = fit["condition_number"], fit["relative_residual"]
        lines.append(
            f"- Gap [{start}, {stop}): `{code(fit['method'])}` on {fit['num_tokens']:,} tokens"
            + ("" if left is None else f" leaves {left:.1%} of the discrepancy")
            + ("" if condition is None else f" (condition number {condition:.1e})")
            + "."
        )
    if record.get("packed"):
        lines.append(f"- {markdown(packed_text(record['packed']))}")
    return "\n".join(lines) + "\n"


def _base_name(record: Mapping[str, Any]) -> str:
    base = record["base_model"]
    method, name = base.get("quantized"), markdown(base_title(base))
    is_plain = method and not record.get("packed")
    return f"{name} (its weights expanded from {markdown(method)})" if is_plain else name


def _licence(base: Mapping[str, Any]) -> str:
    name = markdown(base_title(base))
    if base["licence"]:
        return f"That of the base model, {name}: {markdown(base['licence'])}."
    return f"The base model, {name}, states none in its folder: its terms apply to this one too."
