"""The reference: the key of its scores, their cache, and when the model is in memory."""

import copy
import functools
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, TrainerCallback
from transformers.models.gpt2 import modeling_gpt2
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head, create_model_from_path

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.reference import cache as cache_files
from dposhift_trl.reference import fingerprint as hashing
from dposhift_trl.reference.__main__ import main
from dposhift_trl.reference.cache import ReferenceCacheError, cached_reference_logps, default_folder
from dposhift_trl.reference.fingerprint import cache_obstacle, reference_fingerprint, reference_key
from dposhift_trl.reference.scorer import spot_rows
from dposhift_trl.scoring import enable_shared_prompt
from dposhift_trl.training.trainer import TrainingStopped


KEY, OTHER_KEY = "0" * 31 + "a", "0" * 31 + "b"
TOKENS = {
    "prompt_ids": [[5, 6], [7], [8, 9, 10]],
    "chosen_ids": [[11, 0], [12, 13, 0], [0]],
    "rejected_ids": [[14, 0], [15, 0], [16, 17, 0]],
}
SCORING = {"max_length": 64, "truncation_mode": "keep_start", "ld_alpha": None, "precision": "no"}


def key_of(tokens=None, fingerprint="f", **changes):
    return reference_key(Dataset.from_dict(tokens or TOKENS), fingerprint, **{**SCORING, **changes})


def values_of(rows, dtype=torch.float32):
    numbers = torch.arange(rows.start, rows.stop, dtype=torch.float64)
    return (-(numbers + 1).sqrt()).to(dtype), (-(numbers + 2).log() / 3).to(dtype)


class Scorer:
    """Scores rows as `values_of` and remembers which it was asked for."""

    def __init__(self, dtype=torch.float32, stop_at=None):
        self.dtype, self.stop_at, self.calls = dtype, stop_at, []

    def __call__(self, rows):
        if rows.start == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append(rows)
        return values_of(rows, self.dtype)


def cached(folder, score, num_rows=10, key=KEY, **kwargs):
    kwargs = {"chunk_rows": 4, "description": {"model": "tiny", "adapter": None}, **kwargs}
    return cached_reference_logps(key, num_rows, score, folder=folder, **kwargs)


def same_bits(left, right):
    right = [np.asarray(x) for x in right]
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(left, right, strict=True))


def files(folder):
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".lock")


# The key


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"max_length": 63}, id="max_length"),
        pytest.param({"max_length": None}, id="no max_length"),
        pytest.param({"truncation_mode": "keep_end"}, id="truncation_mode"),
        pytest.param({"ld_alpha": 0.5}, id="ld_alpha"),
        pytest.param({"ld_alpha": 1.0}, id="ld_alpha of 1"),
        pytest.param({"precision": "bf16"}, id="precision"),
        pytest.param({"fingerprint": "g"}, id="reference"),
        pytest.param({"tokens": {**TOKENS, "prompt_ids": [[5, 6], [7], [8, 9, 11]]}}, id="a prompt token"),
        pytest.param({"tokens": {**TOKENS, "chosen_ids": [[11, 0], [12, 13, 0], [1]]}}, id="a chosen token"),
        pytest.param({"tokens": {**TOKENS, "rejected_ids": [[14, 1], [15, 0], [16, 17, 0]]}}, id="a rejected token"),
        pytest.param({"tokens": {**TOKENS, "prompt_ids": [[5], [6, 7], [8, 9, 10]]}}, id="a row boundary"),
        pytest.param({"tokens": {name: ids[::-1] for name, ids in TOKENS.items()}}, id="order of rows"),
        pytest.param({"tokens": {name: ids[:2] for name, ids in TOKENS.items()}}, id="fewer rows"),
    ],
)
def test_everything_that_changes_a_score_changes_the_key(change):
    assert key_of(**change) != key_of()


def test_ld_alpha_changes_the_key_without_max_length_too():
    assert key_of(max_length=None, ld_alpha=0.5) != key_of(max_length=None)


@pytest.mark.parametrize(
    "dataset",
    [
        pytest.param(Dataset.from_dict(dict(reversed(TOKENS.items()))), id="order of columns"),
        pytest.param(Dataset.from_dict({"row_index": [2, 1, 0], **TOKENS}), id="further columns"),
        pytest.param(Dataset.from_dict(TOKENS).select([2, 1, 0]).select([2, 1, 0]), id="indices"),
        pytest.param(Dataset.from_dict({name: [*ids, [3]] for name, ids in TOKENS.items()}).take(3), id="slice"),
        pytest.param(
            Dataset(pa.table({name: pa.array(ids, pa.large_list(pa.int32())) for name, ids in TOKENS.items()})),
            id="integer type",
        ),
    ],
)
def test_how_the_rows_are_stored_does_not_change_the_key(dataset):
    assert reference_key(dataset, "f", **SCORING) == key_of()


def test_truncation_mode_does_not_change_the_key_without_max_length():
    assert key_of(max_length=None, truncation_mode="keep_end") == key_of(max_length=None)


# The reference's fingerprint


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def lora(model, seed=0, **kwargs):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **kwargs))


def test_a_saved_and_reloaded_reference_keeps_its_fingerprint(tiny_model, tmp_path):
    model = load(tiny_model)
    before = reference_fingerprint(model)
    model.config.use_cache, model.config.pad_token_id = False, 7
    model.save_pretrained(tmp_path / "copy")
    assert reference_fingerprint(model) == reference_fingerprint(load(tmp_path / "copy")) == before


def flip_last_bit(model):
    model.transformer.ln_f.bias.data.view(torch.uint8)[-4] ^= 1


def swap(model):
    first, second = (block.mlp.c_fc.weight for block in model.transformer.h)
    first.data, second.data = second.data, first.data


def change_heads(model):
    model.config.n_head = 4


@pytest.mark.parametrize("change", [flip_last_bit, swap, change_heads, torch.nn.Module.bfloat16])
def test_a_bit_a_name_a_dtype_or_a_setting_changes_the_fingerprint(tiny_model, change):
    model = load(tiny_model)
    before = reference_fingerprint(model)
    change(model)
    assert reference_fingerprint(model) != before


def test_one_bit_of_bfloat16_weights_changes_the_fingerprint(tiny_model):
    model, other = load(tiny_model, torch.bfloat16), load(tiny_model, torch.bfloat16)
    assert reference_fingerprint(model) == reference_fingerprint(other)
    other.transformer.ln_f.bias.data.view(torch.int16)[0] ^= 1
    assert reference_fingerprint(model) != reference_fingerprint(other)


