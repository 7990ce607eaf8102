"""A run that cannot end with a verdict says so at once."""

import pytest
from conftest import make_rows
from ruamel.yaml import YAML

from dposhift_trl.pipeline.prospects import why_no_verdict
from dposhift_trl.recipe import load_recipe
from dposhift_trl.run import main as main


STAGE = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "max_steps": 1, "report_to": "none"}


@pytest.fixture
def recipe(tmp_path, tiny_model):
    make_rows(16).to_json(tmp_path / "rows.jsonl")
    values = {
        "output_dir": str(tmp_path / "run"),
        "report": False,
        "model": {"model_name_or_path": tiny_model},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "dpo": {**STAGE},
    }
    YAML(typ="safe").dump(values, tmp_path / "recipe.yaml")
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        pytest.param([], "there are no evaluation rows. Set `data.eval_split`", id="no-rows"),
        pytest.param(
            ["data.eval_size=4", "dpo.eval_strategy='no'"], "Write `dpo.eval_strategy=steps`", id="no-evaluation"
        ),
        pytest.param(
            ["data.eval_size=4", "dpo.eval_strategy='no'", "dpo.eval_on_start=true"],
            "nothing is evaluated once training has begun",
            id="only-before-training",
        ),
    ],
)
def test_the_reason_and_the_remedy_are_one_line(overrides, says, recipe):
    reason = why_no_verdict(load_recipe(recipe, overrides))
    assert reason.startswith("No verdict will be possible")
    assert says in reason
    assert "\n" not in reason


@pytest.mark.parametrize("overrides", [["data.eval_size=4"], ["dpo=null", "sft={max_steps: 1, bf16: false}"]])
def test_a_run_that_is_evaluated_or_has_no_stage_to_judge_gives_no_reason(overrides, recipe):
    assert why_no_verdict(load_recipe(recipe, overrides)) is None


def test_dry_run_and_run_say_it(recipe, here):
    assert "No verdict will be possible" in here(recipe, "--dry-run").out
    assert "No verdict will be possible" not in here(recipe, "--dry-run", "data.eval_size=4").out
    output = here(recipe).out
    assert output.index("No verdict will be possible") < output.index("dpo: starting from")
