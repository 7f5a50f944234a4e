"""A study of distillation: effects of initialization and teacher, with intervals of nominal coverage."""

import csv
import json
import math
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from gpt2lab.analysis.study_results import (
    CE,
    KD,
    LAYERS,
    SCRATCH,
    TIME,
    TOKENS,
    Arm,
    ArmResult,
    LearningRates,
    StudyResults,
    arm_result,
    contrasts,
)
from gpt2lab.data.batch import Batch
from gpt2lab.evaluation.paired_statistics import paired_difference, summary, t_quantile, verdict
from gpt2lab.losses.teacher_signal import TeacherSignal
from gpt2lab.reports.study_html import render
from gpt2lab.settings import TokenizerChoice
from launch import exit_codes
from launch.checks import checks, study_plan
from launch.checks.study_plan import (
    PlannedRun,
    run_overrides,
    shared_overrides,
    steps_in_the_same_time,
    training_seconds,
)
from launch.config.schema import RunConfig
from launch.config.unused_keys import unread_keys, without
from launch.run import job
from launch.sweep import jobs, study_table
from lightning_modules.distill import Distill
from tests.conftest import ROOT, SHRUNK, Answer, Train
from tests.launch.run.test_run_directory import held
from tests.support.configurations import composed


@pytest.mark.parametrize(("n", "expected"), [(2, 12.7062), (3, 4.3027), (4, 3.1824), (5, 2.7764), (10, 2.2622)])
def test_t_quantiles_equal_the_tables(n: int, expected: float):
    assert t_quantile(n - 1) == pytest.approx(expected, abs=5e-5)


def test_t_quantiles_approach_the_normal_distributions():
    assert t_quantile(1000) == pytest.approx(1.9623, abs=5e-5)
    assert t_quantile(4, confidence=0.99) == pytest.approx(4.6041, abs=5e-5)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_interval_has_its_nominal_coverage(n: int):
    """4,000 studies with a true difference of 0.3 and noise of 0.1 that seeds share in part.

    The standard error of a share of 95 % is 0.34 points, so 1.1 points are three of them.
    """
    chance = random.Random(n)
    covered = 0
    for _ in range(4000):
        seeds = {seed: chance.gauss(0, 1) for seed in range(n)}
        first = {seed: shared + 0.3 + chance.gauss(0, 0.1) for seed, shared in seeds.items()}
        found = paired_difference(first, seeds)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.3 <= found.high
    assert 0.939 < covered / 4000 < 0.961


def test_a_study_without_a_difference_rarely_claims_one():
    chance = random.Random(0)
    claims = 0
    for _ in range(4000):
        first, second = ({seed: chance.gauss(4, 0.01) for seed in range(3)} for _ in range(2))
        claims += "beats" in verdict(paired_difference(first, second), KD, CE)
    assert claims / 4000 < 0.061


def test_verdicts_have_the_right_wording():
    def sentence(*differences: float) -> str:
        first = {seed: 4 + difference for seed, difference in enumerate(differences)}
        return verdict(paired_difference(first, dict.fromkeys(first, 4.0)), KD, CE)

    assert sentence(-0.31, -0.33, -0.29) == "KD beats CE by 0.310 ± 0.020 nats (95 % interval 0.260 … 0.360, 3 seeds)"
    assert sentence(0.31, 0.33, 0.29).startswith("CE beats KD by 0.310")
    assert sentence(-0.02, 0.01, 0.0) == "no difference shown with 3 seeds (interval −0.041 … 0.035 includes 0)"
    assert sentence(-0.3) == "one seed: no interval; KD is 0.300 nats below CE"


def test_pair_with_a_missing_or_diverged_run_is_left_out():
    first = {1: 3.0, 2: None, 3: 3.1, 4: math.nan}
    found = paired_difference(first, {1: 4.0, 2: 4.0, 3: 4.1, 4: 4.0})
    assert found.differences == pytest.approx({1: -1.0, 3: -1.0})
    assert found.missing == [2, 4]
    assert verdict(found, KD, CE).endswith("2 seeds; left out: seeds 2, 4)")
    assert "no pair of runs finished" in verdict(paired_difference({1: None}, {1: 4.0}), KD, CE)


