"""A search: proposed values and keys, recorded results of jobs, and resume."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning
import optuna
import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from callbacks.pruning import TrialReports
from gpt2lab.analysis.optuna_storage import STUDY_FILE, input_error_when_unusable, load_study, make_study
from gpt2lab.errors import InputError
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.storage.report_json import read_report
from launch.config import schema
from launch.sweep import search_space
from launch.sweep.job_queue import Proposal
from launch.sweep.jobs import Job
from launch.sweep.optuna_search import Search
from tests.conftest import ROOT, Train, environment

Searching = Callable[..., Search]
schema.register()


@pytest.fixture
def search(tmp_path: Path) -> Iterator[Searching]:
    """Make the job source of a command, in the folder `swept`."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None

        def made(*overrides: str) -> Search:
            command = ["hparams_search=optuna", *overrides]
            words = [*command, "hydra.mode=MULTIRUN", f"hydra.sweep.dir={tmp_path / 'swept'}"]
            tree = hydra.compose_config("train", words, run_mode=RunMode.MULTIRUN, with_log_configuration=False)
            return Search(hydra.config_loader, tree, command)

        yield made


def all_of(source: Search, value: Callable[[dict[str, str]], float] = lambda _: 1.0) -> list[dict[str, str]]:
    """Run a search in which all jobs finish with these values of the watched metric."""
    found = []
    while proposal := source.ask():
        found.append(keys(proposal))
        job = Job(proposal.trial or 0, proposal.overrides, Path("nowhere"), "finished", watched=value(found[-1]))
        source.tell(job)
    return found


def keys(proposal: Proposal) -> dict[str, str]:
    return dict(override.split("=", 1) for override in proposal.overrides if override != "resume=auto")


def study(folder: Path) -> optuna.Study:
    found = load_study(folder / STUDY_FILE)
    assert found is not None
    return found


# The space


@pytest.mark.parametrize(
    ("typed", "distribution"),
    [
        ("optimizer=adamw,muon", CategoricalDistribution(["adamw", "muon"])),
        ("steps=choice(10,20)", CategoricalDistribution(["10", "20"])),
        ("model.n_layer=range(1,10)", IntDistribution(1, 9)),
        ("model.n_layer=range(2,9,2)", IntDistribution(2, 8, step=2)),
        ("model.dropout=range(0.0,0.4,0.1)", FloatDistribution(0.0, 0.3, step=0.1)),
        ("optimizer.momentum=interval(0.8,0.99)", FloatDistribution(0.8, 0.99)),
        ("steps=int(interval(10,100))", IntDistribution(10, 100)),
        ("steps=tag(log,int(interval(10,100)))", IntDistribution(10, 100, log=True)),
        ("loss.temperature=tag(log,interval(0.5,8))", FloatDistribution(0.5, 8, log=True)),
        ("loss.temperature=interval(0.5,8)", FloatDistribution(0.5, 8)),
        ("optimizer.lr=interval(1e-4,1e-2)", FloatDistribution(1e-4, 1e-2, log=True)),
        ("optimizer.lr=interval(1e-3,2e-3)", FloatDistribution(1e-3, 2e-3)),
        ("optimizer.lr=tag(linear,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2)),
        ("optimizer.weight_decay=interval(0,1)", FloatDistribution(0, 1)),
    ],
)
def test_ranges_are_searched_as_they_are_typed(search: Searching, typed: str, distribution: object):
    search("seed=1,2")  # composes, so that Hydra's grammar knows the groups
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    fixed, dimensions = search_space.parse(["seed=3", typed], hydra.config_loader)
    assert fixed == ["seed=3"]
    assert [dimension.distribution for dimension in dimensions] == [distribution]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "nothing to search"),
        (["optimizer.lr=interval(1e-2,1e-4)"], "lower bound"),
        (["optimizer.lr=tag(log,interval(0,1))"], "needs numbers above 0"),
        (["optimizer.lr=tag(exp,interval(1,2))"], "log, linear"),
        (["seed=range(3,3)"], "contains no number"),
        (["steps=interval(1,2)"], r"range\(low,high\)"),
        (["optimizer.lrr=interval(1,2)"], "did you mean optimizer.lr"),
        (["optimizer=adamw", "optimizer.momentum=interval(0.8,0.9)"], "optimizer=muon reads it"),
        (["loss.temperature=interval(1,2)"], "only task=distill reads it"),
        (["seed=1,2", "hparams_search.n_trials=0"], "at least 1"),
        (["seed=1,2", "hparams_search.sampler=tpee"], "Allowed: tpe, random"),
        (["seed=1,2", "hparams_search.pruner=mean"], "Allowed: none, median"),
        (["task=pretrain,finetune", "seed=1"], "cannot be compared"),
    ],
)
def test_invalid_search_is_refused_before_it_starts(
    search: Searching, tmp_path: Path, overrides: list[str], message: str
):
    with pytest.raises(InputError, match=message) as error:
        search(*overrides)
    assert len(str(error.value).splitlines()) <= 5
    assert not (tmp_path / "swept").exists()


