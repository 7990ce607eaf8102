"""Hostile recipes and rows: one line per mistake, no code executed, nothing written outside the run folder."""

import csv
import dataclasses
import datetime
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import DPOConfig, DPOTrainer, SFTConfig

from dposhift_trl import ChosenSFTTrainer, DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.data.audit import audit_preferences
from dposhift_trl.data.chat_template import check_template, use_plain_chat_template
from dposhift_trl.data.config import DataConfig
from dposhift_trl.data.errors import MAX_LINE, DataError, reading_rows
from dposhift_trl.data.shapes import convert
from dposhift_trl.data.sources import load_preferences
from dposhift_trl.data.tokens import Truncation, shorten
from dposhift_trl.recipe import SECTIONS, RecipeError, dump_yaml, load_recipe, parse_yaml, recipe_keys
from dposhift_trl.recipe.checks import UNWRITABLE
from dposhift_trl.run import main
from dposhift_trl.schedules import check_knots


SOUND = """\
output_dir: runs/x
model: {model_name_or_path: demo}
data: {path: demo, eval_split: test}
sft: {bf16: false, use_cpu: true}
dpo: {bf16: false, use_cpu: true}
"""
TOP_LEVEL = [key.name for key in recipe_keys("")]
FIELDS = [(key,) for key in (*TOP_LEVEL, *SECTIONS)] + [
    (section, field.name) for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)
]


def few(count, **options):
    return settings(derandomize=True, deadline=None, database=None, max_examples=count, **options)


# Values


ODD_TEXTS = [
    "", " ", "\0", "a\0b", "\ud800", "\udfff\ud800", "\u200b", "\u202eabc\u202c", "\ufeff", "\x85", "\u2028",
    "e\u0301", "\U0010ffff", "\x1b[31m", "../../..", "/", "~", "~/x", "a" * 100_000, "[" * 3_000, "{" * 3_000,
    "[[0, 1], [1, NaN]]", "[[0, 1e400]]", f"[[{10**400}, 1]]", '{"a": 1}', "null", "no", "1e-6", "demo", "json",
    "steps", "fixed", "drop", "cuda", "wandb",
]  # fmt: skip
ODD_NUMBERS = [0, -1, 2**31, 2**63, -(2**64), 10**400, 5e-324, 1e308, -0.0, float("inf"), float("-inf"), float("nan")]

texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=12)
numbers = st.sampled_from(ODD_NUMBERS) | st.integers() | st.floats()
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


def as_yaml(value):
    """JSON is YAML if characters are not escaped as surrogate pairs, which YAML does not have."""
    text = json.dumps(value, ensure_ascii=False)
    text = text.replace("NaN", ".nan").replace("Infinity", ".inf") if isinstance(value, float) else text
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


# Recipes


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A separate working directory, cache and environment; HOME is an empty folder."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in ("work", "home", "rows"):
        (folder / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "work")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        before = dict(os.environ)
        os.environ["HOME"] = str(folder / "home")
        yield folder
        os.environ.clear()
        os.environ.update(before)


def one_line(message):
    assert message.strip()
    assert message.isprintable()
    assert len(message) <= MAX_LINE + 10


