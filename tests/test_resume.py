"""A stage goes on exactly as if it had not been interrupted, or the command says in one line why it cannot."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_rows, make_tokenizer
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from trl import SFTConfig

from dposhift_trl import ChosenSFTTrainer, DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.data.audit import AuditedRows
from dposhift_trl.pipeline.checkpoints import explaining_load_errors, last_complete_checkpoint
from dposhift_trl.pipeline.errors import RunError
from dposhift_trl.pipeline.resume import is_finished, resume_point
from dposhift_trl.pipeline.start import model_fingerprint, row_fingerprints, stage_start


STAGE = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none"}


def write_checkpoint(folder: Path, step: int, last_step: int = 6) -> Path:
    """A small checkpoint, with files as transformers writes them."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.zeros(9)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(9)}, path / name)
    state = {"global_step": step, "max_steps": last_step, "log_history": []}
    (path / "trainer_state.json").write_text(json.dumps(state))
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


# The checkpoint


def test_damaged_checkpoints_and_interrupted_ones_are_passed_over(tmp_path):
    two, four, six, eight = (write_checkpoint(tmp_path, step, 10) for step in (2, 4, 6, 8))
    (tmp_path / "checkpoint-12").mkdir()  # killed before the trainer's state
    (tmp_path / "checkpoint-old").mkdir()
    cut(eight / "trainer_state.json")
    cut(six / "model.safetensors")
    (four / "scheduler.pt").unlink()
    assert last_complete_checkpoint(tmp_path) == (
        two,
        [tmp_path / "checkpoint-12", eight],
        {six: "model.safetensors is cut or broken", four: "scheduler.pt is missing"},
    )
    assert last_complete_checkpoint(tmp_path / "checkpoint-old") == (None, [], {})


def test_after_the_last_step_only_weights_are_needed(tmp_path):
    last = write_checkpoint(tmp_path, 6)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (last / name).unlink()
    assert last_complete_checkpoint(tmp_path).newest == last
    cut(last / "model.safetensors")
    assert last_complete_checkpoint(tmp_path).newest is None


START = {"model": "m", "tokenizer": "t", "train rows": "r", "eval rows": None}


@pytest.fixture
def resume(tmp_path, capsys):
    """Ask where a stage goes on, and return the checkpoint and what was said."""

    def ask(start=START, accept_changes=False, **settings):
        capsys.readouterr()
        args = DPOShiftConfig(str(tmp_path / "dpo"), use_cpu=True, bf16=False, **settings)
        checkpoint = resume_point("dpo", tmp_path / "dpo", args, start, accept_changes)
        return checkpoint, capsys.readouterr().out

    return ask


def test_a_damaged_checkpoint_is_moved_away_and_an_older_one_taken(tmp_path, resume):
    assert resume() == (None, "")
    older, newer = write_checkpoint(tmp_path / "dpo", 2), write_checkpoint(tmp_path / "dpo", 4)
    cut(newer / "optimizer.pt")
    before = sorted(path.name for path in newer.iterdir())
    checkpoint, said = resume()
    place = tmp_path / "dpo" / "damaged-checkpoint-4"
    assert checkpoint == older
    assert said == f"dpo: {newer} is damaged (optimizer.pt is cut or broken), moved to {place}\n"
    assert sorted(path.name for path in place.iterdir()) == before
    cut(write_checkpoint(tmp_path / "dpo", 4) / "optimizer.pt")
    assert resume()[1].rstrip().endswith(f"moved to {place}-2")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_without_any_whole_checkpoint_the_stage_is_not_resumed_and_nothing_is_changed(name, tmp_path, resume):
    resume()
    checkpoint = write_checkpoint(tmp_path / "dpo", 4)
    (checkpoint / name).unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        RunError, match=rf"cannot be resumed: in .*checkpoint-4, {name} is missing\. Restore it, or del"
    ):
        resume()
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoints_of_models_alone_are_explained_before_training_and_never_resumed(tmp_path, resume):
    explained = "dpo: `save_only_model` saves no optimizer, so the stage starts anew if it is interrupted\n"
    assert resume(save_only_model=True) == (None, explained)
    assert resume(save_only_model=True, save_strategy="no") == (None, "")
    checkpoint = write_checkpoint(tmp_path / "dpo", 4)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()
    anew = "dpo: the checkpoints hold only models (`save_only_model`), so the stage starts anew\n"
    assert resume(save_only_model=True) == (None, anew + explained)
    last = write_checkpoint(tmp_path / "dpo", 6)
    (last / "optimizer.pt").unlink()
    assert resume(save_only_model=True)[0] == last


