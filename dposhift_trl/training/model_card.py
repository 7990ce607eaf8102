"""The sections that are added to TRL's model card."""

from pathlib import Path
from typing import Any

from ..artifacts import write_whole
from ..config import DPOShiftConfig
from ..report.verdict import verdict_of


CARD_METRICS = (
    "eval_loss",
    "eval_dpo_loss",
    "eval_rewards/accuracies",
    "eval_rewards/margins",
    "eval_logps/chosen",
    "eval_logps/rejected",
    "eval_displacement/chosen",
    "eval_displacement/rejected",
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def log_until(log_history: list[dict[str, Any]], checkpoint: str | None) -> list[dict[str, Any]]:
    """Log entries up to the step of a checkpoint, such as the best one; all entries if `checkpoint` is `None`."""
    if checkpoint is None:
        return log_history
    step = int(checkpoint.rsplit("-", 1)[-1])
    return [entry for entry in log_history if entry.get("step", 0) <= step]


def append_shift_section(
    args: DPOShiftConfig, log_history: list[dict[str, Any]], given_schedule: bool = False
) -> None:
    """
    Append the lambda schedule, the settings, the verdict and the last logged metrics to `README.md` in `output_dir`.

    Args:
        args ([`DPOShiftConfig`]):
            Settings of the run.
        log_history (`list[dict[str, Any]]`):
            `trainer.state.log_history`.
        given_schedule (`bool`, *optional*, defaults to `False`):
            Whether a callback passed to the trainer set lambda, instead of the settings.
    """
    latest: dict[str, float] = {}
    for entry in log_history:
        latest.update(entry)
    plan = args.lambda_plan
    settings: dict[str, Any] = {"lambda schedule": "a function of progress, given in code"}
    if not given_schedule:
        smallest, largest = plan.range
        settings["lambda schedule"] = args.lambda_schedule
        settings["lambda"] = smallest if smallest == largest else f"{smallest} to {largest}"
    if plan.adaptive:
        settings["lambda target"] = f"{args.lambda_target} ({args.lambda_target_metric})"
    settings |= {
        "beta": args.beta,
        "loss type": ", ".join(args.loss_type),
        "learning rate": args.learning_rate,
        "batch size per device": args.per_device_train_batch_size,
        "gradient accumulation": args.gradient_accumulation_steps,
        "max length": args.max_length,
        "seed": args.seed,
    }
    lines = [
        "",
        "## DPO-Shift",
        "",
        "Trained with DPO-Shift: the rejected log-ratio is multiplied by lambda, so that the log-probability of the "
        "chosen answers falls less than in DPO.",
        "",
        "| Setting | Value |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in settings.items()),
    ]
    if paragraph := verdict_of(log_history, None if given_schedule else plan):
        lines += ["", paragraph]
    metrics = [(name, latest[name]) for name in CARD_METRICS if name in latest]
    if metrics:
        lines += [
            "",
            f"Last logged metrics (step {latest.get('step')}; rewards unshifted, log-probabilities in nats):",
            "",
            "| Metric | Value |",
            "| --- | --- |",
            *(f"| `{name}` | {value:.4f} |" for name, value in metrics),
        ]
    _append(Path(args.output_dir), lines)


def append_recipe_section(folder: Path, recipe: str) -> None:
    """
    Append the resolved recipe, with the data and every setting, to `README.md` in `folder`.

    Args:
        folder (`Path`):
            Folder that contains the model of the stage.
        recipe (`str`):
            The resolved recipe as YAML.
    """
    _append(folder, ["", "## Recipe", "", "```yaml", recipe.rstrip(), "```"])


def _append(folder: Path, lines: list[str]) -> None:
    card = folder / "README.md"
    write_whole(card, card.read_text(encoding="utf-8").rstrip() + "\n" + "\n".join(lines) + "\n")
