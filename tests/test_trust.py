"""Code of strangers: a run folder, a model, a template or a cache from elsewhere runs nothing without consent."""

import contextlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from test_generate import SHORT, save_run

from dposhift_trl.data.chat_template import PLAIN_CHAT_TEMPLATE
from dposhift_trl.generate.__main__ import main as generate
from dposhift_trl.recipe import dump_yaml, load_recipe, parse_yaml
from dposhift_trl.run import main as train


class Evil:
    """Makes the file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def model_code(run: Path, canary: Path) -> None:
    for name in ("sft", "dpo"):
        (run / name / "evil.py").write_text(
            f"open({str(canary)!r}, 'w')\nfrom transformers import *\n"
            "class Config(GPT2Config): model_type = 'evil'\nclass Model(GPT2LMHeadModel): config_class = Config\n"
        )
        edit(
            run / name / "config.json",
            model_type="evil",
            auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        )


def tokenizer_code(run: Path, canary: Path) -> None:
    (run / "dpo" / "evil.py").write_text(
        f"open({str(canary)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )
    edit(
        run / "dpo" / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]},
    )


def generation_code(run: Path, canary: Path) -> None:
    for name in ("sft", "dpo"):
        (run / name / "custom_generate").mkdir()
        (run / name / "custom_generate" / "generate.py").write_text(
            f"open({str(canary)!r}, 'w')\ndef generate(model, **kwargs): return kwargs['input_ids']\n"
        )
        edit(run / name / "generation_config.json", custom_generate=str(run / name))


def pickled_weights(run: Path, canary: Path) -> None:
    (run / "sft" / "model.safetensors").unlink()
    (run / "sft" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(canary)))


def pickled_adapter(run: Path, canary: Path) -> None:
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(run / "base")}
    edit(run / "sft" / "adapter_config.json", **settings)
    (run / "sft" / "adapter_model.bin").write_bytes(pickle.dumps(Evil(canary)))


def adapter_of_another_library(run: Path, canary: Path) -> None:
    (run / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    mapping = {"base_model_class": "Model", "parent_library": "evil"}
    edit(run / "sft" / "adapter_config.json", peft_type="LORA", auto_mapping=mapping, base_model_name_or_path="x")
    shutil.copy(run / "sft" / "model.safetensors", run / "sft" / "adapter_model.safetensors")


def pickles_beside_the_model(run: Path, canary: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        (run / "dpo" / name).write_bytes(pickle.dumps(Evil(canary)))


def template(run: Path, canary: Path) -> None:
    call = f"cycler.__init__.__globals__.os.mknod('{canary}')"
    (run / "dpo" / "chat_template.jinja").write_text("{{ " + call + " }}" + PLAIN_CHAT_TEMPLATE)


ATTACKS = {
    model_code: "comes with Python code of its own. Read the code, and pass --trust-remote-code to run it.",
    tokenizer_code: None,  # the class of transformers is taken
    generation_code: None,
    pickled_weights: "no file named model.safetensors",
    pickled_adapter: "an adapter must be saved as adapter_model.safetensors, got no such file",
    adapter_of_another_library: "which is not in the import allowlist",
    pickles_beside_the_model: None,
    template: "the chat template cannot render a prompt",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    run = save_run(tmp_path_factory.mktemp("made") / "run")
    recipe = parse_yaml((run / "recipe.yaml").read_text())
    recipe["model"]["trust_remote_code"] = True
    (run / "recipe.yaml").write_text(dump_yaml(recipe))
    return run


@pytest.fixture
def run(made, tmp_path, monkeypatch) -> Path:
    run = Path(shutil.copytree(made, tmp_path / "run"))
    monkeypatch.chdir(run)
    monkeypatch.syspath_prepend(run)  # as `python -m` does for the folder it is called in
    return run


@pytest.mark.parametrize(("attack", "answer"), ATTACKS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_generate_runs_no_code_of_a_run_folder(attack, answer, run, tmp_path, capfd):
    attack(run, tmp_path / "canary")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "w1"}]}) + "\n")
    prompts = ["--prompts", str(tmp_path / "p.jsonl")] if attack is template else []
    assert generate([str(run), *SHORT, *prompts]) == (0 if answer is None else 2)
    assert not (tmp_path / "canary").exists()
    error = capfd.readouterr().err.strip().splitlines()
    assert (answer or "") in (error or [""])[-1]


@pytest.mark.parametrize("name", ["recipe.yaml", "eval_rows.parquet", "dpo/finished.json", "sft/adapter_config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["FIFO", "device"])
def test_generate_waits_for_no_pipe_in_a_run_folder(make, name, run, capfd):
    (run / name).unlink(missing_ok=True)
    make(run / name)
    assert generate([str(run), *SHORT]) == 2
    assert re.search("must be a file, got a (FIFO|device)|is not finished", capfd.readouterr().err.splitlines()[-1])


def test_generate_writes_through_no_link_in_a_run_folder(run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (run / "generations").mkdir()
    for name in ("statistics.json", "statistics.json.tmp", "dpo-greedy.jsonl", "dpo-greedy.jsonl.tmp"):
        (run / "generations" / name).symlink_to(tmp_path / "mine")
    assert generate([str(run), *SHORT, "--overwrite"]) == 0
    assert (tmp_path / "mine").read_text() == "mine"


# Models and run folders that a recipe names


def write_recipe(path: Path, **model) -> Path:
    stage = {
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "per_device_train_batch_size": 2,
        "max_steps": 2, "save_steps": 1, "save_total_limit": None, "eval_strategy": "no", "max_length": 32,
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    rows = path.with_name("rows.jsonl")
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(4)))
    recipe = {
        "output_dir": str(path.with_name("out")), "model": model, "data": {"path": str(rows)}, "report": False,
        "dpo": stage,
    }  # fmt: skip
    path.write_text(dump_yaml(recipe))
    return path


@pytest.mark.parametrize("attack", [model_code, pickled_weights, pickled_adapter])
def test_run_runs_no_code_of_a_model_unless_its_own_recipe_says_so(attack, run, tmp_path, capfd):
    attack(run, tmp_path / "canary")
    recipe = write_recipe(tmp_path / "x.yaml", model_name_or_path=str(run / "sft"))
    assert train([str(recipe)]) == 2
    assert not (tmp_path / "canary").exists()
    streams = capfd.readouterr()
    assert "Traceback" not in streams.err
    named = f"{run / 'sft'} is an adapter of {run / 'base'}, which its adapter_config.json names"
    assert (named in streams.out) == (attack is pickled_adapter)
    if attack is model_code:
        recipe = write_recipe(tmp_path / "x.yaml", model_name_or_path=str(run / "sft"), trust_remote_code=True)
        assert train([str(recipe), "--dry-run"]) == 0
        assert (tmp_path / "canary").exists()


def test_a_stage_that_starts_anew_does_not_show_the_log_of_the_training_before(run, tmp_path, capfd):
    recipe = write_recipe(tmp_path / "x.yaml", model_name_or_path=str(run / "base"))
    stage, only_now = tmp_path / "out" / "dpo", ["dpo.save_strategy=no", "dpo.max_steps=1"]
    stage.mkdir(parents=True)
    (tmp_path / "out" / "recipe.yaml").write_text(dump_yaml(load_recipe(str(recipe), only_now).resolved))
    (stage / "trainer_state.json").write_text("of the training before")
    assert train([str(recipe), *only_now]) == 0
    assert (stage / "earlier-1" / "trainer_state.json").read_text() == "of the training before"
    assert json.loads((stage / "trainer_state.json").read_text())["global_step"] == 1
    assert f"of an earlier training are now in {stage}/earlier-1" in capfd.readouterr().out


def test_a_resumed_run_runs_no_code_of_its_checkpoint(run, tmp_path):
    recipe = write_recipe(tmp_path / "x.yaml", model_name_or_path=str(run / "base"))
    assert train([str(recipe)]) == 0
    (tmp_path / "out" / "dpo" / "finished.json").unlink()
    shutil.rmtree(tmp_path / "out" / "dpo" / "checkpoint-2")
    for path in (*tmp_path.glob("out/dpo/checkpoint-1/*.p*"), *tmp_path.glob("out/dpo/**/training_args.bin")):
        assert path.suffix in (".pt", ".pth", ".bin")
        torch.save(Evil(tmp_path / f"canary of {path.name}"), path)
    with contextlib.suppress(pickle.UnpicklingError):
        train([str(recipe)])
    assert not list(tmp_path.glob("canary*"))


@pytest.mark.parametrize("attack", [model_code, tokenizer_code])
def test_generate_runs_the_code_of_a_model_for_who_asks_for_it(attack, run, tmp_path):
    attack(run, tmp_path / "canary")
    assert generate([str(run), *SHORT, "--trust-remote-code"]) == 0
    assert (tmp_path / "canary").exists()
