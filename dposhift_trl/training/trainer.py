"""DPOShiftTrainer; with seam.py, the file that touches TRL's internals."""

import contextlib
import copy
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import get_config_model_id

from .. import __version__
from ..columns import (
    BATCH_KEYS,
    REFERENCE_LOGPS,
    ROW_INDEX,
    SHARED_PROMPT,
    STREAM_ROW_INDEX,
    TOKEN_COLUMNS,
    as_python_values,
    with_row_index,
)
from ..config import DPOShiftConfig
from ..scoring import PairLayout, shared_prompt_scores
from .batching import (
    SeededByEpoch,
    data_seed,
    make_token_sampler,
    token_budget_dataloader,
    with_lengths,
    without_lost_rows,
)
from .callbacks import (
    KeepFreedMemoryCallback,
    LambdaScheduleCallback,
    TokenCountCallback,
    check_schedules,
    configured_schedule,
    is_schedule,
)
from .checks import (
    TrainingStopped,
    check_embeddings,
    check_not_empty,
    check_reference,
    check_starts_at_reference,
    check_vocabularies,
    stop_on_non_finite,
)
from .collator import PairCollator
from .deferred import GatherLater, read_from_device
from .exact_resume import ExactResume
from .model_card import append_shift_section, log_until
from .recorder import PairRecorder, table_path
from .references import References, lack_scores
from .seam import Shift, ShiftedModel, seam_fault
from .settings import LambdaInForce, check_unchanged, name_best_metric, settings_read, warn_of_slow_precision
from .sharded import Sharded, runnable
from .sharing import draws_masks, prepare_shared_prompt
from .token_scores import save_token_scores
from .verdicts import Verdicts


logger = get_logger(__name__)

# Releases whose DPOTrainer scores both answers through one call of a fused LM head that runs on a CPU too
TRL_WINDOW = "trl>=1.16,<1.17"


