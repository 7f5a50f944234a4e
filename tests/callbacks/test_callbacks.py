"""Callbacks on real, tiny runs: their output is right, and training is the same with and without them."""

import html
import inspect
import logging
import math
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks.final_score import FinalScore
from callbacks.health import Health, SpikeDetector
from callbacks.interrupt import SAME_KEY_PRESS, Interrupt, StoppedNowError
from callbacks.loggers.tensorboard import TensorBoard
from callbacks.loggers.wandb import WeightsAndBiases
from callbacks.loggers.wandb_mode import chosen_mode
from callbacks.samples import Samples, shown_sample
from gpt2lab.errors import InputError
from gpt2lab.model.backbone import to_hf
from gpt2lab.reports.dashboard_views import PRETRAIN
from gpt2lab.reports.hf_folder import verify_in_fresh_process, write_hf_folder
from gpt2lab.reports.samples_jsonl import Sample, read_samples
from gpt2lab.storage.checkpoint_ledger import newest_good_checkpoint, read_entries
from gpt2lab.storage.metrics_csv import read_metrics, series
from gpt2lab.storage.report_json import read_report
from gpt2lab.system import device
from lightning_modules.pretrain import Pretrain
from tests.support import tiny_run
from tests.support.offline_wandb import assert_one_complete_run, summary_in


@pytest.fixture(autouse=True)
def warnings_reach_caplog(monkeypatch) -> None:
    """The launcher, which other tests run in this process, does not propagate log lines to the root logger."""
    for name in ("callbacks", "gpt2lab"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A model this small is slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def plain(cache, tmp_path_factory) -> tuple[Path, Pretrain]:
    """An unbroken run of 12 steps without samples; saved at 4, 8, 12, validated at 8, 12."""
    run_dir = tmp_path_factory.mktemp("runs") / "plain"
    _, model = tiny_run.train(run_dir, cache)
    return run_dir, model


def weights(model: Pretrain) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in model.backbone.parameters()]


def equal(first: Pretrain, second: Pretrain) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


class At(lightning.Callback):
    """Runs a function after one step, before the callbacks that follow in the list."""

    def __init__(self, step: int, action) -> None:
        self.step = step
        self.action = action

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.action()


# Samples


def test_sampling_writes_every_method_and_keeps_the_weights(plain, cache, tmp_path, capsys):
    samples = Samples(every=4, prompts=[], max_new_tokens=8)
    _, model = tiny_run.train(tmp_path, cache, extra=[samples])
    assert equal(model, plain[1])
    written = read_samples(tmp_path)
    assert {sample.step for sample in written} == {4, 8, 12}
    assert {sample.method for sample in written} == {"greedy", "top_k", "nucleus"}
    assert len(written) == 3 * 3 * 3
    assert "step 12" in capsys.readouterr().out
    beginning = html.escape(written[0].prompt.strip().splitlines()[0])
    assert beginning
    assert beginning in (tmp_path / "report.html").read_text()


