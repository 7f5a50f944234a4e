"""Every user error ends with exit code 2 and at most five lines that name the error and the fix."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Train, environment
from tests.launch.config.test_startup_imports import HEAVY

# arguments → words of the message
WITHOUT_TAIL = "task=distill teacher_cache=topk teacher_cache.tail=false"
BEFORE_ANY_IMPORT = [
    ("modle=small", "no key modle (did you mean model?)"),
    ("+modle=small", "no key modle (did you mean model?)"),
    ("stpes=3", "(did you mean steps?)"),
    ("lr=3", "(did you mean optimizer.lr?)"),
    ("n_head=3", "(did you mean model.n_head?)"),
    ("optimizer.lrr=3", "(did you mean optimizer.lr?)"),
    ("+optimizer.lrr=3", "(did you mean optimizer.lr?)"),
    ("data.sorce=x", "(did you mean data.source?)"),
    ("+data.datset=x", "(did you mean data.dataset?)"),
    ("--info nonsense", "give one of all, config"),
    ("trainer.devices=2", "Use the key devices instead"),
    ("+trainer.max_steps=2", "Use the key steps instead"),
    ("trainer.profile=simple", "did you mean trainer.profiler"),
    ("trainer.profiler=fancy", "Allowed: simple"),
    ("trainer.profiler=true", "trainer.profiler=true is not of type str | None.\nAllowed: simple, advanced, pytorch."),
    ("trainer.deterministic=ture", "Allowed: true, false, warn"),
    ("trainer.deterministic=1", "Allowed: true, false, warn"),
    ("trainer.deterministic=true trainer.benchmark=true", "Give one of the two"),
    ("trainer.fast_dev_run=yes", "not of type bool | int"),
    ("trainer.limit_val_batches=all", "not of type int | float | None"),
    ("trainer.overfit_batches=true", "not of type int | float"),
    ("callbacks.checkpoint=null export=best", "this run does not read export: it has no callback checkpoint"),
    ("trainer.max_time=1h", "Give DD:HH:MM:SS"),
    ("trainer.max_time=5", "Give DD:HH:MM:SS"),
    ("resume=run trainer.max_time=08:00:00", "Give DD:HH:MM:SS"),  # before the run stores it
    ("validate_tokens=1e6", "validate_tokens=1000000.0 is neither full nor a whole number"),
    ("micro_batch=1.5", "micro_batch=1.5 is neither auto nor a whole number"),
    ("compile=1.5", "Allowed: auto, true, false"),
    ("invocation.trial=3", "no key invocation.trial"),
    ("model=smal", "(did you mean small?)"),
    ("task=distil", "(did you mean distill?)"),
    ("optimizer=null", "adamw"),
    ("precision=fp4", "bf16"),
    ("accelerator=cup", "(did you mean cpu?)"),
    ("optimizer.name=adamv", "adam"),
    ("compile=perhaps", "auto, true, false"),
    ("steps=abc", "steps=abc is not a whole number"),
    ("steps=1.5", "steps"),
    ("steps=null", "steps cannot be null"),
    ("optimizer.lr=fast", "not a number"),
    ("activation_checkpointing=maybe", "true or false"),
    ("callbacks.samples.prompts=3", "list[str]"),
    ("micro_batch=some", "auto"),
    ("devices=0", "at least 1"),
    ("steps=0", "at least 1"),
    ("optimizer.lr=0", "greater than 0"),
    ("optimizer.lr=nan", "out of range"),
    ("val_fraction=1", "below 1"),
    ("seed=-1", "at least 0"),
    ("steps", "steps is not key=value"),
    ("steps=(3", "Cannot read"),
    ("callbacks.inspect.texts=[f(]", "callbacks.inspect.texts=['…','…']"),
    ("model=nano,micro", "-m"),
    ("--stpes", "no flag"),
    ("name=${m,[", "to keep ${ as text"),
    ("resume='x${m,['", "to keep ${ as text"),
    ("path=${oc.env:NO_SUCH}", "'NO_SUCH' not found"),
    ("path=${nokey}", "'nokey' not found"),
    ("path=${no:key}", "to keep ${ as text"),
    ("run_dir=???", "??? stands for"),
    ("loss.temperature=2", "task=pretrain does not read loss.temperature"),
    ("teacher=x", "task=pretrain does not read teacher"),
    ("batch_sequences=8", "data=stdlib does not read batch_sequences"),
    ("path=/tmp", "data=stdlib does not read path"),
    ("task=finetune batch_tokens=512", "data=summarize does not read batch_tokens"),
    ("task=finetune data=stdlib", "pairs"),
    ("data=text path=no/such/file.txt", "no such file"),
    ("data=text path=a.txt,b.txt", "give their folder or a glob"),
    ("data=text path=. val_path=[a.txt,b.txt]", "give their folder or a glob"),
    ("data=text path=. val_path=nowhere", "val_path=nowhere"),
    ("context=2048", "context=2048 is longer than model nano's 1024 positions"),
    ("batch_tokens=1000", "batch_tokens=768 or batch_tokens=1024"),
    ("batch_tokens=128", "batch_tokens=256"),
    ("devices=64", "devices=64"),
    ("model.n_head=3", "does not divide model.n_embd=128"),
    ("model=auto", "init=scratch"),
    ("init=teacher_layers", "task=pretrain has none"),
    ("sequences=gkd", "task=pretrain does not read sequences"),
    ("task=distill sequences.lmbda=0.3", "sequences=gkd reads it"),
    ("task=distill sequences=gkd sequences.capacity=9", "sequences=distillm reads it"),
    ("task=distill sequences=gkd sequences.lmbda=2", "at most 1"),
    ("task=distill sequences=gkd sequences.max_new_tokens=256", "no tokens for a prompt in context=256"),
    ("task=distill sequences=gkd teacher_cache=sampled", "sequences=seqkd, whose text is generated once"),
    ("task=distill sequences=seqkd loss=uld", "Use sequences=data"),
    ("task=distill sequences=gkd loss=uld", "Use sequences=data"),
    ("task=distill sequences=distillm sequences.capacity=8", "at least sequences.capacity=16"),
    ("task=finetune init=teacher_layers", "task=finetune has none"),
    ("task=distill init=teacher_layers model=auto", "init=teacher_layers has none"),
    ("precision=fp16 accelerator=cpu", "precision=bf16"),
    ("name=a=b", "without ="),
    ("name='a b'", "without spaces"),
    ("name=x run_dir=y", "one of them"),
    ("run_dir=/proc/run", "cannot be written"),
    ("resume=nothing", "there is no run in nothing"),
    ("resume=nothing name=x", "leave out run_dir and name"),
    ("model=[nano]", "a group has one value"),
    ("+model=micro", "leave out the +"),
    ("~steps", "cannot be removed"),
    ("=3", "has no key"),
    ("strategy=ddp strategy.offload=true", "only strategy=auto and strategy=fsdp read it"),
    ("strategy=fsdp strategy.bucket_cap_mb=50", "only strategy=auto and strategy=ddp read it"),
    ("strategy.bucket_cap_mb=0", "at least 1"),
    ("strategy.find_unused_parameters=perhaps", "auto, true, false"),
    ("callbacks=parts/samples", "Allowed: benchmarks, default, inspect, layer_stats, minimal"),
    ("callbacks.my._target_=lightning.pytorch.callbacks.StochasticWeightAveraging", "Use ema=0.999"),
    ("callbacks.my._target_=lightning.pytorch.callbacks.EarlyStopping callbacks.my.monitor=val_loss", "val/loss?"),
    ("hydra/launcher=basic", "launcher=processes"),
    ("hydra.run.dir=x", "run_dir=FOLDER"),
    ("-m hydra.sweep.dir=/proc/x", "cannot be written"),
    ("--cfg", "needs a value"),
    ("--cfg jobb", "job, hydra, all"),
    ("--resolve", "--resolve needs --cfg"),
    ("callbacks.samples=3", "is no callback"),
    ("callbacks.samples.prompts=[3]", "list[str]"),
    ("callbacks.samples.max_new_tokens=1024", "leaves no tokens"),
    ("callbacks.checkpoint.keep_last=0", "at least 1"),
    ("callbacks.final_score.tokens=null", "tokens=null is not of type int | str.\nAllowed: auto, or at least 1."),
    ("vocab_size=100000000000", "at most 1000000"),
    ("steps=99999999999", "at most"),
    ("threads=1000000", "at most"),
    ("workers=100000", "at most 64"),
    ("optimizer.lr=inf", "finite"),
    ("on_spike=stopp", "(did you mean stop?)"),
    ("task=finetune task.lora=4", "task.lora.rank"),
    ("task=finetune task.lora.rnk=4", "(did you mean task.lora.rank?)"),
    ("task=finetune task.lora.rank=-1", "at least 0"),
    ("task=finetune task.lora.rank=four", "task.lora.rank=four"),
    ("task=finetune task.lora.rank=4 task.lora.dropout=2", "below 1"),
    ("task=finetune task.lora.alpha=8", "LoRA reads it"),
    ("task=finetune init=gpt2 model=nano task.frozen_layers=2", "leaves no block to train: the model has 2"),
    ("task=finetune init=scratch model=nano task.frozen_layers=1", "freezes random weights"),
    ("task=finetune init=scratch model=nano task.lora.rank=8", "Give init=RUN, or leave task.lora.rank out"),
    ("task=finetune task.frozen_layers=1 task.lora.rank=4", "without LoRA reads it"),
    ("task=finetune task.text.metrics=[foo]", "rougeL"),
    ("task=finetune data.reader=foo", "tables"),
    ("task=finetune task.text.max_new_tokens=0", "at least 1"),
    ("logger.mode=foo", "offline"),
    ("data=text", "needs path"),
    ("val_path=.", "data=stdlib does not read val_path"),
    ("on_bad_line=skip", "data=stdlib does not read on_bad_line"),
    ("tokenizer=hub vocab_size=500", "tokenizer=hub does not read vocab_size"),
    ("tokenizer.source=gpt2", "tokenizer=auto does not read tokenizer.source"),
    ("optimizer=adamw optimizer.momentum=0.9", "optimizer=muon reads it"),
    ("schedule=cosine schedule.decay_fraction=0.3", "schedule=wsd reads it"),
    ("steps=10 schedule.warmup_steps=10", "schedule.warmup_steps=9, more steps"),
    ("steps=10 schedule=constant schedule.warmup_steps=20", "schedule.warmup_steps=20 is not less than steps=10"),
    ("steps=10 schedule=cosine schedule.warmup_steps=11", "schedule.warmup_steps=11 is not less than steps=10"),
    ("steps=10 schedule=linear schedule.warmup_steps=10", "no step follows the warm-up"),
    ("steps=100 experiment=gpt2_124m_fineweb", "schedule.warmup_steps=700 is not less than steps=100"),
    ("schedule.warmup_steps=0.1", "schedule.warmup_steps=0.1 is not a whole number"),
    ("steps=100 schedule.warmup_steps=50 schedule.decay_fraction=0.8", "take 130 steps together"),
    ("schedule.decay_fraction=0", "leaves no step to decay to schedule.final_fraction=0.05"),
    (f"{WITHOUT_TAIL} loss=reverse_kl", "teacher_cache.tail=false with loss=reverse_kl"),
    (f"{WITHOUT_TAIL} loss=jsd loss.beta=1", "reverse KL is infinite"),
    (f"{WITHOUT_TAIL} loss=skew_reverse_kl loss.alpha=0", "jsd with loss.beta below 1"),
    ("callbacks=minimal sample_every=5", "callbacks=minimal does not read sample_every"),
    ("top_p=0.9", "did you mean sampling.top_p?"),
    ("sampling=nuclus", "did you mean nucleus?"),
    ("sampling.top_p=0.9", "only sampling=top_k and sampling=nucleus read it"),
    ("sampling=beam sampling.temperature=0.7", "sampling=beam does not read sampling.temperature"),
    ("sampling=greedy sampling.beams=4", "only sampling=beam reads it"),
    ("sampling=nucleus sampling.top_p=0", "greater than 0 and at most 1"),
    ("sampling=nucleus sampling.top_p=1.1", "greater than 0 and at most 1"),
    ("sampling=nucleus callbacks=minimal", "callbacks=minimal does not read sampling"),
    ("sampling=nucleus objective=mlm", "objective=mlm fills masks"),
    ("task=finetune callbacks=minimal task.text.examples=0 sampling=beam", "the scores of task=finetune read it"),
    ("resume=auto", "name="),
]


def refused(answer, words: str) -> None:
    assert answer.code == 2, answer.stderr
    assert words in answer.stderr
    assert 1 <= len(answer.stderr.strip().splitlines()) <= 5, answer.stderr
    assert "Traceback" not in answer.stderr
    assert not list(Path.cwd().glob("runs*")), "a run directory was left behind"


# Commands in one process, each in an empty folder; prints exit code and first imports of each.
# They share the process because it takes longer to start than to refuse them.
ONE_AFTER_ANOTHER = """
import json, os, sys
import pytest
import train
from launch import exit_codes
from tests.support import hydra_cache

