"""conf/ composes in every combination and builds real objects."""

import itertools
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from omegaconf import OmegaConf

from callbacks.loggers.metrics_csv import MetricsCsv
from gpt2lab.settings import DataFacts
from gpt2lab.storage.damaged_files import warn_once
from gpt2lab.storage.model_folder import parameter_count
from launch import logging_setup
from launch.checks import checks
from launch.config import run_dir, run_spec
from launch.config.run_spec import PreparedSpec, RunSpec
from launch.config.schema import ModelKeys, RunConfig
from launch.run import auto_settings, build, resolve, run_panels
from tests.conftest import ROOT, SHRUNK, Train
from tests.support.configurations import BPE, composed, prepared, resolved

CONF = ROOT / "conf"
GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()
}
OF_DISTILLATION = ("loss", "teacher_cache", "sequences")
# experiment → its choices of other groups
RECIPES = {
    name: dict(
        re.findall(r"^  - override /(\w+): (\w+)$", (CONF / f"experiment/{name}.yaml").read_text(), re.MULTILINE)
    )
    for name in GROUPS["experiment"]
}
UNSERVED = {("sampled", loss) for loss in GROUPS["loss"] if loss != "forward_kl"} | {("topk", "mse"), ("topk", "uld")}
EXACT_PARAMETERS = {
    "distil": 81_912_576,
    "small": 124_439_808,
    "medium": 354_823_168,
    "large": 774_030_080,
    "xl": 1_557_611_200,
}


TRIES = 400  # rows tried for each pair


def generates_text(row: dict[str, str]) -> bool:
    return row["callbacks"] != "minimal" or row["task"] == "finetune"


def given(row: dict[str, str]) -> list[str]:
    """Return the overrides of a row, without the choices of its recipe and the keys that its task does not read."""
    chosen = RECIPES[row.get("experiment", "none")]
    words = [
        f"{group}={value}"
        for group, value in row.items()
        if group not in chosen
        and (group not in OF_DISTILLATION or row["task"] == "distill")
        and (group != "sampling" or (generates_text(row) and row["objective"] != "mlm"))
    ]
    words += ["init=gpt2"] if row["model"] == "auto" else []
    return words + (["accelerator=cpu"] if row["launcher"] != "processes" else [])


def fits(row: dict[str, str]) -> bool:
    """Return whether a combination is valid; test_bad_input, _teacher_cache, _study and _launchers test the others."""
    is_study = row.get("experiment") == "distill_study"
    if row.get("experiment") == "distilgpt2_owt" and row["sequences"] == "distillm":  # 2000 sequences a step: too many
        return False
    if is_study and (row["model"] == "auto" or row["loss"] == "uld" or row["launcher"] != "processes"):
        return False
    if row["launcher"] != "processes" and row["precision"] == "fp16":  # needs a GPU
        return False
    is_running_text = "kind: text" in (CONF / "data" / f"{row['data']}.yaml").read_text()
    if row["task"] == "distill" and (row["teacher_cache"], row["loss"]) in UNSERVED:
        return False
    if row["task"] == "distill" and row["teacher_cache"] != "none" and row["sequences"] in ("gkd", "distillm"):
        return False
    if row["task"] == "distill" and row["loss"] == "uld" and row["sequences"] != "data":
        return False
    if row["objective"] in ("mlm", "fim") and not is_running_text:
        return False
    if row["callbacks"] == "benchmarks" and row["objective"] in ("mlm", "prefix_lm"):
        return False
    if row["task"] == "distill" and row["objective"] != "clm":
        drawn_anew = is_running_text and row["objective"] != "sampled_softmax" and row["teacher_cache"] != "none"
        on_other_text = row["sequences"] != "data" or row["loss"] == "uld"
        if row["objective"] == "sampled_softmax" or drawn_anew or on_other_text:
            return False
    return not (row["task"] == "finetune" and is_running_text)


Pair = tuple[tuple[str, str], ...]  # two groups with a value each


def pairs_of(row: dict[str, str]) -> set[Pair]:
    return set(itertools.combinations(sorted(row.items()), 2))


