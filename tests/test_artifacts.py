"""Files of a run folder are complete or absent, and a broken one is explained in one line."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dposhift_trl.artifacts import (
    UNFINISHED,
    ArtifactError,
    check_file,
    read_mapping,
    set_earlier_aside,
    whole_files,
    whole_folder,
    write_whole,
)


@pytest.mark.parametrize("content", ["ä\n", b"\0\1"], ids=["text", "bytes"])
def test_a_written_file_has_its_content_and_leaves_no_other(content, tmp_path):
    path = tmp_path / "folder" / "file"
    write_whole(path, "earlier, and longer")
    write_whole(path, content)
    assert path.read_bytes() == (content.encode("utf-8") if isinstance(content, str) else content)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_table_is_written_as_parquet(tmp_path):
    write_whole(tmp_path / "file", pa.table({"a": [1, 2]}))
    assert pq.read_table(tmp_path / "file").to_pydict() == {"a": [1, 2]}


@pytest.mark.parametrize("failing", ["fsync", "write"])
def test_a_failure_keeps_the_earlier_file_and_leaves_no_other(failing, tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "earlier")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if failing == "fsync" else (pq, "write_table", full)))
    with pytest.raises(OSError, match="no space left"):
        write_whole(tmp_path / "file", pa.table({"a": [1]}))
    assert (tmp_path / "file").read_text() == "earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_once_it_is_written(tmp_path):
    folder = tmp_path / "folder"
    with whole_folder(folder) as unfinished:
        unfinished.mkdir()
        (unfinished / "file").write_text("content")
        assert not folder.exists()
    assert (folder / "file").read_text() == "content"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_is_not_written_to_its_end_does_not_appear(tmp_path):
    def write():
        with whole_folder(tmp_path / "folder") as unfinished:
            unfinished.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not (tmp_path / "folder").exists()


def tree(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write_two(folder, stop=None):
    with whole_files(folder) as unfinished:
        (unfinished / "inner").mkdir()
        (unfinished / "inner" / "a").write_text("new")
        if stop:
            raise stop
        (unfinished / "b").write_text("new")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "full")], ids=repr)
def test_files_that_belong_together_are_replaced_together(stop, tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(type(stop)):
        write_two(folder, stop)
    assert not folder.exists()
    (folder / "inner").mkdir(parents=True)
    earlier = {"inner/a": "old", "inner/mine": "old", "b": "old", "mine": "old"}
    for name, text in earlier.items():
        (folder / name).write_text(text)
    with pytest.raises(type(stop)):
        write_two(folder, stop)
    assert tree(tmp_path / "folder") == earlier
    write_two(folder)
    assert tree(tmp_path / "folder") == {**earlier, "inner/a": "new", "b": "new"}


def test_what_a_kill_left_of_files_that_belong_together_is_written_over(tmp_path):
    (tmp_path / UNFINISHED / "inner").mkdir(parents=True)
    (tmp_path / UNFINISHED / "c").write_text("left")
    write_two(tmp_path)
    assert tree(tmp_path) == {"inner/a": "new", "b": "new"}
    assert not (tmp_path / UNFINISHED).exists()


def test_the_log_and_scores_of_an_earlier_training_are_kept_aside(tmp_path):
    assert set_earlier_aside(tmp_path) is None
    for number in (1, 2):
        (tmp_path / "pairs").mkdir()
        (tmp_path / "pairs" / "eval-000000.parquet").write_text(str(number))
        assert set_earlier_aside(tmp_path) is None, "no training has ended"
        (tmp_path / "trainer_state.json").write_text(str(number))
        assert set_earlier_aside(tmp_path) == tmp_path / f"earlier-{number}"
    names = ("trainer_state.json", "pairs/eval-000000.parquet")
    assert tree(tmp_path) == {f"earlier-{number}/{name}": str(number) for number in (1, 2) for name in names}


@pytest.mark.parametrize("left", ["link", "FIFO", "file"])
def test_a_temporary_file_that_is_there_is_neither_followed_nor_waited_for(left, tmp_path):
    (tmp_path / "mine").write_text("mine")
    temporary = tmp_path / "file.tmp"
    {"link": lambda: temporary.symlink_to("mine"), "FIFO": lambda: os.mkfifo(temporary), "file": temporary.touch}[
        left
    ]()
    write_whole(tmp_path / "file", "content")
    assert tree(tmp_path) == {"file": "content", "mine": "mine"}


def test_only_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "null.json").symlink_to("/dev/null")
    for name, kind in (("fifo", "a FIFO"), ("null.json", "a device"), (".", "a directory")):
        with pytest.raises(ArtifactError, match=f"must be a file, got {kind}"):
            read_mapping(tmp_path / name)
    with pytest.raises(ArtifactError, match="does not exist"):
        check_file(tmp_path / "fifo" / "x")
    check_file(Path(__file__))


def test_mappings_are_read_as_json_or_yaml_by_their_suffix(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1e-3}')
    (tmp_path / "a.yaml").write_text("a: 1e-3\nb: no\n")
    assert read_mapping(tmp_path / "a.json") == {"a": 0.001}
    assert read_mapping(tmp_path / "a.yaml") == {"a": 0.001, "b": "no"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"", "is empty."),
        ("a.yaml", b" \n", "is empty."),
        ("a.yaml", b"# comment\n", "must contain a mapping, got NoneType."),
        ("a.json", b"[1]", "must contain a mapping, got list."),
        ("a.yaml", b"text", "must contain a mapping, got str."),
        ("a.json", b'{"a":', "is not valid JSON: Expecting value"),
        ("a.json", b"[" * 100_000, "is not valid JSON: "),
        ("a.yaml", b"a: [", "is not valid YAML: "),
        ("a.yaml", b"a: {b: c", "is not valid YAML: "),
        ("a.yaml", b"\0\1\2", "is not valid YAML: unacceptable character"),
        ("a.yaml", b"a: 2001-99-99T00:00:00Z", "is not valid YAML: month must be in 1..12"),
        ("a.json", b"\xff\xfe", "is not UTF-8 text."),
        ("a.yaml", b"a: \xe4", "is not UTF-8 text."),
        ("a.json", None, "must be a file, got a directory."),
    ],
)
def test_a_broken_file_is_explained_in_one_line(name, content, reason, tmp_path):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ArtifactError) as raised:
        read_mapping(path)
    message = str(raised.value)
    assert message.startswith(f"{path} {reason}")
    assert message == f"{path} {raised.value.reason}."
    assert message.isprintable()
    assert len(raised.value.reason) <= 300


def test_a_missing_file_is_explained(tmp_path):
    with pytest.raises(ArtifactError, match=r"a\.json does not exist\.$"):
        read_mapping(tmp_path / "a.json")
