"""Backbone: Hugging Face's GPT-2 in a layout that trains fast, loaded from and exported to the original layout.

Shapes: B sequences, T positions, D hidden width, V vocabulary.

The modules are those of `transformers`, so `generate`, PEFT and assisted decoding work on them. There are two
differences, neither of which changes the function: Conv1D layers are `nn.Linear` (faster under compile), and the MLP
has a faster GELU (gpt2lab/model/mlp.py). `to_hf` reverts both for export.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from gpt2lab.errors import InputError
from gpt2lab.model import short_attention  # noqa: F401  registers SHORT_ATTENTION
from gpt2lab.model.attention_masks import (
    SHORT_ATTENTION,
    causal_spans,
    format_mask,
    spans_to_mask,
    spans_to_position_ids,
)
from gpt2lab.model.mlp import FastMLP, Gelu
from gpt2lab.settings import ModelShape
from gpt2lab.storage.model_folder import read_shape, resolve_model_folder
from gpt2lab.storage.tensor_file import UNREADABLE, unreadable_message
from gpt2lab.system.malloc_tuning import release_freed_memory
from gpt2lab.system.mkl_warmup import warm_up_mkl

CONV1D_WEIGHTS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transposed in the training layout

HeadResult = TypeVar("HeadResult")

LOAD_ERRORS: tuple[type[Exception], ...] = (OSError, SafetensorError, *UNREADABLE)
warm_up_mkl()  # at import, because every computation with a model imports this module first


class Backbone(nn.Module):
    """GPT-2 with random weights: N(0, 0.02), residual projections scaled by 1 / sqrt(2 · layers)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.lm = _linear_layout(GPT2LMHeadModel(_config(shape)))
        for block in self.lm.transformer.h:
            block.mlp = FastMLP(block.mlp)
        self.lm.config._attn_implementation = SHORT_ATTENTION
        self.projection: nn.Linear | None = None
        self._compiled_pass: Callable[[Tensor, Tensor | None], Tensor] | None = None

    def forward(
        self, input_ids: Tensor, head: Callable[[Tensor, Tensor], HeadResult], spans: Tensor | None = None
    ) -> HeadResult:
        """Return `head(hidden_states (B, T, D), head_weight (V, D))`.

        The head runs inside this forward because FSDP2 gathers its weight only here.

        Args:
            input_ids: (B, T) int64.
            head: for example a chunked loss, which never needs the logits of the whole batch.
            spans: (B, T, 2) attention spans (gpt2lab/model/attention_masks.py); None: causal.
        """
        hidden_states = (self._compiled_pass if torch.is_grad_enabled() else None) or self._hidden_states
        return head(hidden_states(input_ids, spans), self.lm.transformer.wte.weight)

    def _hidden_states(self, input_ids: Tensor, spans: Tensor | None) -> Tensor:
        """Compute hidden states (B, T, D), as GPT2Model.forward does but without its GPU synchronisation.

        GPT2Model.forward searches the positions for packed documents, which waits for all queued work.
        """
        transformer, implementation = self.lm.transformer, self.lm.config._attn_implementation
        if spans is None and implementation == "eager":  # it needs an explicit causal mask
            spans = causal_spans(input_ids)
        mask, positions = None, torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        if spans is not None:
            mask = format_mask(spans_to_mask(spans), implementation, transformer.wte.weight.dtype)
            positions = spans_to_position_ids(spans)
        hidden = transformer.drop(transformer.wte(input_ids) + transformer.wpe(positions))
        for block in transformer.h:
            hidden = block(hidden, None, mask)
        return transformer.ln_f(hidden)

    def logits(self, input_ids: Tensor, spans: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V); for tests and generation, since those of a training batch do not fit in memory."""
        return self(input_ids, lambda hidden, weight: hidden @ weight.T, spans)

    def add_projection(self, width: int, seed: int) -> None:
        """Add a trainable linear map from its hidden states to a teacher's; exports do not contain it.

        The initial weights depend on the seed only, not on the global random state.
        """
        self.projection = nn.Linear(self.shape.n_embd, width, bias=False)
        nn.init.xavier_uniform_(self.projection.weight, generator=torch.Generator().manual_seed(seed))

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order, each compiled, checkpointed and sharded as a unit."""
        return list(self.lm.transformer.h.children())

    def drop_layers(self, probability: float) -> None:
        """Skip each block of a training pass with this probability (LayerDrop); parameter names are unchanged."""
        self.lm.transformer.h = LayerDrop(self.blocks, probability)

    def checkpoint_activations(self) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.lm.activation_checkpointing_enable({"use_reentrant": False})

    def compile_blocks(self) -> None:
        """Compile each block in place; all share one graph. Parameter names are unchanged."""
        for block in self.blocks:
            block.compile()

    def compile_gelu(self) -> None:
        """Compile the GELU of each block and its gradient, for training on a CPU with blocks that are not compiled."""
        for module in self.modules():
            if isinstance(module, Gelu):
                module.compiled = True

    def compile_pass(self) -> None:
        """Compile the pass from token ids to hidden states as one graph, used when gradients are enabled.

        It removes the CPU overhead between blocks on a fast GPU; compile time grows with the number of blocks.
        """
        self._compiled_pass = torch.compile(self._hidden_states)


