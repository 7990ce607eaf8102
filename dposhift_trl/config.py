"""DPOShiftConfig: DPOConfig with the settings of lambda, scoring and batching, and their checks."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl import DPOConfig

from .choices import CHOICES, choice_mistake
from .ranges import RANGES, check_ranges, range_mistake
from .schedules import ADAPTIVE, LAMBDA_SCHEDULE_ALIASES, LAMBDA_SCHEDULES, LambdaPlan, check_knots


if TYPE_CHECKING:
    LambdaScheduleSpec = str | Sequence[Sequence[float]]
    AutoSpec = str | bool
else:
    AutoSpec = str
    LambdaScheduleSpec = str  # HfArgumentParser supports no union with a list; a list is passed as JSON

# Loss types that depend on the two answers only through the difference of their log-ratios
SHIFTABLE_LOSS_TYPES = frozenset({"sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm"})

TARGET_METRICS = ("displacement/chosen", "displacement/chosen_fell")

# Logged metrics for which lower is better; higher is better for accuracies, margins and log-probabilities
LOWER_IS_BETTER = re.compile(r"loss$|entropy$|runtime$|perplexity|fell$|rejected")


@dataclass
class DPOShiftConfig(DPOConfig):
    r"""
    Configuration class for the [`DPOShiftTrainer`].

    This class adds the parameters of [DPO-Shift](https://huggingface.co/papers/2502.07599) to [`~trl.DPOConfig`]: the
    rejected log-ratio is multiplied by lambda, a function of training progress. `shift_lambda=1.0` is DPO.

    Parameters:
        lambda_schedule (`str` or `list[list[float]]`, *optional*, defaults to `"fixed"`):
            How lambda changes over the optimizer steps: `"fixed"`, `"linear_increase"`, `"linear_decrease"`,
            `"cosine_increase"`, `"cosine_decrease"`, `"adaptive"`, or a list of `[progress, lambda]` knots connected
            by straight lines, where progress is the share of completed optimizer steps. `"adaptive"` moves lambda
            between `lambda_min` and `lambda_max` to hold `lambda_target_metric` at `lambda_target`.
        shift_lambda (`float`, *optional*, defaults to `0.95`):
            Lambda of the `"fixed"` schedule, in (0, 1]. `1.0` is plain DPO.
        lambda_min (`float`, *optional*, defaults to `0.75`):
            Smallest lambda of the linear, cosine and adaptive schedules, in (0, 1].
        lambda_max (`float`, *optional*, defaults to `1.0`):
            Largest lambda of the linear, cosine and adaptive schedules, in (0, 1].
        lambda_target (`float`, *optional*, defaults to `0.0`):
            Target of the adaptive schedule. With `displacement/chosen`, the mean chosen log-ratio in nats per answer:
            `0.0` keeps the chosen answers as likely as under the reference. With `displacement/chosen_fell`, the share
            of chosen answers that fell.
        lambda_target_metric (`str`, *optional*, defaults to `"displacement/chosen"`):
            Logged metric that the adaptive schedule holds at `lambda_target`: `"displacement/chosen"` or
            `"displacement/chosen_fell"`.
        allow_lambda_above_one (`bool`, *optional*, defaults to `False`):
            Whether to allow lambda above 1. Above 1, rejected answers are pushed down harder than in DPO; the paper
            reports unreadable text at 1.05.
        shared_prompt (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether to read the tokens that both answers of a pair share once, without padding. `"auto"` does so if
            that is supported and exact, and logs the reason otherwise. `True` raises an error where it is not
            supported. `False` reads both rows padded, as DPOTrainer does; with lambda = 1, training then equals
            DPOTrainer bit for bit.
        precompute_ref_log_probs (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether to score the reference once, before training, and to keep the scores on disk for every run with the
            same reference, rows, lengths and precision. `"auto"` does so if the reference is frozen and has no
            dropout, the dataset is map-style and collated by TRL, the run sees each row at least once, and
            `shared_prompt` is not `False`. During training, no reference model is then in memory, and a `ref_model`
            passed to the trainer is on the CPU. `"auto"` is stored as `None`, which DPOTrainer reads as off.
        max_tokens_per_batch (`int`, *optional*):
            Maximum number of tokens per batch and device, instead of `per_device_train_batch_size` pairs. Tokens that
            both answers of a pair share count once. The number of pairs per step varies, and the loss is the mean over
            them. Requires the shared prompt.
        save_pair_scores (`bool`, *optional*, defaults to `True`):
            Whether to save the log-probabilities and log-ratios of every pair at each evaluation, as
            `pairs/<prefix>-<step>.parquet` in `output_dir`, about 80 bytes per pair. After training also those of each
            token of the 10 pairs that fell most and the 10 that rose most, in `pairs/tokens/`.
        print_verdict (`bool`, *optional*, defaults to `True`):
            Whether to print what the last evaluation shows, once after `train` and after each `evaluate` of your own.

    Raises:
        ValueError: If a value is out of range, or if lambda can differ from 1 with a loss that does not support it: a
            loss type that is not based on the difference of log-ratios, an f-divergence other than reverse KL, or
            `use_weighting`.
        TypeError: If a value has the wrong type.
    """

    lambda_schedule: LambdaScheduleSpec = field(
        default="fixed",
        metadata={
            "help": "How lambda changes over the optimizer steps: `'fixed'`, `'linear_increase'`, "
            "`'linear_decrease'`, `'cosine_increase'`, `'cosine_decrease'`, `'adaptive'`, or a list of "
            "`[progress, lambda]` knots connected by straight lines, where progress is the share of "
            "completed optimizer steps. `'adaptive'` moves lambda between `lambda_min` and `lambda_max` to "
            "hold `lambda_target_metric` at `lambda_target`.",
        },
    )
    shift_lambda: float = field(
        default=0.95,
        metadata={"help": "Lambda of the `'fixed'` schedule, in (0, 1]. `1.0` is plain DPO."},
    )
    lambda_min: float = field(
        default=0.75,
        metadata={"help": "Smallest lambda of the linear, cosine and adaptive schedules, in (0, 1]."},
    )
    lambda_max: float = field(
        default=1.0,
        metadata={"help": "Largest lambda of the linear, cosine and adaptive schedules, in (0, 1]."},
    )
    lambda_target: float = field(
        default=0.0,
        metadata={
            "help": "Target of the adaptive schedule. With `displacement/chosen`, the mean chosen log-ratio in nats "
            "per answer: `0.0` keeps the chosen answers as likely as under the reference. With "
            "`displacement/chosen_fell`, the share of chosen answers that fell.",
        },
    )
    lambda_target_metric: str = field(
        default="displacement/chosen",
        metadata={
            "help": "Logged metric that the adaptive schedule holds at `lambda_target`: `'displacement/chosen'` or "
            "`'displacement/chosen_fell'`.",
        },
    )
    allow_lambda_above_one: bool = field(
        default=False,
        metadata={
            "help": "Whether to allow lambda above 1. Above 1, rejected answers are pushed down harder than in DPO; "
            "the paper reports unreadable text at 1.05.",
        },
    )
    shared_prompt: AutoSpec = field(
        default="auto",
        metadata={
            "help": "Whether to read the tokens that both answers of a pair share once, without padding. `'auto'` "
            "does so if that is supported and exact, and logs the reason otherwise. `True` raises an error where it "
            "is not supported. `False` reads both rows padded, as DPOTrainer does; with lambda = 1, training then "
            "equals DPOTrainer bit for bit.",
        },
    )
    precompute_ref_log_probs: AutoSpec = field(
        default="auto",
        metadata={
            "nargs": "?",
            "const": "true",
            "help": "Whether to score the reference once, before training, and to keep the scores on disk for every "
            "run with the same reference, rows, lengths and precision. `'auto'` does so if the reference is "
            "frozen and has no dropout, the dataset is map-style and collated by TRL, the run sees each row "
            "at least once, and `shared_prompt` is not `False`. During training, no reference model is then "
            "in memory, and a `ref_model` passed to the trainer is on the CPU. `'auto'` is stored as `None`, "
            "which DPOTrainer reads as off.",
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens per batch and device, instead of `per_device_train_batch_size` pairs. "
            "Tokens that both answers of a pair share count once. The number of pairs per step varies, and "
            "the loss is the mean over them. Requires the shared prompt.",
        },
    )
    save_pair_scores: bool = field(
        default=True,
        metadata={
            "help": "Whether to save the log-probabilities and log-ratios of every pair at each evaluation, as "
            "`pairs/<prefix>-<step>.parquet` in `output_dir`, about 80 bytes per pair. After training also those of "
            "each token of the 10 pairs that fell most and the 10 that rose most, in `pairs/tokens/`.",
        },
    )
    print_verdict: bool = field(
        default=True,
        metadata={
            "help": "Whether to print what the last evaluation shows, once after `train` and after each `evaluate` "
            "of your own.",
        },
    )

    def __post_init__(self) -> None:
        self.reported_lambda: dict[str, Any] = {}  # set by the trainer if a callback has replaced the lambda settings
        self._check_lambda()
        self._check_lambda_target()
        self._check_batches()
        self.shared_prompt = _auto_or_bool("shared_prompt", self.shared_prompt, auto="auto")
        # DPOTrainer reads `None` as off
        self.precompute_ref_log_probs = _auto_or_bool(
            "precompute_ref_log_probs", self.precompute_ref_log_probs, auto=None
        )
        self._set_best_metric()
        check_ranges(self)
        super().__post_init__()
        self._check_loss()
        if not self.always_dpo:
            self.validate_loss_supports_shift()

    def to_dict(self) -> dict[str, Any]:
        """The settings as trackers log them: those of lambda as they are in force."""
        return super().to_dict() | self.reported_lambda

    @property
    def lambda_plan(self) -> LambdaPlan:
        """Lambda over the run, as far as the settings determine it."""
        return LambdaPlan.of(vars(self))

    @property
    def lambda_range(self) -> tuple[float, float]:
        """Smallest and largest lambda over the run."""
        return self.lambda_plan.range

    @property
    def always_dpo(self) -> bool:
        """Whether lambda is 1 throughout, which is plain DPO."""
        return self.lambda_range == (1.0, 1.0)

    def validate_loss_supports_shift(self) -> None:
        """
        Check that the loss is defined if lambda differs from 1.

        Raises:
            ValueError: If the loss type, the f-divergence or `use_weighting` does not support a shift.
        """
        remedy = "Set `lambda_schedule: fixed` and `shift_lambda: 1.0` to train with plain DPO."
        unsupported = [name for name in self.loss_type if name not in SHIFTABLE_LOSS_TYPES | {"sft"}]
        if unsupported or set(self.loss_type) == {"sft"}:
            raise ValueError(
                "`loss_type` must be based on the difference of log-ratios if lambda differs from 1, got "
                f"{self.loss_type!r}. Use {', '.join(sorted(SHIFTABLE_LOSS_TYPES))}, alone or combined with `sft`. "
                f"{remedy}"
            )
        if self.f_divergence_type != "reverse_kl":
            raise ValueError(
                "`f_divergence_type` must be `reverse_kl` if lambda differs from 1, got "
                f"{self.f_divergence_type!r}. The shift is defined for log-ratios, not for the scores of other "
                f"divergences. {remedy}"
            )
        if self.use_weighting:
            raise ValueError(
                "`use_weighting` must be false if lambda differs from 1, got True. WPO's weights and lambda both "
                f"rescale the pair, and no published loss combines them. {remedy}"
            )

    def _check_lambda(self) -> None:
        """Check the schedule and its values, and store them under their canonical names and as floats."""
        if not isinstance(self.allow_lambda_above_one, bool):
            raise TypeError(
                f"`allow_lambda_above_one` must be true or false, got {self.allow_lambda_above_one!r}. Remove it to "
                "keep lambda in (0, 1]."
            )
        for name in ("shift_lambda", "lambda_min", "lambda_max"):
            setattr(self, name, self._lambda(name, getattr(self, name)))
        if self.lambda_min > self.lambda_max:
            raise ValueError(
                f"`lambda_min` must not exceed `lambda_max`, got {self.lambda_min} and {self.lambda_max}. To decrease "
                "lambda over training, keep min <= max and set `lambda_schedule: linear_decrease`."
            )
        schedule = _parsed_schedule(self.lambda_schedule)
        if isinstance(schedule, str):
            self.lambda_schedule = schedule
        else:
            self.lambda_schedule = [[progress, self._lambda("lambda_schedule", x)] for progress, x in schedule]

    def _lambda(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"`{name}` must be a number, got {value!r}. Write for example `{name}: 0.95`.")
        if mistake := range_mistake("shift_lambda", value):
            raise ValueError(f"`{name}` {mistake}")
        if value > 1 and not self.allow_lambda_above_one:
            raise ValueError(
                f"`{name}` must not exceed 1, got {value!r}. Above 1, rejected answers fall faster than in DPO and "
                "generated text degenerates. To allow it, set `allow_lambda_above_one: true`."
            )
        return float(value)

    def _check_lambda_target(self) -> None:
        metric, target = self.lambda_target_metric, self.lambda_target
        if metric not in TARGET_METRICS:
            raise ValueError(f"`lambda_target_metric` must be one of {', '.join(TARGET_METRICS)}, got {metric!r}.")
        if isinstance(target, bool) or not isinstance(target, (int, float)):
            raise TypeError(
                f"`lambda_target` must be a number, got {target!r}. Write for example `lambda_target: 0.0`."
            )
        if mistake := range_mistake("lambda_target", target):
            raise ValueError(f"`lambda_target` {mistake}")
        if metric == "displacement/chosen_fell" and not 0 <= target <= 1:
            raise ValueError(
                f"`lambda_target` must be in [0, 1] with `lambda_target_metric: {metric}`, which is a share of the "
                f"chosen answers, got {target!r}. Write for example `lambda_target: 0.5`."
            )

    def _check_batches(self) -> None:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(
                f"`truncation_mode` must be `keep_start` or `keep_end`, got {self.truncation_mode!r}. Leave it out to "
                "keep the start."
            )
        budget = self.max_tokens_per_batch
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int)):
            allowed = RANGES["max_tokens_per_batch"]
            raise ValueError(f"`max_tokens_per_batch` must be {allowed.rule.words}, got {budget!r}. {allowed.advice}")
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "`train_sampling_strategy` must be random, sequential or group_by_length with pairs, got "
                "'batch_rebalance'. To balance the tokens of batches, set `max_tokens_per_batch`."
            )

    def _check_loss(self) -> None:
        """Check what DPOTrainer checks when it is created, or at the first batch, or not at all."""
        for name in ("loss_type", "f_divergence_type"):
            if mistake := choice_mistake(CHOICES[name], getattr(self, name)):
                raise ValueError(f"`{name}` {mistake}")
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise ValueError(
                "`label_smoothing` must be greater than 0 with `loss_type: exo_pair`, got 0.0. Write for example "
                "`label_smoothing: 0.001`."
            )
        if self.f_divergence_type != "reverse_kl" and not set(self.loss_type) <= SHIFTABLE_LOSS_TYPES | {"sft"}:
            raise ValueError(
                f"`f_divergence_type` must be `reverse_kl` with `loss_type: {self.loss_type}`, got "
                f"{self.f_divergence_type!r}. Remove it."
            )
        if self.use_weighting and {"aot", "aot_unpaired"} & set(self.loss_type):
            raise ValueError(
                f"`use_weighting` is not supported with `loss_type: {self.loss_type}`, got True. Remove it."
            )
        if self.loss_weights is not None and not any(self.loss_weights):
            raise ValueError(
                f"`loss_weights` must have a weight greater than 0, got {self.loss_weights}. Write for example "
                "`loss_weights: [1.0, 0.1]`."
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "`sync_ref_model` is not supported with `precompute_ref_log_probs: true`, which scores the reference "
                "only once, got True. Remove one of them."
            )

    def _set_best_metric(self) -> None:
        # Losses at different lambdas cannot be compared, so checkpoints are ranked by the loss at lambda = 1
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "dpo_loss"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = LOWER_IS_BETTER.search(str(self.metric_for_best_model)) is None


def _auto_or_bool(name: str, value: Any, auto: Any) -> Any:
    """`True`, `False`, or `auto` for the word "auto" and for itself."""
    choices = {"auto": auto, str(auto).lower(): auto, "true": True, "false": False}
    if str(value).lower() not in choices:
        raise ValueError(f"`{name}` must be auto, true or false, got {value!r}.")
    return choices[str(value).lower()]


def _parsed_schedule(schedule: Any) -> str | list[tuple[float, float]]:
    """The canonical name of a schedule, or its knots."""
    if isinstance(schedule, str) and schedule.lstrip().startswith("["):
        try:
            schedule = json.loads(schedule)  # from the command line
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"`lambda_schedule` must be a name or a list of knots, got {schedule!r}, which is not valid JSON "
                f"({error}). Write for example '[[0, 1.0], [1, 0.75]]'."
            ) from None
    if not isinstance(schedule, str):
        return check_knots(schedule)
    name = LAMBDA_SCHEDULE_ALIASES.get(schedule, schedule)
    if name not in (*LAMBDA_SCHEDULES, ADAPTIVE):
        known = [*LAMBDA_SCHEDULES, ADAPTIVE, *LAMBDA_SCHEDULE_ALIASES]
        nearest = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"`lambda_schedule` must be one of {', '.join([*LAMBDA_SCHEDULES, ADAPTIVE])} or a list of [progress, "
            f"lambda] knots, got {schedule!r}."
            + (f" Did you mean `{LAMBDA_SCHEDULE_ALIASES.get(nearest[0], nearest[0])}`?" if nearest else "")
        )
    return name