def test_tied_weights_are_read_once(tiny_model, monkeypatch):
    read, digest = [], hashing._digest
    monkeypatch.setattr(hashing, "_digest", lambda value: read.append(value.data_ptr()) or digest(value))
    model = load(tiny_model)
    assert model.lm_head.weight is model.transformer.wte.weight
    reference_fingerprint(model)
    assert len(read) == len(set(read)) == len(list(model.parameters()))


@pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}, {"modules_to_save": ["ln_f"]}], ids=str)
def test_with_adapters_off_the_reference_is_the_bare_model(tiny_model, kwargs):
    bare = reference_fingerprint(load(tiny_model))
    assert reference_fingerprint(lora(load(tiny_model), seed=0, **kwargs)) == bare
    assert reference_fingerprint(lora(load(tiny_model), seed=1, **kwargs)) == bare


def test_a_frozen_adapter_changes_the_fingerprint_and_the_trained_one_does_not(tiny_model):
    model = lora(load(tiny_model), seed=0)
    model.add_adapter("ref", model.peft_config["default"])
    with_ref = reference_fingerprint(model, "ref")
    assert with_ref != reference_fingerprint(model)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.data += 1
    assert reference_fingerprint(model, "ref") == with_ref != reference_fingerprint(model, "default")
    ref_parameter = next(parameter for name, parameter in model.named_parameters() if ".ref." in name)
    ref_parameter.data += 1
    assert reference_fingerprint(model, "ref") != with_ref


def test_the_scale_of_a_frozen_adapter_changes_the_fingerprint_and_its_name_does_not(tiny_model):
    model, doubled = lora(load(tiny_model)), lora(load(tiny_model), lora_alpha=16)
    assert reference_fingerprint(model, "default") != reference_fingerprint(doubled, "default")
    model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            parameter.data = model.get_parameter(name.replace(".ref.", ".default.")).data.clone()
    assert reference_fingerprint(model, "ref") == reference_fingerprint(model, "default")


def test_a_reference_without_a_fingerprint_is_an_error(tiny_model):
    with pytest.raises(ValueError, match=r"`adapter` must be one of \['default'\] or None, got 'ref'"):
        reference_fingerprint(lora(load(tiny_model)), "ref")
    merged = lora(load(tiny_model))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="must not have adapters merged"):
        reference_fingerprint(merged)
    with pytest.raises(ValueError, match="must have its weights in memory"):
        reference_fingerprint(load(tiny_model).to("meta"))


# The files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_scores_come_back_bit_for_bit_and_are_scored_once(tmp_path, dtype):
    score = Scorer(dtype)
    expected = values_of(range(10), dtype)
    expected = [x.float() for x in expected] if dtype == torch.bfloat16 else expected
    assert same_bits(cached(tmp_path, score), expected)
    assert same_bits(cached(tmp_path, score), expected)
    assert score.calls == [range(4), range(4, 8), range(8, 10)]
    assert files(tmp_path) == [f"{KEY}.parquet"]


def test_the_file_is_plain_parquet(tmp_path):
    values = cached(tmp_path, Scorer())
    table = pq.read_table(tmp_path / f"{KEY}.parquet")
    assert table.column_names == ["ref_chosen_logps", "ref_rejected_logps"]
    assert same_bits([column.to_numpy() for column in table.columns], values)
    assert b'"model": "tiny"' in table.schema.metadata[b"dposhift_trl"]


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    place = data.index(values_of(range(10))[0].numpy().tobytes()) + 9
    data[place] ^= 4
    path.write_bytes(data)


def edit_a_value(path):
    table = pq.read_table(path)
    column = table["ref_chosen_logps"].to_numpy().copy()
    column[3] += 1
    pq.write_table(table.set_column(0, "ref_chosen_logps", pa.array(column)), path)


DAMAGES = {
    "bit flip": flip_a_bit,
    "edited value": edit_a_value,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(500)),
    "a row less": lambda path: pq.write_table(pq.read_table(path).slice(1), path),
    "no header": lambda path: pq.write_table(pq.read_table(path).replace_schema_metadata(), path),
    "other rows": lambda path: [cached(path.parent, Scorer(), 9, OTHER_KEY), rename(path, OTHER_KEY, KEY)],
}


def rename(path, old, new):
    os.replace(path.with_name(f"{old}.parquet"), path.with_name(f"{new}.parquet"))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_scored_again_with_one_warning(tmp_path, damage, caplog):
    expected = cached(tmp_path, Scorer())
    damage(tmp_path / f"{KEY}.parquet")
    caplog.clear()
    score = Scorer()
    assert same_bits(cached(tmp_path, score), expected)
    assert len(score.calls) == 3
    (line,) = (record.getMessage() for record in caplog.records)
    assert re.search(rf"{KEY}\.parquet .*; its 10 rows are scored again", line)
    caplog.clear()
    assert same_bits(cached(tmp_path, Scorer(stop_at=0)), expected)
    assert not caplog.records


def test_no_flipped_bit_gives_a_wrong_value(tmp_path):
    expected = cached(tmp_path, Scorer(), 3)
    path = tmp_path / f"{KEY}.parquet"
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        assert same_bits(cached(tmp_path, Scorer(), 3), expected)


def test_an_interrupted_computation_continues_even_with_other_chunks(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, Scorer(stop_at=8), 20)
    assert files(tmp_path) == [f"{KEY}.000000000-000000004.parquet", f"{KEY}.000000004-000000008.parquet"]
    DAMAGES["truncated"](tmp_path / f"{KEY}.000000000-000000004.parquet")
    score = Scorer()
    assert same_bits(cached(tmp_path, score, 20, chunk_rows=7), values_of(range(20)))
    assert score.calls == [range(4), range(8, 15), range(15, 20)]
    assert len(caplog.records) == 1
    assert files(tmp_path) == [f"{KEY}.parquet"]


