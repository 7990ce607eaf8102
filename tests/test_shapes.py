"""The shapes that rows come in: which are messages, which are converted, and what is said of the others."""

import dataclasses
import html
import json
import re
from pathlib import Path

import datasets
import pytest
from chat_templates import TEMPLATES
from datasets import Dataset
from ruamel.yaml import YAML
from transformers import GPT2Config, GPT2LMHeadModel

from dposhift_trl.artifacts import read_rows
from dposhift_trl.columns import (
    FILE_ROW,
    PREFERENCE_COLUMNS,
    REFUSAL,
    ROW_INDEX,
    STREAM_ROW_INDEX,
    TEMPLATE_COLUMNS,
    TOKEN_COLUMNS,
)
from dposhift_trl.data import rendering, shapes
from dposhift_trl.data.audit import audit_preferences
from dposhift_trl.data.chat_template import reads_parts, use_plain_chat_template
from dposhift_trl.data.config import AUDIT_KINDS, DataConfig
from dposhift_trl.data.errors import DataError
from dposhift_trl.data.messages import is_conversation, is_empty, message_as_text
from dposhift_trl.data.shapes import convert, wrong_shape
from dposhift_trl.data.sources import load_preferences
from dposhift_trl.data.tokenization import PairTokenizer
from dposhift_trl.data.tokens import Truncation
from dposhift_trl.generate import generate_answers, sampling
from dposhift_trl.generate.questions import prompt_tokens
from dposhift_trl.run import main


PAGE = Path(__file__).parent.parent / "docs" / "data_formats.md"
TOKENIZER = TEMPLATES["qwen-3"].tokenizer()  # reads tools and tool calls, but no parts


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, **message):
    return {"role": "assistant", **message, "tool_calls": list(calls)}


CHAT = {"prompt": [user("Hello")], "chosen": [assistant("Hi.")], "rejected": [assistant("No.")]}
TEXT = {"prompt": "Hello", "chosen": " you", "rejected": " me"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=[False, True], ids=["map-style", "streaming"])
def streaming(request):
    return request.param


def load(rows, streaming=False, name="rows.jsonl"):
    """The rows as a run loads them from a file, in the order of the file."""
    path = Path(name)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    found = load_preferences(DataConfig(path=name), 0)[0]
    return found.to_iterable_dataset() if streaming else found


def converted(rows, streaming=False, name="rows.jsonl"):
    found, changes = convert(load(rows, streaming, name), TOKENIZER)
    return [written(row) for row in found], changes


def written(row):
    """A row without its numbers."""
    return {name: row[name] for name in row if name in (*PREFERENCE_COLUMNS, *TEMPLATE_COLUMNS)}


def tokens(row):
    columns = PairTokenizer(TOKENIZER, "train").one(row)
    return [TOKENIZER.decode(columns[name]) for name in TOKEN_COLUMNS]


def audit(rows, **settings):
    config = DataConfig(path="demo", min_rows_kept=0.01, **settings)
    [audited] = audit_preferences(rows, None, config, TOKENIZER, [Truncation(None)]).values()
    audited.check()
    return audited


# Messages


@pytest.mark.parametrize(
    ("message", "text", "empty"),
    [
        (assistant("Hi."), "Hi.", False),
        (assistant(" \n"), " \n", True),
        (assistant(""), "", True),
        (assistant([]), "", True),
        (assistant([{"type": "text", "text": "Hi"}, {"type": "text", "text": "."}]), "Hi.", False),
        (assistant([{"type": "text", "text": " "}]), " ", True),
        (calling(call("f")), '{"name": "f", "arguments": {}}', False),
        (calling(call("f", a=1), content=None), '{"name": "f", "arguments": {"a": 1}}', False),
        (calling(call("f"), content=""), '{"name": "f", "arguments": {}}', False),
        (calling(call("f"), content="I look."), 'I look.\n{"name": "f", "arguments": {}}', False),
        (calling(content="I look."), "I look.", False),
        ({"role": "tool", "name": "f", "content": "5"}, "5", False),
    ],
)
def test_a_message_has_text_parts_or_tool_calls(message, text, empty):
    assert is_conversation([message])
    assert message_as_text(message) == text
    assert is_empty([message]) is empty
    assert is_empty([message, assistant("x")]) is False


