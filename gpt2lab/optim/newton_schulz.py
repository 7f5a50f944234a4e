"""Newton–Schulz: orthogonalization of Muon's updates, each matrix by one rank, its owner.

Shapes: R rows and C columns of a matrix.

Under DDP every rank has all updates, so only the results are exchanged. Under FSDP2 every rank has some rows of each
update: it sends them to the owners and receives the same rows of the results. Both transfers are in bf16, as the
inputs and results of the iteration, so the results are those of one rank.

Source: Jordan et al. 2024 ("Muon"; github.com/KellerJordan/Muon, whose ranks take turns over the matrices);
DistMuonAdamW of github.com/karpathy/nanochat divides each shape over the ranks; github.com/microsoft/dion exchanges
shards by all-to-all. The scale is Moonlight's (arXiv 2502.16982), as in `torch.optim.Muon`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from gpt2lab.optim.stochastic_rounding import to_local
from gpt2lab.system.device import multiplies_bf16

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic of Jordan et al. 2024, "Muon"


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push the singular values of each matrix towards 1: (n, R, C) → the same shape, bf16.

    The products are in bf16, or in fp32 where a device emulates bf16, which takes three times as long.
    """
    x = matrices.bfloat16()
    x = x if multiplies_bf16(x.device.type) else x.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).bfloat16()


@dataclass(frozen=True)
class Matrix:
    """A matrix to orthogonalize: the rows of an update from `first` on.

    Attributes:
        update: number of the update.
        bounds: first row of the update that each rank has, and the row after its last.
    """

    update: int
    first: int
    rows: int
    columns: int
    bounds: tuple[tuple[int, int], ...]

    @property
    def cost(self) -> int:
        """Multiplications of one iteration, with short side m and long side n: 2 m² n + m³."""
        short, long = sorted((self.rows, self.columns))
        return 2 * short**2 * long + short**3

    @property
    def scale(self) -> float:
        """Factor with which the result has the typical RMS of an AdamW update."""
        return 0.2 * max(self.rows, self.columns) ** 0.5

    def rows_on(self, rank: int) -> slice:
        """Return the rows of this matrix that a rank has."""
        start, stop = (min(max(bound - self.first, 0), self.rows) for bound in self.bounds[rank])
        return slice(start, stop)

    def numel_on(self, rank: int) -> int:
        """Return the number of elements that a rank has."""
        rows = self.rows_on(rank)
        return (rows.stop - rows.start) * self.columns

    def part_of(self, local: Tensor, rank: int) -> Tensor:
        """Return the view of this matrix in the rows of the update that a rank has."""
        rows, offset = self.rows_on(rank), self.first - self.bounds[rank][0]
        return local[offset + rows.start : offset + rows.stop]