def test_standard_deviations_divide_by_one_less_than_the_count():
    assert summary([1.0, 2.0, 4.0]).sd == pytest.approx(math.sqrt(7 / 3))
    assert summary([1.0]).sd is None


BPE = TokenizerChoice("bpe", vocab_size=300)


def planned(settings: RunConfig, arm: Arm, factor: float = 1.0, tokenizer: TokenizerChoice = BPE) -> RunConfig:
    """Compose a run of the plan like its process does."""
    overrides = run_overrides(PlannedRun(arm, 7, factor, 50), settings, "/teacher", tokenizer)
    first = composed(*overrides)
    run = composed(*without(overrides, unread_keys(first)))
    checks.check(run)
    return run


def study_of(*overrides: str) -> RunConfig:
    settings = composed("experiment=distill_study", *overrides)
    checks.check(settings)
    return settings


GIVEN = ("model=micro", "steps=50", "loss=reverse_kl", "loss.hard_weight=0.2", "loss.hidden_mse=0.5", "teacher=t")


def test_arms_differ_in_start_and_teacher_alone():
    settings = study_of(*GIVEN, "seed=7", "optimizer=adamw", "batch_tokens=2048")
    runs = {arm: planned(settings, arm, 2.0) for arm in study_plan.arms(settings)}
    assert [arm.name for arm in runs] == ["scratch + CE", "scratch + KD", "teacher_layers + CE", "teacher_layers + KD"]
    scratch_ce, scratch_kd, layers_ce, layers_kd = runs.values()
    assert [run.task_name for run in runs.values()] == ["pretrain", "distill", "distill", "distill"]
    assert [run.init for run in runs.values()] == [SCRATCH, SCRATCH, LAYERS, LAYERS]
    for run in runs.values():
        assert (run.seed, run.steps, run.batch_tokens, run.optimizer.lr) == (7, 50, 2048, 2e-3)
        assert run.groups["experiment"] == "none"
        assert (run.model, run.schedule, run.data, run.callbacks) == (
            scratch_ce.model,
            scratch_ce.schedule,
            scratch_ce.data,
            scratch_ce.callbacks,
        )
    assert scratch_kd.loss == layers_kd.loss == settings.loss
    assert (layers_ce.loss.hard_weight, layers_ce.loss.hidden_mse) == (1, 0), "nothing of the teacher but its layers"
    assert (scratch_ce.tokenizer.kind, scratch_ce.vocab_size) == ("bpe", 300)


def test_student_without_distillation_has_the_teachers_tokenizer():
    run = planned(study_of(*GIVEN), Arm(SCRATCH, CE), tokenizer=TokenizerChoice("pretrained", source="/a b/teacher"))
    assert (run.tokenizer.kind, run.tokenizer.source) == ("pretrained", "/a b/teacher")


def test_both_learning_rates_of_muon_are_scaled():
    settings = study_of(*GIVEN, "optimizer.lr=4e-3", "optimizer.adamw_lr=1e-3")
    run = planned(settings, Arm(SCRATCH, KD), 0.5)
    assert (run.optimizer.lr, run.optimizer.adamw_lr) == (2e-3, 5e-4)
    assert planned(study_of(*GIVEN), Arm(SCRATCH, KD), 0.5).optimizer.adamw_lr == 0, "0 follows lr by itself"


def test_only_distilled_students_use_the_teacher_cache():
    settings = study_of("model=micro", "teacher=t", "teacher_cache=topk", "teacher_cache.k=8")
    names = [planned(settings, arm).teacher_cache.name for arm in study_plan.arms(settings)]
    assert names == ["none", "topk", "none", "topk"]


