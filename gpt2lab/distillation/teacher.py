"""Online teacher: a frozen model that returns teacher signals for the LM-head loss."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from gpt2lab.losses.aligned_teacher import AlignedTeacher, AlignedText
from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.model.backbone import Backbone, load_backbone
from gpt2lab.system.device import compute_dtype


class OnlineTeacher:
    """Frozen teacher. It is no nn.Module, so the student's optimizer, checkpoints and wrappers do not include it.

    Args:
        source: run directory, Hugging Face folder or Hub id.
        dtype: dtype of the weights.
    """

    def __init__(self, source: str, dtype: torch.dtype = torch.float32) -> None:
        self.source = source
        self.backbone: Backbone = load_backbone(source, dtype=dtype).eval().requires_grad_(False)

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the blocks over the ranks of a mesh and move them to their device.

        The embeddings, which are also the head, stay unsharded. All ranks must then call `signal` together. The root
        module is the backbone, which `signal` calls: it prefetches the next block while one is computed.
        """
        transformer = self.backbone.lm.transformer
        for block in self.backbone.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        unsharded = {*transformer.wte.parameters(), *transformer.wpe.parameters(), *transformer.ln_f.parameters()}
        fully_shard(self.backbone, mesh=mesh, ignored_params=unsharded)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights; in bf16 on a CPU the head is stored transposed, as the LM-head loss reads it."""
        self.backbone.to(device=device, dtype=dtype)
        if device.type == "cpu" and dtype.itemsize == 2:
            weight = self.backbone.lm.transformer.wte.weight
            weight.data = weight.data.T.contiguous().T  # spares a copy per step; embedding lookups are slightly slower

    @torch.no_grad()
    def signal(self, input_ids: Tensor, spans: Tensor | None = None) -> DenseTeacher:
        """Return the signal for input_ids (B, T) and attention spans (B, T, 2): B·T positions.

        Weights in the dtype of autocast need none: on a GPU it would compute layer norms in fp32.
        """
        self.backbone.eval()
        weight = self.backbone.lm.transformer.wte.weight
        with torch.autocast(input_ids.device.type, enabled=compute_dtype(weight) != weight.dtype):
            return self.backbone(input_ids, lambda hidden, weight: DenseTeacher(hidden.flatten(0, 1), weight), spans)

    def aligned_signal(self, text: AlignedText, vocab_size: int) -> AlignedTeacher:
        """Return the signal for text in the teacher's own tokens; a padded head is truncated to `vocab_size`."""
        dense = self.signal(text.input_ids)
        return AlignedTeacher(dense.hidden, dense.weight[:vocab_size], text.teacher_positions, text)
