"""The sections that are added to TRL's model card."""

from pathlib import Path
from typing import Any

from ..artifacts import write_whole
from ..config import DPOShiftConfig
from ..report.verdict import verdict_of
from .settings import LambdaInForce


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
    """
    Log entries that are about a checkpoint, such as the best one; all entries if `checkpoint` is `None`.

    They are those up to its step, and the evaluations after training, when it is loaded.
    """
    if checkpoint is None:
        return log_history
    step = int(checkpoint.rsplit("-", 1)[-1])
    end = max((index for index, entry in enumerate(log_history) if "train_runtime" in entry), default=len(log_history))
    return [entry for index, entry in enumerate(log_history) if entry.get("step", 0) <= step or index > end]


def append_shift_section(
    folder: Path, args: DPOShiftConfig, lambda_in_force: LambdaInForce, log_history: list[dict[str, Any]]
) -> None:
    """
    Append the lambda schedule, the settings, the verdict and the last logged metrics to `README.md`.

    Args:
        folder (`Path`):
            Folder of the card.
        args ([`DPOShiftConfig`]):
            Settings in force.
        lambda_in_force ([`~settings.LambdaInForce`]):
            What sets lambda.
        log_history (`list[dict[str, Any]]`):
            `trainer.state.log_history`.
    """
    latest: dict[str, float] = {}
    for entry in log_history:
        latest.update(entry)
    settings: dict[str, Any] = {"lambda schedule": lambda_in_force.schedule}
    if lambda_in_force.range is not None:
        smallest, largest = lambda_in_force.range
        settings["lambda"] = smallest if smallest == largest else f"{smallest} to {largest}"
    plan = lambda_in_force.plan
    if plan is not None and plan.adaptive:
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
    if verdict := verdict_of(log_history, plan):
        lines += ["", str(verdict)]
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
    _append(folder, lines)


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