def test_a_runs_command_needs_no_study():
    overrides = shared_overrides(study_of(*GIVEN, "study.seeds=5", "name=mine", "callbacks=default"))
    assert "callbacks=default" in overrides, "what is given goes before the recipe"
    assert "callbacks=minimal" not in overrides
    assert "logger=csv" in overrides
    assert not [word for word in overrides if word.startswith(("study", "experiment", "name", "steps", "teacher="))]


def test_equal_time_is_as_many_steps_as_fit():
    assert steps_in_the_same_time(200, seconds=20.0, allowed=50.0) == 500
    assert steps_in_the_same_time(200, seconds=20.0, allowed=19.0) == 200, "never fewer than at equal tokens"
    report = {"tokens_seen": 8000, "tokens_per_second": 400.0, "seconds": 90.0}
    assert training_seconds(report) == 20.0, "start-up and validation are not training"
    assert training_seconds({**report, "tokens_per_second": None}) == 90.0


def losses(base: float) -> dict[int, float | None]:
    return {1: base, 2: base + 0.01, 3: base - 0.01}


def found_results() -> StudyResults:
    """Distillation gains 0.5 from scratch and nothing from the teacher's layers; equal time cancels the former."""
    arms: list[ArmResult] = [
        arm_result(Arm(SCRATCH, CE), TOKENS, 100, losses(4.5), 10.0),
        arm_result(Arm(SCRATCH, KD), TOKENS, 100, {1: 4.001, 2: 4.01, 3: 3.991}, 20.0),
        arm_result(Arm(LAYERS, CE), TOKENS, 100, losses(3.5), 10.0),
        arm_result(Arm(LAYERS, KD), TOKENS, 100, {1: 3.51, 2: 3.5, 3: None}, 20.0),
        arm_result(Arm(SCRATCH, CE), TIME, 200, {1: 4.002, 2: 4.005, 3: 3.995}, 20.0),
    ]
    rates = LearningRates("scratch + CE", {0.001: 5.0, 0.002: 4.6, 0.004: 4.5}, 0.004, 2.0)
    return StudyResults([1, 2, 3], "/t", 3.0, [rates], arms, contrasts(arms), ["teacher_layers-kd-3: killed & <gone>"])


def test_every_comparison_with_two_sides_is_made():
    verdicts = {(contrast.budget, contrast.title): contrast.verdict for contrast in found_results().contrasts}
    assert list(verdicts) == [
        (TOKENS, "KD − CE from scratch"),
        (TOKENS, "KD − CE from the teacher's layers"),
        (TOKENS, "teacher_layers − scratch with CE"),
        (TOKENS, "teacher_layers − scratch with KD"),
        (TIME, "KD − CE from scratch"),
    ]
    assert verdicts[TOKENS, "KD − CE from scratch"].startswith("KD beats CE by 0.499")
    assert "no difference shown with 2 seeds" in verdicts[TOKENS, "KD − CE from the teacher's layers"]
    assert "left out: seed 3" in verdicts[TOKENS, "KD − CE from the teacher's layers"]
    assert verdicts[TOKENS, "teacher_layers − scratch with CE"].startswith("teacher_layers beats scratch by 1.000")
    assert "no difference shown" in verdicts[TIME, "KD − CE from scratch"]


def test_the_table_warns_of_a_learning_rate_at_the_edge():
    results = found_results()
    text = study_table.format_study(results)
    assert "Warning: that is the largest one tried; scratch + CE may do better still at a higher one" in text
    assert "(1 failed)" in text
    inside = LearningRates("scratch + CE", {0.001: 5.0, 0.002: 4.4, 0.004: 4.5}, 0.002, 1.0)
    assert inside.at_the_edge == ""
    assert LearningRates("scratch + CE", {0.001: 5.0}, 0.001, 1.0).at_the_edge == "", "one rate is no search"


def test_the_page_shows_every_run_and_verdict():
    results = found_results()
    page = render("mine", results)
    intervals, runs = page.split("<h2>Every run</h2>")
    assert runs.count('class="dot"') == 14
    assert intervals.count('class="span"') == len(results.contrasts)
    assert "below 0 the first is better" in intervals
    assert all(contrast.verdict in page for contrast in results.contrasts)
    assert "killed &amp; &lt;gone&gt;" in page


