"""Rows keep their number in the file, and their id, whatever becomes of the others."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import make_tokenizer

from dposhift_trl.columns import ROW_INDEX, STREAM_ROW_INDEX
from dposhift_trl.data.audit import audit_preferences
from dposhift_trl.data.config import DataConfig
from dposhift_trl.data.errors import DataError
from dposhift_trl.data.origin import origin, origin_text, sources_of
from dposhift_trl.data.sources import load_preferences
from dposhift_trl.data.tokens import Truncation
from dposhift_trl.pipeline.run_folder import save_evaluated_rows
from dposhift_trl.report.texts import row_name
from dposhift_trl.training.recorder import row_ids


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, count, **columns):
    """A file of pairs whose prompt says which row of which file it is."""
    rows = [
        {"prompt": f"{name} {n}", "chosen": "w1", "rejected": "w2", **{key: make(n) for key, make in columns.items()}}
        for n in range(count)
    ]
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


def numbers(rows, column=ROW_INDEX):
    return [(row[column], row["prompt"]) for row in rows]


@pytest.mark.parametrize(
    "settings",
    [{}, {"eval_size": 5}, {"eval_size": 0.5, "max_train_rows": 4, "max_eval_rows": 3}],
    ids=["all", "held out", "few of them"],
)
def test_rows_are_numbered_as_in_the_file(settings):
    train, evaluation = load_preferences(DataConfig(path=write("a.jsonl", 20), **settings), seed=1)
    for rows in (train, evaluation or []):
        assert numbers(rows) == [(number, f"a.jsonl {number}") for number, _ in numbers(rows)]
    if "eval_size" in settings:
        assert numbers(train) != numbers(train.select(range(0)))
        assert [number for number, _ in numbers(train)] != list(range(len(train)))


def test_rows_of_several_files_are_numbered_as_they_are_read():
    config = DataConfig(path=".", data_files=[write("a.jsonl", 3), write("b.jsonl", 2)], eval_size=2)
    train, evaluation = load_preferences(config, seed=0)
    names = [f"a.jsonl {n}" for n in range(3)] + [f"b.jsonl {n}" for n in range(2)]
    assert sorted([*numbers(train), *numbers(evaluation)]) == list(enumerate(names))


def test_rows_of_a_stream_are_numbered_as_they_are_read():
    config = DataConfig(path=write("a.jsonl", 9), streaming=True, eval_size=3, shuffle_buffer=4)
    train, evaluation = load_preferences(config, seed=0)
    found = [*numbers(train, STREAM_ROW_INDEX), *numbers(evaluation, STREAM_ROW_INDEX)]
    assert sorted(found) == [(n, f"a.jsonl {n}") for n in range(9)]


@pytest.mark.parametrize("make", [lambda n: f"id-{n}", lambda n: n * 7], ids=["text", "integers"])
def test_ids_are_carried_through_the_audit_to_the_files(make):
    config = DataConfig(path=write("a.jsonl", 12, id=make), eval_size=6, audit="keep")
    train, evaluation = load_preferences(config, seed=0)
    truncation = Truncation(None)
    audited = audit_preferences(train, evaluation, config, make_tokenizer(), [truncation])[truncation]
    save_evaluated_rows(audited.evaluation, Path("eval_rows.parquet"), sources_of("eval", config))
    saved = pq.read_table("eval_rows.parquet").to_pydict()
    assert list(saved) == ["prompt", "chosen", "rejected", "row_index", "id"]
    assert saved["id"] == [make(n) for n in saved["row_index"]]
    assert row_ids(audited.evaluation) == {n: make(n) for n in saved["row_index"]}
    first = audited.train[0]
    assert origin_text(origin(first, "train", config), config) == (
        f"row {first[ROW_INDEX]} of a.jsonl, id {make(first[ROW_INDEX])}"
    )


def test_rows_of_a_mixture_name_their_source():
    config = DataConfig(
        mixture=[
            {"path": write("a.jsonl", 8, id=lambda n: n)},
            {"path": write("b.jsonl", 8, id=lambda n: f"b-{n}")},
        ],
        eval_size=6,
    )
    train, evaluation = load_preferences(config, seed=3)
    save_evaluated_rows(evaluation, Path("eval_rows.parquet"), sources_of("eval", config))
    saved = pq.read_table("eval_rows.parquet").to_pylist()
    assert {row["source"] for row in saved} == {"a.jsonl", "b.jsonl"}
    for row in saved:
        assert row["prompt"] == f"{row['source']} {row['row']}"
        assert row["id"] == (f"b-{row['row']}" if row["source"] == "b.jsonl" else str(row["row"]))
        assert row_name(row["row_index"], row) == f"Row {row['row']} of {row['source']}, id {row['id']}"
    assert not {row["row_index"] for row in saved} & set(train[ROW_INDEX])


@pytest.mark.parametrize("value", [{"a": 1}, ["x"], 0.5], ids=["mapping", "list", "share"])
def test_a_column_that_is_no_id_is_left_out_or_refused_where_it_is_named(value):
    write("a.jsonl", 3, id=lambda n: value)
    train, _ = load_preferences(DataConfig(path="a.jsonl"), seed=0)
    assert "id" not in train.column_names
    with pytest.raises(DataError, match=r"^`data\.columns` must map `id` to text or integers, got 'id' of 'a\.jsonl'"):
        load_preferences(DataConfig(path="a.jsonl", columns={"id": "id"}), seed=0)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({}, "Row 7"),
        ({"id": 0}, "Row 7, id 0"),
        ({"id": None}, "Row 7"),
        ({"id": "x" * 99}, f"Row 7, id {'x' * 60} …"),
        ({"row": 2, "source": "a.jsonl", "id": "y"}, "Row 2 of a.jsonl, id y"),
    ],
)
def test_the_report_names_a_row(row, name):
    assert row_name(7, row) == name