def covering_array(groups: dict[str, list[str]]) -> tuple[list[dict[str, str]], set[Pair]]:
    """Return rows that have every pair of values of two groups at least once, and the pairs without a row."""
    names, chance = sorted(groups), random.Random(0)
    wanted = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in groups[a] for y in groups[b]}
    rows, without_row = [], set()

    def gain(row: dict[str, str]) -> int:
        return len(pairs_of(row) & wanted)

    while wanted:
        pair = min(wanted)
        drawn = ({name: chance.choice(groups[name]) for name in names} | dict(pair) for _ in range(TRIES))
        if valid := [row for row in drawn if fits(row)]:
            row = max(valid, key=gain)
            for name in (name for name in names if name not in dict(pair)):
                changed = [row | {name: value} for value in groups[name]]
                row = max((one for one in changed if fits(one)), key=gain)
            rows.append(row)
            wanted -= pairs_of(row)
        else:
            without_row.add(pair)
            wanted.remove(pair)
    return rows, without_row


def kind_of(group: str, value: str) -> str:
    """Return the value that represents all with files that differ in sizes, paths or columns alone."""
    if group == "model":
        return value if value == "auto" else "nano"
    is_pairs = group == "data" and "kind: pairs" in (CONF / "data" / f"{value}.yaml").read_text()
    return "pairs" if is_pairs else "stdlib" if group == "data" else value


# Each representative value of a group → the values it represents, itself included
ALIKE = {
    group: {kind: [value for value in values if kind_of(group, value) == kind] for kind in values}
    for group, values in GROUPS.items()
}


