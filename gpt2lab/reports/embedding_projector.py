"""Embedding projector: export token embeddings for TensorBoard's projector or projector.tensorflow.org.

tensors.tsv              one embedding per line
metadata.tsv             header, then token, id and kind of each
projector_config.pbtxt   paths of the two

tensorboard --logdir FOLDER
"""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gpt2lab.reports.token_display import token_texts, with_signs
from gpt2lab.storage.atomic_files import write_text

MAX_TOKENS = 5000  # limit of the projector's layout; the first tokens of a byte-level BPE are the most frequent
CONFIG = """embeddings {{
  tensor_name: "token embeddings"
  tensor_path: "tensors.tsv"
  tensor_shape: {rows}
  tensor_shape: {width}
  metadata_path: "metadata.tsv"
}}
"""


def write_projector(folder: Path, weight: Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the three files, the configuration last.

    Args:
        weight: (V, D) embeddings, of which the first 5,000 are written.
    """
    rows = weight[: min(len(tokenizer), MAX_TOKENS)].detach().float().cpu().tolist()
    texts = token_texts(tokenizer, range(len(rows)))
    lines = [f"{with_signs(text)}\t{number}\t{kind(text)}" for number, text in enumerate(texts)]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tensors.tsv", "".join("\t".join(f"{value:.5g}" for value in row) + "\n" for row in rows))
    write_text(folder / "metadata.tsv", "\n".join(["token\tid\tkind", *lines]) + "\n")
    write_text(folder / "projector_config.pbtxt", CONFIG.format(rows=len(rows), width=len(rows[0])))


def kind(text: str) -> str:
    """Classify a token's text, for colours."""
    inner = text.strip()
    if not inner:
        return "whitespace"
    if inner.isdigit():
        return "number"
    if not any(letter.isalnum() for letter in inner):
        return "punctuation"
    if not inner.replace("_", "").isalnum():
        return "mixed"
    return "word" if text[0] == " " else "part of a word"
