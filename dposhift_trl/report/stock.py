"""The log of a stock `DPOTrainer`, of TRL, LLaMA-Factory, or axolotl: its rewards over beta are log-ratios."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ..artifacts import ArtifactError, read_mapping, read_text
from .errors import ReportError
from .files import number


LOGRATIOS = {"displacement/chosen": "rewards/chosen", "displacement/rejected": "rewards/rejected"}
MEANS = (*LOGRATIOS, *LOGRATIOS.values(), "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")

# Names of beta and of the loss: of LLaMA-Factory, axolotl (also `trl.beta`), and TRL
BETAS = ("pref_beta", "rl_beta", "dpo_beta", "beta")
LOSSES = ("pref_loss", "loss_type", "dpo_loss_type", "rl")
SIGMOID = ("sigmoid", "dpo")
PER_TOKEN = "ipo"  # LLaMA-Factory and earlier releases of TRL divide its log-probabilities by the number of tokens
WITHOUT_REFERENCE = ("simpo", "orpo", "cpo")  # their rewards are log-probabilities
SECTIONS = ("trl", "dpo", "method")  # in which the settings may be, besides the file itself
CARD = "README.md"
SETTINGS = r"args|config|recipe|settings|params"  # in the name of a JSON file; in others `beta` may be a token
LARGEST_FILE = 200_000  # bytes; settings are small, vocabularies are not
OF_THE_MODEL = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")
LAST_LOGS = 10  # of training, whose mean stands in for an evaluation


def find_beta(history: Sequence[Mapping[str, Any]], folder: Path, beta: float | None) -> tuple[float, str]:
    """
    Beta of a stock trainer's run, and where it is from.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            The log.
        folder (`Path`):
            Output folder, whose text files may name beta and the loss.
        beta (`float`, *optional*):
            Beta if the user gave it.

    Raises:
        ReportError: If beta is unknown, or if the rewards are not relative to a reference, or may be per token.
    """
    settings = settings_of(folder)
    for loss, file in settings.losses.items():
        if loss in WITHOUT_REFERENCE:
            raise ReportError(
                f"{folder}: the loss must have a reference, got {loss} ({file}), whose rewards are not log-ratios. "
                f"{_DIAGNOSE}"
            )
        if loss == PER_TOKEN:
            raise ReportError(
                f"{folder}: the loss must not be {loss} ({file}), with which many releases log rewards per token, so "
                f"nats per answer cannot be known. {_DIAGNOSE}"
            )
    if beta is None and len(settings.betas) != 1:
        named = ", ".join(f"{value:g} ({file})" for value, file in settings.betas.items())
        raise ReportError(
            f"{folder} is a run of a stock `DPOTrainer`, whose log has rewards and no log-ratios. {_known(history)} "
            + (f"Its files name different betas: {named}." if named else "No text file in it names beta.")
            + " Pass --beta, for example --beta 0.1."
        )
    if beta is None:
        beta, source = next(iter(settings.betas.items()))
    else:
        others = [f"{file} says {value:g}" for value, file in settings.betas.items() if value != beta]
        source = "; ".join(["from --beta", *others])
    if _has_no_reference(history, beta):
        raise ReportError(
            f"{folder}: the rewards are beta {beta:g} times the log-probabilities, so the run had no reference, and "
            f"there are no log-ratios. {_DIAGNOSE}"
        )
    others = [f"{loss} ({file})" for loss, file in settings.losses.items() if loss not in SIGMOID]
    return beta, "; ".join([source, *(f"the loss is {loss}" for loss in others)])


def _known(history: Sequence[Mapping[str, Any]]) -> str:
    """What the log says without beta: the direction in which the chosen answers moved."""
    rewards = [
        value
        for entry in history
        for name in entry
        if name.endswith("rewards/chosen") and math.isfinite(value := number(entry[name]))
    ]
    if not rewards:
        return "None of them is finite."
    return (
        f"The last reward of the chosen answers, {rewards[-1]:+.3g}, says that they became "
        f"{'less' if rewards[-1] < 0 else 'more'} likely; by how many nats depends on beta."
    )


_DIAGNOSE = "`python -m dposhift_trl.diagnose` scores the models themselves."


def is_stock(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a log has rewards and no log-ratios."""
    names = {name for entry in history for name in entry}
    return any(name.endswith("rewards/chosen") for name in names) and not any(
        name.endswith("displacement/chosen") for name in names
    )


