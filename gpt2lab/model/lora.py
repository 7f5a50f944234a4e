"""LoRA: the weights of a model without adapters that computes the same."""

from torch import Tensor

DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"  # PEFT's names


def merged(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Add each adapter's product to the weight that it adapts; without adapters the same state.

    Args:
        state: state dict of a model with PEFT's adapters, in the training layout.
        scale: alpha / rank.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, down in state.items():
        if name.endswith(DOWN):
            layer = name.removesuffix(DOWN)
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + scale * (state[f"{layer}{UP}"] @ down)
    return plain
