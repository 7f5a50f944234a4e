"""Model card: README.md of an exported model, with Python code that runs it with transformers only."""

import json
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gpt2lab.data.pair_template import PairTemplate
from gpt2lab.data.special_tokens import find_special_tokens
from gpt2lab.settings import OBJECTIVES

STEPS = "steps"  # fact of the card: optimizer steps of the exported weights
SOURCE = "def add(a, b):\n    return a + b"


def model_card(
    card: dict[str, str], objective: str, tokenizer: PreTrainedTokenizerBase, template: PairTemplate | None
) -> str:
    """Return the text of the card.

    Args:
        card: facts in order; "title" becomes the heading.
        template: prompt template of a model trained on pairs; None: a model that continues text.
    """
    facts = "\n".join(f"- {name}: {value}" for name, value in card.items() if name != "title")
    return f"""---
library_name: transformers
pipeline_tag: {"fill-mask" if OBJECTIVES[objective].fills_masks else "text-generation"}
tags: [gpt2]
---

# {card.get("title", "GPT-2")}

{facts}
{_pair_facts(template)}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
{_example(objective, tokenizer, template)}
```
"""


def read_step(folder: Path) -> int | None:
    """Return the optimizer step of a folder's weights from its card; None if that names none."""
    try:
        found = re.search(
            rf"^- {STEPS}: (\d{{1,18}})$", (folder / "README.md").read_text("utf-8"), re.ASCII | re.MULTILINE
        )
    except (OSError, UnicodeDecodeError):
        return None
    return int(found[1]) if found else None


def _pair_facts(template: PairTemplate | None) -> str:
    if template is None:
        return ""
    return f"""
The model was trained on pairs of a source and a target text, in these templates; the response ends with end-of-text:

- prompt: `{_literal(template.prompt)}`
- response: `{_literal(template.response)}`

In the code below, replace `source` by a text like those that the model was trained on.
"""


def _literal(text: str) -> str:
    """Return a Python string literal on one line, without backticks, which Markdown would read."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\x60")


def _example(objective: str, tokenizer: PreTrainedTokenizerBase, template: PairTemplate | None) -> str:
    """Return Python code that runs such a model with transformers only.

    As in training, text is tokenized without special tokens.
    """
    kind = OBJECTIVES[objective]
    if kind.fills_masks:
        mask = find_special_tokens(tokenizer).mask
        return f"""\
import torch

parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("import ", "\\n")]
ids = torch.tensor([[*parts[0], {mask}, *parts[1]]])  # {mask} is the mask token
everything = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
logits = model(ids, attention_mask=everything, use_cache=False).logits[0, len(parts[0])]
print([tokenizer.decode(token) for token in logits.topk(5).indices])"""
    if kind.infills:
        special = find_special_tokens(tokenizer)
        return f"""\
import torch

texts = ("def add(a, b):\\n", "    return total\\n")
parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
ids = [{special.end_of_text}, {special.prefix}, *parts[0], {special.suffix}, *parts[1], {special.middle}]
output = model.generate(torch.tensor([ids]), max_new_tokens=20)
print(tokenizer.decode(output[0, len(ids) :]))"""
    prompt = 'prompt = "def add(a, b):"'
    if template is not None:
        prompt = f'source = {_literal(SOURCE)}\nprompt = {_literal(template.prompt)}.replace("{{source}}", source)'
    return f"{prompt}\n{BIDIRECTIONAL if kind.bidirectional_prompt else CAUSAL}"


CAUSAL = """\
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
length = inputs["input_ids"].shape[1]
output = model.generate(**inputs, max_new_tokens=min(64, model.config.n_positions - length), do_sample=False)
print(prompt + tokenizer.decode(output[0, length:], skip_special_tokens=True))"""

BIDIRECTIONAL = """\
import torch

ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
length = ids.shape[1]
for _ in range(min(64, model.config.n_positions - length)):
    place = torch.arange(ids.shape[1])
    mask = (place <= place[:, None]) | (place < length - 1)  # bidirectional in the prompt, except its last token
    token = model(ids, attention_mask=mask[None, None], use_cache=False).logits[0, -1].argmax()
    if token == tokenizer.eos_token_id:
        break
    ids = torch.cat([ids, token.view(1, 1)], 1)
print(prompt + tokenizer.decode(ids[0, length:]))"""
