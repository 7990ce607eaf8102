"""Data that cannot be read ends a dry run with exit code 2 and one line, whether or not there is a model."""

import json
import os
from pathlib import Path

import pytest

from dposhift_trl.data.config import DataConfig
from dposhift_trl.data.errors import DataError
from dposhift_trl.data.sources import load_preferences
from dposhift_trl.run import main as main


ROW = json.dumps({"prompt": "w1", "chosen": " w2", "rejected": " w3"}) + "\n"
HEADER = "prompt,chosen,rejected\n"
SEMICOLONS = (
    "its cells must be separated by ',', got the header 'prompt;chosen;rejected' with ';'. Save it with commas as "
    "`.csv`, or with tabs as `.tsv`"
)
NOT_UTF8 = "the file must be UTF-8 text, got the byte {} of another encoding. Save it as UTF-8, for example with"
LATIN = (HEADER + "ä,ö,ü\n").encode("latin-1")
UNREADABLE = {
    "missing file": ("rows.jsonl", None, "cannot be read: the file does not exist"),
    "missing folder": ("folder/", None, "cannot be read: Couldn't reach"),
    "JSON that ends": ("rows.jsonl", '{"prompt": "a"', "cannot be read"),
    "JSON that breaks off later": ("rows.jsonl", ROW + "{oops\n", "cannot be read"),
    "empty": ("rows.jsonl", "", "cannot be read: the file is empty"),
    "blank lines": ("rows.jsonl", "\n\n", "'rows.jsonl', split 'train', has no rows."),
    "header alone": ("rows.csv", HEADER, "'rows.csv', split 'train', has no rows."),
    "no columns that are known": ("rows.jsonl", '{"a": "b"}\n', "must have a column 'chosen', got the columns a."),
    "no Parquet": ("rows.parquet", "PAR1", "cannot be read"),
    "semicolons": ("rows.csv", "prompt;chosen;rejected\na;b;c\n", SEMICOLONS),
    "semicolons and commas": ("rows.csv", "prompt;chosen;rejected\na, b;b;c\n", SEMICOLONS),
    "tabs": ("rows.csv", "prompt\tchosen\trejected\na\tb\tc\n", "with '\\t'. Save it with commas as"),
    "commas": ("rows.tsv", HEADER + "a,b,c\n", "its cells must be separated by '\\t', got the header"),
    "Latin-1 CSV": ("rows.csv", LATIN, NOT_UTF8.format("0xe4")),
    "Latin-1 far down": (
        "rows.csv",
        (HEADER + "a,b,c\n" * 9**5 + "ä,ö,ü\n").encode("latin-1"),
        NOT_UTF8.format("0xe4"),
    ),
    "UTF-16": ("rows.csv", (HEADER + "a,b,c\n").encode("utf-16"), NOT_UTF8.format("0xff")),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def put(name, content):
    if content is not None:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def recipe(path, model):
    Path("x.yaml").write_text(
        f"output_dir: runs/x\nmodel: {{model_name_or_path: {model}}}\ndata: {{path: {path}}}\n"
        "dpo: {bf16: false, use_cpu: true, report_to: none}\n"
    )
    return "x.yaml"


@pytest.mark.parametrize(("name", "content", "line"), UNREADABLE.values(), ids=UNREADABLE)
def test_data_that_cannot_be_read_is_one_line(name, content, line):
    put(name, content)
    with pytest.raises(DataError) as raised:
        load_preferences(DataConfig(path=name), seed=0)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["missing file", "JSON that breaks off later", "no columns that are known", "empty"])
@pytest.mark.parametrize("there", [True, False], ids=["model", "no model"])
def test_a_dry_run_of_it_exits_with_2(kind, there, tiny_model, here):
    name, content, line = UNREADABLE[kind]
    put(name, content)
    said = here(recipe(name, tiny_model if there else "no/model"), "--dry-run", code=2).err.strip().splitlines()
    assert line in said[-1]


def test_a_dry_run_of_text_that_turns_out_not_to_be_utf_8_exits_with_2(tiny_model, here):
    put("rows.jsonl", ROW.replace("w1", "ä").encode("latin-1"))
    assert NOT_UTF8.format("0xe4") in here(recipe("rows.jsonl", tiny_model), "--dry-run", code=2).err


def test_a_dry_run_without_a_model_goes_on_with_data_that_can_be_read(here):
    put("rows.jsonl", ROW)
    assert (
        "The rows cannot be counted: `model.model_name_or_path`"
        in here(recipe("rows.jsonl", "no/model"), "--dry-run").out
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_one_line():
    put("rows.jsonl", ROW)
    Path("rows.jsonl").chmod(0)
    with pytest.raises(
        DataError, match=r"'rows\.jsonl', split 'train', cannot be read: \[Errno 13\] Permission denied"
    ):
        load_preferences(DataConfig(path="rows.jsonl"), seed=0)
