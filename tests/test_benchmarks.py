"""The benchmarks run, at sizes of seconds, and their tables put the right numbers into ratios."""

import contextlib
import importlib
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from benchmarks import (
    benchmark_decoding,
    benchmark_distill,
    benchmark_evaluation,
    benchmark_lm_head_loss,
    benchmark_on_policy,
    benchmark_precisions,
    benchmark_scaling,
    benchmark_sweep_overhead,
    benchmark_ten_students,
    gpu_check,
    gpu_proofs,
    gpu_runs,
)
from benchmarks.alternation import run_pairs
from benchmarks.benchmark_distill import CROSS_ENTROPY, DISTILLATION, TINY, Measured
from benchmarks.benchmark_tokens_to_loss import share_at
from benchmarks.gpu_bench import REHEARSAL, Bench, NotRun
from benchmarks.gpu_check import Check, verify
from benchmarks.gpu_proofs import kill_at_first_checkpoint
from benchmarks.gpu_runs import summarize_trace
from benchmarks.lm_head_sides import EAGER, OURS, Head
from gpt2lab.data.tokenizer import train_bpe
from gpt2lab.generation.speculative import Speculated
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.reports.hf_folder import write_hf_folder
from gpt2lab.settings import GREEDY, ModelShape
from gpt2lab.system.device import peak_memory_bytes, reset_peak_memory
from launch.config.machine import usable_cores
from tests.conftest import ROOT, environment

SMALL = {"width": 16, "rows": 64, "vocab_size": 300}
PROGRAMS = sorted(file.stem for file in (ROOT / "benchmarks").glob("[!t]*.py") if "__main__" in file.read_text())


def cells(table: str) -> list[list[str]]:
    """Rows of a Markdown table without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "--:" not in line][
        1:
    ]


def run_benchmark(cache: Path, name: str, *words: str) -> str:
    """Run `python -m benchmarks.NAME …` and return what it prints."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *words]
    ended = subprocess.run(command, cwd=ROOT, env=environment(cache), capture_output=True, text=True, check=True)
    return ended.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_of_a_benchmark_measures_nothing(name: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"benchmarks.{name}").main()
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_head_benchmark_implementations_compute_the_same(loss: str, precision: str) -> None:
    times = benchmark_lm_head_loss.times_here(Head(loss, precision, **SMALL), rounds=1, compiles=False)
    assert {OURS, EAGER} <= times.keys()
    assert ("F.linear_cross_entropy" in times) == (loss == "cross_entropy")
    assert min(times.values()) > 0


def test_head_benchmark_stops_at_an_implementation_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = benchmark_lm_head_loss.sides

    def with_a_liar(head, device, compiles):
        every = honest(head, device, compiles)
        return {**every, "a half": lambda inputs: every[EAGER](inputs) / 2}

    monkeypatch.setattr(benchmark_lm_head_loss, "sides", with_a_liar)
    with pytest.raises(RuntimeError, match="a half"):
        benchmark_lm_head_loss.times_here(Head("cross_entropy", "fp32", **SMALL), rounds=1, compiles=False)


@pytest.mark.slow
def test_head_benchmark_measures_memory_in_a_separate_process() -> None:
    """Dense cross-entropy at N = 2,048, V = 8,000 has several tensors of its logits' size, in fp32 66 MB, at once."""
    sizes = {"loss": "cross_entropy", "precision": "fp32", "width": 16, "rows": 2048, "vocab_size": 8000}
    logits = 2048 * 8000 * 4
    measured = benchmark_lm_head_loss.apart("memory", sizes, 1, False, False, EAGER)
    assert 2 * logits < measured < 5 * logits


def test_head_benchmark_reports_ratios_to_each_implementation() -> None:
    found = {
        OURS: benchmark_lm_head_loss.Measured(50.0, 20_000_000, 30_000_000),
        EAGER: benchmark_lm_head_loss.Measured(100.0, 100_000_000, 120_000_000),
    }
    rows = benchmark_lm_head_loss.markdown_rows(Head("forward_kl", "bf16", **SMALL), found)
    assert "| dense, eager | 100 | 0.50 | 100 | 0.20 | 120 | 0.25 |" in rows