@pytest.mark.parametrize(
    "value",
    [
        None, "text", [], {}, [None], ["text"], [assistant(None)], [{"role": "assistant"}], [calling()],
        [calling(content=None)], [{"role": None, "content": "x"}], [{"content": "x"}], [assistant(3)],
        [assistant(["text"])], [assistant([{"text": "x"}])],
        [assistant([{"type": "image", "url": "x"}])], [assistant([{"type": "text", "text": None}])], [user("x"), None],
        [{"role": "assistant", "tool_calls": "f"}], [{"role": "assistant", "tool_calls": ["f"]}],
    ],
    ids=str,
)  # fmt: skip
def test_what_has_neither_is_not_a_message(value):
    assert not is_conversation(value)


def test_an_answer_that_is_a_call_is_neither_missing_nor_empty(streaming):
    rows = [
        {**CHAT, "chosen": [calling(call("f", a=1), content=None)]},
        {**CHAT, "chosen": [calling(call("f", a=2), content="")]},
        {**CHAT, "rejected": [calling(call("g"))]},
        {**CHAT, "prompt": [user("Hello"), calling(call("f")), {"role": "tool", "content": "5"}]},
    ]
    kept = list(audit(load(rows, streaming), audit="error").train)
    assert list(map(written, kept)) == rows
    with pytest.raises(DataError, match="`empty`"):
        audit(load([{**CHAT, "chosen": [calling(content="")]}], streaming), audit="error")


# Conversion

SHAPES = {
    "ShareGPT": (
        {
            "prompt": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hello"}],
            "chosen": [{"from": "gpt", "value": "Hi."}],
            "rejected": [{"from": "gpt", "value": "No."}],
        },
        [{**CHAT, "prompt": [{"role": "system", "content": "Be brief."}, user("Hello")]}],
        [shapes.SHAREGPT],
    ),
    "ShareGPT with the prompt in both answers": (
        {
            "chosen": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}],
            "rejected": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "No."}],
        },
        [{"chosen": [user("Hello"), assistant("Hi.")], "rejected": [user("Hello"), assistant("No.")]}],
        [shapes.SHAREGPT],
    ),
    "LLaMA-Factory": (
        {
            "conversations": [{"from": "human", "value": "Hello"}],
            "chosen": {"from": "gpt", "value": "Hi."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        [CHAT],
        [shapes.SHAREGPT, shapes.SINGLE],
    ),
    "LLaMA-Factory with tools": (
        {
            "conversations": [
                {"from": "human", "value": "Hello"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "5"},
            ],
            "chosen": {"from": "gpt", "value": "Hi."},
            "rejected": {"from": "function_call", "value": "not JSON"},
        },
        [
            {
                "prompt": [user("Hello"), calling(call("f", a=1), content=""), {"role": "tool", "content": "5"}],
                "chosen": [assistant("Hi.")],
                "rejected": [assistant("not JSON")],
            }
        ],
        [shapes.SHAREGPT, shapes.SINGLE],
    ),
    "conversations beside answers that contain them": (
        {
            "conversations": [user("Hello")],
            "chosen": [user("Hello"), assistant("Hi.")],
            "rejected": [user("Hello"), assistant("No.")],
        },
        [{"chosen": [user("Hello"), assistant("Hi.")], "rejected": [user("Hello"), assistant("No.")]}],
        [],
    ),
    "single messages": (
        {"prompt": user("Hello"), "chosen": assistant("Hi."), "rejected": assistant("No.")},
        [CHAT],
        [shapes.SINGLE],
    ),
    "a text prompt and single messages": (
        {"prompt": "Hello", "chosen": assistant("Hi."), "rejected": assistant("No.")},
        [{**CHAT, "prompt": "Hello"}],
        [shapes.SINGLE],
    ),
    "text answers to a conversation": (
        {**CHAT, "chosen": "Hi.", "rejected": "No."},
        [CHAT],
        [shapes.TEXT_ANSWERS],
    ),
    "one text answer": ({**CHAT, "rejected": "No."}, [CHAT], [shapes.TEXT_ANSWERS]),
    "JSON text": (
        {name: json.dumps(value) for name, value in CHAT.items()},
        [CHAT],
        [shapes.PARSED],
    ),
    "JSON text of single messages, as Python prints it": (
        {"prompt": "Hello", "chosen": repr(assistant("Hi.")), "rejected": repr(assistant("No."))},
        [{**CHAT, "prompt": "Hello"}],
        [shapes.PARSED, shapes.SINGLE],
    ),
    "JSON text of ShareGPT": (
        {**CHAT, "chosen": '[{"from": "gpt", "value": "Hi."}]'},
        [CHAT],
        [shapes.PARSED, shapes.SHAREGPT],
    ),
    "content parts": (
        {**CHAT, "prompt": [user([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}])]},
        [CHAT],
        [shapes.FLATTENED],
    ),
    "one chosen answer in a list": ({**TEXT, "chosen": [" you"]}, [TEXT], [shapes.ONE_CHOSEN]),
    "several rejected texts": (
        {**TEXT, "rejected": [" me", " us"]},
        [TEXT, {**TEXT, "rejected": " us"}],
        [shapes.SEVERAL],
    ),
    "several rejected lists of messages": (
        {**CHAT, "rejected": [[assistant("No.")], [assistant("Bye.")]]},
        [CHAT, {**CHAT, "rejected": [assistant("Bye.")]}],
        [shapes.SEVERAL],
    ),
    "several rejected messages": (
        {**CHAT, "chosen": assistant("Hi."), "rejected": [assistant("No."), assistant("Bye.")]},
        [CHAT, {**CHAT, "rejected": [assistant("Bye.")]}],
        [shapes.SINGLE, shapes.SEVERAL],
    ),
    "several rejected texts to a conversation": (
        {**CHAT, "chosen": "Hi.", "rejected": ["No.", "Bye."]},
        [CHAT, {**CHAT, "rejected": [assistant("Bye.")]}],
        [shapes.TEXT_ANSWERS, shapes.SEVERAL],
    ),
    "text": (TEXT, [TEXT], []),
    "text that looks like JSON": ({**TEXT, "chosen": '["you"]', "rejected": "{me}"}, None, []),
    "messages": (CHAT, [CHAT], []),
    "an answer of two messages": ({**CHAT, "rejected": [assistant("No."), assistant("Bye.")]}, None, []),
    "tool calls": ({**CHAT, "chosen": [calling(call("f", a=1), content=None)]}, None, []),
    "an object": ({**TEXT, "chosen": {"text": "you", "score": 1}}, None, []),
    "several chosen answers": ({**TEXT, "chosen": ["you", "us"]}, None, []),
    "null": ({**TEXT, "chosen": None}, None, []),
}


