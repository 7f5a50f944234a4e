"""Decoding speed compared with `transformers`' generate; speculative decoding compared with its prediction.

    python -m benchmarks.benchmark_decoding
    python -m benchmarks.benchmark_decoding --target runs/pretrain/… --draft runs/distill/… --draft …

First table: models with random weights, exported and loaded by both sides, on the CPU; theirs is the stock
GPT2LMHeadModel with the faster of its dynamic and its static cache. Prompts of a batch have 17 to 32 tokens, padded on
the left. Second table, with --target: the prompts below, one at a time, with two predictions (speculative.py): with the
measured verification cost, and ignoring it. Third table, also with --target: the same prompts with greedy decoding,
compared with assisted generation (generate of `transformers` with assistant_model), with its defaults and tuned: two
drafted tokens for every call at any confidence (it supports no static cache). Sides alternate; the first round is
warm-up; values are medians over rounds with the smallest and the largest in brackets. With the same seed both sides
sample the same text; the table contains the number of equal rows.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from benchmarks.alternation import alternate_speeds, beside_fastest, spread
from benchmarks.shape import PRECISIONS, SHAPES, TINY
from gpt2lab.data.tokenizer import describe_difference, load_tokenizer
from gpt2lab.generation.sampling import generate_ids
from gpt2lab.generation.speculative import Speculated, speculate, speculative_ids
from gpt2lab.model.backbone import Backbone, load_backbone, to_hf
from gpt2lab.settings import GREEDY, ModelShape, SamplingSettings
from gpt2lab.storage.model_folder import resolve_model_folder
from launch.logging_setup import silence_libraries

MODELS = ("nano", "micro", "small")
VOCABULARY, END = 4_096, 0
BATCHES = (1, 16)
HOT = SamplingSettings("temperature 1")
WAYS = (GREEDY, HOT)
CACHES = ("dynamic", "static")  # of keys and values, of `transformers`
SPECULATIVE_WAYS = (GREEDY, SamplingSettings("temperature 0.8", temperature=0.8), HOT)
TUNED_DRAFTS = 2  # drafted tokens per call of assisted generation; about those of our loop in fp32
PROMPTS = (
    "import json\n\n\nclass Reader:\n    def read(self, path):\n",
    "def add(a, b):\n    ",
    "    for name in ",
    '    """Return ',
    "class Stack:\n    def __init__(self):\n        self.",
    "if __name__ == ",
)

Rows = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="a run directory or a Hugging Face folder")
    parser.add_argument("--draft", action="append", default=[], help="the same, with the target's tokens; several")
    parser.add_argument("--models", default=",".join(MODELS), help="models of the first table; empty: no first table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of all models, on both sides")
    parser.add_argument("--tiny", action="store_true", help="takes seconds; results are meaningless")
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(options.threads)
    shapes = {"tiny": TINY} if options.tiny else {name: SHAPES[name] for name in options.models.split(",") if name}
    dtype = PRECISIONS[options.precision]
    print(
        f"CPU, {options.threads} threads, {options.precision}, {options.tokens} new tokens, {options.rounds} rounds\n"
    )
    if shapes:
        print("| model | batch | | their cache | theirs, tokens/s | ours, tokens/s | ours ÷ theirs | same text |")
        print("|---|--:|---|---|--:|--:|--:|--:|")
    for name, shape in shapes.items():
        for row in decoding_rows(replace(shape, vocab_size=VOCABULARY), options.tokens, options.rounds, dtype):
            print(f"| {name} | {row}", flush=True)
    if options.target:
        print(
            "\n| draft | | acceptance | tokens per call | drafts per call | target's step ÷ draft's "
            "| verification ÷ step | measured, × | predicted, × | measured ÷ predicted "
            "| predicted ignoring verification, × | same text |"
        )
        print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for draft in options.draft:
        for row in speculation_rows(options.target, draft, options.tokens, options.rounds, dtype):
            print(f"| {draft} | {row}", flush=True)
    if options.target:
        print(
            "\n| draft | assisted generation ÷ theirs without | tuned ÷ theirs without "
            "| ours with the draft ÷ ours without | ours with the draft ÷ assisted generation "
            "| ours with the draft ÷ tuned | same text |"
        )
        print("|---|--:|--:|--:|--:|--:|--:|")
    for draft in options.draft:
        row = assisted_row(options.target, draft, options.tokens, options.rounds, dtype)
        print(f"| {draft} | {row}", flush=True)


