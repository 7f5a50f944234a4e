"""Text generation of generate.py: prompts from the command line, a file or the terminal; speculative decoding."""

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.data.special_tokens import MASK_PLACEHOLDER
from gpt2lab.errors import InputError
from gpt2lab.keys import key, same_key
from gpt2lab.settings import OBJECTIVES, SAMPLING_PRESETS, SamplingSettings
from gpt2lab.storage.model_folder import read_objective, read_pair_template, read_shape, resolve_model_folder
from gpt2lab.system.terminal import Phase
from launch.config.key_value_cli import group_key
from launch.config.plain_keys import MachineKeys
from launch.generate.prompts import given_prompts, stdin_lines
from launch.logging_setup import announce, configure_logging, silence_libraries

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel
    from transformers.generation.streamers import BaseStreamer


SEPARATOR = "||"  # of stop texts
PORT = 7860
PRESETS = SAMPLING_PRESETS | {"auto": SamplingSettings("nucleus", temperature=0.8, top_p=0.95)}


@dataclass
class Arguments:
    """Command-line arguments of generate.py."""

    checkpoint: str = key("model: a run directory, a Hugging Face folder or a Hub id")
    prompt: str = key("text to continue; mlm and fim fill in <|mask|>; by default read from the terminal", "")
    prompts: str = key("file of prompts: a .jsonl with `prompt` or `source` in each line, else one prompt per line", "")
    source: str = key("text that the prompt template of a fine-tuned model is put around, in place of prompt=", "")
    draft: str = key("draft model for speculative decoding, which is compared with plain decoding", "")
    max_new_tokens: int = key("maximum number of generated tokens", 128, within="[1, inf)")
    sampling: SamplingSettings = group_key(
        "choice of each token; auto: nucleus with temperature=0.8 and top_p=0.95", PRESETS
    )
    stop: str = key("text that ends a completion and is removed; several: a||b; disables streaming", "")
    num_samples: int = key("number of completions per prompt", 1, within="[1, 1000]")
    seed: int = key("random seed of the sampling", 1337, within="[0, 9223372036854775807]")
    accelerator: str = same_key(MachineKeys, "accelerator", "auto")
    precision: str = key(
        "dtype of weights and matrix products; bf16 needs half the memory", "fp32", choices=("fp32", "bf16")
    )
    serve: bool = key("serve a playground page on this machine (localhost) instead of generating", False)
    port: int = key("port of the playground page; 0: any free port", PORT, within="[0, 65535]")
    inspect: bool = key("write a page with attention maps and the loss of every token of prompt and text", False)
    inspect_file: str = key("file of the inspect page; by default inspect.html in the run directory, else here", "")
    teacher: str = key("model with the same tokenizer to compare with on the inspect page (inspect=true)", "")
    json: str = key("file for {prompt, completion, tokens, seconds} of each text", "")


@dataclass(frozen=True)
class Text:
    """A generated text.

    Attributes:
        completion: the text after, or in the gap of, the prompt; with mlm the prompt with its gaps filled.
        tokens: number of generated tokens.
        seconds: time of the batch that the text was generated in.
        measured: measurements of speculative decoding.
        ids: token ids of the completion.
    """

    prompt: str
    completion: str
    tokens: int
    seconds: float
    measured: dict[str, float] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        """Content for JSON."""
        own = {"prompt": self.prompt, "completion": self.completion, "tokens": self.tokens, "seconds": self.seconds}
        return own | self.measured


