"""DPOShiftTrainer and ChosenSFTTrainer; with seam.py, the files that touch TRL's internals."""

import contextlib
import copy
import gc
import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from accelerate.data_loader import prepare_data_loader
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model, parse_flag_from_env
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id

from .. import __version__
from ..artifacts import PAIRS, write_whole
from ..columns import REFERENCE_LOGPS, ROW_INDEX, with_row_index
from ..config import DPOShiftConfig
from ..reference.cache import cached_reference_logps
from ..reference.fingerprint import reference_fingerprint, reference_key
from ..schedules import ADAPTIVE, make_lambda_schedule
from ..scoring import (
    BATCH,
    PREFIX,
    PairLayout,
    SharedPromptCollator,
    enable_shared_prompt,
    shared_prompt_obstacle,
    shared_prompt_scores,
    verify_shared_prompt,
)
from .allocator import keep_freed_memory
from .batching import SeededByEpoch, TokenBudgetSampler, pair_lengths
from .callbacks import AdaptiveLambdaCallback, LambdaScheduleCallback
from .collator import PairCollator
from .deferred import GatherLater
from .metrics import PairScores, evaluation_metrics, pair_metrics
from .model_card import append_shift_section, log_until
from .seam import Replay, ShiftedModel, TrainingStopped


logger = get_logger(__name__)


# Set by `accelerate launch`
LAUNCHED_SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")

# Releases whose DPOTrainer scores both answers through one call of a fused LM head that runs on a CPU too
TRL_WINDOW = "trl>=1.16,<1.17"


