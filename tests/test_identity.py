"""Answers and scores of other weights than a run's are not shown as its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_generate import SHORT, read_lines, save_model, save_run

from dposhift_trl import identity
from dposhift_trl.generate.__main__ import main as generate
from dposhift_trl.identity import weights_identity


def save(folder: Path, name="model.safetensors", **tensors) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return folder


@pytest.fixture(params=[1 << 28, 0], ids=["whole", "sampled"])
def reading(request, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", request.param or 4096)
    monkeypatch.setattr(identity, "SAMPLE", 64)


@pytest.mark.parametrize("place", [0, 5_000, -1])
@pytest.mark.parametrize("name", ["first", "second"])
def test_a_tensor_that_moved_changes_the_identity(name, place, tmp_path, reading):
    tensors = {"first": torch.arange(10_000.0), "second": torch.arange(10_000.0) + 1}
    before = weights_identity(save(tmp_path / "a", **tensors))
    assert weights_identity(save(tmp_path / "b", **tensors)) == before
    tensors[name][place] += 1
    assert weights_identity(save(tmp_path / "b", **tensors)) != before


def test_every_file_counts_and_nothing_beside_them(tmp_path, reading):
    folder = save(tmp_path / "a", "model-1.safetensors", x=torch.zeros(9))
    first = weights_identity(folder)
    (folder / "trainer_state.json").write_text("{}")
    assert weights_identity(folder) == first
    assert weights_identity(save(folder, "model-2.safetensors", y=torch.zeros(9))) != first
    assert weights_identity(tmp_path) is None


def test_an_adapter_is_known_by_its_base_too_which_may_move_with_it(tmp_path):
    base, run = tmp_path / "run" / "base", tmp_path / "run"
    run.mkdir()
    save(base, x=torch.zeros(9))
    adapter = save(run / "dpo", "adapter_model.safetensors", a=torch.zeros(3))
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = weights_identity(adapter)
    moved = Path(shutil.move(run, tmp_path / "moved"))
    assert weights_identity(moved / "dpo") == before
    save(moved / "base", x=torch.ones(9))
    assert weights_identity(moved / "dpo") != before


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 9, b"\2\0\0\0\0\0\0\0{}" + b"x" * 9000, b"\2\0\0\0\0\0\0\0[]" * 999]
)
def test_a_file_that_is_no_safetensors_has_an_identity_as_well(content, tmp_path, reading):
    (tmp_path / "model.safetensors").write_bytes(content)
    before = weights_identity(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content + b"y")
    assert before not in (None, weights_identity(tmp_path))


# Generating again


def test_answers_of_earlier_weights_are_replaced_only_with_consent(tmp_path, capfd):
    run = save_run(tmp_path / "run")
    assert generate([str(run), *SHORT]) == generate([str(run), *SHORT]) == 0
    written = run / "generations" / "statistics.json"
    before = written.read_text()
    save_model(run / "sft", 77)
    capfd.readouterr()
    assert generate([str(run), *SHORT]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.endswith("of other weights than `sft` now has. Choose a new folder, or pass --overwrite.")
    assert written.read_text() == before
    assert generate([str(run), *SHORT, "--overwrite"]) == 0
    weights = json.loads(written.read_text())["weights"]
    assert weights == {name: weights_identity(run / name) for name in ("sft", "dpo")}
    assert weights["sft"] != json.loads(before)["weights"]["sft"]
    assert len(read_lines(run / "generations" / "side_by_side.jsonl")) == 5
