"""Freed memory that stays with the process, counted in pages that the kernel hands out."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest
from conftest import make_rows
from trl import DPOConfig, SFTConfig

import dposhift_trl
from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.training.allocator import CHOICES, MMAP_THRESHOLD, MOST, TRIM_THRESHOLD, keep_freed_memory


# Prints whether memory is kept, and how many pages of 320 MiB, freed and taken again and again, are fresh
PROGRAM = """
import resource, sys
import torch
from dposhift_trl.training.allocator import keep_freed_memory

def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(10 << 20) for _ in range(8)]  # larger than glibc would come to keep by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = sys.argv[1] == "keep" and keep_freed_memory()
for _ in range(4):  # the first hole does not hold an aligned block of exactly its size
    fill()
print(kept, fill())
"""


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")


def run(word, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in CHOICES}
    command = [sys.executable, "-c", PROGRAM, word]
    kept, fresh = subprocess.check_output(command, env={**inherited, **environment}, text=True).split()
    return kept == "True", int(fresh)


@pytest.fixture(scope="module")
def fresh_by_itself():
    """Pages of the block, each of which is fresh each time."""
    return run("leave")[1]


def test_a_block_that_was_freed_is_taken_again_without_fresh_pages(fresh_by_itself):
    kept, fresh = run("keep")
    assert kept
    assert fresh < fresh_by_itself / 100


@pytest.mark.parametrize("name", CHOICES[:3])
def test_what_the_environment_chooses_is_left_alone(name, fresh_by_itself):
    value = "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"
    kept, fresh = run("keep", **{name: value})
    assert not kept
    assert fresh > fresh_by_itself / 2


def test_an_older_glibc_is_asked_for_what_it_takes(monkeypatch):
    """It refuses to keep blocks of more than 32 MiB."""
    asked = []

    class Glibc:
        def __init__(self, name):
            pass

        def mallopt(self, parameter, value):
            asked.append((parameter, value))
            return int(parameter != MMAP_THRESHOLD or value <= 2**25)

    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", Glibc)
    assert keep_freed_memory()
    assert asked == [(MMAP_THRESHOLD, MOST), (MMAP_THRESHOLD, 2**25), (TRIM_THRESHOLD, MOST)]


@pytest.mark.parametrize("trainer_class", ["DPOShiftTrainer", "ChosenSFTTrainer"])
def test_training_on_a_cpu_keeps_freed_memory_and_stock_dpo_does_not(trainer_class, tiny_model, settings, monkeypatch):
    calls = []
    monkeypatch.setattr("dposhift_trl.training.trainer.keep_freed_memory", lambda: calls.append(trainer_class))
    config = {"DPOShiftTrainer": DPOShiftConfig, "ChosenSFTTrainer": SFTConfig}[trainer_class]
    settings["max_steps"] = 1
    getattr(dposhift_trl, trainer_class)(tiny_model, args=config(**settings), train_dataset=make_rows(4)).train()
    assert calls == [trainer_class]
    DPOShiftTrainer(tiny_model, args=DPOConfig(**settings), train_dataset=make_rows(4)).train()
    assert calls == [trainer_class]