@pytest.mark.parametrize(("row", "expected", "changes"), SHAPES.values(), ids=SHAPES)
def test_a_row_is_converted_and_a_line_says_so(row, expected, changes, streaming):
    found, done = converted([row], streaming)
    assert done == changes
    assert found == (expected or [row])


def test_conversations_of_a_stream_are_its_prompts():
    Path("rows.jsonl").write_text(json.dumps(SHAPES["LLaMA-Factory"][0]), encoding="utf-8")
    stream, _ = load_preferences(DataConfig(path="rows.jsonl", streaming=True), 0)
    assert [written(row) for row in convert(stream, TOKENIZER)[0]] == [CHAT]


def test_rows_of_a_known_shape_stay_the_object_that_they_are(streaming):
    for rows in ([TEXT], [CHAT], [{**CHAT, "chosen": [calling(call("f"))]}]):
        loaded = load(rows, streaming)
        assert convert(loaded, TOKENIZER)[0] is loaded


def test_each_row_is_converted_by_itself(streaming):
    rows = [
        {**CHAT, "rejected": assistant("No.")},
        CHAT,
        {**CHAT, "rejected": "No."},
        {**CHAT, "chosen": None},
        {**CHAT, "rejected": {"text": "No."}},
        {**CHAT, "rejected": [{"from": "gpt", "value": "No."}]},
    ]
    found, changes = converted(rows, streaming)
    assert found == [CHAT, CHAT, CHAT, rows[3], rows[4], CHAT]
    assert changes == [shapes.SHAREGPT, shapes.SINGLE, shapes.TEXT_ANSWERS]