def prints(error):
    """Errors can be printed in any encoding, since stderr escapes missing characters."""
    assert sys.__stderr__.errors == "backslashreplace"
    for encoding in ("utf-8", "ascii"):
        print(error, file=io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace"), flush=True)


def attempt(content, *overrides):
    """The recipe if it is accepted, else `None`. Accepted recipes can be saved and read back."""
    Path("x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe("x.yaml", overrides)
    except RecipeError as error:
        prints(error)
        for line in str(error).split("\n"):
            one_line(line)
            assert line.startswith("x.yaml: ")
        return None
    finally:
        assert sorted(os.listdir()) == ["x.yaml"], "a recipe is only read"
    text = dump_yaml(recipe.resolved)
    text.encode("utf-8")
    assert repr(parse_yaml(text)) == repr(recipe.resolved)
    return recipe


@few(300)
@given(field=st.sampled_from(FIELDS), value=values)
def test_any_value_at_any_field_is_accepted_or_refused(field, value):
    attempt(SOUND, ".".join(field) + "=" + as_yaml(value))


@few(60)
@given(
    sections=st.dictionaries(
        st.sampled_from([*TOP_LEVEL, *SECTIONS]) | texts,
        values | st.dictionaries(texts, values, max_size=2),
        max_size=4,
    )
)
def test_any_mapping_is_accepted_or_refused(sections):
    attempt(as_yaml(sections))


@few(100)
@given(overrides=st.lists(st.text(max_size=30) | st.builds("{}={}".format, texts, texts), max_size=3))
def test_overrides_of_any_text_are_accepted_or_refused(overrides):
    attempt(SOUND, *overrides)


FRAGMENTS = [
    "&a ", "*a", "<<: *a", "!!python/object/apply:os.mkdir [made]", "!!python/name:os.mkdir", "!!binary aGk=",
    "!<tag:yaml.org,2002:python/object/new:os.mkdir> [made]", "!!bool x", "!!int x", "!!float x", "!!timestamp x",
    "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str ", "!!map ", "!!seq ", "? ", ": ", "- ", "[", "]",
    "{", "}", "|\n", ">\n", "'", '"', "\\", "%YAML 1.1\n---\n", "%TAG ! !\n", "---\n", "...\n", "\t", "\n", "\n  ",
    "@", "`", "=", "~", ".nan", "0o9", "0x", "1:30", "2026-01-01T25:00:00", "\0", "\ufeff", "\x85", "\ud800", "dpo:",
]  # fmt: skip


@few(100)
@given(
    place=st.integers(0, len(SOUND)),
    parts=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), min_size=1, max_size=6),
)
def test_any_text_amid_a_recipe_is_accepted_or_refused(place, parts):
    attempt(SOUND[:place] + "".join(parts) + SOUND[place:])


@few(60)
@given(content=st.binary(max_size=40) | st.text(max_size=40) | st.sampled_from([b"", b"\xef\xbb\xbf", b"\0" * 9]))
def test_any_bytes_are_no_recipe(content):
    assert attempt(content) is None


@few(60)
@given(path=texts | st.sampled_from([".", "**/x", "x.yaml/y", "/proc/self/mem", "nowhere/\0"]))
def test_any_path_that_is_no_recipe_is_refused(path):
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    prints(raised.value)
    one_line(str(raised.value))