class LayerDrop(nn.ModuleList):
    """Module list that yields a random subset of its blocks in training, all of them otherwise.

    Sampled from PyTorch's global random state, as dropout is.

    Source: LayerDrop (Fan et al. 2019, arXiv 1909.11556).
    """

    def __init__(self, blocks: Iterable[nn.Module], probability: float) -> None:
        super().__init__(blocks)
        self.probability = probability

    def __iter__(self) -> Iterator[nn.Module]:
        if not self.training:
            return super().__iter__()
        dropped = torch.rand(len(self)) < self.probability
        return (block for block, drop in zip(self.children(), dropped.tolist(), strict=True) if not drop)


def shape_from_config(config: GPT2Config, dropout: float = 0.0) -> ModelShape:
    """Return the sizes of a Hugging Face GPT-2 configuration."""
    return ModelShape(
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_positions=config.n_positions,
        vocab_size=config.vocab_size,
        dropout=dropout,
    )


def load_backbone(source: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Backbone:
    """Load a run directory, a Hugging Face GPT-2 folder or a Hub id.

    Raises:
        InputError: missing, unreadable, not a GPT-2, or with missing weights.
    """
    folder = resolve_model_folder(source, "model")
    try:
        # config.json could name kernels or code on the Hub; only the sizes are read from it.
        config = _config(ModelShape(**read_shape(folder)))
        model, info = GPT2LMHeadModel.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by their names
            trust_remote_code=False,
        )
    except LOAD_ERRORS as error:
        pickles = sorted(folder.glob("pytorch_model*.bin"))
        if pickles and not list(folder.glob("*.safetensors")):
            raise InputError(unreadable_message(str(pickles[0]), error)) from error
        raise InputError(
            f"Cannot load a GPT-2 from {folder}: {str(error).splitlines()[0]}\n"
            "Give a run directory, a Hugging Face folder with config.json and model.safetensors, or a Hub id."
        ) from error
    _check_loaded(folder, model, info)
    shape = shape_from_config(model.config, dropout)
    with torch.device("meta"):
        backbone = Backbone(shape)
    # assign=True: a second copy of a large teacher would determine the run's peak memory.
    backbone.lm.load_state_dict(_swap_layout(model.state_dict()), assign=True)
    backbone.lm.tie_weights()
    del model
    release_freed_memory()  # transformers reads files in threads, whose arenas this thread does not reuse
    return backbone


def _check_loaded(folder: Path, model: GPT2LMHeadModel, info: dict[str, Any]) -> None:
    """Raise an InputError for weights that are missing or not finite, and for an output head of its own."""
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise InputError(f"{folder} lacks weights required by its config.json: {missing}.\nGive a complete model.")
    if info["mismatched_keys"]:
        name, theirs, ours = min(info["mismatched_keys"])
        raise InputError(
            f"{folder}: {name} has the shape {list(theirs)}; its config.json describes {list(ours)}.\n"
            "Give a complete GPT-2 with tied embeddings."
        )
    infinite = [name for name, weights in model.named_parameters() if not torch.isfinite(weights).all()]
    if infinite:
        raise InputError(
            f"{folder}: {infinite[0]} has values that are NaN or infinite, as after a training that diverged.\n"
            "Give another model."
        )
    if not torch.equal(model.lm_head.weight, model.transformer.wte.weight):
        raise InputError(
            f"{folder} has an output head of its own: lm_head.weight differs from the token embeddings.\n"
            "Give a GPT-2 with tied embeddings, as OpenAI's."
        )


def backbone_from_state(state: dict[str, Tensor], shape: ModelShape) -> Backbone:
    """Build a backbone of the tensors of `state`, a state dict of `Backbone.lm`, on their device and in their dtype."""
    with torch.device("meta"):
        backbone = Backbone(shape)
    backbone.lm.load_state_dict(state, assign=True)
    backbone.lm.tie_weights()
    return backbone


def to_hf(backbone: Backbone) -> GPT2LMHeadModel:
    """Copy to the layout of `transformers` (Conv1D, gelu_new), on the CPU in fp32."""
    return hf_from_state(backbone.lm.state_dict(), backbone.shape)


def hf_from_state(
    state: dict[str, Tensor], shape: ModelShape, objective: str = "clm", pair_template: dict[str, str] | None = None
) -> GPT2LMHeadModel:
    """Build the Hugging Face model from a state dict of `Backbone.lm`, for averaged or gathered weights.

    Args:
        objective: training objective, stored in the model's configuration.
        pair_template: templates `prompt` and `response` of the pairs that it was trained on, stored there too.
    """
    config = _config(shape)
    config.objective = objective
    if pair_template:
        config.pair_template = pair_template
    config.activation_function = "gelu_new"
    config.use_cache = True
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    model.load_state_dict(_swap_layout({name: tensor.detach().float().cpu() for name, tensor in state.items()}))
    return model.eval()


def _config(shape: ModelShape) -> GPT2Config:
    end_of_text = shape.vocab_size - 1 if shape.vocab_size == 50257 else 0
    return GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.n_positions,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=False,
        loss_type="ForCausalLM",
    )


def _linear_layout(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Replace every Conv1D by the equivalent nn.Linear."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                n_in, n_out = child.weight.shape
                linear = nn.Linear(n_in, n_out, device=child.weight.device)
                linear.weight = nn.Parameter(child.weight.detach().T.contiguous())
                linear.bias = child.bias
                setattr(parent, name, linear)
    return model


def _swap_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transpose the weights that are Conv1D in one layout and nn.Linear in the other; the inverse is the same."""
    return {name: tensor.T.contiguous() if name.endswith(CONV1D_WEIGHTS) else tensor for name, tensor in state.items()}
