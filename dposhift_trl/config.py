"""DPOShiftConfig: the lambda fields and every check of them."""

import difflib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl import DPOConfig

from .schedules import ADAPTIVE, LAMBDA_SCHEDULE_ALIASES, LAMBDA_SCHEDULES, LambdaPlan, check_knots


if TYPE_CHECKING:
    LambdaScheduleSpec = str | Sequence[Sequence[float]]
    AutoSpec = str | bool
else:
    AutoSpec = str
    LambdaScheduleSpec = str  # HfArgumentParser knows no union with a list; a list in JSON parses below

# Loss types that see the two answers only through the difference of their log-ratios
SHIFTABLE_LOSS_TYPES = frozenset({"sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm"})

TARGET_METRICS = ("displacement/chosen", "displacement/chosen_fell")

# Logged names of which a smaller value is the better model; accuracies, margins and log-probabilities grow
LOWER_IS_BETTER = re.compile(r"loss$|entropy$|runtime$|perplexity|fell$|rejected")


@dataclass
class DPOShiftConfig(DPOConfig):
    r"""
    Configuration class for the [`DPOShiftTrainer`].

    This class adds to [`~trl.DPOConfig`] the parameters of [DPO-Shift](https://huggingface.co/papers/2502.07599): the
    rejected log-ratio is multiplied by lambda, a function of training progress. `shift_lambda=1.0` is DPO.

    Parameters:
        lambda_schedule (`str` or `list[list[float]]`, *optional*, defaults to `"fixed"`):
            How lambda moves over the optimizer steps: `"fixed"`, `"linear_increase"`, `"linear_decrease"`,
            `"cosine_increase"`, `"cosine_decrease"`, or a list of `[progress, lambda]` knots joined by straight
            lines, progress being the share of the optimizer steps that are completed; or `"adaptive"`, which moves
            lambda between `lambda_min` and `lambda_max` so that the chosen answers stay at `lambda_target`.
        shift_lambda (`float`, *optional*, defaults to `0.95`):
            Lambda of the `"fixed"` schedule, in (0, 1]. `1.0` is plain DPO.
        lambda_min (`float`, *optional*, defaults to `0.75`):
            Lower end of the linear, cosine and adaptive schedules, in (0, 1].
        lambda_max (`float`, *optional*, defaults to `1.0`):
            Upper end of the linear, cosine and adaptive schedules, in (0, 1].
        lambda_target (`float`, *optional*, defaults to `0.0`):
            What the adaptive schedule holds: the mean chosen log-ratio, in nats an answer, where `0.0` says that the
            chosen answers are not to fall; or, by `lambda_target_metric`, the share of them that fell.
        lambda_target_metric (`str`, *optional*, defaults to `"displacement/chosen"`):
            Which of the logged metrics `lambda_target` is of: `"displacement/chosen"` or
            `"displacement/chosen_fell"`.
        allow_lambda_above_one (`bool`, *optional*, defaults to `False`):
            Whether lambda may exceed 1. Above 1 the rejected answers are pushed down harder than in DPO; the paper
            reports unreadable text at 1.05.
        shared_prompt (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether tokens that both answers of a pair share are read once and no padding is read: `"auto"` on CPUs
            where that is exact, with the reason logged where it is off; `True` to have an error there; `False` to read
            both rows padded, as stock DPO does, to which it is then equal bit for bit at lambda = 1.
        precompute_ref_log_probs (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether to score the reference once, before training, and keep the scores on disk for every run with the
            same reference, rows, lengths and precision: `"auto"` where the reference is frozen and without dropout,
            the data map-style and collated by TRL, the run sees each row at least once, and `shared_prompt` is not
            `False`. No reference model is then in memory while the policy trains; a `ref_model` that you pass waits
            on the CPU.
        max_tokens_per_batch (`int`, *optional*):
            Tokens up to which each batch of a device is filled, in place of `per_device_train_batch_size` pairs, each
            token that the answers of a pair share counted once. A step's loss is the mean over its pairs; their number
            varies. Needs the shared prompt.
        save_pair_scores (`bool`, *optional*, defaults to `True`):
            Whether each evaluation saves the log-probabilities and log-ratios of every pair, as
            `pairs/<prefix>-<step>.parquet` in `output_dir`, about 80 bytes a pair.

    Raises:
        ValueError: If a value is out of its range, or lambda can differ from 1 where a shift has no meaning: a loss
            type not built on the difference of log-ratios, an f-divergence other than reverse KL, `use_weighting`.
        TypeError: If a value is no number, or `lambda_schedule` neither a name nor a list of knots.
    """

    lambda_schedule: LambdaScheduleSpec = field(
        default="fixed",
        metadata={
            "help": "How lambda moves over the optimizer steps: `'fixed'`, `'linear_increase'`, `'linear_decrease'`, "
            "`'cosine_increase'`, `'cosine_decrease'`, or a list of `[progress, lambda]` knots joined by straight "
            "lines, progress being the share of the optimizer steps that are completed; or `'adaptive'`, which moves "
            "lambda between `lambda_min` and `lambda_max` so that the chosen answers stay at `lambda_target`.",
        },
    )
    shift_lambda: float = field(
        default=0.95,
        metadata={"help": "Lambda of the `'fixed'` schedule, in (0, 1]. `1.0` is plain DPO."},
    )
    lambda_min: float = field(
        default=0.75,
        metadata={"help": "Lower end of the linear, cosine and adaptive schedules, in (0, 1]."},
    )
    lambda_max: float = field(
        default=1.0,
        metadata={"help": "Upper end of the linear, cosine and adaptive schedules, in (0, 1]."},
    )
    lambda_target: float = field(
        default=0.0,
        metadata={
            "help": "What the adaptive schedule holds: the mean chosen log-ratio, in nats an answer, where `0.0` says "
            "that the chosen answers are not to fall; or, by `lambda_target_metric`, the share of them that fell."
        },
    )
    lambda_target_metric: str = field(
        default="displacement/chosen",
        metadata={
            "help": "Which of the logged metrics `lambda_target` is of: `'displacement/chosen'` or "
            "`'displacement/chosen_fell'`."
        },
    )
    allow_lambda_above_one: bool = field(
        default=False,
        metadata={
            "help": "Whether lambda may exceed 1. Above 1 the rejected answers are pushed down harder than in DPO; "
            "the paper reports unreadable text at 1.05."
        },
    )
    shared_prompt: AutoSpec = field(
        default="auto",
        metadata={
            "help": "Whether tokens that both answers of a pair share are read once and no padding is read: `'auto'` "
            "on CPUs where that is exact, with the reason logged where it is off; `True` to have an error there; "
            "`False` to read both rows padded, as stock DPO does, to which it is then equal bit for bit at lambda = 1."
        },
    )
    precompute_ref_log_probs: AutoSpec = field(
        default="auto",
        metadata={
            "nargs": "?",
            "const": "true",
            "help": "Whether to score the reference once, before training, and keep the scores on disk for every run "
            "with the same reference, rows, lengths and precision: `'auto'` where the reference is frozen and without "
            "dropout, the data map-style and collated by TRL, the run sees each row at least once, and "
            "`shared_prompt` is not `False`. No reference model is then in memory while the policy trains; a "
            "`ref_model` that you pass waits on the CPU.",
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens up to which each batch of a device is filled, in place of `per_device_train_batch_size` "
            "pairs, each token that the answers of a pair share counted once. A step's loss is the mean over its "
            "pairs; their number varies. Needs the shared prompt."
        },
    )
    save_pair_scores: bool = field(
        default=True,
        metadata={
            "help": "Whether each evaluation saves the log-probabilities and log-ratios of every pair, as "
            "`pairs/<prefix>-<step>.parquet` in `output_dir`, about 80 bytes a pair."
        },
    )

    def __post_init__(self):
        if not isinstance(self.allow_lambda_above_one, bool):
            raise TypeError(
                f"`allow_lambda_above_one` must be true or false, got {self.allow_lambda_above_one!r}. Leave it out "
                "to keep lambda in (0, 1]."
            )
        for name in ("shift_lambda", "lambda_min", "lambda_max"):
            setattr(self, name, self._checked_lambda(name, getattr(self, name)))
        if self.lambda_min > self.lambda_max:
            raise ValueError(
                f"`lambda_min` must not exceed `lambda_max`, got {self.lambda_min} and {self.lambda_max}. To decrease "
                "lambda over training keep min <= max and set `lambda_schedule: linear_decrease`."
            )
        self.lambda_schedule = self._checked_schedule(self.lambda_schedule)
        self._check_target()
        # `DPOTrainer` asks whether `precompute_ref_log_probs` is true, which `None` is not
        for name, automatic in (("shared_prompt", "auto"), ("precompute_ref_log_probs", None)):
            choices = {"auto": automatic, str(automatic).lower(): automatic, "true": True, "false": False}
            value = str(getattr(self, name)).lower()
            if value not in choices:
                raise ValueError(f"`{name}` must be auto, true or false, got {getattr(self, name)!r}.")
            setattr(self, name, choices[value])
        if self.max_tokens_per_batch is not None and (
            isinstance(self.max_tokens_per_batch, bool)
            or not isinstance(self.max_tokens_per_batch, int)
            or self.max_tokens_per_batch < 1
        ):
            raise ValueError(
                f"`max_tokens_per_batch` must be a whole number above 0, got {self.max_tokens_per_batch!r}. Write for "
                "example `max_tokens_per_batch: 4096`, or leave it out."
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "`train_sampling_strategy` must be random, sequential or group_by_length with pairs, got "
                "'batch_rebalance'. For batches of even cost set `max_tokens_per_batch`."
            )
        # Lambda moves, so the loss at lambda_t does not rank the checkpoints of a run; the loss at lambda = 1 does
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "dpo_loss"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = LOWER_IS_BETTER.search(str(self.metric_for_best_model)) is None
        super().__post_init__()
        if not self.always_dpo:
            self.validate_loss_supports_shift()

    @property
    def lambda_range(self) -> tuple[float, float]:
        """Smallest and largest lambda the schedule takes over training."""
        if self.lambda_schedule == "fixed":
            return self.shift_lambda, self.shift_lambda
        if isinstance(self.lambda_schedule, str):
            return self.lambda_min, self.lambda_max
        values = [value for _, value in self.lambda_schedule]
        return min(values), max(values)

    @property
    def lambda_plan(self) -> LambdaPlan:
        """What the verdict must know of lambda beside the metrics."""
        return LambdaPlan.of(vars(self))

    @property
    def always_dpo(self) -> bool:
        """Whether lambda is 1 throughout, which is plain DPO."""
        return self.lambda_range == (1.0, 1.0)

    def _checked_lambda(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"`{name}` must be a number, got {value!r}. Write for example `{name}: 0.95`.")
        if not 0 < value <= sys.float_info.max:
            raise ValueError(
                f"`{name}` must be finite and greater than 0, got {value!r}. At 0 the rejected answer would not be "
                "seen at all; the paper's range is 0.5 to 1."
            )
        if value > 1 and not self.allow_lambda_above_one:
            raise ValueError(
                f"`{name}` must not exceed 1, got {value!r}. Above 1 the rejected answers fall faster than in DPO and "
                "text degenerates; if you want that, set `allow_lambda_above_one: true`."
            )
        return float(value)

    def _check_target(self) -> None:
        if self.lambda_target_metric not in TARGET_METRICS:
            raise ValueError(
                f"`lambda_target_metric` must be one of {', '.join(TARGET_METRICS)}, got "
                f"{self.lambda_target_metric!r}."
            )
        target = self.lambda_target
        if isinstance(target, bool) or not isinstance(target, (int, float)):
            raise TypeError(
                f"`lambda_target` must be a number, got {target!r}. Write for example `lambda_target: 0.0`."
            )
        if not abs(target) <= sys.float_info.max:
            raise ValueError(
                f"`lambda_target` must be finite, got {target!r}. Write for example `lambda_target: 0.0`."
            )
        if self.lambda_target_metric.endswith("fell") and not 0 <= target <= 1:
            raise ValueError(
                f"`lambda_target` must lie in [0, 1] as the share of chosen answers that fell, got {target!r}. Write "
                "for example `lambda_target: 0.5`."
            )

    def _checked_schedule(self, schedule: Any) -> str | list[list[float]]:
        if isinstance(schedule, str) and schedule.lstrip().startswith("["):
            try:
                schedule = json.loads(schedule)  # as a command line passes it
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"`lambda_schedule` must be a name or a list of knots, got {schedule!r}, which is not valid JSON "
                    f"({error}). Write for example '[[0, 1.0], [1, 0.75]]'."
                ) from None
        if isinstance(schedule, str):
            schedule = LAMBDA_SCHEDULE_ALIASES.get(schedule, schedule)
            if schedule not in (*LAMBDA_SCHEDULES, ADAPTIVE):
                known = [*LAMBDA_SCHEDULES, ADAPTIVE, *LAMBDA_SCHEDULE_ALIASES]
                nearest = difflib.get_close_matches(schedule, known, n=1)
                raise ValueError(
                    f"`lambda_schedule` must be one of {', '.join([*LAMBDA_SCHEDULES, ADAPTIVE])} or a list of "
                    f"[progress, lambda] knots, got {schedule!r}."
                    + (f" Did you mean `{LAMBDA_SCHEDULE_ALIASES.get(nearest[0], nearest[0])}`?" if nearest else "")
                )
            return schedule
        return [
            [progress, self._checked_lambda("lambda_schedule", shift_lambda)]
            for progress, shift_lambda in check_knots(schedule)
        ]

    def validate_loss_supports_shift(self) -> None:
        """Raise a `ValueError` where no lambda but 1 has a meaning."""
        remedy = "Set `lambda_schedule: fixed` and `shift_lambda: 1.0` to train with plain DPO."
        alien = [name for name in self.loss_type if name not in SHIFTABLE_LOSS_TYPES | {"sft"}]
        if alien or set(self.loss_type) == {"sft"}:
            raise ValueError(
                f"`loss_type` must be built on the difference of log-ratios where lambda differs from 1, got "
                f"{self.loss_type!r}. Use {', '.join(sorted(SHIFTABLE_LOSS_TYPES))}, alone or mixed with `sft`. "
                f"{remedy}"
            )
        if self.f_divergence_type != "reverse_kl":
            raise ValueError(
                "`f_divergence_type` must be `reverse_kl` where lambda differs from 1, got "
                f"{self.f_divergence_type!r}: the shift is defined on log-ratios, not on other divergences' scores. "
                f"{remedy}"
            )
        if self.use_weighting:
            raise ValueError(
                "`use_weighting` must be false where lambda differs from 1, got True: WPO's weights and the shift "
                f"both rescale the pair, and their product is no published loss. {remedy}"
            )