hydra_cache.install(pytest.MonkeyPatch())

rows, heavy = json.load(sys.stdin)
for number, row in enumerate(rows):
    os.mkdir(str(number))
    os.chdir(str(number))
    os.dup2(os.open("stderr", os.O_CREAT | os.O_WRONLY), 2)
    sys.argv = [train.__file__, *row]
    code = exit_codes.exit_code(train.command_line)
    sys.stderr.flush()
    imported = [name for name in heavy if name in sys.modules]
    heavy = [name for name in heavy if name not in imported]
    print("row", json.dumps([code, imported, os.listdir()]))
    os.chdir("..")
"""


def test_invalid_key_is_refused_before_heavy_imports(cache: Path, tmp_path: Path):
    given = [re.findall(r"(?:[^ ']|'[^']*')+", arguments) for arguments, _ in BEFORE_ANY_IMPORT]
    ended = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER],
        input=json.dumps([given, sorted(HEAVY)]),
        cwd=tmp_path,
        env={**environment(cache), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line[4:]) for line in ended.stdout.splitlines() if line.startswith("row ")]
    failed = {}
    for number, ((arguments, words), (code, imported, left)) in enumerate(zip(BEFORE_ANY_IMPORT, found, strict=True)):
        message = (tmp_path / str(number) / "stderr").read_text()
        is_short = 1 <= len(message.strip().splitlines()) <= 5 and "Traceback" not in message
        if code != 2 or words not in message or not is_short or imported or left != ["stderr"]:
            failed[arguments] = (code, message, imported, left)
    assert not failed


def test_free_text_is_taken_as_it_is(train_here: Train, tmp_path: Path):
    """Hydra's grammar would reject these or parse them as numbers and lists."""
    refused(train_here("data=text", "path=notes, old (2)/*.md"), "path=notes, old (2)/*.md: there is no such file")
    refused(train_here("data=text", "path=it's {odd}: [x]"), "path=it's {odd}: [x]: there is no such file")
    refused(train_here("task=distill", "teacher=~/a=b, c"), "teacher=~/a=b, c")
    (tmp_path / "1e3").mkdir()
    (tmp_path / "1e3" / "file").touch()
    refused(train_here("run_dir=1e3"), "1e3 is not empty")


