"""Row numbers: of tables, and of streams that workers and processes divide among themselves."""

from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from accelerate.data_loader import prepare_data_loader
from conftest import make_rows
from datasets import Dataset, DatasetDict, IterableDatasetDict
from torch.utils.data import DataLoader

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.columns import ROW_INDEX, STREAM_ROW_INDEX, with_row_index


TABLE = Dataset.from_dict({"name": [f"row {place}" for place in range(10)]})


def numbers_by_name(stream, num_workers=0, processes=1, process=0):
    """What one process reads of a numbered stream."""
    loader = DataLoader(stream, batch_size=None, num_workers=num_workers)
    if processes > 1:
        loader = DataLoader(stream, batch_size=2, num_workers=num_workers, collate_fn=list)
        loader = prepare_data_loader(loader, num_processes=processes, process_index=process, dispatch_batches=False)
        return {row["name"]: row[STREAM_ROW_INDEX] for batch in loader for row in batch}
    return {row["name"]: row[STREAM_ROW_INDEX] for row in loader}


def test_rows_of_a_table_are_numbered_from_0_and_keep_their_numbers():
    numbered = with_row_index(TABLE)
    assert numbered[ROW_INDEX] == list(range(10))
    part = numbered.select([7, 2])
    assert with_row_index(part)[ROW_INDEX] == [7, 2]


def test_each_set_of_a_dictionary_is_numbered_and_other_values_are_returned():
    sets = with_row_index(DatasetDict(first=TABLE, second=TABLE.select(range(3))))
    assert isinstance(sets, DatasetDict)
    assert [list(rows[ROW_INDEX]) for rows in sets.values()] == [list(range(10)), [0, 1, 2]]
    streams = with_row_index(IterableDatasetDict(first=TABLE.to_iterable_dataset()))
    assert [row[STREAM_ROW_INDEX] for row in streams["first"]] == list(range(10))
    for value in (None, "name", [1]):
        assert with_row_index(value) is value


def test_a_numbered_stream_keeps_its_numbers():
    stream = with_row_index(TABLE.to_iterable_dataset()).skip(4)
    assert [row[STREAM_ROW_INDEX] for row in with_row_index(stream)] == list(range(4, 10))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_stream_of_one_shard_is_numbered_in_order_however_many_workers_read_it(num_workers):
    stream = with_row_index(TABLE.to_iterable_dataset(num_shards=1))
    found = numbers_by_name(stream, num_workers)
    assert found == {name: place for place, name in enumerate(TABLE["name"])}
    assert numbers_by_name(stream, num_workers) == found


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("num_shards", "num_workers"), [(3, 0), (2, 2), (5, 2), (3, 4)])
def test_no_two_rows_of_several_shards_have_the_same_number(num_shards, num_workers):
    stream = with_row_index(TABLE.to_iterable_dataset(num_shards=num_shards))
    found = numbers_by_name(stream, num_workers)
    assert found.keys() == set(TABLE["name"])
    assert len(set(found.values())) == 10
    assert numbers_by_name(stream, num_workers) == found
    if num_workers == 0:
        assert found == {name: place for place, name in enumerate(TABLE["name"])}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
def test_no_two_processes_give_different_rows_the_same_number(num_shards, num_workers, monkeypatch):
    """Two processes' numbers, one after the other, with Accelerate's own division of the shards."""
    names = {}
    for process in range(2):
        state = SimpleNamespace(num_processes=2, process_index=process)
        monkeypatch.setattr("accelerate.PartialState", lambda state=state: state)
        stream = with_row_index(TABLE.to_iterable_dataset(num_shards=num_shards))
        for name, number in numbers_by_name(stream, num_workers, processes=2, process=process).items():
            names.setdefault(number, set()).add(name)
    assert {len(same) for same in names.values()} == {1}
    assert set.union(*names.values()) == set(TABLE["name"])
    if num_shards == 1:
        assert sorted(names) == list(range(10))


def test_every_evaluation_of_a_sharded_stream_gives_a_pair_the_same_number(tiny_model, settings, tmp_path):
    args = DPOShiftConfig(
        **{**settings, "eval_strategy": "steps", "eval_steps": 2, "dataloader_num_workers": 2, "learning_rate": 0.0}
    )
    evaluated = make_rows(10, seed=1).to_iterable_dataset(num_shards=3)
    trainer = DPOShiftTrainer(tiny_model, args=args, train_dataset=make_rows(16), eval_dataset=evaluated)
    trainer.train()
    tables = [pq.read_table(tmp_path / "out" / "pairs" / f"eval-{step:06d}.parquet").to_pydict() for step in (2, 4)]
    assert len(set(tables[0]["row_index"])) == 10
    assert tables[0]["row_index"] == tables[1]["row_index"]
    # The policy has not moved, so that its scores say which row is which
    assert tables[0]["chosen_logps"] == tables[1]["chosen_logps"]