CANARY = Path("made")
CALLS = [
    "!!python/object/apply:os.mkdir [made]",
    "!!python/object/new:os.mkdir [made]",
    "!!python/object/apply:os.system ['mkdir made']",
    "!!python/object/apply:subprocess.check_call [[mkdir, made]]",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [made]",
    "!!python/object:dposhift_trl.recipe.Recipe {}",
    "!!python/module:os",
    "!!python/name:os.system",
    "!!python/tuple [1]",
]
PLACES = ["{}", "{}: 1", "dpo: {}", "dpo: {{{}: 1}}", "data: {{mixture: [{}]}}", "%TAG !! tag:x\n---\n{}"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("text", PLACES)
def test_a_tag_runs_nothing(call, text):
    assert attempt(text.format(call)) is None
    assert attempt(SOUND, f"dpo.lr_scheduler_kwargs={call}") is None
    assert not CANARY.exists()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        pytest.param(
            ["dpo.beta=0x" + "f" * 5000],
            "`dpo.beta` must be an integer with at most 63 bits, got one with 20000.",
            id="5000 digits",
        ),
        pytest.param(
            ["dpo.allow_lambda_above_one=true", f"dpo.shift_lambda={10**400}"],
            "`dpo.shift_lambda` must be an integer with at most 63 bits, got one with 1329.",
            id="lambda of 400 digits",
        ),
        pytest.param(
            [f"dpo.lambda_schedule=[[0, 1], [1, {10**400}]]"],
            "`dpo.lambda_schedule[1][1]` must be an integer with at most 63 bits, got one with 1329.",
            id="knot of 400 digits",
        ),
        pytest.param(["dpo.lr_scheduler_kwargs" + ".a" * 3000 + "=1"], "nested too deeply.", id="deep key"),
        pytest.param(["seed=" + "[" * 60 + "]" * 60], "nested too deeply.", id="deep value"),
        pytest.param(
            ['output_dir="a\\0b"'],
            "`output_dir` must not contain NUL characters or lone surrogates, got 'a\\x00b'. Remove them.",
            id="NUL in a path",
        ),
        pytest.param(
            ['data.columns={chosen: "\\ud800"}'],
            "`data.columns.chosen` must not contain NUL characters or lone surrogates, got '\\ud800'. Remove them.",
            id="surrogate",
        ),
        pytest.param(
            ['dpo.lr_scheduler_kwargs={"\\ud800": 1}'],
            "`dpo.lr_scheduler_kwargs` must not contain NUL characters or lone surrogates, got '\\ud800'. Remove "
            "them.",
            id="surrogate as a key",
        ),
        pytest.param(
            ["dpo.lr_scheduler_kwargs={a: !!binary aGk=}"],
            "`dpo.lr_scheduler_kwargs.a` must consist of mappings, lists, strings and numbers, got b'hi'.",
            id="bytes",
        ),
        pytest.param(
            ["wandb.project=../x"],
            "section `wandb`: `project` must be at most 128 characters without / \\ # ? % :, got '../x'. Write for "
            "example `dposhift_trl`.",
            id="project",
        ),
        pytest.param(
            ["wandb.tags=[ok, '']"],
            "section `wandb`: Each of `tags` must have 1 to 64 characters, got ''. Change or remove it.",
            id="tag",
        ),
        pytest.param(
            ["dpo.accelerator_config=absent.json"],
            "section `dpo`: [Errno 2] No such file or directory: 'absent.json'",
            id="file that is named and absent",
        ),
    ],
)
def test_what_no_run_could_hold_is_refused_by_name(overrides, line):
    Path("x.yaml").write_text(SOUND)
    with pytest.raises(RecipeError) as raised:
        load_recipe("x.yaml", overrides)
    assert str(raised.value) == f"x.yaml: {line}"


def test_a_mistake_of_a_long_value_keeps_its_beginning_and_its_end():
    Path("x.yaml").write_text(SOUND)
    with pytest.raises(RecipeError) as raised:
        load_recipe("x.yaml", ["dpo.beta=" + "a" * 100_000])
    assert len(str(raised.value)) < MAX_LINE + 10
    assert str(raised.value).startswith("x.yaml: `dpo.beta` must be a number, got 'aaa")
    assert str(raised.value).endswith("aaa'.")


@pytest.mark.parametrize("schedule", ["[" * 3000, f"[[{'9' * 5000}, 1]]", "[[0, 1"], ids=["deep", "digits", "cut off"])
def test_a_schedule_that_is_no_json_is_refused(schedule):
    with pytest.raises(ValueError, match=r"^`lambda_schedule` must be a name or a list of knots, got "):
        DPOShiftConfig(lambda_schedule=schedule)


def test_a_whole_number_beyond_every_float_is_no_lambda():
    for knots in ([[0, 10**400]], [[10**400, 1]], [[0, -(10**400)]]):
        with pytest.raises(TypeError, match=r"must be made of .* pairs of numbers"):
            check_knots(knots)
    with pytest.raises(ValueError, match=r"`shift_lambda` must be less than 2\*\*31"):
        DPOShiftConfig(shift_lambda=10**400, allow_lambda_above_one=True)


