"""Stochastic rounding: Adam and AdamW whose weights and moments lie in bf16, without losing what is below its digits.

bf16 keeps 8 bits, so rounded to the nearest number a weight does not move by less than a 256th to a 512th of itself,
and a second moment with beta2 = 0.999 never shrinks. Here every number is updated in fp32 and then rounded up or down,
by chance and so that the mean is exact: what is too small for one step arrives over many.

Source: Zamirai et al. 2020 (arXiv 2010.06192), which finds that it is the rounding of updates that costs; Ozkara et al.
2025 (arXiv 2502.20566), whose replicas of a weight share their random numbers, too.
"""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adam import adam

NUMBERS_AT_ONCE = 2**22  # weights that are in fp32 at a time, with gradient and moments
WORK_OF_A_NUMBER = 20  # bytes: weight and moments, two of random bits, four with their sum, two of the result

Piece = tuple[Tensor, Tensor, Tensor, Tensor]  # as long as each other: of weight, both moments and gradient


def stochastically_rounded(exact: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 of any shape → bf16, each number up or down so that the mean is exact; what bf16 can hold stays as it is.

    To the bits that bf16 has no room for a random number of as many bits is added; what carries, rounds up.
    """
    drawn = torch.empty(-(-exact.numel() // 4), dtype=torch.int64, device=exact.device)
    drawn.random_(-(2**63), None, generator=generator)  # every bit counts: four random numbers in each
    bits = drawn.view(torch.int16)[: exact.numel()].int().bitwise_and_(0xFFFF).view(exact.shape)
    return bits.add_(exact.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


class RoundingAdam(torch.optim.Adam):
    """PyTorch's Adam, or AdamW, to the letter; weights in bf16 are updated in fp32 and rounded stochastically.

    The random numbers are those of (seed, step, place among the weights), so a resumed run draws what an unbroken one
    draws. Ranks that hold the same weights draw the same, and ranks that hold different parts (FSDP2) different ones.
    """

    seed = 0  # of the random numbers

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all groups; `closure` as in any PyTorch optimizer."""
        if not any(in_bf16(parameter) for group in self.param_groups for parameter in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for step, parameters in self._by_step(group["params"]).items():
                for place, bunch in enumerate(_bunches(self.state, parameters)):
                    self._update(bunch, group, step, self.generator(parameters[0], step, number, place))
        return loss

    def generator(self, parameter: Tensor, *where: int) -> torch.Generator:
        """Random numbers for this parameter's device and, where it is sharded, for this rank's part."""
        part = parameter.device_mesh.get_local_rank() if isinstance(parameter, DTensor) else 0
        digest = hashlib.blake2b(repr((self.seed, part, *where)).encode(), digest_size=8).digest()
        # PyTorch's generator of a CPU takes 32 bits of it
        return torch.Generator(local(parameter).device).manual_seed(int.from_bytes(digest) >> 1)

    def _by_step(self, parameters: list[nn.Parameter]) -> dict[int, list[nn.Parameter]]:
        """Number of the step that each is about to take → those; a block that was left out is behind the others."""
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

    def _update(self, bunch: list[Piece], group: dict, step: int, generator: torch.Generator) -> None:
        weight, average, square, gradient = (torch.cat(pieces).float() for pieces in zip(*bunch, strict=True))
        adam(
            [weight],
            [gradient],
            [average],
            [square],
            [],
            [torch.tensor(step - 1.0, device=weight.device)],
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
        sizes = [len(pieces[0]) for pieces in bunch]
        for which, exact in enumerate((weight, average, square)):
            stored = [pieces[which] for pieces in bunch]
            torch._foreach_copy_(stored, list(stochastically_rounded(exact, generator).split(sizes)))


def in_bf16(parameter: Tensor) -> bool:
    return parameter.dtype == torch.bfloat16


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bunches(state: dict[Tensor, dict[str, Tensor]], parameters: list[nn.Parameter]) -> Iterator[list[Piece]]:
    """All numbers of the parameters, about NUMBERS_AT_ONCE at a time: small tensors together, large ones in pieces."""
    bunch: list[Piece] = []
    size = 0
    for parameter in parameters:
        assert parameter.grad is not None  # as _by_step sees to
        moments = state[parameter]
        stored = (local(tensor).view(-1) for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"]))
        for piece in zip(
            *(numbers.split(NUMBERS_AT_ONCE) for numbers in (*stored, local(parameter.grad).reshape(-1))), strict=True
        ):
            if bunch and size + len(piece[0]) > NUMBERS_AT_ONCE:
                yield bunch
                bunch, size = [], 0
            bunch.append(piece)
            size += len(piece[0])
    if bunch:
        yield bunch
