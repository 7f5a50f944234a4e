"""Sharding: FSDP2 through Lightning, with what its own strategy leaves out."""

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gpt2lab.storage.sharded_checkpoint import (
    OPTIMIZER,
    STATE,
    is_sharded,
    optimizer_by_name,
    read_shards,
    write_shards,
)
from gpt2lab.storage.tensor_file import read_checkpoint_file


class ShardedStrategy(ModelParallelStrategy):
    """Weights, gradients and optimizer state split over all ranks.

    Checkpoints of both formats and of any number of ranks can be loaded, also those of other strategies.

    Args:
        ranks: among which they are split.
        timeout: of every collective operation.
        saves_shards: whether each rank writes its own parts (sharded_checkpoint.py) instead of one file.
        offloads: whether weights, gradients and optimizer state lie in the host's memory, and the optimizer runs there.
    """

    def __init__(
        self,
        ranks: int,
        process_group_backend: str | None,
        timeout: timedelta,
        saves_shards: bool = False,
        offloads: bool = False,
    ) -> None:
        super().__init__(
            data_parallel_size=ranks,
            tensor_parallel_size=1,
            save_distributed_checkpoint=saves_shards,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.timeout = timeout
        self.saves_shards = saves_shards
        self.offloads = offloads

    def setup_environment(self) -> None:
        super().setup_environment()
        for group in self.device_mesh.get_all_groups():  # the mesh makes groups of its own, with the usual timeout
            _set_pg_timeout(self.timeout, group)

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Split a model in place, block by block, and what is outside its blocks as a whole.

        Under bf16-mixed the blocks' weights are gathered in bf16 and their gradients summed in fp32. What the blocks
        pass on stays in fp32, and so do the embeddings, as under autocast alone. Gradients that are bf16 by themselves
        (bf16-true) are summed in fp32, too.
        """
        mesh, precision = self.device_mesh["data_parallel"], self.precision_plugin.precision
        is_mixed, sums_in = precision == "bf16-mixed", torch.float32 if precision == "bf16-true" else None
        exact = MixedPrecisionPolicy(reduce_dtype=sums_in, cast_forward_inputs=False)
        mixed = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if self.offloads else OffloadPolicy()
        for block in blocks:
            if is_mixed and mesh.device_type == "cpu":  # whose layer norm, unlike a GPU's, takes no bf16 weights there
                norms: list[nn.Module] = [module for module in block.modules() if isinstance(module, nn.LayerNorm)]
                fully_shard(norms, mesh=mesh, mp_policy=exact, offload_policy=offload)
            fully_shard(block, mesh=mesh, mp_policy=mixed if is_mixed else exact, offload_policy=offload)
        fully_shard(model, mesh=mesh, mp_policy=exact, offload_policy=offload)

    def gather(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a state dict of whole tensors, on this rank's device in the compute dtype; collective.

        Tensors are cast before they are gathered, one after the other. Tied weights are gathered once.
        """
        dtype = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        whole: dict[Tensor, Tensor] = {}
        state = model.state_dict(keep_vars=True)
        for tensor in state.values():
            if tensor not in whole:
                part = tensor.detach().to(self.root_device, dtype)
                whole[tensor] = part.full_tensor() if isinstance(part, DTensor) else part
        return {name: whole[tensor] for name, tensor in state.items()}

    def model_to_device(self) -> None:
        if self.offloads:
            _update_properties(self.lightning_module, device=self.root_device)  # its tensors stay where they are
        else:
            super().model_to_device()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if self.saves_shards:
            write_shards(checkpoint, Path(filepath), self.global_rank)
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path, (optimizer,) = Path(checkpoint_path), self.optimizers
        if is_sharded(path):
            state, average = get_model_state_dict(self.model), self.lightning_module.average
            averages = [torch.empty_like(tensor) for tensor in average.averages] if average is not None else []
            checkpoint = read_shards(path, state, get_optimizer_state_dict(self.model, optimizer), averages)
            set_model_state_dict(self.model, state)
            set_optimizer_state_dict(self.model, optimizer, checkpoint[OPTIMIZER][0])
            return checkpoint
        checkpoint = read_checkpoint_file(path, mmap=True)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        in_groups = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, checkpoint.pop(STATE), options=whole)
        named = optimizer_by_name(checkpoint.pop(OPTIMIZER)[0], in_groups)
        set_optimizer_state_dict(self.model, optimizer, named, options=whole)
        return checkpoint
