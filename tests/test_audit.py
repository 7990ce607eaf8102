"""The row audit on the tokens that training reads: made once, as TRL makes them, and judged by kind."""

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig

from dposhift_trl import ChosenSFTTrainer, DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.columns import CHOSEN_START, FILE_ROW, FILE_SOURCE, ROW_INDEX, TOKEN_COLUMNS
from dposhift_trl.data import rendering
from dposhift_trl.data.audit import audit_preferences
from dposhift_trl.data.config import DataConfig
from dposhift_trl.data.errors import DataError
from dposhift_trl.data.sources import load_preferences
from dposhift_trl.data.tokenization import PairTokenizer
from dposhift_trl.data.tokens import Truncation
from dposhift_trl.pipeline.loading import findings, load_rows
from dposhift_trl.recipe import load_recipe
from dposhift_trl.run import main


SPECIAL = ["<pad>", "<s>", "</s>", "<think>", "</think>"]
MESSAGE = "{{ '[' + message.role + ']' + (message.content or '') }}"
PLAIN = (
    "{% for message in messages %}"
    + MESSAGE
    + "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEMPLATES = {
    "plain": PLAIN,
    "BOS first": "{{ bos_token }}" + PLAIN,
    "tools": "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}" + PLAIN,
    "no generation prompt": PLAIN.partition("{% if add_generation_prompt")[0],
    "header always": PLAIN.replace("{% if add_generation_prompt %}[assistant]{% endif %}", "[assistant]"),
    "reasoning dropped": "{% for message in messages %}[{{ message.role }}]{{ message.content.split('</think>')[-1] }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}",
    "empty reasoning": PLAIN.replace("%}[assistant]{%", "%}[assistant]<think>\n\n</think>\n\n{%"),
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def chat(prompt="Hi?", chosen="Yes.", rejected="No."):
    return {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def text(prompt="Hi?", chosen=" Yes.", rejected=" No."):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def make_tokenizer(template=PLAIN):
    """Bytes, and special tokens as chat models have them."""
    letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def bytes_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    sizes = {"n_positions": 256, "n_embd": 8, "n_layer": 1, "n_head": 1, "bos_token_id": 1, "eos_token_id": 2}
    tokenizer = make_tokenizer()
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory and a separate cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def audit(rows, tokenizer, max_length=None, mode="keep_start", **settings):
    config = DataConfig(path="demo", **{"min_rows_kept": 0.01, **settings})
    truncation = Truncation(max_length, mode)
    rows = rows if isinstance(rows, (Dataset, datasets.IterableDataset)) else Dataset.from_list(rows)
    return audit_preferences(rows, None, config, tokenizer, [truncation])[truncation]


def counts(audited, split="train"):
    return {kind: finding.count for kind, finding in audited.audits[split].findings.items() if finding.count}


def kinds(row, tokenizer, **settings):
    """The kinds of one row, all of which are kept where that is possible."""
    sound = chat("Sound?") if isinstance(row["chosen"], list) else text("Sound?")
    alone = counts(audit([sound], tokenizer, audit="keep", **settings))
    found = counts(audit([sound, row], tokenizer, audit="keep", **settings))
    return {kind for kind, count in found.items() if count > alone.get(kind, 0)}


# Tokens


ROWS = {
    "text": [text(), text("Hi? ", "A</s>", "B"), text("", "A", "B")],
    "conversations": [
        chat(),
        chat("Why?", "<think>So.</think>Thus.", "Thus?"),
        {
            "prompt": [{"role": "system", "content": "Be brief."}, user("Hi?"), assistant("Hello."), user("Well?")],
            "chosen": [assistant("A"), user("And?"), assistant("B")],
            "rejected": [assistant("C")],
        },
    ],
    "implicit prompts": [
        {"chosen": [user("Hi?"), assistant("A")], "rejected": [user("Hi?"), assistant("B")]},
        {"chosen": [user("So?"), assistant("AA")], "rejected": [user("So?"), assistant("BB")]},
    ],
    "tools": [{**chat(), "tools": json.dumps([{"name": "f"}])}, {**chat("Hm?"), "tools": "[]"}],
    "template arguments": [
        {**chat(), "chat_template_kwargs": {"x": 1}},
        {**chat("B?"), "chat_template_kwargs": {"x": 2}},
    ],
}


def trl_tokens(rows, tokenizer, **settings):
    args = DPOConfig("out", bf16=False, use_cpu=True, report_to="none", **settings)
    prepared = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(rows), tokenizer, args, "train"
    )
    return [{name: row[name] for name in TOKEN_COLUMNS} for row in prepared]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_the_tokens_are_those_that_dpo_trainer_makes(template, rows, streaming):
    tokenizer = make_tokenizer(template)
    given = Dataset.from_list(rows)
    audited = audit(given.to_iterable_dataset() if streaming else given, tokenizer, audit="keep")
    tokens = [{name: row[name] for name in TOKEN_COLUMNS} for row in audited.train]
    assert tokens == trl_tokens(rows, tokenizer, max_length=None)


def test_a_tokenizer_with_its_own_way_from_messages_to_tokens_is_asked_for_tokens():
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation, tokenize=True, **kwargs):
            assert tokenize
            return {"input_ids": [5 + len(message["content"]) for message in conversation]}

    tokenizer = Own(tokenizer_object=make_tokenizer().backend_tokenizer, eos_token="</s>")
    row = next(iter(audit([chat("abc", "de", "f")], tokenizer).train))
    assert [row[name] for name in TOKEN_COLUMNS] == [[8], [7], [6]]


