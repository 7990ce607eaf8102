"""DPOShiftTrainer and ChosenSFTTrainer: the one file that touches TRL's internals."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from trl import DPOTrainer, SFTTrainer, extract_prompt

from .callbacks import LambdaScheduleCallback
from .config import DPOShiftConfig
from .losses import sequence_logps
from .metrics import PairScores, pair_metrics
from .model_card import append_shift_section
from .schedules import make_lambda_schedule


class TrainingStopped(ValueError):
    """Training stopped on purpose, for a reason that the message explains to the user."""


class DPOShiftTrainer(DPOTrainer):
    r"""
    Trainer for [DPO-Shift](https://huggingface.co/papers/2502.07599), a drop-in replacement for [`~trl.DPOTrainer`].

    The rejected log-ratio, policy and reference alike, is multiplied by lambda, which a [`LambdaScheduleCallback`]
    sets from the progress of training; loss types, logging and everything else are [`~trl.DPOTrainer`]'s:

    $$ \mathcal{L} = -\log \sigma(\beta\,(\Delta_w - \lambda_t\,\Delta_l)), \quad
       \Delta = \log\pi_\theta - \log\pi_{\mathrm{ref}} $$

    Takes the arguments of [`~trl.DPOTrainer`]. With [`DPOShiftConfig`] at lambda = 1 losses and weights equal its
    bit for bit, and metrics are means over pairs instead of means of batch means; with a plain [`~trl.DPOConfig`] it
    is [`~trl.DPOTrainer`] in everything.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from dposhift_trl import DPOShiftConfig, DPOShiftTrainer

    >>> trainer = DPOShiftTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=DPOShiftConfig(output_dir="qwen-shift", lambda_schedule="linear_decrease"),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ... )
    >>> trainer.train()
    ```

    Raises:
        TrainingStopped: On the first batch, if policy and reference disagree before the first step although no
            `ref_model` was passed.
    """

    _tag_names = ["trl", "dpo", "dpo-shift"]
    _name = "DPO-Shift"
    _paper = {
        "title": "DPO-Shift: Shifting the Distribution of Direct Preference Optimization",
        "id": "2502.07599",
    }

    def __init__(self, model, ref_model=None, args=None, *positional, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = DPOShiftConfig(f"{name.rstrip('/').split('/')[-1]}-DPO-Shift")
        self._shifts = isinstance(args, DPOShiftConfig)
        self._reference_is_policy = ref_model is None
        self._pair_scores: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        super().__init__(model, ref_model, args, *positional, **kwargs)
        if not self._shifts:
            return
        given = [cb for cb in self.callback_handler.callbacks if isinstance(cb, LambdaScheduleCallback)]
        if given:
            args.check_shift_has_meaning()
        else:
            given = [LambdaScheduleCallback(make_lambda_schedule(args))]
            self.add_callback(given[0])
        self.lambda_callback = given[0]

    @property
    def shift_lambda(self) -> float:
        """Lambda in force; its one writer is the [`LambdaScheduleCallback`]."""
        return self.lambda_callback.shift_lambda

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self._shifts:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scored = _ShiftedModel(self, model, inputs)
        # DPOTrainer takes the reference from its inputs, where `scored` lays it once the policy has been scored
        precomputed = self.precompute_ref_logps
        self.precompute_ref_logps = True
        try:
            result = super().compute_loss(scored, scored.inputs, return_outputs, num_items_in_batch)
        finally:
            self.precompute_ref_logps = precomputed
        assert scored.scores is not None
        self._record(scored.scores)
        return result

    def _record(self, scores: PairScores) -> None:
        mode = "train" if self.model.training else "eval"
        matrix = self.accelerator.gather_for_metrics(scores.as_matrix())
        if mode == "train" and self._reference_is_policy:
            self._check_reference_is_policy(matrix)
        self._pair_scores[mode].append(matrix)

    def _check_reference_is_policy(self, matrix: torch.Tensor) -> None:
        """Before the first step the policy is the reference, so that every lambda gives a loss of log 2."""
        self._reference_is_policy = False  # looked at once
        prompt_learning = is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning
        if self.state.global_step > 0 or not self.args.disable_dropout or prompt_learning:
            return
        scores = PairScores.from_matrices([matrix])
        half = self.args.bf16 or self.args.fp16 or self.model.dtype in (torch.float16, torch.bfloat16)
        tolerance = 0.02 if half else 1e-4
        for logps, logratios in (
            (scores.chosen_logps, scores.chosen_logratios),
            (scores.rejected_logps, scores.rejected_logratios),
        ):
            if (logratios.abs() > tolerance * logps.abs().clamp(min=1.0)).any():
                raise TrainingStopped(
                    "The reference is not the policy: before the first step their log-probabilities differ by up to "
                    f"{logratios.abs().max():.4g} nats an answer, so that the loss would not start at log 2. Without "
                    "`ref_model`, the reference is loaded from "
                    f"{self.model.config._name_or_path!r}, not copied from the model in memory. Save the fine-tuned "
                    "model and pass its folder as `model`, or pass the reference you want as `ref_model`."
                )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if self._pair_scores[mode]:
            scores = PairScores.from_matrices(self._pair_scores[mode])
            for name, value in pair_metrics(scores, self.beta).items():
                self._metrics[mode][name] = [value]
            self._pair_scores[mode].clear()
        super().log(logs, start_time)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name, dataset_name, tags)
        if self._shifts and self.is_world_process_zero():
            append_shift_section(self.args, self.state.log_history)


class _ShiftedModel:
    r"""
    The policy as [`~trl.DPOTrainer`] calls it, which also lays the references into the inputs, shifted.

    With \\( r' = \log\pi_l - \lambda(\log\pi_l - \log\pi_{\mathrm{ref},l}) \\) in place of the rejected
    reference, TRL's own \\( \log\pi_l - r' \\) is \\( \lambda\Delta_l \\), gradient included, whatever the loss
    type then makes of it.
    """

    def __init__(self, trainer: DPOShiftTrainer, model: torch.nn.Module, inputs: dict[str, Any]):
        self.trainer = trainer
        self.model = model
        self.inputs = dict(inputs)
        self.scores: PairScores | None = None

    def __call__(self, **kwargs):
        outputs = self.model(**kwargs)
        if kwargs.get("fused_lm_head"):
            self._score(outputs.log_probs)
        return outputs

    def _score(self, log_probs: torch.Tensor) -> None:
        trainer, inputs = self.trainer, self.inputs
        mask = inputs["completion_mask"][:, 1:]
        # Prompt-learning PEFT prepends virtual tokens to the outputs
        logps = sequence_logps(log_probs[:, -mask.size(1) :], mask, trainer.ld_alpha)
        chosen_logps, rejected_logps = logps.chunk(2)
        if "ref_chosen_logps" in inputs:
            ref_chosen_logps, ref_rejected_logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = trainer.model if trainer.ref_model is None else trainer.ref_model
            ref_chosen_logps, ref_rejected_logps = trainer.compute_ref_log_probs(reference, inputs)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref_chosen_logps, ref_rejected_logps
        shift_lambda = trainer.shift_lambda
        if shift_lambda != 1.0:
            inputs["ref_rejected_logps"] = rejected_logps - shift_lambda * (rejected_logps - ref_rejected_logps)
        chosen_tokens, rejected_tokens = mask.sum(dim=1).chunk(2)
        self.scores = PairScores(
            chosen_logps=chosen_logps,
            rejected_logps=rejected_logps,
            ref_chosen_logps=ref_chosen_logps,
            ref_rejected_logps=ref_rejected_logps,
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
            shift_lambda=torch.full_like(chosen_logps, shift_lambda),
        )


class ChosenSFTTrainer(SFTTrainer):
    r"""
    Trainer for stage 1, supervised fine-tuning on the chosen answers of preference data.

    $$ \mathcal{L} = -\frac{1}{|y_w|} \sum_i \log \pi_\theta(y_{w,i} \mid x, y_{w,<i}) $$

    Takes the arguments of [`~trl.SFTTrainer`]. Rows with `chosen` and `rejected`, and `prompt` explicit or implicit in
    both, become rows of `prompt` and `completion`, on which [`~trl.SFTTrainer`] takes the loss on the completion
    only; rows of any other kind pass unchanged.
    """

    def __init__(self, model, args=None, data_collator=None, train_dataset=None, eval_dataset=None, *rest, **kwargs):
        super().__init__(
            model, args, data_collator, _chosen_only(train_dataset), _chosen_only(eval_dataset), *rest, **kwargs
        )

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        return super().evaluate(_chosen_only(eval_dataset), *args, **kwargs)


def _chosen_only(dataset):
    if isinstance(dataset, dict):
        return type(dataset)({name: _chosen_only(rows) for name, rows in dataset.items()})
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    first: dict[str, Any] = next(iter(dataset), {})
    if "chosen" not in first or "rejected" not in first:
        return dataset
    if "prompt" not in first:
        dataset = dataset.map(extract_prompt)
    return dataset.map(lambda row: {"completion": row["chosen"]}, remove_columns=["chosen", "rejected"])
