"""Scores checkpoints: how well they predict a text, how near a student is to its teacher, what they write, how fast.

    python evaluate.py checkpoint=runs/pretrain/nano-…
    python evaluate.py checkpoint=gpt2 data=text path=~/notes context=1024 stride=512 json=scores.json
    python evaluate.py checkpoint=runs/distill/nano-… teacher=runs/pretrain/micro-… baseline=runs/pretrain/nano-…
    python evaluate.py checkpoint='runs/finetune/*' texts=256 csv=scores.csv plot=scores.html
    python evaluate.py checkpoint=RUN,ANOTHER decode=128 lm_eval=lambada_openai

Arguments are key=value and taken verbatim. The first run brings its own data and context, each its tokenizer; for pairs
the loss is over the responses, and the task's metrics on what is written are told beside those of answers without a
model. With teacher= the two distributions are compared at every target: divergences, agreement, calibration, and what
the student is worth as a draft model in speculative decoding. Figures come with their standard errors.
"""

import sys

from launch.config.key_value_cli import describe, parse
from launch.evaluate import score_files, score_tables
from launch.evaluate.score_checkpoints import Arguments, evaluate
from launch.exit_codes import end


def main() -> None:
    arguments = parse(sys.argv[1:], Arguments)
    score_files.check(arguments)
    results = evaluate(arguments)
    score_tables.show(results, arguments)
    score_files.write(results, arguments)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{describe(Arguments)}")
        sys.exit(0)
    end(main)