SFT_SETTINGS = [
    {},
    {"max_length": 20},
    {"max_length": None},
    {"max_length": 20, "truncation_mode": "keep_end"},
    {"completion_only_loss": False},
    {"max_length": 60, "packing": True, "padding_free": False},
    {"max_length": 16, "packing": True, "packing_strategy": "wrapped"},
]


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_stage_1_trains_on_the_same_sequences_with_tokens_as_with_text(bytes_model, tmp_path):
    rows = [*ROWS["conversations"], *(chat(f"{n}?", "y" * n, "n") for n in range(1, 9))]
    rows.append({**chat("Whose?"), "rejected": [user("Mine.")]})  # departs from the prompt before the chosen answer
    cases = [("plain", settings) for settings in SFT_SETTINGS] + [("reasoning dropped", {}), ("empty reasoning", {})]
    for template, settings in cases:
        tokenizer = make_tokenizer(TEMPLATES[template])
        tokenized = audit(rows, tokenizer, audit="keep").train
        assert CHOSEN_START in tokenized.column_names
        args = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": "none", **settings}
        sequences = []
        for given in (Dataset.from_list(rows), tokenized):
            options = {"train_dataset": given, "processing_class": tokenizer}
            trained_on = ChosenSFTTrainer(bytes_model, SFTConfig(**args), **options).train_dataset
            sequences.append(list(trained_on.select_columns(["input_ids", "labels"])))
        assert sequences[0] == sequences[1], (template, settings)


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_both_stages_take_the_tokens_and_trl_makes_none(streaming, bytes_model, tokenizer, settings, monkeypatch):
    rows = Dataset.from_list([chat("?" * n, "y" * n, "n" * 20) for n in range(1, 9)])
    rows = rows.to_iterable_dataset() if streaming else rows
    audited = audit(rows, tokenizer, max_length=30, audit={"lost": "keep", "cut": "keep"}).train
    expected = [[row[name] for name in TOKEN_COLUMNS] for row in audited]
    for stage in ("sft", "dpo"):
        monkeypatch.delattr(f"trl.trainer.{stage}_trainer._tokenize")
    options = {"train_dataset": audited, "processing_class": tokenizer}
    sft = ChosenSFTTrainer(bytes_model, SFTConfig(**settings), **options)
    assert [row["input_ids"] for row in sft.train_dataset] == [prompt + chosen for prompt, chosen, _ in expected]
    dpo = DPOShiftTrainer(bytes_model, args=DPOShiftConfig(**settings), **options)
    assert [[row[name] for name in TOKEN_COLUMNS] for row in dpo.train_dataset] == expected
    assert next(iter(dpo.train_dataset))["chosen"] == [assistant("y")]
    # A prompt of n characters has n + 17 tokens, and TRL drops those that fill `max_length`
    short = DPOShiftTrainer(bytes_model, args=DPOShiftConfig(**settings, max_length=22), **options)
    assert [len(row["prompt"][0]["content"]) for row in short.train_dataset] == [1, 2, 3, 4]


