"""Scoring: what evaluate.py does — every checkpoint on the same texts, by loss, by what it writes, by how fast."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError
from launch.config.key_value_cli import argument
from launch.config.targets import parse_permissions
from launch.evaluate import compared_models, eval_data, lm_eval_harness
from launch.evaluate.compared_models import NamedModel
from launch.logging_setup import settle_library_noise, settle_noise

if TYPE_CHECKING:
    import torch

    from gpt2lab.evaluation.bootstrap import TextScore
    from gpt2lab.evaluation.evaluation import Score
    from gpt2lab.evaluation.jackknife import DocumentDifference
    from gpt2lab.evaluation.teacher_student_eval import Comparison
    from gpt2lab.generation.decoding_speed import DecodingSpeed
    from gpt2lab.model.backbone import Backbone
    from launch.config.run_spec import RunSpec

PROMPT_TOKENS = 16  # of a text whose continuation is timed
BATCHES = (1, 16)  # of which the speed of decoding is told


@dataclass
class Arguments:
    """What evaluate.py takes."""

    checkpoint: str = argument("a run directory, a Hugging Face folder or a Hub id; several: commas or a pattern")
    teacher: str = argument("compare with this model: a run directory, a Hugging Face folder or a Hub id", "")
    baseline: str = argument(
        "the student trained without the teacher: likewise; tells how much of the gap is closed", ""
    )
    data: str = argument("a value of conf/data; default: the first run's own, else stdlib", "")
    path: str = argument("file, folder or glob, for data=text, bin and pairs", "")
    val_path: str = argument("validation data of their own", "")
    source: str = argument("column of pairs", "")
    target: str = argument("column of pairs", "")
    context: int = argument("tokens of a window; 0: the run's own, else the model's positions", 0, at_least=0)
    stride: int = argument("windows overlap and score their last so many tokens; 0: they do not", 0, at_least=0)
    split: str = argument("the validation split, or all of the data", "val", choices=("val", "all"))
    texts: int = argument("pairs: so many prompts are answered and scored by the task's metrics", 64, at_least=0)
    metrics: str = argument("pairs: others than the task's, with commas: rougeL,chrf,exact …", "")
    max_new_tokens: int = argument("of an answer; 0: the run's own, else 64", 0, at_least=0)
    decode: int = argument("time how fast so many tokens are written, one text at a time and 16; 0: no", 0, at_least=0)
    lm_eval: str = argument("tasks of lm-evaluation-harness, with commas (an optional package)", "")
    lm_eval_path: str = argument("a folder with task files of your own", "")
    lm_eval_limit: int = argument("so many examples of each task; 0: all", 0, at_least=0)
    tokenizer: str = argument("folder or Hub id; default: each checkpoint's own", "")
    precision: str = argument("number format of the matrix products", "fp32", choices=("fp32", "bf16"))
    accelerator: str = argument("where to compute", "auto", choices=("auto", "cpu", "gpu", "mps"))
    cache_dir: str = argument("where prepared data lie; default: $GPT2LAB_CACHE, else ~/.cache/gpt2lab", "")
    allow_targets: str = argument(
        "packages of your own whose data classes the first run may build: [mypkg,other]", "[]"
    )
    seed: int = argument("of the drafts drawn to measure acceptance", 1337, at_least=0, at_most=2**63 - 1)
    json: str = argument("also write every figure and its standard error to this file", "")
    csv: str = argument("also write them as a table, a model a row", "")
    plot: str = argument("also draw them with their intervals, as a page (.html)", "")


@dataclass
class Scored:
    """What is known of one checkpoint.

    Attributes:
        source: as given.
        comparison: with the teacher, where there is one.
        minus_first: against the first checkpoint by document, in nats, or in bits per byte where tokens differ; None
            where they did not score the same bytes.
        minus_teacher, minus_baseline: the loss against theirs, by document.
        texts: metrics of what it wrote, for pairs.
        zero_shot: (value, standard error) by task/metric.
    """

    source: str
    score: "Score"
    comparison: "Comparison | None" = None
    minus_first: "DocumentDifference | None" = None
    minus_teacher: "DocumentDifference | None" = None
    minus_baseline: "DocumentDifference | None" = None
    texts: "dict[str, TextScore]" = field(default_factory=dict)
    speeds: "list[DecodingSpeed]" = field(default_factory=list)
    zero_shot: dict[str, tuple[float, float | None]] = field(default_factory=dict)


@dataclass
class Results:
    """Every checkpoint, and the task's metrics of answers without a model, by name (text_baselines.py).

    Attributes:
        left_out: what of the pairs is not scored; None for running text.
        data: what was read, as key=value.
    """

    checkpoints: list[Scored]
    baselines: "dict[str, dict[str, TextScore]]"
    left_out: eval_data.LeftOut | None = None
    context: int = 0
    data: str = ""


def evaluate(arguments: Arguments) -> Results:
    """Score the checkpoints as the arguments say.

    Raises:
        InputError: no such checkpoint, data, column, task or device, or models of different tokenizers.
    """
    checkpoints = compared_models.named_checkpoints(arguments.checkpoint)
    others = compared_models.named_models({key: vars(arguments)[key] for key in ("teacher", "baseline")})
    specs = _specs(arguments, checkpoints, others)
    settle_noise()  # what follows takes seconds to import; mistakes are told before
    from gpt2lab.data.document_groups import warn_of_few_groups
    from gpt2lab.evaluation.evaluation import paired_difference
    from gpt2lab.evaluation.jackknife import TOKENS
    from gpt2lab.system.device import named_device
    from gpt2lab.system.malloc_tuning import keep_freed_memory

    settle_library_noise()
    device = named_device(arguments.accelerator)
    if device.type == "cpu":
        keep_freed_memory()
    scorers = [_Scorer(arguments, eval_data.on_device(own, device.type), device) for own in specs]
    for model, scorer in zip(checkpoints, scorers, strict=True):  # of all before any is scored, which can take hours
        compared_models.check_vocabularies([model, *others], scorer.facts)
    left_out = None
    if scorers[0].has_pairs:
        sides = [scorer.data.sides(arguments.split == "all") for scorer in scorers]
        left_out = eval_data.keep_what_all_can_read(sides, specs[0].config.context)
    results = Results([], {}, left_out, specs[0].config.context, eval_data.in_words(specs[0].config))
    tasks = lm_eval_harness.named_tasks(arguments.lm_eval, arguments.lm_eval_path) if arguments.lm_eval else None
    loaded = [compared_models.loaded(other) for other in others]
    for model, scorer in zip(checkpoints, scorers, strict=True):
        results.checkpoints.append(scorer.scored(model, loaded, tasks))
        first, newest = results.checkpoints[0], results.checkpoints[-1]
        if newest is not first:
            newest.minus_first = paired_difference(newest.score, first.score)
        warn_of_few_groups(newest.score.sums[TOKENS])
        if not results.baselines and results.checkpoints[0].texts:
            results.baselines = scorer.baselines()
    return results


def _specs(arguments: Arguments, checkpoints: list[NamedModel], others: list[NamedModel]) -> "list[RunSpec]":
    """Of each checkpoint; all mistakes that can be seen without loading a model are told here."""
    given = {key: vars(arguments)[key] for key in eval_data.GIVEN}
    permissions = parse_permissions(arguments.allow_targets)
    shared = eval_data.data_config(arguments.data, given, checkpoints[0].folder, arguments.context, permissions)
    positions = min(model.positions for model in checkpoints)
    context = min(shared.context or positions, positions) if not arguments.context else arguments.context
    shared = replace(shared, context=context)
    compared_models.check_context([*checkpoints, *others], shared.context)
    if arguments.stride > shared.context:
        raise InputError(f"stride={arguments.stride} leaves out tokens between windows of {shared.context}.")
    for key in ("max_new_tokens", "decode"):
        if vars(arguments)[key] >= positions:
            raise InputError(f"{key}={vars(arguments)[key]} leaves no room for a prompt in {positions} positions.")
    specs = [eval_data.spec_of(shared, model.folder, arguments.tokenizer) for model in checkpoints]
    for own in specs:
        lm_eval_harness.check(arguments.lm_eval, own.config.objective.name)
        if arguments.stride and (not own.config.objective.kind.scores_all_text or own.config.packing):
            raise InputError("stride= is for objective=clm without packing: other windows are not to be slid over.")
        if arguments.decode and own.config.objective.kind.fills_masks:
            raise InputError("decode= times how a text is written on, which a model of objective=mlm does not do.")
    if not arguments.lm_eval and (arguments.lm_eval_path or arguments.lm_eval_limit):
        raise InputError("lm_eval_path= and lm_eval_limit= are of lm_eval=.\nName its tasks, or leave them out.")
    if arguments.lm_eval_path and not Path(arguments.lm_eval_path).is_dir():
        raise InputError(f"lm_eval_path={arguments.lm_eval_path}: there is no such folder.\nGive one with task files.")
    if arguments.metrics:
        from gpt2lab.evaluation.text_metrics import TEXT_METRICS

        for name in arguments.metrics.split(","):
            if name not in TEXT_METRICS:
                raise InputError(f"metrics={name}: no such metric.\nAllowed: {', '.join(TEXT_METRICS)}.")
    return specs


class _Scorer:
    """The texts as one checkpoint's tokenizer and objective cut them."""

    def __init__(self, arguments: Arguments, spec: "RunSpec", device: "torch.device") -> None:
        from gpt2lab.data.tokenizer import load_tokenizer
        from gpt2lab.evaluation.evaluation import bytes_of_tokens
        from launch.run.build import data_module

        self.arguments, self.config, self.device = arguments, spec.config, device
        self.data = data_module(spec)
        self.facts = self.data.prepare()
        self.tokenizer = load_tokenizer(self.facts.tokenizer_folder)
        self.token_bytes = bytes_of_tokens(self.tokenizer)
        self.has_pairs = "prompt" in spec.config.data
        if self.has_pairs and arguments.stride:
            raise InputError("stride= slides windows over running text, and these data are pairs.\nLeave it out.")
        unread = [key for key in ("metrics", "max_new_tokens") if vars(arguments)[key] and not self.has_pairs]
        if unread:
            raise InputError(f"{unread[0]}= is of answers to prompts, and these data are running text.\nLeave it out.")

    def scored(
        self, model: NamedModel, others: "list[Backbone]", tasks: "lm_eval_harness.NamedTasks | None" = None
    ) -> Scored:
        """Everything that was asked for; the others are the teacher and the baseline, as far as there are any."""
        backbone = compared_models.loaded(model)
        found = self._against(others, backbone, model.source)
        if self.has_pairs and self.arguments.texts and self._metrics:
            found.texts = self._written(backbone)
        if self.arguments.decode:
            found.speeds = self._speeds(backbone)
        if tasks is not None:
            found.zero_shot = lm_eval_harness.zero_shot(
                backbone.lm, self.tokenizer, tasks, self.arguments.lm_eval_limit
            )
        return found

    def baselines(self) -> "dict[str, dict[str, TextScore]]":
        """What answers without a model score, by name."""
        from gpt2lab.evaluation.bootstrap import text_scores
        from gpt2lab.evaluation.text_baselines import text_baselines

        answers = text_baselines(self._metrics, self.data.training_pairs())
        sources, references = self.data.val_texts(self.arguments.texts)
        return {
            name: text_scores(
                self._metrics, [answer(source) for source in sources], references, groups=self._text_groups()
            )
            for name, answer in answers.items()
        }

    @property
    def _metrics(self) -> list[str]:
        """Those that were named, else the run's own, else those of the data."""
        named = self.arguments.metrics.split(",") if self.arguments.metrics else []
        return named or self.config.task.get("text", {}).get("metrics") or self.data.metrics

    def _against(self, others: "list[Backbone]", backbone: "Backbone", source: str) -> Scored:
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

    def _written(self, backbone: "Backbone") -> "dict[str, TextScore]":
        from gpt2lab.evaluation.bootstrap import text_scores
        from gpt2lab.generation.completion import complete
        from gpt2lab.generation.sampling import GREEDY

        prompts = self.data.val_prompts(self.arguments.texts)
        most = self.config.task.get("text", {}).get("max_new_tokens", 64)
        answers = complete(
            backbone.lm,
            self.tokenizer,
            self.config.objective.name,
            prompts,
            GREEDY,
            max_new_tokens=self.arguments.max_new_tokens or min(most, backbone.shape.n_positions // 2),
        )
        _, references = self.data.val_texts(self.arguments.texts)
        decoded = [self.tokenizer.decode(answer) for answer in answers]
        return text_scores(self._metrics, decoded, references, groups=self._text_groups())

    def _text_groups(self) -> list[int]:
        """The document group of each text that is written."""
        return self.data.val_groups(self.arguments.texts)

    def _speeds(self, backbone: "Backbone") -> "list[DecodingSpeed]":
        import numpy as np

        from gpt2lab.generation.decoding_speed import decoding_speed

        count = min(max(BATCHES), len(self.data.val_samples))
        if self.has_pairs:
            prompts = self.data.val_prompts(count)
        else:
            rows = np.arange(count) * len(self.data.val_samples) // count
            prompts = self.data.val_samples.batch(rows, 0).input_ids.tolist()
        prompts = [prompt[:PROMPT_TOKENS] for prompt in prompts]
        return [
            decoding_speed(
                backbone.lm,
                (prompts * batch)[:batch],
                tokens=self.arguments.decode,
                end_of_text=self.tokenizer.eos_token_id,
                entries=len(self.tokenizer),
            )
            for batch in BATCHES
        ]

    def _batches(self) -> Iterator[Any]:
        """Every batch of the split once, with a progress bar where somebody watches."""
        from tqdm import tqdm

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
        with tqdm(total=total, desc="evaluating", unit="batch", disable=None, leave=False) as bar:
            for number, loader in enumerate(loaders):
                for batch in loader:
                    # Other documents than those of the side before; pairs of one file can lie on both sides.
                    batch.documents += 0 if self.has_pairs else number * MOST_GROUPS
                    yield batch
                    bar.update()
