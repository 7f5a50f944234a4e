"""BackboneModule: a GPT-2 under Lightning: built in configure_model, gathered for export, and text generation."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
import torch.distributed
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from gpt2lab.data.tokenizer import load_tokenizer
from gpt2lab.generation.completion import complete, distinct_seed, prompt_ids
from gpt2lab.model.backbone import Backbone, backbone_from_state, hf_from_state, load_backbone
from gpt2lab.model.ema import WeightAverage, stored_weights
from gpt2lab.plain_values import from_plain, to_plain
from gpt2lab.settings import AUTO, GREEDY, NUCLEUS, TOP_K, SamplingSettings, TrainingSettings
from gpt2lab.system.stop_request import Interrupted, StopRequest
from lightning_modules.nan_guard import FiniteWatch
from lightning_modules.plugins.fsdp_strategy import ShardedStrategy

Picklable = TypeVar("Picklable")

FILL = SamplingSettings("fill")  # objective=mlm, which fills masks


class BackboneModule(lightning.LightningModule):
    """Weights of a model and their export; `LanguageModel` trains them.

    The arguments of the subclass are its hyper-parameters, in checkpoints as plain containers, so that
    `load_from_checkpoint(path)` builds the module again. It passes each settings dataclass as a dictionary, which
    `from_plain` converts. Arguments that are not plain are not stored; give them to `load_from_checkpoint`.
    """

    backbone: Backbone  # made in configure_model, once the strategy is known

    def __init__(self, training: TrainingSettings) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        plain = to_plain(self.hparams)
        self.hparams.clear()
        self.hparams.update(plain)
        self.settings = from_plain(TrainingSettings, training)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.settings.tokenizer_folder)
        self.average: WeightAverage | None = None
        self.finite = FiniteWatch()
        self.stop_request = StopRequest()

    def build_backbone(self) -> Backbone:
        """Return the model to train, on the CPU; without a Trainer with random weights, which a checkpoint replaces."""
        if self.settings.init == "scratch" or not self.has_trainer:
            torch.manual_seed(self.settings.seed)
            return Backbone(self.settings.shape)
        return load_backbone(self.settings.init, dropout=self.settings.shape.dropout)

    def configure_model(self) -> None:
        """Build the model. Without a Trainer, as in `load_from_checkpoint`, it is neither compiled nor sharded."""
        if self.is_built:
            return
        self.backbone = self.build_backbone()
        if self.settings.activation_checkpointing:
            self.backbone.checkpoint_activations()
        if self.settings.layer_drop:
            self.backbone.drop_layers(self.settings.layer_drop)
        if self.has_trainer:
            self._compile_and_shard()
        if self.settings.ema:
            self.average = WeightAverage(self.backbone.parameters(), self.settings.ema, self._drop_gathered)

    def _compile_and_shard(self) -> None:
        if self.settings.compiled == "blocks":
            self.backbone.compile_blocks()
        elif self.settings.compiled == "pass":
            self.backbone.compile_pass()
        elif self.settings.compile_head:
            self.backbone.compile_gelu()
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.shard(self.backbone, self.backbone.blocks)

    def _drop_gathered(self) -> None:
        """Under FSDP, drop the whole weights outside of the blocks, which stay gathered after a validation."""
        if isinstance(self.backbone, FSDPModule):
            self.backbone.reshard()

    @property
    def has_trainer(self) -> bool:
        """Whether a Trainer runs this module."""
        return self._trainer is not None

    @property
    def is_built(self) -> bool:
        """Whether there is a backbone yet; a run may fail before."""
        return "backbone" in self._modules

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only its part of the weights (FSDP2)."""
        return self.has_trainer and isinstance(self.trainer.strategy, ShardedStrategy)

    @property
    def saves_shards(self) -> bool:
        """Whether each rank writes its own part of a checkpoint."""
        strategy = self.trainer.strategy
        return isinstance(strategy, ShardedStrategy) and strategy.saves_shards

    # Export

    def export_model(self) -> GPT2LMHeadModel:
        """Return the model as a `transformers` class, on the CPU in fp32: averaged weights if kept, LoRA merged.

        Under FSDP every rank must call it.
        """
        with self.averaged_weights():
            return self._plain_hf(self._whole_state())

    def export_on_first_rank(self) -> GPT2LMHeadModel | None:
        """Return `export_model` on the first rank, None on the others: a large model is whole on one rank only.

        Under FSDP every rank must call it.
        """
        with self.averaged_weights():
            state = self._whole_state(first_rank_only=True)
            return self._plain_hf(state) if self.trainer.is_global_zero else None

    def stored_model(self, checkpoint: dict[str, Any]) -> GPT2LMHeadModel:
        """Return what `export_model` returned when a checkpoint was saved; on one rank."""
        return self._plain_hf(self._exported_state(stored_weights(checkpoint)))

    def _exported_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of the inner GPT-2 as it is exported, for tasks that train other weights than these."""
        return state

    def _plain_hf(self, state: dict[str, Tensor]) -> GPT2LMHeadModel:
        settings = self.settings
        return hf_from_state(state, self.backbone.shape, settings.objective.name, settings.pair_template)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Swap in the averaged weights for the context, if the run keeps an average."""
        self.finite.check()
        return self.average.applied() if self.average is not None else nullcontext()

    def _whole_state(self, first_rank_only: bool = False, computes: bool = False) -> dict[str, Tensor]:
        """State dict of the inner GPT-2 with whole tensors, in the training layout.

        Args:
            first_rank_only: sharded weights are gathered there alone, on the CPU; the other ranks get nothing.
            computes: sharded weights are gathered in the compute dtype, which takes less time and memory.
        """
        strategy = self.trainer.strategy if self.has_trainer else None
        if not isinstance(strategy, ShardedStrategy):
            return self.backbone.lm.state_dict()
        if computes:
            return strategy.gather(self.backbone.lm)
        options = StateDictOptions(full_state_dict=True, cpu_offload=first_rank_only)
        state = get_model_state_dict(self.backbone, options=options)
        inner = {name: tensor for name, tensor in state.items() if name.startswith("lm.")}
        return {name.removeprefix("lm."): tensor for name, tensor in inner.items() if isinstance(tensor, Tensor)}

    def export_adapter(self, folder: Path, stored: dict[str, Any] | None = None) -> bool:
        """Write a PEFT adapter into `folder`, for tasks that train one; return whether there is one.

        Args:
            stored: checkpoint whose adapter it is; None: that of the present weights.
        """
        return False

    # Text

    def generation_model(self) -> GPT2LMHeadModel:
        """Return the model that generates text, on this rank's device with the weights it has now.

        Under FSDP it is a copy with whole weights in the compute dtype, and every rank must call this.
        """
        self.finite.check()
        if not self.is_sharded:
            return self.backbone.lm
        return backbone_from_state(self._whole_state(computes=True), self.backbone.shape).lm

    def generate(self, prompts: Sequence[str], method: SamplingSettings, max_new_tokens: int) -> list[str]:
        """Return completions of prompts; under mlm the prompts with gaps filled. Every rank must call it."""
        ids = [prompt_ids(prompt, self.tokenizer, self.settings.objective.name) for prompt in prompts]
        return self.generate_from_ids(ids, method, max_new_tokens)

    @property
    def sampling_methods(self) -> tuple[SamplingSettings, ...]:
        """Decoding methods of the samples generated during training."""
        if self.settings.objective.kind.fills_masks:
            return (FILL,)
        sampling = self.settings.sampling
        return (GREEDY, TOP_K, NUCLEUS) if sampling == AUTO else (sampling,)

    def generate_from_ids(
        self,
        prompts: Sequence[Sequence[int]],
        method: SamplingSettings,
        max_new_tokens: int,
        row_seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Generate text from token ids. Each rank generates its share, and every rank receives all texts.

        A text is the same on one rank and several (in fp32; rounding may change it in bf16).

        Args:
            prompts: the same on every rank.
            row_seeds: a seed for each prompt; None: from the run's seed and the prompt's place in the list.

        Raises:
            Interrupted: on every rank.
        """
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.has_trainer else (0, 1)
        seeds = row_seeds or [distinct_seed(self.settings.seed, place) for place in range(len(prompts))]
        model, own = self.generation_model(), None
        with suppress(Interrupted):
            own = complete(
                model,
                self.tokenizer,
                self.settings.objective.name,
                prompts[rank::world],
                method,
                max_new_tokens=max_new_tokens,
                row_seeds=seeds[rank::world],
                streamer=self.stop_request.streamer(),
            )
        texts = [""] * len(prompts)
        for other, completions in enumerate(self.from_ranks(own)):
            if completions is None:
                raise Interrupted
            texts[other::world] = [self.tokenizer.decode(completion) for completion in completions]
        return texts

    def from_ranks(self, value: Picklable) -> list[Picklable]:
        """Return every rank's value, in the order of the ranks; collective."""
        if not self.has_trainer or self.trainer.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(values, value)
        return values
