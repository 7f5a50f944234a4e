"""Inspection page of generate.py inspect=true: attention, surprise and a teacher's predictions for one text."""

import sys
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.storage.model_folder import read_shape, resolve_model_folder
from launch.config.key_value_cli import check_output_file
from launch.generate.generator import Arguments, Text, TextGenerator

PAGE = "inspect.html"


def check_inspection(arguments: Arguments) -> None:
    """Check the arguments before the model is loaded.

    Raises:
        InputError: more than one text, arguments that need inspect=true, a missing teacher, or an unwritable page.
    """
    if not arguments.inspect:
        for key, value in (("teacher", arguments.teacher), ("inspect_file", arguments.inspect_file)):
            if value:
                raise InputError(f"{key}={value} is used with inspect=true only.\nAdd it, or leave {key} out.")
        return
    if not (arguments.prompt or arguments.source) or arguments.num_samples > 1 or arguments.draft:
        raise InputError(
            "inspect=true shows one text of one model.\n"
            "Give prompt= or source=, and leave out prompts, num_samples and draft."
        )
    if arguments.teacher:
        resolve_model_folder(arguments.teacher, "teacher")
    check_output_file(str(page_path(arguments)), "inspect_file")


def page_path(arguments: Arguments) -> Path:
    """Return the path of the page: `inspect_file`, else in the run directory, else in the working directory."""
    if arguments.inspect_file:
        given = Path(arguments.inspect_file).expanduser()
        return given / PAGE if given.is_dir() else given
    folder = resolve_model_folder(arguments.checkpoint, "checkpoint")
    is_run = folder.name == "hf" and (folder.parent / "config.yaml").is_file()
    return (folder.parent if is_run else Path.cwd()) / PAGE


def inspect_text(generator: TextGenerator, text: Text) -> None:
    """Write the page about a generated text, and print its path on stderr.

    Raises:
        InputError: the teacher has another tokenizer.
    """
    from gpt2lab.data.special_tokens import find_special_tokens
    from gpt2lab.generation.completion import prompt_ids
    from gpt2lab.model.backbone import load_backbone
    from gpt2lab.reports.inspection import reading_of_gaps, reading_of_text
    from gpt2lab.reports.inspection_html import write_inspection

    arguments, objective, positions, teacher = generator.arguments, generator.objective, generator.positions, None
    if arguments.teacher:
        positions = min(positions, _teacher_positions(generator))
        teacher = load_backbone(arguments.teacher).lm.to(generator.device).eval()
    prompt = prompt_ids(text.prompt, generator.tokenizer, objective)
    if generator.kind.fills_masks:
        reading = reading_of_gaps(prompt, text.ids[-positions:], find_special_tokens(generator.tokenizer).mask)
    else:
        used = prompt[-(generator.positions - arguments.max_new_tokens) :]  # generation truncates a long prompt
        reading = reading_of_text(used, text.ids, objective, written=True, max_tokens=positions)
    page = page_path(arguments)
    write_inspection(
        page,
        arguments.checkpoint,
        generator.model.float(),
        reading,
        generator.tokenizer,
        objective=objective,
        teacher=teacher,
        teacher_name=arguments.teacher,
    )
    print(f"Inspection: {page}", file=sys.stderr)


def _teacher_positions(generator: TextGenerator) -> int:
    """Maximum context length of the teacher."""
    from gpt2lab.data.tokenizer import describe_difference

    source, tokens = generator.arguments.teacher, len(generator.tokenizer)
    folder = resolve_model_folder(source, "teacher")
    shape, different = read_shape(folder), describe_difference(folder, generator.tokenizer)
    size = shape["vocab_size"]
    if different or size < tokens:
        raise InputError(
            f"teacher={source} has another tokenizer than the checkpoint: {size} and {tokens} tokens.{different}\n"
            "Give a teacher with the same tokenizer."
        )
    return shape["n_positions"]
