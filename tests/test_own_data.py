"""`recipes/own_data.yaml`, as someone with a file of pairs uses it."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import make_rows

from dposhift_trl.recipe import load_recipe, parse_yaml
from dposhift_trl.run import main as main


RECIPE = Path(__file__).parent.parent / "recipes" / "own_data.yaml"
TEXT = RECIPE.read_text(encoding="utf-8")
ON_CPU = [f"{stage}.{setting}" for stage in ("sft", "dpo") for setting in ("bf16=false", "use_cpu=true")]
OFF = sorted(set(re.findall(r"^ +# (\w+: .*)$", TEXT, re.MULTILINE)))  # settings that are commented out


def test_a_file_with_other_names_of_columns_trains(tmp_path, tiny_model, here):
    rows = make_rows(24)
    with open(tmp_path / "mine.jsonl", "w") as file:
        for number, row in enumerate(rows):
            names = {"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"], "uid": f"pair-{number}"}
            file.write(json.dumps(names) + "\n")
    here(
        RECIPE,
        f"output_dir={tmp_path / 'run'}",
        f"model.model_name_or_path={tiny_model}",
        f"data.path={tmp_path / 'mine.jsonl'}",
        "data.columns={prompt: question, chosen: good, rejected: bad, id: uid}",
        "data.eval_size=6",
        "sft.max_length=64",
        "dpo.max_length=64",
        "wandb.mode=disabled",
        *ON_CPU,
    )
    evaluated = pq.read_table(tmp_path / "run" / "eval_rows.parquet").to_pydict()
    scores = pq.read_table(tmp_path / "run" / "dpo" / "pairs" / "eval-000003.parquet").to_pydict()
    assert len(evaluated["id"]) == 6
    for index, identity, prompt in zip(evaluated["row_index"], evaluated["id"], evaluated["prompt"], strict=True):
        assert (identity, prompt) == (f"pair-{index}", rows[index]["prompt"])  # as they stand in the file
    assert dict(zip(scores["row_index"], scores["id"], strict=True)) == {
        index: f"pair-{index}" for index in evaluated["row_index"]
    }
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert any(f"Row {index}, id pair-{index}" in page for index in evaluated["row_index"])
    state = json.loads((tmp_path / "run" / "dpo" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert "chosen answers" in (tmp_path / "run" / "dpo" / "README.md").read_text()


def test_what_one_changes_first_is_there():
    values = parse_yaml(TEXT)
    shown = {*values["data"], *values["dpo"], *values["wandb"], *(line.split(":")[0] for line in OFF)}
    wanted = {"path", "columns", "eval_size", "eval_split", "max_length", "per_device_train_batch_size"}
    assert shown >= wanted | {"shift_lambda", "report_to", "mode", "use_peft", "audit", "use_cpu"}


@pytest.mark.parametrize("line", OFF)
def test_a_setting_that_is_off_can_be_turned_on(line, tmp_path):
    text = re.sub(rf"^( +)# {re.escape(line)}$", rf"\1{line}", TEXT, flags=re.MULTILINE)
    if line.startswith("eval_split"):
        text = text.replace("  eval_size: 0.05\n", "")
    path = tmp_path / "own_data.yaml"
    path.write_text(text, encoding="utf-8")
    on_cpu = [] if line == "use_cpu: true" else ON_CPU
    on, off = (load_recipe(str(file), ["sft.bf16=false", "dpo.bf16=false", *on_cpu]) for file in (path, RECIPE))
    assert on.resolved != off.resolved
