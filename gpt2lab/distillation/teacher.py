"""Teacher: a frozen model as a signal for the LM-head loss."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from gpt2lab.losses.aligned_teacher import AlignedTeacher, AlignedText
from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.model.backbone import Backbone, load_backbone


class OnlineTeacher:
    """A loaded teacher. Not an nn.Module, so no optimizer, checkpoint or wrapper of the student ever takes it up.

    Args:
        source: run directory, Hugging Face folder or Hub id.
        dtype: what its weights are kept in.
    """

    def __init__(self, source: str, dtype: torch.dtype = torch.float32) -> None:
        self.source = source
        self.backbone: Backbone = load_backbone(source, dtype=dtype).eval().requires_grad_(False)

    def shard(self, mesh: DeviceMesh) -> None:
        """Split its blocks over the ranks of a mesh and move them to their device; the embeddings, which are its head
        as well, stay whole on every rank. From then on all ranks must ask it together.

        The backbone, which `signal` calls, is the root: under it one block is gathered while another works.
        """
        transformer = self.backbone.lm.transformer
        for block in self.backbone.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        whole = {*transformer.wte.parameters(), *transformer.wpe.parameters(), *transformer.ln_f.parameters()}
        fully_shard(self.backbone, mesh=mesh, ignored_params=whole)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights; in bf16 on a CPU the head is laid out as the LM-head loss multiplies by it."""
        self.backbone.to(device=device, dtype=dtype)
        if device.type == "cpu" and dtype.itemsize == 2:
            weight = self.backbone.lm.transformer.wte.weight
            weight.data = weight.data.T.contiguous().T  # rows are looked up a little slower, and copied no more

    @torch.no_grad()
    def signal(self, input_ids: Tensor, spans: Tensor | None = None) -> DenseTeacher:
        """(B, T), and what each position sees (B, T, 2) → hidden states (B·T, Dt) and head weight (V, Dt)."""
        self.backbone.eval()
        return self.backbone(input_ids, lambda hidden, weight: DenseTeacher(hidden.flatten(0, 1), weight), spans)

    def aligned_signal(self, text: AlignedText, entries: int) -> AlignedTeacher:
        """What it says of a text in its own tokens; of a padded head the first `entries` count."""
        said = self.signal(text.input_ids)
        return AlignedTeacher(said.hidden, said.weight[:entries], text.teacher_positions, text)
