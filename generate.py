"""Writes text with any checkpoint.

    python generate.py checkpoint=runs/pretrain/nano-… prompt="def add(a, b):" max_new_tokens=64 temperature=0.8
    python generate.py checkpoint=RUN prompts=prompts.txt beams=4 json=written.json
    python generate.py checkpoint=RUN                                  asks for prompts and writes as it goes
    python generate.py checkpoint=TEACHER draft=STUDENT prompt="import " temperature=0
    python generate.py checkpoint=RUN_OF_OBJECTIVE_FIM prompt="def add(a, b):<|mask|>    return total"

Arguments are key=value and taken verbatim: a prompt may hold `=`, commas, colons and newlines.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from launch.answer import end
from launch.key_values import argument, check_output_file, describe, parse


@dataclass
class Arguments:
    checkpoint: str = argument("a run directory, a Hugging Face folder or a Hub id")
    prompt: str = argument("the text to continue; mlm and fim fill in <|mask|>; left out: you are asked", "")
    prompts: str = argument("a file of prompts: a .jsonl with `prompt` in each line, else one a line", "")
    draft: str = argument("decode speculatively with this smaller model, and compare with plain decoding", "")
    max_new_tokens: int = argument("most tokens to write", 128, at_least=1)
    temperature: float = argument("0 always takes the likeliest token", 0.8, at_least=0, at_most=100)
    top_k: int = argument("choose among the k likeliest tokens; 0: among all", 0, at_least=0)
    top_p: float = argument(
        "choose among the likeliest tokens that hold this probability", 0.95, at_least=0.01, at_most=1
    )
    min_p: float = argument("leave out what has less than this share of the likeliest", 0.0, at_least=0, at_most=1)
    typical_p: float = argument("choose among the most typical tokens that hold this", 1.0, at_least=0.01, at_most=1)
    beams: int = argument("beam search over so many texts; nothing is drawn then", 1, at_least=1, at_most=100)
    repetition_penalty: float = argument("above 1 what is there is less likely", 1.0, at_least=0.01, at_most=100)
    no_repeat_ngram: int = argument("never write so many tokens in a row twice; 0: no limit", 0, at_least=0)
    stop: str = argument("text that ends a completion, and is left out of it; several: separated by ||", "")
    num_samples: int = argument("how many texts for each prompt", 1, at_least=1, at_most=1000)
    seed: int = argument("the same seed gives the same text", 1337, at_least=0, at_most=2**63 - 1)
    accelerator: str = argument("where to compute", "auto", choices=("auto", "cpu", "gpu", "mps"))
    json: str = argument("also write {prompt, completion, tokens, seconds} of each text to this file", "")


def main() -> None:
    arguments = parse(sys.argv[1:], Arguments)
    check_output_file(arguments.json)
    from launch import writing

    author = writing.Author(arguments)
    if not arguments.prompt and not arguments.prompts:
        return author.converse()
    written = author.speculate() if arguments.draft else author.write()
    if arguments.json:
        from gpt2lab.atomic_files import write_json

        write_json(Path(arguments.json), [text.facts for text in written])
    return None


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{describe(Arguments)}")
        sys.exit(0)
    end(main)
