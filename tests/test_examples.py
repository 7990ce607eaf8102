"""The notebook and the scripts in examples/ run as they are, on a tiny model."""

import importlib.util
import json
import re
import sys

import matplotlib
import pytest
from conftest import jitter, make_rows
from test_docs import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer


EXAMPLES = ROOT / "examples"


@pytest.fixture
def pairs(tmp_path):
    """A folder with preference rows, which `load_dataset` reads as it reads a name on the Hub."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    make_rows(20).to_json(folder / "train.jsonl")
    return folder


def test_the_notebook_runs_from_top_to_bottom(pairs, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    notebook = json.loads((EXAMPLES / "dpo_shift.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert names["LAMBDAS"] == [1.0, 0.75]
            names |= {"MODEL": str(tiny_model), "DATA": str(pairs), "TRAIN_ROWS": 8, "EVAL_ROWS": 4}
    results = names["results"]
    assert list(results) == [1.0, 0.75]
    assert results.loc["displacement/chosen", 1.0] != results.loc["displacement/chosen", 0.75]
    assert capsys.readouterr().out.count("report.html") == 2
    assert len(names["panels"][0].lines) == 3
    assert all(log[0]["step"] == 0 and log[-1]["step"] == 1 for log in names["evaluations"].values())


def run_script(name, arguments, monkeypatch):
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), EXAMPLES / name)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", [name, *(str(word) for pair in arguments.items() for word in pair)])
    script.main()


def test_the_script_trains_and_says_what_happened_to_the_chosen_answers(
    pairs, tiny_model, tmp_path, monkeypatch, capsys
):
    arguments = {
        "--model": tiny_model, "--data": pairs / "train.jsonl", "--rows": 8, "--held-out": 4, "--shift-lambda": 0.5,
        "--learning-rate": 1e-2, "--output-dir": tmp_path / "out",
    }  # fmt: skip
    run_script("train.py", arguments, monkeypatch)
    told = capsys.readouterr().out
    assert "nats per answer" in told
    assert f"The report is {tmp_path / 'out' / 'report' / 'report.html'}" in told
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_diagnosis_tells_a_model_from_what_it_started_from(pairs, tiny_model, tmp_path, monkeypatch, capsys):
    policy = tmp_path / "policy"
    moved = jitter(AutoModelForCausalLM.from_pretrained(tiny_model), 0.1)
    moved.save_pretrained(policy)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(policy)
    arguments = {
        "--policy": policy, "--reference": tiny_model, "--data": pairs / "train.jsonl", "--limit": 12,
        "--output-dir": tmp_path / "out",
    }  # fmt: skip
    run_script("diagnose.py", arguments, monkeypatch)
    *_, headline, chosen, rejected, margin, accuracy, _ = capsys.readouterr().out.splitlines()
    assert headline.endswith(".")
    assert re.fullmatch(r"  chosen: -?[.\d]+ nats per answer \(95% interval -?[.\d]+ to -?[.\d]+\), \w+", chosen)
    assert [line.split(":")[0].strip() for line in (rejected, margin, accuracy)] == ["rejected", "margin", "accuracy"]
    assert (tmp_path / "out" / "pairs" / "eval-000000.parquet").is_file()