@pytest.mark.parametrize("multirun", [[], ["-m"]])
def test_interval_without_a_search_is_refused_with_a_fix(train_here: Train, multirun: list[str]):
    answer = train_here(*multirun, "optimizer.lr=interval(1e-4,1e-2)")
    assert answer.code == 2
    assert "hparams_search=optuna" in answer.stderr


EIGHT = ("hparams_search.n_trials=8", "hparams_search.seed=1")  # trials, in which every choice is sampled


def test_keys_are_sampled_only_if_read(search: Searching):
    found = all_of(search("optimizer.momentum=interval(0.8,0.99)", "optimizer=adamw,muon", *EIGHT))
    assert {row["optimizer"] for row in found} == {"adamw", "muon"}
    assert all(("optimizer.momentum" in row) == (row["optimizer"] == "muon") for row in found)


def test_conditions_reach_over_tasks_groups_and_keys(search: Searching):
    space = ["task=pretrain,distill", "teacher=some/run", "loss=jsd,forward_kl", "loss.beta=interval(0.1,0.9)"]
    found = all_of(search(*space, "loss.temperature=interval(1,4)", *EIGHT))
    assert {row["task"] for row in found} == {"pretrain", "distill"}
    for row in found:
        assert ("loss" in row) == ("loss.temperature" in row) == (row["task"] == "distill")
        assert ("loss.beta" in row) == (row.get("loss") == "jsd")


def test_a_key_may_depend_on_another_key(search: Searching):
    found = all_of(
        search("task=finetune", "init=some/run", "task.lora.alpha=interval(8,32)", "task.lora.rank=0,8", *EIGHT)
    )
    assert {row["task.lora.rank"] for row in found} == {"0", "8"}
    assert all(("task.lora.alpha" in row) == (row["task.lora.rank"] == "8") for row in found)


# Sampled values


def lrs(found: list[dict[str, str]]) -> list[str]:
    return [row["optimizer.lr"] for row in found]


def test_unseeded_searches_differ_and_seeded_ones_are_the_same(search: Searching, tmp_path: Path):
    def drawn(*overrides: str) -> list[str]:
        found = lrs(all_of(search("optimizer.lr=interval(1e-4,1e-2)", "hparams_search.n_trials=3", *overrides)))
        (tmp_path / "swept" / STUDY_FILE).unlink()
        return found

    assert drawn() != drawn()
    assert drawn("hparams_search.seed=3") == drawn("hparams_search.seed=3")
    assert drawn("hparams_search.seed=3") != drawn("hparams_search.seed=4")


