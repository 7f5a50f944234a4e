"""MKL warm-up: select MKL's vector-math kernels on one thread, because a multi-threaded first call may be inexact."""

import torch

MKL_FUNCTIONS = (torch.exp, torch.log, torch.sqrt, torch.tanh)  # elementwise functions that PyTorch computes with MKL


def warm_up_mkl() -> None:
    """Compute each function of one number; call it before any of them is applied to a large tensor.

    MKL selects the kernels for this CPU at the first call. If several threads make that call (PyTorch splits a large
    tensor), one of them may use low-accuracy kernels once: in 4 of 100 new processes the first exp, sqrt or tanh was
    off in the fourth or fifth digit, and the second call was right.

    Source: https://github.com/pytorch/pytorch/issues/188792, seen with PyTorch 2.13's MKL 2024.2.
    """
    for dtype in (torch.float32, torch.float64):
        for function in MKL_FUNCTIONS:
            function(torch.ones(1, dtype=dtype))
