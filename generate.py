"""Generates text with any checkpoint.

    python generate.py checkpoint=runs/pretrain/nano-… prompt="def add(a, b):" sampling.temperature=0.5
    python generate.py checkpoint=RUN prompts=prompts.txt sampling=beam sampling.beams=4 json=written.json
    python generate.py checkpoint=FINETUNED source="def add(a, b): …"   in the prompt template of the fine-tuning
    python generate.py checkpoint=RUN                                  reads prompts from the terminal, streams text
    python generate.py checkpoint=TEACHER draft=STUDENT prompt="import " sampling=greedy
    python generate.py checkpoint=TEACHER draft=STUDENT serve=true     playground page with both side by side
    python generate.py checkpoint=RUN prompt="def add(a, b):" inspect=true      page with attention and surprise
    python generate.py checkpoint=RUN_OF_OBJECTIVE_FIM prompt="def add(a, b):<|mask|>    return total"

Arguments are key=value, without further parsing: a prompt may contain `=`, commas, colons and newlines.
"""

import sys
from pathlib import Path
from typing import NoReturn

from launch.exit_codes import INTERRUPTED, Exit, exit_on_early_signal, exit_without_packages, run_and_exit

if __name__ == "__main__":
    exit_on_early_signal()
    exit_without_packages()

from launch.config.key_value_cli import check_output_file, describe, parse
from launch.generate.generator import Arguments, TextGenerator
from launch.generate.inspect_page import check_inspection, inspect_text
from launch.version import version_text


def main() -> None:
    arguments = parse(sys.argv[1:], Arguments)
    check_output_file(arguments.json)
    check_inspection(arguments)
    if arguments.serve:
        from launch.generate.serve import serve

        serve(arguments)
        return
    generator = TextGenerator(arguments)
    if arguments.draft:
        texts = generator.speculate()
    else:
        texts = generator.generate() if generator.given else generator.interact()
    if arguments.inspect:
        inspect_text(generator, texts[0])
    if arguments.json:
        from gpt2lab.storage.atomic_files import write_json

        write_json(Path(arguments.json), [text.facts for text in texts])
    if generator.was_interrupted:
        raise Exit(INTERRUPTED)


def command_line() -> None:
    """Print the help or the version, or run the command line."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{describe(Arguments)}")
        return
    if "--version" in sys.argv[1:]:
        print(version_text())
        return
    main()


def run() -> NoReturn:
    """Run the command line and exit with its exit code."""
    run_and_exit(command_line)


if __name__ == "__main__":
    run()
