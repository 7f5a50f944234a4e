"""samples.jsonl: text generated during training, one JSON object per line: step, prompt, completion, method.

Samples of pairs also have their reference, and their score if there is a metric of generated text.
"""

import json
import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from gpt2lab.data.special_tokens import MASK_PLACEHOLDER
from gpt2lab.storage.atomic_files import add_filename_when_full, write_text
from gpt2lab.storage.damaged_files import is_unreadable, read_lines, set_aside_damaged_lines, warn_once

FILE = "samples.jsonl"
_STEP_OF_LINE = re.compile(r'\{"step": (\d{1,18}),', re.ASCII)


@dataclass(frozen=True)
class Sample:
    step: int
    prompt: str
    completion: str
    method: str
    reference: str | None = None
    score: float | None = None

    @property
    def written(self) -> str:
        """Text to show after the prompt; fillings of gaps are set off, as they do not continue it."""
        return f"\n→ {self.completion}" if MASK_PLACEHOLDER in self.prompt else self.completion


def append_samples(run_dir: str | Path, samples: list[Sample]) -> None:
    path = Path(run_dir) / FILE
    with add_filename_when_full(path), path.open("a", encoding="utf-8") as file:
        file.writelines(_line(sample) for sample in samples)


def read_samples(run_dir: str | Path) -> list[Sample]:
    """Read all valid lines. Damaged lines are skipped: a truncated last line silently, others with a warning."""
    path = Path(run_dir) / FILE
    samples, damaged = _scan(path)
    is_cut = len(damaged) == 1 and damaged[0][0] == len(samples) and _STEP_OF_LINE.match(damaged[0][1])
    if is_unreadable(path) or (damaged and not is_cut):
        warn_once(f"{path} is damaged: {len(damaged) or 'all'} lines are skipped.")
    return samples


def repair_samples(run_dir: str | Path, step: int) -> None:
    """Rewrite a damaged samples.jsonl with its valid lines, see `set_aside_damaged_lines`.

    Args:
        step: step of the checkpoint from which the run is resumed.
    """
    path = Path(run_dir) / FILE
    samples, damaged = _scan(path)
    if set_aside_damaged_lines(path, [sample.step for sample in samples], damaged, _STEP_OF_LINE, step):
        write_text(path, "".join(map(_line, samples)))


def drop_samples_after(run_dir: str | Path, step: int) -> None:
    """Remove the samples after `step`, from which a run is resumed."""
    repair_samples(run_dir, step)
    path = Path(run_dir) / FILE
    if path.exists():
        write_text(path, "".join(_line(sample) for sample in read_samples(run_dir) if sample.step <= step))


def _scan(path: Path) -> tuple[list[Sample], list[tuple[int, str]]]:
    """Return (samples, [(number of samples before it, text) of each other line])."""
    samples: list[Sample] = []
    damaged: list[tuple[int, str]] = []
    for line in read_lines(path):
        sample = _parse(line)
        if sample is None:
            damaged.append((len(samples), line))
        else:
            samples.append(sample)
    return samples, damaged


def _parse(line: str) -> Sample | None:
    try:
        content = json.loads(line)
        needed = {field.name: content[field.name] for field in fields(Sample) if field.default is MISSING}
        sample = Sample(**needed, reference=content.get("reference"), score=content.get("score"))
        _line(sample).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = (sample.prompt, sample.completion, sample.method, sample.reference or "")
    is_valid = type(sample.step) is int and isinstance(sample.score, int | float | None)
    return sample if is_valid and all(isinstance(text, str) for text in texts) else None


def _line(sample: Sample) -> str:
    content = {name: value for name, value in asdict(sample).items() if value is not None}
    return json.dumps(content, ensure_ascii=False) + "\n"
