"""Rows through chat templates as people have them: what is scored is the answer and its end, as TRL prepares it."""

import dataclasses
import datetime
import json
from functools import cache
from types import SimpleNamespace

import pytest
from chat_templates import TEMPLATES
from datasets import Dataset, Features, Json
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dposhift_trl.columns import REFUSAL, ROW_KINDS, TOKEN_COLUMNS
from dposhift_trl.data.audit import audit_preferences
from dposhift_trl.data.chat_template import check_template, reads_parts
from dposhift_trl.data.config import DataConfig
from dposhift_trl.data.errors import DataError
from dposhift_trl.data.shapes import convert
from dposhift_trl.data.tokenization import PairTokenizer
from dposhift_trl.data.tokens import Truncation
from dposhift_trl.training.sft import select_chosen


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def call(**arguments):
    function = {"name": "add", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
TURNS = [user("Hello"), assistant("Hi."), user("What is 2 + 3?")]
USED = [user("What is 2 + 3?"), call(a=2, b=3), {"role": "tool", "name": "add", "content": "5"}]
PAIR = {"chosen": [assistant("It is five.")], "rejected": [assistant("six?\n\nNo.")]}
CASES = {
    "single turn": {"prompt": TURNS[-1:], **PAIR},
    "several turns": {"prompt": TURNS, **PAIR},
    "a system prompt": {"prompt": [SYSTEM, *TURNS[-1:]], **PAIR},
    "a system prompt and several turns": {"prompt": [SYSTEM, *TURNS], **PAIR},
    "a tool that was called": {"prompt": USED, **PAIR, "tools": TOOLS},
    "a tool to call": {
        "prompt": USED[:1], "chosen": [call(a=2, b=3)], "rejected": [assistant("six")], "tools": json.dumps(TOOLS)
    },
    "a tool called wrongly": {"prompt": USED[:1], "chosen": [call(a=2)], "rejected": [call(a=3)], "tools": TOOLS},
}  # fmt: skip


def implicit(row):
    return {
        name: row["prompt"] + value if name in ("chosen", "rejected") else value
        for name, value in row.items()
        if name != "prompt"
    }


def supported(name, row):
    template = TEMPLATES[name]
    return ("tools" not in row or template.call) and (SYSTEM not in row["prompt"] or template.system)


PAIRS = [(name, case) for name in TEMPLATES for case in CASES if supported(name, CASES[case])]
FORMS = {"explicit": lambda row: row, "implicit": implicit}


def table(rows):
    """The rows exactly as they are: Arrow would add keys that only other rows have."""
    names = {name: None for row in rows for name in row}
    return Dataset.from_list(
        [{name: row.get(name) for name in names} for row in rows], features=Features(dict.fromkeys(names, Json()))
    )


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("templates"))
        yield


def tokens(row, tokenizer):
    """Prompt, chosen and rejected as the audit tokenizes them."""
    columns = PairTokenizer(tokenizer, "train").one(row)
    return tuple(columns[name] for name in TOKEN_COLUMNS)


def prepared_by_trl(rows, tokenizer):
    """What TRL's trainers tokenize: prompt, chosen and rejected in DPO; tokens and labels in SFT."""
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    options = {"output_dir": "out", "bf16": False, "use_cpu": True, "report_to": "none", "max_length": None}
    dpo = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, DPOConfig(**options), "train")
    chosen = select_chosen(rows)
    sft = SFTTrainer._prepare_dataset(trainer, chosen, tokenizer, SFTConfig(**options), False, None, "train")
    return [
        ((row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]), (only["input_ids"], only["labels"]))
        for row, only in zip(dpo, sft, strict=True)
    ]


@cache
def prepared(name, form):
    """Tokens of each case: in DPO and in SFT by TRL, and by us."""
    tokenizer = TEMPLATES[name].tokenizer()
    cases = [case for of, case in PAIRS if of == name]
    rows = table([FORMS[form](CASES[case]) for case in cases])
    trained, changes = convert(rows, tokenizer)
    assert changes == []
    [audited] = audit_preferences(trained, None, DataConfig(path="demo"), tokenizer, [Truncation(999)]).values()
    assert audited.audits["train"].kept == len(cases)
    ours = [tuple(row[column] for column in TOKEN_COLUMNS) for row in audited.train]
    return dict(zip(cases, zip(prepared_by_trl(rows, tokenizer), ours, strict=True), strict=True))