def test_overlapping_parts_give_each_row_once(tmp_path):
    for stop_at, chunk_rows in ((8, 4), (6, 3)):  # as two runs leave them without working locks
        with pytest.raises(KeyboardInterrupt):
            cached(tmp_path / str(chunk_rows), Scorer(stop_at=stop_at), chunk_rows=chunk_rows)
    for path in (tmp_path / "3").glob("*.parquet"):
        path.rename(tmp_path / "4" / path.name)
    score = Scorer()
    assert same_bits(cached(tmp_path / "4", score), values_of(range(10)))
    assert score.calls == [range(6, 10)]
    assert files(tmp_path / "4") == [f"{KEY}.parquet"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(torch.tensor([1.0, float("nan"), 1.0]), r"rows \[1\] are not finite", id="not a number"),
        pytest.param(torch.ones(2), r"must return two tensors of shape \(3,\), got", id="too few"),
        pytest.param(torch.ones(3, 1), r"must return two tensors of shape \(3,\), got", id="shape"),
    ],
)
def test_invalid_scores_are_an_error_and_not_stored(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        cached(tmp_path, lambda rows: (torch.ones(3), values), 3)
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_an_error_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    score = Scorer()
    with pytest.raises(ReferenceCacheError, match=rf"{tmp_path}/file/inner: .*`DPOSHIFT_CACHE`"):
        cached(tmp_path / "file" / "inner", score)
    assert score.calls == []


def test_a_full_disk_stops_the_run_and_loses_no_finished_part(tmp_path, monkeypatch):
    fsync, synced = os.fsync, []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ReferenceCacheError, match=r"No space left on device\. Free disk space"):
        cached(tmp_path, Scorer())
    assert files(tmp_path) == [f"{KEY}.000000000-000000004.parquet", f"{KEY}.000000004-000000008.parquet"]
    score = Scorer()
    assert same_bits(cached(tmp_path, score), values_of(range(10)))
    assert score.calls == [range(8, 10)]


def test_the_folder_is_read_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DPOSHIFT_CACHE", str(tmp_path / "here"))
    assert default_folder() == tmp_path / "here"
    cached(None, Scorer())
    assert files(tmp_path / "here") == [f"{KEY}.parquet"]
    monkeypatch.delenv("DPOSHIFT_CACHE")
    assert default_folder().parts[-2:] == ("dposhift_trl", "reference")


# Several processes

WORKER = """
import logging, os, sys, time
from pathlib import Path
import torch
from accelerate import PartialState
from accelerate.utils import gather
from dposhift_trl.reference.cache import ReferenceCacheError, cached_reference_logps

folder, pause, task = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
logging.basicConfig(format="%(message)s")
state = PartialState(cpu=True)

def score(rows):
    with open(folder / f"calls{state.process_index}", "a") as file:
        file.write(f"{rows.start}\\n")
    if rows.start == 4:
        time.sleep(pause)
    numbers = torch.arange(rows.start, rows.stop, dtype=torch.float64)
    if state.num_processes > 1:  # each process scores every other row
        numbers = gather(numbers[state.process_index :: 2]).view(2, -1).T.flatten()
    return (-(numbers + 1).sqrt()).float(), (-(numbers + 2).log() / 3).float()

def ask(folder, key="0" * 31 + "a"):
    return cached_reference_logps(key, 12, score, folder=folder, chunk_rows=2, description={})

threads = len(os.listdir("/proc/self/task"))
values = ask(folder / "cache")
if state.num_processes == 1:  # a pool of threads may abort at exit
    assert len(os.listdir("/proc/self/task")) == threads
(folder / f"values{task}{state.process_index}").write_bytes(b"".join(value.tobytes() for value in values))
if state.num_processes > 1:
    for wrong, attempt in (
        (ReferenceCacheError, lambda: ask(folder / "calls0")),
        (ValueError, lambda: ask(folder / "cache", f"{state.process_index:032d}")),
    ):
        try:
            attempt()
        except wrong:
            (folder / f"refused{wrong.__name__}{state.process_index}").write_text("")
    state.wait_for_everyone()
    state.destroy_process_group()
"""
EXPECTED = b"".join(values.numpy().tobytes() for values in values_of(range(12)))


def start(folder, pause, task, *launcher):
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, *launcher, folder / "worker.py", folder, str(pause), task]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)


def calls(folder, rank=0):
    path = folder / f"calls{rank}"
    return path.read_text().split() if path.exists() else []


def test_another_run_continues_after_a_killed_one_without_scoring_its_chunks_again(tmp_path):
    killed = start(tmp_path, 300, "killed")
    while len(calls(tmp_path)) < 3:
        assert killed.poll() is None
        time.sleep(0.02)
    waiting = start(tmp_path, 0, "waiting")
    assert any("Waiting for another run" in line for line in waiting.stderr)
    assert calls(tmp_path) == ["0", "2", "4"]
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert waiting.wait(60) == 0
    assert calls(tmp_path) == ["0", "2", "4", "4", "6", "8", "10"]
    assert (tmp_path / "valueswaiting0").read_bytes() == EXPECTED
    assert not (tmp_path / "valueskilled0").exists()
    assert files(tmp_path / "cache") == [f"{KEY}.parquet"]


def test_one_of_two_simultaneous_runs_computes(tmp_path):
    runs = [start(tmp_path, 1.5, task) for task in "ab"]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert calls(tmp_path) == ["0", "2", "4", "6", "8", "10"]
    assert (tmp_path / "valuesa0").read_bytes() == (tmp_path / "valuesb0").read_bytes() == EXPECTED


