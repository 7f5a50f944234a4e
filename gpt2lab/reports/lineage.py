"""Lineage of a model: the models that a run started from, with what their own reports and model cards state."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gpt2lab.model.student_shape import TEACHER_LAYERS
from gpt2lab.storage.hub import hub_id
from gpt2lab.storage.report_json import read_report

MOST_GENERATIONS = 8

Role = Literal["teacher", "initial weights"]


@dataclass(frozen=True)
class Ancestor:
    """A model that another one was made from.

    Attributes:
        name: Hub id, or name of the run or folder; never a path.
        repository: Hub id, if the model is on the Hub.
        report: content of the run's report.json; empty for models from elsewhere.
        metadata: metadata of its model card; empty without a card.
        weights_hash: sha256 of the weights; empty if it was not computed.
    """

    role: Role
    name: str
    repository: str | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    weights_hash: str = ""
    ancestors: tuple["Ancestor", ...] = ()


def read_ancestor(role: Role, folder: str, weights_hash: str = "", generations: int = MOST_GENERATIONS) -> Ancestor:
    """Read a model folder, or the export of a run directory, and what it was made from."""
    path = Path(folder)
    run = path.parent if path.name == "hf" else path
    report = read_report(run)
    repository = hub_id(folder) or report.get("hub", {}).get("repository")
    inner = ancestors_of(report, generations - 1) if generations else ()
    return Ancestor(role, repository or run.name, repository, report, _metadata(path), weights_hash, inner)


def ancestors_of(report: Mapping[str, Any], generations: int = MOST_GENERATIONS) -> tuple[Ancestor, ...]:
    """Return the teacher and the model of the initial weights that a run's report names."""
    roles: dict[str, Role] = {"teacher": "teacher", "init": "initial weights"}
    found = []
    for key, role in roles.items():
        node = report.get(key)
        source = str(node.get("source") or "") if isinstance(node, dict) else ""
        if Path(source).is_absolute():
            found.append(read_ancestor(role, source, generations=generations))
    return tuple(found)


def weights_chain(ancestors: tuple[Ancestor, ...], takes_teacher_layers: bool = False) -> Iterator[Ancestor]:
    """Yield the models whose weights the model has inherited, the nearest first.

    Args:
        takes_teacher_layers: whether the weights come from the teacher.
    """
    role: Role = "teacher" if takes_teacher_layers else "initial weights"
    for one in ancestors:
        if one.role == role:
            yield one
            yield from weights_chain(one.ancestors, _takes_teacher_layers(one.report))


def _takes_teacher_layers(report: Mapping[str, Any]) -> bool:
    init = report.get("init")
    return isinstance(init, dict) and init.get("source") == TEACHER_LAYERS


def _metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a folder's model card; empty without a readable one."""
    from huggingface_hub import metadata_load

    files = [file for file in (folder / "README.md", folder / "hf" / "README.md") if file.is_file()]
    try:
        return (metadata_load(files[0]) or {}) if files else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
