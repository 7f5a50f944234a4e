"""Writes text with any checkpoint.

    python generate.py checkpoint=runs/pretrain/nano-… prompt="def add(a, b):" max_new_tokens=64 temperature=0.8
    python generate.py checkpoint=RUN_OF_OBJECTIVE_FIM prompt="def add(a, b):<|mask|>    return total"

Arguments are key=value and taken verbatim: a prompt may hold `=`, commas, colons and newlines.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.marks import PLACE
from gpt2lab.model_folder import folder_of, read_objective, read_shape
from launch.answer import end
from launch.key_values import argument, check_output_file, describe, parse


@dataclass
class Arguments:
    checkpoint: str = argument("a run directory, a Hugging Face folder or a Hub id")
    prompt: str = argument("the text to continue; where the objective was mlm or fim, <|mask|> is what to fill in")
    max_new_tokens: int = argument("most tokens to write", 128, at_least=1)
    temperature: float = argument("0 always takes the likeliest token", 0.8, at_least=0, at_most=100)
    top_k: int = argument("choose among the k likeliest tokens; 0: among all", 0, at_least=0)
    top_p: float = argument(
        "choose among the likeliest tokens that hold this probability", 0.95, at_least=0.01, at_most=1
    )
    num_samples: int = argument("how many texts", 1, at_least=1, at_most=1000)
    seed: int = argument("the same seed gives the same text", 1337, at_least=0, at_most=2**63 - 1)
    accelerator: str = argument("where to compute", "auto", choices=("auto", "cpu", "gpu", "mps"))
    json: str = argument("also write {prompt, completion, tokens, seconds} of each text to this file", "")


@dataclass(frozen=True)
class Text:
    """What was written: under mlm `completion` is the prompt with its gaps filled, and `tokens` counts these."""

    prompt: str
    completion: str
    tokens: int
    seconds: float
    whole: str  # to be shown


def generate(arguments: Arguments) -> list[Text]:
    """One text for each sample; they are drawn together and share their seconds.

    Raises:
        InputError: no such checkpoint or device, or no room for the tokens asked for.
    """
    folder = folder_of(arguments.checkpoint, "checkpoint")
    positions = read_shape(folder)["n_positions"]
    if arguments.max_new_tokens >= positions:
        raise InputError(
            f"max_new_tokens={arguments.max_new_tokens} does not fit into the model's {positions} positions "
            f"beside a prompt; give at most {positions - 1}."
        )
    from transformers import logging  # these take seconds; mistakes are told before

    from gpt2lab.backbone import load_backbone
    from gpt2lab.device import named_device, synchronize
    from gpt2lab.completion import complete, prompt_ids
    from gpt2lab.generation import Sampling
    from gpt2lab.tokenizer import load_tokenizer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = named_device(arguments.accelerator)
    model = load_backbone(str(folder)).lm.to(device)
    tokenizer = load_tokenizer(str(folder))
    sampling = Sampling("chosen", arguments.temperature, arguments.top_k, arguments.top_p)
    objective = read_objective(folder)
    ids = prompt_ids(arguments.prompt, tokenizer, objective)
    if len(ids) > positions - arguments.max_new_tokens:
        print("The prompt is longer than the model can see; its last tokens are continued.", file=sys.stderr)
    gaps = arguments.prompt.count(PLACE)
    started = time.perf_counter()
    completions = complete(
        model,
        tokenizer,
        objective,
        [ids] * arguments.num_samples,
        sampling,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
    )
    synchronize(device)

    def whole(text: str) -> str:
        if not gaps:
            return arguments.prompt + text
        return text if objective == "mlm" else arguments.prompt.replace(PLACE, text)

    seconds = round(time.perf_counter() - started, 3)
    return [
        Text(arguments.prompt, text, gaps if objective == "mlm" else len(ids), seconds, whole(text))
        for ids, text in ((ids, tokenizer.decode(ids)) for ids in completions)
    ]


def main() -> None:
    arguments = parse(sys.argv[1:], Arguments)
    check_output_file(arguments.json)
    written = generate(arguments)
    for number, text in enumerate(written, 1):
        if len(written) > 1:
            print(f"--- {number} of {len(written)}")
        print(text.whole)
    if arguments.json:
        from gpt2lab.atomic_files import write_json

        fields = ("prompt", "completion", "tokens", "seconds")
        write_json(Path(arguments.json), [{name: vars(text)[name] for name in fields} for text in written])


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{describe(Arguments)}")
        sys.exit(0)
    end(main)