def test_stage_1_tokenizes_text_itself_for_a_loss_on_the_assistant_only(bytes_model, settings):
    marked = PLAIN.replace(
        MESSAGE,
        "{% if message.role == 'assistant' %}[assistant]{% generation %}{{ message.content }}{% endgeneration %}"
        "{% else %}" + MESSAGE + "{% endif %}",
    )
    tokenizer = make_tokenizer(marked)
    rows = audit([chat(), chat("B?")], tokenizer).train
    trainer = ChosenSFTTrainer(
        bytes_model, SFTConfig(**settings, assistant_only_loss=True), train_dataset=rows, processing_class=tokenizer
    )
    labels = next(iter(trainer.train_dataset))["labels"]
    assert tokenizer.decode([label for label in labels if label != -100]) == "Yes."


@pytest.fixture
def tokenized(monkeypatch):
    """Number of rows in each call that tokenizes, as they come."""
    sizes, call = [], PairTokenizer.__call__

    def count(self, batch):
        sizes.append(len(batch["prompt"]))
        return call(self, batch)

    monkeypatch.setattr(PairTokenizer, "__call__", count)
    return sizes


def test_rows_are_tokenized_once_for_all_truncations(tokenizer, tokenized):
    rows = Dataset.from_list([chat(f"{n}?", "y" * n) for n in range(1, 9)])
    truncations = [Truncation(None), Truncation(24), Truncation(20, "keep_end")]
    audited = audit_preferences(rows, rows.select([0]), DataConfig(path="demo", audit="keep"), tokenizer, truncations)
    assert tokenized == [1, 8]
    assert [counts(audited[truncation]).get("cut", 0) for truncation in truncations] == [0, 4, 0]


def test_tokens_of_a_file_are_cached_until_tokenizer_template_or_day_change(tokenizer, tokenized, monkeypatch):
    Path("rows.jsonl").write_text("\n".join(json.dumps(chat(f"{n}?")) for n in range(4)))

    def load(tokenizer):
        train, _ = load_preferences(DataConfig(path="rows.jsonl"), 0)
        return [row["chosen_ids"] for row in audit(train, tokenizer).train]

    first = load(tokenizer)
    assert (load(make_tokenizer()), len(tokenized)) == (first, 1)
    assert (load(make_tokenizer(PLAIN + "{# Another. #}")), len(tokenized)) == (first, 2)
    other = make_tokenizer()
    other.eos_token = "</think>"
    assert load(other) != first
    dated = make_tokenizer(PLAIN + "{{ strftime_now('') }}")
    load(dated)
    assert (load(dated), len(tokenized)) == (first, 4)
    tomorrow = SimpleNamespace(date=SimpleNamespace(today=lambda: "tomorrow"))
    monkeypatch.setattr("dposhift_trl.data.tokenization.datetime", tomorrow)
    assert (load(dated), len(tokenized)) == (first, 5)


# Kinds


def test_pairs_that_differ_only_in_reasoning_that_the_template_drops_are_identical():
    rows = [chat("A?", "<think>One.</think>Yes.", "<think>Two.</think>Yes."), chat("B?")]
    audited = audit(rows, make_tokenizer(TEMPLATES["reasoning dropped"]))
    assert [row["prompt"] for row in audited.train] == [[user("B?")]]
    assert counts(audited) == {"identical": 1, "boundary": 1}
    assert counts(audit(rows, make_tokenizer())) == {}


def test_an_answer_of_which_the_template_leaves_only_its_end_is_empty():
    row = chat(chosen="<think>Only this.</think>\n")
    assert kinds(row, make_tokenizer(TEMPLATES["reasoning dropped"])) == {"empty", "boundary"}
    assert kinds(row, make_tokenizer()) == set()


