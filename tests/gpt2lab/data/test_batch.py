"""A batch reaches a GPU from pinned memory, without what only the CPU reads."""

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from gpt2lab.data.batch import IGNORE_INDEX, Batch


def test_a_loader_pins_what_a_gpu_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor.clone())
    ids = torch.zeros(2, 8, dtype=torch.int64)
    batch = Batch(ids, ids + 1, 16, torch.arange(2), references=["a", "b"], spans=torch.zeros(2, 8, 2))
    found = pin_memory(batch)
    assert len(pinned) == 3
    assert found.input_ids is not ids
    assert (found.target_tokens, found.references) == (16, ["a", "b"])


def test_a_device_gets_what_the_model_reads() -> None:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    moved = move_data_to_device(Batch(ids, ids, 16, torch.arange(2), documents=torch.arange(16)), torch.device("meta"))
    assert {name for name, value in vars(moved).items() if isinstance(value, Tensor) and value.is_meta} == {
        "input_ids",
        "labels",
        "documents",
    }
    assert moved.indices.tolist() == [0, 1]
    assert moved.count_row_targets().tolist() == [8, 8]
    assert moved.head_rows(64).is_meta, "counted without reading the device"


def test_lm_head_rows_are_the_targets_padded_to_a_multiple():
    """Few different numbers of rows: oneDNN keeps memory for each."""

    def head_rows(targets: list[int], multiple: int) -> list[int]:
        labels = torch.full((2, 10), IGNORE_INDEX)
        labels.view(-1)[targets] = 5
        return Batch(labels, labels, 16, torch.arange(2)).head_rows(multiple).tolist()

    for multiple, expected in ((1, [3, 7, 19]), (3, [3, 7, 19]), (4, [0, 3, 7, 19]), (8, [0, 1, 2, 3, 4, 5, 7, 19])):
        assert head_rows([3, 7, 19], multiple) == expected
    assert len(head_rows([3, 7, 19], 64)) == 20
    assert head_rows([], 64) == []