def test_data_that_cannot_be_trained_on_are_refused(train_here: Train, tmp_path: Path, tiny: list[str]):
    (tmp_path / "empty").mkdir()
    refused(train_here(*tiny, "path=empty"), "/empty")
    (tmp_path / "short.txt").write_text("A few words.")
    refused(train_here(*tiny, "path=short.txt"), "context")
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    refused(train_here(*tiny, "path=broken.jsonl"), "2")
    (tmp_path / "pairs.jsonl").write_text('{"source": "one", "target": "two"}\n')
    pairs = [item for item in tiny if not item.startswith(("data=", "batch_tokens=", "model.", "path="))]
    refused(
        train_here(
            *pairs, "task=finetune", "init=scratch", "model=nano", "data=pairs", "path=pairs.jsonl", "source=from"
        ),
        "from",
    )


def test_accelerator_gpu_without_a_gpu_is_refused(train_here: Train, tiny: list[str]):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused(train_here(*tiny, "accelerator=gpu", "strategy=fsdp"), "accelerator=gpu")
    refused(train_here(*tiny, "precision=fp16"), "precision=fp16 needs a GPU")


def test_a_run_that_would_not_fit_on_the_disk_is_refused(train_here: Train, tiny: list[str]):
    width = ["model.n_layer=1000", "model.n_embd=65536", "model.n_head=512"]
    refused(train_here(*tiny, *width), "No space left for this run")