def with_every_value(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows with each represented value in turn."""
    turns = {group: {kind: itertools.cycle(ALIKE[group][kind] or [kind]) for kind in GROUPS[group]} for group in GROUPS}
    return [{group: next(turns[group][value]) for group, value in row.items()} for row in rows]


KINDS = {group: [value for value in values if ALIKE[group][value]] for group, values in GROUPS.items()}
INVALID: set[Pair] = {
    (("data", "pairs"), ("objective", "fim")),
    (("callbacks", "benchmarks"), ("objective", "mlm")),
    (("callbacks", "benchmarks"), ("objective", "prefix_lm")),
    (("data", "pairs"), ("objective", "mlm")),
    (("data", "stdlib"), ("task", "finetune")),
    (("launcher", "ray"), ("precision", "fp16")),
    (("launcher", "slurm"), ("precision", "fp16")),
    (("objective", "fim"), ("task", "finetune")),
    (("objective", "mlm"), ("task", "finetune")),
    (("objective", "sampled_softmax"), ("task", "distill")),
}
COVERED, WITHOUT_ROW = covering_array({group: kinds for group, kinds in KINDS.items() if group != "experiment"})
PLAIN = with_every_value(COVERED)


def around_a_recipe(name: str) -> list[dict[str, str]]:
    """Return every valid kind of value of each group that the recipe does not set."""
    chance, rows, chosen = random.Random(0), [], RECIPES[name] | {"experiment": name}
    wanted = {(group, kind) for group in KINDS.keys() - chosen.keys() for kind in KINDS[group]}
    while wanted:
        item = min(wanted)
        drawn = ({group: chance.choice(KINDS[group]) for group in KINDS} | dict([item]) | chosen for _ in range(TRIES))
        valid = [row for row in drawn if fits(row)]
        if valid:
            rows.append(max(valid, key=lambda row: len(wanted & row.items())))
        wanted -= rows[-1].items() if valid else {item}
    return rows


AROUND_RECIPES = [around_a_recipe(name) for name in GROUPS["experiment"] if name != "none"]
ROWS = PLAIN + [row for rows in AROUND_RECIPES for row in rows]


def test_every_pair_of_values_is_in_some_row():
    """Every pair of kinds that is valid, and every value at least once."""
    assert WITHOUT_ROW == INVALID
    tried = {item for row in ROWS for item in row.items()}
    assert tried == {(group, value) for group in GROUPS for value in GROUPS[group]} - {("experiment", "none")}
    assert all(fits(row) for row in ROWS)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> DataFacts:
    config = composed(*SHRUNK, f"path={sources}", f"cache_dir={tmp_path_factory.mktemp('cache')}")
    return build.data_module(on_cpu(config)).prepare()


def on_cpu(config: RunConfig) -> PreparedSpec:
    model = ModelKeys(2, 2, 32, 64, 0.0) if config.model.n_layer is None else config.model
    return prepared(resolved(replace(config, accelerator="cpu"), model=model, tokenizer=BPE))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(PLAIN[::3] + [rows[0] for rows in AROUND_RECIPES], id="pairs"),
        pytest.param(PLAIN[1::3] + PLAIN[2::3], id="other_pairs", marks=pytest.mark.slow),
        pytest.param([row for rows in AROUND_RECIPES for row in rows[1:]], id="recipes", marks=pytest.mark.slow),
    ],
)
def test_every_combination_is_checked_and_builds_its_objects(
    rows: list[dict[str, str]], facts: DataFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All pairs of group values: composition, types, the checks before the imports, then the real constructors."""
    monkeypatch.setattr("launch.run.run_uses.read_shape", lambda teacher: {"n_positions": 1024})  # no teacher here
    for number, row in enumerate(rows):
        config = composed(*given(row), *(["path=."] if row["data"] in ("text", "bin") else []))
        checks.check(config)
        if row["precision"] == "fp16":
            continue
        strategy = replace(config.strategy, shard_teacher="false")
        spec = on_cpu(replace(config, cache_dir=str(tmp_path), logger={}, strategy=strategy))
        build.data_module(spec)
        module = build.task_module(spec, facts, is_resumed=False)
        folder = tmp_path / str(number)
        folder.mkdir()
        trainer = build.trainer(spec, folder, build.callbacks(spec, folder, facts), build.loggers(spec, folder))
        assert trainer.max_steps == module.settings.steps == config.steps
        assert module.settings.shape.vocab_size == facts.vocab_size


@pytest.mark.parametrize("name", GROUPS["logger"])
def test_every_logger_is_built_in_addition_to_metrics_csv(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    loggers = build.loggers(on_cpu(composed(f"logger={name}")), tmp_path)
    assert isinstance(loggers[1 if name == "wandb" else 0], MetricsCsv)
    assert len(loggers) == (2 if name in ("wandb", "tensorboard") else 1)


@pytest.mark.parametrize("name", [name for name in GROUPS["model"] if name != "auto"])
def test_parameter_counts_are_exact(name: str):
    from gpt2lab.model.backbone import Backbone
    from gpt2lab.settings import ModelShape

    model = composed(f"model={name}").model
    shape = ModelShape(**{**vars(model), "vocab_size": 50257})
    with torch.device("meta"):
        counted = Backbone(shape).lm.num_parameters()
    assert counted == parameter_count(vars(shape)), "the formula that needs no torch"
    assert counted == EXACT_PARAMETERS.get(name, counted)


def test_every_yaml_begins_with_its_description_and_command():
    for file in CONF.rglob("*.yaml"):
        head = [line for line in file.read_text().splitlines()[:8] if line.startswith("#")]
        assert any("python train.py" in line for line in head), file
        assert not head[-1].isspace()


@pytest.mark.parametrize(("data", "tokens"), [("openwebtext", 9.04e9), ("fineweb", 10e9), ("fineweb_edu", 10e9)])
def test_large_presets_hold_out_about_ten_million_tokens(data: str, tokens: float):
    assert composed(f"data={data}").val_fraction * tokens == pytest.approx(10e6, rel=0.05)
    assert composed(f"data={data}", "val_fraction=0.3").val_fraction == 0.3


def test_no_file_sets_the_mode_of_hydra():
    """`-m` alone chooses it, and hydra_cache.mode_of relies on that."""
    for file in CONF.rglob("*.yaml"):
        tree = OmegaConf.load(file)
        assert OmegaConf.select(tree, "hydra.mode") is None, file
        assert "@package hydra" not in file.read_text(), file


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--hydra-help", "Hydra"),
        ("--info plugins", "hydra_plugins.gpt2lab_processes"),
        ("--info", "Defaults List"),
        ("--cfg job -p optimizer", "momentum: 0.95"),
        ("-sc install=bash", "hydra_bash_completion"),
    ],
)
def test_flags_of_hydra_work(flags: str, words: str, train_process: Train):
    answer = train_process(*flags.split())
    assert words in answer.stdout, answer.stderr