def decoding_rows(shape: ModelShape, tokens: int, rounds: int, dtype: torch.dtype) -> list[str]:
    """Measure rows of the first table, one per batch size and sampling method, without the model's name."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        to_hf(Backbone(shape)).save_pretrained(folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
        ours = load_backbone(folder, dtype=dtype).lm.eval()
    rows = []
    for batch in BATCHES:
        prompts = [torch.randint(1, shape.vocab_size, (32 - row % 16,)).tolist() for row in range(batch)]
        for sampling in WAYS:
            sides = {cache: _theirs(theirs, prompts, sampling, tokens, cache) for cache in CACHES}
            speeds, texts = alternate_speeds({**sides, "ours": _ours(ours, prompts, sampling, tokens)}, rounds, _length)
            best, cells = beside_fastest(speeds, "ours")
            same = sum(one == other for one, other in zip(texts[best], texts["ours"], strict=True))
            rows.append(f"{batch} | {sampling.name} | {best} | {' | '.join(cells)} | {same}/{batch} |")
    return rows


def speculation_rows(target: str, draft: str, tokens: int, rounds: int, dtype: torch.dtype) -> list[str]:
    """Measure rows of the second table, one per sampling method, without the draft's name."""
    tokenizer = load_tokenizer(str(resolve_model_folder(target, "target")))
    if different := describe_difference(resolve_model_folder(draft, "draft"), tokenizer):
        raise SystemExit(f"{draft} has other tokens than {target}: {different}")
    models = [load_backbone(source, dtype=dtype).lm.eval() for source in (target, draft)]
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    rows = []
    for sampling in SPECULATIVE_WAYS:
        found = []
        for number in range(rounds + 1):
            several = [
                speculate(
                    models[0],
                    models[1],
                    prompt,
                    sampling,
                    max_new_tokens=tokens,
                    end_of_text=tokenizer.eos_token_id,
                    vocab_size=len(tokenizer),
                    seed=number,
                )
                for prompt in prompts
            ]
            print(f"{draft}, {sampling.name}: {pool(several).speedup:.2f}", file=sys.stderr)
            found.append(several)
        rows.append(speculation_row(sampling, found[1:]))
    return rows


def speculation_row(sampling: SamplingSettings, rounds: Sequence[Sequence[Speculated]]) -> str:
    """Format the results of all rounds as a row without the draft's name."""
    each = [pool(one) for one in rounds]
    texts = [one for several in rounds for one in several]
    same = sum(one.ids == one.plain_ids for one in texts)
    cells = [
        spread([one.acceptance for one in each]),
        spread([one.tokens_per_call for one in each]),
        spread([one.drafted / one.calls for one in each]),
        spread([1 / one.cost_ratio for one in each], ".1f"),
        spread([one.look_ratio for one in each]),
        spread([one.speedup for one in each]),
        spread([one.predicted_speedup for one in each]),
        spread([one.speedup / one.predicted_speedup for one in each]),
        spread([one.predicted_with_free_looks for one in each]),
        f"{same}/{len(texts)}" if sampling.is_greedy else "sampled",
    ]
    return f"{sampling.name} | {' | '.join(cells)} |"


