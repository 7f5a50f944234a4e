"""Inspecting: generate.py inspect=true — a page on what goes on in the model while it reads what was written."""

import sys
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.storage.model_folder import folder_of, read_shape
from launch.config.key_value_cli import check_output_file
from launch.generate.generator import Arguments, Author, Text

PAGE = "inspect.html"


def check_inspection(arguments: Arguments) -> None:
    """Find out before the work what cannot be shown.

    Raises:
        InputError: more than one text, keys that need inspect=true, no such teacher, or a page that cannot be written.
    """
    if not arguments.inspect:
        for key, value in (("teacher", arguments.teacher), ("inspect_file", arguments.inspect_file)):
            if value:
                raise InputError(f"{key}={value} is read with inspect=true only.\nGive that too, or leave {key} out.")
        return
    if not arguments.prompt or arguments.num_samples > 1 or arguments.draft:
        raise InputError(
            "inspect=true shows one text of one model.\nGive prompt=, and leave out prompts, num_samples and draft."
        )
    if arguments.teacher:
        folder_of(arguments.teacher, "teacher")
    check_output_file(str(page_of(arguments)), "inspect_file")


def page_of(arguments: Arguments) -> Path:
    """Where the page is written: the named file or folder, else the run directory, else the current folder."""
    if arguments.inspect_file:
        named = Path(arguments.inspect_file).expanduser()
        return named / PAGE if named.is_dir() else named
    folder = folder_of(arguments.checkpoint, "checkpoint")
    is_run = folder.name == "hf" and (folder.parent / "config.yaml").is_file()
    return (folder.parent if is_run else Path.cwd()) / PAGE


def inspect_written(author: Author, text: Text) -> None:
    """Write the page about a prompt and what the model wrote, and say on stderr where it is.

    Raises:
        InputError: a teacher that numbers tokens differently.
    """
    from gpt2lab.data.special_tokens import marks_of
    from gpt2lab.generation.completion import prompt_ids
    from gpt2lab.model.backbone import load_backbone
    from gpt2lab.reports.inspection import reading_of_gaps, reading_of_text
    from gpt2lab.reports.inspection_html import write_inspection

    arguments, objective, room, teacher = author.arguments, author.objective, author.positions, None
    if arguments.teacher:
        room = min(room, _teacher_positions(author))
        teacher = load_backbone(arguments.teacher).lm.to(author.device).eval()
    prompt = prompt_ids(text.prompt, author.tokenizer, objective)
    if author.kind.fills_masks:
        reading = reading_of_gaps(prompt, text.ids[-room:], marks_of(author.tokenizer).mask)
    else:
        read = prompt[-(author.positions - arguments.max_new_tokens) :]  # what writing left of it
        reading = reading_of_text(read, text.ids, objective, written=True, room=room)
    page = page_of(arguments)
    write_inspection(
        page,
        arguments.checkpoint,
        author.model.float(),
        reading,
        author.tokenizer,
        objective=objective,
        teacher=teacher,
        teacher_name=arguments.teacher,
    )
    print(f"What goes on inside: {page}", file=sys.stderr)


def _teacher_positions(author: Author) -> int:
    """How much text the teacher can read."""
    from gpt2lab.data.tokenizer import difference_in_words

    source, entries = author.arguments.teacher, len(author.tokenizer)
    folder = folder_of(source, "teacher")
    shape, different = read_shape(folder), difference_in_words(folder, author.tokenizer)
    size = shape["vocab_size"]
    if different or size < entries:
        raise InputError(
            f"teacher={source} has other tokens than the checkpoint: {size} entries, {entries}.{different}\n"
            "Give a teacher with the same tokenizer."
        )
    return shape["n_positions"]