class DPOShiftTrainer(DPOTrainer):
    r"""
    Trainer for [DPO-Shift](https://huggingface.co/papers/2502.07599), a drop-in replacement for [`~trl.DPOTrainer`].

    The rejected log-ratio, policy and reference alike, is multiplied by lambda, which a [`LambdaScheduleCallback`]
    sets from the progress of training; loss types, logging and everything else are [`~trl.DPOTrainer`]'s:

    $$ \mathcal{L} = -\log \sigma(\beta\,(\Delta_w - \lambda_t\,\Delta_l)), \quad
       \Delta = \log\pi_\theta - \log\pi_{\mathrm{ref}} $$

    Takes the arguments of [`~trl.DPOTrainer`]. With [`DPOShiftConfig`] at lambda = 1 and `shared_prompt=False` losses
    and weights equal its bit for bit, and metrics are means over pairs instead of means of batch means; with a plain
    [`~trl.DPOConfig`] it trains and logs as [`~trl.DPOTrainer`] in everything.

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

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        *positional,
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = DPOShiftConfig(f"{name.rstrip('/').split('/')[-1]}-DPO-Shift")
        self._shifts = isinstance(args, DPOShiftConfig)
        if not self._shifts:
            # What it trains is DPO, which the model's tags and card are to say
            self._tag_names, self._name, self._paper = DPOTrainer._tag_names, DPOTrainer._name, DPOTrainer._paper
        else:
            train_dataset, eval_dataset = with_row_index(train_dataset), with_row_index(eval_dataset)
        asked = args.precompute_ref_log_probs
        measurable = self._shifts and _can_precompute(args, data_collator, train_dataset, eval_dataset)
        self._reference_is_policy, self._reference_is_at_hand = ref_model is None, False
        try:
            if asked == "auto":
                in_memory = not isinstance(model, str)
                adapted = (in_memory and is_peft_model(model)) or kwargs.get("peft_config") or any(positional[5:6])
                noisy = not args.disable_dropout and (adapted if ref_model is None else ref_model.training)
                args.precompute_ref_log_probs = measurable and not noisy and _pays_to_precompute(args, train_dataset)
                if args.precompute_ref_log_probs and in_memory and ref_model is None and not adapted:
                    # The policy may no longer be what lies in its folder, from where DPOTrainer takes the reference
                    ref_model = _reference_in_folder(model.config, model.dtype, args)
            super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, *positional, **kwargs)
        finally:
            args.precompute_ref_log_probs = asked
        if self._reference_is_policy and self.precompute_ref_logps and ref_model is not None:
            self.ref_model = ref_model = None
            self.accelerator.free_memory()  # which holds it too
            gc.collect()  # since its fused head makes it refer to itself
        schedules = [cb for cb in self.callback_handler.callbacks if isinstance(cb, LambdaScheduleCallback)]
        if not self._shifts:
            if schedules:
                raise ValueError(
                    f"`args` must be a `DPOShiftConfig` where a `{type(schedules[0]).__name__}` sets lambda, got a "
                    f"`{type(args).__name__}`, with which the trainer is TRL's. Pass `DPOShiftConfig(...)`."
                )
            return
        self._prepare_pairs()
        if args.max_tokens_per_batch is not None:
            self._token_sampler = self._make_token_sampler()
        self._pair_scores: dict[str, list[tuple[int, torch.Tensor]]] = {"train": [], "eval": []}
        self._counts_tokens = False
        self._pairs_per_batch: float | None = None
        self._eval_prefix = "eval"
        self._evaluated = self.eval_dataset
        self._seam_is_checked = False
        self._given_schedule = bool(schedules)
        if schedules:
            args.check_shift_has_meaning()
        elif args.lambda_schedule == ADAPTIVE:
            bounds = args.lambda_min, args.lambda_max
            target = args.lambda_target, args.lambda_target_metric
            self.add_callback(AdaptiveLambdaCallback(*target, *bounds))
        else:
            self.add_callback(LambdaScheduleCallback(make_lambda_schedule(args)))

    def _prepare_pairs(self) -> None:
        """How pairs are collated and scored; the reference is scored so too, before `DPOTrainer.__init__` ends."""
        if hasattr(self, "shares_prompts"):
            return
        self.shares_prompts = self._prepare_shared_prompt()
        collator = PairCollator(self.data_collator)
        self.data_collator: Any = SharedPromptCollator(collator) if self.shares_prompts else collator

    def _prepare_shared_prompt(self) -> bool:
        """Whether pairs are scored by the shared prompt; prepares policy and reference for it."""
        wanted = self.args.shared_prompt
        if wanted is False:
            logger.info("shared_prompt is off, as asked: rows are scored as DPOTrainer scores them, bit for bit")
            return False
        models = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        obstacle = self._shared_prompt_obstacle(models)
        if not isinstance(self.data_collator, DataCollatorForPreference):
            obstacle = obstacle or "the data collator is not TRL's, and may pad or cut rows in another way"
        if obstacle is None:
            try:
                for model in models:
                    enable_shared_prompt(model)
                ways = {verify_shared_prompt(model, self.accelerator.autocast): None for model in models}
            except ValueError as error:
                obstacle = str(error)
        if obstacle is None:
            logger.info(
                "shared_prompt is on: scores agree with those of padded rows to rounding, not bit for bit; attention: "
                + ", ".join(ways)
            )
            return True
        if wanted is True:
            raise ValueError(
                f"`shared_prompt` must be auto or false for this model, got True: {obstacle}. Leave it out to read "
                "both rows of a pair."
            )
        logger.warning(f"shared_prompt is off: {obstacle}")
        return False

    def _rounds_to_half(self, *models: torch.nn.Module) -> bool:
        half = any(model.dtype in (torch.float16, torch.bfloat16) for model in models)
        return half or self.accelerator.mixed_precision != "no"

    def _shared_prompt_obstacle(self, models: list[torch.nn.Module]) -> str | None:
        dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for model in models for m in model.modules())
        if (dropout and not self.args.disable_dropout) or any(map(_dropout_out_of_reach, models)):
            return "with dropout, each row draws its own mask"
        if self.args.neftune_noise_alpha:
            return "NEFTune scales its noise by the length of a row"
        if self._is_vision_dataset:
            return "the data set holds images"
        if self.aux_loss_enabled:
            return "its load-balancing loss counts every token of every row"
        if self._is_sharded:
            return "sharded models have not been verified"
        return next(filter(None, map(shared_prompt_obstacle, models)), None)

    def train(self, *args, **kwargs):
        if self._shifts and self.accelerator.device.type == "cpu":
            keep_freed_memory()
        return super().train(*args, **kwargs)

    @property
    def lambda_callback(self) -> LambdaScheduleCallback:
        """The one writer of lambda."""
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, LambdaScheduleCallback))

    @property
    def shift_lambda(self) -> float:
        """Lambda in force; its one writer is the [`LambdaScheduleCallback`]."""
        return self.lambda_callback.shift_lambda

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self._shifts:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        row_index, layout = inputs.pop(ROW_INDEX, None), inputs.pop("shared_prompt", None)
        if layout is None and self.shares_prompts:  # a stream's
            layout = PairLayout.from_batch({name: inputs[name].cpu() for name in BATCH}).to(self.accelerator.device)
        training = self.model.training
        scored = ShiftedModel(self, model, inputs, layout)
        accelerator = self.accelerator
        later = GatherLater(accelerator) if training else None
        try:
            self.accelerator = accelerator if later is None else later
            result = self._loss_of(scored, return_outputs)
        except KeyError as error:
            if error.args[0] == "ref_chosen_logps":
                raise self._misfit("its loss does not score the answers by a fused head") from error
            raise
        finally:
            self.accelerator = accelerator
        loss = result[0] if return_outputs else result
        scores = scored.scores
        scores.batch_loss = loss.detach().expand_as(scores.chosen_logps)
        if row_index is not None:
            scores.row_index = row_index[: len(scores.chosen_logps)]  # of a stream, chosen and rejected rows
        matrix = scores.as_matrix()
        if later is None:
            # Without the rows that fill up the last batch
            matrix = self.accelerator.gather_for_metrics(matrix)
        else:
            # With them, since they are learnt from
            (matrix,), value_of = later.resolve(matrix)
            for values in self._metrics["train"].values():
                values[-1] = value_of(values[-1])
            self._total_train_tokens = value_of(self._total_train_tokens)
        self._pair_scores[self._mode].append((self.state.global_step, matrix))
        if matrix.device.type == "cpu":
            self._stop_on_non_finite(newest=True)
        if not self._seam_is_checked:
            self._stop_on_non_finite(newest=True)
            self._check_seam(scored)
        if training:
            self.lambda_callback.observe(matrix)
        if training and self._reference_is_policy:
            self._check_reference_is_policy(matrix)
        if training and self._pairs_per_batch is not None:
            # So that a step's loss is the mean over its pairs, however they are spread over its batches
            loss = loss * (len(matrix) / self.accelerator.num_processes / self._pairs_per_batch)
        return (loss, result[1]) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._shifts and not self._counts_tokens:
            self._counts_tokens = True
            if self.state.global_step > 0:
                # After a resume, where DPOTrainer would count from zero
                logged = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
                self._total_train_tokens = int(logged[-1]) if logged else 0
        if self._shifts and self.args.max_tokens_per_batch is not None and batches:
            self._pairs_per_batch = sum(len(batch[ROW_INDEX]) for batch in batches) / len(batches)
        return batches, num_items

    def get_train_dataloader(self):
        if not self._shifts or self.args.max_tokens_per_batch is None:
            self.train_dataset = self._with_lengths(self.train_dataset)
            with self._collating(self.train_dataset):
                return super().get_train_dataloader()
        args = self.args
        loader = DataLoader(
            self._remove_unused_columns(self.train_dataset, description="Training"),
            batch_sampler=self._token_sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # The sampler knows its process, so that nothing is left to divide
        return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, put_on_device=True)

    def _make_token_sampler(self) -> TokenBudgetSampler:
        args, reason = self.args, None
        if not self.shares_prompts:
            reason = "where rows are padded (`shared_prompt` is off)"
        elif not isinstance(self.train_dataset, Dataset):
            reason = "with a stream, whose lengths are not known"
        elif self.args.train_sampling_strategy != "random":
            reason = f"with `train_sampling_strategy={self.args.train_sampling_strategy!r}`, which it replaces"
        if reason is None:
            check_rows_left(self.train_dataset, "train", args.max_length)
        else:
            raise ValueError(
                f"`max_tokens_per_batch` must be left out {reason}, got {self.args.max_tokens_per_batch}. Set "
                "`per_device_train_batch_size` instead."
            )
        return TokenBudgetSampler(
            pair_lengths(self.train_dataset, args.max_length, args.truncation_mode, shared=True),
            args.max_tokens_per_batch,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            seed=self._data_seed,
        )

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if self._shifts and isinstance(sampler, LengthGroupedSampler):
            # It would draw from the global generator, which a resumed run finds in another state
            return SeededByEpoch(sampler, self._data_seed)
        return sampler

    def get_eval_dataloader(self, eval_dataset=None):
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        eval_dataset = self._with_lengths(self.eval_dataset if eval_dataset is None else eval_dataset)
        with self._collating(eval_dataset):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._collating(test_dataset):
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _collating(self, dataset):
        """Of a stream one process collates for all, and accelerate cuts what is made of tensors alone, by rows."""
        collator: Any = self.data_collator
        if isinstance(dataset, IterableDataset) and self._shifts:
            self.data_collator = PairCollator(_inner_collator(collator), by_row=True)
        try:
            yield
        finally:
            self.data_collator = collator

    def _with_lengths(self, dataset):
        """Where transformers is to group pairs by length, the column in which it looks for that."""
        if not self._shifts:
            return dataset
        name = self.args.length_column_name
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, Dataset):
            return dataset
        if name in dataset.column_names:
            return dataset
        lengths = pair_lengths(dataset, self.args.max_length, self.args.truncation_mode, self.shares_prompts)
        return dataset.add_column(name, lengths)

    def _loss_of(self, scored: "ShiftedModel", return_outputs: bool = False):
        # DPOTrainer takes the reference from its inputs, where `scored` lays it once the policy has been scored
        precomputed = self.precompute_ref_logps
        self.precompute_ref_logps = True
        try:
            return super().compute_loss(scored, scored.inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed

    def _check_seam(self, scored: "ShiftedModel") -> None:
        """
        Check on the first batch what this class takes for granted of [`~trl.DPOTrainer`], which no version promises.

        Its loss is taken once more, as the sigmoid loss at lambda = 0.5, of log-probabilities moved off the reference,
        row by row by another factor, so that a mix-up of halves, references or lambda shows in loss and gradient.
        """
        self._seam_is_checked = True
        plain = {
            "loss_types": ["sigmoid"],
            "loss_weights": [1.0],
            "f_divergence_type": "reverse_kl",
            "use_weighting": False,
            "aux_loss_enabled": False,
            "_metrics": copy.deepcopy(self._metrics),
            "_total_train_tokens": copy.deepcopy(self._total_train_tokens),
        }
        own = {name: getattr(self, name) for name in plain}
        self.__dict__.update(plain)
        try:
            replay = Replay(self, scored)
            with torch.enable_grad():
                fault = replay.fault(self._loss_of(replay))
        finally:
            self.__dict__.update(own)
        if scored.calls != 1:
            fault = f"its loss calls the model {scored.calls} times"
        if fault is not None:
            raise self._misfit(fault)

    def _misfit(self, fault: str) -> TrainingStopped:
        return TrainingStopped(
            f"`trl` {trl.__version__} does not fit dposhift_trl {__version__}: {fault}. Install {TRL_WINDOW}, or a "
            "newer dposhift_trl."
        )

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _stop_on_non_finite(self, newest: bool = False) -> None:
        """Stop if a score recorded since the last log, or the newest, is not finite; waits for the device."""
        recorded, mode = self._pair_scores[self._mode], self._mode
        recorded = recorded[-1:] if newest else recorded
        if not recorded or torch.isfinite(torch.cat([matrix for _, matrix in recorded])).all():
            return
        for step, matrix in recorded:
            if not torch.isfinite(matrix).all():
                self._report_non_finite(PairScores.from_matrices([matrix]), mode, step)

    def _report_non_finite(self, scores: PairScores, mode: str, step: int) -> None:
        columns = {field.name: torch.isfinite(getattr(scores, field.name)) for field in fields(scores)}
        of_batch = columns.pop("batch_loss")
        finite = torch.stack(list(columns.values())).all(dim=0)
        finite = of_batch if finite.all() else finite  # the loss of a batch is bad where one of its pairs is
        rows = scores.row_index[~finite].long().tolist()
        folder = Path(self.args.output_dir) / f"non_finite_at_step_{step}"
        if self.is_world_process_zero():
            dataset = self.train_dataset if mode == "train" else self._evaluated
            if isinstance(dataset, dict):
                names = [name for name in dataset if self._eval_prefix.endswith(f"_{name}")]
                dataset = dataset[max(names, key=len)] if names else None
            texts = {}
            if isinstance(dataset, Dataset) and ROW_INDEX in dataset.column_names:
                places = {row: place for place, row in enumerate(dataset[ROW_INDEX])}
                texts = {row: dataset[places[row]] for row in rows if row in places}
            report = {
                "step": step,
                "split": mode,
                "lambda": self.shift_lambda,
                "learning_rate": self._get_learning_rate() if self.lr_scheduler is not None else None,
                "rows": [
                    {
                        **{field.name: getattr(scores, field.name)[place].item() for field in fields(scores)},
                        "row": {key: texts.get(row, {}).get(key) for key in ("prompt", "chosen", "rejected")},
                    }
                    for place, row in zip((~finite).nonzero().flatten().tolist(), rows, strict=True)
                ],
            }
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(_strict_json(report), indent=2, allow_nan=False)
            (folder / "rows.json").write_text(text, encoding="utf-8")
        raise TrainingStopped(
            f"The loss or a log-probability is not finite at step {step} ({mode}), rows "
            f"{rows}. Their scores and texts are in {folder / 'rows.json'}; checkpoints are as they were. Look for "
            "empty or very long answers there, lower the learning rate, or train in bf16 or float32 instead of fp16."
        )

    def _check_reference_is_policy(self, matrix: torch.Tensor) -> None:
        """Before the first step the policy is the reference, so that every lambda gives a loss of log 2."""
        self._reference_is_policy = False  # looked at once
        prompt_learning = is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning
        noisy = not self.args.disable_dropout or self.args.neftune_noise_alpha
        if self.state.global_step > 0 or noisy or prompt_learning:
            return
        scores = PairScores.from_matrices([matrix])
        tolerance = 0.02 if self._rounds_to_half(self.model) else 1e-4
        for logps, logratios in (
            (scores.chosen_logps, scores.chosen_logratios),
            (scores.rejected_logps, scores.rejected_logratios),
        ):
            if (logratios.abs() > tolerance * logps.abs().clamp(min=1.0)).any():
                raise TrainingStopped(
                    "The reference is not the policy: before the first step their log-probabilities differ by up to "
                    f"{logratios.abs().max():.4g} nats an answer, so that the loss would not start at log 2. "
                    f"{self._why_reference_is_not_policy()}"
                )

    def _why_reference_is_not_policy(self) -> str:
        """The likely cause, and what to do about it."""
        model = self.accelerator.unwrap_model(self.model)
        if names := _dropout_out_of_reach(model):
            return (
                f"`disable_dropout` does not reach {', '.join(names)}. Set it to 0 in the model's config, or set "
                "`disable_dropout=False` to train with all of its dropout."
            )
        if not is_peft_model(model):
            return (
                f"Without `ref_model`, the reference is loaded from {model.config._name_or_path!r}, not copied from "
                "the model in memory. Save the fine-tuned model and pass its folder as `model`, or pass the reference "
                "you want as `ref_model`."
            )
        if "ref" in model.peft_config:
            # DPOTrainer copies what is named `*.default.*`, and PEFT names some parameters `*.default`
            missing = [name for name, _ in model.named_parameters() if name.endswith(".default")]
            return (
                "Without `ref_model`, the reference is the copy of the adapter that TRL makes under the name `ref`"
                f"{f', which does not hold {missing[0]!r}' if missing else ''}. Pass the model with the adapter "
                "merged into it (`merge_and_unload()`) as `ref_model`."
            )
        settings = model.peft_config[model.active_adapters[0]].to_dict().items()
        start = [(name, value) for name, value in settings if re.fullmatch(r"init_(\w+_)?weights", name)]
        odd = next(((name, value) for name, value in start if value is not True), None)
        return (
            "Without `ref_model`, the reference is the model without its adapter, which does not start at zero"
            + (f" (`{odd[0]}={odd[1]!r}`). Set `{odd[0]}=True`, or pass" if odd else ". Pass")
            + " the model that the adapter was put on, loaded once more, as `ref_model`."
        )

    def compute_ref_log_probs(self, model, inputs):
        inputs = {key: value for key, value in inputs.items() if key != ROW_INDEX}
        layout = inputs.pop("shared_prompt", None)
        scored = model if layout is None else (lambda **kwargs: shared_prompt_scores(model, layout))
        return super().compute_ref_log_probs(scored, inputs)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        # Of a sharded reference each process holds a part, for which DPOTrainer has an engine of its own
        if isinstance(dataset, IterableDataset) and self._shifts and self.args.precompute_ref_log_probs == "auto":
            return dataset  # scored batch by batch
        if not self._shifts or isinstance(dataset, IterableDataset) or self._is_sharded:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        check_rows_left(dataset, name, self.args.max_length)
        self._prepare_pairs()
        if not isinstance(_inner_collator(self.data_collator), DataCollatorForPreference):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        # Left by another trainer, whose reference may have been another one
        known = [column for column in REFERENCE_LOGPS if column in dataset.features]
        dataset = dataset.remove_columns(known)
        model = self.model if self.ref_model is None else self.ref_model
        adapters = getattr(self.accelerator.unwrap_model(model), "peft_config", {})
        adapter = "ref" if self.ref_model is None and "ref" in adapters else None
        device = self.accelerator.device
        training = model.training
        _move(model, device).eval()

        def over(measure, what: str):
            """A function of a range of rows that calls `measure` batch by batch."""
            gather = self.accelerator.gather_for_metrics
            # Of its own, so that training draws the same numbers whether or not the scores were at hand
            generator = torch.Generator()

            def score(rows: range) -> tuple[torch.Tensor, torch.Tensor]:
                loader = DataLoader(
                    dataset.select(rows), batch_size, collate_fn=self.data_collator, generator=generator
                )
                progress = tqdm(
                    prepare_data_loader(loader, device, put_on_device=True),
                    desc=f"{what} ({name}, rows {rows.start} to {rows.stop} of {len(dataset)})",
                    disable=self.args.disable_tqdm or not self.is_world_process_zero(),
                )
                chosen, rejected = zip(*(gather(measure(batch)) for batch in progress), strict=True)
                return torch.cat(chosen), torch.cat(rejected)

            return score

        def key(kind: str) -> str:
            return reference_key(
                dataset,
                fingerprint,
                max_length=self.args.max_length,
                truncation_mode=self.args.truncation_mode,
                ld_alpha=self.ld_alpha,
                precision=f"{arithmetic}{kind}",
            )

        whole = self.accelerator.unwrap_model(model)
        base = whole.get_base_model() if adapters else whole
        # The code too: a release may mend a model, and the module of code from a repository names its revision
        arithmetic = ", ".join(
            (
                self.accelerator.mixed_precision,
                model.config._attn_implementation.removeprefix(PREFIX),
                device.type,
                torch.get_float32_matmul_precision(),
                transformers.__version__,
                type(base).__module__,
            )
        )

        fingerprint = self._reference_fingerprint = reference_fingerprint(whole, adapter)
        self._reference_dtype = model.dtype
        description = {"model": model.config._name_or_path, "adapter": adapter, "rows": name}
        columns = dict(
            zip(
                ("ref_chosen_logps", "ref_rejected_logps"),
                cached_reference_logps(
                    key(", shared prompt" if self.shares_prompts else ""),
                    len(dataset),
                    over(lambda batch: self.compute_ref_log_probs(model, batch), "Reference log-probabilities"),
                    description=description,
                ),
                strict=True,
            )
        )
        model.train(training)
        if self.ref_model is not None and not self._reference_is_at_hand:
            _move(model, "cpu")  # its scores are all that training needs of it
        for column, values in columns.items():
            dataset = dataset.add_column(column, values)
        return dataset

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self._shifts and ROW_INDEX not in self._signature_columns:
            self._signature_columns += [ROW_INDEX, self.args.length_column_name]

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        if not self._shifts:
            return super().evaluate(eval_dataset, *args, **kwargs)
        eval_dataset = with_row_index(eval_dataset)
        self._evaluated = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            self._evaluated = self.eval_dataset[eval_dataset]
        with self._reference_at_hand(eval_dataset):
            return super().evaluate(eval_dataset, *args, **kwargs)

    @contextlib.contextmanager
    def _reference_at_hand(self, rows):
        """For rows that were not scored beforehand, bring back the reference that `auto` has freed or put aside."""
        sets = list(rows.values()) if isinstance(rows, dict) else [rows]
        freed = self.args.precompute_ref_log_probs == "auto" and self.precompute_ref_logps
        unscored = freed and all(isinstance(dataset, (Dataset, IterableDataset)) for dataset in sets)
        given = self.ref_model
        if self._reference_is_at_hand or not unscored or (given is None and is_peft_model(self.model)):
            yield
            return
        self._reference_is_at_hand = True
        try:
            self.ref_model = _move(given or self._reloaded_reference(), self.accelerator.device)
            yield
        finally:
            self._reference_is_at_hand, self.ref_model = False, given
            if given is None:
                gc.collect()
            else:
                _move(given, "cpu")

    def predict(self, test_dataset, *args, **kwargs):
        if not self._shifts:
            return super().predict(test_dataset, *args, **kwargs)
        scored = isinstance(test_dataset, Dataset) and "ref_chosen_logps" in test_dataset.column_names
        with self._reference_at_hand(None if scored else test_dataset):
            return super().predict(test_dataset, *args, **kwargs)

    def _reloaded_reference(self) -> torch.nn.Module:
        fault = "the weights there are not those that training began with"
        try:
            reference = _reference_in_folder(self.model.config, self._reference_dtype, self.args)
            same = reference_fingerprint(reference) == self._reference_fingerprint
        except (OSError, ValueError) as error:
            same, fault = False, " ".join(str(error).split()).rstrip(".")
        if not same:
            raise ValueError(
                "`eval_dataset` must be given to the trainer, where the reference can no longer be loaded from "
                f"{get_config_model_id(self.model.config)!r}: {fault}. Pass these rows to `DPOShiftTrainer`, or set "
                "`precompute_ref_log_probs=False`."
            )
        add_fused_lm_head(reference)
        if self.shares_prompts:
            enable_shared_prompt(reference)
        return reference

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        if self._shifts:
            self._pair_scores["eval"].clear()
            self._eval_prefix = metric_key_prefix
        return super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._shifts:
            self._file_pair_metrics(logs, self._mode)
        super().log(logs, start_time)

    def _save_checkpoint(self, *args, **kwargs):
        if self._shifts:
            self._stop_on_non_finite()
        super()._save_checkpoint(*args, **kwargs)

    def _file_pair_metrics(self, logs: dict[str, float], mode: str) -> None:
        metrics = self._metrics[mode]
        if self._pair_scores[mode]:
            self._stop_on_non_finite()
            scores = PairScores.from_matrices([matrix for _, matrix in self._pair_scores[mode]])
            self._pair_scores[mode].clear()
            values = pair_metrics(scores, self.beta)
            if mode == "eval":
                values |= evaluation_metrics(scores, self.beta)
                if self.args.save_pair_scores and self.is_world_process_zero():
                    folder, name = Path(self.args.output_dir) / PAIRS, self._eval_prefix.replace("/", "_")
                    write_whole(folder / f"{name}-{self.state.global_step:06d}.parquet", scores.as_table())
            metrics |= {name: [value] for name, value in values.items()}
        _read_from_device(metrics)
        if mode == "eval" and self._eval_prefix != "eval":
            # DPOTrainer names the metrics of every evaluation set alike, so that the last set's would hide the others'
            logs.update({f"{self._eval_prefix}_{name}": sum(values) / len(values) for name, values in metrics.items()})
            metrics.clear()

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name, dataset_name, tags)
        if self._shifts and self.is_world_process_zero():
            best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
            append_shift_section(self.args, log_until(self.state.log_history, best), self._given_schedule)


def check_rows_left(rows: Dataset | IterableDataset, name: str, max_length: int | None) -> None:
    """
    Refuse rows of which tokenising has left none: TRL drops those whose prompt fills `max_length`, without a word.

    Raises:
        ValueError: If there is no row.
    """
    if next(iter(rows), None) is None:
        raise ValueError(
            f"the {name} rows must hold one whose prompt is shorter than `max_length`, got none, with {max_length} "
            "tokens. Raise `max_length`."
        )


def _can_precompute(args: DPOShiftConfig, data_collator, train_dataset, eval_dataset) -> bool:
    """Whether the reference's log-probabilities can be computed beforehand, and are sure to stay true."""
    sets = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
    rows = [dataset for dataset in sets if dataset is not None]
    if train_dataset is None or not all(isinstance(dataset, Dataset) for dataset in rows):
        return False
    images = any({"image", "images"} & set(dataset.column_names) for dataset in rows)
    sharded = args.fsdp or args.deepspeed or any(map(parse_flag_from_env, LAUNCHED_SHARDED))
    own = data_collator is not None and not isinstance(data_collator, DataCollatorForPreference)
    return not (images or sharded or own or args.sync_ref_model)


