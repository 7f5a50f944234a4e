"""Keys by their names in other libraries: the error names the key of this project."""

import pytest

from gpt2lab.errors import InputError
from launch.config import did_you_mean
from launch.config.cli_overrides import quote_free_text
from launch.config.did_you_mean import ELSEWHERE, NAMES_ELSEWHERE
from launch.config.groups import groups
from launch.config.known_keys import known_keys
from tests.conftest import Train

GIVEN = [
    ("batch_size=8", "batch_tokens or batch_sequences"),
    ("per_device_train_batch_size=8", "micro_batch"),
    ("gradient_accumulation_steps=4", "batch_tokens, batch_sequences or micro_batch"),
    ("learning_rate=1e-3", "optimizer.lr"),
    ("optimizer.learning_rate=1e-3", "optimizer.lr"),
    ("max_epochs=3", "epochs"),
    ("num_train_epochs=3", "epochs"),
    ("max_iters=100", "steps"),
    ("eval_iters=20", "validate_tokens"),
    ("patience=3", "early_stop_patience"),
    ("warmup_ratio=0.1", "schedule.warmup_steps"),
    ("schedule.warmup_iters=10", "schedule.warmup_steps"),
    ("block_size=256", "context"),
    ("n_embd=64", "model.n_embd"),
    ("model.hidden_size=64", "model.n_embd"),
    ("weight_decay=0.1", "optimizer.weight_decay"),
    ("bf16=true", "precision"),
    ("fp16=true", "precision"),
    ("random_seed=1", "seed"),
    ("output_dir=out", "run_dir"),
    ("load_best_model_at_end=true", "export"),
    ("+batch_size=8", "batch_tokens or batch_sequences"),
    ("+learning_rate=1e-3", "optimizer.lr"),
    ("--learning-rate=1e-3", "optimizer.lr"),
    ("+trainer.learning_rate=1e-3", "optimizer.lr"),
    ("+optimizer.learning_rate=1e-3", "optimizer.lr"),
    ("+trainer.num_train_epochs=3", "epochs"),
    ("+schedule.warmup_ratio=0.1", "schedule.warmup_steps"),
    ("+task.patience=3", "early_stop_patience"),
    ("+data.batch_size=8", "batch_tokens or batch_sequences"),
    ("+callbacks.patience=3", "early_stop_patience"),
    ("+trainer.steps=3", "steps"),
    ("+model.lr=1", "optimizer.lr"),
    ("--per_device_train_batch_size=8", "micro_batch"),
]


@pytest.mark.parametrize(("given", "meant"), GIVEN)
def test_a_name_of_another_library_names_the_key(given: str, meant: str, train_here: Train):
    answer = train_here(given)
    assert answer.code == 2
    assert f"(did you mean {meant}?)" in answer.stderr
    assert len(answer.stderr.splitlines()) <= 5


def test_keys_named_for_other_libraries_exist():
    for meant in NAMES_ELSEWHERE:
        assert all(key in known_keys() for key in did_you_mean.parts(meant)), meant
    assert not ELSEWHERE.keys() & {*known_keys(), *groups()}
    assert len(ELSEWHERE) == sum(len(names.split()) for names in NAMES_ELSEWHERE.values()), "a name has two keys"


def test_a_flag_of_a_key_is_refused_with_the_key():
    with pytest.raises(InputError, match=r"no flag --steps \(did you mean steps=…\?\)"):
        quote_free_text(["--steps=3"])


@pytest.mark.parametrize(
    ("given", "reader"),
    [
        ("task.lora.rank=8", "task=finetune"),
        ("+task.lora.rank=8", "task=finetune"),
        ("data.language=de", "data=translate"),
        ("callbacks.inspect.tokens=8", "callbacks=inspect"),
    ],
)
def test_a_key_of_another_value_names_that_value(given: str, reader: str, train_here: Train):
    answer = train_here(given)
    assert (answer.code, f"It is read with {reader}." in answer.stderr) == (2, True), answer.stderr
