"""Which models and checkpoints are whole, of the layouts that transformers, PEFT, FSDP and DeepSpeed write."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from dposhift_trl.artifacts import ArtifactError
from dposhift_trl.integrity import model_files, read_step, stage_fault, training_state_fault, weights_fault


STATE = {"global_step": 4, "max_steps": 6, "log_history": []}


def write(folder, *names):
    """Small files of the kinds that their names say."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({"weight": torch.zeros(30), "bias": torch.ones(3)}, path, metadata={"format": "pt"})
        elif path.suffix in (".pt", ".pth", ".bin"):
            torch.save({"state": torch.zeros(30)}, path)
        elif path.name.endswith("index.json"):
            shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
            path.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
        else:
            path.write_text("{}")
    return folder


ALONE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
LAYOUTS = {
    "one process": ("model.safetensors", *ALONE),
    "sharded weights": (
        "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", *ALONE,
    ),
    "adapter": ("adapter_model.safetensors", *ALONE),
    "adapter and its frozen copy": ("adapter_model.safetensors", "ref/adapter_model.safetensors", *ALONE),
    "two processes": ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"),
    "FSDP, whole": (
        "model.safetensors", "pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt", "rng_state_0.pth",
        "rng_state_1.pth",
    ),
    "FSDP, sharded": (
        "pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/.metadata",
        "optimizer_0/__0_0.distcp", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth",
    ),
    "DeepSpeed": ("latest", "global_step4/mp_rank_00_model_states.pt", "scheduler.pt", "rng_state.pth"),
    "DeepSpeed with its own scheduler": (
        "latest", "model.safetensors", "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_state.pth",
    ),
}  # fmt: skip


def checkpoint(folder, names):
    write(folder, *names)
    if "latest" in names:
        (folder / "latest").write_text("global_step4")
    return folder


def fault(folder):
    return weights_fault(folder) or training_state_fault(folder)


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_a_checkpoint_of_every_layout_is_whole_and_is_not_without_any_of_its_files(names, tmp_path):
    assert fault(checkpoint(tmp_path / "whole", names)) is None
    optional = {"scheduler.pt"} if "latest" in names else set()  # DeepSpeed's own is in its states
    if len({"model.safetensors", "pytorch_model_fsdp.bin", "latest"} & set(names)) == 2:  # weights twice
        optional |= {"model.safetensors", "pytorch_model_fsdp.bin"}
    optional |= {"ref/adapter_model.safetensors"}  # taken from the model that the stage starts from
    # Without the last number, a smaller number of processes would have been enough; the run records it
    for number, name in enumerate(sorted(set(names) - optional - {"rng_state_1.pth"})):
        folder = checkpoint(tmp_path / str(number), names)
        (folder / name).unlink()
        if name.endswith(".distcp"):
            continue  # numbered freely
        assert fault(folder) is not None, name


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("damage", ["half", "empty", "zeros", "one byte short"])
def test_a_file_that_is_cut_is_seen(names, damage, tmp_path):
    judged = [name for name in names if name.endswith((".safetensors", ".pth", ".bin")) or name in ALONE]
    for number, name in enumerate(judged):
        path = checkpoint(tmp_path / str(number), names) / name
        content = path.read_bytes()
        path.write_bytes(
            {"half": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content))}.get(
                damage, content[:-1]
            )
        )
        assert fault(tmp_path / str(number)) == f"{name} is cut or broken"


def test_the_number_of_processes_tells_how_many_random_states_there_are(tmp_path):
    folder = checkpoint(tmp_path, LAYOUTS["two processes"])
    assert training_state_fault(folder, processes=2) is None
    assert training_state_fault(folder, processes=3) == "rng_state_2.pth is missing"
    assert training_state_fault(folder, processes=1) == "rng_state.pth is missing"
    (folder / "rng_state_1.pth").unlink()
    assert training_state_fault(folder) == "rng_state_1.pth is missing"


def test_a_scaled_loss_needs_its_scale(tmp_path):
    folder = checkpoint(tmp_path, LAYOUTS["one process"])
    assert training_state_fault(folder, scales_loss=True) == "scaler.pt is missing"
    write(folder, "scaler.pt")
    assert training_state_fault(folder, scales_loss=True) is None
    (folder / "scaler.pt").write_bytes(b"PK")
    assert training_state_fault(folder) == "scaler.pt is cut or broken"


def test_an_adapter_that_is_gone_is_not_made_up_for_by_its_frozen_copy(tmp_path):
    folder = checkpoint(tmp_path, LAYOUTS["adapter and its frozen copy"])
    (folder / "adapter_model.safetensors").unlink()
    write(folder, "adapter_config.json")
    assert weights_fault(folder) == "adapter_model.safetensors is missing"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "[" * 100_000, json.dumps({**STATE, "global_step": None}), json.dumps({"global_step": 4})],
    ids=["empty", "cut", "list", "nested", "step", "short"],
)
def test_a_broken_trainer_state_has_no_step(content, tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE))
    assert read_step(tmp_path) == (4, 6)
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ArtifactError):
        read_step(tmp_path)


@pytest.mark.parametrize("recorded", [True, False], ids=["of now", "of an earlier release"])
def test_a_finished_stage_has_its_model(recorded, tmp_path):
    names = ["model.safetensors", "config.json", "tokenizer.json", "merged/config.json", "merged/model.safetensors"]
    whole = write(tmp_path / "whole", *names, "training_args.bin", "trainer_state.json", "README.md")
    (whole / "finished.json").write_text(json.dumps({"files": model_files(whole)} if recorded else {"step": 6}))
    assert model_files(whole) == sorted(names)
    assert stage_fault(whole) is None
    for name in names if recorded else ["model.safetensors", "merged/model.safetensors"]:
        folder = shutil.copytree(whole, tmp_path / "copy", dirs_exist_ok=True)
        if name.endswith(".safetensors"):
            (folder / name).write_bytes((folder / name).read_bytes()[:-1])
            assert stage_fault(folder) == f"{name} is cut or broken"
        (folder / name).unlink()
        assert stage_fault(folder) == f"{name} is missing"
    with pytest.raises(ArtifactError):
        stage_fault(tmp_path)
