"""`next_steps.md` in the run folder: what to do with the model, as commands that can be pasted."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..artifacts import (
    EVAL_ROWS,
    FINISHED,
    MERGED,
    NEXT_STEPS,
    PAIRS,
    PREFERENCES,
    START,
    WANDB_ID,
    ArtifactError,
    read_mapping,
    read_rows,
    write_whole,
)
from ..config import DPOShiftConfig
from ..hub import repo_name
from ..identity import ADAPTER_CONFIG
from ..recipe import Recipe


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that `--max-lora-rank` takes
TASKS = "arc_easy,hellaswag,truthfulqa_mc2"
# Of a stage's folder, what is not the model
NOT_UPLOADED = (
    f"{PREFIX_CHECKPOINT_DIR}-*/*",
    f"{PAIRS}/*",
    f"{MERGED}/*",
    START,
    FINISHED,
    WANDB_ID,
    TRAINING_ARGS_NAME,
)
REMOTE_CODE = "--trust-remote-code"  # of models that come with Python code
MERGE = (
    "import sys; from peft import AutoPeftModelForCausalLM; from transformers import AutoTokenizer; "
    "adapter, merged, *flags = sys.argv[1:]; remote = dict(trust_remote_code=bool(flags)); "
    "AutoTokenizer.from_pretrained(adapter, **remote).save_pretrained(merged); "
    "AutoPeftModelForCausalLM.from_pretrained(adapter, **remote).merge_and_unload().save_pretrained(merged)"
)


@dataclass(frozen=True)
class Model:
    """
    A model that commands name.

    Args:
        place (`str`):
            Absolute folder, or name on the Hub.
        base (`str`, *optional*), rank (`int`, *optional*):
            Base model and rank, if it is an adapter.
    """

    place: str
    base: str | None = None
    rank: int | None = None

    @classmethod
    def at(cls, place: str) -> "Model":
        """The model in a folder or on the Hub."""
        folder = Path(place)
        if not folder.is_dir():
            return cls(place)
        try:
            settings = read_mapping(folder / ADAPTER_CONFIG)
        except ArtifactError:
            return cls(str(folder.resolve()))
        base, rank = settings.get("base_model_name_or_path"), settings.get("r")
        base = str(Path(base).resolve()) if isinstance(base, str) and Path(base).exists() else base
        return cls(str(folder.resolve()), str(base), rank if isinstance(rank, int) else None)

    @property
    def whole(self) -> str:
        """Where the model is without an adapter, once that is merged."""
        return self.place if self.base is None else str(Path(self.place, MERGED))


@dataclass
class Section:
    """A heading, a few sentences, and commands, one line each."""

    heading: str
    text: str
    commands: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        block = ["", "```bash", *self.commands, "```"] if self.commands else []
        return "\n".join([f"## {self.heading}", "", self.text, *block, ""])


def write_next_steps(recipe: Recipe, base: str, tokenizer: PreTrainedTokenizerBase) -> Path:
    """
    Write `next_steps.md`, and the evaluated pairs in RewardBench's format if they are conversations.

    Args:
        recipe ([`~recipe.Recipe`]):
            Recipe of a run whose stages are finished.
        base (`str`):
            Name or folder of the model that the first stage started from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the last stage.

    Returns:
        `Path`: The file.
    """
    folder = recipe.output_dir.resolve()
    places = [base, *(str(folder / name) for name in recipe.stages)]
    models = [Model.at(place) for place in places]
    rows = folder / EVAL_ROWS
    pairs = conversations(read_rows(rows)) if rows.is_file() else []
    if pairs and tokenizer.chat_template is not None:
        write_whole(folder / PREFERENCES, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    sections = _sections(recipe, models[-1], models[-2], folder, tokenizer.chat_template is not None)
    path = folder / NEXT_STEPS
    write_whole(path, "\n".join([f"# Next steps with {recipe.run_name}", "", *map(str, sections)]))
    return path


def conversations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs as RewardBench reads them, each answer with its prompt. None unless all rows are conversations."""
    if not all(isinstance(row[name], list) for row in rows for name in ("prompt", "chosen", "rejected")):
        return []
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]


def command(*words: object) -> str:
    """A command for a shell."""
    return shlex.join(map(str, words))