def with_log_ratios(history: Sequence[Mapping[str, Any]], beta: float) -> list[dict[str, Any]]:
    """The log with `displacement/chosen` and `displacement/rejected`: the rewards divided by beta."""
    found = []
    for entry in history:
        added = {
            name.removesuffix(reward) + logratio: number(value) / beta
            for name, value in entry.items()
            for logratio, reward in LOGRATIOS.items()
            if name.endswith(reward)
        }
        found.append({**entry, **added})
    return found


def _has_no_reference(history: Sequence[Mapping[str, Any]], beta: float) -> bool:
    """Whether the rewards are beta times the log-probabilities themselves, as without a reference."""
    pairs = [
        (number(entry["rewards/chosen"]), beta * number(entry["logps/chosen"]))
        for entry in history
        if {"rewards/chosen", "logps/chosen"} <= entry.keys()
    ]
    return bool(pairs) and all(math.isclose(*pair, rel_tol=1e-3) for pair in pairs)


def mean_of_last_logs(history: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], list[float]]:
    """Means of the last logs of training, in place of an evaluation, and the steps of these logs."""
    logs = [entry for entry in history if "displacement/chosen" in entry][-LAST_LOGS:]
    means = {}
    for name in MEANS:
        values = [value for entry in logs if math.isfinite(value := number(entry.get(name)))]
        if values:
            means[name] = math.fsum(values) / len(values)
    return means, [entry["step"] for entry in logs]


@dataclass
class Settings:
    """
    Beta and loss, as the text files of a folder name them.

    Args:
        betas (`dict[float, str]`):
            Each beta, with the file that names it.
        losses (`dict[str, str]`):
            Each loss, with the file that names it.
    """

    betas: dict[float, str] = field(default_factory=dict)
    losses: dict[str, str] = field(default_factory=dict)


def settings_of(folder: Path) -> Settings:
    """Read beta and loss from the settings and the model card in a trainer's output folder. Nothing is unpickled."""
    found = Settings()
    for path in sorted(folder.iterdir()):
        for settings in _mappings(path):
            for place in (settings, *(settings[name] for name in SECTIONS if isinstance(settings.get(name), dict))):
                for name in BETAS:
                    beta = number(place.get(name))
                    if math.isfinite(beta) and beta > 0 and not isinstance(place[name], bool):
                        found.betas.setdefault(beta, path.name)
                for name in LOSSES:
                    losses = place.get(name)
                    for loss in losses if isinstance(losses, list) else [losses]:
                        if isinstance(loss, str):
                            found.losses.setdefault(loss, path.name)
    return found


def _mappings(path: Path) -> Iterator[dict[str, Any]]:
    """The mappings in a file of settings, or in the YAML blocks and table of a model card."""
    try:
        if not path.is_file() or path.name in OF_THE_MODEL or path.stat().st_size > LARGEST_FILE:
            return
        if path.suffix in (".yaml", ".yml") or (path.suffix == ".json" and re.search(SETTINGS, path.name)):
            yield read_mapping(path)
        elif path.name == CARD:
            text = read_text(path)
            for value in re.findall(r"^\| beta \| ([\d.e-]+) \|$", text, re.MULTILINE):
                yield {"beta": float(value)}
            for block in re.findall(r"^```ya?ml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
                content = YAML(typ="safe", pure=True).load(block)
                if isinstance(content, dict):
                    yield content
    except (ArtifactError, OSError):
        return
    except Exception:  # the YAML library converts some values unchecked
        return
