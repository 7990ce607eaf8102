"""Sources of rows: names of files, their formats and caches, the columns that are read, and the order of streams."""

import bz2
import gzip
import io
import json
import logging
import lzma
import os
from pathlib import Path

import datasets
import PIL.Image
import pyarrow as pa
import pytest
import torch
from conftest import make_rows
from datasets import Dataset, Features, Image, List, Value
from trl import SFTConfig

from dposhift_trl import ChosenSFTTrainer, DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.columns import FILE_ROW, FILE_SOURCE, ROW_INDEX, STREAM_ROW_INDEX
from dposhift_trl.data import formats
from dposhift_trl.data.config import ROW_ID, DataConfig, DataSource
from dposhift_trl.data.errors import DataError
from dposhift_trl.data.files import folder_conflict
from dposhift_trl.data.sources import load_preferences
from dposhift_trl.recipe import RecipeError, load_recipe


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory and a separate cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture(params=[False, True], ids=["map-style", "streaming"])
def streaming(request):
    return request.param


def rows(tag, count=2):
    return [{"prompt": f"{tag}{index}", "chosen": "a", "rejected": "b"} for index in range(count)]


def jsonl(values):
    return "\n".join(json.dumps(value) for value in values).encode()


def write(name, content):
    """Write bytes, or rows in the format that the name tells."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else jsonl(content))
    return name


NUMBERS = (ROW_INDEX, STREAM_ROW_INDEX, FILE_ROW, FILE_SOURCE, ROW_ID)


def load(seed=0, **settings):
    """Rows without their numbers and ids, by default in the order of their files."""
    if settings.get("streaming"):
        settings.setdefault("shuffle_buffer", 0)
    train, evaluation = load_preferences(DataConfig(**settings), seed)
    return [{name: row[name] for name in row if name not in NUMBERS} for row in train], evaluation


def prompts(**settings):
    return [row["prompt"] for row in load(**settings)[0]]


def refusal(**settings):
    with pytest.raises(DataError) as raised:
        load(**settings)
    return str(raised.value)


# Names of files


NAMES = ["pairs[12]", "a*", "a?", "a::b", "a#b", "a%20b", "a b", "~", "~x", "https:", "x{1,2}", "[", "a\nb", "é"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_name_is_never_a_pattern_or_an_address(name, streaming):
    for other in ("pairs1", "pairs2", "ab", "aab", "x1", "a"):
        write(f"{other}.jsonl", rows("other"))
    write(f"{name}.jsonl", rows("this"))
    assert prompts(path=f"{name}.jsonl", streaming=streaming) == ["this0", "this1"]
    assert prompts(path=".", data_files=f"{name}.jsonl", streaming=streaming) == ["this0", "this1"]
    assert prompts(path="json", data_files=[f"{name}.jsonl"], streaming=streaming) == ["this0", "this1"]


def test_a_pattern_that_names_no_file_is_not_matched_by_a_path():
    write("pairs1.jsonl", rows("other"))
    assert refusal(path="pairs[12].jsonl").endswith("cannot be read: the file does not exist")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_name_is_never_a_pattern_or_an_address(name, streaming):
    write("pairs1/train.jsonl", rows("other"))
    write(f"{name}/train.jsonl", rows("train"))
    write(f"{name}/test.jsonl", rows("test", 1))
    train, evaluation = load(path=name, eval_split="test", streaming=streaming)
    assert [row["prompt"] for row in train] == ["train0", "train1"]
    assert [row["prompt"] for row in evaluation] == ["test0"]
    assert prompts(path=name, data_files="te*.jsonl", streaming=streaming) == ["test0"]


def test_a_saved_dataset_may_have_any_name(streaming):
    Dataset.from_list(rows("saved")).save_to_disk(str(Path("s [1]#%").absolute()))
    assert prompts(path="s [1]#%", streaming=streaming) == ["saved0", "saved1"]


def test_home_is_what_a_tilde_means_where_no_file_has_the_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", rows("home"))
    assert prompts(path="~/rows.jsonl") == ["home0", "home1"]
    write("~/rows.jsonl", rows("here"))
    assert prompts(path="~/rows.jsonl") == ["here0", "here1"]


@pytest.mark.parametrize(
    ("data_files", "expected"),
    [
        ("pairs[12].jsonl", ["b0", "c0"]),
        ("deep/**", ["d0", "e0"]),
        ("**/d.jsonl", ["d0"]),
        (["c.jsonl", "*[!c].jsonl"], ["c0", "a0", "b0"]),
        ("../work/a.jsonl", ["a0"]),
        ("deep/.hidden.jsonl", ["h0"]),
    ],
    ids=str,
)
def test_data_files_may_be_patterns(data_files, expected, streaming):
    names = {"a": "a", "b": "pairs1", "c": "pairs2", "d": "deep/d", "e": "deep/er/e", "h": "deep/.hidden"}
    for tag, name in names.items():
        write(f"{name}.jsonl", rows(tag, 1))
    if data_files == ["c.jsonl", "*[!c].jsonl"]:
        for name in ("pairs1", "pairs2"):
            os.remove(f"{name}.jsonl")
        write("c.jsonl", rows("c", 1))
        write("b.jsonl", rows("b", 1))
    assert prompts(path=".", data_files=data_files, streaming=streaming) == expected


@pytest.mark.parametrize("name", ["none.jsonl", "none*.jsonl", "deep"])
def test_data_files_that_name_no_file_are_refused(name, streaming):
    write("deep/a.jsonl", rows("a"))
    assert f"`data_files` must name files, got '{name}', which is none" in refusal(
        path=".", data_files=name, streaming=streaming
    )


def test_a_readme_names_the_files_of_its_configurations(streaming):
    write("pairs/x.jsonl", rows("x"))
    write("pairs/y.tsv", b"prompt;chosen;rejected\ny;1;2")
    write(
        "pairs/README.md",
        b"---\nconfigs:\n- config_name: x\n  data_files: x.jsonl\n- config_name: y\n  sep: ';'\n"
        b"  data_files:\n  - split: held\n    path: y.*\n---\n",
    )
    assert prompts(path="pairs", name="x", streaming=streaming) == ["x0", "x1"]
    assert prompts(path="pairs", name="y", train_split="held", streaming=streaming) == ["y"]
    assert "`data.name` must be one of x, y, got None" in refusal(path="pairs", streaming=streaming)


def test_files_of_two_formats_are_refused(streaming):
    write("mixed/a.jsonl", rows("a"))
    write("mixed/b.tsv", b"prompt\tchosen\trejected\nb\t1\t2")
    assert "its files must be of one format, got a.jsonl and b.tsv. Name the files to read in `data_files`" in refusal(
        path="mixed", streaming=streaming
    )


@pytest.mark.parametrize("path", ["fifo.jsonl", "fifo", "/dev/zero", "/dev/stdin"])
def test_what_is_no_file_is_refused_without_opening_it(path, streaming):
    if path.startswith("fifo"):
        os.mkfifo(path)
    assert "it must be a file, got a" in refusal(path=path, streaming=streaming)
    assert "it must be a file, got a" in refusal(path="json", data_files=path, streaming=streaming)


# Formats


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", jsonl(rows("r"))),
        ("rows.JSON", json.dumps(rows("r")).encode()),
        ("rows.csv", b"prompt,chosen,rejected\nr0,a,b\nr1,a,b\n"),
        ("rows.TSV", b"prompt\tchosen\trejected\nr0\ta\tb\nr1\ta\tb\n"),
    ],
)
def test_text_files_are_read_in_any_case_and_compressed(name, content, suffix, streaming):
    write(name, content)
    write(f"f/train/x.{name}{suffix}", COMPRESS[suffix](content))
    write(f"{name}{suffix.upper()}", COMPRESS[suffix](content))
    for path in (name, f"{name}{suffix.upper()}", "f"):
        assert load(path=path, streaming=streaming)[0] == rows("r"), path
    assert load(path=".", data_files=f"f/*/*{suffix}", streaming=streaming)[0] == rows("r")


@pytest.mark.parametrize("name", ["rows.parquet.gz", "rows.gz", "rows", "rows.zip", "jsonl"])
def test_other_endings_are_refused_with_those_that_are_read(name, streaming):
    write(name, rows("r"))
    assert refusal(path=name, streaming=streaming).endswith(
        "file names must end in .jsonl, .json, .csv, .tsv (each also with .gz, .bz2, .xz or .zst), .parquet or .arrow"
    )


CELLS = ["None", "NA", "null", "nan", "", "True", "12", "1.50", "  ", "N/A", 'a "quoted", cell\nof two lines', "é"]


@pytest.mark.parametrize(("name", "separator"), [("cells.csv", ","), ("cells.tsv", "\t"), ("address", ",")])
def test_cells_are_text(name, separator, streaming):
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in CELLS]
    lines = [separator.join(cells) for cells in zip(quoted, [*CELLS[:-2], "x", "y"], quoted[::-1], strict=True)]
    write(name, "\n".join([separator.join(("prompt", "chosen", "rejected")), *lines]).encode())
    address = {"path": "csv", "data_files": f"file://{Path(name).absolute()}"}
    found, _ = load(**(address if name == "address" else {"path": name}), streaming=streaming)
    assert [row["prompt"] for row in found] == CELLS
    assert [row["chosen"] for row in found] == [*CELLS[:-2], "x", "y"]
    assert [row["rejected"] for row in found] == CELLS[::-1]


def test_rows_of_numbers_alone_are_text_in_every_part_of_a_file(streaming):
    lines = ["1,2,3"] * 12_000 + ["a,b,c"]  # the reader takes 10,000 rows at a time
    write("rows.csv", "\n".join(["prompt,chosen,rejected", *lines]).encode())
    found, _ = load(path="rows.csv", streaming=streaming)
    assert (found[0], len(found)) == ({"prompt": "1", "chosen": "2", "rejected": "3"}, 12_001)


@pytest.mark.parametrize("cells", ["a,b,c,d", "a,b,c,"])
def test_a_row_with_more_cells_than_the_header_is_refused_not_shifted(cells, streaming):
    write("rows.csv", f"prompt,chosen,rejected\n{cells}\n".encode())
    assert "the first row must have at most 3 cells, as the header has, got more" in refusal(
        path="rows.csv", streaming=streaming
    )


def test_csv_files_with_different_columns_are_refused(streaming):
    write("f/a.csv", b"prompt,chosen,rejected\na,b,c\n")
    write("f/b.csv", b"prompt,chosen,worse\na,b,c\n")
    assert "its files must have the same columns, got prompt, chosen, rejected and prompt, chosen, worse" in refusal(
        path="f", streaming=streaming
    )


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_expands_beyond_the_bound_is_refused_and_read_when_it_is_raised(suffix, streaming):
    bomb = json.dumps({"prompt": "x" * 2**21, "chosen": "a", "rejected": "b"}).encode()
    write(f"bomb.jsonl{suffix}", COMPRESS[suffix](bomb))
    message = refusal(path=f"bomb.jsonl{suffix}", max_expanded_gib=2**-9, streaming=streaming)
    assert message.endswith(
        f"bomb.jsonl{suffix} must expand to at most `data.max_expanded_gib` (0.00195312), got more. Raise it if the "
        "file is meant to be that large."
    )
    assert "\n" not in message
    assert len(prompts(path=f"bomb.jsonl{suffix}", max_expanded_gib=2**-8, streaming=streaming)[0]) == 2**21


def test_a_bomb_is_refused_before_a_row_of_it_is_in_memory(monkeypatch):
    write("bomb.jsonl.gz", gzip.compress(b"x" * 2**22))
    monkeypatch.setattr(formats, "load_dataset_builder", lambda *args, **kwargs: pytest.fail("asked for rows"))
    sizes = []
    monkeypatch.setitem(formats.EXPANDERS, ".gz", lambda path: Recorded(path, sizes))
    url = formats._LocalFile.url(Path("bomb.jsonl.gz"), 2**21, "json")
    with pytest.raises(DataError, match="max_expanded_gib"):
        formats._LocalFile().open(url)
    assert max(sizes) <= 2**20
    assert sum(sizes) <= 2**21 + 2**20


class Recorded(gzip.GzipFile):
    def __init__(self, path, sizes):
        super().__init__(path)
        self.sizes = sizes

    def read(self, size=-1):
        chunk = super().read(size)
        self.sizes.append(len(chunk))
        return chunk


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    "damage", [lambda content: content[:-9], lambda content: b"no " + content], ids=["cut", "not"]
)
def test_a_broken_compressed_file_is_refused_in_one_line(suffix, damage, streaming):
    write(f"rows.jsonl{suffix}", damage(COMPRESS[suffix](jsonl(rows("r")))))
    message = refusal(path=f"rows.jsonl{suffix}", streaming=streaming)
    assert f"rows.jsonl{suffix} cannot be expanded: " in message
    assert "\n" not in message


# Caches


def edit_unnoticed(path, old, new):
    """Change the content of a file and keep its size and time of change."""
    status = os.stat(path)
    content = Path(path).read_bytes()
    assert len(old) == len(new)
    assert content.count(old) > 0
    Path(path).write_bytes(content.replace(old, new))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("rows.jsonl", {"path": "rows.jsonl"}),
        ("f/train.jsonl", {"path": "f"}),
        ("f/x.jsonl", {"path": "f", "data_files": "*.jsonl"}),
        ("x.jsonl", {"path": "json", "data_files": "x.jsonl"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_edited_file_is_read_anew_even_if_its_time_stays(file, settings, streaming):
    write(file, rows("old"))
    assert prompts(streaming=streaming, **settings) == ["old0", "old1"]
    edit_unnoticed(file, b"old", b"new")
    assert prompts(streaming=streaming, **settings) == ["new0", "new1"]


def test_what_was_computed_from_a_saved_dataset_is_computed_anew_when_it_is_edited():
    def first_letters():
        train, _ = load_preferences(DataConfig(path="saved"), 0)
        return train.map(lambda row: {"prompt": row["prompt"][:3]})["prompt"][:]

    Dataset.from_list(rows("old")).save_to_disk("saved")
    assert first_letters() == ["old", "old"]
    edit_unnoticed(next(Path("saved").glob("data-*.arrow")), b"old", b"new")
    assert first_letters() == ["new", "new"]


def test_an_unchanged_file_comes_from_the_cache(monkeypatch):
    write("rows.jsonl", rows("r"))
    first, _ = load_preferences(DataConfig(path="rows.jsonl"), 0)
    written = [Path(file["filename"]).stat().st_mtime_ns for file in first.cache_files]
    again, _ = load_preferences(DataConfig(path="rows.jsonl"), 0)
    assert again.cache_files == first.cache_files
    assert [Path(file["filename"]).stat().st_mtime_ns for file in again.cache_files] == written
    assert again._fingerprint == first._fingerprint


# Columns


@pytest.mark.parametrize("name", ["image", "images", "video", "audios"])
@pytest.mark.parametrize("value", ["x.png", ["x.png"], {"bytes": "x", "path": None}], ids=["one", "list", "decoded"])
def test_rows_with_images_are_refused(name, value, streaming):
    write("rows.jsonl", [{**row, name: value if row["prompt"] == "r1" else None} for row in rows("r")])
    assert refusal(path="rows.jsonl", streaming=streaming) == (
        f"The rows of 'rows.jsonl' must be text, got the column {name!r}, which is not empty. Remove it to train on "
        "the text alone. To train on images, pass the rows and a vision-language model to `DPOShiftTrainer`."
    )


def test_stored_images_are_refused_and_not_decoded_to_find_them(streaming):
    image = io.BytesIO()
    PIL.Image.new("RGB", (2, 2)).save(image, "PNG")
    content = image.getvalue() if streaming else b"no image"
    features = Features({**dict.fromkeys(("prompt", "chosen", "rejected"), Value("string")), "images": List(Image())})
    stored = [{**row, "images": [{"bytes": content, "path": None}]} for row in rows("r")]
    Dataset.from_list(stored, features=features).save_to_disk("saved")
    assert "got the column 'images', which is not empty" in refusal(path="saved", streaming=streaming)


@pytest.mark.parametrize("value", [None, [], "", [None], {"bytes": None}], ids=str)
def test_a_column_of_images_that_is_empty_in_all_rows_is_left_out(value, streaming):
    write("rows.jsonl", [{**row, "images": value} for row in rows("r")])
    assert load(path="rows.jsonl", streaming=streaming)[0] == rows("r")


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"system": "Answer in one word."}, ["system"]),
        ({"context": "Be brief.", "history": [{"role": "user", "content": "hi there"}]}, ["context", "history"]),
        ({"id": "a-0", "source": "ultrachat", "score": 0.5, "tags": ["x", "y"], "system": ""}, []),
    ],
    ids=["system", "two", "bookkeeping"],
)  # fmt: skip
def test_text_that_is_left_out_is_named_in_one_line(extra, named, streaming, caplog):
    write("rows.jsonl", [{**row, **extra} for row in rows("r")])
    with caplog.at_level(logging.WARNING, "dposhift_trl"):
        assert load(path="rows.jsonl", streaming=streaming)[0] == rows("r")
    expected = [f"rows.jsonl: not trained on: {', '.join(named)}. What the model should see has to be in the prompt."]
    assert caplog.messages == (expected if named else [])


# The order of streams


def test_a_stream_is_shuffled_by_default_and_keeps_the_numbers_of_its_file():
    write("rows.jsonl", rows("r", 200))
    train, evaluation = load_preferences(DataConfig(path="rows.jsonl", streaming=True, eval_size=20), 1)
    first, again = list(train), list(train)
    assert first == again
    assert [row["prompt"] for row in first] == [f"r{row[STREAM_ROW_INDEX]}" for row in first]
    numbers = [row[STREAM_ROW_INDEX] for row in first]
    assert sorted(numbers) == list(range(20, 200))
    assert numbers != sorted(numbers)
    assert [row["prompt"] for row in evaluation] == [f"r{index}" for index in range(20)]
    train.set_epoch(1)
    assert [row[STREAM_ROW_INDEX] for row in train] not in (numbers, sorted(numbers))


def test_the_seed_and_the_size_of_the_buffer_determine_the_order():
    write("rows.jsonl", rows("r", 100))

    def order(seed=1, **settings):
        return prompts(path="rows.jsonl", streaming=True, seed=seed, **settings)

    assert order(shuffle_buffer=10) == order(shuffle_buffer=10)
    assert order(shuffle_buffer=10) != order(2, shuffle_buffer=10)
    assert order(shuffle_buffer=None) != order(shuffle_buffer=10)
    assert order(shuffle_buffer=0) == [f"r{index}" for index in range(100)]
    assert {int(prompt[1:]) for prompt in order(shuffle_buffer=10)[:5]} <= set(range(10))


def test_no_two_rows_of_several_shuffled_files_have_the_same_number():
    for name in "abc":
        write(f"f/{name}.jsonl", rows(name, 5))
    train, _ = load_preferences(DataConfig(path="f", streaming=True, shuffle_buffer=4), 0)
    assert sorted(row[STREAM_ROW_INDEX] for row in train) == list(range(15))


def test_only_the_first_rows_are_shuffled_where_a_number_is_set():
    write("rows.jsonl", rows("r", 50))
    assert sorted(prompts(path="rows.jsonl", streaming=True, max_train_rows=3, shuffle_buffer=50)) == [
        "r0",
        "r1",
        "r2",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shuffle_buffer": 100},
            "`shuffle_buffer` requires `streaming`, got 100 without it: all rows are shuffled. Remove it.",
        ),
        (
            {"shuffle_buffer": -1, "streaming": True},
            "`shuffle_buffer` must be at least 0, got -1. Write for example `shuffle_buffer: 1000`, or 0 to train in "
            "the order of the files.",
        ),
        *(
            (
                {"max_expanded_gib": value},
                f"`max_expanded_gib` must be finite and greater than 0, got {value}. Write for example "
                "`max_expanded_gib: 4`.",
            )
            for value in (0, -1.0, float("inf"), float("nan"))
        ),
    ],
    ids=str,
)
def test_invalid_settings_are_refused_with_value_and_remedy(settings, message):
    with pytest.raises(ValueError, match="`") as raised:
        DataConfig(path="demo", **settings)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("trainer_class", "config"), [(DPOShiftTrainer, DPOShiftConfig), (ChosenSFTTrainer, SFTConfig)]
)
def test_a_shuffled_stream_resumes_bit_for_bit_in_every_pass_over_its_rows(
    trainer_class, config, tiny_model, settings, tmp_path
):
    make_rows(7).to_json("rows.jsonl")

    def train(name, checkpoint=None):
        train_rows, _ = load_preferences(DataConfig(path="rows.jsonl", streaming=True, shuffle_buffer=3), 3)
        args = config(**{
            **settings, "output_dir": str(tmp_path / name), "per_device_train_batch_size": 2, "max_steps": 8,
            "save_strategy": "steps", "save_steps": 2,
        })  # fmt: skip
        trainer = trainer_class(tiny_model, args=args, train_dataset=train_rows)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.model.state_dict()

    expected = train("whole")
    for step in (2, 6):  # within the first pass over four batches, and within the second
        resumed = train(f"from {step}", str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert all(torch.equal(resumed[name], weights) for name, weights in expected.items()), step


# A run apart from its data


CONFLICTS = [
    ({"path": "data"}, "data/runs/x", True),
    ({"path": "data"}, "data", True),
    ({"path": "link"}, "data/x", True),
    ({"path": "data"}, "link/x", True),
    ({"path": str(Path("data"))}, "other/../data/x", True),
    ({"path": "data"}, "runs/x", False),
    ({"path": "data"}, "data2", False),
    ({"path": "data", "data_files": "a.jsonl"}, "data/runs", False),
    ({"path": "data", "data_files": "*.jsonl"}, "data/runs", False),
    ({"path": "data", "data_files": "*/*.jsonl"}, "data/runs", True),
    ({"path": "data", "data_files": "v*/*.jsonl"}, "data/runs", False),
    ({"path": "data", "data_files": "**/*.jsonl"}, "data/runs", True),
    ({"path": "json", "data_files": {"train": "**"}}, "runs", True),
    ({"path": "json", "data_files": ["data/a.jsonl"]}, "runs", False),
    ({"path": "data/a.jsonl"}, "data", True),
    ({"path": "data/a.jsonl"}, "runs", False),
    ({"path": "json", "data_files": "data/a.jsonl"}, "data", True),
    ({"path": "saved"}, "saved/runs", False),
    ({"path": "demo"}, "demo", False),
    ({"path": "user/name"}, "user/name", False),
    ({"path": "json", "data_files": "hf://datasets/x/y.jsonl"}, "runs", False),
]


@pytest.mark.parametrize(("source", "output_dir", "conflicts"), CONFLICTS, ids=str)
def test_a_folder_conflicts_with_the_data_if_its_files_would_be_read_or_written_over(source, output_dir, conflicts):
    write("data/a.jsonl", rows("a"))
    Path("link").symlink_to("data")
    Path("other").mkdir()
    Dataset.from_list(rows("s")).save_to_disk("saved")
    conflict = folder_conflict(DataSource(**source), Path(output_dir))
    assert (conflict is not None) is conflicts


@pytest.mark.parametrize("mixture", [False, True], ids=["one", "mixture"])
def test_a_recipe_whose_run_would_read_its_own_files_is_refused(mixture):
    write("data/a.jsonl", rows("a"))
    data = {"mixture": [{"path": "demo"}, {"path": "data"}]} if mixture else {"path": "data"}
    recipe = {"output_dir": "data/run", "model": {"model_name_or_path": "demo"}, "data": data, "dpo": {"bf16": False}}
    write("recipe.yaml", json.dumps(recipe).encode())
    with pytest.raises(RecipeError) as raised:
        load_recipe("recipe.yaml")
    assert str(raised.value) == (
        "recipe.yaml: `output_dir` must be apart from the data, got data/run: the files of the run would be read as "
        "rows of data. Choose a folder outside of the data."
    )
    assert load_recipe("recipe.yaml", ["output_dir=run"]).output_dir == Path("run")
