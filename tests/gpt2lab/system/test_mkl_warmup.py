"""Vector math chooses its kernels on one thread at process start: the first exp is as exact as the second."""

import subprocess
import sys

import pytest

from gpt2lab.reports.hf_folder import FRESH_PROCESS
from gpt2lab.system.mkl_warmup import MKL_FUNCTIONS
from tests.conftest import ROOT

FIRST_CALLS = """
import torch
with torch.profiler.profile(record_shapes=True) as profile:
    {begin}
print(*[event.name for event in profile.events() if event.input_shapes == [[1]]])
"""


@pytest.mark.parametrize(
    ("begin", "functions"),
    [
        ("import gpt2lab.model.backbone", {f"aten::{function.__name__}" for function in MKL_FUNCTIONS}),
        pytest.param(
            FRESH_PROCESS.partition("folder, threads")[0].replace("\n", "\n    "),
            {"aten::tanh"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["with the backbone", "to verify an export"],
)
def test_process_starts_with_vector_math_of_one_number(begin: str, functions: set[str]) -> None:
    command = [sys.executable, "-c", FIRST_CALLS.format(begin=begin)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert functions <= set(printed.split())
