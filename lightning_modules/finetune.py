"""FineTune: a pretrained model learns responses to prompts, by all weights or LoRA, scored on generated text."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from gpt2lab.data.batch import Batch
from gpt2lab.evaluation.bootstrap import text_scores
from gpt2lab.evaluation.text_metrics import per_text_scores
from gpt2lab.generation.completion import distinct_seed
from gpt2lab.model.backbone import Backbone
from gpt2lab.model.ema import stored_weights
from gpt2lab.model.lora import merge_adapters
from gpt2lab.plain_values import from_plain
from gpt2lab.reports.run_texts import Example
from gpt2lab.settings import GREEDY, LoraSettings, TextMetricSettings, TrainingSettings
from gpt2lab.storage.damaged_files import warn_once
from gpt2lab.storage.hub import hub_id
from lightning_modules.language_model import LanguageModel

SHOWN_EXAMPLES = 12  # in the run's report
LORA_LAYERS = ["c_attn", "c_proj", "c_fc"]


class FineTune(LanguageModel):
    """Cross-entropy on the response tokens only: the data's labels leave the prompt out.

    Args:
        training: as for every task.
        lora: rank 0 trains all weights.
        frozen_layers: so many blocks, from the first, and the embeddings (and with them the head) keep their weights.
        text: metrics on text generated from validation prompts; greedily unless `training.sampling` names a method.
    """

    def __init__(
        self, training: TrainingSettings, lora: LoraSettings, text: TextMetricSettings, frozen_layers: int = 0
    ) -> None:
        super().__init__(training)
        self.lora = from_plain(LoraSettings, lora)
        self.text = from_plain(TextMetricSettings, text)
        self.frozen_layers = frozen_layers
        if self.text.metrics and self.text.examples:
            self.watched_metric = f"val/{self.text.metrics[0]}"
        self._examples: list[tuple[int, list[int], str]] = []  # place in the split, prompt, reference

    def build_backbone(self) -> Backbone:
        backbone = super().build_backbone()
        if self.lora.rank:
            torch.manual_seed(self.settings.seed)
            inject_adapter_in_model(self._lora_config(), backbone.lm)
        if self.frozen_layers:
            transformer = backbone.lm.transformer
            for part in (transformer.wte, transformer.wpe, *backbone.blocks[: self.frozen_layers]):
                part.requires_grad_(False)
        return backbone

    # Metrics on generated text

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._examples = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        assert batch.prompt_lengths is not None
        assert batch.references is not None
        # By their place in the validation, so that one rank and several score the same pairs.
        for row, place in enumerate((batch.indices if batch.places is None else batch.places).tolist()):
            if place < self.text.examples:
                prompt = batch.input_ids[row, : int(batch.prompt_lengths[row])].tolist()
                self._examples.append((place, prompt, batch.references[row]))

    def generated_metrics(self) -> dict[str, float]:
        if not self.text.metrics or not self.text.examples:
            return {}
        examples = sorted(example for of_rank in self.from_ranks(self._examples) for example in of_rank)
        prompts, references = [prompt for _, prompt, _ in examples], [reference for *_, reference in examples]
        seeds = [distinct_seed(self.settings.seed, place) for place, *_ in examples]
        method = self.settings.sampling.or_else(GREEDY)
        predictions = self.generate_from_ids(prompts, method, self.text.max_new_tokens, seeds)
        groups = self.trainer.datamodule.val_groups(self.text.examples)
        documents = [groups[place] for place, *_ in examples]
        scores = text_scores(self.text.metrics, predictions, references, groups=documents)
        self.validation_examples = self._shown_examples(prompts, predictions, references)
        for name in [name for name, score in scores.items() if score.value is None]:
            texts = len(references)
            warn_once(f"val/{name} is not logged: none of the {texts} validation texts has anything of the kind")
        known = {f"val/{name}": (score.value, score.standard_error) for name, score in scores.items()}
        self.validation_errors = {name: error for name, (_, error) in known.items() if error is not None}
        return {name: value for name, (value, _) in known.items() if value is not None}

    def _shown_examples(self, prompts: list[list[int]], predictions: list[str], references: list[str]) -> list[Example]:
        """Return the first examples, with the score of the first metric if that is a mean over texts."""
        shown, metric = slice(SHOWN_EXAMPLES), self.text.metrics[0]
        scores = per_text_scores([metric], predictions[shown], references[shown]).get(metric)
        inputs = [self.tokenizer.decode(prompt) for prompt in prompts[shown]]
        rows = zip(inputs, predictions, references, scores or [None] * len(inputs), strict=False)
        return [Example(given, output, reference, metric, score) for given, output, reference, score in rows]

    # LoRA

    def _lora_config(self) -> LoraConfig:
        return LoraConfig(
            r=self.lora.rank,
            lora_alpha=self.lora.alpha,
            lora_dropout=self.lora.dropout,
            target_modules=LORA_LAYERS,
            task_type="CAUSAL_LM",
        )

    def _whole_state(self, first_rank_only: bool = False, computes: bool = False) -> dict[str, Tensor]:
        """Return the state of the base class, with each adapter's product added to the weight it adapts."""
        return self._exported_state(super()._whole_state(first_rank_only, computes))

    def _exported_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return merge_adapters(state, self.lora.alpha / self.lora.rank) if self.lora.rank else state

    def export_adapter(self, folder: Path, stored: dict[str, Any] | None = None) -> bool:
        """Write `adapter_model.safetensors` and `adapter_config.json` for a plain GPT-2, whose Conv1D is transposed."""
        if not self.lora.rank:
            return False
        with self.averaged_weights() if stored is None else nullcontext():
            weights = super()._whole_state() if stored is None else stored_weights(stored)
            whole = {name: tensor.clone() for name, tensor in weights.items() if ".lora_" in name}
        state = get_peft_model_state_dict(self.backbone.lm, state_dict=whole)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"base_model.model.{name}": t.detach().float().cpu().contiguous() for name, t in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self._lora_config()
        config.fan_in_fan_out = True
        config.inference_mode = True
        config.base_model_name_or_path = hub_id(self.settings.init)  # no path, which exists on this machine only
        config.save_pretrained(folder)
        return True