@pytest.mark.parametrize("name", START)
def test_a_stage_goes_on_from_what_it_started_from(name, tmp_path, resume):
    resume()
    checkpoint = write_checkpoint(tmp_path / "dpo", 4)
    assert resume() == (checkpoint, "")
    other = {**START, name: "other"}
    for _ in range(2):
        with pytest.raises(
            RunError, match=rf"`dpo` cannot be resumed: {name} changed since it started\. .*--accept-c"
        ):
            resume(other)
    assert resume(other, accept_changes=True) == (checkpoint, f"dpo: {name} changed since it started\n")
    assert resume(other) == (checkpoint, ""), "what was accepted is not asked for again"
    last = write_checkpoint(tmp_path / "dpo", 6)
    assert resume() == (last, f"dpo: {name} changed since it was trained\n")


def test_another_number_of_processes_is_a_change(tmp_path, resume):
    resume()
    write_checkpoint(tmp_path / "dpo", 4)
    path = tmp_path / "dpo" / "start.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 2}))
    with pytest.raises(RunError, match=r"checkpoint-4, rng_state_0\.pth is missing"):
        resume()
    for rank in range(2):
        shutil.copy(
            tmp_path / "dpo" / "checkpoint-4" / "rng_state.pth", path.parent / f"checkpoint-4/rng_state_{rank}.pth"
        )
    with pytest.raises(RunError, match="processes changed since it started"):
        resume()


def test_a_stage_of_an_earlier_release_goes_on_with_a_line(tmp_path, resume):
    checkpoint = write_checkpoint(tmp_path / "dpo", 4)
    found, said = resume()
    assert found == checkpoint
    assert said == "dpo: what it started from was not recorded, so its rows and model are not compared\n"


def test_a_finished_stage_says_what_has_changed_since(tmp_path, resume, capsys):
    resume()
    folder = tmp_path / "dpo"
    save_file({"weight": torch.zeros(9)}, folder / "model.safetensors")
    (folder / "finished.json").write_text("{}")
    assert is_finished("dpo", folder, START)
    assert capsys.readouterr().out == f"dpo: finished before, skipped ({folder})\n"
    assert is_finished("dpo", folder, {**START, "train rows": "other"})
    assert "dpo: train rows changed since it was trained." in capsys.readouterr().out
    cut(folder / "model.safetensors")
    assert not is_finished("dpo", folder, START)
    assert "but model.safetensors is cut or broken, so the model is saved again" in capsys.readouterr().out
    assert not (folder / "finished.json").exists()


# What is compared


def hashes(train, evaluation=None, tokenizer=None):
    return row_fingerprints({"dpo": AuditedRows(train, evaluation, {})}, tokenizer or make_tokenizer())["dpo"]


def test_rows_are_told_apart_by_text_and_order_alone():
    rows = make_rows(2500)
    known = hashes(rows)
    assert known["eval rows"] is None
    assert hashes(rows.select(range(2499))) != known
    assert hashes(rows.rename_columns({"chosen": "rejected", "rejected": "chosen"})) != known
    assert hashes(rows.select([1, 0, *range(2, 2500)])) != known
    assert (
        hashes(rows.map(lambda row, index: {"chosen": row["chosen"] + "!" * (index == 2400)}, with_indices=True))
        != known
    )
    parts = concatenate_datasets([rows.select(range(700)), rows.select(range(700, 2500))])
    assert hashes(parts) == hashes(Dataset.from_list(rows.to_list())) == known
    assert hashes(rows.add_column("prompt_ids", [[index] for index in range(2500)])) == known
    assert hashes(rows, rows.select(range(5)))["eval rows"] not in (None, known["train rows"])


def test_conversations_are_compared_too():
    def rows(answer):
        return Dataset.from_list([{"chosen": [{"role": "assistant", "content": answer}], "tools": None}])

    assert hashes(rows("a")) == hashes(rows("a")) != hashes(rows("b"))


def test_of_a_stream_the_first_rows_are_compared():
    rows = make_rows(300)
    known = hashes(rows.to_iterable_dataset())
    assert hashes(rows.to_iterable_dataset()) == known
    assert hashes(rows.select([1, 0, *range(2, 300)]).to_iterable_dataset()) != known
    assert hashes(rows.select(range(200)).to_iterable_dataset()) == known


