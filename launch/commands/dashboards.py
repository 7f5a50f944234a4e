"""Dashboards: saves views for pretraining, distillation, fine-tuning and sweeps in a W&B project, and a report.

    python -m launch.commands.dashboards entity=my-team project=gpt2-lab
    python -m launch.commands.dashboards entity=my-team project=gpt2-lab json=FILE    writes the views to a file instead

Saving needs a login (`wandb login`), both need the package wandb-workspaces. The panels are those of
gpt2lab/reports/dashboard_views.py.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.keys import key
from gpt2lab.reports.dashboard_views import SWEEP, VIEWS, Panel, View
from gpt2lab.storage.atomic_files import write_text
from launch import logging_setup
from launch.config.key_value_cli import check_output_file, describe, parse
from launch.exit_codes import run_and_exit

# Values of the configuration that sweeps compare
SEARCHED = ("config.optimizer.lr", "batch_tokens", "model", "loss", "config.loss.temperature", "seed")


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command."""

    entity: str = key("user or team that owns the project")
    project: str = key("W&B project in which the views are saved")
    json: str = key("file for the views, which are then not saved in the project", "")


def workspaces(entity: str, project: str) -> list[Any]:
    """Return the saved views; nothing is sent to W&B yet."""
    import wandb_workspaces.workspaces as ws

    found = []
    for view in VIEWS:
        sections = [
            ws.Section(name=name, panels=[_chart(panel) for panel in panels], is_open=True)
            for name, panels in view.sections.items()
        ]
        filters = [ws.Config("task") == view.task] if view.task else []
        settings = ws.RunsetSettings(filters=filters)
        found.append(ws.Workspace(entity, project, view.name, sections, runset_settings=settings))
    return found


def report(entity: str, project: str) -> Any:
    """Return a report that compares the runs of the project, by group."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.P("Runs of gpt2-lab, compared by the questions of its dashboards."), wr.TableOfContents()]
    for view in VIEWS:
        blocks += [wr.H1(view.name), *_grids(view, entity, project)]
    return wr.Report(project, entity, title="Comparison of runs", blocks=blocks, width="fluid")


def _grids(view: View, entity: str, project: str) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    filters = f"Config('task') = '{view.task}'" if view.task else ""
    runs = wr.Runset(entity, project, name=view.name, filters=filters, groupby=["group"] if view is SWEEP else [])
    return [wr.PanelGrid(runsets=[runs], panels=[_chart(panel) for panel in view.panels])]


def _chart(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if panel.kind == "best":
        return wr.BarPlot(title=panel.question, metrics=[wr.SummaryMetric(_best(name)) for name in panel.metrics])
    if panel.kind == "search":
        columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(name)) for name in SEARCHED]
        columns += [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(_best(name))) for name in panel.metrics]
        return wr.ParallelCoordinatesPlot(title=panel.question, columns=columns)
    return wr.LinePlot(title=panel.question, x=panel.x, y=list(panel.metrics))


def _best(metric: str) -> str:
    from gpt2lab.metric_names import summaries

    return f"{metric}.{summaries()[metric]}"


def _program(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{describe(Arguments)}")
        return
    given = parse(words, Arguments)
    check_output_file(given.json)
    logging_setup.configure_logging()
    logging_setup.announce("Building the views")
    try:
        views = workspaces(given.entity, given.project)
    except ModuleNotFoundError as error:
        raise InputError(f'{error}.\nInstall it: pip install "wandb-workspaces==0.4.13"') from None
    if given.json:
        write_text(Path(given.json), json.dumps([serialized(view) for view in views], indent=1))
        return
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise InputError(
            "Saving dashboards needs a login to W&B.\nRun wandb login, or write the views to a file: json=FILE"
        )
    for view in [*views, report(given.entity, given.project)]:
        print(view.save().url, flush=True)


def serialized(view: Any) -> dict[str, Any]:
    """Return a view as W&B's server receives it."""
    content: dict[str, Any] = json.loads(view._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return content


if __name__ == "__main__":
    run_and_exit(lambda: _program(sys.argv[1:]))