@pytest.mark.slow
def test_sampled_values_approach_the_best(search: Searching, tmp_path: Path):
    """TPE beats random values, which have 3 of 30 in the good tenth of the range, and at least 7 in 3 % of cases."""
    source = search("model.dropout=interval(0,1)", "hparams_search.seed=1", "hparams_search.n_trials=40")
    found = all_of(source, lambda row: abs(float(row["model.dropout"]) - 0.3))
    near = [abs(float(row["model.dropout"]) - 0.3) < 0.05 for row in found]
    assert sum(near[10:]) >= 7


def test_tpe_uses_results_after_its_startup_trials(search: Searching):
    settings = ["hparams_search.n_startup_trials=1", "hparams_search.n_trials=3"]
    source = search("optimizer.lr=interval(1e-4,1e-2)", *settings)
    drawn_by_results = []
    while proposal := source.ask():
        drawn_by_results.append(bool(source._open[proposal.trial or 0].relative_params))
        source.tell(Job(proposal.trial or 0, proposal.overrides, Path("nowhere"), "finished", watched=1.0))
    assert drawn_by_results == [False, True, True]


def test_tried_values_are_not_repeated(search: Searching):
    found = all_of(search("model=nano,micro", "seed=1,2", "hparams_search.n_trials=50"))
    assert len(found) == len({tuple(row.items()) for row in found}) == 4


def test_search_goal_is_the_metric_of_the_runs(search: Searching, tmp_path: Path):
    assert search("seed=1,2").ask() is not None
    assert study(tmp_path / "swept").direction == optuna.study.StudyDirection.MINIMIZE
    (tmp_path / "swept" / STUDY_FILE).unlink()
    assert search("task=finetune", "init=some/run", "seed=1,2").ask() is not None
    assert study(tmp_path / "swept").direction == optuna.study.StudyDirection.MAXIMIZE
    assert study(tmp_path / "swept").user_attrs["metric"] == "val/rougeL"


# Recorded results


def test_search_records_a_failed_job_and_continues(search: Searching, tmp_path: Path):
    source = search("optimizer.lr=interval(1e-4,1e-2)", "hparams_search.n_trials=3")
    for status, watched in (("failed", None), ("finished", float("nan")), ("finished", 2.0)):
        proposal = source.ask()
        assert proposal is not None
        source.tell(Job(proposal.trial or 0, proposal.overrides, Path("nowhere"), status, "it broke", watched))
    assert source.ask() is None
    assert [trial.state for trial in study(tmp_path / "swept").trials] == [
        TrialState.FAIL,
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]


def test_interrupted_search_continues_with_remaining_trials(search: Searching, tmp_path: Path):
    """One of four trials finished, one failed, one was running and one is new."""
    command = ["optimizer.lr=interval(1e-4,1e-2)", "hparams_search.n_trials=4", "hparams_search.seed=5"]
    first = search(*command)
    before = [first.ask() for _ in range(3)]
    assert all(before)
    done, failed, running = [proposal for proposal in before if proposal]
    first.tell(Job(0, done.overrides, Path("nowhere"), "finished", watched=3.0))
    first.tell(Job(1, failed.overrides, Path("nowhere"), "failed", "out of memory"))
    first.tell(Job(2, running.overrides, Path("nowhere"), "stopped"))
    with pytest.raises(InputError, match="resume=auto"):
        search(*command)
    with pytest.raises(InputError, match="another search"):
        search("optimizer.lr=interval(1e-4,1e-1)", *command[1:], "resume=auto")
    again = search(*command, "resume=auto")
    after = []
    while proposal := again.ask():
        after.append(proposal)
    assert [(proposal.trial, proposal.failed) for proposal in after[:3]] == [(0, ""), (1, "out of memory"), (2, "")]
    for now, then in zip(after, (done, failed, running), strict=False):
        assert now.overrides == ["resume=auto", *then.overrides], "a running job resumes from its checkpoint"
    assert len(after) == 4
    assert after[3].overrides[-1] not in [proposal.overrides[-1] for proposal in after[:3]]
    again.tell(Job(2, running.overrides, Path("nowhere"), "finished", watched=2.0))
    assert study(tmp_path / "swept").best_trial.number == 2
    longer = search(*command[:1], "hparams_search.n_trials=5", *command[2:], "resume=auto")
    assert len(all_of(longer)) == 5