MISTAKES = [
    ("study.seeds=2", "experiment=none does not read study.seeds: only experiment=distill_study reads it"),
    ("experiment=distill_study task=pretrain", "sets task itself"),
    ("experiment=distill_study init=scratch", "study.inits lists the initializations"),
    ("experiment=distill_study baseline=runs/x", "are the baseline"),
    ("experiment=distill_study resume=studies/x", "run_dir=studies/x resume=auto"),
    ("experiment=distill_study resume=auto", "give run_dir= or name= too"),
    ("experiment=distill_study model=auto", "Give model=nano"),
    ("experiment=distill_study loss.hard_weight=1", "cross-entropy alone"),
    ("experiment=distill_study loss=uld", "study.inits=[scratch]"),
    ("experiment=distill_study study.seeds=0", "at least 1"),
    ("experiment=distill_study study.seeds=many", "not a whole number"),
    ("experiment=distill_study study.lr_factors=[]", "at least one value"),
    ("experiment=distill_study study.lr_factors=[1,1]", "none twice"),
    ("experiment=distill_study study.lr_factors=[0,1]", "greater than 0"),
    ("experiment=distill_study study.tune=all", "baseline, every_arm"),
    ("experiment=distill_study study.inits=[scrach]", "(did you mean scratch?)"),
    ("experiment=distill_study study.sedes=3", "(did you mean study.seeds?)"),
    ("experiment=distill_study name=a/b", "is a path"),
    ("-m experiment=distill_study seed=1,2", "Leave out -m"),
    ("-m experiment=none,distill_study", "Leave out -m"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_invalid_study_is_refused_before_any_run(words: str, message: str, train_here: Train, tmp_path: Path):
    ended = train_here(*words.split())
    assert ended.code == 2
    assert message in ended.stderr
    assert len(ended.stderr.strip().splitlines()) <= 5
    assert not list(tmp_path.iterdir())


STEPS = ("steps=4", "log_every=1", "seed=3", "study.seeds=2", "optimizer=adamw", "preflight=off", "threads=1")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, cache: Path, sources: Path) -> Path:
    """Make a folder with a teacher of twice the width."""
    folder = tmp_path_factory.mktemp("project")
    wide = [*SHRUNK, "model.n_embd=64", "model.n_head=4", f"path={sources}", "steps=20", "threads=1"]
    wide += ["run_dir=teacher"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GPT2LAB_CACHE", str(cache))
        patch.setattr(sys, "argv", [str(ROOT / "train.py"), *wide])
        assert exit_codes.exit_code(train.command_line) == 0
    return folder


Study = Callable[..., Answer]


@pytest.fixture
def study(project: Path, train_here: Train, tiny: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Study:
    """Run train.py experiment=distill_study with its runs in this process, to save seconds of imports for each.

    A step with a teacher counts as two seconds and any other as one: steps this short cannot be timed.
    """

    def here(settings: RunConfig) -> tuple[int, int, str]:
        try:
            job.run(settings)
        except Exception as error:
            return (2 if exit_codes.as_input_error(error) else 1), 0, str(error)
        return 0, 0, ""

    def seconds(report: dict[str, Any]) -> float:
        alone = report["task"] == "pretrain" or "loss.hard_weight=1" in report["command"]
        return report["steps"] * (1.0 if alone else 2.0)

    monkeypatch.setattr(jobs, "run_process", here)
    monkeypatch.setattr(study_plan, "training_seconds", seconds)
    shutil.copytree(project / "teacher", tmp_path / "teacher")

    def run(*words: str) -> Answer:
        plain = [word for word in tiny if word.split("=")[0] not in {own.split("=")[0] for own in words}]
        return train_here(*plain, *STEPS, "experiment=distill_study", "teacher=teacher", *words)

    return run


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "study.csv").open() as stream:
        return list(csv.DictReader(stream))


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "study.json").read_text())


