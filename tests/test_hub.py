"""What `push_to_hub` creates and uploads, through transformers' own code and a Hub that keeps notes."""

import doctest
import importlib
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_rows
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer, hub
from dposhift_trl.recipe import RecipeError, load_recipe
from dposhift_trl.run import main
from dposhift_trl.sweep.plan import plan


httpx = importlib.import_module(HTTPError.__module__.partition(".")[0])  # or httpx2
STAGE = {
    "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "per_device_train_batch_size": 4, "max_steps": 2,
    "logging_steps": 1, "save_steps": 1, "eval_steps": 1, "report_to": "none", "push_to_hub": True,
    "disable_tqdm": True,
}  # fmt: skip


@dataclass
class Upload:
    """One upload: its repository, its files, the folder in the repository, and the text of its card."""

    repository: str
    files: set[str]
    folder: str | None
    card: str
    is_final: bool


@pytest.fixture
def the_hub(monkeypatch):
    """Repositories that were created, with what they were created with, and uploads in order."""
    found = SimpleNamespace(repositories={}, uploads=[])

    def create_repo(self, repo_id, *, private=None, **options):
        name = repo_id if "/" in repo_id else f"user/{repo_id}"
        found.repositories[name] = private
        return SimpleNamespace(repo_id=name)

    def upload_folder(
        self, *, repo_id, folder_path, path_in_repo=None, ignore_patterns=None, run_as_future=False, **_
    ):
        root = Path(folder_path)
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        files = set(filter_repo_objects(names, ignore_patterns=ignore_patterns))
        card = (root / "README.md").read_text() if "README.md" in files else ""
        found.uploads.append(Upload(repo_id, files, path_in_repo, card, is_final=not run_as_future))
        done = Future()
        done.set_result(None)
        return done

    def answer(request):  # to whoever asks whether there is a Hub, and who is logged in
        return httpx.Response(200, json={"name": "user"}) if "whoami" in request.url.path else httpx.Response(404)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(answer)))
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    yield found
    set_client_factory(httpx.Client)


@pytest.fixture
def recipe(tmp_path, tiny_model):
    make_rows(12).to_json(tmp_path / "rows.jsonl")
    values = {
        "output_dir": str(tmp_path / "run"),
        "run_name": "shift",
        "report": False,
        "model": {"model_name_or_path": tiny_model, "use_peft": True, "lora_target_modules": ["c_attn"]},
        "data": {"path": str(tmp_path / "rows.jsonl"), "eval_size": 4},
        "sft": dict(STAGE),
        "dpo": {**STAGE, "lambda_schedule": "linear_decrease", "learning_rate": 1e-2},
    }
    path = tmp_path / "recipe.yaml"
    YAML(typ="safe").dump(values, path)
    return str(path)