def _sections(recipe: Recipe, policy: Model, reference: Model, folder: Path, chats: bool) -> Iterator[Section]:
    name, *_, last = recipe.run_name, *recipe.stages
    args = recipe.stages[last]
    compared = isinstance(args, DPOShiftConfig)
    models = [policy, reference] if compared else [policy]
    remote = [REMOTE_CODE] if recipe.model.trust_remote_code else []
    unmerged = [model for model in models if model.base is not None and not Path(model.whole).is_dir()]
    if unmerged:
        yield Section(
            "Merge the adapter",
            "Most of the commands below read a whole model. With `model.merge_adapter: true`, a run merges by itself.",
            [command("python", "-c", MERGE, model.place, model.whole, *remote) for model in unmerged],
        )
    if chats:
        yield Section(
            "Chat",
            "The first command serves the model, the second one, in another terminal, chats with it. Both need `pip "
            'install "transformers[serving]"`.',
            [command("transformers", "serve", policy.whole, *remote), command("transformers", "chat", policy.whole)],
        )
    yield _vllm(policy, repo_name(f"{name}-{last}"), chats, remote)
    yield Section(
        "Score with lm_eval",
        'Needs `pip install "lm_eval[hf]"`; `lm_eval ls tasks` lists the tasks.'
        + (" The second command scores the model that this stage started from." if compared else ""),
        [_lm_eval(model, folder / "lm_eval" / Path(model.place).name, chats, remote) for model in models],
    )
    if compared:
        yield from _on_pairs(policy, reference, folder, args, chats, remote)
    yield Section(
        "Upload",
        "Log in with `hf auth login`, and write your name on the Hub in place of USER. The repository is private.",
        [
            command(
                *("hf", "upload", f"USER/{repo_name(f'{name}-{last}')}", policy.place, ".", "--private"),
                *(word for pattern in NOT_UPLOADED for word in ("--exclude", pattern)),
            )
        ],
    )


def _vllm(policy: Model, name: str, chats: bool, remote: list[str]) -> Section:
    commands = [command("vllm", "serve", policy.whole, "--served-model-name", name, *remote)]
    text = f"The server answers under `http://localhost:8000/v1`, {'as' if chats else 'without chat, as'} `{name}`."
    if policy.base is not None:
        text += " The second command serves the adapter on its base model."
        module = json.dumps({"name": name, "path": policy.place})
        rank = next((size for size in VLLM_RANKS if size >= (policy.rank or 16)), VLLM_RANKS[-1])
        lora = ("--enable-lora", "--max-lora-rank", rank, "--lora-modules", module)
        commands.append(command("vllm", "serve", policy.base, *lora, *remote))
    return Section("Serve with vLLM", text, commands)


def _lm_eval(model: Model, output: Path, chats: bool, remote: list[str]) -> str:
    values: dict[str, Any] = {"pretrained": model.place}
    if model.base is not None:
        values = {"pretrained": model.base, "peft": model.place}
    if remote:
        values["trust_remote_code"] = True
    if any("," in str(value) for value in values.values()):
        arguments = json.dumps(values)
    else:
        arguments = ",".join(f"{name}={value}" for name, value in values.items())
    template = ["--apply_chat_template"] if chats else []
    return command(
        *("lm_eval", "run", "--model", "hf", "--model_args", arguments, "--tasks", TASKS, "--batch_size", "auto"),
        *("--output_path", output, *template),
    )


def _on_pairs(
    policy: Model, reference: Model, folder: Path, args: DPOShiftConfig, chats: bool, remote: list[str]
) -> Iterator[Section]:
    if chats and (folder / PREFERENCES).is_file():
        yield Section(
            "Score with RewardBench",
            "The accuracy of the implicit reward on the evaluated pairs. RewardBench 0.1.4 pins transformers 4.51.0, "
            'needs `pip install rewardbench "trl<0.15"` in an environment of its own, and a GPU, on which it reads '
            "both models in 8 bits.",
            [
                command(
                    *("rewardbench", "--model", policy.whole, "--ref_model", reference.whole, "--dataset"),
                    *(folder / PREFERENCES, "--load_json", "--output_dir", folder / "rewardbench"),
                    *(["--trust_remote_code"] if remote else []),
                )
            ],
        )
    commands = []
    if (folder / EVAL_ROWS).is_file():
        length = [] if args.max_length is None else ["--max-length", args.max_length]
        diagnose = ("python", "-m", "dposhift_trl.diagnose", "--policy", policy.place, "--reference", reference.place)
        commands = [command(*diagnose, "--data", folder / EVAL_ROWS, *length, "--beta", args.beta, *remote)]
    yield Section(
        "Diagnose and compare",
        (
            "The first command scores the evaluated pairs again; give it another model or other pairs. "
            if commands
            else ""
        )
        + "Then: answers of both models side by side, and one page about several runs, for which OTHER_RUN stands.",
        [
            *commands,
            command("python", "-m", "dposhift_trl.generate", folder),
            command("python", "-m", "dposhift_trl.report", folder, "OTHER_RUN", "--output", "comparison"),
        ],
    )
