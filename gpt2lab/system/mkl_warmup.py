"""Vector math: has MKL choose its kernels on one thread, for of several that ask at once one may get inexact ones."""

import torch

ROUTED_TO_MKL = (torch.exp, torch.log, torch.sqrt, torch.tanh)  # of what PyTorch leaves to it


def choose_kernels() -> None:
    """Compute each function of one number; to be called before any is computed of a large tensor.

    MKL looks for the kernels of this CPU at the first call. When that call is made by several threads (PyTorch gives
    each a part of a large tensor), one of them may be left with kernels of low accuracy for this once: in 4 of 100 new
    processes the first exp, sqrt or tanh was off in the fourth or fifth digit, and the second call was right.

    Source: https://github.com/pytorch/pytorch/issues/188792, seen with PyTorch 2.13's MKL 2024.2.
    """
    for dtype in (torch.float32, torch.float64):
        for function in ROUTED_TO_MKL:
            function(torch.ones(1, dtype=dtype))