def test_the_tokenizer_is_compared_with_its_template_and_not_with_what_a_call_sets():
    rows = make_rows(3)
    known, template, word = hashes(rows), make_tokenizer(), make_tokenizer()
    called = make_tokenizer()
    called(["w1 w2", "w3"], padding=True, truncation=True, max_length=1)
    assert hashes(rows, tokenizer=called) == known
    template.chat_template = "{{ messages }}"
    word.add_tokens(["new"])
    for other in (template, word):
        assert {name for name, value in hashes(rows, tokenizer=other).items() if value != known[name]} == {"tokenizer"}


def test_a_model_is_its_configuration_and_weights_wherever_it_is(tiny_model, tmp_path):
    known = model_fingerprint(tiny_model)
    folder = shutil.copytree(tiny_model, tmp_path / "moved")
    assert model_fingerprint(str(folder)) == known
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edited = model_fingerprint(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 0.1}))
    assert len({known, edited, model_fingerprint(str(folder))}) == 3
    assert model_fingerprint("no/where", "main") == "no/where@main"


def test_an_adapter_is_compared_with_its_base(tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "gpt2")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"lora_A": torch.ones(3)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 4}))
    known = model_fingerprint(str(adapter))
    save_file({"other": torch.ones(3)}, base / "model.safetensors")
    assert model_fingerprint(str(adapter)) != known


def test_an_adapter_that_was_moved_is_told_where_its_base_is(tiny_model, tmp_path, capsys):
    adapter, gone = tmp_path / "run" / "sft", str(tmp_path / "gone")
    adapter.mkdir(parents=True)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": gone, "r": 4}))
    with pytest.raises(RunError, match=rf"got {gone}, which does not exist\. Write where it is now\."):
        stage_start(str(adapter), "no/where", None, {})
    assert json.loads(config.read_text()) == {"base_model_name_or_path": gone, "r": 4}
    start = stage_start(str(adapter), tiny_model, None, {"tokenizer": "t"})
    assert capsys.readouterr().out == f"{config}: the base model was moved from {gone} to {tiny_model}\n"
    assert json.loads(config.read_text()) == {"base_model_name_or_path": tiny_model, "r": 4}
    assert stage_start(str(adapter), "no/where", None, {"tokenizer": "t"}) == start
    config.write_text(json.dumps({"base_model_name_or_path": "org/on-the-hub", "r": 4}))
    stage_start(str(adapter), tiny_model, None, {})
    assert "org/on-the-hub" in config.read_text()


# What cannot be judged by its files


@pytest.mark.parametrize("method", ["_load_optimizer_and_scheduler", "_load_best_model"])
def test_an_error_while_a_checkpoint_is_loaded_is_one_line(method, tmp_path):
    namespace: dict = {}
    exec(f"def {method}(error):\n    raise error", namespace)
    line = r"Stage `dpo` cannot load .*: broken pipes and more\. If it is damaged, restore"
    with pytest.raises(RunError, match=line), explaining_load_errors("dpo", tmp_path / "checkpoint-4"):
        namespace[method](ValueError("broken\npipes and more"))
    for error in (torch.OutOfMemoryError("the device is full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), explaining_load_errors("dpo", None):
            namespace[method](error)
    with pytest.raises(KeyError), explaining_load_errors("dpo", None):
        raise KeyError("of a training step")


# The trainer of the Python API, which follows transformers


def test_the_trainer_warns_where_transformers_is_silent(settings, tiny_model, tmp_path, caplog):
    def warnings(trainer_class, config, checkpoint):
        caplog.clear()
        args = config(
            **{**settings, "save_strategy": "steps", "save_steps": 2, "max_steps": 2 if checkpoint is None else 3}
        )
        rows = make_rows(8)
        trainer_class(tiny_model, args=args, train_dataset=rows, processing_class=make_tokenizer()).train(checkpoint)
        lines = [record.getMessage() for record in caplog.records]
        return [line for line in lines if "had not been interrupted" in line]

    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    for kind in ((DPOShiftTrainer, DPOShiftConfig), (ChosenSFTTrainer, SFTConfig)):
        assert warnings(*kind, None) == warnings(*kind, checkpoint) == []
        for name in ("rng_state.pth", "scheduler.pt", "optimizer.pt"):
            Path(checkpoint, name).unlink()
            (line,) = warnings(*kind, checkpoint)
            assert f"checkpoint-2 as if it had not been interrupted: {name} is missing." in line
        shutil.rmtree(tmp_path / "out")