def bomb(levels):
    return "\n".join(["l0: &l0 [x, x]", *(f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]" for i in range(1, levels))])


@few(20)
@given(levels=st.integers(1, 60))
def test_aliases_grow_no_recipe_beyond_bounds(levels):
    assert attempt(bomb(levels)) is None


def test_a_home_is_where_trl_and_the_command_both_find_it(place):
    recipe = attempt(SOUND, "output_dir=~/x")
    assert recipe.output_dir == place / "home" / "x"
    for name, stage in recipe.stages.items():
        assert stage.output_dir == str(recipe.output_dir / name)


letters = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats()
    | letters
    | st.sampled_from([text for text in ODD_TEXTS if not UNWRITABLE.search(text)])
    | st.text(" \n\ta:#-", max_size=200),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(letters, inner, max_size=4),
    max_leaves=12,
)


@few(120)
@given(value=st.dictionaries(st.text("abc", min_size=1, max_size=3), plain, max_size=3))
def test_what_is_dumped_is_parsed_to_the_same_values(value):
    text = dump_yaml(value)
    text.encode("utf-8")
    assert repr(parse_yaml(text)) == repr(value)


# Rows


CELLS = [
    "", " ", "w1", "w1 w2", "w3 <eos>", " w4", "<eos>", "\0", "w1\0w2", "\u200b", "\u202ew1\u202c", "\ufeffw1",
    "e\u0301", "\U0001f600", "\x85\u2028", "w1\nw2", 'w1,"w2', "'", "NA", "null", "nan", "1", "[]", "{}", "=1+1",
    "w1 " * 33_000, "\ud800",
]  # fmt: skip
TOOLS = [None, "", "[]", "{{{", "5", "[" * 3000, 5, [], [{"name": "f"}], ["x"], {"a": 1}]
TEMPLATE_KWARGS = [
    None,
    {},
    {"a": 1},
    {"tools": None},
    "x",
    3,
    [1],
    {"tokenize": False},
    {"chat_template": "{{ 1 / 0 }}"},
]

cells = st.sampled_from(CELLS) | st.text(max_size=6)
answers = st.sampled_from(["w1", "w2 w3", "w4 w5 w6"])
odd = scalars | st.lists(cells, max_size=2) | st.dictionaries(st.sampled_from(["role", "content"]), cells)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", ""]) | st.none(), "content": cells | st.none()},
    optional={"tool_calls": st.none(), "weight": st.integers(0, 1), "when": st.text(max_size=3)},
)
texts_or_chats = {
    "text": answers | cells | odd,
    "chat": st.lists(answers.map(lambda text: {"role": "assistant", "content": text}) | messages, max_size=3) | odd,
}


ROW = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}


def as_chat(row):
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": roles[name], "content": text}] for name, text in row.items()}


def rows_of(form):
    """Text or conversational rows, valid and invalid."""
    sound = answers if form == "text" else answers.map(lambda text: [{"role": "assistant", "content": text}])
    row = st.fixed_dictionaries(dict.fromkeys(ROW, sound | sound | texts_or_chats[form]))
    extras = st.fixed_dictionaries(
        {},
        optional={
            "tools": st.sampled_from(TOOLS), "chat_template_kwargs": st.sampled_from(TEMPLATE_KWARGS),
            "row_index": odd, "our chosen": cells, "\0": cells,
        },
    )  # fmt: skip
    odd_row = st.builds(
        lambda row, extras, lost: {key: value for key, value in {**row, **extras}.items() if key != lost},
        row, st.just({}) | extras, st.none() | st.none() | st.sampled_from([*ROW]),
    )  # fmt: skip
    return st.lists(st.fixed_dictionaries(dict.fromkeys(ROW, sound)) | odd_row, max_size=6)


