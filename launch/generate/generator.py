"""Writing: what generate.py does — prompts from the command line, a file or the terminal; text as it comes; drafts."""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.data.special_tokens import PLACE
from gpt2lab.errors import InputError
from gpt2lab.settings import OBJECTIVES
from gpt2lab.storage.model_folder import folder_of, read_objective, read_shape
from launch.config.key_value_cli import argument
from launch.logging_setup import settle_library_noise, settle_noise

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel
    from transformers.generation.streamers import BaseStreamer

    from gpt2lab.generation.sampling import Sampling

SEPARATOR = "||"  # of stop texts
PORT = 7860


@dataclass
class Arguments:
    """What generate.py takes."""

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
    stop: str = argument("text that ends a completion and is left out; so nothing is shown before; several: a||b", "")
    num_samples: int = argument("how many texts for each prompt", 1, at_least=1, at_most=1000)
    seed: int = argument("the same seed gives the same text", 1337, at_least=0, at_most=2**63 - 1)
    accelerator: str = argument("where to compute", "auto", choices=("auto", "cpu", "gpu", "mps"))
    precision: str = argument(
        "number format of weights and products; bf16 takes half the memory", "fp32", choices=("fp32", "bf16")
    )
    serve: bool = argument("open a page in the browser instead, on this machine alone", False)
    port: int = argument("of that page; 0: any that is free", PORT, at_least=0, at_most=65535)
    inspect: bool = argument("also show what goes on inside the model while it reads prompt and text, as a page", False)
    inspect_file: str = argument("where that page is written; left out: inspect.html in the run directory, or here", "")
    teacher: str = argument("with inspect=true: a model with the same tokenizer, to show where the two disagree", "")
    json: str = argument("also write {prompt, completion, tokens, seconds} of each text to this file", "")


@dataclass(frozen=True)
class Text:
    """What was written after, or into, a prompt.

    Attributes:
        completion: under mlm the prompt with its gaps filled.
        tokens: that were written.
        ids: of the completion.
        seconds: of all texts that were written together.
        measured: of speculative decoding.
    """

    prompt: str
    completion: str
    tokens: int
    seconds: float
    measured: dict[str, float] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        """For JSON."""
        own = {"prompt": self.prompt, "completion": self.completion, "tokens": self.tokens, "seconds": self.seconds}
        return own | self.measured


