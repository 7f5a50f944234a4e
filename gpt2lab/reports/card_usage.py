"""Usage section of a model card: Python code that runs the model with transformers only."""

import json

from transformers import PreTrainedTokenizerBase

from gpt2lab.data.pair_template import PairTemplate
from gpt2lab.data.special_tokens import find_special_tokens
from gpt2lab.settings import OBJECTIVES

FOLDER = "path/to/this/folder"
SOURCES = ("def add(a, b):\n    return a + b", "def name(self):\n    return self._name")


def usage(
    source: str, revision: str, objective: str, tokenizer: PreTrainedTokenizerBase, template: PairTemplate | None
) -> str:
    """Return the section.

    Args:
        source: repository on the Hub, or FOLDER.
        revision: branch of the repository; empty: its main one.
        template: prompt template of a model trained on pairs; None: a model that continues text.
    """
    given = f'folder, revision="{revision}"' if revision else "folder"
    return f"""{_template_facts(template, objective)}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{source}"
tokenizer, model = AutoTokenizer.from_pretrained({given}), AutoModelForCausalLM.from_pretrained({given})
{example(objective, tokenizer, template)}
```"""


def _template_facts(template: PairTemplate | None, objective: str) -> str:
    if template is None:
        return ""
    mask = (
        "Prompts of different length are padded on the left,\nand the attention mask hides the padding. Any token "
        "can be the padding, since it is hidden."
    )
    if OBJECTIVES[objective].bidirectional_prompt:
        mask = "The attention mask is bidirectional\nin the prompt."
    return f"""
The model was trained on pairs of a source and a target text, in these templates; the response ends with end-of-text:

- prompt: `{literal(template.prompt)}`
- response: `{literal(template.response)}`

In the code below, replace the source by texts like those that the model was trained on. {mask}
"""


def literal(text: str) -> str:
    """Return a Python string literal on one line, without backticks, which Markdown would read."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\x60")


def example(objective: str, tokenizer: PreTrainedTokenizerBase, template: PairTemplate | None) -> str:
    """Return Python code for `tokenizer` and `model`.

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
    if template is None:
        return f'prompt = "def add(a, b):"\n{BIDIRECTIONAL if kind.bidirectional_prompt else CAUSAL}'
    filled = f'{literal(template.prompt)}.replace("{{source}}", source)'
    if kind.bidirectional_prompt:
        return f"source = {literal(SOURCES[0])}\nprompt = {filled}\n{BIDIRECTIONAL}"
    return f"sources = [{', '.join(map(literal, SOURCES))}]\nprompts = [{filled} for source in sources]\n{PADDED}"


PADDED = """\
tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")  # ids and attention mask
length = inputs["input_ids"].shape[1]
output = model.generate(**inputs, max_new_tokens=min(64, model.config.n_positions - length), do_sample=False)
for prompt, ids in zip(prompts, output):
    print(prompt + tokenizer.decode(ids[length:], skip_special_tokens=True))"""

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
