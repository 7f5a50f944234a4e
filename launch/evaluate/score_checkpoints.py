"""Checkpoint scoring of evaluate.py: loss, teacher comparison, text metrics, decoding speed, zero-shot tasks."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError
from gpt2lab.evaluation import lm_eval_harness
from gpt2lab.keys import key, same_key
from gpt2lab.settings import AUTO, GREEDY, SAMPLING_PRESETS, SamplingSettings
from gpt2lab.system.terminal import Phase, track
from launch.config import plugins
from launch.config.key_value_cli import group_key
from launch.config.known_keys import RunningTextKeys
from launch.config.plain_keys import DataKeys, MachineKeys, RunKeys, TrainingKeys
from launch.config.targets import parse_permissions
from launch.evaluate import compared_models, eval_data
from launch.evaluate.compared_models import NamedModel
from launch.logging_setup import announce, configure_logging, silence_libraries

if TYPE_CHECKING:
    import torch

    from gpt2lab.evaluation.bootstrap import ResampledScore, TextScore
    from gpt2lab.evaluation.evaluation import Score
    from gpt2lab.evaluation.jackknife import DocumentDifference
    from gpt2lab.evaluation.teacher_student_eval import Comparison
    from gpt2lab.generation.decoding_speed import DecodingSpeed
    from gpt2lab.model.backbone import Backbone
    from launch.config.run_spec import RunSpec

PROMPT_TOKENS = 16  # prompt length for decoding speed
BATCH_SIZES = (1, 16)  # for decoding speed


@dataclass
class Arguments:
    """Command-line arguments of evaluate.py."""

    checkpoint: str = key("model: a run directory, a Hugging Face folder or a Hub id; several: commas or a pattern")
    teacher: str = key("teacher to compare with: a run directory, a Hugging Face folder or a Hub id", "")
    baseline: str = key("run directory of the same student trained without a teacher, for the gap closed", "")
    data: str = key("value of the group data; by default that of the first run, else stdlib", "")
    path: str = same_key(DataKeys, "path", "")
    val_path: str = same_key(DataKeys, "val_path", "")
    text_column: str = same_key(RunningTextKeys, "text_column", "")
    on_bad_line: str = same_key(DataKeys, "on_bad_line", "")
    source: str = same_key(DataKeys, "source", "")
    target: str = same_key(DataKeys, "target", "")
    context: int = key(
        "tokens per window; 0: the context of the run, else the positions of the model", 0, within="[0, inf)"
    )
    stride: int = key(
        "sliding window: tokens scored per window, the others are context; 0: no overlap", 0, within="[0, inf)"
    )
    split: str = key("data that is scored: the validation split, or all", "val", choices=("val", "all"))
    validate_tokens: int | str = same_key(TrainingKeys, "validate_tokens", "")
    texts: int = key("number of prompts whose completions are scored by text metrics; pairs", 64, within="[0, inf)")
    metrics: str = key("text metrics, separated by commas; pairs; by default those of the run or of the data", "")
    max_new_tokens: int = key(
        "maximum number of generated tokens per completion; 0: that of the run, else 64", 0, within="[0, inf)"
    )
    sampling: SamplingSettings = group_key(
        "choice of each token of a completion; pairs; auto: that of the run, else greedy", SAMPLING_PRESETS
    )
    decode: int = key(
        "number of tokens over which decoding speed is measured, with batch size 1 and 16; 0: off", 0, within="[0, inf)"
    )
    lm_eval: str = key("tasks of lm-evaluation-harness (an optional package), separated by commas", "")
    lm_eval_path: str = key("folder with your own tasks of lm-evaluation-harness", "")
    lm_eval_limit: int = key("examples per task of lm-evaluation-harness; 0: all", 0, within="[0, inf)")
    tokenizer: str = key("tokenizer: a folder or Hub id; by default that of each checkpoint", "")
    precision: str = key("dtype of the matrix products", "fp32", choices=("fp32", "bf16"))
    accelerator: str = same_key(MachineKeys, "accelerator", "auto")
    cache_dir: str = same_key(MachineKeys, "cache_dir", "")
    plugins: str = same_key(RunKeys, "plugins", "[]")
    allow_targets: str = same_key(RunKeys, "allow_targets", "[]")
    seed: int = key(
        "random seed of sampled completions, and of the drafts that measure acceptance",
        1337,
        within="[0, 9223372036854775807]",
    )
    json: str = key("file for every metric and its standard error", "")
    csv: str = key("file for a table of the metrics, one row per model", "")
    plot: str = key("file for a page (.html) that plots the metrics with their confidence intervals", "")


@dataclass
class Scored:
    """Results of one checkpoint.

    Attributes:
        source: run directory, Hugging Face folder or Hub id.
        score: loss, accuracy and calibration.
        comparison: comparison with the teacher; None without one.
        minus_first: difference to the first checkpoint paired by document, in nats, or in bits per byte if tokenizers
            differ; None if they did not score the same bytes.
        minus_teacher, minus_baseline: difference of the loss, paired by document.
        texts: text metrics of the completions, for pairs.
        minus_answers: difference of `texts` to those of trivial answers without a model, by the name of the answer.
        speeds: decoding speed by batch size.
        zero_shot: {task/metric: (value, standard error)}.
    """

    source: str
    score: "Score"
    comparison: "Comparison | None" = None
    minus_first: "DocumentDifference | None" = None
    minus_teacher: "DocumentDifference | None" = None
    minus_baseline: "DocumentDifference | None" = None
    texts: "dict[str, TextScore]" = field(default_factory=dict)
    minus_answers: "dict[str, dict[str, TextScore]]" = field(default_factory=dict)
    speeds: "list[DecodingSpeed]" = field(default_factory=list)
    zero_shot: dict[str, tuple[float, float | None]] = field(default_factory=dict)


@dataclass
class Results:
    """Results of all checkpoints.

    Attributes:
        baselines: text metrics of trivial answers without a model, by name (text_baselines.py).
        left_out: number of pairs that are not scored; None for running text.
        context: tokens of a window.
        data: the scored data, as key=value.
        sampling: decoding of the scored completions.
    """

    checkpoints: list[Scored]
    baselines: "dict[str, dict[str, TextScore]]"
    left_out: eval_data.SkippedPairs | None = None
    context: int = 0
    data: str = ""
    sampling: SamplingSettings = GREEDY


def evaluate(arguments: Arguments) -> Results:
    """Score all checkpoints.

    Raises:
        InputError: a checkpoint, data, column, task or device does not exist, or tokenizers differ.
    """
    checkpoints = compared_models.resolve_checkpoints(arguments.checkpoint)
    others = compared_models.resolve_models({key: vars(arguments)[key] for key in ("teacher", "baseline")})
    specs = _specs(arguments, checkpoints, others)
    configure_logging()
    announce(f"Loading {arguments.checkpoint}")  # the following imports take seconds: arguments are checked first
    from gpt2lab.data.document_groups import warn_of_few_groups
    from gpt2lab.evaluation.bootstrap import intervals
    from gpt2lab.evaluation.evaluation import paired_difference
    from gpt2lab.evaluation.jackknife import TOKENS
    from gpt2lab.system.device import resolve_device
    from gpt2lab.system.malloc_tuning import keep_freed_memory

    silence_libraries()
    device = resolve_device(arguments.accelerator)
    if device.type == "cpu":
        keep_freed_memory()
    scorers = [_Scorer(arguments, eval_data.with_device(own, device.type), device) for own in specs]
    for model, scorer in zip(checkpoints, scorers, strict=True):  # before the first is scored, which can take hours
        compared_models.check_vocabularies([model, *others], scorer.facts)
    left_out = None
    if scorers[0].has_pairs:
        sides = [scorer.data.sides(arguments.split == "all") for scorer in scorers]
        left_out = eval_data.keep_common_pairs(sides, specs[0].config.context)
    modules = [scorer.data for scorer in scorers]
    same_text = scorers[0].has_pairs or len({scorer.facts.hash for scorer in scorers}) == 1
    eval_data.choose_rows(modules, specs[0].config, same_text, is_given=bool(arguments.validate_tokens))
    described = eval_data.describe_data(specs[0].config, modules[0])
    results = Results([], {}, left_out, specs[0].config.context, described, scorers[0].sampling)
    tasks = lm_eval_harness.find_tasks(arguments.lm_eval, arguments.lm_eval_path) if arguments.lm_eval else None
    for scorer in scorers:  # scores are compared by metric
        scorer.metrics = list(dict.fromkeys(name for other in scorers for name in other.metrics))
    answers = scorers[0].trivial_answers()
    results.baselines = {name: intervals(scores) for name, scores in answers.items()}
    loaded = [compared_models.load(other) for other in track(others, "load the compared models", len(others))]
    for number, (model, scorer) in enumerate(zip(checkpoints, scorers, strict=True), 1):
        if len(checkpoints) > 1:
            scorer.label = f"{number}/{len(checkpoints)} {Path(model.source).name}: "
        results.checkpoints.append(scorer.score(model, loaded, tasks, answers))
        first, newest = results.checkpoints[0], results.checkpoints[-1]
        if newest is not first:
            newest.minus_first = paired_difference(newest.score, first.score)
        warn_of_few_groups(newest.score.sums[TOKENS])
    return results


def _specs(arguments: Arguments, checkpoints: list[NamedModel], others: list[NamedModel]) -> "list[RunSpec]":
    """Resolve the data of each checkpoint, and check all arguments that need no loaded model."""
    given = {key: vars(arguments)[key] for key in eval_data.DATA_KEYS}
    own_packages = parse_permissions(arguments.plugins, "plugins")
    permissions = [*parse_permissions(arguments.allow_targets), *own_packages]
    plugins.load(own_packages, permissions)
    given["validate_tokens"] = "full" if arguments.split == "all" else arguments.validate_tokens
    shared = eval_data.data_config(arguments.data, given, checkpoints[0].folder, arguments.context, permissions)
    positions = min(model.positions for model in checkpoints)
    context = min(shared.context or positions, positions) if not arguments.context else arguments.context
    if arguments.split == "all" and arguments.validate_tokens:
        raise InputError("split=all scores all of the data, so nothing reads validate_tokens.\nLeave one of them out.")
    shared = replace(shared, context=context)
    compared_models.check_context([*checkpoints, *others], shared.context)
    if arguments.stride > shared.context:
        raise InputError(f"stride={arguments.stride} leaves out tokens: it is above context={shared.context}.")
    for name in ("max_new_tokens", "decode"):
        if vars(arguments)[name] >= positions:
            raise InputError(f"{name}={vars(arguments)[name]} leaves no tokens for a prompt in {positions} positions.")
    specs = [eval_data.checkpoint_spec(shared, model.folder, arguments.tokenizer) for model in checkpoints]
    for own in specs:
        lm_eval_harness.check(arguments.lm_eval, own.config.objective.name)
        if arguments.stride and (not own.config.objective.kind.scores_all_text or own.config.packing):
            raise InputError("stride= (sliding-window evaluation) supports objective=clm without packing only.")
        if arguments.decode and own.config.objective.kind.fills_masks:
            raise InputError("decode= measures left-to-right decoding, which objective=mlm does not support.")
    if not arguments.lm_eval and (arguments.lm_eval_path or arguments.lm_eval_limit):
        raise InputError("lm_eval_path= and lm_eval_limit= need lm_eval=.\nGive its tasks, or leave them out.")
    if arguments.lm_eval_path and not Path(arguments.lm_eval_path).is_dir():
        raise InputError(f"lm_eval_path={arguments.lm_eval_path}: there is no such folder.\nGive one with task files.")
    if arguments.metrics:
        from gpt2lab.evaluation.text_metrics import TEXT_METRICS

        for name in arguments.metrics.split(","):
            if name not in TEXT_METRICS:
                raise InputError(f"metrics={name}: no such metric.\nAllowed: {', '.join(TEXT_METRICS)}.")
    return specs


class _Scorer:
    """Scores one checkpoint on the data, prepared with its tokenizer and objective.

    Attributes:
        label: name of the checkpoint before that of a phase on the terminal, if there are several.
        metrics: text metrics of pairs: those of the argument, else of the run, else of the data.
    """

    label = ""

    def __init__(self, arguments: Arguments, spec: "RunSpec", device: "torch.device") -> None:
        from gpt2lab.data.token_bytes import bytes_of_tokens
        from gpt2lab.data.tokenizer import load_tokenizer
        from launch.run.build import data_module

        self.arguments, self.config, self.device = arguments, spec.config, device
        self.sampling = arguments.sampling.or_else(spec.config.sampling).or_else(GREEDY)
        self.data = data_module(spec)
        self.facts = self.data.prepare()
        self.tokenizer = load_tokenizer(self.facts.tokenizer_folder)
        self.token_bytes = bytes_of_tokens(self.tokenizer)
        self.has_pairs = "prompt" in spec.config.data
        self.metrics: list[str] = arguments.metrics.split(",") if arguments.metrics else []
        if self.has_pairs and not self.metrics:
            self.metrics = spec.config.task.get("text", {}).get("metrics") or self.data.metrics
        if self.has_pairs and arguments.stride:
            raise InputError("stride= is for running text, but these data are pairs.\nLeave it out.")
        unread = [key for key in ("metrics", "max_new_tokens") if vars(arguments)[key] and not self.has_pairs]
        unread += ["sampling"] if arguments.sampling != AUTO and not self.has_pairs else []
        if unread:
            raise InputError(f"{unread[0]}= is for pairs, but these data are running text.\nLeave it out.")

    def score(
        self,
        model: NamedModel,
        others: "list[Backbone]",
        tasks: "lm_eval_harness.TaskSet | None",
        answers: "dict[str, dict[str, ResampledScore]]",
    ) -> Scored:
        """Compute all requested results of a checkpoint.

        Args:
            others: [], [teacher] or [teacher, baseline].
            answers: `trivial_answers`, which the completions are compared with; empty: none are scored.
        """
        from gpt2lab.evaluation.bootstrap import intervals, text_differences

        backbone = compared_models.load(model)
        found = self._compare(others, backbone, model.source)
        if answers:
            own = self._score_texts(self._completions(backbone))
            found.texts = intervals(own)
            found.minus_answers = {name: text_differences(own, scores) for name, scores in answers.items()}
        if self.arguments.decode:
            found.speeds = self._measure_speeds(backbone)
        if tasks is not None:
            announce(f"{self.label}lm_eval={self.arguments.lm_eval}")  # which shows its own progress
            found.zero_shot = lm_eval_harness.run_tasks(
                backbone.lm, self.tokenizer, tasks, self.arguments.lm_eval_limit
            )
        return found

    def trivial_answers(self) -> "dict[str, dict[str, ResampledScore]]":
        """Score answers without a model to the scored prompts, by name; empty where no texts are scored."""
        if not (self.has_pairs and self.arguments.texts and self.metrics):
            return {}
        from gpt2lab.evaluation.text_baselines import text_baselines

        sources, _ = self.data.val_texts(self.arguments.texts)
        answers = text_baselines(self.metrics, self.data.training_pairs())
        with Phase("baselines without a model"):
            return {name: self._score_texts([answer(source) for source in sources]) for name, answer in answers.items()}

    def _score_texts(self, texts: list[str]) -> "dict[str, ResampledScore]":
        """Return text metrics of one text per scored prompt."""
        from gpt2lab.evaluation.bootstrap import resampled_scores

        references = self.data.val_texts(self.arguments.texts)[1]
        return resampled_scores(self.metrics, texts, references, groups=self.data.val_groups(self.arguments.texts))

    def _compare(self, others: "list[Backbone]", backbone: "Backbone", source: str) -> Scored:
        import torch

        from gpt2lab.evaluation.evaluation import paired_difference, score
        from gpt2lab.evaluation.teacher_student_eval import compare

        autocast = torch.bfloat16 if self.arguments.precision == "bf16" else None
        if not others:
            return Scored(
                source, score(backbone, self._batches(), self.token_bytes, device=self.device, autocast=autocast)
            )
        comparison = compare(
            backbone,
            others[0],
            self._batches(),
            self.token_bytes,
            baseline=others[1] if len(others) > 1 else None,
            device=self.device,
            context=self.config.context,
            seed=self.arguments.seed,
            autocast=autocast,
        )
        found = Scored(source, comparison.student, comparison)
        found.minus_teacher = paired_difference(comparison.student, comparison.teacher)
        if comparison.baseline is not None:
            found.minus_baseline = paired_difference(comparison.student, comparison.baseline)
        return found

    def _completions(self, backbone: "Backbone") -> list[str]:
        from gpt2lab.generation.completion import complete, distinct_seed

        prompts = self.data.val_prompts(self.arguments.texts)
        default = self.config.task.get("text", {}).get("max_new_tokens", 64)
        # Seeds as in validation
        with Phase(f"{self.label}generate", len(prompts), "texts") as phase:
            completions = complete(
                backbone.lm,
                self.tokenizer,
                self.config.objective.name,
                prompts,
                self.sampling,
                max_new_tokens=self.arguments.max_new_tokens or min(default, backbone.shape.n_positions // 2),
                row_seeds=[distinct_seed(self.arguments.seed, number) for number in range(len(prompts))],
                on_texts=phase.advance,
            )
        return [self.tokenizer.decode(completion) for completion in completions]

    def _measure_speeds(self, backbone: "Backbone") -> "list[DecodingSpeed]":
        import numpy as np

        from gpt2lab.generation.decoding_speed import measure_decoding_speed

        count = min(max(BATCH_SIZES), len(self.data.val_samples))
        if self.has_pairs:
            prompts = self.data.val_prompts(count)
        else:
            rows = np.arange(count) * len(self.data.val_samples) // count
            prompts = self.data.val_samples.batch(rows, 0).input_ids.tolist()
        prompts = [prompt[:PROMPT_TOKENS] for prompt in prompts]
        return [
            measure_decoding_speed(
                backbone.lm,
                (prompts * batch)[:batch],
                tokens=self.arguments.decode,
                end_of_text=self.tokenizer.eos_token_id,
                vocab_size=len(self.tokenizer),
            )
            for batch in track(BATCH_SIZES, f"{self.label}decoding speed", len(BATCH_SIZES))
        ]

    def _batches(self) -> Iterator[Any]:
        """Iterate once over all batches of the split, and show the progress."""
        from gpt2lab.data.document_groups import MOST_GROUPS
        from gpt2lab.data.pair_file import share_groups

        all_text = self.arguments.split == "all"
        loaders: list[Any]
        if self.arguments.stride:
            loaders = self.data.sliding_batches(self.arguments.stride, all_text)
        else:
            loaders = [self.data.val_dataloader(), *([self.data.train_eval_dataloader()] if all_text else [])]
        if self.has_pairs and all_text:
            share_groups([file for file, _ in self.data.sides(all_text)])
        total = sum(len(loader) for loader in loaders)
        with Phase(f"{self.label}score", total, "batches") as phase:
            for number, loader in enumerate(loaders):
                for batch in loader:
                    # The loaders have separate documents, except pairs: one document may have pairs in both.
                    batch.documents += 0 if self.has_pairs else number * MOST_GROUPS
                    yield batch
                    phase.advance()