class Author:
    """A loaded checkpoint and how it is to write.

    Raises:
        InputError: no such checkpoint, file or device, no room for the tokens asked for, or keys that contradict.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        folder = folder_of(arguments.checkpoint, "checkpoint")
        self.positions, self.objective = read_shape(folder)["n_positions"], read_objective(folder)
        self.kind = OBJECTIVES[self.objective]
        self.prompts = [arguments.prompt] if arguments.prompt else _prompts_in(arguments.prompts)
        self._check()
        settle_noise()  # what follows takes seconds to import; mistakes are told before
        from gpt2lab.data.tokenizer import load_tokenizer
        from gpt2lab.system.device import named_device

        settle_library_noise()
        self.device = named_device(arguments.accelerator)
        self.model = self._loaded(folder)
        self.tokenizer = load_tokenizer(str(folder))
        self.stop = tuple(part for part in arguments.stop.split(SEPARATOR) if part)
        self.sampling = chosen_sampling(arguments)

    def write(self) -> list[Text]:
        """Every prompt's texts, shown."""
        return self._show(self.prompts)

    def converse(self) -> list[Text]:
        """Ask for prompts and write after each, until there are no more (Ctrl-D)."""
        texts: list[Text] = []
        if sys.stdin.isatty():
            print("A prompt is continued at Enter; Ctrl-D ends.", file=sys.stderr)
        while True:
            try:
                prompt = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return texts
            try:
                texts += self._show([prompt])
            except InputError as mistake:
                print(f"error: {mistake}", file=sys.stderr)

    def speculate(self) -> list[Text]:
        """Every prompt's text by speculative decoding, shown, and beside it what that was worth."""
        from gpt2lab.generation.speculative import speculate

        arguments, draft, texts = self.arguments, self.load_draft(), []
        given = [(prompt, self._ids(prompt)) for prompt in self.prompts]
        for number, (prompt, ids) in enumerate([given[0], *given]):
            found = speculate(
                self.model,
                draft,
                ids,
                self.sampling,
                max_new_tokens=arguments.max_new_tokens,
                end_of_text=self.tokenizer.eos_token_id,
                entries=len(self.tokenizer),
                seed=arguments.seed,
                stop=self.stop,
                tokenizer=self.tokenizer,
            )
            if not number:
                continue  # the first time warms up
            measured = {name: round(value, 4) for name, value in found.figures().items()}
            texts.append(self._text(prompt, found.ids, round(found.seconds, 3), measured))
            print(self._whole(texts[-1]))
            print(_in_words(texts[-1]), file=sys.stderr)
        return texts

    def load_draft(self) -> "GPT2LMHeadModel":
        """The draft model; a text then fits into the positions of both."""
        folder = folder_of(self.arguments.draft, "draft")
        self._check_draft(folder)
        return self._loaded(folder)

    def _loaded(self, folder: Path) -> "GPT2LMHeadModel":
        import torch

        from gpt2lab.model.backbone import load_backbone

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.arguments.precision]
        return load_backbone(str(folder), dtype=dtype).lm.to(self.device).eval()

    def _show(self, prompts: list[str]) -> list[Text]:
        """The texts of some prompts; a single one is shown as it is written, where somebody watches."""
        if len(prompts) == self.arguments.num_samples == 1 and sys.stdout.isatty() and self._streams:
            from transformers import TextStreamer

            print(prompts[0], end="", flush=True)
            return self._written(prompts, TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True))
        texts = self._written([prompt for prompt in prompts for _ in range(self.arguments.num_samples)])
        for number, text in enumerate(texts, 1):
            if len(texts) > 1:
                print(f"--- {number} of {len(texts)}")
            print(self._whole(text))
        return texts

    def _written(self, prompts: list[str], streamer: "BaseStreamer | None" = None) -> list[Text]:
        from gpt2lab.generation.completion import complete
        from gpt2lab.system.device import synchronize

        ids = [self._ids(prompt) for prompt in prompts]
        started = time.perf_counter()
        completions = complete(
            self.model,
            self.tokenizer,
            self.objective,
            ids,
            self.sampling,
            max_new_tokens=self.arguments.max_new_tokens,
            seed=self.arguments.seed,
            stop=self.stop,
            streamer=streamer,
        )
        synchronize(self.device)
        seconds = round(time.perf_counter() - started, 3)
        pairs = zip(prompts, completions, strict=True)
        return [self._text(prompt, written, seconds) for prompt, written in pairs]

    def _text(self, prompt: str, ids: list[int], seconds: float, measured: dict[str, float] | None = None) -> Text:
        completion = self.tokenizer.decode(ids)
        for stop in self.stop:
            completion = completion.partition(stop)[0]
        tokens = prompt.count(PLACE) if self.kind.fills_masks else len(ids)
        return Text(prompt, completion, tokens, seconds, measured or {}, ids)

    @property
    def _streams(self) -> bool:
        """Whether tokens can be shown as they come: no beams, no gaps, nothing to cut off."""
        return self.sampling.beams == 1 and not self.kind.rewrites_text and not self.stop

    def _ids(self, prompt: str) -> list[int]:
        from gpt2lab.generation.completion import prompt_ids

        ids = prompt_ids(prompt, self.tokenizer, self.objective)
        if len(ids) > self.positions - self._new_positions:
            print("A prompt is longer than the model can see; only its last tokens are read.", file=sys.stderr)
        return ids

    def _whole(self, text: Text) -> str:
        """The prompt continued, or with its gap filled."""
        if self.kind.fills_masks:
            return text.completion
        return text.prompt.replace(PLACE, text.completion) if PLACE in text.prompt else text.prompt + text.completion

    @property
    def _new_positions(self) -> int:
        """Of what is written; gaps have theirs within the prompt."""
        return 0 if self.kind.fills_masks else self.arguments.max_new_tokens

    def _check_room(self) -> None:
        if self._new_positions >= self.positions:
            raise InputError(
                f"max_new_tokens={self.arguments.max_new_tokens} does not fit into the model's {self.positions} "
                f"positions beside a prompt; give at most {self.positions - 1}."
            )

    def _check(self) -> None:
        arguments = self.arguments
        self._check_room()
        if arguments.prompt and arguments.prompts:
            raise InputError("prompt and prompts are both given.\nGive one of them.")
        if arguments.num_samples > 1 and (not arguments.temperature or arguments.beams > 1 or self.kind.fills_masks):
            raise InputError(
                f"num_samples={arguments.num_samples} texts would all be the same: nothing is drawn with "
                "temperature=0, with beams, or of objective=mlm.\nLeave num_samples out, or draw: temperature=0.8"
            )
        if arguments.draft and (arguments.beams > 1 or arguments.num_samples > 1):
            raise InputError("draft decodes one text at a time.\nLeave out beams and num_samples.")
        if arguments.draft and not self.kind.is_causal:
            raise InputError(
                f"draft is for causal models, and this one was trained with objective={self.objective}.\n"
                "Leave draft out."
            )
        if arguments.draft and not self.prompts and not arguments.serve:
            raise InputError("draft needs prompt= or prompts=.")
        if arguments.port != PORT and not arguments.serve:
            raise InputError("port= is of the page that serve=true opens.\nAdd serve=true, or leave port= out.")

    def _check_draft(self, folder: Path) -> None:
        from gpt2lab.data.tokenizer import difference_in_words

        different = difference_in_words(folder, self.tokenizer)
        shape = read_shape(folder)
        if different or shape["vocab_size"] != self.model.config.vocab_size:
            raise InputError(
                f"draft={self.arguments.draft} has other tokens than the checkpoint: {shape['vocab_size']} entries, "
                f"{self.model.config.vocab_size}.{different}\nGive a draft distilled from the checkpoint, for example."
            )
        self.positions = min(self.positions, shape["n_positions"])
        self._check_room()


def chosen_sampling(arguments: Arguments) -> "Sampling":
    """How the arguments say that the next token is chosen."""
    from gpt2lab.generation.sampling import Sampling

    return Sampling(
        "chosen",
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        typical_p=arguments.typical_p,
        beams=arguments.beams,
        repetition_penalty=arguments.repetition_penalty,
        no_repeat_ngram=arguments.no_repeat_ngram,
    )


def _prompts_in(file: str) -> list[str]:
    """The prompts of a file; none where no file is named."""
    if not file:
        return []
    path = Path(file).expanduser()
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"prompts={file} cannot be read: {error}.\nGive a text file, or a .jsonl with `prompt`."
        ) from error
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"prompts={file} holds no prompt.\nGive a text file, or a .jsonl with `prompt`.")
    return prompts


def _in_words(text: Text) -> str:
    """What speculative decoding was worth, in one line."""
    found = text.measured
    return (
        f"{text.tokens} tokens in {text.seconds:.2f} s, plain in {found['plain_seconds']:.2f} s: "
        f"{found['speedup']:.2f} × (implied {found['predicted_speedup']:.2f}) · "
        f"{found['tokens_per_call']:.2f} tokens per call · acceptance {found['acceptance']:.2f} · "
        f"cost ratio {found['cost_ratio']:.3f} · a look costs {found['look_ratio']:.2f} steps"
    )
