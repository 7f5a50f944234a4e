"""Distillation study: trains students with and without the teacher, and tests which differences the teacher causes.

Step (1) search the learning rate without a teacher; (2) run every arm for the same number of steps, over the seeds;
(3) run the arms without a teacher again, for as long as those with a teacher took; (4) write the table, study.csv,
study.json and study.html.
"""

import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from hydra import compose

from gpt2lab.analysis.study_results import (
    KD,
    LAYERS,
    TIME,
    TOKENS,
    Arm,
    ArmResult,
    LearningRates,
    StudyResults,
    arm_result,
    contrasts,
)
from gpt2lab.errors import InputError
from gpt2lab.evaluation.document_losses import read_document_losses
from gpt2lab.model.student_shape import check_fits
from gpt2lab.reports.study_html import render
from gpt2lab.settings import ModelShape, TokenizerChoice
from gpt2lab.storage.atomic_files import delete_scratch_files, write_json, write_text
from gpt2lab.storage.folder_lock import FolderLock
from gpt2lab.storage.model_folder import read_shape
from gpt2lab.storage.report_json import is_finished, read_report, watched_value
from gpt2lab.system.terminal import format_time, show, terminal_width
from launch import exit_codes, logging_setup
from launch.checks import study_plan
from launch.checks.study_plan import PlannedRun, steps_in_the_same_time
from launch.config import run_dir, run_spec
from launch.config.literal_text import override
from launch.config.run_spec import Inputs, Resolved, RunSpec
from launch.config.schema import RunConfig, with_absolute_paths
from launch.run import resolve
from launch.sweep import jobs, study_table
from launch.sweep.jobs import Job
from launch.sweep.sweep_progress import best_so_far
from launch.sweep.text_table import wrapped

COLUMNS: tuple[str, ...] = ("run", "arm", "seed", "lr", "steps", "status", "val_loss", "training_seconds", "seconds")
COLUMNS += ("tokens_per_second", "folder", "error")


def run_study(config: RunConfig) -> None:
    """Run all missing runs of the study, then print and write the results.

    Raises:
        InputError: there is no teacher, the student cannot be initialized from it, or the folder is not this study's.
        exit_codes.Exit: a signal stopped the study, or runs failed.
    """
    logging_setup.configure_logging()
    study = _open(config)
    with FolderLock(study.folder, use="a study"):
        stored = study.folder / "study.json"
        if stored.is_file():
            _check_same(study, stored)
        delete_scratch_files(study.folder)
        study.save("running", {})
        _run_arms(study)


def _run_arms(study: "Study") -> None:
    config = study.config
    rates = {arm: _search_learning_rate(study, arm) for arm in study_plan.tuned_arms(config)}
    baseline = rates[study_plan.baseline_arm(config)]
    factor = {arm: rates.get(arm, baseline).factor for arm in study_plan.arms(config)}
    equal = [_run_arm(study, arm, TOKENS, config.steps, factor[arm]) for arm in study_plan.arms(config)]
    longer = [
        _run_arm(
            study,
            ce.arm,
            TIME,
            steps_in_the_same_time(ce.made_steps or ce.steps, ce.seconds, kd.seconds),
            factor[ce.arm],
        )
        for ce, kd in zip(equal[::2], equal[1::2], strict=True)
        if ce.seconds and kd.seconds
    ]
    study.check_one_corpus()
    results = _write_results(study, "finished", list(rates.values()), [*equal, *longer])
    print(study_table.format_study(results))
    print(f"{study.folder}/study.html")
    jobs.check_all_finished(list(study.runs.values()), 0, "study")


def _write_results(study: "Study", status: str, rates: list[LearningRates], arms: list[ArmResult]) -> StudyResults:
    """Write study.json and study.html, and return the results."""
    failed = [f"{run.name}: {job.error}" for run, job in study.runs.items() if job.status != "finished"]
    seeds, teacher_loss = study_plan.seeds(study.config), study.teacher_loss()
    results = StudyResults(seeds, study.teacher, teacher_loss, rates, arms, contrasts(arms), failed)
    study.save(status, results.facts())
    write_text(study.folder / "study.html", render(study.folder.name, results))
    return results


