"""inspect.html: one text inside a model on one page — surprise, a teacher beside it, attention, nearest embeddings.

The page is whole in itself: its style (inspection.css) and what moves on it (inspection.js) stand in it, and it loads
nothing.
"""

import base64
import json
import math
from dataclasses import asdict
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from gpt2lab.reports.inspection import LONGEST_MAP, LONGEST_STRIP, Inspection, Reading, inspect_reading, nearest
from gpt2lab.reports.report_html import STYLE
from gpt2lab.reports.token_display import token_texts, with_signs
from gpt2lab.settings import OBJECTIVES, ObjectiveKind
from gpt2lab.storage.atomic_files import write_text

NEIGHBOURS = 8
MOST_NEIGHBOURED = 40  # distinct tokens in the table of neighbours
MOST_DISPUTED = 10  # tokens in the table of disagreements
ACROSS = 23  # tokens in a row of the heat map

SURPRISE = """Each token is coloured by how little the model expected it. <b>Loss</b> is −ln of the probability that
it gave the token which really stands there: 0 means it was sure, and training lowers its mean. <b>Bits</b> are the
same in yes-or-no questions. <b>Rank</b> counts the entries of the vocabulary it held likelier. <b>Entropy</b> says
how undecided it was before it saw the token, right or wrong; e to its power is the number of equally likely choices
that would be as undecided."""
HEAT = """Both models read the same text, and at every token each has a distribution over all that may stand there.
<b>KL(teacher‖student)</b> is what forward-KL distillation lowers: nats lost by coding the teacher's expectations with
the student's. <b>Total variation</b> is the share of probability that would have to be moved to turn one into the
other, and 1 minus it how often speculative decoding would keep the student's draft. A strongly coloured column is a
place where the student has something left to learn from this teacher."""
ATTENTION = """One map for each head: row i shows how the i-th token shares out its attention over the tokens it may
see, and each row sums to 1. The text runs down and to the right. Colour is the square root of the weight, so that
faint ones show; hatched places are masked: attention there is exactly 0. Under each map stands where it mostly looks.
Common habits: the <b>previous</b> token; the <b>first</b>, which is where a head looks that finds nothing to do here;
<b>itself</b>; or spread over about (≈) so many tokens. <b>Click a map</b> to enlarge it; <b>hover or tap a token</b> to
see what it attends to."""
NEAR = """Rows of the embedding matrix, which also is the output head: entries whose vectors point the same way (by
the cosine of their angle) are read alike and predicted in the same places. In a model that has learned little they
are neighbours by chance."""
UNMASKED = "It is given, not predicted: this model predicts hidden tokens only."
SOURCE = "It belongs to the source, which is read both ways and not predicted."
FIRST = "Nothing stands before it, so the model had no say about it."


def write_inspection(
    path: Path,
    title: str,
    model: GPT2LMHeadModel,
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: str,
    teacher: GPT2LMHeadModel | None = None,
    teacher_name: str = "",
    most: int = LONGEST_MAP,
) -> None:
    """Let the model read the text and write the page.

    Args:
        title: what the model is.
        teacher: with the same tokenizer, to be shown beside it.
        most: of how many tokens, the last ones, attention is shown.
    """
    entries = len(tokenizer)
    inspection = inspect_reading(model, reading, entries, teacher, most)
    distinct = list(dict.fromkeys(reading.text))[:MOST_NEIGHBOURED]
    neighbours = nearest(model.transformer.wte.weight, distinct, entries, NEIGHBOURS)
    shape = model.config
    counted = [_counted(shape.n_layer, "layer"), _counted(shape.n_head, "head"), f"width {shape.n_embd}"]
    counted += [f"{model.num_parameters():,} parameters", f"objective {objective}", _counted(len(reading.ids), "token")]
    facts = " · ".join(counted)
    if teacher is not None:
        facts += f"\nTeacher: {teacher_name}, {teacher.num_parameters():,} parameters"
    page = Page(inspection, tokenizer, objective)
    write_text(path, page.render(title, facts, dict(zip(distinct, neighbours, strict=True))))


