"""inspect.html: loss, teacher comparison, attention and nearest embeddings for one text, on one page.

The page contains its style (inspection.css) and script (inspection.js) and loads nothing.
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
from gpt2lab.reports.page import STYLE
from gpt2lab.reports.token_display import token_texts, with_signs
from gpt2lab.storage.atomic_files import write_text

NEIGHBOURS = 8
MAX_TOKENS = 40  # distinct tokens in the table of neighbours
MAX_DIFFERENCES = 10  # tokens in the table of differences
ACROSS = 23  # tokens in a row of the heat map

SURPRISE = """Colour shows the loss or another metric of each token. <b>Loss</b> is −ln of the probability of the actual
token: 0 means certainty, and training lowers the mean. <b>Bits</b> are loss ÷ ln 2. <b>Rank</b> is 1 plus the number of
tokens with a higher probability. <b>Entropy</b> measures the uncertainty of the prediction, right or wrong; e to its
power is the number of equally likely tokens with the same uncertainty."""
HEAT = """Both models read the same text and have a next-token distribution at every token.
<b>KL(teacher‖student)</b> is the loss of forward-KL distillation: nats lost by coding the teacher's distribution with
the student's. <b>Total variation</b> is the probability mass that differs; 1 minus it is the acceptance rate of the
student's drafts in speculative decoding. A strongly coloured column is a position where student and teacher differ."""
ATTENTION = """One map for each head: row i contains the attention weights of token i over the tokens it may attend to,
and sums to 1. The text runs down and to the right. Colour is the square root of the weight, so that small ones are
visible; hatched weights are masked, exactly 0. The caption is the main target: the <b>previous</b> token; the
<b>first</b>, a common attention sink; <b>itself</b>; or a spread over about (≈) so many tokens. <b>Click a map</b> to
enlarge it; <b>hover or tap a token</b> to see what it attends to."""
NEAR = """Rows of the embedding matrix, which is also the LM head. Tokens with a high cosine similarity are treated
alike as input and predicted in similar contexts. In a barely trained model neighbours are random."""
UNPREDICTED = {
    "mlm": "It is given, not predicted: this model predicts masked tokens only.",
    "prefix_lm": "It belongs to the bidirectional prefix, which is not predicted.",
}
FIRST = "It is the first token, so it is not predicted."


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
    """Run the model on the text and write the page.

    Args:
        title: name of the model.
        teacher: model with the same tokenizer to compare with.
        most: maximum number of tokens, the last ones, with shown attention.
    """
    vocab_size = len(tokenizer)
    inspection = inspect_reading(model, reading, vocab_size, teacher, most)
    distinct = list(dict.fromkeys(reading.text))[:MAX_TOKENS]
    neighbours = nearest(model.transformer.wte.weight, distinct, vocab_size, NEIGHBOURS)
    shape = model.config
    counted = [_count(shape.n_layer, "layer"), _count(shape.n_head, "head"), f"width {shape.n_embd}"]
    counted += [f"{model.num_parameters():,} parameters", f"objective {objective}", _count(len(reading.ids), "token")]
    facts = " · ".join(counted)
    if teacher is not None:
        facts += f"\nTeacher: {teacher_name}, {teacher.num_parameters():,} parameters"
    page = Page(inspection, tokenizer, objective)
    write_text(path, page.render(title, facts, dict(zip(distinct, neighbours, strict=True))))


