"""Study: is it the teacher? Runs all arms of a study of distillation, and says what they show.

Step (1) the learning rate, on the student without a teacher; (2) every arm for the same number of steps, over the
seeds; (3) the arms without a teacher again, for as long as those with one took; (4) table, study.csv, study.json,
study.html.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from hydra import compose
from omegaconf import DictConfig

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
from gpt2lab.reports.run_report import read_report
from gpt2lab.reports.study_html import render
from gpt2lab.settings import ModelShape, TokenizerChoice
from gpt2lab.storage.atomic_files import write_json, write_text
from gpt2lab.storage.folder_lock import FolderLock
from gpt2lab.storage.model_folder import read_shape
from launch import exit_codes, logging_setup
from launch.checks import study_plan
from launch.checks.study_plan import PlannedRun
from launch.config import run_dir, run_spec
from launch.config.literal_text import override
from launch.config.run_spec import Inputs, Resolved, RunSpec
from launch.config.schema import RunConfig, with_absolute_paths
from launch.config.unused_keys import in_words
from launch.run import resolve
from launch.sweep import jobs, study_table
from launch.sweep.jobs import Job

COLUMNS: tuple[str, ...] = ("run", "arm", "seed", "lr", "steps", "status", "val_loss", "training_seconds", "seconds")
COLUMNS += ("tokens_per_second", "folder", "error")


def run_study(config: RunConfig) -> None:
    """Run what is not there yet, then print and write what was found.

    Raises:
        InputError: there is no teacher, the student cannot be cut out of it, or the folder holds something else.
        answer.Ended: a signal stopped the study, or runs failed.
    """
    logging_setup.settle_noise()
    study = _opened(config)
    with FolderLock(study.folder, use="a study"):
        known = study.folder / "study.json"
        if known.is_file():
            _check_same(study, known)
        study.note("running", {})
        _run_arms(study)


def _run_arms(study: "Study") -> None:
    config = study.config
    rates = {arm: _search(study, arm) for arm in study_plan.tuned_arms(config)}
    common = rates[study_plan.baseline_arm(config)]
    factor = {arm: rates.get(arm, common).factor for arm in study_plan.arms(config)}
    equal = [_arm(study, arm, TOKENS, config.steps, factor[arm]) for arm in study_plan.arms(config)]
    longer = [
        _arm(study, without.arm, TIME, _steps_in_time(without, taught), factor[without.arm])
        for without, taught in zip(equal[::2], equal[1::2], strict=True)
        if without.seconds and taught.seconds
    ]
    study.check_one_corpus()
    results = StudyResults(
        study_plan.seeds(config),
        study.teacher,
        study.teacher_loss(),
        list(rates.values()),
        [*equal, *longer],
        contrasts([*equal, *longer]),
        [f"{run.name}: {job.error}" for run, job in study.runs.items() if job.status != "finished"],
    )
    study.note("finished", results.facts())
    write_text(study.folder / "study.html", render(study.folder.name, results))
    print(study_table.text(results))
    print(f"{study.folder}/study.html")
    jobs.check_all_ended_well(list(study.runs.values()), 0, "study")


@dataclass
class Study:
    """The runs so far, each in a folder of its own inside the study's."""

    config: RunConfig
    folder: Path
    teacher: str
    teacher_hash: str
    tokenizer: TokenizerChoice
    runs: dict[PlannedRun, Job] = field(default_factory=dict)

    def run(self, planned: PlannedRun) -> dict[str, Any]:
        """The report of a run, which is made unless this study has it already; empty where it failed.

        Raises:
            answer.Ended: a signal stopped it.
        """
        if planned in self.runs:
            return self._report(planned)
        told = study_plan.run_overrides(planned, self.config, self.teacher, self.tokenizer)
        told = [*told, "resume=auto"]  # what an earlier start of this study left half done is continued
        job = self.runs[planned] = Job(len(self.runs) + 1, told, self.folder / planned.name)
        if read_report(job.folder).get("status") == "finished":
            job.status = "finished"
            print(f"run {job.number}: {planned.name} is there already", flush=True)
            return self._report(planned)
        print(f"run {job.number} of about {self._expected()}: {planned.name}", flush=True)
        stopped = jobs.run(job, _composed, drops_unread=True)
        jobs.write_csv(self.folder / "study.csv", COLUMNS, map(self._row, self.runs))
        if job.error:
            print(f"run {job.number} failed: {job.error}", file=sys.stderr, flush=True)
        if stopped:
            jobs.check_all_ended_well([], stopped, "study", f"Continue with: {self._command()}")
        return self._report(planned)

    def note(self, status: str, found: dict[str, Any]) -> None:
        """Write study.json: by what it is known again, and the results once there are some."""
        write_json(self.folder / "study.json", {"status": status, **self.known_by(), **found})

    def known_by(self) -> dict[str, Any]:
        """What must be the same for runs of an earlier start to count."""
        rates = vars(self.config.optimizer)
        told = study_plan.shared_overrides(self.config)
        return {"told": [*told, f"lr {rates['lr']:g} {rates['adamw_lr']:g}"], "teacher_hash": self.teacher_hash}

    def check_one_corpus(self) -> None:
        """Runs that an earlier start has left may come from other data; those with a teacher may train on its text.

        Raises:
            InputError
        """
        for arm in study_plan.arms(self.config):
            reports = [self._report(run) for run in self.runs if run.arm == arm]
            if len({report["data"]["hash"] for report in reports if report}) > 1:
                raise InputError(
                    f"The data of {self.folder} changed between its runs.\nStart the study anew in another run_dir."
                )

    def teacher_seconds(self) -> float:
        """What the teacher took to write or read once for all students, shared out over the runs that use it."""
        files = [self.folder / run.name / "config.yaml" for run in self.runs if run.arm.learns_by == KD]
        taken = [run_spec.load(file).prepared.teacher_seconds for file in files if file.is_file()]
        return fmean(taken) if taken else 0.0

    def teacher_loss(self) -> float | None:
        """The teacher's validation loss, as the runs that asked it report it."""
        told = [self._report(run).get("teacher", {}).get("val_loss") for run in self.runs]
        return next((loss for loss in told if loss is not None), None)

    def _report(self, planned: PlannedRun) -> dict[str, Any]:
        return read_report(self.runs[planned].folder) if self.runs[planned].status == "finished" else {}

    def _expected(self) -> int:
        study, ways = self.config.study, 2 * len(self.config.study.inits)
        tried = (len(study.lr_factors) - 1) * len(study_plan.tuned_arms(self.config))
        return tried + study.seeds * (ways + ways // 2)

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
        own = ("name=", "run_dir=", "resume=")
        given = [override for override in self.config.invocation.overrides if not override.startswith(own)]
        return f"python train.py {in_words([*given, override('run_dir', str(self.folder)), 'resume=auto'])}"


def _composed(overrides: list[str]) -> DictConfig:
    return compose("train", overrides, return_hydra_config=True)


def _opened(config: RunConfig) -> Study:
    """Resolve the teacher and what follows from it; create the folder, or open that of an earlier start."""
    folder = run_dir.wanted_folder(config)
    known = folder / "study.json"
    if config.resume is None or not known.is_file():
        run_dir.check_free(folder)
    inputs = resolve.resolve_inputs(with_absolute_paths(config))
    if LAYERS in config.study.inits:
        _check_teacher_layers(inputs)
    _check_tokens(config, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    return Study(config, folder, inputs.teacher, inputs.teacher_hash, inputs.tokenizer)


def _check_teacher_layers(inputs: Inputs) -> None:
    """Check before the first run that the student can be initialized from the teacher, as its runs would."""
    try:
        check_fits(ModelShape(**read_shape(Path(inputs.teacher))), ModelShape(**vars(inputs.model)))
    except InputError as error:
        raise InputError(f"{error}\nOr leave those runs out: study.inits=[scratch]") from error


def _check_tokens(config: RunConfig, inputs: Inputs) -> None:
    """A named tokenizer is the teacher's: runs without a teacher would train with any, before another fails."""
    if config.groups["tokenizer"] == "auto" or config.loss.name == "uld":
        return
    from gpt2lab.data.tokenizer import difference_in_words, load_tokenizer
    from launch.run import auto_settings, build

    spec = RunSpec(config, Resolved(**vars(inputs), machine=auto_settings.choose_machine(config, inputs)))
    facts = build.data_module(spec).prepare()
    resolve.vocabulary(spec, facts)
    different = difference_in_words(Path(inputs.teacher), load_tokenizer(facts.tokenizer_folder))
    if different:
        raise InputError(
            f"tokenizer={config.groups['tokenizer']} is not that of the teacher {inputs.teacher}."
            f"{different}\nLeave tokenizer=auto, or study loss=uld study.inits=[scratch]."
        )


def _check_same(study: Study, known: Path) -> None:
    """The runs that are there are runs of this study: told the same, by the same teacher."""
    asked = study.known_by()
    try:
        stored = json.loads(known.read_bytes())
        teacher_hash, told = stored["teacher_hash"], set(stored["told"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{known} is damaged, so it is unknown whether the runs beside it belong to this study.\n"
            "Give another run_dir or name."
        ) from None
    if teacher_hash != asked["teacher_hash"]:
        raise InputError(
            f"The study in {study.folder} has another teacher.\nGive that one, or another run_dir or name."
        )
    different = sorted(told ^ set(asked["told"]))
    if different:
        raise InputError(
            f"The study in {study.folder} was started with other settings: {in_words(different)}.\n"
            "Only study.seeds, study.inits and study.lr_factors can be changed; or give another run_dir."
        )


def _search(study: Study, arm: Arm) -> LearningRates:
    """Try each learning rate with the first seed.

    Raises:
        answer.Ended: none of the runs finished.
    """
    config = study.config
    tried = {
        factor: _finite(study.run(PlannedRun(arm, config.seed, factor, config.steps)).get("val_loss"))
        for factor in sorted(config.study.lr_factors)
    }
    losses = {factor: loss for factor, loss in tried.items() if loss is not None}
    if not losses:
        raise exit_codes.Ended(exit_codes.FAILED, f"The study ended: no learning rate trained {arm.name}.")
    best = min(losses, key=losses.__getitem__)
    rates = {study_plan.learning_rate(config, factor): loss for factor, loss in tried.items()}
    return LearningRates(arm.name, rates, study_plan.learning_rate(config, best), best)


def _arm(study: Study, arm: Arm, budget: str, steps: int, factor: float) -> ArmResult:
    """All seeds of one arm."""
    planned = {seed: PlannedRun(arm, seed, factor, steps) for seed in study_plan.seeds(study.config)}
    reports = {seed: study.run(run) for seed, run in planned.items()}
    taken = [study_plan.training_seconds(report) for report in reports.values() if report]
    seconds = median(taken) + (study.teacher_seconds() if arm.learns_by == KD else 0) if taken else None
    losses = {seed: _finite(report.get("val_loss")) for seed, report in reports.items()}
    stored = {seed: read_document_losses(study.runs[run].folder) for seed, run in planned.items()}
    documents = {seed: one for seed, one in stored.items() if one is not None}
    return arm_result(arm, budget, steps, losses, seconds, documents)


def _steps_in_time(without: ArmResult, taught: ArmResult) -> int:
    assert without.seconds is not None
    assert taught.seconds is not None
    return study_plan.steps_in_the_same_time(without.steps, without.seconds, taught.seconds)


def _finite(loss: float | None) -> float | None:
    """A loss that is a number: a run that diverged has none to compare."""
    return loss if loss is not None and math.isfinite(loss) else None