class TextGenerator:
    """A loaded checkpoint with sampling settings.

    Raises:
        InputError: a checkpoint, file or device does not exist, max_new_tokens is too large, or arguments conflict.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        folder = resolve_model_folder(arguments.checkpoint, "checkpoint")
        self.folder = folder
        self.positions, self.objective = read_shape(folder)["n_positions"], read_objective(folder)
        self.kind = OBJECTIVES[self.objective]
        self.given = given_prompts(arguments.prompt, arguments.source, arguments.prompts)
        template = read_pair_template(folder)
        self._check(has_template=bool(template))
        configure_logging()
        announce(f"Loading {arguments.checkpoint}")  # the following imports take seconds: arguments are checked first
        from gpt2lab.data.pair_template import PairTemplate
        from gpt2lab.data.tokenizer import load_tokenizer
        from gpt2lab.system.device import resolve_device

        silence_libraries()
        self.device = resolve_device(arguments.accelerator)
        self.model = self._load(folder)
        self.tokenizer = load_tokenizer(str(folder))
        self.template = PairTemplate(**template) if template else None
        self.stop = tuple(part for part in arguments.stop.split(SEPARATOR) if part)
        self.sampling = arguments.sampling
        self.was_interrupted = False  # by Ctrl-C at the prompt

    def generate(self) -> list[Text]:
        """Generate and print the texts of all prompts."""
        return self._print_texts(self._prompts())

    def interact(self) -> list[Text]:
        """Read prompts from the terminal and continue each, until end of file (Ctrl-D) or Ctrl-C at the prompt.

        Raises:
            InputError: a prompt is invalid that does not come from a terminal.
        """
        if sys.stdin.isatty():
            return self._converse()
        texts: list[Text] = []
        for number, prompt in enumerate(stdin_lines(), 1):
            try:
                texts += self._print_texts([prompt])
            except InputError as error:
                raise InputError(f"Line {number} of the standard input: {error}") from error
        return texts

    def _converse(self) -> list[Text]:
        """Continue prompts typed at the terminal. Ctrl-C ends a text that is being generated, at the prompt all."""
        texts: list[Text] = []
        note = "Enter continues the prompt, \\ and Enter begins a new line of it; Ctrl-C stops a text, Ctrl-D ends."
        print(note, file=sys.stderr)
        if self.template is not None:
            print(f"source=TEXT puts a text into the template {self.template.prompt!r}.", file=sys.stderr)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            for prompt in stdin_lines():
                try:
                    texts += self._print_texts([prompt])
                except InputError as error:
                    print(f"error: {error}", file=sys.stderr)
                except KeyboardInterrupt:
                    print("\nThis text was stopped. Ctrl-D ends the program.", file=sys.stderr)
            print("\nEnded by Ctrl-D.", file=sys.stderr)
        except KeyboardInterrupt:
            self.was_interrupted = True
            print("\nEnded by Ctrl-C.", file=sys.stderr)
        finally:
            signal.signal(signal.SIGINT, before)
        return texts

    def speculate(self) -> list[Text]:
        """Generate and print the text of each prompt with speculative decoding, and its speed-up."""
        from gpt2lab.generation.speculative import speculate

        arguments, draft, texts = self.arguments, self.load_draft(), []
        given = [(prompt, self._ids(prompt)) for prompt in self._prompts()]
        for number, (prompt, ids) in enumerate([given[0], *given]):
            found = speculate(
                self.model,
                draft,
                ids,
                self.sampling,
                max_new_tokens=arguments.max_new_tokens,
                end_of_text=self.tokenizer.eos_token_id,
                vocab_size=len(self.tokenizer),
                seed=arguments.seed,
                stop=self.stop,
                tokenizer=self.tokenizer,
            )
            if not number:
                continue  # warm-up with the first prompt
            measured = {name: round(value, 4) for name, value in found.figures().items()}
            texts.append(self._text(prompt, found.ids, round(found.seconds, 3), measured))
            print(self._full_text(texts[-1]))
            print(_speedup_line(texts[-1]), file=sys.stderr)
        return texts

    def load_draft(self) -> "GPT2LMHeadModel":
        """Load the draft model, and limit texts to the positions of both models.

        Raises:
            InputError: it does not exist or has another tokenizer.
        """
        folder = resolve_model_folder(self.arguments.draft, "draft")
        self._check_draft(folder)
        return self._load(folder)

    def _load(self, folder: Path) -> "GPT2LMHeadModel":
        import torch

        from gpt2lab.model.backbone import load_backbone

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.arguments.precision]
        return load_backbone(str(folder), dtype=dtype).lm.to(self.device).eval()

    def _print_texts(self, prompts: list[str]) -> list[Text]:
        """Generate and print texts; a single one is streamed in a terminal."""
        if len(prompts) == self.arguments.num_samples == 1 and sys.stdout.isatty() and self._can_stream:
            from transformers import TextStreamer

            ids = [self._ids(prompts[0])]  # which may print a notice
            print(prompts[0], end="", flush=True)
            streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
            return self._generate(prompts, ids, streamer)
        wanted = [prompt for prompt in prompts for _ in range(self.arguments.num_samples)]
        ids = [self._ids(prompt) for prompt in wanted]
        with Phase("generate", len(wanted), "texts") as phase:
            texts = self._generate(wanted, ids, on_texts=phase.advance)
        for number, text in enumerate(texts, 1):
            if len(texts) > 1:
                print(f"--- {number} of {len(texts)}")
            print(self._full_text(text))
        return texts

    def _generate(
        self,
        prompts: list[str],
        ids: list[list[int]],
        streamer: "BaseStreamer | None" = None,
        on_texts: Callable[[int], None] | None = None,
    ) -> list[Text]:
        from gpt2lab.generation.completion import complete
        from gpt2lab.system.device import synchronize

        begin = time.perf_counter()
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
            on_texts=on_texts,
        )
        synchronize(self.device)
        seconds = round(time.perf_counter() - begin, 3)
        pairs = zip(prompts, completions, strict=True)
        return [self._text(prompt, completion, seconds) for prompt, completion in pairs]

    def _text(self, prompt: str, ids: list[int], seconds: float, measured: dict[str, float] | None = None) -> Text:
        completion = self.tokenizer.decode(ids)
        for stop in self.stop:
            completion = completion.partition(stop)[0]
        tokens = prompt.count(MASK_PLACEHOLDER) if self.kind.fills_masks else len(ids)
        return Text(prompt, completion, tokens, seconds, measured or {}, ids)

    @property
    def _can_stream(self) -> bool:
        """Whether tokens can be printed as they are generated: no beams, gaps or stop texts."""
        return self.sampling.beams == 1 and not self.kind.rewrites_text and not self.stop

    def _prompts(self) -> list[str]:
        """Return the prompts, each source within the template; as in training, the end of a long source is cut."""
        return [self._filled(given.text) if given.is_source else given.text for given in self.given]

    def _filled(self, source: str) -> str:
        from gpt2lab.data.pair_template import fit_prompt

        assert self.template is not None
        prompt = fit_prompt(source, self.template, self.tokenizer, self.positions - self._new_positions)
        if prompt != self.template.render_prompt(source):
            print("A source is longer than the context of the model; its end is cut.", file=sys.stderr)
        return prompt

    def _ids(self, prompt: str) -> list[int]:
        from gpt2lab.generation.completion import prompt_ids

        ids = prompt_ids(prompt, self.tokenizer, self.objective)
        if len(ids) > self.positions - self._new_positions:
            print("A prompt is longer than the context of the model; only its last tokens are used.", file=sys.stderr)
        return ids

    def _full_text(self, text: Text) -> str:
        """The prompt with its continuation, or with its gap filled."""
        if self.kind.fills_masks:
            return text.completion
        return (
            text.prompt.replace(MASK_PLACEHOLDER, text.completion)
            if MASK_PLACEHOLDER in text.prompt
            else text.prompt + text.completion
        )

    @property
    def _new_positions(self) -> int:
        """Positions of new tokens; the gaps of mlm are positions of the prompt."""
        return 0 if self.kind.fills_masks else self.arguments.max_new_tokens

    def _check_positions(self) -> None:
        if self._new_positions >= self.positions:
            raise InputError(
                f"max_new_tokens={self.arguments.max_new_tokens} and a prompt do not fit into the model's "
                f"{self.positions} positions; give at most {self.positions - 1}."
            )

    def _check(self, has_template: bool) -> None:
        arguments = self.arguments
        self._check_positions()
        if not has_template and any(given.is_source for given in self.given):
            raise InputError(
                f"checkpoint={arguments.checkpoint} stores no prompt template for source=: only training on pairs "
                "(task=finetune) does.\nGive the whole prompt: prompt=TEXT"
            )
        if self.kind.fills_masks and arguments.sampling != PRESETS["auto"]:
            raise InputError("sampling= continues text, but objective=mlm fills masks.\nLeave sampling out.")
        if arguments.num_samples > 1 and (arguments.sampling.is_greedy or self.kind.fills_masks):
            raise InputError(
                f"num_samples={arguments.num_samples} texts would all be the same: sampling=greedy, sampling=beam and "
                "objective=mlm do not sample.\nLeave num_samples out, or sample: sampling=nucleus"
            )
        if arguments.draft and (arguments.sampling.beams > 1 or arguments.num_samples > 1):
            raise InputError("draft decodes one text at a time.\nLeave out sampling=beam and num_samples.")
        if arguments.draft and not self.kind.is_causal:
            raise InputError(
                f"draft supports causal models only, and this one was trained with objective={self.objective}.\n"
                "Leave draft out."
            )
        if arguments.draft and not self.given and not arguments.serve:
            raise InputError("draft needs prompt= or prompts=, or source= of a fine-tuned model.")
        if arguments.port != PORT and not arguments.serve:
            raise InputError("port= needs serve=true.\nAdd serve=true, or leave port= out.")

    def _check_draft(self, folder: Path) -> None:
        from gpt2lab.data.tokenizer import describe_difference

        different = describe_difference(folder, self.tokenizer)
        shape = read_shape(folder)
        if different or shape["vocab_size"] != self.model.config.vocab_size:
            raise InputError(
                f"draft={self.arguments.draft} has another tokenizer than the checkpoint: vocabularies of "
                f"{shape['vocab_size']} and {self.model.config.vocab_size} tokens.{different}\n"
                "Give a draft with the same tokenizer, such as a student distilled from the checkpoint."
            )
        self.positions = min(self.positions, shape["n_positions"])
        self._check_positions()


def _speedup_line(text: Text) -> str:
    """One line with the measurements of speculative decoding."""
    found = text.measured
    return (
        f"{text.tokens} tokens in {text.seconds:.2f} s, without draft in {found['plain_seconds']:.2f} s: "
        f"{found['speedup']:.2f} × as fast (predicted {found['predicted_speedup']:.2f} ×) · "
        f"{found['tokens_per_call']:.2f} tokens per call · acceptance {found['acceptance']:.2f} · "
        f"cost ratio {found['cost_ratio']:.3f} · verification costs {found['look_ratio']:.2f} steps"
    )
