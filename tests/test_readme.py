"""Every block of the README and every recipe's own command is run or parsed."""

import json
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from dposhift_trl import __version__
from dposhift_trl.__main__ import COMMANDS, module_of
from dposhift_trl.data.chat_template import PLAIN_CHAT_TEMPLATE
from dposhift_trl.data.demo import save_demo_model
from dposhift_trl.recipe import load_recipe
from dposhift_trl.schedules import LAMBDA_SCHEDULES


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ON_CPU = ["dpo.bf16=false"]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def run_commands():
    lines = [line for block in blocks("bash") for line in block.replace("&&", "\n").splitlines()]
    headers = [
        line.lstrip("# ")
        for recipe in RECIPES
        for line in recipe.read_text(encoding="utf-8").splitlines()
        if line.startswith("#") and "-m dposhift_trl.run" in line
    ]
    return [line.strip() for line in [*lines, *headers] if "-m dposhift_trl.run" in line]


@pytest.mark.parametrize("line", run_commands())
def test_every_run_command_names_a_recipe_that_exists_and_keys_that_are_valid(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    arguments = words[words.index("dposhift_trl.run") + 1 :]
    overrides = [word for word in arguments[1:] if not word.startswith("--")]
    if "--config_file" in words:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    text = (ROOT / arguments[0]).read_text(encoding="utf-8")
    on_cpu = [f"{stage}.bf16=false" for stage in ("sft", "dpo") if f"\n{stage}:" in text]
    assert load_recipe(arguments[0], [*overrides, *on_cpu]).stages


def test_every_recipe_ends_its_header_with_its_own_command():
    for recipe in RECIPES:
        header = recipe.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        assert re.search(rf"-m dposhift_trl\.(run|sweep) recipes/{re.escape(recipe.name)}( |$)", header[-1]), recipe


def test_the_six_lines_train(tmp_path, monkeypatch):
    (block,) = blocks("python")
    model = tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct"
    save_demo_model(str(model))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = tmp_path / "trl-lib" / "ultrafeedback_binarized"
    rows.mkdir(parents=True)
    ask = {"role": "user", "content": "Count."}
    turns = [[ask, {"role": "assistant", "content": word}] for word in ("One.", "Two.")]
    (rows / "train.jsonl").write_text((json.dumps({"chosen": turns[0], "rejected": turns[1]}) + "\n") * 8)
    monkeypatch.chdir(tmp_path)
    # The block leaves bf16 at TRL's default, which a CPU refuses without `use_cpu`
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    names: dict = {}
    exec(block, names)
    assert names["trainer"].train_dataset[0]["chosen_ids"] != names["trainer"].train_dataset[0]["rejected_ids"]
    assert names["trainer"].state.global_step == 3
    assert names["trainer"].shift_lambda == 0.75
    assert (tmp_path / "qwen-shift" / "checkpoint-3" / "trainer_state.json").is_file()


def test_the_schedule_table_names_every_schedule():
    table = README[README.index("| `lambda_schedule` |") :]
    assert all(f"`{name}`" in table for name in LAMBDA_SCHEDULES)


def test_the_changelog_speaks_of_this_version():
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_ci_runs_the_two_commands_as_printed():
    assert [line for line in README.splitlines() if line.startswith("pip install ")] == [
        "pip install -c constraints.txt . && accelerate launch -m dposhift_trl.run recipes/tiny_shift.yaml",
        'pip install -c constraints.txt ".[test]" && pytest',
    ]


def test_torch_is_pinned_by_the_constraints_alone_to_the_release_that_is_tested():
    (pin,) = map(Requirement, (ROOT / "constraints.txt").read_text().splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = [need for need in map(Requirement, project["dependencies"]) if need.name == pin.name]
    (version,) = [spec.version for spec in pin.specifier if spec.operator == "=="]
    assert pin.name == "torch"
    assert needed.specifier.contains(version)
    assert {spec.operator for spec in needed.specifier} == {">="}  # so that users may have a newer one
    assert Version(torch.__version__).base_version == version


def other_commands():
    lines = [line.strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if re.search(r"-m dposhift_trl\.(?!run\b)", line)]


@pytest.mark.parametrize("line", other_commands())
def test_every_other_command_takes_the_options_it_is_given(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    name, *arguments = words[words.index("-m") + 1 :]
    module = import_module(module_of(name.removeprefix("dposhift_trl.")))
    if name == "dposhift_trl.sweep":
        recipe, *overrides = arguments
        assert len(module.plan(recipe, [*overrides, "sft.bf16=false", *ON_CPU]).points) == 6
        return
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in arguments if word.startswith("--"))


def test_the_readme_names_every_command_there_is():
    assert all(f"-m dposhift_trl.{command}" in README for command in COMMANDS)