def test_reset_peak_memory_is_not_counted() -> None:
    large = torch.ones(2**25)  # 128 MiB
    del large
    before = reset_peak_memory(torch.device("cpu"))
    assert peak_memory_bytes(torch.device("cpu")) - before < 2**24


def test_distillation_benchmark_reports_ratios_to_each_side() -> None:
    results = {
        (300, DISTILLATION): Measured(20.0, 1e9, 2e9),
        (300, CROSS_ENTROPY): Measured(16.0, 1e9, 1.5e9),
        (300, "GKDTrainer fp32"): Measured(100.0, 1e9, 5e9),
    }
    ours, alone, theirs = cells(benchmark_distill.markdown(results, targets=64))
    assert ours == ["300", DISTILLATION, "20", "1.25", "3,200", "1.00", "1.00", "1.00", "2.00"]
    assert alone == ["300", CROSS_ENTROPY, "16", "1.00", "4,000", "0.80", "0.50", "2.00", "1.50"]
    assert theirs == ["300", "GKDTrainer fp32", "100", "6.25", "640", "5.00", "4.00", "0.25", "5.00"]


@pytest.mark.slow
def test_a_distillation_step_is_measured_through_train_py(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2LAB_CACHE", str(cache))
    bench = benchmark_distill.Bench(tmp_path, TINY, 300, "forward_kl", trl_python=None)
    measured = bench.sides()[DISTILLATION]()
    assert measured.milliseconds > 0
    assert 1e8 < measured.before_model < measured.peak < 2e9


@pytest.mark.slow
def test_distillation_benchmark_runs_and_lists_what_it_skipped(cache: Path) -> None:
    """The benchmark also runs GKDTrainer if $TRL_PYTHON is set."""
    printed = run_benchmark(cache, "benchmark_distill", "--tiny", "--loss", "forward_kl")
    sides = [row[1] for row in cells(printed.split("\n\n")[0])]
    assert CROSS_ENTROPY in sides
    assert ("GKDTrainer bf16" in sides) == bool(os.environ.get("TRL_PYTHON"))
    assert ("no comparison" in printed) == (not os.environ.get("TRL_PYTHON"))


def test_on_policy_benchmark_reports_ratios_of_speeds() -> None:
    fast, slow = "DistillationTrainer bf16, dynamic cache", "GKDTrainer fp32, static cache"
    results = {
        (300, benchmark_on_policy.OURS): benchmark_on_policy.Measured(20.0, 64.0),
        (300, slow): benchmark_on_policy.Measured(100.0, 64.0),
        (300, fast): benchmark_on_policy.Measured(25.0, 32.0),
    }
    ours, theirs, _ = cells(benchmark_on_policy.markdown(results))
    assert ours == ["300", benchmark_on_policy.OURS, "20", "3,200", "1.00"]
    assert theirs == ["300", slow, "100", "640", "5.00"]
    (line,) = benchmark_on_policy.best_of_trl(results)
    assert "2.50" in line
    assert fast in line


@pytest.mark.slow
def test_on_policy_benchmark_runs_and_lists_what_it_skipped(cache: Path) -> None:
    """The benchmark also runs TRL's trainers if $TRL_PYTHON is set."""
    printed = run_benchmark(cache, "benchmark_on_policy", "--tiny", "--trl-caches", "dynamic")
    rows = cells(printed.split("\n\n")[0])
    sizes = benchmark_on_policy.TINY
    assert rows[0][1] == benchmark_on_policy.OURS
    assert 0 < float(rows[0][3].replace(",", "")) * float(rows[0][2]) / 1e3 < 1.2 * sizes.batch * sizes.context // 2
    assert ("GKDTrainer bf16, dynamic cache" in [row[1] for row in rows]) == bool(os.environ.get("TRL_PYTHON"))
    assert ("no comparison" in printed) == (not os.environ.get("TRL_PYTHON"))


@pytest.mark.slow
def test_the_benchmark_of_ten_students_runs(cache: Path) -> None:
    printed = run_benchmark(cache, "benchmark_ten_students", "--tiny")
    online, cached = cells(printed)
    assert online == [benchmark_ten_students.ONLINE, online[1], "1.00"]
    assert float(cached[1]) > 0


def test_scaling_benchmark_reports_efficiency_of_two_processes() -> None:
    found = {
        (1, "auto"): benchmark_scaling.Measured(1_000.0, 0.01),
        (2, "ddp"): benchmark_scaling.Measured(1_800.0, 0.02),
        (2, "fsdp"): benchmark_scaling.Measured(1_500.0, 0.005),
    }
    assert cells(benchmark_scaling.markdown(found)) == [
        ["1", "–", "1,000", "1.00", "100%", "1.00%"],
        ["2", "ddp", "1,800", "1.80", "90%", "2.00%"],
        ["2", "fsdp", "1,500", "1.50", "75%", "0.50%"],
    ]


@pytest.mark.slow
def test_the_scaling_benchmark_runs(cache: Path) -> None:
    printed = run_benchmark(cache, "benchmark_scaling", "--tiny")
    assert [row[:2] for row in cells(printed)] == [["1", "–"], ["2", "ddp"], ["2", "fsdp"]]
    assert all(0 < float(row[-1].rstrip("%")) < 100 for row in cells(printed)), "a batch takes time to load"


@pytest.mark.slow
def test_benchmark_of_two_ranks_measures_text_and_muon(cache: Path) -> None:
    printed = run_benchmark(cache, "benchmark_ranks", "--model=nano", "--prompts=3", "--tokens=4")
    (row,) = cells(printed)
    assert row[:3] == ["nano", "bf16", "fsdp"]
    assert all(float(value) >= 0 for value in row[3:])


@pytest.mark.slow
def test_the_loop_benchmark_runs(cache: Path) -> None:
    printed = run_benchmark(cache, "benchmark_loop", "--rounds=1", "--every=1")
    rows = cells(printed)
    assert [row[0] for row in rows[::2]] == [
        "a step of mini",
        "until the first step of nano",
        "10 steps of nano",
        "2 steps of mini",
    ]
    assert all(row[3].startswith("1.000 ") for row in rows[::2])
    assert all(float(row[2]) > 0 for row in rows)


def test_two_programs_at_once_run_on_different_cores() -> None:
    if not sys.platform.startswith("linux") or len(usable_cores()) < 2:
        pytest.skip("needs Linux and two cores")
    command = [sys.executable, "-c", "import os; print(min(os.sched_getaffinity(0)))"]

    def core() -> float:
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    first, second = run_pairs({"one": core, "other": core}, 2).values()
    assert first == second[::-1]
    assert len({*first}) == 2
    assert len(usable_cores()) > 1, "the cores of the caller are restored"


@pytest.mark.slow
def test_the_sweep_overhead_benchmark_runs(cache: Path) -> None:
    printed = run_benchmark(cache, "benchmark_sweep_overhead", "--tiny", "--rounds=1", "--jobs=2")
    separate, sweep = cells(printed)
    assert separate == [benchmark_sweep_overhead.SEPARATE, separate[1], "1.00"]
    assert float(sweep[2]) == pytest.approx(float(sweep[1]) / float(separate[1]), abs=0.01)


@pytest.mark.parametrize(
    ("loss", "expected"), [(4.5, 0.25), (4.0, 0.25), (3.0, 0.5), (3.5, 0.25 * 2**0.5), (2.5, 2**-0.5), (1.9, math.inf)]
)
def test_share_of_tokens_is_interpolated_between_losses(loss: float, expected: float) -> None:
    assert share_at(loss, {0.25: 4.0, 1.0: 2.0, 0.5: 3.0}) == pytest.approx(expected)


@pytest.mark.slow
def test_tokens_to_loss_trains_both_recipes(cache: Path) -> None:
    words = ["--tiny", "--tokens=10240", "--batch=512", "--seeds", "1", "2", "--shares", "0.5", "1.0"]
    words += ["--baseline", "batch_tokens=1024"]
    printed = run_benchmark(cache, "benchmark_tokens_to_loss", *words)
    table = printed[printed.index("| seed") :]
    first, second = cells(table.split("\n\n")[0])
    assert (first[0], second[0]) == ("1", "2")
    assert float(first[1]) > 0
    assert "At the largest share" in table


@pytest.mark.slow
def test_the_gpu_check_is_rehearsed_on_a_cpu(tmp_path: Path, cache: Path) -> None:
    """Every check that needs no GPU runs, with nanoGPT and TRL too where $NANOGPT and $TRL_PYTHON name them."""
    peers = {"--nanogpt": os.environ.get("NANOGPT"), "--trl-python": os.environ.get("TRL_PYTHON")}
    words = [word for option, value in peers.items() if value for word in (option, value)]
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--rehearse", "--minutes=30", *words]
    ended = subprocess.run(command, cwd=ROOT, env=environment(cache), capture_output=True, text=True, check=False)
    rows = {row[0]: row[1:3] for row in cells(ended.stdout.split("\n\n")[-1])}
    assert "FAILED" not in ended.stdout
    assert {name for name, row in rows.items() if row[0] == "passed"} >= {
        "profile of small",
        "LM-head loss, 16,384 positions, V = 50,257",
        "deterministic, compiled",
        "experiment at GPT-2 size",
        "playground",
        "resume after kill -9",
        "deterministic, packed documents",
        "deterministic distillation",
    }
    assert "by 0.0e+00" in rows["resume after kill -9"][1]
    assert "forward kl" in rows["LM-head loss, 16,384 positions, V = 50,257"][1]
    assert (rows["small beside nanoGPT"][0] == "not run") == (not os.environ.get("NANOGPT"))
    assert ended.returncode == 0


def test_gpu_check_writes_rows_at_once_and_stops_in_time(tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    seen = []

    def check(seconds: int, result: str) -> Check:
        def run(_: Bench) -> str:
            seen.append(file.read_text() if file.exists() else "")
            if result == "violated":
                raise RuntimeError(result)
            return result

        return Check(f"takes {seconds} s", run, seconds)

    sizes = replace(REHEARSAL, accelerator="gpu")
    some = [check(1, "fine"), check(2, "violated"), check(10**12, "never"), check(3, "also")]
    verdicts = verify(iter(some), Bench(tmp_path, sizes, deadline=1e9), file)
    assert verdicts == ["passed", "FAILED", "not run", "passed"]
    assert [len(text.splitlines()) for text in seen] == [0, 1, 3]


def test_gpu_check_keeps_what_an_ended_check_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "TIMEOUT_FACTOR", 0.1)
    monkeypatch.setattr(gpu_check, "GRACE", 0.0)

    def overruns(bench: Bench) -> str:
        bench.note("a first round")
        while bench.seconds_left:
            pass
        return "never"

    def raises(_: Bench) -> str:
        raise ImportError("no such package")

    def lacks(_: Bench) -> str:
        raise NotRun("an option is not given")

    file = tmp_path / "RESULTS.md"
    some = [Check("overruns", overruns, 10), Check("raises", raises, 600), Check("lacks", lacks, 600)]
    some += [Check("last", lambda _: "fine", 600)]
    bench = Bench(tmp_path, replace(REHEARSAL, accelerator="gpu"), deadline=1e9)
    assert verify(iter(some), bench, file) == ["FAILED", "FAILED", "not run", "passed"]
    rows = [line.split(" | ") for line in file.read_text().splitlines()]
    assert [row[:2] for row in rows] == [
        ["| overruns", "so far"],
        ["| overruns", "FAILED"],
        ["| raises", "FAILED"],
        ["| lacks", "not run"],
        ["| last", "passed"],
    ]
    assert "not finished" in rows[1][2]
    assert "ImportError: no such package" in rows[2][2]


def test_gpu_check_ends_a_check_whose_library_hides_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "TIMEOUT_FACTOR", 0.1)
    monkeypatch.setattr(gpu_check, "GRACE", 0.0)

    def hides(bench: Bench) -> str:
        while bench.seconds_left:
            with contextlib.suppress(Exception):
                time.sleep(0.01)
        return "never"

    bench = Bench(tmp_path, replace(REHEARSAL, accelerator="gpu"), deadline=1e9)
    assert verify(iter([Check("hides", hides, 1)]), bench, None) == ["FAILED"]