def test_successive_halving_lets_the_best_quarter_pass_each_rung(search: Searching, tmp_path: Path):
    """Jobs are judged at steps 5 and 20 (`validate_every`, and four times that) and nowhere between."""
    keys = ["model.dropout=interval(0,1)", "validate_every=5", "hparams_search.pruner=successive_halving"]
    source = search(*keys, "hparams_search.n_trials=8", "hparams_search.sampler=random")
    ended_at: list[int] = []
    values = [(1.0, 1.0), (1.1, 0.1), (3.0, 3.0), (4.0, 4.0), (1.2, 0.1), (0.9, 2.0), (0.8, 0.8), (0.9, 0.1)]
    for first, later in values:
        proposal = source.ask()
        assert proposal is not None
        running = study(tmp_path / "swept")
        trial = optuna.trial.Trial(running, running.trials[proposal.trial or 0]._trial_id)
        for step in range(5, 41, 5):
            trial.report(first if step == 5 else later, step)
            if trial.should_prune():
                break
        ended_at.append(step)
        status = "pruned" if step < 40 else "finished"
        source.tell(Job(proposal.trial or 0, proposal.overrides, Path("nowhere"), status, watched=later))
    assert ended_at == [40, 5, 5, 5, 5, 20, 40, 40], "of eight the best two pass the first rung"


# Real jobs


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as stream:
        return list(csv.DictReader(stream))


QUICK = ["optimizer=adamw", "schedule=constant", "steps=24", "validate_every=6", "checkpoint_every=100"]
RANDOM = ["hparams_search=optuna", "hparams_search.sampler=random", "hparams_search.seed=1"]
FOUR = [*RANDOM, "hparams_search.n_trials=4", "hparams_search.n_startup_trials=1"]


@pytest.mark.parametrize("kept", [0, 20_000])
def test_damaged_study_is_an_error_that_ends_no_job(
    search: Searching, tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: int
):
    """The file has foreign bytes, or only the beginning of a database."""
    going = search("optimizer.lr=interval(1e-4,1e-2)", "hparams_search.n_trials=2")
    going.ask()
    file = tmp_path / "swept" / STUDY_FILE
    file.write_bytes(file.read_bytes()[:kept] or b"no study" * 1000)
    with pytest.raises(InputError, match="cannot be used as an Optuna study") as error:
        search("optimizer.lr=interval(1e-4,1e-2)", "hparams_search.n_trials=2", "resume=auto")
    assert len(str(error.value).splitlines()) <= 5
    with pytest.raises(InputError, match="cannot be used as an Optuna study"), input_error_when_unusable(file):
        going.ask()
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    TrialReports(file, 0).on_train_start(trainer, lightning.LightningModule())
    assert "this run is not pruned" in caplog.text


@pytest.mark.slow
def test_search_continues_after_a_diverging_run(train_process: Train, tiny: list[str], tmp_path: Path):
    """Two jobs at a time, of the two values: lr=1e30 diverges and is recorded as failed."""
    command = [*QUICK, "optimizer.lr=1e-2,1e30", "hydra.sweep.dir=swept", "n_jobs=2", *FOUR]
    answer = train_process(*tiny, *command)
    assert answer.code == 1, answer.stderr
    table = {row["overrides"].rpartition("=")[2]: row for row in rows(tmp_path / "swept")}
    assert {lr: row["status"] for lr, row in table.items()} == {"0.01": "finished", "1e+30": "failed"}
    assert "not finite" in table["1e+30"]["error"]
    states = {
        trial.params["optimizer.lr"]: trial.state for trial in study(tmp_path / "swept").trials if trial.user_attrs
    }
    assert states == {"0.01": TrialState.COMPLETE, "1e+30": TrialState.FAIL}


