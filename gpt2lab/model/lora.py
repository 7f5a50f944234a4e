"""LoRA: merge adapters into the weights they adapt."""

from torch import Tensor

DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"  # PEFT's names


def merge_adapters(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Add each adapter's product to its base weight; a state without adapters is returned unchanged.

    Args:
        state: state dict of `Backbone.lm` with PEFT adapters.
        scale: alpha / rank.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, down in state.items():
        if name.endswith(DOWN):
            layer = name.removesuffix(DOWN)
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + scale * (state[f"{layer}{UP}"] @ down)
    return plain
