"""Products of a few rows with a model's matrices, on a CPU in fp32: each matrix is packed once for all of them.

PyTorch brings a matrix into the order of its CPU kernels for every product with four rows or more, which takes longer
than a product with so few rows itself. Here it is done once, with the operator to which Inductor compiles frozen
models. That pays after five to ten products, so a matrix has a few as it is first; a prompt is one. Products with fewer
rows read the matrix as it is.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gpt2lab.system import onednn
from gpt2lab.system.free_memory import host_free_bytes

FEWEST_ROWS, MOST_ROWS = 4, 64  # above, PyTorch's own product loses at most a tenth by it
FIRST_PACKED = 4  # number of the first product for which a matrix is packed
FEWEST_WEIGHTS = 300_000  # smaller matrices stay in a cache, and gain nothing
PACKED_FOR = 16  # number of rows for which the kernel chooses the order of the weights
MOST_OF_FREE_MEMORY = 0.25


class PackedProducts:
    """Call a model's linear modules. A matrix that changes afterwards is not packed again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._products: Counter[nn.Module] = Counter()  # of a few rows
        self._packed: dict[nn.Module, Tensor] = {}
        self._packs: bool | None = None  # unknown before the first product of a few rows

    def __call__(self, module: Any, hidden: Tensor) -> Tensor:
        """Return `module(hidden)`: (…, n_in) → (…, n_out)."""
        rows = hidden.numel() // hidden.shape[-1]
        if not FEWEST_ROWS <= rows <= MOST_ROWS or not self._is_packable(module, hidden):
            return module(hidden)
        self._products[module] += 1
        if self._products[module] < FIRST_PACKED:
            return module(hidden)
        if module not in self._packed:
            matrix = module.weight.T if isinstance(module, Conv1D) else module.weight  # (n_out, n_in)
            self._packed[module] = torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), PACKED_FOR)
        return torch.ops.mkldnn._linear_pointwise(hidden, self._packed[module], module.bias, "none", [], "")

    def _is_packable(self, module: Any, hidden: Tensor) -> bool:
        if hidden.device.type != "cpu" or hidden.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        if self._packs is None:
            self._packs = onednn.has_operators() and _has_room(self.model)
        return self._packs and _is_plain(module) and module.weight.numel() >= FEWEST_WEIGHTS


def _is_plain(module: Any) -> bool:
    """Whether the module computes its product alone: no adapter, no quantized or sharded weight."""
    return type(module) in (nn.Linear, Conv1D) and type(module.weight.data) is Tensor


def _has_room(model: nn.Module) -> bool:
    """Return whether a copy of the model's weights is small beside the free memory."""
    free = host_free_bytes()
    return free is None or sum(weights.numel() * 4 for weights in model.parameters()) < free * MOST_OF_FREE_MEMORY