@pytest.mark.slow
def test_search_records_losses_and_prints_the_best_command(
    train_process: Train, train_here: Train, tiny: list[str], tmp_path: Path
):
    space = ["optimizer.lr=interval(1e-4,1e-2)", "model.n_layer=range(1,4)"]
    ended = train_process(*tiny, *QUICK, *space, "hydra.sweep.dir=swept", *RANDOM, "hparams_search.n_trials=2")
    assert ended.code == 0, ended.stderr
    losses = [read_report(tmp_path / "swept" / row["job"])["val_loss"] for row in rows(tmp_path / "swept")]
    assert losses[0] != losses[1]
    first, second = study(tmp_path / "swept").trials
    assert [first.value, second.value] == losses
    assert first.datetime_complete < second.datetime_start, "what is drawn second knows the first"
    (command,) = (line for line in ended.stdout.splitlines() if line.startswith("  python train.py "))
    assert train_here(*shlex.split(command)[2:], "run_dir=again").code == 0
    assert read_report(tmp_path / "again")["val_loss"] == pytest.approx(min(losses), rel=1e-6)


def statuses(folder: Path) -> dict[str, str]:
    """Map a learning rate to the status of its job."""
    return {row["overrides"].rpartition("=")[2]: row["status"] for row in rows(folder)}


def steps_and_winner(folder: Path) -> tuple[int, str]:
    """Return the steps of all jobs together and the learning rate of the best."""
    table = [row for row in rows(folder) if row["status"] == "finished"]
    best = min(table, key=lambda row: float(row["watched"]))
    steps = sum(read_report(folder / row["job"])["steps"] for row in rows(folder))
    return steps, best["overrides"].rpartition("=")[2]


WORTH_IT = "the same winner in fewer steps"


def worth_of_pruning(pruned: Path, whole: Path) -> str:
    """Return WORTH_IT, or the reason against it."""
    (steps, winner), (all_steps, true_winner) = steps_and_winner(pruned), steps_and_winner(whole)
    if winner != true_winner:
        return f"the true winner was {statuses(pruned)[true_winner]}"
    return WORTH_IT if steps < all_steps else "no step was saved"


@pytest.mark.slow
def test_pruning_finds_the_same_winner_in_fewer_steps(train_process: Train, tiny: list[str], tmp_path: Path):
    """The check detects a study that never prunes, and one that prunes the winner because it maximizes the loss."""
    command = [*QUICK, "optimizer.lr=1e-2,1e-3,1e-5,1e-7", *FOUR]
    assert train_process(*tiny, *command, "hydra.sweep.dir=whole", "hparams_search.pruner=none").code == 0
    assert train_process(*tiny, *command, "hydra.sweep.dir=pruned").code == 0
    assert worth_of_pruning(tmp_path / "pruned", tmp_path / "whole") == WORTH_IT
    assert worth_of_pruning(tmp_path / "whole", tmp_path / "whole") == "no step was saved"
    ended = [
        read_report(tmp_path / "pruned" / row["job"]) for row in rows(tmp_path / "pruned") if row["status"] == "pruned"
    ]
    assert ended
    assert all(report["status"] == "pruned" and report["steps"] < 24 for report in ended)
    assert not any(
        (tmp_path / "pruned" / row["job"] / "hf").exists()
        for row in rows(tmp_path / "pruned")
        if row["status"] == "pruned"
    )

    notes = study(tmp_path / "pruned").user_attrs
    (tmp_path / "broken").mkdir()
    order = ("metric", "asked_for", "pruner")
    make_study(tmp_path / "broken" / STUDY_FILE, False, optuna.samplers.RandomSampler(), {k: notes[k] for k in order})
    assert train_process(*tiny, *command, "hydra.sweep.dir=broken", "resume=auto").code == 0
    assert worth_of_pruning(tmp_path / "broken", tmp_path / "whole") == "the true winner was pruned"


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "sampler"), [("ddp", "random"), ("fsdp", "tpe")])
def test_all_ranks_of_a_job_have_the_sampled_values(
    strategy: str, sampler: str, train_process: Train, tiny: list[str], tmp_path: Path
):
    """Unseeded: two ranks have the losses of one process with the job's values; another job has others.

    With tpe the second job's values depend on the first one's result.

    Above 1e-2 training is unstable, and what two ranks round otherwise grows a hundredfold.
    """
    quick = [*(key for key in QUICK if key != "schedule=constant"), "micro_batch=2"]
    space = ["schedule=constant,wsd", "schedule.decay_fraction=interval(0.2,0.8)", "optimizer.lr=interval(1e-4,1e-2)"]
    search = ["hparams_search=optuna", f"hparams_search.sampler={sampler}", "hparams_search.n_trials=2"]
    search += ["hparams_search.n_startup_trials=1", "hparams_search.pruner=none"]
    sweep = ["devices=2", f"strategy={strategy}", "hydra.sweep.dir=swept"]
    answer = train_process(*tiny, *quick, *space, *search, *sweep)
    assert answer.code == 0, answer.stderr
    drawn = [row["overrides"].split()[-3:] for row in rows(tmp_path / "swept")]
    drawn = [[word for word in words if word.startswith(("schedule", "optimizer.lr"))] for words in drawn]
    assert drawn[0][-1] != drawn[1][-1]
    assert all(len(words) == (3 if "schedule=wsd" in words else 2) for words in drawn)
    assert train_process(*tiny, *quick, *drawn[0], "run_dir=one").code == 0
    together, alone = (read_metrics(tmp_path / name)[-1]["val/loss"] for name in ("swept/0", "one"))
    assert float(together) == pytest.approx(float(alone), abs=2e-5)


