"""Profile of a training step in pretraining, distillation and fine-tuning, from runs of train.py.

    python -m benchmarks.profile_step [--steps 60]

Pretrains micro, distils it to nano and fine-tunes that; in each run the callback StepTimes measures forward, backward
and optimizer. Prints a Markdown table with the share of a step outside these three.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.train_command import STEP_TIMES, of_length, train


def stage_commands(folder: Path) -> dict[str, list[str]]:
    """Return the arguments of train.py by run name."""
    return {
        "pretrain": ["task=pretrain", "model=micro", "data=stdlib"],
        "distill": ["task=distill", "model=nano", "data=stdlib", f"teacher={folder / 'pretrain'}", "preflight=warn"],
        "finetune": ["task=finetune", "data=summarize", f"init={folder / 'distill'}"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each stage")
    steps = parser.parse_args().steps
    lengths = [*of_length(steps), f"sample_every={steps}"]
    print("| stage | step, ms | forward | backward | optimizer | outside | tokens/s |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, arguments in stage_commands(folder).items():
            report = train(folder / name, [*arguments, *lengths, "logger=csv", STEP_TIMES])
            times = json.loads((folder / name / "step_times.json").read_text())
            phases = " | ".join(f"{times[phase]:.0f}" for phase in ("step", "forward", "backward", "optimizer"))
            speed = report["tokens_per_second"]
            print(f"| {name} | {phases} | {times['outside_share']:.1%} | {speed:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