def expected(template, answer):
    message = answer[0]
    if message.get("tool_calls"):
        return template.call.replace("{}", json.dumps(message["tool_calls"][0]["function"]["arguments"]))
    return template.answer.replace("{}", message["content"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "case"), PAIRS, ids=[f"{name}-{case}" for name, case in PAIRS])
def test_what_is_scored_is_the_answer_and_its_end_as_in_trl(name, case, form):
    template, row = TEMPLATES[name], CASES[case]
    tokenizer = template.tokenizer()
    (theirs, (sft_ids, sft_labels)), ours = prepared(name, form)[case]
    assert ours == theirs
    prompt, *answers = ours
    for ids, column in zip(answers, ("chosen", "rejected"), strict=True):
        scored = expected(template, row[column])
        assert tokenizer.decode(ids) == scored
        # A call in gpt-oss and a turn in Gemma have ends of their own
        assert ids.count(tokenizer.eos_token_id) == (0 if scored.endswith(("<|call|>", "<end_of_turn>\n")) else 1)
        assert (prompt + ids).count(tokenizer.bos_token_id) == int(template.bos is not None and template.writes_bos)
    assert sft_ids == prompt + answers[0]
    assert sft_labels == [-100] * len(prompt) + answers[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_what_the_model_is_asked_with(name):
    (prompt, _, _), tokenizer = prepared(name, "explicit")["several turns"][1], TEMPLATES[name].tokenizer()
    asked = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True)["input_ids"]
    # R1-Distill opens a thought that it never writes in front of an answer
    assert tokenizer.decode(asked[len(prompt) :]) == ("<think>\n" if name == "r1-distill" else "")
    assert asked[: len(prompt)] == prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_has_bos_once_at_its_start_and_eos_once_at_its_end(name):
    template, tokenizer = TEMPLATES[name], TEMPLATES[name].tokenizer()
    rows = Dataset.from_list([{"prompt": "Two plus three is", "chosen": " five.", "rejected": f" six.{template.eos}"}])
    [((prompt, chosen, rejected), (sft_ids, sft_labels))] = prepared_by_trl(rows, tokenizer)
    assert tokens(rows[0], tokenizer) == (prompt, chosen, rejected)
    assert tokenizer.decode(prompt) == (template.bos if template.adds_bos else "") + "Two plus three is"
    assert [tokenizer.decode(ids) for ids in (chosen, rejected)] == [f" five.{template.eos}", f" six.{template.eos}"]
    assert (sft_ids, sft_labels) == (prompt + chosen, [-100] * len(prompt) + chosen)


def notes(name, *rows):
    return check_template(table(rows), TEMPLATES[name].tokenizer())


def test_a_template_that_writes_the_rows_as_they_are_gives_no_note():
    assert [name for name in TEMPLATES if notes(name, CASES["single turn"])] == ["llama-3", "mistral"]


def test_an_opening_behind_the_answer_is_noted():
    opening = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert notes("llama-3", CASES["single turn"]) == [
        f"The chat template writes {opening!r} behind the last answer, and the model is trained on it."
    ]


def test_a_conversation_without_bos_is_noted():
    assert notes("mistral", CASES["single turn"]) == [
        "The chat template leaves out '<s>', which the tokenizer adds to text."
    ]


@pytest.mark.parametrize("name", ["llama-3", "qwen-3"])
def test_text_that_begins_with_bos_has_it_twice_if_the_tokenizer_adds_it_as_in_trl(name):
    tokenizer = TEMPLATES[name].tokenizer()
    bos = tokenizer.bos_token or "<|im_start|>"
    row = {"prompt": f"{bos}Hello", "chosen": " you", "rejected": " me"}
    [((prompt, _, _), _)] = prepared_by_trl(Dataset.from_list([row]), tokenizer)
    assert tokenizer.decode(prompt) == (f"{bos}{bos}Hello" if name == "llama-3" else f"{bos}Hello")
    assert tokens(row, tokenizer)[0] == prompt


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not TEMPLATES[name].call])
def test_a_template_that_leaves_out_calls_is_refused_for_rows_with_calls(name):
    for case in ("a tool that was called", "a tool to call"):
        with pytest.raises(
            DataError, match="The chat template must write tool calls, since the rows contain some, got"
        ):
            notes(name, CASES[case])