def test_gpu_check_needs_a_run_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended before the kill proves nothing about resume."""
    (tmp_path / "run/checkpoints/last").mkdir(parents=True)
    (tmp_path / "train.py").touch()
    monkeypatch.setattr(gpu_proofs, "ROOT", tmp_path)
    honest = gpu_proofs.subprocess.Popen

    def ended(*arguments: Any, **options: Any) -> Any:
        process = honest(*arguments, **options)
        process.wait()
        return process

    monkeypatch.setattr(gpu_proofs.subprocess, "Popen", ended)
    with pytest.raises(RuntimeError, match="ended before it was killed"):
        kill_at_first_checkpoint(Bench(tmp_path, REHEARSAL, deadline=1e9), [], tmp_path / "run")


def test_a_side_of_trl_that_fails_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"targets": 128, "milliseconds": 10.0, "peak": 2**30, "trl": "1.16.0"}

    def trl_step(_python: str, options: dict[str, Any], timeout: float) -> dict[str, Any]:
        if options["loop"] == "compiled":
            raise RuntimeError("no compiler")
        return found

    notes: list[str] = []
    bench = Bench(tmp_path, REHEARSAL, deadline=1e9, note=notes.append)
    report = {"tokens_per_second": 25_600, "peak_memory_bytes": 2**29}
    monkeypatch.setattr(gpu_runs, "trl_step", trl_step)
    monkeypatch.setattr(Bench, "train", lambda *_unused: report)
    monkeypatch.setattr(Bench, "random_teacher", lambda _: tmp_path)
    with pytest.raises(RuntimeError, match=r"GKDTrainer: 12,800 .* 2.00 × the speed.*failed: no compiler"):
        gpu_runs.compare_with_trl(bench, "python")
    assert "GKDTrainer" in notes[-1]


def test_kernels_of_a_trace_are_summed_by_kind() -> None:
    triton = "triton_poi_fused__scaled_dot_product_flash_attention_view_3"
    found = [("flash_fwd_kernel", 2000), ("nvjet_tst_128", 3000), (triton, 500), ("nvjet_tst_128", 3000)]
    events = [{"cat": "kernel", "name": name, "dur": duration} for name, duration in found]
    text = summarize_trace([*events, {"cat": "cpu_op", "name": "aten::mm", "dur": 9e9}, {"name": "no kind"}], steps=2)
    assert text.startswith(
        "4.2 ms of kernels in a step: matrix products 3.0, attention 1.0, fused elementwise and reductions 0.2"
    )
    assert "nvjet_tst_128 3.00" in text


@pytest.mark.slow
def test_precision_benchmark_compares_each_precision_with_fp32(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setenv("GPT2LAB_CACHE", str(cache))
    monkeypatch.setattr(benchmark_precisions, "SEEDS", (1, 2))
    keys = [key for key in tiny if not key.startswith("precision")]
    found = benchmark_precisions.measure_losses(tmp_path, "cpu", [*keys, "steps=4"], ["bf16_true"], at_once=2)
    table = benchmark_precisions.markdown(found).splitlines()
    assert [row.split(" | ")[0] for row in table[2:]] == ["| fp32", "| bf16_true"]
    difference = benchmark_precisions.compare_with_exact(found)["bf16_true"]
    assert set(difference.differences) == {1, 2}
    assert all(difference.differences.values()), "not the same run twice"
    assert benchmark_precisions.is_within(difference)
    assert table[-1].endswith("| yes |")
    far = benchmark_precisions.compare_with_exact(
        {**found, "bf16_true": {s: loss + 0.03 for s, loss in found["fp32"].items()}}
    )
    assert not benchmark_precisions.is_within(far["bf16_true"])


def test_decoding_benchmark_implementations_write_the_same() -> None:
    rows = benchmark_decoding.decoding_rows(ModelShape(1, 2, 16, 64, 100), 8, 1, torch.float32)
    assert [row.split(" | ")[-1] for row in rows] == ["1/1 |", "1/1 |", "16/16 |", "16/16 |"]


@pytest.mark.slow
def test_evaluation_benchmark_runs_in_both_precisions(cache: Path) -> None:
    printed = run_benchmark(cache, "benchmark_evaluation", "--tiny", "--rounds=1", "--tokens=512")
    rows = cells(printed.split("\n\n")[1])
    assert [row[:4] for row in rows] == [["tiny", "300", precision, "256"] for precision in ("fp32", "bf16")]
    assert all(float(row[7].split()[0]) > 0 for row in rows)


def test_evaluation_benchmark_stops_at_a_loss_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_evaluation, "our_loss", lambda *_: 1.0)
    with pytest.raises(RuntimeError, match=r"ours 1\.0"):
        benchmark_evaluation.evaluation_row(ModelShape(1, 2, 16, 64, 100), "fp32", context=16, tokens=64, rounds=1)


@pytest.mark.slow
def test_assisted_generation_is_timed_like_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assistants, generate = [], GPT2LMHeadModel.generate

    def recorded(model: GPT2LMHeadModel, *arguments: Any, **settings: Any) -> Any:
        if model.config.n_layer == 2:
            assistants.append(settings["assistant_model"] and settings["assistant_model"].config.n_layer)
        return generate(model, *arguments, **settings)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", recorded)
    tokenizer, sources = train_bpe(iter([Path(__file__).read_text()]), 300), []
    for name, layers in (("target", 2), ("draft", 1)):
        torch.manual_seed(layers)
        backbone = Backbone(ModelShape(layers, 2, 16, 128, len(tokenizer)))
        for parameter in backbone.parameters():
            parameter.data *= 6  # so that no two tokens tie
        write_hf_folder(to_hf(backbone), tokenizer, tmp_path / name, {"title": name})
        sources.append(str(tmp_path / name))
    row = benchmark_decoding.assisted_row(*sources, 12, 1, torch.float32)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[5] == "6/6"
    assert [assistants.count(layers) for layers in (None, 1)] == [12, 24], "six prompts each, after a round to warm up"
    assert all(float(cell.split()[0]) > 0 for cell in cells[:5])


def test_decoding_benchmark_compares_measured_and_predicted() -> None:
    """12 + 8 tokens in 4 + 6 calls with 8 + 12 drafts; a call costs 1.2 steps and 2 drafts of 0.1."""
    costs = {"cost_ratio": 0.1, "look_ratio": 1.2}
    two = [
        Speculated([1], [1], 12, 10, 4, 8, 6, seconds=1.0, plain_seconds=1.5, **costs),
        Speculated([1], [2], 8, 10, 6, 12, 2, seconds=1.0, plain_seconds=1.5, **costs),
    ]
    both = benchmark_decoding.pool(two)
    assert both.tokens_per_call == 2
    assert both.speedup == pytest.approx(1.5)
    assert both.predicted_speedup == pytest.approx(2 / 1.4)
    cells = [cell.strip() for cell in benchmark_decoding.speculation_row(GREEDY, [two]).split("|")]
    assert cells[4] == "10.0 (10.0–10.0)"
    assert cells[8] == "1.05 (1.05–1.05)"
    assert cells[10] == "1/2"
