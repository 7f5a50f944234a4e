"""Model card: README.md of an exported model, with its data, recipe, scores, lineage, limitations and use."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerBase

from gpt2lab.data.pair_template import PairTemplate
from gpt2lab.number_format import significant
from gpt2lab.reports.card_metadata import Score, card_license, distillation_scores, languages, metadata, scores
from gpt2lab.reports.card_usage import FOLDER, usage
from gpt2lab.reports.lineage import Ancestor
from gpt2lab.storage.atomic_files import write_text
from gpt2lab.storage.model_folder import read_objective, read_pair_template

STEPS = "steps"  # fact of the card: optimizer steps of the exported weights
FILE = "README.md"
TRAINED = {"pretrain": "pretrained", "distill": "distilled", "finetune": "fine-tuned"}  # by task
ABSOLUTE = re.compile(r"""(?:(?<=^)|(?<=[=,\["']))/[^,"'\]]*""")  # path of a value, a list of values or a quoted one
OPTIMAL_TOKENS = 20  # for each parameter, Hoffmann et al. 2022
FEW_DOCUMENTS = 30


def write_card(folder: Path, facts: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the card of the model in a Hugging Face folder; arguments as for `model_card`."""
    stored = read_pair_template(folder)
    template = PairTemplate(**stored) if stored else None
    write_text(folder / FILE, model_card(facts, read_objective(folder), tokenizer, template))


def model_card(
    facts: Mapping[str, Any], objective: str, tokenizer: PreTrainedTokenizerBase, template: PairTemplate | None
) -> str:
    """Return the text of the card; sections without a fact are left out.

    Args:
        facts: content of report.json as far as it is known, with the fields of launch/run/card_facts.py; "title"
            becomes the heading.
        template: prompt template of a model trained on pairs; None: a model that continues text.
    """
    title, source = facts.get("title", "GPT-2"), facts.get("repository") or FOLDER
    sections = {
        "Use": usage(source, facts.get("revision") or "", objective, tokenizer, template),
        "Data": _data(facts, template is not None),
        "Recipe": _recipe(facts),
        "Evaluation": _evaluation(facts),
        "Lineage": _lineage(facts, title),
        "Limitations": _limitations(facts, template),
        "License": _license(facts),
    }
    written = [f"## {name}\n\n{text.strip()}" for name, text in sections.items() if text]
    body = "\n\n".join([f"# {title}", _summary(facts), *written])
    header = metadata(facts, objective).to_yaml()
    return str(ModelCard(f"---\n{header}\n---\n\n{body}\n"))  # parses the metadata, and raises if it is not valid


def read_step(folder: Path) -> int | None:
    """Return the optimizer step of a folder's weights from its card; None if that names none."""
    try:
        found = re.search(rf"^- {STEPS}: (\d{{1,18}})$", (folder / FILE).read_text("utf-8"), re.ASCII | re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return int(found[1]) if found else None


def _summary(facts: Mapping[str, Any]) -> str:
    """Return the list of main facts; `read_step` reads its line of steps."""
    named = {
        "parameters": _count(facts.get("parameters")),
        STEPS: str(facts[STEPS]) if facts.get(STEPS) is not None else "",
        "target tokens trained on": _count(facts.get("tokens_seen")),
        "languages": ", ".join(languages(facts)),
        "trained with": "gpt2-lab",
    }
    return _list(f"{name}: {value}" for name, value in named.items() if value)


def _data(facts: Mapping[str, Any], are_pairs: bool) -> str:
    data, datasets = facts.get("data") or {}, facts.get("datasets") or []
    if not data:
        return ""
    named = {
        "name": data.get("name", ""),
        "tokens for training": _count(data.get("tokens")),
        "hash": f"`{data.get('hash')}`, the first 16 digits of the SHA-256 of "
        + (
            "the pairs, template, tokenizer and context" if are_pairs else "the tokens of training and validation split"
        ),
        "overlap": _overlap(data.get("val_overlap")),
    }
    hub = [
        f"Hub data set: [{one['id']}](https://huggingface.co/datasets/{one['id']})"
        + "".join(f", {key} `{one[key]}`" for key in ("config", "split", "revision") if one.get(key))
        for one in datasets
    ]
    return _list([*(f"{name}: {value}" for name, value in named.items() if value), *hub])


def _overlap(share: float | None) -> str:
    if share is None:
        return ""
    return f"{share:.1%} of the 13-grams of the validation text also occur in the training text"


def _recipe(facts: Mapping[str, Any]) -> str:
    recipe, command = facts.get("recipe") or {}, str(facts.get("command") or "")
    parts = [_table(("setting", "value"), recipe.items())] if recipe else []
    if command:
        parts.append(f"```bash\n{without_local_paths(command)}\n```")
    if continued := facts.get("continued_with"):
        parts.append(f"Continued with `{shlex.join(continued)}`.")
    versions = facts.get("versions") or {}
    if versions:
        names = [f"{name} {versions[name]}" for name in ("python", "torch", "lightning", "transformers")]
        names += [f"gpt2-lab {git['commit'][:12]}"] if (git := facts.get("git")) else []
        parts.append(f"Software: {', '.join(names)}.")
    return "\n\n".join(parts)


def without_local_paths(command: str) -> str:
    """Return a command whose absolute paths are relative to the working folder, or reduced to their last name."""

    def public(found: re.Match[str]) -> str:
        path, here = Path(found[0]), Path.cwd()
        if len(path.parts) < 2:
            return found[0]
        return str(path.relative_to(here)) if path.is_relative_to(here) else f".../{path.name}"

    return shlex.join(ABSOLUTE.sub(public, word) for word in shlex.split(command))


def _evaluation(facts: Mapping[str, Any]) -> str:
    found, against_teacher = scores(facts), distillation_scores(facts)
    parts = []
    if found:
        tokens, documents = facts.get("val_tokens"), facts.get("val_documents")
        parts.append(_table(("score", "value", "standard error", "on"), (_row(one, facts) for one in found)))
        if tokens:
            where = f" in {documents:,} groups of documents" if documents else ""
            parts.append(
                f"The validation split has {tokens:,} target tokens{where}. Standard errors are those of the sampling "
                "of documents (jackknife; bootstrap for scores of generated text); they do not include that of the "
                "training."
            )
    if against_teacher:
        parts.append(
            "Against the teacher, on the validation split:\n\n"
            + _table(("score", "value"), ((one.name, significant(one.value)) for one in against_teacher))
        )
    return "\n\n".join(parts)


def _row(score: Score, facts: Mapping[str, Any]) -> tuple[str, str, str, str]:
    where = score.benchmark
    if not where and score.tokens:
        where = f"{score.tokens:,} tokens of the validation split"
    if score.benchmark and facts.get("benchmark_limit"):
        where = f"{score.benchmark}, at most {facts['benchmark_limit']:,} examples"
    error = "" if score.error is None else f"± {significant(score.error, 2)}"
    return score.name, f"{score.value:.4g}", error, where or "validation split"


def _lineage(facts: Mapping[str, Any], title: str) -> str:
    ancestors: Sequence[Ancestor] = facts.get("ancestors") or ()
    data = facts.get("data") or {}
    if not (data or ancestors):
        return ""
    lines = [f"- **{title}**, {TRAINED.get(facts.get('task', ''), 'trained')} on {_named_data(data)}"]
    return "\n".join([*lines, *_ancestor_lines(ancestors, 1)])


def _ancestor_lines(ancestors: Sequence[Ancestor], depth: int) -> list[str]:
    lines = []
    for one in ancestors:
        report, loss = one.report, one.report.get("val_loss")
        name = f"[{one.name}](https://huggingface.co/{one.repository})" if one.repository else one.name
        known = [
            f"{TRAINED[report['task']]} on {_named_data(report.get('data') or {})}"
            if report.get("task") in TRAINED
            else "",
            f"{report['parameters']:,} parameters" if report.get("parameters") else "",
            f"{report['tokens_seen']:,} target tokens" if report.get("tokens_seen") else "",
            f"validation loss {loss:.3f}" if isinstance(loss, int | float) else "",
            f"sha256 of the weights `{one.weights_hash[:16]}…`" if one.weights_hash else "",
        ]
        facts = "".join(f", {fact}" for fact in known if fact)
        lines.append(f"{'  ' * depth}- {one.role}: **{name}**{facts}")
        lines += _ancestor_lines(one.ancestors, depth + 1)
    return lines


def _named_data(data: Mapping[str, Any]) -> str:
    return f"{data.get('name', 'unknown data')} (hash `{data['hash']}`)" if data.get("hash") else "unknown data"


def _limitations(facts: Mapping[str, Any], template: PairTemplate | None) -> str:
    """Return what follows from size, training, data and evaluation."""
    data, parameters, tokens = (facts.get(name) for name in ("data", "parameters", "tokens_seen"))
    if not data:
        return ""
    limits, overlap, name = [], data.get("val_overlap"), data.get("name", "")
    if parameters and tokens:
        share = tokens / parameters
        few = f", fewer than the {OPTIMAL_TOKENS} of compute-optimal training (arXiv 2203.15556)"
        limits.append(
            f"It has {parameters:,} parameters, trained here on {significant(share)} target tokens for each of them"
            f"{few if share < OPTIMAL_TOKENS and not facts.get('ancestors') else ''}."
        )
    if facts.get("n_positions"):
        limits.append(f"A prompt and its continuation have at most {facts['n_positions']:,} tokens together.")
    spoken = ", ".join(languages(facts))
    limits.append(
        f"It was trained on {name}{f' ({spoken})' if spoken else ''}: other subjects and languages are not covered."
    )
    if template is not None:
        limits.append("It answers prompts of the template above. Other prompts are not what it was trained for.")
    else:
        limits.append("It continues text. It was not trained to follow instructions.")
    limits.append(
        "Nothing was done to make its text true, safe or free of bias, and it can repeat training text word for word."
    )
    if scores(facts):
        limits.append(_meaning_of_scores(overlap, facts.get("val_documents")))
    else:
        limits.append("It was not validated: nothing is known of its loss on other text.")
    if any(one.role == "teacher" for one in facts.get("ancestors") or ()):
        limits.append("It was trained to imitate its teacher, with the errors of that model.")
    return _list(limits)


def _meaning_of_scores(overlap: float | None, documents: int | None) -> str:
    text = "Scores on the validation split are of text like the training text, not of general ability"
    text += f"; {overlap:.1%} of its 13-grams also occur in the training text" if overlap else ""
    few = documents and documents < FEW_DOCUMENTS
    return text + (f". It has {documents} groups of documents only, so its standard errors are rough." if few else ".")


def _license(facts: Mapping[str, Any]) -> str:
    known, inherited_from = card_license(facts)
    if not facts.get("data"):
        return ""
    if inherited_from:
        return f"{known}, the license of {inherited_from}, whose weights this model continues. The data has its own."
    if known:
        return f"{known}, stated by the author of the model. The data has its own license."
    return (
        "No license is stated: neither the author nor a base model gives one. The data has its own license, which may "
        "restrict the use of the model."
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""
