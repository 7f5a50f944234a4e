"""Backbone: Hugging Face's GPT-2 in a layout that trains fast; gives hidden states, loads and leaves as plain GPT-2.

Shapes: B sequences, T positions, D hidden width, V vocabulary.

The modules are `transformers`' own, so `generate`, PEFT and assisted decoding work on them. Two things differ from the
stock model, neither of which changes the function: its Conv1D layers are `nn.Linear` (faster under compile), and
gelu_new is computed by PyTorch's fused tanh GELU. `plain_hf` turns both back for export.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from gpt2lab.errors import InputError
from gpt2lab.model.attention_masks import as_mask, causal_spans, positions_of, visible
from gpt2lab.settings import ModelShape
from gpt2lab.storage.model_folder import folder_of, read_shape
from gpt2lab.storage.tensor_file import UNREADABLE, refusal
from gpt2lab.system.malloc_tuning import give_back_freed_memory
from gpt2lab.system.mkl_warmup import choose_kernels

CONV1D_WEIGHTS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transposed in the training layout

HeadResult = TypeVar("HeadResult")

NOT_LOADED: tuple[type[Exception], ...] = (OSError, SafetensorError, *UNREADABLE)
choose_kernels()  # whatever computes with a model imports this module first


class Backbone(nn.Module):
    """GPT-2 with random weights: N(0, 0.02), residual projections scaled by 1 / sqrt(2 · layers)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.lm = _linear_layout(GPT2LMHeadModel(_config(shape)))
        self.projection: nn.Linear | None = None
        self._compiled_pass: Callable[[Tensor, Tensor | None], Tensor] | None = None

    def forward(
        self, input_ids: Tensor, head: Callable[[Tensor, Tensor], HeadResult], spans: Tensor | None = None
    ) -> HeadResult:
        """Run `head(hidden_states (B, T, D), head_weight (V, D))` and return what it returns.

        The head runs inside this forward because FSDP2 gathers the head's weight only here.

        Args:
            input_ids: (B, T) int64.
            head: for example a loss, which thereby never needs the logits of the whole batch.
            spans: (B, T, 2) what each position sees (gpt2lab/model/attention_masks.py); None: itself and all before it.
        """
        hidden_states = (self._compiled_pass if torch.is_grad_enabled() else None) or self._hidden_states
        return head(hidden_states(input_ids, spans), self.lm.transformer.wte.weight)

    def _hidden_states(self, input_ids: Tensor, spans: Tensor | None) -> Tensor:
        """(B, T) → (B, T, D), as GPT2Model.forward has it, which makes the CPU wait for a GPU.

        It looks through the positions for packed documents, so all queued work must be done first.
        """
        transformer, implementation = self.lm.transformer, self.lm.config._attn_implementation
        if spans is None and implementation == "eager":  # which knows no causal attention of its own
            spans = causal_spans(input_ids)
        mask, positions = None, torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        if spans is not None:
            mask = as_mask(visible(spans), implementation, transformer.wte.weight.dtype)
            positions = positions_of(spans)
        hidden = transformer.drop(transformer.wte(input_ids) + transformer.wpe(positions))
        for block in transformer.h:
            hidden = block(hidden, None, mask)
        return transformer.ln_f(hidden)

    def logits(self, input_ids: Tensor, spans: Tensor | None = None) -> Tensor:
        """(B, T) → (B, T, V). For tests and generation: a training batch's logits would not fit in memory."""
        return self(input_ids, lambda hidden, weight: hidden @ weight.T, spans)

    def add_projection(self, width: int, seed: int) -> None:
        """Give it a linear map from its hidden states to those of a teacher; trained beside it, left out of exports.

        Its first weights depend on the seed alone, not on what was drawn before.
        """
        self.projection = nn.Linear(self.shape.n_embd, width, bias=False)
        nn.init.xavier_uniform_(self.projection.weight, generator=torch.Generator().manual_seed(seed))

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order: what is compiled, checkpointed and sharded one by one."""
        return list(self.lm.transformer.h.children())

    def drop_layers(self, probability: float) -> None:
        """In training, leave every block out of a pass with this probability; names of parameters stay as they are."""
        self.lm.transformer.h = DroppedLayers(self.blocks, probability)

    def checkpoint_activations(self) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.lm.activation_checkpointing_enable({"use_reentrant": False})

    def compile_blocks(self) -> None:
        """Compile each block in place: one graph serves all of them. Parameter names stay as they are."""
        for block in self.blocks:
            block.compile()

    def compile_pass(self) -> None:
        """Compile the way from token ids to hidden states as one graph, which runs where there are gradients.

        It spares a CPU that queues work for a fast GPU the way into and out of every block; in return its compilation
        takes longer with every block.
        """
        self._compiled_pass = torch.compile(self._hidden_states)


class DroppedLayers(nn.ModuleList):
    """Blocks of which a pass in training goes through some; all of them otherwise.

    Drawn from PyTorch's global random state, as dropout is.

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