def test_a_template_that_refuses_what_it_is_asked_is_left_to_the_rows():
    source = (
        "{% for message in messages %}{% if message.tool_calls %}{{ raise_exception('an id, please') }}{% endif %}"
    )
    tokenizer = dataclasses.replace(TEMPLATES["phi-3.5"], source=source + "{% endfor %}").tokenizer()
    assert check_template(table([CASES["a tool to call"]]), tokenizer) == [
        "The chat template leaves out the column `tools`, so the model does not see it."
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_leaves_out_tools_is_noted(name):
    row = {**CASES["several turns"], "tools": TOOLS}
    note = "The chat template leaves out the column `tools`, so the model does not see it."
    assert (note in notes(name, row)) is (TEMPLATES[name].call is None)


def thought(text):
    return [assistant(f"<think>\n{text}\n</think>\n\nIt is five.")]


def test_reasoning_that_a_template_drops_is_noted_and_is_not_trained_on():
    row = {"prompt": TURNS[-1:], "chosen": thought("2 + 3 = 5"), "rejected": thought("2 + 3 = 5, or 6")}
    tokenizer = TEMPLATES["r1-distill"].tokenizer()
    [((_, *answers), _)] = prepared_by_trl(table([row]), tokenizer)
    assert answers == list(tokens(row, tokenizer))[1:]
    assert [tokenizer.decode(ids) for ids in answers] == ["It is five.<|end_of_sentence|>"] * 2
    assert notes("r1-distill", row) == [
        "The chat template leaves out the reasoning (`<think>`) of answers, so it is not trained on."
    ]
    assert notes("phi-3.5", row) == []


def test_keywords_of_the_template_decide_where_the_answer_starts():
    tokenizer = TEMPLATES["qwen-3"].tokenizer()
    row = {**CASES["several turns"], "chat_template_kwargs": {"enable_thinking": False}}
    [((prompt, chosen, rejected), (sft_ids, _))] = prepared_by_trl(table([row]), tokenizer)
    assert tokens(row, tokenizer) == (prompt, chosen, rejected)
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(chosen) == "It is five.<|im_end|>\n"
    assert sft_ids == prompt + chosen


def test_the_date_in_the_prompt_is_today_s():
    prompt = prepared("gpt-oss", "explicit")["single turn"][1][0]
    today = datetime.date.today()
    days = [today.isoformat(), (today - datetime.timedelta(days=1)).isoformat()]  # the test may run at midnight
    assert any(f"Current date: {day}<|end|>" in TEMPLATES["gpt-oss"].tokenizer().decode(prompt) for day in days)


def test_a_role_that_a_template_refuses_is_an_error_with_the_template_s_reason():
    columns = PairTokenizer(TEMPLATES["gemma"].tokenizer(), "train").one(CASES["a system prompt"])
    assert columns[ROW_KINDS] == ["refused"]
    assert columns[REFUSAL] == "roles must alternate user/assistant/user/assistant/..."


def test_content_parts_become_text_unless_the_template_reads_them():
    row = {
        "prompt": [user([{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 3?"}])],
        "chosen": [assistant([{"type": "text", "text": "It is five."}])],
        "rejected": PAIR["rejected"],
    }
    for template in TEMPLATES.values():
        [converted], _ = convert(table([row]), template.tokenizer())
        assert converted == {"prompt": [user("What is 2 + 3?")], **PAIR}
    source = (
        "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}<{{ part.text }}>{% endfor %}{% endif %}{% endfor %}"
    )
    reading = dataclasses.replace(TEMPLATES["phi-3.5"], source=source).tokenizer()
    assert reads_parts(reading)
    rows = table([row])
    assert convert(rows, reading) == (rows, [])
    assert reading.decode(tokens(row, reading)[0]) == "<What is ><2 + 3?>"
