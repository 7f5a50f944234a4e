"""oneDNN: private operators of PyTorch, to which Inductor compiles linear layers on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn


def has_operators() -> bool:
    """Return whether this PyTorch has `mkldnn._linear_pointwise` and `mkldnn._reorder_linear_weight`."""
    try:
        _ = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def is_plain(module: Any, *kinds: type[nn.Module]) -> bool:
    """Return whether a module of these kinds computes its product alone: no adapter, no quantized or sharded weight."""
    return type(module) in kinds and type(module.weight.data) is Tensor