class Page:
    """Parts of the page of one inspection."""

    def __init__(self, inspection: Inspection, tokenizer: PreTrainedTokenizerBase, objective: str) -> None:
        self.seen = inspection
        self.tokenizer = tokenizer
        self.objective = objective
        self.texts = token_texts(tokenizer, inspection.reading.text)
        self.signs = [with_signs(text) for text in self.texts]
        self.first = max(len(self.texts) - LONGEST_STRIP, 0)  # first token with shown metrics
        self.attention_from = len(self.texts) - inspection.attention.shape[2]

    def render(self, title: str, facts: str, neighbours: dict[int, list[tuple[int, float]]]) -> str:
        """Render the page.

        Args:
            neighbours: token id → nearest tokens and their cosines.
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
<noscript><p class="note">Metrics of single tokens and attention maps need JavaScript.</p></noscript>
<div class="tiles">{self._tiles()}</div>
{self._surprise()}{self._disagreement()}{self._attention()}{self._neighbours(neighbours)}
<script type="application/json" id="data">{content}</script>
<script>{script}</script>
</body></html>
"""

    def _data(self) -> dict[str, Any]:
        """Return the input of the page's script."""
        seen, reading, start = self.seen, self.seen.reading, self.attention_from
        spans = (reading.spans[0, start:] - start).clamp_min(0)
        beside = seen.disagreement
        return {
            "signs": self.signs,
            "read": [with_signs(text) for text in token_texts(self.tokenizer, reading.ids)],
            "written": [int(mark) for mark in reading.written],
            "first": self.first,
            "places": seen.positions,
            "entries": len(self.tokenizer),
            "unpredicted": UNPREDICTED.get(self.objective, FIRST),
            "model": self._predictions(seen.expectations),
            "teacher": beside
            and {**self._predictions(beside.expectations), "kl": _short(beside.kl), "tvd": _short(beside.tvd)},
            "from": start,
            "layers": seen.attention.shape[0],
            "heads": seen.attention.shape[1],
            "sees": spans.tolist(),
            "habits": seen.habits,
            "attention": base64.b64encode(_as_bytes(seen.attention)).decode(),
        }

    def _predictions(self, expectations: Any) -> dict[str, Any]:
        found = asdict(expectations)
        return {
            "losses": _short(found["losses"]),
            "ranks": found["ranks"],
            "entropies": _short(found["entropies"]),
            "top_tokens": [[[self._sign(entry), round(p, 4)] for entry, p in row] for row in found["top_tokens"]],
        }

    def _sign(self, token: int) -> str:
        return with_signs(token_texts(self.tokenizer, [token])[0])

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
            ("top-1 accuracy", f"{mean(rank == 1 for rank in expected.ranks):.0%}"),
            ("mean entropy, nats", f"{mean(expected.entropies):.3f}"),
        ]
        if beside is not None:
            pairs = zip(expected.top_tokens, beside.expectations.top_tokens, strict=True)
            shown += [
                ("teacher's mean loss", f"{mean(beside.expectations.losses):.3f}"),
                ("mean KL(teacher‖student)", f"{mean(beside.kl):.3f}"),
                ("mean total variation", f"{mean(beside.tvd):.3f}"),
                ("top-1 agreement", f"{mean(ours[0][0] == theirs[0][0] for ours, theirs in pairs):.0%}"),
            ]
        return "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for label, value in shown)

    def _surprise(self) -> str:
        names = [("loss", "loss"), ("entropy", "entropy"), ("rank", "rank")]
        if self.seen.disagreement is not None:
            names += [("kl", "KL from the teacher"), ("tvd", "total variation"), ("worse", "worse than the teacher")]
        notes = []
        if self.first:
            notes.append(f"Metrics are shown for the last {LONGEST_STRIP} of {len(self.texts):,} tokens.")
        if not self.seen.positions:
            notes.append("No token is predicted: with this objective the whole text is given.")
        legend = " Underlined tokens were generated by the model." if any(self.seen.reading.written) else ""
        return f"""<h2>Loss of each token</h2><p class="lead">{SURPRISE}{legend}</p>{_notes(notes)}
<div class="beside"><div><div class="choice" id="measures"><span>Colour by</span>{_buttons(names)}</div>
{self._strip("strip", "hot", self.first)}<div class="legend hot" id="legend"></div></div>
<div class="card" id="card"></div></div>
"""

    def _strip(self, name: str, tint: str, start: int, read: bool = False) -> str:
        """Render the tokens from `start` on as text; with `read` masked tokens are shown as masks."""
        begin = f'<div class="strip {tint}" id="{name}" tabindex="0" role="group" aria-label="tokens; arrow keys move">'
        texts = token_texts(self.tokenizer, self.seen.reading.ids) if read else self.texts
        predicted = set(self.seen.positions)
        parts = []
        for position in range(start, len(texts)):
            kinds = ["t"] + ["none"] * (position not in predicted) + ["written"] * self.seen.reading.written[position]
            text = escape(texts[position]).replace("\n", '<span class="sign">↵</span>\n')
            parts.append(f'<span class="{" ".join(kinds)}" data-i="{position}">{text}</span>')
        return f"{begin}{''.join(parts)}</div>"

    # Teacher

    def _disagreement(self) -> str:
        beside, positions = self.seen.disagreement, self.seen.positions
        if beside is None or not positions:
            return ""
        most = math.log(len(self.tokenizer))
        measures = [
            ("KL, 0 to 3 nats", "apart", [value / 3 for value in beside.kl]),
            ("total variation, 0 to 1", "apart", beside.tvd),
            (f"student's loss, 0 to {most:.1f} nats", "hot", [each / most for each in self.seen.expectations.losses]),
            (f"teacher's loss, 0 to {most:.1f} nats", "hot", [each / most for each in beside.expectations.losses]),
        ]
        begin = next((row for row, position in enumerate(positions) if position >= self.first), len(positions))
        tables = []
        for some in _evenly(range(begin, len(positions)), ACROSS):
            names = "".join(f'<th class="name" title="{escape(s)}">{escape(s[:11])}</th>' for s in self._signs_at(some))
            lines = "".join(
                f'<tr class="{tint}"><th>{label}</th>'
                + "".join(f'<td data-i="{positions[row]}" style="--v:{min(values[row], 1):.3f}"></td>' for row in some)
                + "</tr>"
                for label, tint, values in measures
            )
            tables.append(f'<table class="heat"><tr><th></th>{names}</tr>{lines}</table>')
        return f"""<h2>Where the student differs from its teacher</h2><p class="lead">{HEAT}</p>
<div class="beside"><div class="scroll" id="heat">{"".join(tables)}</div><div class="card" id="heat-card"></div></div>
<h3>Largest differences</h3><div class="scroll"><table class="list"><tr><th>token and context</th>
<th class="figure">KL</th><th class="figure">total variation</th><th class="figure">student's loss</th>
<th class="figure">teacher's loss</th><th>student's top-1</th><th>teacher's</th></tr>
{self._difference_rows(begin)}</table></div>
"""

    def _signs_at(self, rows: range) -> list[str]:
        return [self.signs[self.seen.positions[row]] for row in rows]

    def _difference_rows(self, begin: int) -> str:
        beside, expected = self.seen.disagreement, self.seen.expectations
        assert beside is not None
        order = sorted(range(begin, len(beside.kl)), key=lambda row: -beside.kl[row])[:MAX_DIFFERENCES]
        lines = []
        for row in order:
            position = self.seen.positions[row]
            before, token = escape("".join(self.signs[max(position - 5, 0) : position])), escape(self.signs[position])
            figures = (beside.kl[row], beside.tvd[row], expected.losses[row], beside.expectations.losses[row])
            choices = (expected.top_tokens[row][0], beside.expectations.top_tokens[row][0])
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
                f"Attention is shown for the last {size} of {len(self.texts):,} tokens, to keep the page small. The "
                "model read all of them; the weight on tokens not shown is given with each token."
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
        ways = _buttons([("from", "what a token attends to"), ("to", "what attends to it")])
        return f"""<h2>Attention</h2><p class="lead">{ATTENTION}</p>{_notes(notes)}
<div class="scroll"><div class="maps" style="--heads:{heads}">{"".join(parts)}</div></div>
<h3 id="which"></h3><div class="choice"><span id="wholes" class="choice">{wholes}</span>
<span id="ways" class="choice">{ways}</span></div>
<div class="large"><div><canvas id="large" role="img" aria-label="the chosen map, enlarged"></canvas>
<div class="legend look">weight 0<i></i>1; ¼ has half the colour</div></div><div>
{self._strip("attended", "look", self.attention_from, read=True)}<p id="attends"></p></div></div>
"""

    def _neighbours(self, neighbours: dict[int, list[tuple[int, float]]]) -> str:
        lines = "".join(
            f"<tr><td><code>{escape(self._sign(token))}</code></td><td>{''.join(map(self._neighbour, near))}</td></tr>"
            for token, near in neighbours.items()
        )
        distinct = len(set(self.seen.reading.text))
        notes = [f"The first {len(neighbours)} of {distinct} distinct tokens."] if distinct > len(neighbours) else []
        return f"""<h2>Nearest in the embedding</h2><p class="lead">{NEAR}</p>{_notes(notes)}
<table class="list near"><tr><th>token</th><th>nearest tokens and cosines</th></tr>{lines}</table>
"""

    def _neighbour(self, near: tuple[int, float]) -> str:
        entry, cosine = near
        text = f"<code>{escape(self._sign(entry))}</code> <small>{cosine:.2f}</small>"
        return f'<span style="--v:{max(cosine, 0):.2f}">{text}</span>'


def _as_bytes(attention: torch.Tensor) -> bytes:
    """Quantize each weight to a byte: 255 times its square root, for relative precision of small ones."""
    return (attention.clamp(0, 1).sqrt() * 255).round().to(torch.uint8).numpy().tobytes()


def _evenly(rows: range, most: int) -> list[range]:
    """Split rows into parts of nearly equal length, at most `most`."""
    length = -(-len(rows) // max(-(-len(rows) // most), 1))
    return [rows[start : start + length] for start in range(0, len(rows), max(length, 1))]


def _short(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number != 1)}"


def _buttons(names: list[tuple[str, str]]) -> str:
    return "".join(f'<button type="button" value="{value}">{escape(label)}</button>' for value, label in names)


def _notes(notes: list[str]) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