def test_special_tokens_that_the_answer_itself_contains_are_not_empty(tokenizer):
    assert kinds(chat(chosen="<think>"), tokenizer) == set()
    assert kinds(chat(chosen="</s>"), tokenizer) == {"empty", "doubled"}


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_answers_and_rows_that_are_the_same_once_truncated_are_found(mode, tokenizer):
    """At `max_length` 24 four tokens of an answer are left behind the prompt, or eight before its end."""
    ends = ("{}", "yyyyyyyyyyyy") if mode == "keep_end" else ("yyyyyyyyyyyy", "{}")
    first, second = ((ends[0] + ends[1]).format(letter) for letter in "ab")
    rows = [chat("A?", first, second), chat("B?", first, "n" * 30), chat("B?", second, "n" * 30), chat("C?")]
    settings = {"max_length": 24 if mode == "keep_start" else 12, "mode": mode}
    assert kinds(rows[0], tokenizer, **settings) == {"cut", "identical"}
    audited = audit(rows, tokenizer, audit={"cut": "keep"}, **settings)
    assert counts(audited) == {"identical": 1, "duplicate": 1, "cut": 1}
    assert counts(audit(rows, tokenizer)) == {}
    assert counts(audit(rows, tokenizer, **settings)) == {"cut": 3}


SYSTEM, RESULT = {"role": "system", "content": "S"}, {"role": "tool", "content": "T"}
MULTI = [user("A?"), assistant("B.")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(chat(), set(), id="a question"),
        pytest.param({**chat(), "prompt": [*MULTI, user("C?")]}, set(), id="several turns"),
        pytest.param({**chat(), "prompt": [SYSTEM, user("C?")]}, set(), id="instructions"),
        pytest.param(
            {**chat(), "prompt": [user("C?"), assistant(""), RESULT, RESULT]},
            set(),
            id="results of tools",
        ),
        pytest.param({**chat(), "prompt": [{"role": "human", "content": "C?"}]}, {"roles"}, id="another name"),
        pytest.param({**chat(), "prompt": [user("A?"), user("B?")]}, {"roles"}, id="two questions"),
        pytest.param({**chat(), "prompt": MULTI}, {"roles"}, id="an answer continued"),
        pytest.param({**chat(), "prompt": [assistant("Hello."), user("B?")]}, {"roles"}, id="assistant first"),
        pytest.param({**chat(), "prompt": [user("B?"), SYSTEM]}, {"roles"}, id="system late"),
        pytest.param({**chat(), "chosen": [*MULTI[1:], user("B?"), assistant("C.")]}, {"roles"}, id="a dialog"),
        pytest.param({**chat(), "chosen": [assistant("A."), user("B?")]}, {"user", "roles"}, id="the user last"),
        pytest.param({**chat(), "rejected": [user("B?")]}, {"prompts", "user", "roles", "boundary"}, id="by the user"),
        pytest.param(
            {"chosen": [*MULTI, user("C?"), assistant("D.")], "rejected": [*MULTI, user("E?"), assistant("F.")]},
            {"prompts", "roles", "boundary"},
            id="other last questions",
        ),
        pytest.param(
            {"chosen": [*MULTI, user("C?"), assistant("D.")], "rejected": MULTI}, {"roles"}, id="one dialog goes on"
        ),
        pytest.param(
            {"chosen": [user("C?"), assistant("D.")], "rejected": [user("E?"), assistant("F.")]},
            {"missing"},
            id="other first questions, which cannot be kept",
        ),
    ],
)  # fmt: skip
def test_roles_are_judged_by_what_they_do_to_the_pair(row, expected, tokenizer):
    if "prompt" not in row:
        sound = {"chosen": [user("S?"), assistant("A")], "rejected": [user("S?"), assistant("B")]}
        audited = audit([sound, row], tokenizer, audit="keep")
        assert set(counts(audited)) == expected
    else:
        assert kinds(row, tokenizer) == expected


def test_other_first_questions_are_called_that_unless_they_are_to_be_kept(tokenizer):
    row = {"chosen": [user("C?"), assistant("D.")], "rejected": [user("E?"), assistant("F.")]}
    sound = {"chosen": [user("S?"), assistant("A")], "rejected": [user("S?"), assistant("B")]}
    assert counts(audit([sound, row], tokenizer)) == {"prompts": 1}