@dataclass
class Study:
    """The runs so far, each in its own subfolder of the study."""

    config: RunConfig
    folder: Path
    teacher: str
    teacher_hash: str
    tokenizer: TokenizerChoice
    runs: dict[PlannedRun, Job] = field(default_factory=dict)
    durations: list[float] = field(default_factory=list)  # seconds of the runs of this process

    def run(self, planned: PlannedRun) -> dict[str, Any]:
        """Execute a run unless it has finished before; return its report, empty if it failed.

        Raises:
            exit_codes.Exit: a signal stopped it.
        """
        if planned in self.runs:
            return self._report(planned)
        overrides = study_plan.run_overrides(planned, self.config, self.teacher, self.tokenizer)
        overrides = [*overrides, "resume=auto"]  # resumes a run that was interrupted with this study
        job = self.runs[planned] = Job(len(self.runs) + 1, overrides, self.folder / planned.name)
        if is_finished(report := read_report(job.folder)):
            job.status, job.watched = "finished", watched_value(report)
            print(f"run {job.number}: {planned.name} has finished already", flush=True)
            return self._report(planned)
        self._show(job)
        begin = time.monotonic()
        stopped = jobs.run(job, partial(compose, "train", return_hydra_config=True), drops_unread=True)
        self.durations.append(time.monotonic() - begin)
        jobs.write_csv(self.folder / "study.csv", COLUMNS, map(self._row, self.runs))
        if job.error:
            print(f"run {job.number} failed: {job.error}", file=sys.stderr, flush=True)
        if stopped:
            self.save("stopped", {})
            jobs.check_all_finished([], stopped, "study", f"Continue with: {self._command()}")
        return self._report(planned)

    def save(self, status: str, facts: dict[str, Any]) -> None:
        """Write study.json: status, identity and, at the end, the results."""
        write_json(self.folder / "study.json", {"status": status, **self.identity(), **facts})

    def identity(self) -> dict[str, Any]:
        """Settings and teacher hash; runs can be reused only if these are equal."""
        rates = vars(self.config.optimizer)
        shared = [*study_plan.shared_overrides(self.config), f"lr {rates['lr']:g} {rates['adamw_lr']:g}"]
        return {"overrides": shared, "teacher_hash": self.teacher_hash}

    def check_one_corpus(self) -> None:
        """Check that all runs of an arm have the same data; arms may differ, as KD may train on teacher-generated text.

        Raises:
            InputError: the data changed between an earlier start of the study and now.
        """
        for arm in study_plan.arms(self.config):
            reports = [self._report(run) for run in self.runs if run.arm == arm]
            if len({report["data"]["hash"] for report in reports if report}) > 1:
                raise InputError(
                    f"The data of {self.folder} changed between its runs.\nStart a new study in another run_dir."
                )

    def teacher_seconds(self) -> float:
        """Mean seconds per run with a teacher that were spent once on its cache or its generated text."""
        files = [self.folder / run.name / "config.yaml" for run in self.runs if run.arm.learns_by == KD]
        taken = [run_spec.load(file).prepared.teacher_seconds for file in files if file.is_file()]
        return fmean(taken) if taken else 0.0

    def teacher_loss(self) -> float | None:
        """Validation loss of the teacher from the reports of the runs that measured it; None if none did."""
        losses = [self._report(run).get("teacher", {}).get("val_loss") for run in self.runs]
        return next((loss for loss in losses if loss is not None), None)

    def _report(self, planned: PlannedRun) -> dict[str, Any]:
        return read_report(self.runs[planned].folder) if self.runs[planned].status == "finished" else {}

    def _show(self, job: Job) -> None:
        """Print a run that is about to start, the best result so far and the remaining time."""
        left = self._remaining_seconds()
        best = best_so_far(list(self.runs.values()), lambda run: f"run {run.number} {run.folder.name}")
        eta = [] if left is None else [f"ETA {format_time(left)}"]
        words = [f"run {job.number} of about {self._expected()}: {job.folder.name}", *best, *eta]
        show(wrapped("  ".join(words), terminal_width()))

    def _expected(self) -> int:
        study, arms = self.config.study, 2 * len(self.config.study.inits)
        searched = (len(study.lr_factors) - 1) * len(study_plan.tuned_arms(self.config))
        return searched + study.seeds * (arms + arms // 2)

    def _remaining_seconds(self) -> float | None:
        """Estimate the time of this run and the later ones; None before one has ended."""
        left = max(self._expected() - len(self.runs) + 1, 1)
        return fmean(self.durations) * left if self.durations else None

    def _row(self, planned: PlannedRun) -> dict[str, Any]:
        job, report = self.runs[planned], self._report(planned)
        shown = {name: report.get(name, "") for name in ("val_loss", "seconds", "tokens_per_second")}
        return {
            **shown,
            "run": job.number,
            "arm": planned.arm.name,
            "seed": planned.seed,
            "lr": study_plan.learning_rate(self.config, planned.lr_factor),
            "steps": planned.steps,
            "status": job.status,
            "training_seconds": round(study_plan.training_seconds(report), 2) if report else "",
            "folder": planned.name,
            "error": job.error,
        }

    def _command(self) -> str:
        replaced = ("name=", "run_dir=", "resume=")
        given = [override for override in self.config.invocation.overrides if not override.startswith(replaced)]
        return f"python train.py {shlex.join([*given, override('run_dir', str(self.folder)), 'resume=auto'])}"


def _open(config: RunConfig) -> Study:
    """Resolve teacher, model and tokenizer; create the folder, or open the existing one on resume."""
    folder = run_dir.run_folder(config)
    if config.resume is None or not (folder / "study.json").is_file():
        run_dir.check_free(folder)
    inputs = resolve.resolve_inputs(with_absolute_paths(config))
    if LAYERS in config.study.inits:
        _check_teacher_layers(inputs)
    _check_tokens(config, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    return Study(config, folder, inputs.teacher, inputs.teacher_hash, inputs.tokenizer)


def _check_teacher_layers(inputs: Inputs) -> None:
    """Check before the first run that the student can be initialized from layers of the teacher.

    Raises:
        InputError: their shapes do not fit.
    """
    try:
        check_fits(ModelShape(**read_shape(Path(inputs.teacher))), ModelShape(**vars(inputs.model)))
    except InputError as error:
        raise InputError(f"{error}\nOr skip these runs: study.inits=[scratch]") from error


def _check_tokens(config: RunConfig, inputs: Inputs) -> None:
    """Check before the first run that a given tokenizer is the teacher's; only runs with a teacher would fail.

    Raises:
        InputError: the tokenizers differ, and the loss compares logits token by token.
    """
    if config.groups["tokenizer"] == "auto" or config.loss.name == "uld":
        return
    from gpt2lab.data.tokenizer import describe_difference, load_tokenizer
    from launch.run import auto_settings, build

    spec = RunSpec(config, Resolved(**vars(inputs), machine=auto_settings.choose_machine(config, inputs)))
    facts = build.data_module(spec).prepare()
    resolve.vocabulary(spec, facts)
    different = describe_difference(Path(inputs.teacher), load_tokenizer(facts.tokenizer_folder))
    if different:
        raise InputError(
            f"tokenizer={config.groups['tokenizer']} is not that of the teacher {inputs.teacher}."
            f"{different}\nLeave tokenizer=auto, or study loss=uld study.inits=[scratch]."
        )


def _check_same(study: Study, file: Path) -> None:
    """Check that the stored study has the same settings and teacher.

    Raises:
        InputError: it has not, or study.json is damaged.
    """
    identity = study.identity()
    try:
        stored = json.loads(file.read_bytes())
        teacher_hash, overrides = stored["teacher_hash"], set(stored["overrides"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{file} is damaged, so it is unknown whether the runs beside it belong to this study.\n"
            "Give another run_dir or name."
        ) from None
    if teacher_hash != identity["teacher_hash"]:
        raise InputError(
            f"The study in {study.folder} has another teacher.\nGive that one, or another run_dir or name."
        )
    different = sorted(overrides ^ set(identity["overrides"]))
    if different:
        raise InputError(
            f"The study in {study.folder} was started with other settings: {shlex.join(different)}.\n"
            "Only study.seeds, study.inits and study.lr_factors can be changed; or give another run_dir."
        )


def _search_learning_rate(study: Study, arm: Arm) -> LearningRates:
    """Run the arm with each learning rate and the first seed.

    Raises:
        exit_codes.Exit: no run finished with a finite loss.
    """
    config = study.config
    all_losses = {
        factor: _finite(study.run(PlannedRun(arm, config.seed, factor, config.steps)).get("val_loss"))
        for factor in sorted(config.study.lr_factors)
    }
    losses = {factor: loss for factor, loss in all_losses.items() if loss is not None}
    if not losses:
        _write_results(study, "failed", [], [])
        where = f"The reasons are in {study.folder}/study.html."
        raise exit_codes.Exit(exit_codes.FAILED, f"The study ended: no learning rate trained {arm.name}. {where}")
    best = min(losses, key=losses.__getitem__)
    rates = {study_plan.learning_rate(config, factor): loss for factor, loss in all_losses.items()}
    return LearningRates(arm.name, rates, study_plan.learning_rate(config, best), best)


def _run_arm(study: Study, arm: Arm, budget: str, steps: int, factor: float) -> ArmResult:
    """Run all seeds of one arm; its time is the median over seeds, with the teacher's share."""
    planned = {seed: PlannedRun(arm, seed, factor, steps) for seed in study_plan.seeds(study.config)}
    reports = {seed: study.run(run) for seed, run in planned.items()}
    times = [study_plan.training_seconds(report) for report in reports.values() if report]
    seconds = median(times) + (study.teacher_seconds() if arm.learns_by == KD else 0) if times else None
    losses = {seed: _finite(report.get("val_loss")) for seed, report in reports.items()}
    stored = {seed: read_document_losses(study.runs[run].folder) for seed, run in planned.items()}
    documents = {seed: one for seed, one in stored.items() if one is not None}
    made = [report["steps"] for report in reports.values() if report]
    return arm_result(arm, budget, steps, losses, seconds, documents, median(made) if made else None)


def _finite(loss: float | None) -> float | None:
    """The loss, or None if the run has diverged."""
    return loss if loss is not None and math.isfinite(loss) else None