def write_rows(rows, ending, tail):
    path = Path(f"../rows/rows{next(NUMBER)}{ending}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if ending == ".parquet":
        columns = [[row.get(name) for row in rows] for name in names]
        try:
            pq.write_table(pa.table(list(map(pa.array, columns)), names=names), path)
        except (pa.ArrowException, UnicodeError, OverflowError):
            columns = [[ascii(value) for value in column] for column in columns]
            pq.write_table(pa.table(columns, names=list(map(ascii, names))), path)
        return path
    if ending == ".csv":
        text = io.StringIO()
        csv.writer(text).writerows([names, *([row.get(name) for name in names] for row in rows)])
        content = text.getvalue().encode("utf-8", "surrogatepass")
    elif ending == ".json":
        content = json.dumps(rows).encode()
    else:
        content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(content + tail)
    return path


NUMBER = itertools.count()
configs = st.fixed_dictionaries(
    {"streaming": st.booleans(), "min_rows_kept": st.just(0.01)},
    optional={
        "audit": st.sampled_from(["drop", "keep", "error", {"cut": "keep", "empty": "error"}]),
        "columns": st.sampled_from(
            [{"prompt": "chosen", "chosen": "prompt"}, {"chosen": "our chosen"}, {"tools": "\0"}]
        ),
        "eval_size": st.sampled_from([1, 3, 10**6]),
        "max_train_rows": st.sampled_from([1, 2**62]),
    },
)


def prepared(path, config, max_length):
    """The rows of a file that are left after the audit, and their tokenizer, or `None`."""
    tokenizer = make_tokenizer()
    try:
        config = DataConfig(path=str(path), **config)
        train, evaluation = load_preferences(config, 0)
        train, _ = convert(train, tokenizer)
        evaluation = None if evaluation is None else convert(evaluation, tokenizer)[0]
        use_plain_chat_template(train, tokenizer)
        check_template(train, tokenizer)
        audited = audited_rows(train, evaluation, config, tokenizer, max_length)
        with reading_rows():
            left = list(itertools.islice(audited.train, 50))
    except DataError as error:
        prints(error)
        one_line(str(error))
        return None
    found = {split: dataclasses.asdict(audit) for split, audit in audited.audits.items()}
    json.dumps(found, ensure_ascii=False).encode("utf-8")
    assert left
    return audited.train, tokenizer


def audited_rows(train, evaluation, config, tokenizer, max_length):
    """What the audit leaves of rows, or the error with which it refuses them."""
    truncation = Truncation(max_length)
    audited = audit_preferences(train, evaluation, config, tokenizer, [truncation])[truncation]
    audited.check()
    return audited


def tokenized(rows, tokenizer):
    """Rows as tokenized by `DPOTrainer`."""
    args = DPOConfig(output_dir="../out", bf16=False, use_cpu=True, report_to="none", max_length=None)
    itself = SimpleNamespace(_tokenizer=tokenizer)
    return list(itertools.islice(DPOTrainer._prepare_dataset(itself, rows, tokenizer, args, "train"), 50))


@few(100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    rows=st.sampled_from(["text", "chat"]).flatmap(rows_of),
    ending=st.sampled_from([".jsonl", ".jsonl", ".json", ".csv", ".parquet"]),
    tail=st.sampled_from([b"", b"", b"", b"", b"{{{", b"\xff", b'{"prompt": 1', b"\n\n\0", b'"']),
    config=configs,
    max_length=st.sampled_from([None, 1, 4, 9, 32]),
)
def test_rows_of_any_kind_are_refused_or_can_be_tokenized(rows, ending, tail, config, max_length):
    path = write_rows(rows, ending, tail)
    kept = prepared(path, config, max_length)
    if kept is not None:
        for row in tokenized(*kept):
            ids = [*row["prompt_ids"], *row["chosen_ids"], *row["rejected_ids"]]
            assert all(isinstance(token, int) for token in ids)


def step(model, rows, tokenizer, max_length):
    """Train both stages for one step and check that the loss is finite."""
    for trainer, config in ((ChosenSFTTrainer, SFTConfig), (DPOShiftTrainer, DPOShiftConfig)):
        args = config(
            output_dir="../out", bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1,
            save_strategy="no", logging_steps=1, per_device_train_batch_size=4, max_length=max_length,
            gradient_checkpointing=False,
        )  # fmt: skip
        trained = trainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
        trained.train()
        assert math.isfinite(trained.state.log_history[0]["loss"])


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
@pytest.mark.parametrize("form", ["text", "chat"])
def test_what_is_left_of_odd_rows_is_trained_on(form, streaming, tiny_model):
    texts = [text for text in CELLS if text != "\ud800"]
    rows = [{"prompt": "w1 w2", "chosen": text, "rejected": "w5"} for text in texts]
    rows += [{"prompt": text, "chosen": "w3", "rejected": "w5"} for text in texts]
    if form == "chat":
        rows = list(map(as_chat, rows))
    for index, row in enumerate(rows):
        row["chat_template_kwargs"] = None if index % 2 else {"a": index}
    train, tokenizer = prepared(write_rows(rows, ".jsonl", b""), {"streaming": streaming, "min_rows_kept": 0.01}, 32)
    step(tiny_model, train, tokenizer, 32)


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
@pytest.mark.parametrize("given", [[None, None], [{"a": 1}, None], [None, {"a": 1}], [{}, None]], ids=str)
def test_a_null_for_the_template_s_arguments_is_none_of_them(given, streaming):
    rows = [{**ROW, "prompt": f"w{index}", "chat_template_kwargs": value} for index, value in enumerate(given)]
    rows, tokenizer = prepared(write_rows(rows, ".jsonl", b""), {"streaming": streaming}, 32)
    assert len(tokenized(rows, tokenizer)) == 2
    assert all(isinstance(row["chat_template_kwargs"], dict) for row in rows)


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
@pytest.mark.parametrize("max_length", [None, 9])
@pytest.mark.parametrize(
    "extra",
    [{"tools": "{{{"}, {"tools": 5}, {"tools": "[" * 3000}]
    + [{"chat_template_kwargs": value} for value in ("x", [1], {"tokenize": False}, {"chat_template": "{{ 1 / 0 }}"})],
    ids=lambda extra: str(extra)[:40],
)
def test_a_conversation_that_a_template_fails_on_is_refused(extra, max_length, streaming):
    path = write_rows([{**as_chat(ROW), **extra}], ".jsonl", b"")
    config, tokenizer = DataConfig(path=str(path), streaming=streaming), make_tokenizer()
    train, _ = load_preferences(config, 0)
    assert use_plain_chat_template(train, tokenizer)
    with pytest.raises(DataError, match=r"^The row audit leaves .*1 refused"):
        audited_rows(train, None, config, tokenizer, max_length)


def test_a_stream_of_which_nothing_is_left_is_refused():
    rows = [{**ROW, "chosen": ""}] * 3
    config = DataConfig(path=str(write_rows(rows, ".jsonl", b"")), streaming=True)
    train, _ = load_preferences(config, 0)
    with pytest.raises(DataError) as raised:
        audited_rows(train, None, config, make_tokenizer(), 9)
    assert str(raised.value) == (
        "The row audit leaves none of the streamed train rows: 3 empty. Fix the data, or hold out fewer rows."
    )


# Longer than one read buffer; with identical answers, so that all rows are dropped
FILLER = (json.dumps({**ROW, "chosen": "w" * 100_000, "rejected": "w" * 100_000}) + "\n") * 110
LONG = (json.dumps(ROW) + "\n" + FILLER).encode()


@pytest.mark.parametrize(
    ("ending", "start", "end", "reason"),
    [
        (".jsonl", LONG, b"{{{", "JSON parse error: "),
        (".jsonl", LONG, b'{"chosen": "a\xff"}', "the file must be UTF-8 text, got the byte 0xff"),
        (".jsonl", LONG, json.dumps({**ROW, "more": 1}).encode(), "Couldn't cast"),
        (".csv", b"prompt,chosen,rejected\n" + b"w1,,\n" * 20_000, b"w1,w2,w3,w4\n", "Error tokenizing data"),
    ],
    ids=["JSON", "UTF-8", "columns", "CSV"],
)
def test_a_stream_that_breaks_late_is_a_mistake_of_the_data(ending, start, end, reason):
    path = Path(f"../rows/rows{next(NUMBER)}{ending}")
    path.write_bytes(start + end)
    config = DataConfig(path=str(path), streaming=True)
    train = load_preferences(config, 0)[0]
    with pytest.raises(DataError) as raised, reading_rows():
        list(train)
    one_line(str(raised.value))
    assert str(raised.value).startswith(f"The rows of `data` cannot be read: {reason}")
    assert str(raised.value).endswith(". Fix the file.")


@pytest.mark.parametrize("error", [OSError(28, "full"), TypeError("x"), ValueError("x"), KeyError("x")], ids=repr)
def test_an_error_that_no_reader_raised_stays_as_it_is(error):
    with pytest.raises(type(error)) as raised, reading_rows():
        raise error
    assert raised.value is error


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_bytes_that_are_no_text_are_refused_in_parquet(streaming):
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    path = f"../rows/rows{next(NUMBER)}.parquet"
    pq.write_table(pa.table({"prompt": ["w1"], "chosen": text, "rejected": ["w3"]}), path)
    with pytest.raises(DataError, match=r"^The rows of `data` cannot be read: the file must be UTF-8 text"):
        use_plain_chat_template(load_preferences(DataConfig(path=path, streaming=streaming), 0)[0], make_tokenizer())


@pytest.mark.parametrize("value", [b"\xff", datetime.datetime(2026, 1, 1)], ids=str)
def test_values_that_json_lacks_are_shown_and_compared(value):
    twice = [{name: [{**message, "when": value} for message in part] for name, part in as_chat(ROW).items()}] * 2
    (kept, _) = prepared(write_rows(twice, ".parquet", b""), {"min_rows_kept": 0.5}, 32)
    assert len(kept) == 1
    assert prepared(write_rows([{**ROW, "chosen": value}], ".parquet", b""), {}, 32) is None


def test_what_an_audit_shows_can_be_written():
    shown = [shorten(value) for value in ("\ud800", [{"role": "\udfff", "content": "e\u0301"}], "\0", None)]
    assert shown[0] == "\\ud800"
    assert json.loads(json.dumps(shown, ensure_ascii=False).encode("utf-8").decode()) == shown


def test_a_column_s_name_cannot_stand_in_the_way_of_renaming_another():
    rows = [{"our chosen": " w2", "our prompt": "w1", "rejected": " w3"}]
    columns = {"chosen": "our chosen", "prompt": "our prompt"}
    for streaming in (False, True):
        path = str(write_rows(rows, ".jsonl", b""))
        train, _ = load_preferences(DataConfig(path=path, columns=columns, streaming=streaming), 0)
        assert [{name: row[name] for name in ROW} for row in train] == [ROW]


# The command


STAGE = {
    "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "per_device_train_batch_size": 4, "max_steps": 2,
    "logging_steps": 1, "save_strategy": "no", "max_length": 32,
}  # fmt: skip
MISTAKES = """\
output_dir: [é]
model: {dtype: 3}
data: {path: demo, columns: {"a\\nb\\u2028c": x}}
sft: {"a\\nb": 1, "\\e[31m": 2}
dpo: {beta: "é\\n\\nb", max_steps: 1.5e1}
\u202elatad: 1
"""


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def commands(tmp_path_factory, tiny_model):
    """Two running commands by name: folder, files in it before the start, and process."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("mistakes", "climbing")}
    for folder in folders.values():
        for name in ("home", "tmp", "in/side"):
            (folder / name).mkdir(parents=True)
    (folders["mistakes"] / "in" / "x.yaml").write_text(MISTAKES, encoding="utf-8")
    rows = [{"prompt": "w1 w2", "chosen": text, "rejected": "w5"} for text in CELLS if text != "\ud800"]
    rows += [{**row, "chosen": None} for row in rows[:3]]
    (folders["climbing"] / "in" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "output_dir": "../run", "run_name": "../../../climbed", "model": {"model_name_or_path": tiny_model},
        "data": {"path": "../in/side/../rows.jsonl", "min_rows_kept": 0.1},
        "wandb": {"entity": "../../climbed", "tags": ["../../climbed"], "project": ".."},
        "sft": STAGE, "dpo": {**STAGE, "hub_model_id": "../climbed"},
    }  # fmt: skip

    (folders["climbing"] / "in" / "x.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    started = {}
    for name, folder in folders.items():
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONIOENCODING": "ascii",
            "HOME": str(folder / "home"), "HF_HOME": str(folder / "hf"), "TMPDIR": str(folder / "tmp"),
        }  # fmt: skip
        started[name] = (
            folder,
            files(folder),
            subprocess.Popen(
                [sys.executable, "-m", "dposhift_trl.run", "x.yaml"],
                cwd=folder / "in", env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            ),
        )  # fmt: skip
    yield started
    for *_, command in started.values():
        command.kill()
        command.communicate()


@pytest.mark.xdist_group("hostile commands")
def test_a_hostile_recipe_is_one_line_a_mistake_on_an_ascii_terminal(commands):
    folder, before, command = commands["mistakes"]
    _, err = command.communicate(timeout=120)
    assert command.returncode == 2, err
    assert err.splitlines() == [
        "x.yaml: `output_dir` must be a string, got ['\\xe9'].",
        "x.yaml: `model.dtype` must be a string or null, got 3.",
        "x.yaml: unknown key `sft.a b`.",
        "x.yaml: unknown key `sft.\\x1b[31m`.",
        "x.yaml: `dpo.beta` must be a number, got '\\xe9\\n\\nb'.",
        "x.yaml: `dpo.max_steps` must be an integer, got 15.0.",
        "x.yaml: unknown key `\\u202elatad`. Did you mean `data`?",
    ]
    assert files(folder) == before


@pytest.mark.xdist_group("hostile commands")
def test_names_that_climb_write_nothing_outside_the_run_folder(commands):
    folder, before, command = commands["climbing"]
    _, err = command.communicate(timeout=120)
    assert command.returncode == 0, err
    new = files(folder) - before
    caches = (
        "hf/",
        "tmp/",
        "home/.cache/wandb/logs/",
        "home/.cache/matplotlib/",
    )  # library caches, not named by any value in the recipe
    assert {name for name in new if not name.startswith(("run/", *caches))} == set()
    assert {name for name in new if "climbed" in name} == set()
    assert not [path for path in folder.parent.rglob("*climbed*") if not path.is_relative_to(folder)]
    assert {"run/dpo/model.safetensors", "run/audit.json", "run/recipe.yaml"} <= new


def test_a_stream_that_breaks_in_training_ends_the_command_with_one_line(tmp_path, tiny_model, capfd):
    sound = "".join(json.dumps({**ROW, "chosen": f"w{index}"}) + "\n" for index in range(4, 8))
    (tmp_path / "rows.jsonl").write_text(sound + FILLER + "{{{")
    recipe = {
        "output_dir": str(tmp_path / "run"), "model": {"model_name_or_path": tiny_model},
        "data": {"path": str(tmp_path / "rows.jsonl"), "streaming": True}, "dpo": {**STAGE, "report_to": "none"},
    }  # fmt: skip
    (tmp_path / "x.yaml").write_text(dump_yaml(recipe))
    capfd.readouterr()
    assert main([str(tmp_path / "x.yaml")]) == 2
    assert capfd.readouterr().err.count("The rows of `data` cannot be read: JSON parse error: ") == 1