class Page:
    """The parts of a page about one inspection."""

    def __init__(self, inspection: Inspection, tokenizer: PreTrainedTokenizerBase, objective: str) -> None:
        self.seen = inspection
        self.tokenizer = tokenizer
        self.objective = objective
        self.texts = token_texts(tokenizer, inspection.reading.text)
        self.signs = [with_signs(text) for text in self.texts]
        self.first = max(len(self.texts) - LONGEST_STRIP, 0)  # token whose figures are shown first
        self.attention_from = len(self.texts) - inspection.attention.shape[2]

    def render(self, title: str, facts: str, neighbours: dict[int, list[tuple[int, float]]]) -> str:
        """The whole page.

        Args:
            neighbours: token id → nearest entries and their cosines.
        """
        content = json.dumps(self._data(), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        style, script = (
            Path(__file__).with_name(f"inspection.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
        )
        status = "<br>".join(map(escape, facts.splitlines()))
        return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Inside {escape(title)}</title><style>{STYLE}{style}</style></head><body>
<h1>Inside {escape(title)}</h1><p class="status">{status}</p>
<noscript><p class="note">Figures of single tokens and attention maps need JavaScript, which is off here.</p></noscript>
<div class="tiles">{self._tiles()}</div>
{self._surprise()}{self._disagreement()}{self._attention()}{self._neighbours(neighbours)}
<script type="application/json" id="data">{content}</script>
<script>{script}</script>
</body></html>
"""

    def _data(self) -> dict[str, Any]:
        """What the page's script reads."""
        seen, reading, start = self.seen, self.seen.reading, self.attention_from
        spans = (reading.spans[0, start:] - start).clamp_min(0)
        beside = seen.disagreement
        return {
            "signs": self.signs,
            "read": [with_signs(text) for text in token_texts(self.tokenizer, reading.ids)],
            "written": [int(mark) for mark in reading.written],
            "first": self.first,
            "places": seen.places,
            "entries": len(self.tokenizer),
            "unpredicted": _why_unpredicted(OBJECTIVES[self.objective]),
            "model": self._expected(seen.expectations),
            "teacher": beside
            and {**self._expected(beside.expectations), "kl": _short(beside.kl), "tvd": _short(beside.tvd)},
            "from": start,
            "layers": seen.attention.shape[0],
            "heads": seen.attention.shape[1],
            "sees": spans.tolist(),
            "habits": seen.habits,
            "attention": base64.b64encode(_as_bytes(seen.attention)).decode(),
        }

    def _expected(self, expectations: Any) -> dict[str, Any]:
        found = asdict(expectations)
        return {
            "losses": _short(found["losses"]),
            "ranks": found["ranks"],
            "entropies": _short(found["entropies"]),
            "likeliest": [[[self._sign(entry), round(p, 4)] for entry, p in row] for row in found["likeliest"]],
        }

    def _sign(self, entry: int) -> str:
        return with_signs(token_texts(self.tokenizer, [entry])[0])

    # Surprise

    def _tiles(self) -> str:
        expected, beside = self.seen.expectations, self.seen.disagreement
        if not expected.losses:
            return ""
        loss = mean(expected.losses)
        shown = [
            ("mean loss, nats per token", f"{loss:.3f}"),
            ("bits per token", f"{loss / math.log(2):.3f}"),
            ("perplexity", f"{math.exp(min(loss, 100.0)):,.1f}"),
            ("were its first choice", f"{mean(rank == 1 for rank in expected.ranks):.0%}"),
            ("mean entropy, nats", f"{mean(expected.entropies):.3f}"),
        ]
        if beside is not None:
            pairs = zip(expected.likeliest, beside.expectations.likeliest, strict=True)
            shown += [
                ("teacher's mean loss", f"{mean(beside.expectations.losses):.3f}"),
                ("mean KL(teacher‖student)", f"{mean(beside.kl):.3f}"),
                ("mean total variation", f"{mean(beside.tvd):.3f}"),
                ("same first choice", f"{mean(ours[0][0] == theirs[0][0] for ours, theirs in pairs):.0%}"),
            ]
        return "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for label, value in shown)

    def _surprise(self) -> str:
        names = [("loss", "loss"), ("entropy", "entropy"), ("rank", "rank")]
        if self.seen.disagreement is not None:
            names += [("kl", "KL from the teacher"), ("tvd", "total variation"), ("worse", "worse than the teacher")]
        notes = []
        if self.first:
            notes.append(f"Figures are shown of the last {LONGEST_STRIP} of {len(self.texts):,} tokens.")
        if not self.seen.places:
            notes.append("Nothing is predicted here: under this objective the whole text is given.")
        marks = " Underlined tokens were written by the model itself." if any(self.seen.reading.written) else ""
        return f"""<h2>How surprising each token was</h2><p class="says">{SURPRISE}{marks}</p>{_notes(notes)}
<div class="beside"><div><div class="choice" id="measures"><span>Colour by</span>{_buttons(names)}</div>
{self._strip("strip", "hot", self.first)}<div class="legend hot" id="legend"></div></div>
<div class="card" id="card"></div></div>
"""

    def _strip(self, name: str, tint: str, start: int, read: bool = False) -> str:
        """Tokens from `start` on, as text; as they were read, where hidden ones are to be seen as such."""
        begin = f'<div class="strip {tint}" id="{name}" tabindex="0" role="group" aria-label="tokens; arrow keys move">'
        texts = token_texts(self.tokenizer, self.seen.reading.ids) if read else self.texts
        predicted = set(self.seen.places)
        parts = []
        for place in range(start, len(texts)):
            kinds = ["t"] + ["none"] * (place not in predicted) + ["written"] * self.seen.reading.written[place]
            text = escape(texts[place]).replace("\n", '<span class="sign">↵</span>\n')
            parts.append(f'<span class="{" ".join(kinds)}" data-i="{place}">{text}</span>')
        return f"{begin}{''.join(parts)}</div>"

    # A teacher beside it

    def _disagreement(self) -> str:
        beside, places = self.seen.disagreement, self.seen.places
        if beside is None or not places:
            return ""
        most = math.log(len(self.tokenizer))
        measures = [
            ("KL, 0 to 3 nats", "apart", [value / 3 for value in beside.kl]),
            ("total variation, 0 to 1", "apart", beside.tvd),
            (f"student's loss, 0 to {most:.1f} nats", "hot", [each / most for each in self.seen.expectations.losses]),
            (f"teacher's loss, 0 to {most:.1f} nats", "hot", [each / most for each in beside.expectations.losses]),
        ]
        begin = next((row for row, place in enumerate(places) if place >= self.first), len(places))
        tables = []
        for some in _evenly(range(begin, len(places)), ACROSS):
            names = "".join(f'<th class="name" title="{escape(s)}">{escape(s[:11])}</th>' for s in self._signs_of(some))
            lines = "".join(
                f'<tr class="{tint}"><th>{label}</th>'
                + "".join(f'<td data-i="{places[row]}" style="--v:{min(values[row], 1):.3f}"></td>' for row in some)
                + "</tr>"
                for label, tint, values in measures
            )
            tables.append(f'<table class="heat"><tr><th></th>{names}</tr>{lines}</table>')
        return f"""<h2>Where the student differs from its teacher</h2><p class="says">{HEAT}</p>
<div class="beside"><div class="scroll" id="heat">{"".join(tables)}</div><div class="card" id="heat-card"></div></div>
<h3>Most disputed</h3><div class="scroll"><table class="list"><tr><th>token, and what stands before it</th>
<th class="figure">KL</th><th class="figure">total variation</th><th class="figure">student's loss</th>
<th class="figure">teacher's loss</th><th>student's first choice</th><th>teacher's</th></tr>
{self._disputed(begin)}</table></div>
"""

    def _signs_of(self, rows: range) -> list[str]:
        return [self.signs[self.seen.places[row]] for row in rows]

    def _disputed(self, begin: int) -> str:
        beside, expected = self.seen.disagreement, self.seen.expectations
        assert beside is not None
        order = sorted(range(begin, len(beside.kl)), key=lambda row: -beside.kl[row])[:MOST_DISPUTED]
        lines = []
        for row in order:
            place = self.seen.places[row]
            before, token = escape("".join(self.signs[max(place - 5, 0) : place])), escape(self.signs[place])
            figures = (beside.kl[row], beside.tvd[row], expected.losses[row], beside.expectations.losses[row])
            choices = (expected.likeliest[row][0], beside.expectations.likeliest[row][0])
            lines.append(
                f'<tr><td><code><span class="before">{before}</span><b>{token}</b></code></td>'
                + "".join(f'<td class="figure">{figure:.3f}</td>' for figure in figures)
                + "".join(f"<td><code>{escape(self._sign(e))}</code> {p:.0%}</td>" for e, p in choices)
                + "</tr>"
            )
        return "".join(lines)

    # Attention

    def _attention(self) -> str:
        layers, heads, size, _ = self.seen.attention.shape
        notes = []
        if self.attention_from:
            notes.append(
                f"Attention is shown of the last {size} of {len(self.texts):,} tokens, to keep the page small; the "
                "model read all of them, and what a token gives to those not shown is told with it."
            )
        captions = self.seen.habits
        parts = ["<span></span>"] + [f'<span class="head">head {head + 1}</span>' for head in range(heads)]
        for layer in range(layers):
            parts.append(f'<span class="layer">layer {layer + 1}</span>')
            for number in range(layer * heads, (layer + 1) * heads):
                label = f"layer {layer + 1}, head {number % heads + 1}: {captions[number]}"
                parts.append(
                    f'<button class="map" value="{number}" aria-label="{label}" title="{label}"><canvas></canvas>'
                    f"<span>{captions[number]}</span></button>"
                )
        wholes = _buttons([("head", "this head"), ("layer", "mean of its layer"), ("all", "mean of all")])
        ways = _buttons([("from", "what a token looks at"), ("to", "what looks at it")])
        return f"""<h2>Attention</h2><p class="says">{ATTENTION}</p>{_notes(notes)}
<div class="scroll"><div class="maps" style="--heads:{heads}">{"".join(parts)}</div></div>
<h3 id="which"></h3><div class="choice"><span id="wholes" class="choice">{wholes}</span>
<span id="ways" class="choice">{ways}</span></div>
<div class="large"><div><canvas id="large" role="img" aria-label="the chosen map, enlarged"></canvas>
<div class="legend look">weight 0<i></i>1; ¼ has half the colour</div></div><div>
{self._strip("looks", "look", self.attention_from, read=True)}<p id="told"></p></div></div>
"""

    def _neighbours(self, neighbours: dict[int, list[tuple[int, float]]]) -> str:
        lines = "".join(
            f"<tr><td><code>{escape(self._sign(token))}</code></td><td>{''.join(map(self._neighbour, near))}</td></tr>"
            for token, near in neighbours.items()
        )
        distinct = len(set(self.seen.reading.text))
        notes = [f"The first {len(neighbours)} of {distinct} distinct tokens."] if distinct > len(neighbours) else []
        return f"""<h2>Nearest in the embedding</h2><p class="says">{NEAR}</p>{_notes(notes)}
<table class="list near"><tr><th>token</th><th>nearest entries, and their cosines</th></tr>{lines}</table>
"""

    def _neighbour(self, near: tuple[int, float]) -> str:
        entry, cosine = near
        text = f"<code>{escape(self._sign(entry))}</code> <small>{cosine:.2f}</small>"
        return f'<span style="--v:{max(cosine, 0):.2f}">{text}</span>'


def _as_bytes(attention: torch.Tensor) -> bytes:
    """A byte for each weight: 255 times its square root, so that small ones keep their first digits."""
    return (attention.clamp(0, 1).sqrt() * 255).round().to(torch.uint8).numpy().tobytes()


def _evenly(rows: range, most: int) -> list[range]:
    """Rows in parts of nearly one length, none longer than `most`."""
    length = -(-len(rows) // max(-(-len(rows) // most), 1))
    return [rows[start : start + length] for start in range(0, len(rows), max(length, 1))]


def _short(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number != 1)}"


def _buttons(names: list[tuple[str, str]]) -> str:
    return "".join(f'<button type="button" value="{value}">{escape(label)}</button>' for value, label in names)


def _why_unpredicted(kind: ObjectiveKind) -> str:
    """Return the note on a token that the model did not predict."""
    if kind.fills_masks:
        return UNMASKED
    return SOURCE if kind.bidirectional_prompt else FIRST


def _notes(notes: list[str]) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