def model_folder(folder: Path, **changes: object) -> Path:
    """A tiny real GPT-2 in a Hugging Face folder, then changed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_model_folder_that_cannot_be_used_is_refused(train_here: Train, tmp_path: Path, tiny: list[str]):
    distill = [*tiny, "task=distill"]
    refused(train_here(*distill, "teacher=./missing"), "no such folder")
    refused(train_here(*distill, "teacher=no-such-user/model"), "teacher=no-such-user/model")
    (tmp_path / "hollow").mkdir()
    refused(train_here(*distill, "teacher=hollow"), "contains no model")
    refused(train_here(*distill, f"teacher={model_folder(tmp_path / 'llama', model_type='llama')}"), "llama")
    good = model_folder(tmp_path / "good")
    refused(train_here(*distill, f"teacher={good}"), "holds no tokenizer")
    refused(train_here(*tiny, f"init={good}", "model.n_layer=3"), "n_layer")
    weights = good / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(train_here(*distill, f"teacher={good}"), "truncated")
    weights.write_bytes(b"not safetensors")
    refused(train_here(*distill, f"teacher={good}"), "Cannot read")
    weights.unlink()
    refused(train_here(*distill, f"teacher={good}"), "no weights")


def test_student_that_does_not_fit_into_its_teacher_is_refused(train_here: Train, tmp_path: Path, tiny: list[str]):
    keys = [*tiny, "task=distill", "init=teacher_layers", f"teacher={model_folder(tmp_path / 'teacher')}"]
    refused(train_here(*keys, "model.n_layer=3"), "model.n_layer=2")
    refused(train_here(*keys, "model.n_embd=48"), "model.n_embd=32")
    refused(train_here(*keys, "model.n_positions=128"), "model.n_positions=64")
    refused(train_here(*keys, "model.n_head=4"), "model.n_embd=32 model.n_head=2")


def test_teacher_of_another_vocabulary_size_is_refused(train_here: Train, tmp_path: Path, tiny: list[str]):
    teacher = model_folder(tmp_path / "teacher")
    refused(train_here(*tiny, "task=distill", f"teacher={teacher}", "tokenizer=bpe", "vocab_size=280"), "280")


def test_missing_teacher_is_an_error_of_three_lines(train_here: Train):
    answer = train_here("task=distill", "model=small")
    refused(answer, "teacher=RUN_DIR")
    assert len(answer.stderr.strip().splitlines()) == 3


def test_a_folder_in_use_is_never_written_into(train_here: Train, tmp_path: Path, tiny: list[str]):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious").write_text("mine")
    refused(train_here(*tiny, "run_dir=used"), "resume=used")
    (tmp_path / "used" / "config.yaml").write_text("mine: too\n")
    answer = train_here(*tiny, "run_dir=used", "resume=auto")
    assert answer.code == 2
    assert (tmp_path / "used" / "precious").read_text() == "mine"
