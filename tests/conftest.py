"""Tiny models and rows that every test can train on in a second."""

import gc
import os


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import random
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


torch.set_num_threads(1)
# Not the user's own cache of reference log-probabilities, nor one that an earlier session of tests has filled
_CACHE = tempfile.TemporaryDirectory(prefix="dposhift-cache-")
os.environ["DPOSHIFT_CACHE"] = _CACHE.name

WORDS = [f"w{index}" for index in range(40)]


# What a script starts in the background ignores Ctrl-C, and under nohup SIGHUP; tests send both
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<pad>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_rows(count: int, seed: int = 0) -> Dataset:
    """Pairs of word strings of ragged length; the answers agree on their first words."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    rows = []
    for _ in range(count):
        start = words(1, 3)
        rows.append(
            {
                "prompt": words(2, 6),
                "chosen": f" {start} {words(1, 6)} <eos>",
                "rejected": f" {start} {words(1, 6)} <eos>",
            }
        )
    return Dataset.from_list(rows)


def save_tiny_model(folder: Path) -> str:
    """A two-layer GPT-2 with random weights, dropout on as GPT-2's, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", autouse=True)
def quick_collection():
    # Every `train()` ends in a full `gc.collect()`, which walks all of torch and transformers: 0.9 s of 1.2 s a run
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def jitter(model, size, seed=1):
    """The model, its weights moved by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "gpt2")


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    """Settings of a short, exact run on the CPU, for any of TRL's configs."""
    return {
        "output_dir": str(tmp_path / "out"),
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "max_steps": 4,
        "seed": 3,
    }


@pytest.fixture
def here(capfd, request):
    """Run the command that a test module imports as `main` in this process, and return its output."""

    def run(*arguments, code=0):
        capfd.readouterr()
        assert request.module.main([*map(str, arguments)]) == code
        return capfd.readouterr()

    return run