def assisted_row(target: str, draft: str, tokens: int, rounds: int, dtype: torch.dtype) -> str:
    """Measure a row of the third table without the draft's name: ratios of tokens per second, greedy, batch size 1."""
    tokenizer = load_tokenizer(str(resolve_model_folder(target, "target")))
    end = tokenizer.eos_token_id
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    backbones = [load_backbone(source, dtype=dtype).eval() for source in (target, draft)]
    ours, our_draft = (one.lm for one in backbones)
    theirs, their_draft, tuned = (to_hf(one).to(dtype) for one in (*backbones, backbones[1]))
    tuned.generation_config.num_assistant_tokens = TUNED_DRAFTS
    tuned.generation_config.num_assistant_tokens_schedule = "constant"
    tuned.generation_config.assistant_confidence_threshold = 0.0
    given = {"max_new_tokens": tokens, "end_of_text": end, "vocab_size": len(tokenizer)}

    def generated(assistant: GPT2LMHeadModel | None) -> Rows:
        settings = {"max_new_tokens": tokens, "pad_token_id": end, "eos_token_id": end, "do_sample": False}
        rows = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            written: Tensor = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), assistant_model=assistant, **settings
            )
            rows.append(_until(end, written[0, len(prompt) :].tolist()))
        return rows

    sides: dict[str, Callable[[], Rows]] = {
        "theirs": lambda: generated(None),
        "assisted": lambda: generated(their_draft),
        "tuned": lambda: generated(tuned),
        "ours": lambda: [generate_ids(ours, [prompt], GREEDY, **given)[0] for prompt in prompts],
        "drafted": lambda: [speculative_ids(ours, our_draft, prompt, GREEDY, **given)[0] for prompt in prompts],
    }
    speeds, texts = alternate_speeds(sides, rounds, _length)
    pairs = (
        ("assisted", "theirs"),
        ("tuned", "theirs"),
        ("drafted", "ours"),
        ("drafted", "assisted"),
        ("drafted", "tuned"),
    )
    ratios = [[one / other for one, other in zip(speeds[a], speeds[b], strict=True)] for a, b in pairs]
    same = sum(len(set(map(tuple, all_of_one))) == 1 for all_of_one in zip(*texts.values(), strict=True))
    return f"{' | '.join(map(spread, ratios))} | {same}/{len(prompts)} |"


def pool(found: Sequence[Speculated]) -> Speculated:
    """Combine several prompts: sums of counts and seconds, means of cost ratios."""
    return Speculated(
        ids=[],
        plain_ids=[],
        tokens=sum(one.tokens for one in found),
        plain_tokens=sum(one.plain_tokens for one in found),
        calls=sum(one.calls for one in found),
        drafted=sum(one.drafted for one in found),
        kept=sum(one.kept for one in found),
        seconds=sum(one.seconds for one in found),
        plain_seconds=sum(one.plain_seconds for one in found),
        cost_ratio=statistics.mean(one.cost_ratio for one in found),
        look_ratio=statistics.mean(one.look_ratio for one in found),
    )


def _length(rows: Rows) -> int:
    return sum(map(len, rows))


def _ours(model: GPT2LMHeadModel, prompts: Rows, sampling: SamplingSettings, tokens: int) -> Callable[[], Rows]:
    return lambda: generate_ids(model, prompts, sampling, max_new_tokens=tokens, end_of_text=END)


def _theirs(
    model: GPT2LMHeadModel, prompts: Rows, sampling: SamplingSettings, tokens: int, cache: str
) -> Callable[[], Rows]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[END] * (longest - len(prompt)) + prompt for prompt in prompts])  # (B, L)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    drawn = {} if sampling.is_greedy else {"temperature": sampling.temperature, "top_k": 0}

    def write() -> Rows:
        torch.manual_seed(0)
        written: Tensor = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            pad_token_id=END,
            eos_token_id=END,
            do_sample=not sampling.is_greedy,
            cache_implementation=cache,
            **drawn,
        )
        return [_until(END, row) for row in written[:, longest:].tolist()]

    return write


def _until(end: int, row: list[int]) -> list[int]:
    return row[: row.index(end)] if end in row else row


if __name__ == "__main__":
    main()