def _reference_in_folder(config, dtype: torch.dtype, args: DPOShiftConfig) -> torch.nn.Module:
    """The reference as DPOTrainer loads it for a policy with this config."""
    options = {
        "dtype": dtype,
        "attn_implementation": config._attn_implementation.removeprefix(PREFIX),
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }
    if args.world_size > 1:
        options["device_map"] = None
    return create_model_from_path(get_config_model_id(config), **options)


def _pays_to_precompute(args: DPOShiftConfig, train_dataset: Dataset) -> bool:
    """Whether the run sees each row at least once, and nobody asked for stock DPO's arithmetic."""
    if args.shared_prompt is False:
        return False
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.num_train_epochs >= 1 if args.max_steps <= 0 else args.max_steps * batch >= len(train_dataset)


def _inner_collator(collator: Any) -> Any:
    while isinstance(collator, (PairCollator, SharedPromptCollator)):
        collator = collator.collator
    return collator


def _move(model: Any, device: torch.device | str) -> Any:
    """To a device, but for a model that accelerate has spread over several, or whose numbers are of a device."""
    if getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False):
        return model
    return model.to(device)


def _strict_json(value: Any) -> Any:
    """What is not finite as text, since JSON has no number for it."""
    if isinstance(value, dict):
        return {key: _strict_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _dropout_out_of_reach(model: torch.nn.Module) -> list[str]:
    """
    Probabilities of dropout that a module holds as a number, as attention does, and not in an `nn.Dropout`, and the
    noise of routers.
    """
    found = {
        f"`{type(module).__name__}.{name}={value}`": None
        for module in model.modules()
        for name, entry in vars(module).items()
        if "drop" in name or "jitter" in name
        for value in (entry.values() if isinstance(entry, dict) else [entry])
        if isinstance(value, float) and value > 0
    }
    return list(found)


def _read_from_device(metrics: dict[str, list[Any]]) -> None:
    """Turn tensors among the values into numbers, in one transfer."""
    places = [(values, i) for values in metrics.values() for i, x in enumerate(values) if torch.is_tensor(x)]
    if places:
        numbers = torch.stack([values[i].double() for values, i in places]).tolist()
        for (values, i), number in zip(places, numbers, strict=True):
            values[i] = number
