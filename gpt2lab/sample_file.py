"""samples.jsonl: the text a model wrote during training, one JSON object a line: step, prompt, completion, method."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt2lab.atomic_files import write_text
from gpt2lab.marks import PLACE


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
    with (Path(run_dir) / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)


def read_samples(run_dir: str | Path) -> list[Sample]:
    """All whole lines; one cut short by a crash is left out."""
    path = Path(run_dir) / "samples.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [Sample(**json.loads(line)) for line in lines]


def drop_samples_after(run_dir: str | Path, step: int) -> None:
    """Remove what a run wrote beyond the step it is taken up again from."""
    samples = read_samples(run_dir)
    kept = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples if sample.step <= step]
    path = Path(run_dir) / "samples.jsonl"
    if path.exists():
        write_text(path, "".join(kept))