def count_parameters(shape: ModelShape) -> int:
    """Exact number of parameters, tied weights counted once, without allocating any."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Backbone(shape).parameters())


def shape_of(config: GPT2Config, dropout: float = 0.0) -> ModelShape:
    """Sizes of a Hugging Face GPT-2 configuration."""
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
        InputError: not to be found or read, not a GPT-2, or without some of its weights.
    """
    folder = folder_of(source, "model")
    try:
        # Its own config.json could name kernels or code of the Hub; the sizes are all that is needed of it.
        config = _config(ModelShape(**read_shape(folder)))
        model, info = GPT2LMHeadModel.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except NOT_LOADED as error:
        pickles = sorted(folder.glob("pytorch_model*.bin"))
        if pickles and not list(folder.glob("*.safetensors")):
            raise InputError(refusal(str(pickles[0]), error)) from error
        raise InputError(
            f"Cannot load a GPT-2 from {folder}: {str(error).splitlines()[0]}\n"
            "Give a run directory, a Hugging Face folder with config.json and model.safetensors, or a Hub id."
        ) from error
    if info["missing_keys"]:  # transformers would fill them with random numbers
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise InputError(f"{folder} lacks weights that a GPT-2 of its config.json has: {missing}.\nGive a whole model.")
    shape = shape_of(model.config, dropout)
    with torch.device("meta"):
        backbone = Backbone(shape)
    # The tensors themselves, not copies: of a large teacher, one more would be the run's peak of memory.
    backbone.lm.load_state_dict(_swap_layout(model.state_dict()), assign=True)
    backbone.lm.tie_weights()
    del model
    give_back_freed_memory()  # transformers reads files in threads, whose memory this one would not use again
    return backbone


def from_hf(model: GPT2LMHeadModel, dropout: float = 0.0) -> Backbone:
    """Wrap a plain GPT-2. Its weights are copied into the training layout."""
    return backbone_from_state(_swap_layout(model.state_dict()), shape_of(model.config, dropout))


def backbone_from_state(state: dict[str, Tensor], shape: ModelShape) -> Backbone:
    """A backbone on the CPU with a copy of these weights: the inner model's state dict in the training layout."""
    with torch.device("meta"):
        backbone = Backbone(shape)
    backbone = backbone.to_empty(device="cpu")
    backbone.lm.tie_weights()
    backbone.lm.load_state_dict(state)
    return backbone


def plain_hf(backbone: Backbone) -> GPT2LMHeadModel:
    """A copy of the model as `transformers` knows it, on the CPU in fp32: Conv1D layout, gelu_new."""
    return plain_hf_from_state(backbone.lm.state_dict(), backbone.shape)


def plain_hf_from_state(state: dict[str, Tensor], shape: ModelShape, objective: str = "clm") -> GPT2LMHeadModel:
    """As `plain_hf`, from a training-layout state dict of the inner model (for averaged or gathered weights).

    Args:
        objective: that it was trained with, noted in its configuration.
    """
    config = _config(shape)
    config.objective = objective
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
    """Replace every Conv1D by the nn.Linear that computes the same."""
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
    """Transpose the weights that are Conv1D in one layout and nn.Linear in the other; its own inverse."""
    return {name: tensor.T.contiguous() if name.endswith(CONV1D_WEIGHTS) else tensor for name, tensor in state.items()}