SHOWN = {
    "nucleus of three": (["greedy", "top_k", "nucleus top_p=0.9"], "nucleus top_p=0.9"),
    "the only method": (["beam"], "beam"),
    "the last without nucleus": (["greedy", "top_k"], "top_k"),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_terminal_shows_a_sample_as_it_is_written(kind):
    methods, expected = SHOWN[kind]
    texts = [Sample(7, "x" * 300 + prompt, '\n\tof \x1b[2J"é"', name) for name in methods for prompt in "ab"]
    assert shown_sample(texts) == f'— sample of step 7, {expected}\n… {"x" * 199}a\n\tof �[2J"é"'


# Throughput and memory


def test_speed_leaves_out_validation_sampling_and_saving(plain, cache, tmp_path, monkeypatch):
    """The run itself moves the clock: a micro-batch takes a second, anything else far longer."""
    now = 0.0

    class Clock(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.passes(1)

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
            self.passes(1_000)

        def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
            self.passes(1_000_000)

        def passes(self, seconds) -> None:
            nonlocal now
            now += seconds

    class TimedSamples(Samples):
        def _sample(self, trainer, pl_module) -> None:
            super()._sample(trainer, pl_module)
            clock.passes(1_000_000_000)

    clock, samples = Clock(), TimedSamples(every=4, prompts=[], max_new_tokens=2)
    monkeypatch.setattr("callbacks.throughput.time", SimpleNamespace(perf_counter=lambda: now))
    tiny_run.train(tmp_path, cache, steps=10, extra=[clock, samples])  # saves at 4, at 8 after validating, and at 10
    assert now > 1e9
    speed = 2 * 4 * 32 / (2 * tiny_run.ACCUMULATE)  # two steps of 4 × 32 tokens an interval
    assert series(read_metrics(tmp_path), "tokens_per_second") == [(step, speed) for step in (2, 4, 6, 8, 10)]
    report = read_report(plain[0])
    assert report["mfu"] > 0
    assert report["peak_memory_bytes"] > 100e6


def test_mfu_counts_no_position_embeddings(plain, cache):
    module, peak = plain[1], device.peak_flops(torch.device("cpu"), torch.float32, cache)
    transformer, shape = module.backbone.lm.transformer, module.backbone.shape
    multiplied = sum(weight.numel() for weight in transformer.parameters()) - transformer.wpe.weight.numel()
    flop = 6 * multiplied + 12 * shape.n_layer * shape.n_embd * 32  # of windows of 32 tokens
    speeds, shares = (series(read_metrics(plain[0]), name) for name in ("tokens_per_second", "mfu"))
    for (step, speed), (_, mfu) in zip(speeds, shares, strict=True):
        assert mfu == pytest.approx(speed * flop / peak, rel=1e-5), step


def test_token_flops_are_six_per_parameter_plus_attention():
    assert device.flops_per_token(124_439_808, 12, 768, 1024) == 6 * 124_439_808 + 12 * 12 * 768 * 1024


def test_cpu_peak_flops_are_measured_once_and_keep_the_rng_state(tmp_path, monkeypatch):
    measure = inspect.unwrap(device._measure)  # without the cache of the test session
    monkeypatch.setattr(device, "_measure", measure)
    state = torch.random.get_rng_state()
    first = device.peak_flops(torch.device("cpu"), torch.float32, tmp_path)
    assert first == device.peak_flops(torch.device("cpu"), torch.float32, tmp_path)
    assert 1e9 < first < 1e14
    assert torch.equal(state, torch.random.get_rng_state())


# Health


def test_loss_spike_is_detected_but_no_noise_or_decrease():
    generator = torch.Generator().manual_seed(0)
    falling = [3 + 5 * math.exp(-step / 20) + 0.05 * torch.randn((), generator=generator).item() for step in range(200)]
    detector = SpikeDetector()
    assert not any(detector.is_spike(loss) for loss in falling)
    assert detector.is_spike(falling[-1] + 1.0)
    assert not detector.is_spike(falling[-1])


def test_loss_spike_stops_the_run_only_if_configured(cache, tmp_path, caplog):
    for action in ("warn", "stop"):
        run_dir = tmp_path / action
        interrupt, health = Interrupt(), Health(action)
        health.detector = SpikeDetector(window=2, deviations=-1e9, margin=-1e9)  # everything is a spike
        trainer, _ = tiny_run.train(run_dir, cache, extra=[interrupt, health])
        assert "Loss spike at step" in caplog.text
        report = read_report(run_dir)
        assert [text.partition(",")[0] for _, text in report["events"]] == ["loss spike"] * len(health.spikes)
        assert health.spikes[0][0] == report["events"][0][0]
        if action == "warn":
            assert (report["status"], report["steps"]) == ("finished", 12)
        else:
            assert (report["status"], report["stopped_by"]) == ("stopped", "loss spike")
            assert newest_good_checkpoint(run_dir).name == f"step-{trainer.global_step:06d}.ckpt"


def test_micro_batches_do_not_wait_for_signals_of_other_ranks(cache: Path, tmp_path: Path) -> None:
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor), "Lightning's exchange has another name"
    trainer, _ = tiny_run.train(tmp_path / "run", cache, steps=1, extra=[Interrupt()])
    exchange = trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor
    assert exchange.__module__ == Interrupt.__module__
    assert not trainer._signal_connector._original_handlers, "Lightning installed its handlers"


def test_unknown_action_on_a_spike_is_refused():
    with pytest.raises(InputError, match="warn or stop"):
        Health("skip")


# Checkpoints and export


def test_checkpoints_load_with_weights_only_and_hold_the_step(plain):
    run_dir, model = plain
    assert [entry.step for entry in read_entries(run_dir)] == [8, 12]
    checkpoint = torch.load(newest_good_checkpoint(run_dir), weights_only=True)
    assert checkpoint["global_step"] == 12
    assert checkpoint["tokens_seen"] == model.tokens_seen == 12 * 4 * 32


def test_exported_folder_has_equal_weights_in_transformers(plain):
    run_dir, model = plain
    exported = AutoModelForCausalLM.from_pretrained(run_dir / "hf")
    for name, tensor in model.export_model().state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    assert tokenizer.decode(tokenizer("def f(x):")["input_ids"]) == "def f(x):"
    assert exported.generation_config.eos_token_id == exported.generation_config.pad_token_id == tokenizer.eos_token_id
    assert "pipeline_tag: text-generation" in (run_dir / "hf" / "README.md").read_text()
    assert len({file.stat().st_mode for file in (run_dir / "hf").iterdir()}) == 1, "weights are no more secret than it"


@pytest.mark.slow
def test_export_check_compares_logits_in_a_fresh_process(plain, tmp_path):
    """The check finds a changed folder; the unchanged one passes in test_run_killed_after_its_last_save_…."""
    _, model = plain
    exported = to_hf(model.backbone)
    write_hf_folder(exported, model.tokenizer, tmp_path / "hf", {"title": "test"})
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        logits = exported(ids).logits
    with pytest.raises(RuntimeError, match="differ"):
        verify_in_fresh_process(tmp_path / "hf", ids, logits + 1e-3)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Limit the size of files, which takes the same path through the code as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_ends_the_run_and_keeps_the_older_checkpoint(cache, tmp_path):
    tiny_run.train(tmp_path, cache, steps=4)
    with pytest.raises(InputError, match="No space left to write the checkpoint of step 8"), files_of_at_most(300_000):
        tiny_run.train(tmp_path, cache, steps=8)
    assert newest_good_checkpoint(tmp_path).name == "step-000004.ckpt"
    assert not list(tmp_path.rglob("*.tmp"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert read_report(tmp_path)["status"] == "failed"


# Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_run_resumed_after_a_signal_equals_unbroken_run(plain, cache, tmp_path, number):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    tiny_run.train(tmp_path, cache, extra=[At(6, lambda: os.kill(os.getpid(), number))])
    report = read_report(tmp_path)
    assert report["status"] == "stopped"
    assert report["stopped_by"] == signal.Signals(number).name
    assert report["steps"] in (6, 7)  # the signal may arrive just after the step's end
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    _, model = tiny_run.train(tmp_path, cache)
    assert equal(model, plain[1])
    assert metrics_without_clock(tmp_path) == metrics_without_clock(plain[0])
    assert read_report(tmp_path)["status"] == "finished"


def test_a_second_ctrl_c_stops_at_once(cache, tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr("callbacks.interrupt.time", SimpleNamespace(monotonic=lambda: now))

    def press_twice() -> None:
        nonlocal now
        signal.raise_signal(signal.SIGINT)
        now += SAME_KEY_PRESS + 0.1
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second press has not stopped the run")

    with pytest.raises(StoppedNowError):
        tiny_run.train(tmp_path, cache, extra=[At(6, press_twice)])
    report = read_report(tmp_path)
    assert (report["status"], report["stopped_by"]) == ("stopped", "SIGINT")
    assert newest_good_checkpoint(tmp_path).name == "step-000004.ckpt"


def test_error_before_the_model_exists_is_reported(cache, tmp_path):
    class BreaksEarly(lightning.Callback):
        def setup(self, trainer, pl_module, stage):
            raise RuntimeError("no memory for the model")

    with pytest.raises(RuntimeError, match="no memory for the model"):
        tiny_run.train(tmp_path, cache, extra=[BreaksEarly()])
    report = read_report(tmp_path)
    assert (report["status"], report["parameters"]) == ("failed", None)
    assert "no memory for the model" in report["error"]


def test_an_error_in_training_is_reported(cache, tmp_path):
    def fail() -> None:
        raise RuntimeError("the loss is not finite at step 6")

    with pytest.raises(RuntimeError):
        tiny_run.train(tmp_path, cache, extra=[At(6, fail)])
    report = read_report(tmp_path)
    assert (report["status"], report["steps"]) == ("failed", 6)
    assert "not finite at step 6" in report["error"]


# Resume


def metrics_without_clock(run_dir: Path) -> list[dict[str, str]]:
    timed = {"tokens_per_second", "mfu", "memory_gb", "seconds"}
    return [{name: value for name, value in row.items() if name not in timed} for row in read_metrics(run_dir)]


@pytest.mark.parametrize("step", [5, 8])
def test_run_resumed_after_a_failure_equals_unbroken_run(plain, cache, tmp_path, step):
    """The run resumes from step 4, and from step 8, which was validated and saved: that validation is not repeated."""

    def fail() -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        tiny_run.train(tmp_path, cache, extra=[At(step + 1, fail)])
    _, model = tiny_run.train(tmp_path, cache)
    assert equal(model, plain[1])
    assert metrics_without_clock(tmp_path) == metrics_without_clock(plain[0])


@pytest.mark.slow
def test_run_killed_after_its_last_save_gets_report_and_export(plain, cache, tmp_path):
    tiny_run.train(tmp_path, cache)
    (tmp_path / "report.json").unlink()
    tiny_run.train(tmp_path, cache, verify_export=True)
    report = read_report(tmp_path)
    assert (report["status"], report["steps"]) == ("finished", 12)
    assert report["val_loss"] == read_report(plain[0])["val_loss"]
    assert report["tokens_seen"] == 12 * 4 * 32


# Loggers


def test_wandb_offline_has_metrics_and_samples_of_a_resumed_run(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    samples = Samples(every=4, prompts=["def f("], max_new_tokens=4)
    ids = []
    for steps in (4, 8):
        logger = WeightsAndBiases(str(tmp_path), log_model="final")
        logger.log_hyperparams({"seed": 1, "model": {"n_layer": 2}})
        tiny_run.train(tmp_path, cache, steps=steps, extra=[samples], loggers=[logger])
        ids.append(logger.run_id())
        assert logger.experiment.disabled  # closed: the next job in this process starts its own
    assert "W&B is off" not in caplog.text
    assert ids[0] == ids[1]
    assert_one_complete_run(tmp_path)


def test_wandb_has_the_final_score_in_the_summary(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tiny_run.train(tmp_path, cache, steps=4, extra=[FinalScore()], loggers=[WeightsAndBiases(str(tmp_path))])
    names = ("full_val_loss", "full_val_tokens")  # too few documents for an error
    assert summary_in(tmp_path).items() >= {name: read_report(tmp_path)[name] for name in names}.items()


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        *(({"WANDB_MODE": given}, "online") for given in ("online", "run", "Online", " RUN ")),
        *(({"WANDB_MODE": given}, "offline") for given in ("offline", "dryrun", "OFFLINE", "DryRun")),
        *(({"WANDB_MODE": given}, "disabled") for given in ("disabled", "DISABLED")),
        *(({"WANDB_DISABLED": given}, "disabled") for given in ("true", "TRUE", "1", "yes", "y", "t", "On")),
        *(({"WANDB_DISABLED": given}, "offline") for given in ("false", "0", "no", "off", "")),
        ({"WANDB_MODE": ""}, "offline"),
        ({"WANDB_MODE": "offline", "WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_MODE": "disabled", "WANDB_DISABLED": "false"}, "disabled"),
    ],
    ids=lambda value: " ".join(f"{key}={given}" for key, given in value.items()) if isinstance(value, dict) else value,
)
def test_wandb_mode_is_read_in_every_spelling(variables, mode, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, given in variables.items():
        monkeypatch.setenv(name, given)
    assert chosen_mode("offline") == mode


@pytest.mark.parametrize("variable", ["WANDB_MODE=Disabled", "WANDB_DISABLED=1", "WANDB_MODE=DryRun"])
def test_wandb_starts_no_run_that_was_not_requested(variable, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="callbacks")
    monkeypatch.setattr(logging.getLogger("callbacks"), "propagate", True)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv(*variable.split("="))
    logger = WeightsAndBiases(str(tmp_path))
    logger.log_hyperparams({"seed": 1})
    logger.finalize("success")
    is_offline = variable.endswith("DryRun")
    assert bool(list((tmp_path / "wandb").glob("offline-run-*"))) == is_offline
    assert (tmp_path / "wandb").exists() == is_offline
    assert f"W&B: {'offline in' if is_offline else 'disabled'}" in caplog.text
    assert "W&B is off" not in caplog.text


def test_wandb_failure_at_start_is_a_warning(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    tiny_run.train(tmp_path, cache, steps=4, loggers=[WeightsAndBiases(str(tmp_path))])
    assert "W&B is off for the rest of this run: WANDB_MODE=nonsense is none of online, run, offline" in caplog.text
    assert read_report(tmp_path)["status"] == "finished"


def test_tensorboard_is_written_in_addition_to_metrics_csv(cache, tmp_path):
    logger = TensorBoard(str(tmp_path))
    logger.log_hyperparams({"seed": 1, "task": "pretrain"})
    tiny_run.train(tmp_path, cache, steps=4, extra=[FinalScore()], loggers=[logger])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (score,) = events.Scalars("full_val_loss")
    assert (score.step, score.value) == (4, pytest.approx(read_report(tmp_path)["full_val_loss"]))
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    assert all(panel.question.encode() in file.read_bytes() for panel in PRETRAIN.panels if panel.x == "step")
    assert read_metrics(tmp_path)