def split_matrices(updates: Sequence[Tensor], ranks: int) -> list[Matrix]:
    """Return the matrices of updates (R, C): three of a merged QKV (3C, C), otherwise the update itself."""
    matrices = []
    for number, update in enumerate(updates):
        total, columns = update.shape
        bounds = [(0, total)] * ranks
        if isinstance(update, DTensor):  # as Shard(0) divides its rows
            shard = -(-total // ranks)
            bounds = [(min(rank * shard, total), min((rank + 1) * shard, total)) for rank in range(ranks)]
        rows = columns if total == 3 * columns else total
        matrices += [Matrix(number, first, rows, columns, tuple(bounds)) for first in range(0, total, rows)]
    return matrices


def assign_owners(matrices: Sequence[Matrix], ranks: int) -> list[list[Matrix]]:
    """Divide matrices over ranks, with equal cost and equal numbers of each shape as far as possible.

    The most expensive matrix is next, and always assigned to the rank with the least work.
    """
    owned: list[list[Matrix]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for matrix in sorted(matrices, key=lambda one: (-one.cost, one.rows)):
        owner = work.index(min(work))
        owned[owner].append(matrix)
        work[owner] += matrix.cost
    return owned


def orthogonalize_over_ranks(updates: Sequence[Tensor], replicas: ProcessGroup | None = None) -> None:
    """Orthogonalize and scale updates (R, C) in place; each rank computes its share of the matrices.

    Args:
        updates: DTensors sharded over their rows, or tensors that are the same on all `replicas`.
        replicas: process group; None: this rank computes everything.
    """
    sharded = next((update for update in updates if isinstance(update, DTensor)), None)
    group = replicas if sharded is None else sharded.device_mesh.get_group()
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    owned = assign_owners(split_matrices(updates, ranks), ranks)
    held = [[matrix.part_of(to_local(updates[matrix.update]), rank) for matrix in own] for own in owned]  # by owner
    if group is None:
        received = [_orthogonalize_by_shape(held[0])]
    elif sharded is None:
        received = _gather(_orthogonalize_by_shape(held[rank]), held, group)
    else:
        received = _orthogonalize_shards(held, owned, rank, group)
    for matrix, part, result in zip(chain(*owned), chain(*held), chain(*received), strict=True):
        part.copy_(result.view_as(part)).mul_(matrix.scale)


def _orthogonalize_by_shape(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalize matrices of equal shape as one batch; return the results in the order of the matrices."""
    numbers: dict[torch.Size, list[int]] = {}
    for number, matrix in enumerate(matrices):
        numbers.setdefault(matrix.shape, []).append(number)
    results: dict[int, Tensor] = {}
    for of_shape in numbers.values():
        batch = torch.stack([matrices[number].bfloat16() for number in of_shape])
        results.update(zip(of_shape, orthogonalize(batch), strict=True))
    return [results[number] for number in range(len(matrices))]


def _orthogonalize_shards(
    held: list[list[Tensor]], owned: list[list[Matrix]], rank: int, group: ProcessGroup
) -> list[list[Tensor]]:
    """Send this rank's rows of each matrix to its owner; return the same rows of the results, by owner."""
    own, ranks, empty = owned[rank], range(len(owned)), next(chain(*held)).new_empty(0, dtype=torch.bfloat16)
    rows = _exchange(empty, held, [[matrix.numel_on(other) for matrix in own] for other in ranks], group)
    whole = [torch.cat([of_rank[number] for of_rank in rows]) for number in range(len(own))]
    results = _orthogonalize_by_shape(
        [flat.view(matrix.rows, matrix.columns) for flat, matrix in zip(whole, own, strict=True)]
    )
    outgoing = [[result[matrix.rows_on(other)] for matrix, result in zip(own, results, strict=True)] for other in ranks]
    return _exchange(empty, outgoing, [[matrix.numel_on(rank) for matrix in of_rank] for of_rank in owned], group)


def _exchange(
    empty: Tensor, outgoing: list[list[Tensor]], incoming: list[list[int]], group: ProcessGroup
) -> list[list[Tensor]]:
    """Send a list of tensors to each rank; return the flat ones from each, whose numbers of elements are `incoming`.

    Args:
        empty: (0,) bf16, for a rank that sends nothing.
    """
    sent = torch.cat([empty, *(tensor.bfloat16().flatten() for tensor in chain(*outgoing))])
    arrived = sent.new_empty(sum(map(sum, incoming)))
    to_each = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    distributed.all_to_all_single(arrived, sent, [sum(sizes) for sizes in incoming], to_each, group=group)
    parts = iter(arrived.split(list(chain(*incoming))))
    return [list(islice(parts, len(sizes))) for sizes in incoming]


def _gather(own: list[Tensor], like: list[list[Tensor]], group: ProcessGroup) -> list[list[Tensor]]:
    """Return every rank's list of tensors, flat; `like` has tensors of the same sizes."""
    sizes = [[tensor.numel() for tensor in of_rank] for of_rank in like]
    longest = max(map(sum, sizes))  # the ranks send equally many elements
    padded = torch.zeros(longest, dtype=torch.bfloat16, device=next(chain(*like)).device)
    if own:
        flat = torch.cat([tensor.flatten() for tensor in own])
        padded[: len(flat)] = flat
    gathered = list(padded.new_empty(group.size(), longest))
    distributed.all_gather(gathered, padded, group=group)
    return [list(row[: sum(of_rank)].split(of_rank)) for row, of_rank in zip(gathered, sizes, strict=True)]
