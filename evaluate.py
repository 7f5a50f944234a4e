"""Evaluates checkpoints: loss, distance of a student from its teacher, text metrics, decoding speed, zero-shot tasks.

    python evaluate.py checkpoint=runs/pretrain/nano-…
    python evaluate.py checkpoint=gpt2 data=text path=~/notes context=1024 stride=512 json=scores.json
    python evaluate.py checkpoint=runs/distill/nano-… teacher=runs/pretrain/micro-… baseline=runs/pretrain/nano-…
    python evaluate.py checkpoint='runs/finetune/*' texts=256 csv=scores.csv plot=scores.html
    python evaluate.py checkpoint=RUN,ANOTHER decode=128 lm_eval=lambada_openai

Arguments are key=value, without further parsing. Data and context default to those of the first run, tokenizers to
those of each run. For pairs the loss is over the responses, and completions are scored by the task's text metrics, also
for trivial answers without a model. With teacher= the two distributions are compared at every target: divergences,
agreement, calibration, and the speed-up with the student as draft model. Figures have standard errors.
"""

import sys
from typing import NoReturn

from launch.exit_codes import exit_on_early_signal, exit_without_packages, run_and_exit

if __name__ == "__main__":
    exit_on_early_signal()
    exit_without_packages()

from launch.config.key_value_cli import describe, parse
from launch.evaluate import score_files, score_tables
from launch.evaluate.score_checkpoints import Arguments, evaluate
from launch.version import version_text


def main() -> None:
    arguments = parse(sys.argv[1:], Arguments)
    score_files.check(arguments)
    results = evaluate(arguments)
    score_tables.print_tables(results, arguments)
    score_files.write(results, arguments)


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
