"""Preference rows: loading, mixing, holding out, tokenizing and auditing."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dposhift_trl import ChosenSFTTrainer
from dposhift_trl.columns import CHOSEN_START, FILE_ROW, FILE_SOURCE, ROW_INDEX, STREAM_ROW_INDEX, TOKEN_COLUMNS
from dposhift_trl.data.audit import _Form, audit_preferences
from dposhift_trl.data.chat_template import PLAIN_CHAT_TEMPLATE, use_plain_chat_template
from dposhift_trl.data.config import AUDIT_KINDS, DataConfig, DataSource
from dposhift_trl.data.demo import demo_dataset
from dposhift_trl.data.errors import DataError
from dposhift_trl.data.sources import load_preferences
from dposhift_trl.data.tokenization import PairTokenizer
from dposhift_trl.data.tokens import PairTokens, Truncation


TEMPLATE = (
    "{% for tool in tools or [] %}w30 {% endfor %}"
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
WORDS = ["<eos>", "<pad>", "user", "assistant", *(f"w{index}" for index in range(40))]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def row(prompt="w1", chosen=" w2", rejected=" w3"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat(prompt="w1", chosen="w2", rejected="w3"):
    return {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def implicit_chat(prompt="w1", chosen="w2", rejected="w3"):
    return {"chosen": [user(prompt), assistant(chosen)], "rejected": [user(prompt), assistant(rejected)]}


ROWS = [row(f"w{index}") for index in range(10)]


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


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


def write(name, rows):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return name


def load(seed=0, **settings):
    """Rows in the order of their files, without their numbers in a stream."""
    if settings.get("streaming"):
        settings.setdefault("shuffle_buffer", 0)
    train, evaluation = load_preferences(DataConfig(**settings), seed)
    return unnumbered(train), None if evaluation is None else unnumbered(evaluation)


def refusal(**settings):
    with pytest.raises(DataError) as raised:
        load(**settings)
    return str(raised.value)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            "Exactly one of `path` and `mixture` must be set, got neither. For the built-in data, write `path: demo`.",
        ),
        (
            {"path": ""},
            "Exactly one of `path` and `mixture` must be set, got neither. For the built-in data, write `path: demo`.",
        ),
        (
            {"path": "demo", "mixture": [{"path": "demo"}]},
            "Exactly one of `path` and `mixture` must be set, got both. For the built-in data, write `path: demo`.",
        ),
        ({"mixture": []}, "`mixture` must contain at least one source, got []. Write for example `- path: demo`."),
        (
            {"mixture": [{"path": "demo"}, {"weight": 2.0}]},
            "`path` must be set in every source of a `mixture`, got none in source 1. Add it.",
        ),
        *(
            (
                {"mixture": [{"path": "demo"}], name: value},
                f"`{name}` is not supported next to `mixture`, got {value!r}. Set it in each source of the mixture.",
            )
            for name, value in {"eval_split": "test", "columns": {"chosen": "good"}, "weight": 2.0}.items()
        ),
        *(
            (
                {"path": "demo", "weight": weight},
                f"`weight` must be finite and greater than 0, got {weight}. To exclude the source, remove it.",
            )
            for weight in (0, -1.0, float("nan"), float("inf"))
        ),
        (
            {"mixture": [{"path": "demo", "weight": 0}]},
            "`weight` must be finite and greater than 0, got 0. To exclude the source, remove it.",
        ),
        (
            {"path": "demo", "columns": {"good": "chosen"}},
            "`columns` must map prompt, chosen, rejected to the column names in the data, got the key 'good'. Write "
            "for example `columns: {chosen: chosen}`.",
        ),
        (
            {"path": "demo", "columns": {"chosen": "a", "rejected": "a"}},
            "`columns` must not name a column of the data twice, got {'chosen': 'a', 'rejected': 'a'}. Map each "
            "column once.",
        ),
        *(
            (
                {"path": "demo", "eval_size": size},
                f"`eval_size` must be a positive number of rows or a share between 0 and 1, got {size}. Write for "
                "example `eval_size: 0.05`.",
            )
            for size in (0, -1, 0.0, 1.0, 1.5, float("nan"))
        ),
        (
            {"path": "demo", "eval_size": 5, "eval_split": "test"},
            "`eval_size` is not supported with `eval_split`, got 5. Remove one of the two.",
        ),
        (
            {"mixture": [{"path": "demo", "eval_split": "test"}, {"path": "demo"}], "eval_size": 5},
            "`eval_size` is not supported with `eval_split`, got 5. Remove one of the two.",
        ),
        (
            {"path": "demo", "eval_split": "test", "seed": 7},
            "`seed` has an effect only with `eval_size` or `mixture`, and not with `streaming`, got 7. Remove it; "
            "the order of training follows the recipe's `seed`.",
        ),
        (
            {"path": "demo", "eval_size": 5, "streaming": True, "seed": 7},
            "`seed` has an effect only with `eval_size` or `mixture`, and not with `streaming`, got 7. Remove it; "
            "the order of training follows the recipe's `seed`.",
        ),
        (
            {"mixture": [{"path": "demo"}, {"path": "rows.jsonl"}], "eval_size": 5, "streaming": True},
            "`eval_size` is not supported with a streamed `mixture`, got 5: each pass would hold out other rows. Set "
            "`eval_split` in its sources.",
        ),
        (
            {"path": "demo", "eval_size": 0.1, "streaming": True},
            "`eval_size` must be a number of rows with `streaming`, got 0.1. Write for example `eval_size: 500`.",
        ),
        *(
            (
                {"path": "demo", name: size},
                f"`{name}` must be at least 1, got {size}. Remove it to use all rows.",
            )
            for name in ("max_train_rows", "max_eval_rows")
            for size in (0, -1)
        ),
        (
            {"path": "demo", "max_eval_rows": 8},
            "`max_eval_rows` needs evaluation rows, got 8 without any. Set `eval_split` or `eval_size`.",
        ),
        *(
            (
                {"path": "demo", "min_rows_kept": share},
                f"`min_rows_kept` must be greater than 0 and at most 1, got {share}. Write for example 0.5 to stop if "
                "the audit drops more than half of a split.",
            )
            for share in (0, -0.1, 1.1, float("nan"))
        ),
        (
            {"path": "demo", "audit": "skip"},
            "`audit` must be one of drop, keep, error, got 'skip'. Write for example `audit: drop`.",
        ),
        (
            {"path": "demo", "audit": {"cut": "skip"}},
            "`audit` must be one of drop, keep, error, got 'skip' for cut. Write for example `audit: drop`.",
        ),
        (
            {"path": "demo", "audit": {"short": "keep"}},
            f"`audit` must use the kinds {', '.join(AUDIT_KINDS)}, got 'short'. Write for example `audit: {{cut: "
            "keep}`.",
        ),
        *(
            (
                {"path": "demo", "audit": {kind: "keep"}},
                f"`audit` must be drop or error for {kind}, got 'keep'. Such rows cannot be trained on; remove the "
                "key to drop them.",
            )
            for kind in ("missing", "refused")
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_invalid_settings_raise_an_error_with_value_and_remedy(settings, message):
    with pytest.raises(ValueError, match="`") as raised:
        DataConfig(**settings)
    assert str(raised.value) == message


USABLE = dict.fromkeys(("roles", "boundary", "doubled", "thinking"), "keep")


@pytest.mark.parametrize(
    ("audit", "expected"),
    [
        ("drop", {**dict.fromkeys(AUDIT_KINDS, "drop"), **USABLE}),
        ("error", {**dict.fromkeys(AUDIT_KINDS, "error"), **USABLE}),
        ("keep", {**dict.fromkeys(AUDIT_KINDS, "keep"), "missing": "drop", "refused": "drop"}),
        (
            {"cut": "keep", "missing": "error", "roles": "drop", "boundary": "error"},
            {
                **dict.fromkeys(AUDIT_KINDS, "drop"),
                **USABLE,
                "cut": "keep",
                "missing": "error",
                "roles": "drop",
                "boundary": "error",
            },
        ),
        ({}, {**dict.fromkeys(AUDIT_KINDS, "drop"), **USABLE}),
    ],
    ids=str,
)
def test_each_kind_has_its_policy_and_a_null_is_never_kept(audit, expected):
    config = DataConfig(path="demo", audit=audit)
    assert {kind: config.policy(kind) for kind in AUDIT_KINDS} == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"path": "demo"}, False),
        ({"path": "demo", "eval_split": "test"}, True),
        ({"path": "demo", "eval_size": 1}, True),
        ({"mixture": [{"path": "demo"}]}, False),
        ({"mixture": [{"path": "demo"}, {"path": "demo", "eval_split": "test"}]}, True),
    ],
    ids=str,
)
def test_a_config_knows_whether_there_are_rows_to_evaluate_on(settings, expected):
    assert DataConfig(**settings).has_eval is expected


# Where rows come from


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("rows.jsonl", Dataset.to_json),
        ("rows.json", lambda rows, name: rows.to_json(name, lines=False)),
        ("rows.csv", Dataset.to_csv),
        ("rows.parquet", Dataset.to_parquet),
        ("v1.2/my.rows.jsonl", Dataset.to_json),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_is_read_by_its_ending(name, save, streaming):
    Path(name).parent.mkdir(exist_ok=True)
    save(Dataset.from_list(ROWS), name)
    assert load(path=name, streaming=streaming) == (ROWS, None)


def test_a_saved_dataset_is_read_whole_or_by_split(streaming):
    Dataset.from_list(ROWS).save_to_disk("rows")
    DatasetDict(train=Dataset.from_list(ROWS), held=Dataset.from_list(ROWS[:3])).save_to_disk("splits")
    assert load(path="rows", streaming=streaming) == (ROWS, None)
    assert load(path="splits", eval_split="held", streaming=streaming) == (ROWS, ROWS[:3])


def test_a_folder_of_split_files_is_read_even_under_a_name_like_the_hub_s(streaming):
    write("trl-lib/pairs/train.jsonl", ROWS)
    write("trl-lib/pairs/test.jsonl", ROWS[:4])
    for path in ("trl-lib/pairs", "trl-lib/pairs/", str(Path("trl-lib/pairs").resolve())):
        assert load(path=path, eval_split="test", streaming=streaming) == (ROWS, ROWS[:4])
    swapped = {"train": "test.jsonl", "rest": "train.jsonl"}
    assert load(path="trl-lib/pairs", data_files=swapped, eval_split="rest", streaming=streaming) == (ROWS[:4], ROWS)


def test_a_builder_of_datasets_reads_the_files_it_is_given(streaming):
    write("rows.txt", ROWS)
    assert load(path="json", data_files="rows.txt", streaming=streaming) == (ROWS, None)


def test_the_demo_is_built_in(streaming):
    train, evaluation = load(path="demo", eval_split="test", max_train_rows=7, max_eval_rows=2, streaming=streaming)
    assert (len(train), len(evaluation)) == (7, 2)
    assert [sorted(row) for row in (train[0], evaluation[0])] == [["chosen", "prompt", "rejected"]] * 2


def test_a_folder_named_demo_does_not_hide_the_built_in_data():
    write("demo/train.jsonl", ROWS)
    assert load(path="demo") == (list(demo_dataset()["train"]), None)
    assert load(path="./demo") == (ROWS, None)


UNREADABLE = {
    "no file": ("rows.jsonl", None, "cannot be read: the file does not exist"),
    "empty file": ("rows.jsonl", b"", "cannot be read: the file is empty"),
    "broken JSON": ("rows.jsonl", b'{"chosen": "a"\n{{{', "JSON parse error: Missing a comma or '}' after an object"),
    "broken last line": ("rows.jsonl", b'{"chosen": "a"}\n{{{', "JSON parse error: Missing a name for object member"),
    "JSON of no rows": ("rows.json", b"3", "JSON parse error: "),
    "no parquet": ("rows.parquet", b"xx", "cannot be read: Parquet file size is 2 bytes"),
    "no text": ("rows.csv", b"\xff\xfe\x00,\n", "the file must be UTF-8 text, got the byte 0xff"),
    "no rows in it": (
        "notes.md",
        b"# Notes",
        "cannot be read: file names must end in .jsonl, .json, .csv, .tsv (each also with .gz, .bz2, .xz or .zst), "
        ".parquet or .arrow",
    ),
    "no such Hub name": ("some/dataset", None, "cannot be read: Couldn't reach 'some/dataset' on the Hub"),
}


@pytest.mark.parametrize(("name", "content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_refused_with_path_split_and_reason(name, content, reason, streaming):
    if content is not None:
        Path(name).write_bytes(content)
    message = refusal(path=name, streaming=streaming)
    assert message.startswith(f"`data.path` '{name}', split 'train', cannot be read: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", "prompt,chosen,rejected\n"), ("b.jsonl", "\n\n"), ("c.json", "[]")]
)
def test_a_file_without_rows_is_refused(name, content, streaming):
    Path(name).write_text(content)
    message = refusal(path=name, streaming=streaming)
    assert message.startswith(f"`data.path` '{name}', split 'train', ")
    assert message.endswith("has no rows.")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("rows.jsonl", "a file has only the split 'train'; to hold out rows, set `data.eval_size`"),
        ("rows", "it has no splits; to hold out rows, set `data.eval_size`"),
        ("splits", "its splits are train, test"),
        ("demo", "its splits are train, test"),
    ],
)
def test_a_split_that_is_not_there_is_refused_with_those_that_are(path, reason, streaming):
    write("rows.jsonl", ROWS)
    Dataset.from_list(ROWS).save_to_disk("rows")
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)).save_to_disk("splits")
    assert refusal(path=path, eval_split="held", streaming=streaming) == (
        f"`data.path` '{path}', split 'held', cannot be read: {reason}"
    )


def test_a_folder_names_its_splits_or_its_lack_of_files(streaming):
    write("pairs/train.jsonl", ROWS)
    Path("empty").mkdir()
    assert refusal(path="pairs", eval_split="held", streaming=streaming) == (
        "`data.path` 'pairs', split 'held', cannot be read: its splits are train"
    )
    message = refusal(path="empty", streaming=streaming)
    assert message.startswith("`data.path` 'empty', split 'train', cannot be read: The directory at ")


# Columns


@pytest.mark.parametrize(
    ("given", "columns", "expected"),
    [
        pytest.param({"chosen": "a", "rejected": "b"}, None, {"chosen": "a", "rejected": "b"}, id="implicit prompt"),
        pytest.param({**ROWS[0], "score": 3}, None, ROWS[0], id="others are left out"),
        pytest.param({**ROWS[0], "tools": "[]"}, None, {**ROWS[0], "tools": "[]"}, id="tools are kept"),
        pytest.param(
            {"question": "q", "good": "a", "bad": "b"},
            {"prompt": "question", "chosen": "good", "rejected": "bad"},
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            id="all renamed",
        ),
        pytest.param(
            {"prompt": "q", "chosen": "a", "rejected": "b", "worse": "c"},
            {"rejected": "worse"},
            {"prompt": "q", "chosen": "a", "rejected": "c"},
            id="over another",
        ),
        pytest.param(
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"chosen": "rejected", "rejected": "chosen"},
            {"prompt": "q", "chosen": "b", "rejected": "a"},
            id="swapped",
        ),
        pytest.param(
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": "rejected", "rejected": "chosen", "chosen": "prompt"},
            {"prompt": "b", "chosen": "q", "rejected": "a"},
            id="in a ring",
        ),
        pytest.param(
            {"prompt": "q", "answer": "a", "rejected": "b"},
            {"prompt": "prompt", "chosen": "answer"},
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            id="one onto itself",
        ),
        pytest.param(
            {"prompt": "a", "rejected": "b"}, {"chosen": "prompt"}, {"chosen": "a", "rejected": "b"}, id="moved away"
        ),
    ],
)
def test_columns_are_renamed_and_the_rest_left_out(given, columns, expected, streaming):
    write("rows.jsonl", [given])
    assert load(path="rows.jsonl", columns=columns, streaming=streaming) == ([expected], None)


def test_columns_that_are_not_there_are_refused_with_those_that_are(streaming):
    write("rows.jsonl", [{"question": "q", "chosen": "a", "bad": "b"}])
    assert refusal(path="rows.jsonl", streaming=streaming) == (
        "'rows.jsonl' must have a column 'rejected', got the columns question, chosen, bad. Map the name, for example "
        "`data.columns: {rejected: question}`."
    )
    assert refusal(path="rows.jsonl", columns={"rejected": "worse"}, streaming=streaming) == (
        "`data.columns` must map to columns of 'rows.jsonl', got 'worse' for rejected. Its columns are question, "
        "chosen, bad."
    )


# Mixtures


def named(name, count):
    return write(f"{name}.jsonl", [row(f"{name}{index}") for index in range(count)])


def test_a_mixture_draws_by_weight_until_a_source_is_exhausted(streaming):
    mixture = [{"path": named("a", 300), "weight": 3}, {"path": named("b", 300), "weight": 1}]
    rows, _ = load(mixture=mixture, streaming=streaming)
    counts = Counter(row["prompt"][0] for row in rows)
    assert counts["a"] == 300
    assert 70 <= counts["b"] <= 130
    for name in "ab":  # each source keeps its order
        assert [row["prompt"] for row in rows if row["prompt"][0] == name] == [
            f"{name}{i}" for i in range(counts[name])
        ]


def test_the_seed_alone_determines_the_order_of_a_mixture():
    settings = {"mixture": [{"path": named("a", 50)}, {"path": named("b", 50)}]}
    assert load(seed=1, **settings) == load(seed=1, **settings)
    assert load(seed=1, **settings) != load(seed=2, **settings)


def test_a_mixture_of_one_source_is_that_source(streaming):
    assert load(mixture=[{"path": named("a", 5), "weight": 0.2}], streaming=streaming) == load(path="a.jsonl")


def test_sources_of_a_mixture_have_splits_and_columns_of_their_own(streaming):
    write("a/train.jsonl", [{"prompt": "a", "good": "w1", "rejected": "w2"}] * 5)
    write("a/test.jsonl", [{"prompt": "held", "good": "w1", "rejected": "w2"}] * 2)
    write("b.jsonl", [row("b")] * 5)
    mixture = [{"path": "a", "eval_split": "test", "columns": {"chosen": "good"}}, {"path": "b.jsonl"}]
    train, evaluation = load(mixture=mixture, streaming=streaming)
    assert {row["prompt"] for row in train} == {"a", "b"}
    assert evaluation == [row("held", "w1", "w2")] * 2


def test_evaluation_rows_of_all_sources_are_joined(streaming):
    for name in "ab":
        write(f"{name}/train.jsonl", [row(name)] * 3)
        write(f"{name}/test.jsonl", [row(f"held {name}")] * 2)
    _, evaluation = load(mixture=[{"path": name, "eval_split": "test"} for name in "ab"], streaming=streaming)
    assert [row["prompt"] for row in evaluation] == ["held a", "held a", "held b", "held b"]


def test_sources_of_different_forms_are_refused(streaming):
    write("text.jsonl", ROWS)
    write("implicit.jsonl", [{"chosen": "w1 w2", "rejected": "w1 w3"}])
    write("chat.jsonl", [chat()])
    assert refusal(mixture=[{"path": "implicit.jsonl"}, {"path": "text.jsonl"}], streaming=streaming) == (
        "Either all sources of `data.mixture` must have a column 'prompt' or none, got it only in text.jsonl. Add it "
        "to the others."
    )
    message = refusal(mixture=[{"path": "text.jsonl"}, {"path": "chat.jsonl"}], streaming=streaming)
    assert message.startswith("The sources of `data.mixture` cannot be mixed: The features can't be aligned")


# Holding out


def test_a_number_of_rows_is_held_out(streaming):
    train, evaluation = load(path=write("rows.jsonl", ROWS), eval_size=3, streaming=streaming)
    assert (len(train), len(evaluation)) == (7, 3)
    assert sorted(row["prompt"] for row in train + evaluation) == sorted(row["prompt"] for row in ROWS)


@pytest.mark.parametrize(("share", "count"), [(0.3, 3), (0.25, 3), (0.001, 1)])
def test_a_share_of_the_rows_is_held_out_rounded_up(share, count):
    train, evaluation = load(path=write("rows.jsonl", ROWS), eval_size=share)
    assert (len(train), len(evaluation)) == (10 - count, count)
    assert sorted(row["prompt"] for row in train + evaluation) == sorted(row["prompt"] for row in ROWS)


def test_the_seed_alone_determines_the_rows_held_out():
    settings = {"path": write("rows.jsonl", ROWS), "eval_size": 3}
    assert load(seed=1, **settings) == load(seed=1, **settings)
    assert load(seed=1, **settings) != load(seed=2, **settings)


def test_a_seed_of_the_data_replaces_that_of_the_run():
    write("a.jsonl", ROWS), write("b.jsonl", ROWS[::-1])
    mixture = [{"path": "a.jsonl", "weight": 3}, {"path": "b.jsonl"}]
    for settings in ({"path": "a.jsonl", "eval_size": 3}, {"mixture": mixture}):
        own, plain = (
            [None if rows is None else list(rows) for rows in load_preferences(DataConfig(**settings, **data), seed)]
            for data, seed in (({"seed": 1}, 2), ({}, 1))
        )
        assert own == plain


@pytest.mark.parametrize("size", [10, 11, 0.95, 0.999])
def test_holding_out_every_row_is_refused(size):
    assert refusal(path=write("rows.jsonl", ROWS), eval_size=size) == (
        f"`data.eval_size` must be less than the 10 training rows, got {size}. Write for example `eval_size: 1`."
    )


def test_the_number_of_rows_to_hold_out_that_an_error_proposes_can_be_held_out():
    assert refusal(path=write("rows.jsonl", ROWS[:2]), eval_size=2).endswith("Write for example `eval_size: 1`.")
    train, evaluation = load(path="rows.jsonl", eval_size=1)
    assert (len(train), len(evaluation)) == (1, 1)
    assert refusal(path=write("rows.jsonl", ROWS[:1]), eval_size=1) == (
        "`data.eval_size` must be less than the 1 training rows, got 1. Remove it."
    )


@pytest.mark.parametrize("size", [10, 11, 2**62])
def test_holding_out_every_row_of_a_stream_is_refused(size):
    assert refusal(path=write("rows.jsonl", ROWS), eval_size=size, streaming=True) == (
        f"`data.eval_size` must be less than the number of training rows, got {size}. Write a smaller number."
    )
    train, evaluation = load(path="rows.jsonl", eval_size=9, streaming=True)
    assert (len(train), len(evaluation)) == (1, 9)


def test_only_the_first_rows_are_taken_where_a_number_is_set(streaming):
    settings = {"path": write("rows.jsonl", ROWS), "streaming": streaming}
    assert load(max_train_rows=4, **settings) == (ROWS[:4], None)
    assert load(max_train_rows=99, **settings) == (ROWS, None)
    train, evaluation = load(max_train_rows=4, max_eval_rows=2, eval_size=3, **settings)
    assert (len(train), len(evaluation)) == (4, 2)


# Chat templates


def test_the_plain_template_is_given_only_where_it_is_needed(tokenizer):
    assert not use_plain_chat_template(Dataset.from_list(ROWS), tokenizer)
    assert tokenizer.chat_template is None
    rows = Dataset.from_list([{**chat(), "chosen": None}, chat()])
    assert use_plain_chat_template(rows, tokenizer)
    assert tokenizer.chat_template == PLAIN_CHAT_TEMPLATE
    assert not use_plain_chat_template(rows, tokenizer)


def test_a_tokenizer_s_own_template_stays(chat_tokenizer):
    assert not use_plain_chat_template(Dataset.from_list([chat()]), chat_tokenizer)
    assert chat_tokenizer.chat_template == TEMPLATE


def test_the_plain_template_tells_roles_apart_and_its_prompt_is_a_prefix(tokenizer):
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    messages = [{"role": "system", "content": "Be brief."}, user("Hello"), assistant("Hi")]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert whole == "System: Be brief.\nUser: Hello\nAssistant: Hi<eos>"
    assert prompt == "System: Be brief.\nUser: Hello\nAssistant:"


# The audit


def audit(train, evaluation=None, *, tokenizer, max_length=None, mode="keep_start", streaming=False, **settings):
    def rows(values):
        rows = None if values is None else Dataset.from_list(values)
        return rows.to_iterable_dataset() if rows is not None and streaming else rows

    settings = {"min_rows_kept": 0.01, **settings}
    config = DataConfig(path="demo", streaming=streaming, **settings)
    truncation = Truncation(max_length, mode)
    audited = audit_preferences(rows(train), rows(evaluation), config, tokenizer, [truncation])[truncation]
    audited.check()
    held = audited.evaluation
    return unnumbered(audited.train), None if held is None else unnumbered(held), audited.audits


def unnumbered(rows):
    """The rows without the columns that this package adds."""
    added = {ROW_INDEX, STREAM_ROW_INDEX, FILE_ROW, FILE_SOURCE, CHOSEN_START, *TOKEN_COLUMNS}
    return [{name: row[name] for name in row if name not in added} for row in rows]


def counts(split):
    return {kind: finding.count for kind, finding in split.findings.items() if finding.count}


def unusable(split):
    return {kind: count for kind, count in counts(split).items() if kind not in USABLE}


SOUND, SOUND_CHAT = row(), chat()
KEPT_CHAT = [user("w1")], [assistant("w2")], [assistant("w3")]
FAULTS = {
    # kind and faulty row, next to a valid row with `max_length` 9
    "null chosen": ("missing", {**SOUND, "chosen": None}),
    "null rejected": ("missing", {**SOUND, "rejected": None}),
    "null prompt": ("missing", {**SOUND, "prompt": None}),
    "empty chosen": ("empty", {**SOUND, "chosen": ""}),
    "blank rejected": ("empty", {**SOUND, "rejected": " \n\t"}),
    "identical": ("identical", {**SOUND, "rejected": " w2"}),
    "long prompt": ("lost", row("w1 " * 9)),
    "long chosen": ("cut", row(chosen=" w2" * 8)),
    "long rejected": ("cut", row(rejected=" w2" * 8)),
}
CHAT_FAULTS = {
    "null chosen": ("missing", {**SOUND_CHAT, "chosen": None}),
    "null prompt": ("missing", {**SOUND_CHAT, "prompt": None}),
    "null content": ("missing", {**SOUND_CHAT, "chosen": [assistant(None)]}),
    "null role": ("missing", {**SOUND_CHAT, "rejected": [{"role": None, "content": "w3"}]}),
    "no messages in chosen": ("missing", {**SOUND_CHAT, "chosen": []}),
    "no messages in prompt": ("missing", {**SOUND_CHAT, "prompt": []}),
    "blank chosen": ("empty", chat(chosen=" ")),
    "identical": ("identical", chat(rejected="w2")),
    "long prompt": ("lost", chat("w1 " * 9)),
    "long chosen": ("cut", chat(chosen="w2 " * 9)),
}


def fault(faults, sound):
    return pytest.mark.parametrize(
        ("kind", "sound", "faulty"),
        [pytest.param(kind, sound, faulty, id=name) for name, (kind, faulty) in faults.items()],
    )


def check_policies(kind, sound, faulty, tokenizer, streaming, kept_row=None):
    settings = {"tokenizer": tokenizer, "max_length": 9, "streaming": streaming}
    clean = audit([sound], **settings)[0]
    kept, _, audits = audit([sound, faulty], **settings)
    assert kept == clean
    if not streaming:
        assert unusable(audits["train"]) == {kind: 1}
        assert (audits["train"].rows, audits["train"].kept) == (2, 1)
    if kind != "missing":
        kept, _, audits = audit([sound, faulty], audit={kind: "keep"}, **settings)
        assert kept == [*clean, kept_row or faulty]
        if not streaming:
            assert unusable(audits["train"]) == {kind: 1}
    with pytest.raises(DataError) as raised:
        audit([sound, faulty], audit={kind: "error"}, **settings)
    start = f"Row 1 of the streamed train rows is `{kind}`: " if streaming else f"1 of 2 train rows are `{kind}`: "
    end = ("" if streaming else " (first in row 1 of demo)") + f". Fix the data, or set `data.audit.{kind}: drop`."
    assert str(raised.value).startswith(start + AUDIT_KINDS[kind].description)
    assert str(raised.value).endswith(end)


@fault(FAULTS, SOUND)
def test_each_policy_holds_for_each_fault_of_a_text_row(kind, sound, faulty, tokenizer, streaming):
    check_policies(kind, sound, faulty, tokenizer, streaming)


@fault(CHAT_FAULTS, SOUND_CHAT)
def test_each_policy_holds_for_each_fault_of_a_conversation(kind, sound, faulty, chat_tokenizer, streaming):
    check_policies(kind, sound, faulty, chat_tokenizer, streaming)


IMPLICIT_FAULTS = {
    "nothing chosen": ("empty", {"chosen": "", "rejected": "w1"}, row("", "", "w1")),
    # If the answers differ from the start, TRL's extraction looks at the last character of the chosen one
    "nothing but space once the prompt is out": (
        "empty",
        {"chosen": "w1 w2 ", "rejected": "x3"},
        row("w1 w2", " ", "3"),
    ),
    # The last letters are unknown words: two answers of one token
    "identical": ("identical", {"chosen": "w1 w2", "rejected": "w1 w2"}, row("w1 w", "2", "2")),
}


@pytest.mark.parametrize("name", IMPLICIT_FAULTS)
def test_each_policy_holds_for_each_fault_of_an_implicit_prompt(name, tokenizer, streaming):
    kind, faulty, kept_row = IMPLICIT_FAULTS[name]
    check_policies(kind, {"chosen": "w1 w2 w3", "rejected": "w1 w2 w4"}, faulty, tokenizer, streaming, kept_row)


def test_a_clean_dataset_is_returned_as_it_is(tokenizer):
    rows = Dataset.from_list(ROWS)
    (audited,) = audit_preferences(rows, None, DataConfig(path="demo"), tokenizer, [Truncation(99)]).values()
    assert unnumbered(audited.train) == ROWS
    assert audited.evaluation is None
    assert str(audited.audits["train"]) == "10 of 10 rows kept"
    assert list(audited.audits["train"].findings) == list(AUDIT_KINDS)


def test_a_row_keeps_the_number_it_had_before_the_audit(tokenizer, streaming):
    train = Dataset.from_list([row("w1"), row(chosen=""), row("w2"), row(chosen=None), row("w3")])
    held = Dataset.from_list([row(rejected=" w2"), row("w4")])
    if streaming:
        train, held = train.to_iterable_dataset(), held.to_iterable_dataset()
    config = DataConfig(path="demo", streaming=streaming)
    (audited,) = audit_preferences(train, held, config, tokenizer, [Truncation(None)]).values()
    column = STREAM_ROW_INDEX if streaming else ROW_INDEX
    assert [(row["prompt"], row[column]) for row in audited.train] == [("w1", 0), ("w2", 2), ("w3", 4)]
    assert [(row["prompt"], row[column]) for row in audited.evaluation] == [("w4", 1)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({"chosen": "w1 w2 ", "rejected": "w1 w3"}, row("w1 w", "2 ", "3"), id="text"),
        pytest.param(
            {"chosen": "w1 user", "rejected": "w1 assistant"},
            row("w1", " user", " assistant"),
            id="space goes to the answers",
        ),
        pytest.param(implicit_chat(), chat(), id="conversation"),
        pytest.param({**implicit_chat(), "prompt": "w1"}, chat(), id="a text prompt that the answers repeat"),
        pytest.param({**chat(), "prompt": "w1"}, chat(), id="a text prompt that the answers lack"),
        pytest.param(
            {
                "chosen": [user("w1"), assistant("w2"), user("w3"), assistant("w4")],
                "rejected": [user("w1"), assistant("w2"), user("w3"), assistant("w5")],
            },
            {
                "prompt": [user("w1"), assistant("w2"), user("w3")],
                "chosen": [assistant("w4")],
                "rejected": [assistant("w5")],
            },
            id="several turns",
        ),
        pytest.param({**implicit_chat(), "tools": "[]"}, {**chat(), "tools": "[]"}, id="tools stay"),
    ],
)
def test_an_implicit_prompt_is_made_explicit(given, expected, chat_tokenizer, streaming):
    kept, _, _ = audit([given], tokenizer=chat_tokenizer, max_length=30, streaming=streaming)
    assert kept == [expected]


def test_answers_that_share_no_message_have_no_prompt(chat_tokenizer, streaming):
    lonely = {"chosen": [assistant("w2")], "rejected": [assistant("w3")]}
    kept, _, _ = audit([implicit_chat(), lonely], tokenizer=chat_tokenizer, streaming=streaming, audit="keep")
    assert kept == [chat()]


def test_an_answer_that_has_nothing_of_its_own_keeps_its_last_message(chat_tokenizer, streaming):
    longer = {**implicit_chat(), "chosen": [user("w1"), assistant("w3"), user("w4"), assistant("w2")]}
    kept, _, _ = audit([longer], tokenizer=chat_tokenizer, streaming=streaming)
    assert kept == [
        {
            "prompt": [user("w1")],
            "chosen": [assistant("w3"), user("w4"), assistant("w2")],
            "rejected": [assistant("w3")],
        }
    ]


def test_a_conversation_as_prompt_of_text_answers_is_of_the_wrong_type(chat_tokenizer):
    with pytest.raises(DataError, match="1 of 1 train rows are `missing`"):
        audit([{**SOUND, "prompt": [user("w1")]}], tokenizer=chat_tokenizer, audit="error")


def test_numbers_as_answers_are_of_the_wrong_type(tokenizer):
    with pytest.raises(DataError, match="1 of 1 train rows are `missing`"):
        audit([{"prompt": "w1", "chosen": 1, "rejected": 2}], tokenizer=tokenizer, audit="error")


def test_repeated_rows_are_found_within_a_split_and_across_both(tokenizer):
    train = [row("w1"), row("w2"), row("w1"), row("w3"), row("w1", " w3", " w2")]
    kept, held, audits = audit(train, [row("w3"), row("w4"), row("w4")], tokenizer=tokenizer)
    assert kept == [row("w1"), row("w2"), row("w1", " w3", " w2")]
    assert held == [row("w3"), row("w4")]
    assert {split: counts(found) for split, found in audits.items()} == {
        "train": {"duplicate": 1, "leaked": 1},
        "eval": {"duplicate": 1},
    }
    assert list(audits) == ["train", "eval"]


def test_the_same_row_with_an_implicit_and_an_explicit_prompt_is_leaked(chat_tokenizer):
    rows = [implicit_chat("w1"), implicit_chat("w5")]
    kept, _, audits = audit(rows, [chat("w1")], tokenizer=chat_tokenizer)
    assert kept == [chat("w5")]
    assert counts(audits["train"]) == {"leaked": 1}


@pytest.mark.parametrize(
    ("policies", "error"),
    [
        ({"duplicate": "error"}, "`duplicate`: the split already contains the same row (first in row 1 of demo)."),
        ({"leaked": "error"}, "`leaked`: the evaluation split contains the same row (first in row 2 of demo)."),
    ],
)
def test_repeated_rows_are_kept_or_refused_where_the_policy_says_so(policies, error, tokenizer):
    train, evaluation = [row("w1"), row("w1"), row("w2")], [row("w2")]
    assert audit(train, evaluation, tokenizer=tokenizer, audit="keep")[0] == train
    with pytest.raises(DataError) as raised:
        audit(train, evaluation, tokenizer=tokenizer, audit=policies)
    assert str(raised.value).startswith(f"1 of 3 train rows are {error}")


@pytest.mark.parametrize(("kept_kind", "other"), [("cut", "duplicate"), ("duplicate", "cut")])
def test_a_row_of_two_kinds_goes_unless_both_are_kept(kept_kind, other, tokenizer):
    long = row(chosen=" w2" * 9)
    settings = {"tokenizer": tokenizer, "max_length": 9}
    kept, _, audits = audit([row(), long, row("w4"), long], audit={kept_kind: "keep"}, **settings)
    assert kept == [row(), *([long] if kept_kind == "cut" else []), row("w4")]
    assert counts(audits["train"])[other] >= 1
    assert audit([row(), long, long], audit="keep", **settings)[0] == [row(), long, long]


@pytest.mark.parametrize(
    ("mode", "max_length", "expected"),
    [
        *(("keep_start", length, kind) for length, kind in enumerate(["lost", "lost", "cut", "cut", None], start=1)),
        *(("keep_end", length, kind) for length, kind in enumerate(["cut", "cut", None, None], start=1)),
        ("keep_start", None, None),
    ],
)
def test_lost_and_cut_are_told_apart_by_the_token(mode, max_length, expected, tokenizer, streaming):
    # Two prompt tokens, and three in the longer answer with the EOS token that TRL appends
    rows = [row("w1 w2", " w3", " w4 w5")]
    policies = {kind: "keep" for kind in ("lost", "cut") if kind != expected}
    settings = {"tokenizer": tokenizer, "max_length": max_length, "mode": mode, "streaming": streaming}
    assert audit(rows, audit="keep", **settings)[0] == rows
    if expected is None:
        assert audit(rows, audit="error", **settings)[0] == rows
    else:
        with pytest.raises(DataError, match=f"`{expected}`"):
            audit(rows, audit={**policies, expected: "error"}, **settings)


def test_an_answer_that_ends_with_eos_is_given_no_second_one(tokenizer):
    rows = [row("w1 w2", " w3 <eos>", " w4 w5 <eos>")]
    assert audit(rows, tokenizer=tokenizer, max_length=5, audit="error")[0] == rows


LENGTHS = [(prompt, chosen, rejected) for prompt in (1, 4) for chosen in (1, 3) for rejected in (1, 5)]


def trl_kinds(rows, tokenizer, max_length, mode):
    """Number of rows that TRL drops, and of other rows in which it truncates an answer."""
    args = DPOConfig(
        output_dir="out", bf16=False, use_cpu=True, report_to="none", max_length=max_length, truncation_mode=mode
    )
    prepared = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(rows), tokenizer, args, "train"
    )
    collator = DataCollatorForPreference(tokenizer.pad_token_id, max_length=max_length, truncation_mode=mode)
    cut = 0
    for pair in prepared:
        kept = collator([pair])["completion_mask"].sum(dim=1).tolist()
        cut += kept != [len(pair["chosen_ids"]), len(pair["rejected_ids"])]
    return +Counter(lost=len(rows) - len(prepared), cut=cut)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([row("w1 " * p, " w2" * c, " w3" * r) for p, c, r in LENGTHS], id="text"),
        pytest.param([chat("w1 " * p, "w2 " * c, "w3 " * r) for p, c, r in LENGTHS], id="conversation"),
        pytest.param(
            [{**chat("w1 " * p, "w2 w2"), "tools": json.dumps([{"name": "f"}] * p)} for p in (1, 2, 5)], id="tools"
        ),
    ],
)
def test_rows_are_lost_and_cut_as_trl_drops_and_truncates_them(rows, mode, chat_tokenizer):
    seen = Counter()
    for max_length in range(1, 13):
        _, _, audits = audit(rows, tokenizer=chat_tokenizer, max_length=max_length, mode=mode, audit="keep")
        found = {kind: count for kind, count in counts(audits["train"]).items() if kind in ("lost", "cut")}
        assert found == trl_kinds(rows, chat_tokenizer, max_length, mode)
        seen.update(found)
    assert seen["cut"] > 0
    assert (seen["lost"] > 0) is (mode == "keep_start")


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("options", "lost"),
    [
        ({}, True),
        ({"truncation_mode": "keep_end"}, False),
        ({"max_length": None}, False),
        ({"packing": True}, True),
        ({"packing": True, "truncation_mode": "keep_end"}, True),
        ({"packing": True, "packing_strategy": "bfd_split"}, False),
        ({"packing": True, "packing_strategy": "wrapped"}, False),
    ],
    ids=str,
)
def test_a_long_prompt_is_lost_in_the_sft_stage_if_no_token_of_the_answer_is_trained_on(
    options, lost, tokenizer, tiny_model
):
    settings = {"max_length": 8, **options}
    args = SFTConfig(output_dir="out", bf16=False, use_cpu=True, report_to="none", padding_free=False, **settings)
    rows = [row("w1 " * 9)]
    trained = ChosenSFTTrainer(tiny_model, args, train_dataset=Dataset.from_list(rows)).train_dataset
    learned = any(label != -100 for sequence in trained for label in sequence["labels"])
    truncation = Truncation.from_args(args)
    assert learned is not lost
    ids = PairTokenizer(tokenizer, "train").one(rows[0])
    assert truncation.loses_answers(PairTokens(*(ids[name] for name in TOKEN_COLUMNS))) is lost


def test_a_dpo_stage_truncates_by_its_own_settings():
    args = DPOConfig(output_dir="out", bf16=False, use_cpu=True, report_to="none", max_length=7)
    assert Truncation.from_args(args) == Truncation(7, "keep_start")


def test_tools_count_where_the_prompt_is_implicit_too(chat_tokenizer):
    tools = json.dumps([{"name": "f"}] * 3)
    rows = [{**implicit_chat(chosen="w2 w2"), "tools": tools}]
    # One token per tool, two for the user and three for the longer answer
    kept, _, _ = audit(rows, tokenizer=chat_tokenizer, max_length=8, audit="error")
    assert kept == [{**chat(chosen="w2 w2"), "tools": tools}]
    with pytest.raises(DataError, match="`cut`"):
        audit(rows, tokenizer=chat_tokenizer, max_length=7, audit="error")


@pytest.mark.parametrize(
    ("template", "extra", "reason"),
    [
        pytest.param(None, {}, "Cannot use chat template functions", id="no template"),
        pytest.param("{{ raise_exception('No system role.') }}", {}, "No system role.", id="template that refuses"),
        pytest.param(TEMPLATE, {"tools": "{{{"}, "`tools` must be JSON, got '{{{'", id="tools that are no JSON"),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_refused(template, extra, reason, tokenizer, streaming):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="refused") as raised:
        audit([{**chat(), **extra}], tokenizer=tokenizer, max_length=9, streaming=streaming)
    if not streaming:
        assert "Fix the data, or lower" in str(raised.value)
        assert f"1 refused (drop). The chat template refuses them: {reason}" in str(raised.value)


def test_an_audit_that_leaves_too_little_is_refused_with_what_it_found(tokenizer):
    rows = [row(f"w{index}") for index in range(4)] + [row(rejected=" w2", prompt=f"w{index}") for index in range(6)]
    with pytest.raises(DataError) as raised:
        audit(rows, tokenizer=tokenizer, min_rows_kept=0.5)
    assert str(raised.value) == (
        "The row audit leaves 4 of 10 train rows, less than `data.min_rows_kept` (0.5): 4 of 10 rows kept: 6 "
        "identical (drop). Fix the data, or lower `data.min_rows_kept`."
    )
    assert len(audit(rows, tokenizer=tokenizer, min_rows_kept=0.4)[0]) == 4
    with pytest.raises(DataError, match="leaves 0 of 6 train rows"):
        audit(rows[4:], tokenizer=tokenizer, min_rows_kept=0.01)


def test_the_audit_shows_three_rows_of_a_kind_shortened(tokenizer):
    faulty = [row(f"w{index}", " x" * 150, " x" * 150) for index in range(5)]
    _, _, audits = audit([row(), *faulty], tokenizer=tokenizer)
    finding = audits["train"].findings["identical"]
    shown = (" x" * 100) + "..."
    assert (finding.policy, finding.count) == ("drop", 5)
    assert finding.examples == [
        {"row": index + 1, "prompt": f"w{index}", "chosen": shown, "rejected": shown} for index in range(3)
    ]
    assert str(audits["train"]) == "1 of 6 rows kept: 5 identical (drop)"


def test_a_stream_reports_no_counts_and_looks_for_what_needs_no_memory(tokenizer):
    _, _, audits = audit([row()], [row()], tokenizer=tokenizer, streaming=True, audit={"cut": "keep"})
    assert {split: str(found) for split, found in audits.items()} == {
        "train": "rows are checked as they are read",
        "eval": "rows are checked as they are read",
    }
    assert {kind: finding.policy for kind, finding in audits["train"].findings.items()} == {
        **dict.fromkeys(("missing", "refused", "empty", "identical", "prompts", "user", "lost"), "drop"),
        **USABLE,
        "cut": "keep",
    }


def test_a_stream_keeps_what_a_map_style_dataset_keeps(chat_tokenizer):
    for rows in (
        [SOUND, *(faulty for _, faulty in FAULTS.values())],
        [SOUND_CHAT, *(f for _, f in CHAT_FAULTS.values())],
    ):
        results = [audit(rows, tokenizer=chat_tokenizer, max_length=9, streaming=s)[0] for s in (False, True)]
        assert results[0] == results[1] == rows[:1]


def test_the_sources_are_those_of_the_mixture_or_the_config_itself():
    assert DataConfig(mixture=[{"path": "a", "weight": 2.0}]).sources == [DataSource("a", weight=2.0)]
    config = DataConfig(path="a")
    assert config.sources == [config]


def test_rows_of_another_form_than_the_first_are_missing():
    form = _Form()
    assert form.kinds(SOUND) == []
    assert form.kinds(SOUND_CHAT) == ["missing"]
