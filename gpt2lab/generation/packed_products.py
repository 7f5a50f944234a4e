"""Products of a few rows with a model's matrices, on a CPU in fp32: with oneDNN's operator in place of MKL's.

PyTorch uses MKL, which on some CPUs reads a matrix at half the speed of memory. With several rows both libraries
first copy the matrix into the order of their kernels, which takes longer than a product with so few rows. Here the copy
is kept, as Inductor does for frozen models. That pays only after five to ten products, so the first three with a
matrix, such as those of a prompt, use it as it is.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gpt2lab.system import onednn
from gpt2lab.system.free_memory import host_free_bytes

FEWEST_ROWS, MOST_ROWS = 2, 64  # for which a packed matrix is used; with more, MKL is at most 10 % slower
FIRST_PACKED = 4  # number of the first product for which a matrix is packed
FEWEST_WEIGHTS, FEWEST_PACKED = 150_000, 300_000  # smaller matrices stay in a cache, and gain nothing
PACKED_FOR = 16  # number of rows for which the kernel chooses the order of the weights
MOST_OF_FREE_MEMORY = 0.25


class PackedProducts:
    """Call a model's linear modules. A matrix that changes afterwards is not packed again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._products: Counter[nn.Module] = Counter()  # of FEWEST_ROWS or more
        self._packed: dict[nn.Module, Tensor] = {}
        self._may_pack: bool | None = None  # unknown before the first matrix that would be packed

    def __call__(self, module: Any, hidden: Tensor) -> Tensor:
        """Return `module(hidden)`: (…, n_in) → (…, n_out)."""
        rows = hidden.numel() // hidden.shape[-1]
        if rows > MOST_ROWS or not _uses_onednn(module, hidden):
            return module(hidden)
        weight = self._packed_weight(module) if rows >= FEWEST_ROWS else None
        if weight is None and type(module) is nn.Linear:
            weight = module.weight
        if weight is None:  # Conv1D
            return module(hidden)
        return torch.ops.mkldnn._linear_pointwise(hidden, weight, module.bias, "none", [], "")

    def _packed_weight(self, module: Any) -> Tensor | None:
        """Return the packed matrix; None: not yet, or never."""
        self._products[module] += 1
        if self._products[module] < FIRST_PACKED or module.weight.numel() < FEWEST_PACKED:
            return None
        if self._may_pack is None:
            self._may_pack = _has_room(self.model)
        if self._may_pack and module not in self._packed:
            matrix = module.weight.T if isinstance(module, Conv1D) else module.weight  # (n_out, n_in)
            self._packed[module] = torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), PACKED_FOR)
        return self._packed.get(module)


def _uses_onednn(module: Any, hidden: Tensor) -> bool:
    if hidden.device.type != "cpu" or hidden.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return (
        onednn.is_plain(module, nn.Linear, Conv1D)
        and module.weight.numel() >= FEWEST_WEIGHTS
        and onednn.has_operators()
    )


def _has_room(model: nn.Module) -> bool:
    """Return whether a copy of the model's weights is small beside the free memory."""
    free = host_free_bytes()
    return free is None or sum(weights.numel() * 4 for weights in model.parameters()) < free * MOST_OF_FREE_MEMORY