def test_each_stage_of_a_run_has_a_private_repository_and_every_card_is_complete(recipe, the_hub):
    assert main([recipe]) == 0
    assert the_hub.repositories == {"user/shift-sft": True, "user/shift-dpo": True}
    for stage in ("sft", "dpo"):
        *during, last = [upload for upload in the_hub.uploads if upload.repository == f"user/shift-{stage}"]
        assert len(during) == 2  # one for each checkpoint
        assert last.is_final
        assert not any(upload.is_final for upload in during)
        for upload in (*during, last):
            assert upload.files >= {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
            assert not [name for name in upload.files if name.startswith(("ref/", "checkpoint-"))]
            assert f"# Model Card for shift-{stage}\n" in upload.card
            assert upload.card.count("## Recipe") == 1
            assert "run_name: shift\n" in upload.card
            assert upload.card.count("## DPO-Shift") == (stage == "dpo")
        if stage == "dpo":
            assert "| lambda schedule | linear_decrease |" in last.card
            assert "`eval_displacement/chosen`" in last.card
            assert "chosen answers" in last.card.split("## DPO-Shift")[1].split("## Recipe")[0].split("| seed |")[1]
    saved = load_recipe(recipe).output_dir / "dpo"
    assert (saved / "README.md").read_text() == the_hub.uploads[-1].card
    assert not (saved / "ref").exists()
    assert (saved / "checkpoint-2" / "ref").is_dir()  # where it is needed to resume


def test_a_checkpoint_on_the_hub_can_be_resumed_from(recipe, the_hub):
    assert main([recipe, "sft=null", "dpo.hub_strategy=checkpoint"]) == 0
    checkpoints = [upload for upload in the_hub.uploads if upload.folder is not None]
    assert [upload.folder for upload in checkpoints] == ["last-checkpoint"] * 2
    for upload in checkpoints:
        assert upload.files >= {"optimizer.pt", "trainer_state.json", "adapter_model.safetensors"}


FAULTS = {
    "refused": HfHubHTTPError(
        "503 Server Error:\nBusy", response=httpx.Response(503, request=httpx.Request("POST", "/"))
    ),
    "no network": httpx.ConnectError("503 Server Error: Busy"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_push_that_fails_is_one_line_and_the_same_command_pushes_again(fault, recipe, the_hub, monkeypatch, capsys):
    upload_folder = HfApi.upload_folder

    def refuse(self, **arguments):
        if not arguments.get("run_as_future"):
            raise fault
        return upload_folder(self, **arguments)

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    arguments = [recipe, "sft=null", "model.use_peft=false"]
    assert main(arguments) == 1
    folder = load_recipe(recipe).output_dir / "dpo"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"dpo: the model is saved in {folder}, but not pushed to the Hub: 503 Server Error: Busy. Run the same "
        "command again to push it."
    )
    assert (folder / "model.safetensors").is_file()
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert main(arguments) == 0
    assert the_hub.uploads[-1].is_final
    assert the_hub.uploads[-1].card.count("## Recipe") == 1
    assert "| lambda schedule | linear_decrease |" in the_hub.uploads[-1].card


def test_the_trainer_alone_pushes_no_copy_of_the_adapter_either(tiny_model, settings, the_hub):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(task_type="CAUSAL_LM"))
    args = DPOShiftConfig(**{**settings, "max_steps": 1, "push_to_hub": True})
    trainer = DPOShiftTrainer(
        model, args=args, train_dataset=make_rows(4), processing_class=AutoTokenizer.from_pretrained(tiny_model)
    )
    assert "ref" in trainer.model.peft_config
    trainer.train()
    trainer.push_to_hub()
    assert the_hub.repositories == {"user/out": None}  # as of transformers
    (upload,) = the_hub.uploads
    assert "adapter_model.safetensors" in upload.files
    assert not [name for name in upload.files if name.startswith("ref/")]
    assert "## DPO-Shift" in upload.card


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_repository_that_cannot_be_created_is_one_line(fault, recipe, the_hub, monkeypatch, capsys):
    def refuse(self, *arguments, **options):
        raise fault

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert main([recipe, "sft=null"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "Stage `dpo` cannot start: 503 Server Error: Busy"


# Names


def ids(recipe, *overrides):
    stages = load_recipe(recipe, overrides).stages
    return {name: (args.hub_model_id, args.hub_private_repo) for name, args in stages.items()}


def test_what_the_recipe_says_outranks_the_defaults(recipe):
    assert ids(recipe, "dpo.hub_model_id=me/mine") == {"sft": ("shift-sft", True), "dpo": ("me/mine", True)}
    assert ids(recipe, "dpo.hub_private_repo=false")["dpo"] == ("shift-dpo", False)
    assert ids(recipe, "dpo.hub_private_repo=null")["dpo"] == ("shift-dpo", True)
    assert ids(recipe, "dpo.push_to_hub=false")["dpo"] == (None, None)
    assert "hub_model_id" not in load_recipe(recipe).resolved["dpo"]


def test_every_point_of_a_sweep_has_a_repository_of_its_own(recipe, tmp_path):
    sweep = plan(recipe, ["dpo.shift_lambda=0.5,1.0", "dpo.lambda_schedule=fixed", "dpo.learning_rate=1e-6,2e-6"])
    names = []
    for run in sweep.runs:
        file = tmp_path / f"{run.name}.yaml"
        YAML(typ="safe").dump(run.values, file)
        names += [name for name, _ in ids(str(file)).values()]
    assert len(names) == len(set(names)) == 5
    assert names[0] == "shift-base-sft"
    assert all(name.startswith("shift-fixed-") for name in names[1:])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dpo.hub_model_id=../climbed"], "`dpo.hub_model_id` must be the name of a repository, got '../climbed': "),
        (["sft.hub_model_id=me/a", "dpo.hub_model_id=me/a"], "`hub_model_id` must differ in `sft` and `dpo`, got "
         "'me/a' in both, where the second stage would replace the first. Leave it out in one of them."),
        (["dpo.hub_token=hf_x"], "`dpo.hub_token` cannot be set here: run `hf auth login` or set the environment "
         "variable HF_TOKEN; a recipe is copied to the model card."),
    ],
    ids=["no name", "twice", "token"],
)  # fmt: skip
def test_a_mistake_is_one_line(overrides, message, recipe):
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe, overrides)
    assert str(refused.value).startswith(f"{recipe}: {message}")
    assert "\n" not in str(refused.value)


def test_one_repository_for_a_whole_sweep_is_refused(recipe):
    with pytest.raises(RecipeError) as refused:
        plan(recipe, ["dpo.shift_lambda=0.5,1.0", "dpo.hub_model_id=me/mine"])
    assert str(refused.value) == (
        f"{recipe}: `dpo.hub_model_id` is not supported in a sweep, whose points would replace each other there, got "
        "'me/mine'. Leave it out; each point is pushed under its own name."
    )


def test_names_of_repositories():
    assert doctest.testmod(hub).failed == 0
    awkward = ["a" * 200, "a b", "a-b ", "ü", "--", "..", "a..b", "x.git", ".x", "x-", "a/b", "a\\b", "über uns"]
    names = [hub.repo_name(name) for name in awkward]
    assert [hub.hub_id_fault(name) for name in names] == [None] * len(names)
    assert len(set(names)) == len(names)