def test_text_is_json_only_if_most_of_the_first_rows_is(streaming):
    as_json = {**CHAT, "chosen": json.dumps(CHAT["chosen"]), "rejected": json.dumps(CHAT["rejected"])}
    other = {**CHAT, "chosen": "[1, 2]", "rejected": json.dumps(CHAT["rejected"])}
    literal = {**CHAT, "chosen": [assistant("[1, 2]")]}
    assert converted([as_json, other], streaming)[0] == [{**CHAT, "chosen": [assistant(as_json["chosen"])]}, literal]
    found, _ = converted([as_json] * 100 + [other], streaming)
    assert found == [CHAT] * 100 + [literal]


@pytest.mark.parametrize("cell", ["", " ", "[]", json.dumps(CHAT["chosen"])[:-4]])
@pytest.mark.parametrize("column", PREFERENCE_COLUMNS)
def test_a_blank_or_broken_cell_among_the_first_does_not_turn_the_others_into_text(column, cell, streaming):
    as_json = {name: json.dumps(CHAT[name]) for name in PREFERENCE_COLUMNS}
    found, changes = converted([as_json, {**as_json, column: cell}, as_json], streaming)
    assert found == [CHAT, {**CHAT, column: None}, CHAT]
    assert changes == [shapes.PARSED]


def test_blank_cells_for_the_chat_template_are_nothing_and_others_are_json(streaming):
    cells = [
        {"tools": "", "chat_template_kwargs": '{"enable_thinking": false}'},
        {"tools": "[]", "chat_template_kwargs": ""},
        {"tools": "none", "chat_template_kwargs": ""},
        {"tools": "", "chat_template_kwargs": '{"add_generation_prompt": true}'},
    ]
    rows = [{**CHAT, "prompt": [user(f"{place}")], **cell} for place, cell in enumerate(cells)]
    found = load(rows, streaming)
    columns = [PairTokenizer(TOKENIZER, "train").one(row) for row in found]
    assert [row[REFUSAL] for row in columns] == [
        None,
        None,
        "`tools` must be JSON, got 'none'",
        "`chat_template_kwargs` must not contain `add_generation_prompt`, which TRL sets",
    ]
    assert len(list(audit(found).train)) == 2


def test_pairs_of_a_row_have_numbers_that_are_unique_and_name_the_row(streaming):
    rows = [{**TEXT, "rejected": [f" r{n}{m}" for m in range(n)]} for n in (1, 3, 2)]
    found, _ = convert(load(rows, streaming), TOKENIZER)
    column, step = (STREAM_ROW_INDEX, 10**9) if streaming else (ROW_INDEX, 3)
    assert [(pair["rejected"], pair[column]) for pair in found] == [
        (" r10", 0),
        (" r30", 1),
        (" r31", 1 + step),
        (" r32", 1 + 2 * step),
        (" r20", 2),
        (" r21", 2 + step),
    ]
    if not streaming:
        assert list(found[FILE_ROW]) == [0, 1, 1, 1, 2, 2]


def test_a_stream_of_pairs_resumes_between_two_pairs_of_a_row():
    rows = [{**TEXT, "rejected": [f" r{n}{m}" for m in range(3)]} for n in range(4)]
    stream, _ = convert(load(rows, streaming=True), TOKENIZER)
    whole = [pair["rejected"] for pair in stream]
    for taken in (1, 3, 5):
        reading = iter(stream)
        start = [next(reading)["rejected"] for _ in range(taken)]
        resumed, _ = convert(load(rows, streaming=True), TOKENIZER)
        resumed.load_state_dict(stream.state_dict())
        assert start + [pair["rejected"] for pair in resumed] == whole


def test_an_empty_list_of_rejected_answers_is_missing():
    rows = load([{**TEXT, "rejected": []}, {**TEXT, "rejected": [" me", None]}])
    found, _ = convert(rows, TOKENIZER)
    audited = audit(found)
    assert audited.audits["train"].findings["missing"].count == 2
    assert [row["rejected"] for row in audited.train] == [" me"]


