"""Freed memory is kept and reused, measured in page faults."""

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
from dposhift_trl.training.allocator import (
    ALLOCATOR_VARIABLES,
    MAX_THRESHOLD,
    MMAP_THRESHOLD,
    OLD_MAX_MMAP_THRESHOLD,
    TRIM_THRESHOLD,
    keep_freed_memory,
)


# Prints whether freed memory is kept, and the page faults of allocating 320 MiB that were freed before
PROGRAM = """
import resource, sys
import torch
from dposhift_trl.training.allocator import keep_freed_memory

def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(10 << 20) for _ in range(8)]  # larger than what glibc keeps by default
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = sys.argv[1] == "keep" and keep_freed_memory()
for _ in range(4):  # an aligned block does not fit into a hole of exactly its size
    fill()
print(kept, fill())
"""


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")


def run(mode, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    command = [sys.executable, "-c", PROGRAM, mode]
    kept, faults = subprocess.check_output(command, env={**inherited, **environment}, text=True).split()
    return kept == "True", int(faults)


@pytest.fixture(scope="module")
def default_faults():
    """Page faults with glibc's defaults: every page, every time."""
    return run("leave")[1]


def test_a_freed_block_is_reused_without_page_faults(default_faults):
    kept, faults = run("keep")
    assert kept
    assert faults < default_faults / 100


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES[:3])
def test_an_allocator_configured_in_the_environment_is_left_alone(name, default_faults):
    value = "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"
    kept, faults = run("keep", **{name: value})
    assert not kept
    assert faults > default_faults / 2


def test_an_older_glibc_gets_the_largest_threshold_that_it_accepts(monkeypatch):
    """Older releases reject an mmap threshold above 32 MiB."""
    asked = []

    class Glibc:
        def __init__(self, name):
            pass

        def mallopt(self, parameter, value):
            asked.append((parameter, value))
            return int(parameter != MMAP_THRESHOLD or value <= OLD_MAX_MMAP_THRESHOLD)

    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", Glibc)
    assert keep_freed_memory()
    assert OLD_MAX_MMAP_THRESHOLD == 32 << 20
    assert asked == [
        (MMAP_THRESHOLD, MAX_THRESHOLD),
        (MMAP_THRESHOLD, OLD_MAX_MMAP_THRESHOLD),
        (TRIM_THRESHOLD, MAX_THRESHOLD),
    ]


@pytest.mark.parametrize("trainer_class", ["DPOShiftTrainer", "ChosenSFTTrainer"])
def test_training_on_a_cpu_keeps_freed_memory_and_stock_dpo_does_not(trainer_class, tiny_model, settings, monkeypatch):
    calls = []
    monkeypatch.setattr("dposhift_trl.training.callbacks.keep_freed_memory", lambda: calls.append(trainer_class))
    config = {"DPOShiftTrainer": DPOShiftConfig, "ChosenSFTTrainer": SFTConfig}[trainer_class]
    settings["max_steps"] = 1
    getattr(dposhift_trl, trainer_class)(tiny_model, args=config(**settings), train_dataset=make_rows(4)).train()
    assert calls == [trainer_class]
    DPOShiftTrainer(tiny_model, args=DPOConfig(**settings), train_dataset=make_rows(4)).train()
    assert calls == [trainer_class]