def test_other_tokenizer_than_the_teachers_is_refused_first(study: Study, tmp_path: Path):
    ended = study("tokenizer=bpe", "vocab_size=280")
    assert ended.code == 2
    assert "Leave tokenizer=auto" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) <= 6
    assert not (tmp_path / "studies").exists()


@pytest.mark.slow
def test_study_runs_every_arm_and_reports_its_findings(study: Study, tmp_path: Path):
    ended = study("name=mine", "study.lr_factors=[0.5,1,2]")
    assert ended.code == 0, ended.stderr
    folder = tmp_path / "studies" / "mine"
    table, found = rows(folder), results_in(folder)
    assert {row["status"] for row in table} == {"finished"}
    search = [row for row in table if row["seed"] == "3" and row["arm"] == "scratch + CE" and row["steps"] == "4"]
    assert sorted(float(row["lr"]) for row in search) == [0.0005, 0.001, 0.002]
    best = min(search, key=lambda row: float(row["val_loss"]))
    assert found["learning_rates"][0]["chosen"] == float(best["lr"])
    assert {row["lr"] for row in table[3:]} == {best["lr"]}, "the best rate of the baseline is that of all arms"
    assert "that is the largest one tried" in ended.stdout, "the largest of three small rates is the best in 4 steps"
    equal = [row for row in table if row["steps"] == "4" and row["lr"] == best["lr"]]
    assert len(equal) == 8, "the search's best run is the first seed's"
    for arm in found["arms"]:
        mine = [row for row in table if (row["arm"], row["steps"]) == (_name(arm["arm"]), str(arm["steps"]))]
        reported = {row["seed"]: float(row["val_loss"]) for row in mine if row["lr"] == best["lr"]}
        assert arm["losses"] == reported
    longer = [(_name(arm["arm"]), arm["steps"]) for arm in found["arms"] if arm["budget"] == TIME]
    assert longer == [("scratch + CE", 8), ("teacher_layers + CE", 8)], "half the time, twice the steps"
    assert len(found["contrasts"]) == 7
    for contrast in found["contrasts"]:
        assert contrast["verdict"] in ended.stdout
        assert set(contrast["difference"]["differences"]) == {"3", "4"}
    assert f"{folder.relative_to(tmp_path)}/study.html" in ended.stdout
    assert (folder / "study.html").is_file()
    kept = json.loads((folder / best["folder"] / "report.json").read_text())
    assert "experiment" not in kept["command"]


def _name(arm: dict[str, str]) -> str:
    return f"{arm['init']} + {arm['learns_by']}"


