"""The notebook and the script in examples/ run as they are, on a tiny model."""

import importlib.util
import json
import sys

import matplotlib
import pytest
from conftest import make_rows
from test_docs import ROOT


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


def test_the_script_trains_and_says_what_happened_to_the_chosen_answers(
    pairs, tiny_model, tmp_path, monkeypatch, capsys
):
    spec = importlib.util.spec_from_file_location("train", EXAMPLES / "train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arguments = {
        "--model": tiny_model, "--data": pairs / "train.jsonl", "--rows": 8, "--held-out": 4, "--shift-lambda": 0.5,
        "--learning-rate": 1e-2, "--output-dir": tmp_path / "out",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", *(str(word) for pair in arguments.items() for word in pair)])
    script.main()
    told = capsys.readouterr().out
    assert "nats per answer" in told
    assert f"The report is {tmp_path / 'out' / 'report' / 'report.html'}" in told
    assert (tmp_path / "out" / "model.safetensors").is_file()