def test_a_configuration_survives_its_file(tmp_path: Path):
    spec = on_cpu(composed("task=distill", "micro_batch=4", "name=001", "model=micro", "callbacks=minimal"))
    run_spec.save(spec, tmp_path / "config.yaml")
    assert run_spec.as_dict(run_spec.load(tmp_path / "config.yaml")) == run_spec.as_dict(spec)
    assert spec.config.micro_batch == spec.machine.micro_batch == 4
    assert run_spec.from_yaml(RunConfig, run_spec.to_yaml(spec.config), "here") == spec.config


def test_every_micro_batch_has_a_sequence():
    spec = resolved(composed("accelerator=cpu"))
    for rows, ranks, wanted in itertools.product((1, 2, 5, 16, 33, 128), (1, 2, 3), ("auto", 1, 3, 8)):
        if rows < ranks:
            continue
        config = replace(spec.config, batch_tokens=rows * spec.config.context, micro_batch=wanted)
        micro, accumulate = auto_settings.split_batch(config, replace(spec.machine, devices=ranks))
        parts = accumulate * ranks
        assert parts <= rows <= parts * micro


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp32")])
def test_automatic_precision_is_shown_with_its_reason(
    has_bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(auto_settings, "multiplies_bf16", lambda _device: has_bf16)
    logging_setup.configure_logging()
    spec = resolved(composed("precision=auto", "accelerator=cpu", "devices=1"))
    assert run_panels._precision(spec).startswith(f"{precision}: this CPU")
    resolved(composed("precision=fp32", "accelerator=cpu", "devices=1"))
    assert capsys.readouterr().err == ""
    resolved(composed("precision=bf16_true", "accelerator=cpu", "devices=1"))
    assert ("precision=fp32 is many times faster" in capsys.readouterr().err) == (not has_bf16)


@pytest.mark.parametrize("in_hardware", [True, False])
def test_automatic_precision_follows_the_gpu(in_hardware: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """PyTorch reports bf16 support by emulation on GPUs without bf16, unless emulation is excluded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or in_hardware
    )
    spec = prepared(resolved(composed("precision=auto", "accelerator=auto", "devices=auto")))
    assert (spec.machine.accelerator, spec.machine.precision.name) == ("gpu", "bf16" if in_hardware else "fp16")
    plugin = build.trainer(spec, tmp_path, [], []).precision_plugin
    assert isinstance(plugin, MixedPrecision)
    assert plugin.precision == ("bf16-mixed" if in_hardware else "16-mixed")
    assert (plugin.scaler is None) == in_hardware
    assert plugin.scaler is None or plugin.scaler.is_enabled()


def test_run_names_are_short_and_plain():
    folder = run_dir.run_folder(composed("model=micro"))
    assert folder.parent == Path("runs/pretrain")
    assert folder.name.startswith("micro-2")
    assert not set(str(folder)) & set("= ")
    assert run_dir.run_folder(composed("name=mine")) == Path("runs/pretrain/mine")


def test_tokenizer_is_that_of_the_config(tmp_path: Path):
    assert resolve.named_tokenizer(composed("tokenizer=bpe", "vocab_size=500")).vocab_size == 500
    hub = resolve.named_tokenizer(composed("tokenizer=hub", "tokenizer.source=./mine"))
    assert (hub.kind, hub.source) == ("pretrained", "./mine")


@pytest.mark.parametrize("given", ["true", "auto"])
def test_training_without_a_compiler_is_eager_with_a_warning(given: str, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setenv("CXX", "no-such-compiler")
    logging_setup.configure_logging()
    warn_once.cache_clear()
    spec = resolved(composed(f"compile={given}", "accelerator=cpu", "steps=1000"))
    assert auto_settings.compile_pays(spec, 4096) is False
    assert auto_settings.compiling_the_head_pays(spec) is False
    assert capfd.readouterr().err.count("runs eagerly") == 1


def test_compiling_pays_later_on_more_machines() -> None:
    spec = on_gpu(composed("model=small", "batch_tokens=131072", "steps=600"))
    several = replace(spec, resolved=replace(spec.resolved, machine=replace(spec.machine, num_nodes=4)))
    assert auto_settings._saves_time(spec, 50_257)
    assert not auto_settings._saves_time(several, 50_257)


def on_gpu(config: RunConfig) -> RunSpec:
    """Resolve a configuration for a machine with one GPU."""
    spec = resolved(replace(config, accelerator="cpu"))
    return replace(spec, resolved=replace(spec.resolved, machine=replace(spec.machine, accelerator="gpu")))


def test_compiling_is_chosen_where_it_pays_back():
    """Three hundred steps of nano on a GPU take less time than compiling, thousands of small do not; on a CPU it never
    pays for the blocks, and for the LM head from some fifty steps on. An explicit value is used."""
    nano = on_gpu(composed())
    small = on_gpu(composed("model=small", "batch_tokens=131072", "steps=5000"))
    assert auto_settings.compile_pays(nano, 4096) is False
    assert auto_settings.compile_pays(small, 50_257) is auto_settings.has_compiler()
    long = resolved(composed("accelerator=cpu", "model=mini", "steps=5000"))
    short = resolved(composed("accelerator=cpu", "steps=3"))
    assert auto_settings.compile_pays(long, 50_257) is False
    assert auto_settings.compiling_the_head_pays(long) is auto_settings.has_compiler()
    assert auto_settings.compiling_the_head_pays(short) is False
    for given, wanted in (("true", auto_settings.has_compiler()), ("false", False)):
        by_hand = resolved(composed("accelerator=cpu", "steps=3", f"compile={given}"))
        assert auto_settings.compile_pays(by_hand, 4096) is wanted
        assert auto_settings.compiling_the_head_pays(by_hand) is wanted


def test_runs_started_in_the_same_second_have_separate_folders(
    train_here: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("launch.config.run_dir.time", SimpleNamespace(strftime=lambda _: "2026-01-01_12-00-00"))
    for _ in range(2):
        answer = train_here(*tiny, "steps=1", "threads=1")
        assert answer.code == 0, answer.stderr
    names = {folder.name for folder in (tmp_path / "runs" / "pretrain").iterdir()}
    assert names == {"nano-2026-01-01_12-00-00", "nano-2026-01-01_12-00-00-2"}


def test_one_graph_is_compiled_if_it_serves_the_whole_run():
    """Blocks are compiled separately if ranks gather them, layers drop out, lengths vary, or there are many blocks."""
    parts = {
        "pass": (("model=small",), ("task=distill", "teacher=x"), ("devices=2", "strategy=ddp"), ("packing=true",)),
        "blocks": (
            ("model=medium",),
            ("devices=2", "strategy=fsdp"),
            ("layer_drop=0.1",),
            ("activation_checkpointing=true",),
            ("task=finetune", "model=nano", "data=summarize", "init=x"),
            ("task=distill", "teacher=x", "sequences=gkd"),
        ),
    }
    for part, cases in parts.items():
        for keys in cases:
            spec = resolved(
                composed(*keys, "accelerator=cpu"),
                model=composed(keys[0] if "model" in keys[0] else "model=nano").model,
            )
            assert build.compiled_part(prepared(spec, compiled=False)) == "nothing"
            assert build.compiled_part(prepared(spec, compiled=True)) == part, keys
    uneven = resolved(
        composed("model=small", "context=256", "batch_tokens=1792", "micro_batch=4")
    )  # 7 rows, in two parts
    assert build.compiled_part(prepared(uneven, compiled=True)) == "blocks"