def test_rows_of_usable_kinds_are_kept_and_counted_unless_named(tokenizer):
    rows = [chat(), {**chat("B?"), "prompt": [user("A?"), user("B?")]}]
    for policy in ("drop", "keep", "error", {}):
        audited = audit(rows, tokenizer, audit=policy)
        audited.check()
        assert (len(audited.train), counts(audited)) == (2, {"roles": 1})
    assert len(audit(rows, tokenizer, audit={"roles": "drop"}).train) == 1
    with pytest.raises(DataError, match="1 of 2 train rows are `roles`"):
        audit(rows, tokenizer, audit={"roles": "error"}).check()


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        pytest.param("plain", chat(), set(), id="sound"),
        pytest.param("BOS first", chat(), set(), id="BOS once"),
        pytest.param("reasoning dropped", chat(), {"boundary"}, id="the prompt alone opens reasoning"),
        pytest.param("empty reasoning", chat(), {"boundary"}, id="the prompt alone has empty reasoning"),
        pytest.param("BOS first", text("<s><s>Hi?"), {"doubled"}, id="two BOS"),
        pytest.param("plain", chat(chosen="Yes.</s>"), {"doubled"}, id="two EOS"),
        pytest.param("plain", text("Hi?", " Yes.</s>"), set(), id="EOS in the text"),
        pytest.param("plain", text("Hi?", " Yes.</s></s>"), {"doubled"}, id="two EOS in the text"),
        pytest.param("plain", chat(chosen="<think>\n\n</think>\n\nYes."), {"thinking"}, id="empty reasoning in one"),
        pytest.param(
            "plain",
            chat(chosen="<think>\n</think>Yes.", rejected="<think>\n\n</think>No."),
            set(),
            id="empty reasoning in both",
        ),
        pytest.param("plain", chat(chosen="<think>So.</think>Yes."), set(), id="reasoning in one"),
    ],
)
def test_what_surrounds_an_answer_is_judged_on_tokens(template, row, expected):
    tokenizer = make_tokenizer(TEMPLATES[template])
    assert set(counts(audit([row], tokenizer, audit="keep"))) == expected


# Refusals


PICKY = "{% if messages[0].content == 'No!' %}{{ raise_exception('I do not answer that.') }}{% endif %}" + PLAIN


def test_a_row_that_the_template_refuses_is_dropped_with_its_number_and_the_reason():
    tokenizer = make_tokenizer(PICKY)
    rows = [chat("A?"), chat("No!"), chat("B?")]
    audited = audit(rows, tokenizer, audit="keep")
    assert [row["prompt"][0]["content"] for row in audited.train] == ["A?", "B?"]
    finding = audited.audits["train"].findings["refused"]
    assert (finding.policy, finding.count) == ("drop", 1)
    assert finding.examples[0]["row"] == 1
    assert finding.examples[0]["reason"] == "I do not answer that."
    with pytest.raises(
        DataError,
        match=r"^1 of 3 train rows are `refused`: .* \(first in row 1 of demo: I do not answer that\.\)\. Fix",
    ):
        audit(rows, tokenizer, audit={"refused": "error"}).check()
    assert [row["prompt"] for row in audit(Dataset.from_list(rows).to_iterable_dataset(), tokenizer).train] == [
        [user("A?")],
        [user("B?")],
    ]