def test_study_records_a_failing_run_and_continues(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inner = jobs.run_process

    def planted(settings: RunConfig) -> tuple[int, int, str]:
        if settings.seed == 4 and settings.task_name == "distill" and settings.init == SCRATCH:
            return 1, 0, "RuntimeError: planted"
        return inner(settings)

    monkeypatch.setattr(jobs, "run_process", planted)
    words = ("run_dir=here", "study.lr_factors=[1]", "study.inits=[scratch]")
    ended = study(*words)
    assert ended.code == 1
    assert "1 of " in ended.stderr.strip().splitlines()[-1]
    failed = [row for row in rows(tmp_path / "here") if row["status"] == "failed"]
    assert [(row["arm"], row["seed"], row["error"]) for row in failed] == [
        ("scratch + KD", "4", "RuntimeError: planted")
    ]
    verdicts = {c["title"]: c["verdict"] for c in results_in(tmp_path / "here")["contrasts"]}
    assert "left out: seed 4" in verdicts["KD − CE from scratch"]

    monkeypatch.setattr(jobs, "run_process", inner)
    marks = {path: path.stat().st_mtime_ns for path in (tmp_path / "here").glob("*/report.json")}
    again = study(*words, "resume=auto")
    assert again.code == 0, again.stderr
    assert all(path.stat().st_mtime_ns == mark for path, mark in marks.items()), "finished runs are kept"
    assert not [row for row in rows(tmp_path / "here") if row["status"] != "finished"]
    other = study(*words, "resume=auto", "batch_tokens=512")
    assert other.code == 2
    assert "batch_tokens=512" in other.stderr
    taken = study(*words)
    assert taken.code == 2
    assert "not empty" in taken.stderr


def test_student_that_does_not_fit_is_refused_before_any_run(study: Study, tmp_path: Path):
    ended = study("model.n_layer=5", "name=mine")
    assert ended.code == 2
    assert "study.inits=[scratch]" in ended.stderr
    assert not (tmp_path / "studies").exists()
    assert (
        study("model.n_layer=5", "name=mine", "study.inits=[scratch]", "study.lr_factors=[1]", "study.seeds=1").code
        == 0
    )
    titles = {contrast["title"] for contrast in results_in(tmp_path / "studies" / "mine")["contrasts"]}
    assert titles == {"KD − CE from scratch"}


def test_every_run_of_a_study_has_position_best_and_eta(study: Study, monkeypatch: pytest.MonkeyPatch):
    words = ("run_dir=here", "study.inits=[scratch]", "study.lr_factors=[1]")
    lines = [line for line in study(*words, "study.seeds=1").stdout.splitlines() if line.startswith("run ")]
    assert lines[0] == "run 1 of about 3: scratch-ce-seed3-lr1x-4steps"
    best = r"  best val/loss \d\.\d{2,4}  by run 1 scratch-ce-seed3-lr1x-4steps"
    assert re.fullmatch(rf"run 2 of about 3: scratch-kd-seed3-lr1x-4steps{best}  ETA \d+:\d\d", lines[1])
    monkeypatch.setattr("launch.sweep.distill_study.terminal_width", lambda: 60)
    shown = study(*words, "study.seeds=2", "resume=auto").stdout
    wrapped = re.search(r"^run 2 of about 6: .*\n(  .*\n)+", shown, re.MULTILINE)
    assert wrapped
    assert max(map(len, wrapped[0].splitlines())) <= 60
    words_of_run = " ".join(wrapped[0].split())
    assert re.fullmatch(f"run 2 of about 6: scratch-ce-seed4-lr1x-4steps{best.replace('  ', ' ')}", words_of_run)


@pytest.mark.slow
def test_writing_the_teacher_cache_counts_as_training_time(study: Study, tmp_path: Path):
    words = (
        "teacher_cache=topk",
        "teacher_cache.k=4",
        "study.inits=[scratch]",
        "study.lr_factors=[1]",
        "study.seeds=1",
    )
    ended = study(*words, "run_dir=here", f"cache_dir={tmp_path / 'cache'}")
    assert ended.code == 0, ended.stderr
    arms = {_name(arm["arm"]): arm for arm in results_in(tmp_path / "here")["arms"] if arm["budget"] == "equal tokens"}
    assert arms["scratch + CE"]["seconds"] == 4.0
    assert arms["scratch + KD"]["seconds"] > 8.0


@pytest.mark.slow
def test_every_arm_may_have_its_own_learning_rate(study: Study, tmp_path: Path):
    ended = study("run_dir=here", "study.tune=every_arm", "study.lr_factors=[1,30]", "study.inits=[teacher_layers]")
    assert ended.code == 0, ended.stderr
    searched = results_in(tmp_path / "here")["learning_rates"]
    assert [rates["arm"] for rates in searched] == ["teacher_layers + CE", "teacher_layers + KD"]
    for rates in searched:
        later = [row for row in rows(tmp_path / "here") if row["arm"] == rates["arm"] and row["seed"] == "4"]
        assert later
        assert {float(row["lr"]) for row in later} == {rates["chosen"]}
        assert f"Learning rate of {rates['arm']}: {rates['chosen']:g}" in ended.stdout


EARLY_ENDS = {  # exit code of the first runs and the received signal → status of the study
    "stopped": (exit_codes.STOPPED, signal.SIGTERM, "", "stopped"),
    "failed": (exit_codes.FAILED, 0, "RuntimeError: planted", "failed"),
}


@pytest.mark.parametrize("kind", EARLY_ENDS)
def test_study_that_ends_early_has_its_status(kind: str, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    *outcome, status = EARLY_ENDS[kind]
    monkeypatch.setattr(jobs, "run_process", lambda _settings: tuple(outcome))
    assert study("run_dir=here").code == outcome[0]
    assert results_in(tmp_path / "here")["status"] == status
    page = tmp_path / "here" / "study.html"
    assert page.is_file() == (status == "failed")
    if status == "failed":
        assert "RuntimeError: planted" in page.read_text()


def test_stopped_study_prints_its_resume_command(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "run_process", lambda _settings: (exit_codes.STOPPED, signal.SIGTERM, ""))
    ended = study("name=mine")
    assert ended.code == exit_codes.STOPPED
    assert "run_dir=studies/mine resume=auto" in ended.stderr
    assert len(rows(tmp_path / "studies" / "mine")) == 1


def test_a_study_without_a_readable_study_json_is_refused(study: Study, tmp_path: Path, monkeypatch):
    """Its runs might belong to another study. A second process changes nothing of a study in use."""
    monkeypatch.setattr(jobs, "run_process", lambda _settings: (exit_codes.STOPPED, signal.SIGTERM, ""))
    folder = tmp_path / "studies" / "mine"
    assert study("name=mine").code == exit_codes.STOPPED
    with held(folder):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert "is in use" in study("name=mine", "resume=auto").stderr
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for content in (
        b"",
        bytes(40),
        b"[]",
        b"null",
        b'{"teacher_hash": 1}',
        b'{"teacher_hash": 1, "overrides": [{}]}',
        b"\xff",
    ):
        (folder / "study.json").write_bytes(content)
        ended = study("name=mine", "resume=auto")
        assert (ended.code, "study.json is damaged" in ended.stderr) == (2, True), ended.stderr
        assert (folder / "study.json").read_bytes() == content


@pytest.mark.slow
def test_runs_on_other_data_are_not_compared(study: Study, tiny: list[str], sources: Path, tmp_path: Path):
    shutil.copytree(sources, tmp_path / "text")
    words = ("run_dir=here", "study.lr_factors=[1]", "study.inits=[scratch]", "study.seeds=1", "path=text")
    assert study(*words).code == 0
    (tmp_path / "text" / "more.py").write_text("more = 1\n" * 200)
    ended = study(*words, "resume=auto", "study.seeds=2")
    assert ended.code == 2
    assert "changed between its runs" in ended.stderr


def test_training_on_labels_runs_no_teacher(
    train_here: Train, project: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Otherwise training with a teacher's layers would take the time of distillation."""
    original = Distill.teacher_signal

    def teacher_signal(distill: Distill, batch: Batch, side: str) -> TeacherSignal:
        assert side == "val", "the teacher ran in training"
        return original(distill, batch, side)

    monkeypatch.setattr(Distill, "teacher_signal", teacher_signal)
    words = ["task=distill", f"teacher={project / 'teacher'}", "steps=2", "preflight=off", "threads=1"]
    assert train_here(*tiny, *words, "loss.hard_weight=1").code == 0
    assert "ran in training" in train_here(*tiny, *words, "loss.hard_weight=0.9").stderr


@pytest.mark.slow
def test_a_study_as_a_user_runs_it(train_process: Train, tiny: list[str], project: Path, tmp_path: Path):
    """Each run has a separate process."""
    words = ["experiment=distill_study", f"teacher={project / 'teacher'}", *STEPS, "study.lr_factors=[1]", "name=mine"]
    ended = train_process(*tiny, *words)
    assert ended.code == 0, ended.stderr
    assert {row["status"] for row in rows(tmp_path / "studies" / "mine")} == {"finished"}
    assert "KD − CE from scratch" in ended.stdout
