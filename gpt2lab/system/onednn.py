"""oneDNN: the operators of PyTorch's CPU library to which Inductor compiles; not part of PyTorch's public interface."""

import torch


def has_operators() -> bool:
    """Return whether this PyTorch has `mkldnn._linear_pointwise` and `mkldnn._reorder_linear_weight`."""
    try:
        _ = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