def test_two_processes_of_a_run_get_the_same_values_from_one_file(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run = start(tmp_path, 0, "run", *launcher)
    assert run.wait(60) == 0, run.stderr.read()
    assert (tmp_path / "valuesrun0").read_bytes() == (tmp_path / "valuesrun1").read_bytes() == EXPECTED
    assert calls(tmp_path, 0) == calls(tmp_path, 1) == ["0", "2", "4", "6", "8", "10"]
    assert files(tmp_path / "cache") == [f"{KEY}.parquet"]
    assert {path.name for path in tmp_path.glob("refused*")} == {
        f"refused{error}{rank}" for error in ("ReferenceCacheError", "ValueError") for rank in (0, 1)
    }


# The command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache with a complete entry, an interrupted one, and files of other programs."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DPOSHIFT_CACHE", str(folder))
    cached(folder, Scorer())
    with pytest.raises(KeyboardInterrupt):
        cached(folder, Scorer(stop_at=8), key=OTHER_KEY)
    (folder / f"{OTHER_KEY}.{'c' * 32}.tmp").write_text("left by a killed run")
    (folder / "notes.parquet").write_text("mine")
    (folder / f"{'1' * 32}.parquet").write_text("not a cache entry")
    (folder / f"{KEY}.txt").write_text("mine")
    return folder


FOREIGN = [f"{KEY}.txt", f"{'1' * 32}.parquet", "notes.parquet"]


def test_list_shows_the_entries_and_their_sizes(folder, capsys):
    assert main(["list"]) == 0
    title, finished, interrupted, unreadable, total = capsys.readouterr().out.splitlines()
    assert re.split("  +", title) == ["KEY", "ROWS", "BYTES", "WRITTEN (UTC)", "REFERENCE"]
    size = f"{(folder / f'{KEY}.parquet').stat().st_size:,}"
    assert re.fullmatch(rf"{KEY} +10 +{size}  20\d\d-\d\d-\d\dT\d\d:\d\d  model tiny, adapter None", finished)
    assert re.match(rf"{OTHER_KEY} +8 of 10 +\d", interrupted)
    assert "unreadable" in unreadable
    assert total == f"3 entries in {folder}"


def test_an_empty_or_missing_folder_is_listed_and_cleared(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DPOSHIFT_CACHE", str(tmp_path / "none"))
    assert [main(["list"]), main(["clear"])] == [0, 0]
    assert capsys.readouterr().out.endswith(f"\n0 entries in {tmp_path}/none\n")


def test_clear_removes_entries_and_no_other_files(folder, capsys):
    assert main(["clear"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"removed {KEY}",
        f"removed {OTHER_KEY}",
    ]
    assert files(folder) == FOREIGN
    assert not list(folder.glob("*.lock"))


def test_clear_accepts_keys_and_an_age(folder, capsys):
    assert main(["clear", "--older-than", "1"]) == 0
    assert capsys.readouterr().out == ""
    os.utime(folder / f"{KEY}.parquet", (time.time() - 2 * 86400,) * 2)
    assert main(["clear", "--older-than", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"removed {KEY}:")
    assert main(["clear", OTHER_KEY, "f" * 32]) == 1
    streams = capsys.readouterr()
    assert streams.out.startswith(f"removed {OTHER_KEY}:")
    assert streams.err.startswith(f"{'f' * 32}: no entry with this key")
    assert files(folder) == FOREIGN


def test_clear_leaves_an_entry_that_a_run_is_computing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DPOSHIFT_CACHE", str(tmp_path))
    codes = []
    cached(None, lambda rows: codes.append(main(["clear"])) or values_of(rows))
    assert codes == [0, 1, 1], "nothing there yet, then in use"
    assert "in use by a run, not removed" in capsys.readouterr().err
    assert files(tmp_path) == [f"{KEY}.parquet"]


def test_the_command_runs_as_a_module(folder):
    command = [sys.executable, "-m", "dposhift_trl.reference", "list"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"3 entries in {folder}" in run.stdout


def test_the_command_line_is_checked(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["clean"])


# Compared with TRL's cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPOSHIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reference_scores(tiny_model, settings, tmp_path, monkeypatch, cache):
    """A function that creates a trainer and returns its reference columns and the number of batches it scored."""
    make_rows(12).save_to_disk(tmp_path / "rows")

    def build(trainer_class, peft_config=None, **changes):
        batches = []
        score = DPOTrainer.compute_ref_log_probs
        make = DPOConfig if trainer_class is DPOTrainer else DPOShiftConfig
        with monkeypatch.context() as patch:
            patch.setattr(DPOTrainer, "compute_ref_log_probs", lambda *args: batches.append(None) or score(*args))
            trainer = trainer_class(
                tiny_model,
                args=make(**{**settings, "precompute_ref_log_probs": True, **changes}),
                train_dataset=Dataset.load_from_disk(tmp_path / "rows"),
                peft_config=peft_config,
            )
        columns = (trainer.train_dataset[name][:] for name in ("ref_chosen_logps", "ref_rejected_logps"))
        return [torch.tensor(column) for column in columns], len(batches)

    return build


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_trl_reuses_stale_scores_when_ld_alpha_changes_and_we_do_not(reference_scores):
    plain, _ = reference_scores(DPOTrainer, max_length=None)
    stale, batches = reference_scores(DPOTrainer, max_length=None, ld_alpha=0.1)
    assert batches == 0
    assert equal(stale, plain)

    ours, _ = reference_scores(DPOShiftTrainer, max_length=None, shared_prompt=False)
    weighted, batches = reference_scores(DPOShiftTrainer, max_length=None, shared_prompt=False, ld_alpha=0.1)
    assert batches == 3
    assert equal(ours, plain)
    assert not equal(weighted, plain)
    # With `max_length`, TRL scores again; no row is truncated, so the scores are equal
    fresh, batches = reference_scores(DPOTrainer, max_length=60, ld_alpha=0.1)
    assert batches == 3
    assert all(torch.allclose(a, b) for a, b in zip(weighted, fresh, strict=True))


def test_trl_scores_again_when_the_learning_rate_changes_and_we_do_not(reference_scores, tmp_path):
    reference_scores(DPOTrainer, max_length=60)
    assert reference_scores(DPOTrainer, max_length=60, learning_rate=2e-2)[1] == 3

    first, batches = reference_scores(DPOShiftTrainer, max_length=60)
    assert batches == 3
    for change in (
        {"learning_rate": 2e-2},
        {"shift_lambda": 0.5},
        {"lambda_schedule": "linear_decrease", "precompute_ref_log_probs": "auto", "max_steps": -1},
        {"beta": 0.5, "output_dir": str(tmp_path / "elsewhere"), "loss_type": ["ipo"]},
        {"per_device_train_batch_size": 2, "pad_to_multiple_of": 8},
        {"peft_config": LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)},
    ):
        again, batches = reference_scores(DPOShiftTrainer, max_length=60, **change)
        assert batches == 4 / change.get("per_device_train_batch_size", 4), "the rows that are compared"
        assert equal(again, first)
    rows, batches = reference_scores(DPOShiftTrainer, max_length=60, shared_prompt=False)
    assert batches == 3  # because the rounding differs
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(rows, first, strict=True))


def test_training_with_our_cache_equals_training_with_trls(tiny_model, settings, cache):
    weights = []
    for trainer_class, make in ((DPOTrainer, DPOConfig), (DPOShiftTrainer, DPOShiftConfig)):
        ours = {} if make is DPOConfig else {"shift_lambda": 1.0, "shared_prompt": False}
        args = make(**settings, precompute_ref_log_probs=True, **ours)
        trainer = trainer_class(tiny_model, args=args, train_dataset=make_rows(8))
        trainer.train()
        weights.append(list(trainer.model.parameters()))
    assert equal(*weights)


def shift_trainer(model, settings, rows, eval_rows=None, **changes):
    options = {name: changes.pop(name) for name in ("ref_model", "peft_config") if name in changes}
    args = DPOShiftConfig(**{**settings, **changes})
    return DPOShiftTrainer(model, args=args, train_dataset=rows, eval_dataset=eval_rows, **options)


@pytest.mark.parametrize(
    ("changes", "precomputes"),
    [
        pytest.param({}, True, id="defaults"),
        pytest.param({"max_steps": -1}, True, id="whole epochs"),
        pytest.param({"max_steps": 2}, False, id="not every row is seen"),
        pytest.param({"sync_ref_model": True}, False, id="a reference that is updated"),
        pytest.param({"disable_dropout": False}, True, id="dropout of the policy only"),
        pytest.param({"shared_prompt": False}, False, id="bit for bit as DPOTrainer"),
        pytest.param({"precompute_ref_log_probs": False}, False, id="disabled"),
        pytest.param({"precompute_ref_log_probs": True, "max_steps": 2}, True, id="enabled"),
    ],
)
def test_auto_precomputes_if_the_scores_stay_valid_and_save_time(changes, precomputes, tiny_model, settings, cache):
    trainer = shift_trainer(tiny_model, settings, make_rows(12), **changes)
    assert trainer.precompute_ref_logps is precomputes
    assert cache.exists() is precomputes
    assert (trainer.ref_model is None) is precomputes
    assert trainer.args.precompute_ref_log_probs == changes.get("precompute_ref_log_probs")


@pytest.mark.parametrize("given", ["adapter", "reference"])
def test_a_reference_with_dropout_is_scored_at_each_step(given, tiny_model, settings, cache):
    if given == "adapter":
        options = {"peft_config": LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)}
    else:
        options = {"ref_model": AutoModelForCausalLM.from_pretrained(tiny_model).train()}
    trainer = shift_trainer(tiny_model, settings, make_rows(12), disable_dropout=False, **options)
    assert not trainer.precompute_ref_logps
    assert trainer.ref_model is options.get("ref_model")


def test_auto_does_not_precompute_iterable_datasets(tiny_model, settings, cache):
    rows = make_rows(12)
    assert not shift_trainer(tiny_model, settings, rows.to_iterable_dataset()).precompute_ref_logps
    assert not shift_trainer(tiny_model, settings, rows, rows.to_iterable_dataset()).precompute_ref_logps


@pytest.mark.parametrize("setup", ["full", "lora", "explicit reference"])
def test_precomputed_scores_train_and_evaluate_like_scores_computed_at_each_step(setup, tiny_model, settings, cache):
    logs = []
    for precompute in (False, "auto", "auto"):
        options = {
            "full": {},
            "lora": {"peft_config": LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)},
            "explicit reference": {"ref_model": AutoModelForCausalLM.from_pretrained(tiny_model)},
        }[setup]
        if setup == "explicit reference":
            torch.manual_seed(5)
            for weight in options["ref_model"].parameters():
                weight.data.add_(0.02 * torch.randn_like(weight))
        rows, evaluated = make_rows(12), {"a": make_rows(5, seed=1), "b": make_rows(6, seed=2)}
        changes = {"precompute_ref_log_probs": precompute, "eval_strategy": "steps", "eval_steps": 2}
        trainer = shift_trainer(tiny_model, settings, rows, evaluated, **changes, **options)
        trainer.train()
        # Datasets and iterable datasets that the trainer has not seen
        trainer.evaluate(make_rows(4, seed=3), metric_key_prefix="fresh")
        trainer.evaluate({"c": make_rows(4, seed=4).to_iterable_dataset()}, metric_key_prefix="eval")
        trainer.evaluate()
        assert (trainer.ref_model is None) is (setup == "lora" or (precompute == "auto" and setup == "full"))
        times = ("runtime", "per_second")
        logs.append([{k: v for k, v in e.items() if not k.endswith(times)} for e in trainer.state.log_history])
    online, first, again = logs
    assert first == again
    assert len(online) == len(first)
    for theirs, ours in zip(online, first, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_a_reference_that_has_changed_on_disk_is_an_error(settings, tmp_path, tiny_model, cache):
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    trainer = shift_trainer(tiny_model, settings, make_rows(12))
    trainer.train()
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    other.transformer.wte.weight.data[3, 4] += 1e-3
    other.save_pretrained(tmp_path / "model")
    trainer.model.config._name_or_path = str(tmp_path / "model")
    with pytest.raises(ValueError, match="its weights are no longer those that training started with"):
        trainer.evaluate(make_rows(4, seed=3))
    trainer.model.config._name_or_path = str(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"`eval_dataset` must be passed .* longer be loaded from '.*gone'"):
        trainer.evaluate(make_rows(4, seed=3))
    assert trainer.ref_model is None


def test_a_model_in_memory_gets_the_reference_that_trl_loads(settings, tiny_model, cache):
    rows, scores = make_rows(12), []
    for changed in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        if changed:
            model.transformer.wte.weight.data[3, 4] += 1.0
        trainer = shift_trainer(model, settings, rows)
        scores.append(trainer.train_dataset["ref_chosen_logps"][:])
        assert trainer.ref_model is None
    assert scores[0] == scores[1]
    assert len(list(cache.glob("*.parquet"))) == 1
    with pytest.raises(TrainingStopped, match="The reference is not the policy"):
        trainer.train()


def record_loads(monkeypatch, module):
    models = []

    def load(*args, **kwargs):
        model = create_model_from_path(*args, **kwargs)
        models.append((weakref.ref(model), kwargs))
        return model

    monkeypatch.setattr(f"{module}.create_model_from_path", load)
    return models


@pytest.fixture
def loaded(monkeypatch):
    """Weak references to the reference models that are loaded again, and the arguments."""
    return record_loads(monkeypatch, "dposhift_trl.reference.precompute")


@pytest.fixture
def loaded_by_trl(monkeypatch):
    """The same for the models that DPOTrainer loads."""
    return record_loads(monkeypatch, "trl.trainer.dpo_trainer")


@pytest.mark.parametrize("setup", ["by name", "in memory"])
def test_no_reference_model_is_in_memory_during_training(setup, settings, tiny_model, cache, loaded, loaded_by_trl):
    alive = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            models = [model() for model, _ in [*loaded, *loaded_by_trl]]
            alive.append(sum(model is not None and model is not trainer.model for model in models))

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.evaluate(make_rows(4, seed=3), metric_key_prefix="eval_fresh")

    policy = AutoModelForCausalLM.from_pretrained(tiny_model) if setup == "in memory" else tiny_model
    trainer = shift_trainer(policy, settings, make_rows(12))
    assert (len(loaded), len(loaded_by_trl)) == (0, 1 + (setup == "by name"))
    trainer.add_callback(Watch())
    trainer.train()
    assert alive == [0] * 4
    assert len(loaded) == 1
    (fresh,) = [entry for entry in trainer.state.log_history if "eval_fresh_loss" in entry]
    assert (fresh["step"], fresh["eval_fresh_displacement/chosen"] != 0.0) == (2, True)


def test_the_reference_of_a_model_in_memory_is_loaded_as_the_policy_was(
    settings, tiny_model, cache, loaded, loaded_by_trl
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16, attn_implementation="eager")
    trainer = shift_trainer(model, settings, make_rows(12), model_init_kwargs={"use_safetensors": True})
    trainer.train()  # which compares policy and reference before the first step
    trainer.evaluate(make_rows(4, seed=3))
    expected = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    assert len(loaded) == len(loaded_by_trl) == 1
    for _, options in (*loaded, *loaded_by_trl):
        assert options == {**expected, "trust_remote_code": False, "use_safetensors": True}


def test_the_arguments_are_unchanged_if_the_reference_cannot_be_loaded(settings, tiny_model, tmp_path, cache):
    args = DPOShiftConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config._name_or_path = str(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match="Unrecognized model"):
        DPOShiftTrainer(model, args=args, train_dataset=make_rows(12), processing_class=tokenizer)
    assert args.precompute_ref_log_probs is None


@pytest.mark.parametrize("setup", ["by name", "explicit", "explicit with LoRA"])
def test_a_nested_evaluation_leaves_the_reference_in_place(setup, settings, tiny_model, cache, loaded):
    class Nested(TrainerCallback):
        inside = False

        def on_evaluate(self, *args, **kwargs):
            if not self.inside:
                self.inside = True
                trainer.evaluate(make_rows(4, seed=9), metric_key_prefix="eval_nested")
                self.inside = False

    options = {}
    if "explicit" in setup:
        reference = options["ref_model"] = AutoModelForCausalLM.from_pretrained(tiny_model)
        reference.transformer.wte.weight.data += 0.1 * torch.randn_like(reference.transformer.wte.weight)
    if "LoRA" in setup:
        options["peft_config"] = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = shift_trainer(tiny_model, settings, make_rows(12), **options)
    trainer.train()
    stream = make_rows(4, seed=3).to_iterable_dataset()
    alone = trainer.evaluate(stream)
    trainer.add_callback(Nested())
    both = trainer.evaluate({"a": stream, "b": stream})
    assert alone["eval_loss"] == both["eval_a_loss"] == both["eval_b_loss"] != pytest.approx(math.log(2), abs=1e-4)
    assert trainer.ref_model is options.get("ref_model")
    assert len(loaded) == (2 if setup == "by name" else 0)


def test_evaluating_a_dataset_and_an_iterable_dataset_moves_the_reference_once(
    settings, tiny_model, cache, monkeypatch
):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    trainer = shift_trainer(tiny_model, settings, make_rows(12), ref_model=reference)
    moves = []
    monkeypatch.setattr(
        "dposhift_trl.reference.scorer.move_model", lambda model, device: moves.append(device) or model.to(device)
    )
    trainer.evaluate({"table": make_rows(4, seed=3), "stream": make_rows(4, seed=3).to_iterable_dataset()})
    assert moves == [trainer.accelerator.device, trainer.accelerator.device, "cpu"]


def test_a_policy_in_memory_with_an_adapter_is_its_own_reference(settings, tiny_model, cache, loaded):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    shift_trainer(model, settings, make_rows(12)).train()
    assert not loaded


def test_positional_arguments_have_the_order_of_dpo_trainer(settings, tiny_model, cache):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    rest = None, make_rows(12), None, tokenizer, None, None, (None, None), None, None
    trainer = DPOShiftTrainer(model, None, DPOShiftConfig(**settings), *rest)
    assert trainer.precompute_ref_logps
    assert trainer.processing_class is tokenizer


@pytest.mark.parametrize(
    "noise", [{"disable_dropout": False}, {"neftune_noise_alpha": 5.0}], ids=["dropout", "NEFTune"]
)
def test_a_run_draws_the_same_noise_with_and_without_cached_scores(noise, settings, tiny_model, cache):
    losses = []
    for _ in range(2):
        trainer = shift_trainer(tiny_model, settings, make_rows(12), **noise)
        assert trainer.precompute_ref_logps
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_evaluation_in_bf16_does_not_change_the_dtype_of_the_reference(settings, tiny_model, cache, loaded):
    trainer = shift_trainer(tiny_model, settings, make_rows(12), bf16_full_eval=True)
    trainer.train()
    for seed in (3, 4):
        trainer.evaluate(make_rows(4, seed=seed))
    assert trainer.model.dtype == torch.bfloat16
    assert [options["dtype"] for _, options in loaded] == [torch.float32] * 2


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_scored_rows_are_predicted_without_the_reference(settings, tiny_model, cache, loaded):
    trainer = shift_trainer(tiny_model, settings, make_rows(12), make_rows(6, seed=1))
    trainer.train()
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] != pytest.approx(math.log(2), abs=1e-4)
    assert not loaded


def test_rows_prepared_by_hand_are_scored_with_the_reference_that_was_passed(settings, tiny_model, cache):
    losses = []
    for precompute in (False, "auto"):
        torch.manual_seed(0)
        reference = AutoModelForCausalLM.from_pretrained(tiny_model)
        reference.transformer.wte.weight.data += 0.1 * torch.randn_like(reference.transformer.wte.weight)
        options = {"ref_model": reference, "peft_config": LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)}
        trainer = shift_trainer(tiny_model, settings, make_rows(12), precompute_ref_log_probs=precompute, **options)
        trainer.train()
        trainer.eval_dataset = trainer._prepare_dataset(
            make_rows(4, seed=3), trainer.processing_class, trainer.args, "eval"
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_scored_rows_can_be_evaluated_again_completely_and_partly(settings, tiny_model, cache):
    trainer = shift_trainer(tiny_model, settings, make_rows(12), {"a": make_rows(6, seed=1)})
    trainer.train()
    whole = trainer.evaluate()
    again = trainer.evaluate(trainer.eval_dataset["a"])
    assert again["eval_rewards/margins"] == pytest.approx(whole["eval_a_rewards/margins"], rel=1e-6)
    assert trainer.evaluate(trainer.eval_dataset["a"].select([1, 3]))["eval_displacement/chosen"] != 0.0
    assert trainer.ref_model is None
    other = shift_trainer(tiny_model, settings, trainer.train_dataset)
    assert "ref_chosen_logps" in other.train_dataset.column_names


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_rows_without_scores_can_be_predicted(settings, tiny_model, cache):
    losses = []
    for precompute in ("auto", False):
        trainer = shift_trainer(tiny_model, settings, make_rows(12), precompute_ref_log_probs=precompute)
        trainer.train()
        prepared = shift_trainer(
            tiny_model, settings, make_rows(6, seed=2), precompute_ref_log_probs=False
        ).train_dataset
        losses.append(trainer.predict(prepared, metric_key_prefix="eval").metrics["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


class CutCollator:
    """A custom collator that keeps two tokens of each answer."""

    def __call__(self, examples):
        cut = [{**x, "chosen_ids": x["chosen_ids"][:2], "rejected_ids": x["rejected_ids"][:2]} for x in examples]
        batch = DataCollatorForPreference(pad_token_id=1)(cut)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}


def test_a_custom_collator_disables_the_cache_and_the_shared_prompt(settings, tiny_model, cache, caplog):
    args = DPOShiftConfig(**settings, shift_lambda=1.0)
    shift_trainer(tiny_model, settings, make_rows(12))
    entries = list(cache.iterdir())
    trainer = DPOShiftTrainer(tiny_model, args=args, data_collator=CutCollator(), train_dataset=make_rows(12))
    assert (trainer.precompute_ref_logps, trainer.shares_prompts) == (False, False)
    assert "shared_prompt is off: the data collator is not TRL's" in caplog.text
    stock = DPOTrainer(
        tiny_model, args=DPOConfig(**settings), data_collator=CutCollator(), train_dataset=make_rows(12)
    )
    stock.train(), trainer.train()
    assert list(cache.iterdir()) == entries
    assert equal(stock.model.parameters(), trainer.model.parameters())


@pytest.mark.parametrize(("epochs", "precomputes"), [(0.5, False), (1, True)])
def test_auto_does_not_precompute_for_less_than_one_epoch(epochs, precomputes, settings, tiny_model, cache):
    trainer = shift_trainer(tiny_model, settings, make_rows(12), max_steps=-1, num_train_epochs=epochs)
    assert trainer.precompute_ref_logps is precomputes


def test_a_model_in_training_mode_is_scored_without_dropout(tiny_model, settings, cache):
    scores = []
    for training in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_model).train(training)
        changes = {"precompute_ref_log_probs": True, "disable_dropout": False, "max_length": 60 - training}
        trainer = shift_trainer(model, settings, make_rows(6), **changes)
        assert trainer.model.training is training
        scores.append(torch.tensor(trainer.train_dataset["ref_chosen_logps"][:]))
    assert torch.equal(*scores)


# Other code with the same weights


class Doubled(GPT2LMHeadModel):
    """The same weights, other scores."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class Halved(GPT2LMHeadModel):
    """The same file as [`Doubled`]."""


def rename_class(model):
    model.__class__ = Halved


def change_epsilon(model):
    model.transformer.ln_f.eps = 1e-2


def change_a_scale(model):
    model.transformer.h[0].attn.split_size = 16


@pytest.mark.parametrize("change", [rename_class, change_epsilon, change_a_scale])
def test_code_and_numbers_of_a_module_change_the_fingerprint(change, tiny_model):
    model = load(tiny_model)
    before = reference_fingerprint(model)
    change(model)
    assert reference_fingerprint(model) != before
    assert reference_fingerprint(load(tiny_model)) == before


def test_the_source_of_a_class_changes_the_fingerprint(tiny_model, tmp_path, monkeypatch):
    model, found = load(tiny_model), []
    for body in ("pass", "scale = 2"):
        path = tmp_path / f"module_{len(found)}.py"
        path.write_text(f"from transformers import GPT2LMHeadModel\nclass Mine(GPT2LMHeadModel): {body}\n")
        monkeypatch.syspath_prepend(tmp_path)
        model.__class__ = importlib.import_module(path.stem).Mine
        found.append(reference_fingerprint(model))
    assert found[0] != found[1]


def test_what_training_changes_in_a_module_does_not_change_the_fingerprint(tiny_model):
    model = load(tiny_model)
    before = reference_fingerprint(model)
    add_fused_lm_head(model)
    enable_shared_prompt(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    model.train()
    assert reference_fingerprint(model) == before
    assert cache_obstacle(model) is None
    assert cache_obstacle(lora(load(tiny_model))) is None


def foreign(module, args, output):
    return None


OBSTACLES = {
    "hook": lambda model: model.transformer.h[1].mlp.register_forward_hook(foreign),
    "pre-hook": lambda model: model.transformer.wte.register_forward_pre_hook(lambda module, args: None),
    "partial": lambda model: model.lm_head.register_forward_hook(functools.partial(foreign)),
    "forward": lambda model: setattr(model.transformer, "forward", model.transformer.forward.__get__(model)),
    "own forward": lambda model: setattr(model.transformer, "forward", lambda *args, **kwargs: None),
    "disguised": lambda model: setattr(
        model.transformer, "forward", functools.wraps(type(model.transformer).forward)(lambda *args: None)
    ),
    "no source": lambda model: setattr(model, "__class__", type("Typed", (GPT2LMHeadModel,), {"__module__": "typed"})),
}


@pytest.mark.parametrize("kind", OBSTACLES)
def test_a_hook_or_forward_of_its_own_keeps_a_reference_out_of_the_cache(kind, tiny_model):
    model = load(tiny_model)
    OBSTACLES[kind](model)
    assert (cache_obstacle(model) is None) == (kind == "forward"), "which is that of transformers"


def test_a_global_hook_keeps_every_reference_out_of_the_cache(tiny_model):
    hook = torch.nn.modules.module.register_module_forward_hook(foreign)
    try:
        assert "`foreign`" in cache_obstacle(load(tiny_model))
    finally:
        hook.remove()


def scores_of(trainer):
    return [torch.tensor(trainer.train_dataset[name][:]) for name in ("ref_chosen_logps", "ref_rejected_logps")]


def test_a_reference_with_a_hook_gets_its_own_scores_and_stores_none(settings, tiny_model, cache, caplog):
    plain = scores_of(shift_trainer(tiny_model, settings, make_rows(12)))
    before = files(cache)
    reference = load(tiny_model)
    reference.transformer.ln_f.register_forward_hook(lambda module, args, output: output * 3)
    hooked = scores_of(shift_trainer(tiny_model, settings, make_rows(12), ref_model=reference))
    assert not torch.allclose(plain[0], hooked[0], rtol=0.01)
    assert files(cache) == before
    assert "are not cached, since `transformer.ln_f` runs a hook or a forward of its own" in caplog.text


def test_scores_that_the_key_cannot_tell_apart_are_told_apart_by_a_few_rows(
    settings, tiny_model, cache, caplog, monkeypatch
):
    plain = scores_of(shift_trainer(tiny_model, settings, make_rows(12)))
    assert equal(scores_of(shift_trainer(tiny_model, settings, make_rows(12))), plain)
    assert not caplog.records
    mlp = modeling_gpt2.GPT2MLP.forward
    monkeypatch.setattr(modeling_gpt2.GPT2MLP, "forward", lambda self, hidden: 50 * mlp(self, hidden))
    patched = scores_of(shift_trainer(tiny_model, settings, make_rows(12)))
    assert not torch.allclose(plain[0], patched[0], rtol=1e-3)
    (line,) = {record.getMessage() for record in caplog.records if "is not of this reference" in record.getMessage()}
    assert re.search(r"row \d+ has -[\d.]+ nats there and -[\d.]+ now; its rows are scored again\.$", line)
    caplog.clear()
    assert equal(scores_of(shift_trainer(tiny_model, settings, make_rows(12))), patched)
    assert not caplog.records


def test_rounding_is_no_difference(settings, tiny_model, cache, caplog):
    rows = make_rows(12)
    first = scores_of(shift_trainer(tiny_model, settings, rows))
    smaller = {"per_device_train_batch_size": 1, "precompute_ref_log_probs": True}
    other = scores_of(shift_trainer(tiny_model, settings, rows, **smaller))
    assert equal(first, other)
    assert not caplog.records


@pytest.mark.parametrize(("parts", "rows"), [(1, [0, 3, 6, 9]), (2, [0, 3, 5, 8]), (5, [0, 4, 8]), (10, [0, 3, 6, 9])])
def test_the_compared_rows_are_spread_over_what_was_found(parts, rows):
    size = 10 // parts
    found = {(start, start + size): (np.arange(start, start + size),) * 2 for start in range(0, 10, size)}
    spots = spot_rows(found)
    assert [row for spot, _ in spots for row in spot] == rows
    assert all(list(spot) == chosen.tolist() == rejected.tolist() for spot, (chosen, rejected) in spots)


def test_parts_of_an_interrupted_computation_are_compared_too(tmp_path, caplog):
    for confirm, calls in ((lambda found: None, [range(8, 10)]), (lambda found: "other", [range(4), range(4, 8)])):
        with pytest.raises(KeyboardInterrupt):
            cached(tmp_path, Scorer(stop_at=8))
        score = Scorer()
        assert same_bits(cached(tmp_path, score, confirm=confirm), values_of(range(10)))
        assert score.calls[: len(calls)] == calls
        (tmp_path / f"{KEY}.parquet").unlink()
    assert caplog.text.count("is not of this reference: other; its rows are scored again.") == 1


# Files that are none


def forge(path, *columns, **changes):
    """Write an entry with a valid checksum."""
    header = json.loads(pq.read_schema(path).metadata[b"dposhift_trl"])
    text = json.dumps({key: value for key, value in {**header, **changes}.items() if value is not None})
    metadata = {b"dposhift_trl": text, b"dposhift_trl.checksum": cache_files._checksum(text, columns)}
    table = pa.table(dict(zip(("ref_chosen_logps", "ref_rejected_logps"), columns, strict=True)))
    pq.write_table(table.replace_schema_metadata(metadata), path)


def swap_for(make):
    def swap(path):
        path.rename(path.with_name("real"))
        make(path)

    return swap


SOUND = np.full(10, -1.0, np.float32)
FOREIGN_FILES = {
    "FIFO": swap_for(os.mkfifo),
    "link": swap_for(lambda path: path.symlink_to("real")),
    "link to nothing": swap_for(lambda path: path.symlink_to("nowhere")),
    "link to a device": swap_for(lambda path: path.symlink_to("/dev/zero")),
    "NaN": lambda path: forge(path, np.full(10, np.nan, np.float32), SOUND),
    "infinity": lambda path: forge(path, SOUND, np.full(10, -np.inf, np.float32)),
    "length": lambda path: forge(path, SOUND[:9], SOUND[:9]),
    "integers": lambda path: forge(path, SOUND.astype(int), SOUND.astype(int)),
    "text": lambda path: forge(path, SOUND.astype(str), SOUND.astype(str)),
    "version": lambda path: forge(path, SOUND, SOUND, rows=None),
    "key": lambda path: forge(path, SOUND, SOUND, key="b"),
}


@pytest.mark.parametrize("kind", FOREIGN_FILES)
def test_what_is_no_entry_is_neither_waited_for_nor_served(kind, tmp_path, caplog, monkeypatch, capsys):
    expected = cached(tmp_path, Scorer())
    FOREIGN_FILES[kind](tmp_path / f"{KEY}.parquet")
    monkeypatch.setenv("DPOSHIFT_CACHE", str(tmp_path))
    assert main(["list"]) == 0
    assert same_bits(cached(tmp_path, Scorer()), expected)
    assert len(caplog.records) == 1
    path = tmp_path / f"{KEY}.parquet"
    assert path.is_file()
    assert not path.is_symlink()
    assert same_bits(cached(tmp_path, Scorer(stop_at=0)), expected)


def test_a_folder_where_an_entry_belongs_is_named_before_anything_is_scored(tmp_path, monkeypatch, capsys):
    (tmp_path / f"{KEY}.parquet").mkdir()
    with pytest.raises(ReferenceCacheError, match=rf"Is a directory: '{tmp_path}/{KEY}\.parquet'"):
        cached(tmp_path, Scorer(stop_at=0))
    monkeypatch.setenv("DPOSHIFT_CACHE", str(tmp_path))
    assert main(["list"]) == 0
    assert "unreadable" in capsys.readouterr().out


def test_what_an_entry_says_about_its_model_does_not_act_on_the_terminal(tmp_path, monkeypatch, capsys):
    cached(tmp_path, Scorer(), description={"model": "\x1b[31mred\n\x9b2J größer"})
    monkeypatch.setenv("DPOSHIFT_CACHE", str(tmp_path))
    assert main(["list"]) == 0
    assert "model \\x1b[31mred\\n\\x9b2J größer" in capsys.readouterr().out
