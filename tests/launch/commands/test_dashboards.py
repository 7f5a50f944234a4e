"""Dashboards: each panel answers a question with metrics that are logged, in W&B and in TensorBoard."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from callbacks.loggers.tensorboard import TensorBoard
from docs import build_reference
from gpt2lab.errors import InputError
from gpt2lab.reports.dashboard_views import DISTILL, MOST_PANELS, STEP, VIEWS, View, metrics_logged
from launch.commands import dashboards

pytest.importorskip("wandb_workspaces")


def names_in(value: Any, keys: tuple[str, ...]) -> set[str]:
    """Return the texts below these keys anywhere in serialized panels."""
    if isinstance(value, dict):
        own = [given for key, given in value.items() if key in keys]
        texts = {text for given in own for text in (given if isinstance(given, list) else [given])}
        inner = [names_in(item, keys) for item in value.values()]
        return {text for text in texts if isinstance(text, str)}.union(*inner)
    return set().union(*(names_in(item, keys) for item in value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_every_panel_is_a_question_about_logged_metrics(view: View):
    assert 0 < len(view.panels) <= MOST_PANELS
    for panel in view.panels:
        assert panel.question.endswith("?")
        assert {panel.x, *panel.metrics} <= metrics_logged(), panel.question
    assert len({panel.question for panel in view.panels}) == len(view.panels)


def test_serialized_views_have_all_panels_and_their_runs(tmp_path: Path):
    dashboards._program(["entity=team", "project=lab", f"json={tmp_path / 'views.json'}"])
    saved = json.loads((tmp_path / "views.json").read_text())
    assert [content["displayName"] for content in saved] == [view.name for view in VIEWS]
    for content, view in zip(saved, VIEWS, strict=True):
        text = json.dumps(content)
        assert all(panel.question in text for panel in view.panels)
        assert all(section in text for section in view.sections)
        assert not view.task or view.task in text
        lines = names_in(content, ("metrics", "xAxis"))
        assert {name for panel in view.panels if panel.kind == "line" for name in panel.metrics} <= lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "entity= is missing.*\nproject= is missing"),
        (["entity=team"], "project= is missing"),
        (["entity=team", "projekt=lab"], r"There is no key projekt \(did you mean project\?\)"),
        (["entity=team", "project=lab", "json=/nowhere/views.json"], "json=/nowhere/views.json cannot be written"),
    ],
)
def test_dashboards_of_no_project_are_refused(words: list[str], message: str):
    with pytest.raises(InputError, match=message):
        dashboards._program(words)


def test_documentation_lists_the_panels_of_the_code():
    text = build_reference.DASHBOARDS.read_text()
    assert build_reference.with_panels(text) == text, "run: make docs"
    assert all(panel.question in text for view in VIEWS for panel in view.panels)


def test_tensorboard_has_the_sections_of_the_task(tmp_path: Path):
    logger = TensorBoard(str(tmp_path))
    logger.log_hyperparams({"task": "distill"})
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(DISTILL.sections)
    charts = {chart.title: tuple(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts == {panel.question: panel.metrics for panel in DISTILL.panels if panel.x == STEP}
