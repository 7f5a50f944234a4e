"""samples.jsonl: the text a model wrote during training, one JSON object a line: step, prompt, completion, method."""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gpt2lab.data.special_tokens import PLACE
from gpt2lab.storage.atomic_files import naming_full_file, write_text
from gpt2lab.storage.damaged_files import is_no_file, lines_of, set_aside_damaged_lines, warn_once

FILE = "samples.jsonl"
_STEP_OF_LINE = re.compile(r'\{"step": (\d{1,18}),', re.ASCII)


@dataclass(frozen=True)
class Sample:
    step: int
    prompt: str
    completion: str
    method: str

    @property
    def written(self) -> str:
        """What follows the prompt where both are shown: what was put into its gaps does not run on from it."""
        return f"\n→ {self.completion}" if PLACE in self.prompt else self.completion


def append_samples(run_dir: str | Path, samples: list[Sample]) -> None:
    path = Path(run_dir) / FILE
    with naming_full_file(path), path.open("a", encoding="utf-8") as file:
        file.writelines(_line(sample) for sample in samples)


def read_samples(run_dir: str | Path) -> list[Sample]:
    """All valid lines. A last line cut short by a crash is left out, others with a warning."""
    path = Path(run_dir) / FILE
    samples, damaged = _scan(path)
    is_cut = len(damaged) == 1 and damaged[0][0] == len(samples) and _STEP_OF_LINE.match(damaged[0][1])
    if is_no_file(path) or (damaged and not is_cut):
        warn_once(f"{path} is damaged: {len(damaged)} of its lines are left out.")
    return samples


def repair_samples(run_dir: str | Path, step: int) -> None:
    """Rewrite a damaged samples.jsonl with its valid lines, see `set_aside_damaged_lines`.

    Args:
        step: of the checkpoint from which the run continues.
    """
    path = Path(run_dir) / FILE
    samples, damaged = _scan(path)
    if set_aside_damaged_lines(path, [sample.step for sample in samples], damaged, _STEP_OF_LINE, step):
        write_text(path, "".join(map(_line, samples)))


def drop_samples_after(run_dir: str | Path, step: int) -> None:
    """Remove what a run wrote beyond the step from which it continues."""
    repair_samples(run_dir, step)
    path = Path(run_dir) / FILE
    if path.exists():
        write_text(path, "".join(_line(sample) for sample in read_samples(run_dir) if sample.step <= step))


def _scan(path: Path) -> tuple[list[Sample], list[tuple[int, str]]]:
    """(samples, lines that hold none, each with the number of samples before it)."""
    samples: list[Sample] = []
    damaged: list[tuple[int, str]] = []
    for line in lines_of(path):
        sample = _parsed(line)
        if sample is None:
            damaged.append((len(samples), line))
        else:
            samples.append(sample)
    return samples, damaged


def _parsed(line: str) -> Sample | None:
    try:
        content = json.loads(line)
        sample = Sample(*(content[field.name] for field in fields(Sample)))
        _line(sample).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = (sample.prompt, sample.completion, sample.method)
    return sample if type(sample.step) is int and all(isinstance(text, str) for text in texts) else None


def _line(sample: Sample) -> str:
    return json.dumps(asdict(sample), ensure_ascii=False) + "\n"