class DPOShiftTrainer(ExactResume, Sharded, Verdicts, DPOTrainer):
    r"""
    Trainer for [DPO-Shift](https://huggingface.co/papers/2502.07599), a drop-in replacement for [`~trl.DPOTrainer`].

    The rejected log-ratio, policy and reference alike, is multiplied by lambda, which a [`LambdaScheduleCallback`]
    sets from the progress of training; loss types, logging and everything else are [`~trl.DPOTrainer`]'s:

    $$ \mathcal{L} = -\log \sigma(\beta\,(\Delta_w - \lambda_t\,\Delta_l)), \quad
       \Delta = \log\pi_\theta - \log\pi_{\mathrm{ref}} $$

    Takes the arguments of [`~trl.DPOTrainer`]. With [`DPOShiftConfig`] at lambda = 1 and `shared_prompt=False`, losses
    and weights equal those of [`~trl.DPOTrainer`] bit for bit, and metrics are means over pairs instead of means of
    batch means. With a plain [`~trl.DPOConfig`] it trains and logs exactly as [`~trl.DPOTrainer`].

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

    args: DPOShiftConfig
    data_collator: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DPOShiftConfig(f"{name.rstrip('/').split('/')[-1]}-DPO-Shift")
        if isinstance(data_collator, PairCollator):  # of another trainer
            data_collator = data_collator.collator
        check_schedules(args, callbacks or [])
        check_reference(ref_model)
        train_dataset, eval_dataset = as_python_values(train_dataset), as_python_values(eval_dataset)
        name_best_metric(args, eval_dataset)
        check_not_empty(train_dataset=train_dataset, eval_dataset=eval_dataset)
        self._shifts = isinstance(args, DPOShiftConfig)
        if self._shifts:
            # With an iterable training dataset, TRL turns dispatching off
            trains_on_stream = isinstance(train_dataset, IterableDataset)
            self._dispatches = not trains_on_stream and args.accelerator_config.dispatch_batches is not False
            train_dataset = with_row_index(train_dataset)
            eval_dataset = with_row_index(eval_dataset, self._dispatches)
        else:  # tags and card name what is trained
            self._tag_names, self._name, self._paper = DPOTrainer._tag_names, DPOTrainer._name, DPOTrainer._paper
        self._schedule_is_configured = False  # and not passed as a callback
        self._references = References(self)
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        check_embeddings(self.model)
        warn_of_slow_precision(self.model.dtype, self.accelerator)
        if not self._shifts:
            logger.warning(f"A `{type(args).__name__}` trains with plain DPO. To shift, pass a `DPOShiftConfig`.")
            return
        check_vocabularies(self.processing_class, self.accelerator.unwrap_model(self.model), ref_model)
        if not self._schedules:
            super().add_callback(configured_schedule(args))
            self._schedule_is_configured = True
        self.add_callback(TokenCountCallback())
        self.add_callback(KeepFreedMemoryCallback())
        self._args_in_force = settings_read(args)
        self._trained_lambda: LambdaInForce | None = None

        self._starts_at_reference = ref_model is None  # to be checked on the first batch
        self._seam_is_checked = False
        self._recorder = PairRecorder(self.beta)
        self._eval_prefix, self._evaluated_rows = "eval", self.eval_dataset
        self._pairs_per_batch: float | None = None

        with runnable(self.model, self.accelerator, shards=self.is_deepspeed_enabled) as policy:
            self.shares_prompts = self._prepare_shared_prompt()
            self.data_collator = PairCollator(self.data_collator, self.shares_prompts)
            self._token_sampler = make_token_sampler(self.train_dataset, args, self.accelerator, self.shares_prompts)
            self._references.prepare(policy, ref_model, quantization_config)

    def _prepare_shared_prompt(self) -> bool:
        models = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        trl_collates = isinstance(self.data_collator, DataCollatorForPreference)
        obstacles = {
            "with dropout, each row draws its own mask": draws_masks(models, self.args.disable_dropout),
            "NEFTune scales its noise by the length of a row": self.args.neftune_noise_alpha,
            "the dataset holds images": self._is_vision_dataset,
            "its load-balancing loss counts every token of every row": self.aux_loss_enabled,
            "`torch_compile` would compile it anew for every batch": self._compiles,
            "FSDP1 flattens the weights; write `fsdp_version: 2`": self.flattens_weights,
            "the data collator is not TRL's, and may pad or cut rows in another way": not trl_collates,
        }
        obstacle = next((reason for reason, holds in obstacles.items() if holds), None)
        return prepare_shared_prompt(self.args.shared_prompt, models, obstacle, self.accelerator.autocast)

    @property
    def _compiles(self) -> bool:
        # Also if `accelerate launch --dynamo_backend` asks for it
        return bool(self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _rounds_to_half(self) -> bool:
        return self.model.dtype in (torch.float16, torch.bfloat16) or self.accelerator.mixed_precision != "no"

    # Lambda

    @property
    def _schedules(self) -> list[LambdaScheduleCallback]:
        return [cb for cb in self.callback_handler.callbacks if isinstance(cb, LambdaScheduleCallback)]

    @property
    def lambda_callback(self) -> LambdaScheduleCallback:
        """The one writer of lambda."""
        if not self._schedules:
            raise AttributeError(
                "No callback sets lambda. Add a `LambdaScheduleCallback`."
                if self._shifts
                else "Lambda is set only with a `DPOShiftConfig`."
            )
        return self._schedules[0]

    @property
    def shift_lambda(self) -> float:
        """Lambda in force; its one writer is the [`LambdaScheduleCallback`]."""
        return self.lambda_callback.shift_lambda

    @property
    def lambda_in_force(self) -> LambdaInForce | None:
        """What sets lambda; after training, what has set it."""
        if not self._shifts:
            return None
        return self._trained_lambda or LambdaInForce.of(self._args_in_force, self.lambda_callback)

    def add_callback(self, callback: Any) -> None:
        """A [`LambdaScheduleCallback`] replaces the one made from the config, since lambda has one writer."""
        if is_schedule(callback):
            check_schedules(self.args, [*([] if self._schedule_is_configured else self._schedules), callback])
            callback = callback() if isinstance(callback, type) else callback
            for configured in self._schedules:
                self.remove_callback(configured)
            self._schedule_is_configured = False
        super().add_callback(callback)

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> Any:
        """Refuses settings that were changed too late, and notes those in force for the model card and trackers."""
        if self._shifts:
            check_unchanged(self.args, self._args_in_force)
            self._args_in_force = settings_read(self.args)
            self._trained_lambda = LambdaInForce.of(self.args, self.lambda_callback)
            self.args.reported_lambda = self._trained_lambda.settings
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Lambda enters here: TRL's loss finds the references shifted (seam.py), and each pair's scores are kept."""
        if not self._shifts:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        check_unchanged(self.args, self._args_in_force)
        inputs, training = dict(inputs), self.model.training
        row_index, layout = inputs.pop(ROW_INDEX, None), inputs.pop(SHARED_PROMPT, None)
        if layout is None and self.shares_prompts:  # of an iterable dataset
            layout = PairLayout.from_batch({name: inputs[name].cpu() for name in BATCH_KEYS})
            layout = layout.to(self.accelerator.device)
        shift = Shift(self.shift_lambda, self.ld_alpha, lambda: self._references.of_batch(inputs, layout))
        scored = self._shifted_model(model, inputs, shift, layout)
        gathers = GatherLater(self.accelerator) if training else None
        tokens = next(cb for cb in self.callback_handler.callbacks if isinstance(cb, TokenCountCallback))
        settings = {"accelerator": gathers or self.accelerator, "_total_train_tokens": tokens.num_tokens}
        view = self._view(**settings)
        try:
            result = super(DPOShiftTrainer, view).compute_loss(scored, inputs, return_outputs)
        except KeyError as error:
            if error.args[0] == REFERENCE_LOGPS[0]:
                raise _incompatible_trl_error("its loss does not score the answers by a fused head") from error
            raise
        self._take_over(view, except_for={"precompute_ref_logps", *settings})
        loss = result[0] if return_outputs else result
        scores = scored.scores
        scores.batch_loss = loss.detach().expand_as(scores.chosen_logps)
        if row_index is not None:
            scores.row_index = row_index[: len(scores.chosen_logps)]  # of an iterable dataset, one for each row
        matrix = scores.as_matrix()
        if gathers is None:
            matrix = self.accelerator.gather_for_metrics(matrix)
        else:  # keeps padding duplicates, which contribute to the loss
            (matrix,), value_of = gathers.resolve(matrix)
            for values in self._metrics["train"].values():
                values[-1] = value_of(values[-1])
            tokens.num_tokens = self._total_train_tokens = value_of(view._total_train_tokens)
        self._recorder.add(self._mode, self.state.global_step, matrix)
        if matrix.device.type == "cpu" or not self._seam_is_checked:
            self._stop_on_non_finite(self._mode, newest=True)
        if not self._seam_is_checked:
            self._check_seam(scored)
        if training:
            self.lambda_callback.observe(matrix)
            if self._starts_at_reference:
                self._check_starts_at_reference(matrix)
            if self._pairs_per_batch is not None:
                # So that a step's loss is the mean over its pairs, however they are spread over its batches
                loss = loss * (len(matrix) / self.accelerator.num_processes / self._pairs_per_batch)
        return (loss, result[1]) if return_outputs else loss

    def _shifted_model(
        self, model: Any, inputs: dict[str, Any], shift: Shift, layout: PairLayout | None
    ) -> ShiftedModel:
        """The policy as TRL's loss calls it, whose `scores` a subclass may take another loss of."""
        return ShiftedModel(model, inputs, shift, layout)

    def _view(self, **settings: Any) -> "DPOShiftTrainer":
        """
        A copy of this trainer on which TRL's loss is taken with other settings, so that none has to be changed back.

        The loss finds the references in its inputs, where [`~seam.ShiftedModel`] puts them.
        """
        view = copy.copy(self)
        for name, value in {"precompute_ref_logps": True, **settings}.items():
            setattr(view, name, value)
        return view

    def _take_over(self, view: "DPOShiftTrainer", except_for: set[str]) -> None:
        """Keeps the attributes that TRL's loss, or that of a subclass, has set on the copy."""
        for name, value in vars(view).items():
            if name not in except_for and (name not in vars(self) or vars(self)[name] is not value):
                setattr(self, name, value)

    def _check_seam(self, scored: ShiftedModel) -> None:
        """Checks on the first batch that TRL's loss is what seam.py takes for granted."""
        self._seam_is_checked = True
        view = self._view(
            loss_types=["sigmoid"],
            loss_weights=[1.0],
            f_divergence_type="reverse_kl",
            use_weighting=False,
            aux_loss_enabled=False,
            _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
            _total_train_tokens=0,
        )
        loss_of = super(DPOShiftTrainer, view).compute_loss
        if fault := seam_fault(scored, lambda replay: loss_of(replay, replay.inputs), self.beta):
            raise _incompatible_trl_error(fault)

    def _check_starts_at_reference(self, matrix: torch.Tensor) -> None:
        self._starts_at_reference = False  # checked once
        prompt_learning = is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning
        noisy = not self.args.disable_dropout or self.args.neftune_noise_alpha
        if self.state.global_step == 0 and not noisy and not prompt_learning:
            policy = self.accelerator.unwrap_model(self.model)
            check_starts_at_reference(matrix, policy, half_precision=self._rounds_to_half)

    def _stop_on_non_finite(self, mode: str, newest: bool = False) -> None:
        """Stops if a score recorded since the last log, or the newest, is not finite; waits for the device."""
        found = self._recorder.first_non_finite(mode, newest)
        if found is None:
            return
        step, scores = found
        rows = self.train_dataset if mode == "train" else self._evaluated_rows
        if isinstance(rows, dict):  # of several sets, the one whose name ends the prefix
            names = [name for name in rows if self._eval_prefix.endswith(f"_{name}")]
            rows = rows[max(names, key=len)] if names else None
        settings = {
            "lambda": self.shift_lambda,
            "learning_rate": self._get_learning_rate() if self.lr_scheduler is not None else None,
        }
        folder, save = Path(self.args.output_dir), self.is_world_process_zero()
        stop_on_non_finite(scores, step, mode, rows, folder, settings, save=save)

    # The reference

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Reads shared tokens once, if a layout is given, and passes over the row numbers."""
        inputs = {key: value for key, value in inputs.items() if key != ROW_INDEX}
        layout = inputs.pop(SHARED_PROMPT, None)
        scored = model if layout is None else (lambda **kwargs: shared_prompt_scores(model, layout))
        return super().compute_ref_log_probs(scored, inputs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Scores a dataset through the cache that all runs with the same reference and rows share."""
        if not self._shifts or not self._references.serves(dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        return self._references.score(dataset, name, batch_size)

    # Batches

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str
    ) -> Dataset | IterableDataset:
        """
        Takes rows that are tokens already, as a run's audit leaves them, and drops those that TRL drops.

        [`~trl.SFTTrainer`] does so by itself; [`~trl.DPOTrainer`] 1.16 would tokenize their text again.
        """
        if not set(TOKEN_COLUMNS) <= set(dataset.column_names or next(iter(dataset), {})):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return without_lost_rows(dataset, args.max_length, args.truncation_mode)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """Counts the pairs of an optimizer step, whose batches hold different numbers under a token budget."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._shifts and self._token_sampler is not None and batches:
            self._pairs_per_batch = sum(len(batch[ROW_INDEX]) for batch in batches) / len(batches)
        return batches, num_items

    def get_train_dataloader(self) -> DataLoader:
        """Fills batches by tokens if `max_tokens_per_batch` is set; the sampler divides them among processes."""
        if not self._shifts or self._token_sampler is None:
            return super().get_train_dataloader()
        rows = self._remove_unused_columns(self.train_dataset, description="Training")
        return token_budget_dataloader(rows, self._token_sampler, self.data_collator, self.args)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Draws the order of `group_by_length` from seed and epoch, so that a resumed run continues it."""
        if not self._shifts:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        sampler = super()._get_train_sampler(with_lengths(rows, self.args, self.shares_prompts))
        return SeededByEpoch(sampler, data_seed(self.args)) if isinstance(sampler, LengthGroupedSampler) else sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Groups pairs by their length in tokens."""
        rows = with_lengths(eval_dataset, self.args, self.shares_prompts) if self._shifts else eval_dataset
        return super()._get_eval_sampler(rows)

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the row numbers, and lengths that the user's rows bring along."""
        super()._set_signature_columns_if_needed()
        if self._shifts and ROW_INDEX not in self._signature_columns:
            self._signature_columns += [ROW_INDEX, STREAM_ROW_INDEX, self.args.length_column_name]

    # Evaluation, logs and artifacts

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Numbers the rows that are passed, and scores them by the reference even if it was put away."""
        if not self._shifts:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        eval_dataset = with_row_index(as_python_values(eval_dataset), self._dispatches)
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        passed = eval_dataset is not None and not isinstance(eval_dataset, str)
        with self._evaluating(rows), self._references.at_hand(needed=passed):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finished = not self.is_in_train or self.state.global_step >= self.state.max_steps
        if finished and self.args.save_pair_scores and not self.is_sharded:
            table = table_path(self.args.output_dir, metric_key_prefix, self.state.global_step)
            save_token_scores(self, self._references.model, rows, table)
        return metrics

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Numbers the rows that are passed, and scores them by the reference if they have no scores."""
        if not self._shifts:
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)
        test_dataset = with_row_index(as_python_values(test_dataset), self._dispatches)
        with self._evaluating(test_dataset), self._references.at_hand(needed=lack_scores(test_dataset)):
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    @contextlib.contextmanager
    def _evaluating(self, rows: Any) -> Iterator[None]:
        """The rows whose texts a report of scores that are not finite shows."""
        before, self._evaluated_rows = self._evaluated_rows, rows
        try:
            yield
        finally:
            self._evaluated_rows = before

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Starts the records of an evaluation anew, with the reference at hand for rows that it has not scored."""
        if not self._shifts:
            return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._recorder.clear("eval")
        self._eval_prefix = metric_key_prefix
        with self._references.at_hand(needed=lack_scores(dataloader.dataset)):
            return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replaces TRL's means of batch means by means over pairs, and adds the metrics of the shift."""
        if self._shifts:
            self._collect_metrics(logs, self._mode)
        super().log(logs, start_time)

    def _collect_metrics(self, logs: dict[str, float], mode: str) -> None:
        self._stop_on_non_finite(mode)
        metrics, prefix, table = self._metrics[mode], self._eval_prefix, None
        if mode == "eval" and self.args.save_pair_scores and self.is_world_process_zero():
            table = table_path(self.args.output_dir, prefix, self.state.global_step)
        taken = self._recorder.take_metrics(mode, table, self._evaluated_rows)
        metrics |= {name: [value] for name, value in taken.items()}
        read_from_device(metrics)
        if mode == "eval" and prefix != "eval":
            # DPOTrainer names the metrics of all evaluation sets alike, so the last set would hide the others
            logs.update({f"{prefix}_{name}": sum(values) / len(values) for name, values in metrics.items()})
            metrics.clear()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves no checkpoint after a score that is not finite."""
        if self._shifts:
            self._stop_on_non_finite("train")
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Leaves the frozen copy of an adapter, the reference, out of everything but checkpoints."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        copied = self.ref_model is None and is_peft_model(self.model) and "ref" in self.model.peft_config
        if copied and not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            shutil.rmtree(folder / "ref", ignore_errors=True)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Adds the settings in force, the verdict and the last metrics to TRL's card."""
        super().create_model_card(model_name, dataset_name, tags)
        in_force = self.lambda_in_force
        if in_force is not None and self.is_world_process_zero():
            best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
            log_history = log_until(self.state.log_history, best)
            append_shift_section(Path(self.args.output_dir), self._args_in_force, in_force, log_history)


def _incompatible_trl_error(fault: str) -> TrainingStopped:
    return TrainingStopped(
        f"`trl` {trl.__version__} is not compatible with dposhift_trl {__version__}: {fault}. Install {TRL_WINDOW}, "
        "or a newer dposhift_trl."
    )