def test_examples_name_the_row_of_the_file_and_its_id(tokenizer):
    rows = [{**chat(f"{n}?", rejected="Yes." if n in (3, 11, 17) else "No."), "id": f"row-{n}"} for n in range(20)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(path="rows.jsonl", eval_size=0.5)
    train, evaluation = load_preferences(config, seed=1)
    truncation = Truncation(None)
    audited = audit_preferences(train, evaluation, config, tokenizer, [truncation])[truncation]
    examples = [e for split in audited.audits.values() for e in split.findings["identical"].examples]
    assert sorted((example["row"], example["id"]) for example in examples) == [
        (3, "row-3"),
        (11, "row-11"),
        (17, "row-17"),
    ]
    for rows_left in (audited.train, audited.evaluation):
        assert sorted(rows_left.column_names) == sorted(
            ["prompt", "chosen", "rejected", "id", ROW_INDEX, FILE_ROW, FILE_SOURCE, *TOKEN_COLUMNS, CHOSEN_START]
        )
        assert [f"row-{index}" for index in rows_left[ROW_INDEX]] == rows_left["id"][:]


def test_examples_of_a_mixture_name_the_source(tokenizer):
    for name in "ab":
        rows = [
            {**chat(f"{name}{n}?", rejected="Yes." if n == 5 else "No."), "id": n if name == "a" else "x"}
            for n in range(9)
        ]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(mixture=[{"path": "a.jsonl"}, {"path": "b.jsonl"}], audit={"identical": "error"})
    train, _ = load_preferences(config, seed=0)
    truncation = Truncation(None)
    audited = audit_preferences(train, None, config, tokenizer, [truncation])[truncation]
    examples = audited.audits["train"].findings["identical"].examples
    assert {(example["source"], example["row"]) for example in examples} <= {("a.jsonl", 5), ("b.jsonl", 5)}
    with pytest.raises(DataError, match=r"\(first in row 5 of [ab].jsonl, id [5x]\)"):
        audited.check()


def test_a_larger_max_length_is_proposed_only_where_it_would_help(tokenizer):
    rows = [chat(f"{n}?", "y" * 10 * n, "n") for n in range(10, 30)]
    audited = audit(rows, tokenizer, max_length=150, min_rows_kept=0.5)
    with pytest.raises(DataError) as raised:
        audited.check()
    assert str(raised.value) == (
        "The row audit leaves 3 of 20 train rows, less than `data.min_rows_kept` (0.5): 3 of 20 rows kept: 17 cut "
        "(drop). `max_length` 150 drops 85% of the rows; 320 would keep 100% of all. Raise `max_length`, or lower "
        "`data.min_rows_kept`."
    )
    kept = audit(rows, tokenizer, max_length=320, min_rows_kept=0.5)
    kept.check()
    assert len(kept.train) == 20
    same = [chat(f"{n}?", "y" * 10 * n, "y" * 10 * n) for n in range(10, 30)]
    with pytest.raises(DataError, match=r"20 identical \(drop\)\. Fix the data, or lower"):
        audit(same, tokenizer, max_length=150).check()


def recipe(model, folder, **sections):
    Path("rows.jsonl").write_text("\n".join(json.dumps(chat(f"{n}?", rejected="Yes.")) for n in range(4)))
    stage = {"max_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none", "gradient_checkpointing": False}
    values = {
        "output_dir": str(folder),
        "report": False,
        "model": {"model_name_or_path": model},
        "data": {"path": "rows.jsonl", **sections.pop("data", {})},
        "sft": {**stage, **sections.pop("sft", {})},
        "dpo": {**stage, **sections.pop("dpo", {})},
    }
    YAML(typ="safe").dump(values, Path("recipe.yaml"))
    return "recipe.yaml"


@pytest.mark.parametrize("policy", ["drop", "error"])
def test_audit_json_says_what_was_found_where_the_run_is_refused(policy, bytes_model, tmp_path, capsys):
    path = recipe(bytes_model, tmp_path / "run", data={"audit": policy}, sft={"max_length": 40})
    assert main([path]) == 2
    found = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert list(found) == ["train", "sft train"]
    assert found["train"]["findings"]["identical"]["count"] == 4
    assert found["train"]["findings"]["identical"]["examples"][0]["row"] == 0
    assert found["train"]["refusal"] in capsys.readouterr().err
    assert not (tmp_path / "run" / "eval_rows.parquet").exists()


def test_a_dry_run_shows_what_was_found_and_what_it_means(bytes_model, tmp_path, capsys):
    path = recipe(bytes_model, tmp_path / "run", data={"audit": {"identical": "keep"}})
    assert main([path, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "train: 4 of 4 rows kept: 4 identical (keep)" in out
    text = (
        "identical: chosen and rejected are the same to the model. Rows, counted from 0: identical train 0, 1, 2, ..."
    )
    assert f"{text}\n" in out
    assert main([path, "--dry-run", "data.audit=drop"]) == 2
    assert "train: 0 of 4 rows kept: 4 identical (drop)" in capsys.readouterr().out


def test_rows_are_judged_by_the_template_and_eos_token_that_stage_1_sets(bytes_model, tmp_path, tokenizer):
    Path("drop.jinja").write_text(TEMPLATES["reasoning dropped"])
    rows = [chat(f"{n}?", f"<think>{n}</think>Yes.", "Yes.") for n in range(3)] + [chat("Z?")]
    path = recipe(bytes_model, tmp_path / "run", sft={"chat_template_path": "drop.jinja", "eos_token": "</think>"})
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load_rows(load_recipe(path), tokenizer)
    assert findings(loaded)["train"].findings["identical"].count == 3
    assert next(iter(loaded["dpo"].train))["chosen_ids"][-1] == SPECIAL.index("</think>")
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.chat_template == PLAIN


def test_stage_2_saves_the_template_that_stage_1_has_set_in_a_later_run_too(bytes_model, tmp_path):
    Path("drop.jinja").write_text(TEMPLATES["reasoning dropped"])
    path, run = recipe(bytes_model, tmp_path / "run", sft={"chat_template_path": "drop.jinja"}), tmp_path / "run"
    Path("rows.jsonl").write_text("\n".join(json.dumps(chat(f"{n}?")) for n in range(4)))
    for again in (False, True):
        assert main([path]) == 0
        saved = AutoTokenizer.from_pretrained(run / "dpo")
        assert saved.chat_template == TEMPLATES["reasoning dropped"], again
        shutil.rmtree(run / "dpo")


def test_the_template_of_another_tokenizer_comes_with_its_tokens(bytes_model, tmp_path, tokenizer):
    other = make_tokenizer(PLAIN.replace("[assistant]", "<|say|>"))
    other.add_tokens(["<|say|>"])
    other.save_pretrained("other")
    path = recipe(bytes_model, tmp_path / "run", sft={"chat_template_path": "other"})
    Path("rows.jsonl").write_text(json.dumps(chat()))
    row = next(iter(load_rows(load_recipe(path), tokenizer)["sft"].train))
    assert row["prompt_ids"][-1] != len(tokenizer)  # the answers have no such header
    assert "<|say|>" not in tokenizer.get_vocab()


# Bounds


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_a_template_that_writes_without_end_is_stopped_at_its_row(streaming, monkeypatch):
    monkeypatch.setattr(rendering, "MAX_OWN_CHARACTERS", 1000)
    tokenizer = make_tokenizer("{% if 'now' in messages[0].content %}{{ 'x' * 2000 }}{% endif %}" + PLAIN)
    rows = Dataset.from_list([chat("A?"), chat("B?"), chat("now")])
    with pytest.raises(DataError) as raised:
        list(audit(rows.to_iterable_dataset() if streaming else rows, tokenizer).train)
    assert "got one that renders 2020 characters from 86 for row 2 of the train split" in str(raised.value)


def test_a_template_may_write_more_where_the_row_contains_more(monkeypatch):
    monkeypatch.setattr(rendering, "MAX_OWN_CHARACTERS", 100)
    assert len(audit([chat("x" * 5000)], make_tokenizer(PLAIN + PLAIN)).train) == 1


ENDLESS = {
    "seconds": ("MAX_SECONDS", 0.2, "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"),
    "GiB": ("MAX_MEMORY", 2**27, "{% for i in range(99999) %}{{ 'x' * 1000000 ~ i }}{% endfor %}"),
}


@pytest.mark.parametrize(("limit", "value", "template"), ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_is_stopped(limit, value, template, monkeypatch):
    monkeypatch.setattr(rendering, limit, value)
    before = signal.getsignal(signal.SIGPROF)
    with pytest.raises(DataError, match=r"got one that takes more than .* for row 0 of the train split"):
        audit([chat()], make_tokenizer(template))
    assert signal.getsignal(signal.SIGPROF) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_text_needs_an_eos_token(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(
        DataError, match=r"must have an EOS token to end answers that are text, got none\. Set `sft.eos"
    ):
        audit([text()], tokenizer)