def test_nulls_that_parquet_adds_inside_calls_and_tools_do_not_reach_the_template():
    tools = [call("f", a=1)["function"] | {"parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}]
    rows = [
        {**CHAT, "chosen": [calling(call("f", a=1), content=None)], "tools": [{"function": tools[0]}]},
        {
            **CHAT,
            "chosen": [calling(call("g", b="x"), content=None)],
            "tools": [{"function": {"name": "g", "parameters": {"properties": {"b": {"type": "string"}}}}}],
        },
    ]
    found, changes = converted(rows, name="rows.parquet")
    assert changes == [shapes.NULLS]
    assert list(map(tokens, found)) == list(map(tokens, rows))
    as_stored = load(rows, name="rows.parquet")
    assert list(map(tokens, as_stored)) != list(map(tokens, rows))


def test_keys_that_are_null_in_whole_messages_are_left_to_transformers():
    rows = [{**CHAT, "prompt": [user("Hello") | {"name": "Ann"}]}, CHAT]
    found, changes = converted(rows, name="rows.parquet")
    assert changes == []
    assert found[1]["prompt"] == [user("Hello") | {"name": None}]
    assert tokens(found[1]) == tokens(CHAT)


def test_without_a_chat_template_parts_become_text_and_the_plain_template_is_set(streaming):
    tokenizer = dataclasses.replace(TEMPLATES["qwen-3"], source=None).tokenizer()
    tokenizer.chat_template = None  # the other test of the two may have set it
    rows, changes = convert(load([SHAPES["content parts"][0]], streaming), tokenizer)
    assert (list(map(written, rows)), changes) == ([CHAT], [shapes.FLATTENED])
    assert use_plain_chat_template(rows, tokenizer)


def test_a_template_without_end_is_not_asked_for_long(monkeypatch):
    monkeypatch.setattr(rendering, "MAX_SECONDS", 0.2)
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert not reads_parts(dataclasses.replace(TEMPLATES["qwen-3"], source=source).tokenizer())


# What is said of other shapes

MUST = "must be text or a list of messages with `role` and `content`, got"
OTHER_SHAPES = [
    ({**TEXT, "chosen": {"text": "you", "score": 1}}, f"`chosen` {MUST} an object with the keys text, score."),
    ({**TEXT, "chosen": ["you", "us"]}, f"`chosen` {MUST} a list of text."),
    ({**TEXT, "rejected": None}, f"`rejected` {MUST} null."),
    ({**TEXT, "rejected": 3}, f"`rejected` {MUST} 3."),
    ({**TEXT, "rejected": []}, f"`rejected` {MUST} an empty list."),
    ({**TEXT, "prompt": None}, f"`prompt` {MUST} null."),
    ({"prompt": "x", "chosen": "y"}, f"`rejected` {MUST} null."),
    ({**CHAT, "prompt": [{"speaker": "me", "text": "x"}]}, f"`prompt` {MUST} a list of an object with the keys "
     "speaker, text."),
    ({**CHAT, "chosen": [assistant(None)]}, f"`chosen` {MUST} a list with a message by 'assistant' whose `content` is "
     "null, without a tool call."),
    ({**CHAT, "chosen": [assistant({"a": 1})]}, f"`chosen` {MUST} a list with a message by 'assistant' whose "
     "`content` is an object with the keys a."),
    ({**CHAT, "chosen": [{"role": "assistant", "text": "x"}]}, f"`chosen` {MUST} a list of an object with the keys "
     "role, text."),
    ({**CHAT, "chosen": "Hi."}, "`chosen` and `rejected` must both be text or both be lists of messages, got text and "
     "a list of messages."),
    ({**CHAT, "chosen": [assistant([{"type": "image", "url": "x"}])]}, f"`chosen` {MUST} a list with a message by "
     "'assistant' whose `content` is a list of an object with the keys type, url."),
    ({"chosen": CHAT["chosen"], "rejected": CHAT["rejected"]}, "`chosen` and `rejected` must start with the same "
     "messages, which are the prompt, got different ones. Add a column `prompt`, or map it with `data.columns`."),
    ({**TEXT, "prompt": CHAT["prompt"]}, "`prompt` must be text next to answers that are text, got a list of "
     "messages."),
]  # fmt: skip


@pytest.mark.parametrize(("row", "sentence"), OTHER_SHAPES, ids=[sentence for _, sentence in OTHER_SHAPES])
def test_a_sentence_says_what_was_found_and_what_is_wanted(row, sentence):
    assert wrong_shape(row) == sentence


@pytest.mark.parametrize("row", [TEXT, CHAT, {**CHAT, "prompt": "Hello"}, {"chosen": "a b", "rejected": "a c"}])
def test_nothing_is_said_of_a_row_that_can_be_trained_on(row):
    assert wrong_shape(row) is None


def test_a_split_of_a_shape_that_is_not_known_is_refused_with_what_it_is(streaming):
    rows = [{**TEXT, "chosen": {"text": "you"}, "rejected": {"text": "me"}}] * 24
    found, _ = convert(load(rows, streaming), TOKENIZER)
    with pytest.raises(DataError) as raised:
        audit(found)
    assert f"`chosen` {MUST} an object with the keys text." in str(raised.value)
    assert "max_length" not in str(raised.value)


# The documentation

EXAMPLES = re.findall(r"^```json\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_on_the_page_can_be_trained_on(example, streaming):
    row = json.loads(example)
    rows, changes = convert(load([row], streaming), TOKENIZER)
    section = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8").split(example)[0], re.MULTILINE)[-1]
    assert bool(changes) is (section == "Shapes that are converted")
    pairs = list(audit(rows, audit="error").train)
    assert len(pairs) == (2 if shapes.SEVERAL in changes else 1)
    answer = TOKENIZER.decode(pairs[0]["chosen_ids"])
    assert "lue." in answer or '{"city": "Oslo"}' in answer


def test_the_page_has_every_kind_of_the_audit():
    table = PAGE.read_text(encoding="utf-8").partition("## Row audit")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(AUDIT_KINDS)


# The whole way


def test_calls_and_parts_go_through_both_stages_the_report_and_generation(capfd, monkeypatch):
    config = GPT2Config(vocab_size=len(TOKENIZER), n_positions=512, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained("model")
    TOKENIZER.save_pretrained("model")
    used = [user("Add."), calling(call("f", a=1), content=None), {"role": "tool", "content": "5"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    shown = [
        {"prompt": used, "chosen": [assistant("5")], "rejected": [assistant("6")], "tools": tools},
        {"prompt": used[:1], "chosen": [calling(call("f", a=2))], "rejected": [assistant("7")], "tools": tools},
        {**CHAT, "chosen": [assistant([{"type": "text", "text": "Hi."}])], "tools": None},
    ]
    rows = [{**row, "prompt": [*row["prompt"][:-1], row["prompt"][-1] | {"n": n}]} for n in range(4) for row in shown]
    for number, row in enumerate(rows):
        row["rejected"] = [assistant(f"{row['rejected'][0]['content']} {number}")]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    stage = {
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "max_steps": 2, "eval_steps": 2,
        "save_strategy": "no", "report_to": "none", "per_device_train_batch_size": 4, "max_length": None,
    }  # fmt: skip
    recipe = {
        "output_dir": "run",
        "model": {"model_name_or_path": "model"},
        "data": {"path": "rows.jsonl", "eval_size": 5, "audit": {"duplicate": "keep", "leaked": "keep"}},
        "sft": stage,
        "dpo": {**stage, "shift_lambda": 0.75},
    }
    with open("recipe.yaml", "w", encoding="utf-8") as file:
        YAML(typ="safe").dump(recipe, file)
    assert main(["recipe.yaml"]) == 0
    output = capfd.readouterr().out
    assert f"Rows converted: {shapes.FLATTENED}." in output
    assert "train: 7 of 7 rows kept" in output
    saved = read_rows(Path("run/eval_rows.parquet"))
    assert len(saved) == 5
    assert all(is_conversation(row[name]) for row in saved for name in CHAT)
    assert any(row["chosen"][0].get("tool_calls") == [call("f", a=2)] for row in saved)
    page = Path("run/report/report.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub("<[^>]*>", "", page))
    assert 'Chosen\n<think>\n\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 2}}\n</tool_call>' in text
    asked = []
    monkeypatch.setattr(sampling, "prompt_tokens", lambda *args: asked.append(prompt_tokens(*args)) or asked[-1])
    generate_answers("run", device="cpu")
    with_tools = ["<tools>" in TOKENIZER.decode(ids) for ids in asked]
    assert with_tools == [row["tools"] is not None for row in saved] * 4  # two models, greedy and sampled
    lines = [json.loads(line) for line in Path("run/generations/side_by_side.jsonl").read_text().splitlines()]
    assert {line["chosen"] for line in lines} <= {"5", "Hi.", '{"name": "f", "arguments": {"a": 2}}'}
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in saved]