@pytest.mark.chaos
def test_killed_search_resumes(train_process: Train, cache: Path, tiny: list[str], tmp_path: Path):
    """Its running job continues from its checkpoint as the same trial, and no step is reported twice."""
    keys = ["steps=60", "validate_every=5", "checkpoint_every=10", "optimizer.lr=interval(1e-4,1e-2)"]
    command = [*tiny, *keys, "hparams_search=optuna", "hparams_search.n_trials=2", "hydra.sweep.dir=swept"]
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command], cwd=tmp_path, env=environment(cache))
    first = tmp_path / "swept" / "0" / "checkpoints" / "index.json"
    while not first.is_file() and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = study(tmp_path / "swept").trials
    assert [trial.state for trial in before] == [TrialState.RUNNING]
    answer = train_process(*command, "resume=auto")
    assert answer.code == 0, answer.stderr
    assert "already reported" not in answer.stderr
    after = study(tmp_path / "swept").trials
    assert [trial.state for trial in after] == [TrialState.COMPLETE] * 2
    assert after[0].params == before[0].params
    assert sorted(after[0].intermediate_values) == list(range(5, 61, 5))
    assert [row["status"] for row in rows(tmp_path / "swept")] == ["finished", "finished"]


def test_the_command_of_a_wandb_sweep_runs(train_here: Train, tiny: list[str], tmp_path: Path):
    """W&B's own code makes it from docs/wandb_sweep.yaml, like its agent."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    values = {key: {"value": given.get("values", [given.get("min")])[0]} for key, given in sweep["parameters"].items()}
    parts = create_sweep_command_args({"args": values})
    parts |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [str(ROOT / sweep["program"])]}
    command: list[str] = []
    for word in create_sweep_command(list(sweep["command"])):
        command += parts[word[2:-1]] if word.startswith("${") else [word]
    assert "optimizer.lr=0.0001" in command
    given = [key for key in tiny if not key.startswith("logger=")]
    program = command.index(str(ROOT / "train.py"))
    assert command[:program] == ["/usr/bin/env", sys.executable]
    ended = train_here(*command[program + 1 :], *given, "steps=2", "run_dir=run")
    assert ended.code == 0, ended.stderr
    assert read_report(tmp_path / "run")["status"] == "finished"
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
