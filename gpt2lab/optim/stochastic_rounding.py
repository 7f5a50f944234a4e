"""Stochastic rounding: Adam and AdamW with weights and moments in bf16, without losing small updates.

bf16 has 8 significant bits: with round-to-nearest, updates below 1/512 to 1/256 of a weight are lost, and a second
moment with beta2 = 0.999 never shrinks. Here every number is updated in fp32 and rounded up or down at random, so that
the expected value is exact.

Source: Zamirai et al. 2020 (arXiv 2010.06192), on the cost of rounding updates; Ozkara et al. 2025 (arXiv 2502.20566),
where replicas of a weight share their random numbers, too.
"""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adam import adam

CHUNK_NUMEL = 2**22  # numbers updated in fp32 at a time
WORK_BYTES = 20  # per number of a chunk: fp32 weight and two moments, 2 random bits, 4 for the sum, 2 for the result

Piece = tuple[Tensor, Tensor, Tensor, Tensor]  # flat, equally long parts of weight, both moments and gradient


def round_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 of any shape to bf16, up or down at random with the exact mean; bf16 values stay unchanged.

    A random 16-bit number is added to the 16 bits that bf16 drops; a carry rounds up.
    """
    random = torch.empty(-(-exact.numel() // 4), dtype=torch.int64, device=exact.device)
    random.random_(-(2**63), None, generator=generator)  # all 64 bits: four 16-bit numbers in each
    bits = random.view(torch.int16)[: exact.numel()].int().bitwise_and_(0xFFFF).view(exact.shape)
    return bits.add_(exact.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


class RoundingAdam(torch.optim.Adam):
    """PyTorch's Adam or AdamW; bf16 weights are updated in fp32 and rounded stochastically.

    The random numbers are a function of (seed, step, position of the weight), so a resumed run repeats those of an
    uninterrupted one. Ranks with the same weights (DDP) use the same numbers, ranks with different shards (FSDP2)
    different ones.
    """

    seed = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all groups once; `closure` as in any PyTorch optimizer."""
        if not any(is_bf16(parameter) for group in self.param_groups for parameter in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for step, parameters in self._by_step(group["params"]).items():
                for index, chunk in enumerate(_chunks(self.state, parameters)):
                    self._update(chunk, group, step, self.make_generator(parameters[0], step, number, index))
        return loss

    def make_generator(self, parameter: Tensor, *position: int) -> torch.Generator:
        """Return a generator on the parameter's device, seeded by seed, shard and position."""
        shard = parameter.device_mesh.get_local_rank() if isinstance(parameter, DTensor) else 0
        digest = hashlib.blake2b(repr((self.seed, shard, *position)).encode(), digest_size=8).digest()
        # PyTorch's CPU generator uses 32 bits of the seed
        return torch.Generator(to_local(parameter).device).manual_seed(int.from_bytes(digest) >> 1)

    def _by_step(self, parameters: list[nn.Parameter]) -> dict[int, list[nn.Parameter]]:
        """Group parameters by the step they are about to take; after layer drop a block has taken fewer."""
        found: dict[int, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            found.setdefault(int(state["step"]), []).append(parameter)
        return found

    def _update(self, chunk: list[Piece], group: dict, step: int, generator: torch.Generator) -> None:
        weight, average, square, gradient = (torch.cat(pieces).float() for pieces in zip(*chunk, strict=True))
        adam(
            [weight],
            [gradient],
            [average],
            [square],
            [],
            [torch.full((), step - 1.0, device=weight.device)],  # torch.tensor would wait for its copy to a GPU
            fused=True,
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        del gradient
        sizes = [len(pieces[0]) for pieces in chunk]
        for which, exact in enumerate((weight, average, square)):
            stored = [pieces[which] for pieces in chunk]
            torch._foreach_copy_(stored, list(round_stochastically(exact, generator).split(sizes)))


def is_bf16(parameter: Tensor) -> bool:
    return parameter.dtype == torch.bfloat16


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; another tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _chunks(state: dict[Tensor, dict[str, Tensor]], parameters: list[nn.Parameter]) -> Iterator[list[Piece]]:
    """Yield at most CHUNK_NUMEL numbers at a time: small tensors together, large ones split."""
    chunk: list[Piece] = []
    size = 0
    for parameter in parameters:
        assert parameter.grad is not None  # _by_step skips those without
        moments = state[parameter]
        stored = (to_local(tensor).view(-1) for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"]))
        for piece in zip(
            *(numbers.split(CHUNK_NUMEL) for numbers in (*stored, to_local(parameter.grad).reshape(-1))), strict=True
        ):
            if chunk and size + len(piece[0]) > CHUNK_NUMEL:
                yield chunk
                chunk, size = [], 0
            chunk.append(piece)
            size += len(piece[0])
    if chunk:
        yield chunk
