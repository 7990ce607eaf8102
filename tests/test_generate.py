"""Answers of a run's models: independent of the batch, seeded, and in the formats of the judges."""

import dataclasses
import doctest
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_rows, make_tokenizer, save_tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.data.chat_template import PLAIN_CHAT_TEMPLATE
from dposhift_trl.generate import (
    GenerateError,
    GenerationSettings,
    answer_statistics,
    generate_answers,
    statistics,
)
from dposhift_trl.generate.__main__ import main
from dposhift_trl.generate.output import describe_settings
from dposhift_trl.generate.questions import Question, load_questions, prompt_tokens
from dposhift_trl.generate.sampling import SeededSampling, answer_questions
from dposhift_trl.recipe import dump_yaml


ROOT = Path(__file__).parent.parent
SHORT = ["--max-new-tokens", "6", "--limit", "5", "--device", "cpu"]
TALK = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
]


def save_model(folder: Path, seed: int, template: str | None = None) -> None:
    """A model with a wide initialization, so that some of its answers end before the limit."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_run(folder: Path, stages=("sft", "dpo"), template: str | None = None, rows=None) -> Path:
    """A run folder as the command writes it, with models that were never trained."""
    recipe = {
        "output_dir": str(folder), "seed": 1, "run_name": "trial",
        "model": {"model_name_or_path": "demo"}, "data": {"path": "demo"}, **{stage: {} for stage in stages},
    }  # fmt: skip
    for seed, name in enumerate(("base", *stages)):
        save_model(folder / name, seed, template)
        if name in stages:
            (folder / name / "finished.json").write_text("{}")
    (folder / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    if rows is None:
        rows = [{**row, "row_index": 10 + index} for index, row in enumerate(make_rows(7))]
    pq.write_table(pa.Table.from_pylist(rows), folder / "eval_rows.parquet")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def refuse(capfd):
    """Run the command with invalid input and return the error."""

    def call(*arguments):
        capfd.readouterr()
        assert main([*map(str, arguments)]) == 2
        error = capfd.readouterr().err.strip()
        assert error
        assert "Traceback" not in error
        return error.splitlines()[-1]

    return call


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def ragged_questions(count: int = 9) -> list[Question]:
    return [
        Question(index, row["prompt"], row["prompt"] + " w5" * (7 * index))
        for index, row in enumerate(make_rows(count))
    ]


def test_statistics_agree_with_a_calculation_by_hand():
    # 4-grams: 1 of 3 distinct in 7 7 7 7 7 7; both of 2 distinct in 1 2 3 4 5; none in 1 2 and in the empty answer.
    # Tokens: 6 + 5 + 2 + 0 = 13, of which 1, 2, 3, 4, 5, 7 distinct; bigrams: 5 + 4 + 1 = 10, of which 77 12 23 34 45
    found = answer_statistics(
        [[7] * 6, [1, 2, 3, 4, 5], [1, 2], []], ["so", "it", " \n", ""], [True, False, False, False]
    )
    assert found == {
        "count": 4,
        "mean_tokens": 13 / 4,
        "median_tokens": 3.5,
        "empty": 0.5,
        "cut": 0.25,
        "repetition": pytest.approx((2 / 3 + 0) / 2),
        "distinct_1": 6 / 13,
        "distinct_2": 0.5,
    }


def test_the_examples_of_the_statistics_are_right():
    assert doctest.testmod(statistics) == (0, 2)


def test_statistics_of_nothing_are_null_and_an_answer_without_text_is_empty_by_its_tokens():
    nothing = answer_statistics([])
    assert nothing.pop("count") == 0
    assert set(nothing.values()) == {None}
    assert answer_statistics([[], [1]])["empty"] == 0.5
    assert answer_statistics([[], [1]])["repetition"] is None


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_a_batch_gives_the_same_answers_as_its_questions_one_by_one(made, mode):
    model, tokenizer = load(made / "dpo")
    questions = ragged_questions()
    lengths = [len(prompt_tokens(tokenizer, question.prompt)) for question in questions]
    assert max(lengths) < 64 < max(lengths) + 20  # the longest has less room than the others
    settings = [GenerationSettings(max_new_tokens=20, batch_size=size) for size in (1, 4, 16)]
    single, *batched = (answer_questions(model, tokenizer, questions, each, mode) for each in settings)
    assert batched == [single, single]
    alone = answer_questions(model, tokenizer, questions[5:6], settings[1], mode)
    assert alone == single[5:6]
    given = [turns[0] for turns in single]
    assert any(answer.cut for answer in given)
    assert any(not answer.cut for answer in given)
    assert len(given[-1].tokens) <= 64 - lengths[-1]


def test_greedy_answers_are_the_argmax_of_plain_forwards(made):
    model, tokenizer = load(made / "dpo")
    questions = ragged_questions(3)
    settings = GenerationSettings(max_new_tokens=8)
    for question, (answer,) in zip(
        questions, answer_questions(model, tokenizer, questions, settings, "greedy"), strict=True
    ):
        tokens = prompt_tokens(tokenizer, question.prompt)
        expected = []
        with torch.no_grad():
            while len(expected) < 8:
                expected.append(model(torch.tensor([tokens + expected])).logits[0, -1].argmax().item())
                if expected[-1] == tokenizer.eos_token_id:
                    break
        cut = expected[-1] != tokenizer.eos_token_id
        assert answer.tokens == tuple(expected if cut else expected[:-1])
        assert answer.cut == cut


def test_the_generation_settings_of_a_model_are_ignored_and_kept(made):
    model, tokenizer = load(made / "dpo")
    questions, settings = ragged_questions(4), GenerationSettings(max_new_tokens=8)
    plain = answer_questions(model, tokenizer, questions, settings, "greedy")
    own = model.generation_config
    own.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, max_length=12, min_new_tokens=8)
    assert answer_questions(model, tokenizer, questions, settings, "greedy") == plain
    assert model.generation_config is own


def test_sampling_draws_from_the_softmax_and_each_seed_has_its_own_stream():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    seeds = [str(index) for index in range(4000)]
    draws = SeededSampling(seeds)(None, logits.expand(4000, 4)).argmax(dim=1)
    shares = torch.bincount(draws, minlength=4) / 4000
    # Four standard errors of a share over 4000 draws are at most 0.032
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.032, rtol=0)
    assert torch.equal(draws[:7], SeededSampling(seeds[:7])(None, logits.expand(7, 4)).argmax(dim=1))


def test_a_small_top_p_or_temperature_gives_the_greedy_answers(made):
    model, tokenizer = load(made / "dpo")
    questions = ragged_questions(4)
    settings = {
        "greedy": GenerationSettings(max_new_tokens=6, temperature=5.0),
        "cold": GenerationSettings(max_new_tokens=6, temperature=1e-4),
        "narrow": GenerationSettings(max_new_tokens=6, temperature=5.0, top_p=1e-4),
        "hot": GenerationSettings(max_new_tokens=6, temperature=5.0),
    }
    answers = {
        name: answer_questions(model, tokenizer, questions, each, "greedy" if name == "greedy" else "sampled")
        for name, each in settings.items()
    }
    assert answers["cold"] == answers["narrow"] == answers["greedy"] != answers["hot"]


@pytest.mark.parametrize("form", ["text", "text after a special token", "conversations"])
def test_prompts_are_tokenized_as_the_trainer_does(tmp_path, settings, form):
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = make_rows(4)
    if form == "text after a special token":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<pad> $A", special_tokens=[("<pad>", 1)]
        )
    if form == "conversations":
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        rows = rows.map(
            lambda row: {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")},
            }
        )
    trainer = DPOShiftTrainer(folder, args=DPOShiftConfig(**settings), train_dataset=rows, processing_class=tokenizer)
    expected = list(trainer.train_dataset["prompt_ids"])
    assert [prompt_tokens(tokenizer, row["prompt"]) for row in rows] == expected
    assert {ids[0] for ids in expected} == {1} or form != "text after a special token"


def test_the_command_writes_both_models_answers_in_every_format(run, capfd):
    assert main([str(run), *SHORT]) == 0
    assert "repetition" in capfd.readouterr().out
    folder = run / "generations"
    report = json.loads((folder / "statistics.json").read_text())
    assert (report["models"], report["questions"]) == (["sft", "dpo"], 5)
    assert report["left_out"] == {"empty": 0, "too_long": 0}
    assert report["settings"]["prompts"] is None
    rows = pq.read_table(run / "eval_rows.parquet").to_pylist()[:5]
    beside = read_lines(folder / "side_by_side.jsonl")
    assert [line["prompt"] for line in beside] == [row["prompt"] for row in rows]
    assert [line["question_id"] for line in beside] == [row["row_index"] for row in rows] == [10, 11, 12, 13, 14]
    assert [line["chosen"] for line in beside] == [row["chosen"] for row in rows]
    assert report["chosen"]["mean_tokens"] == sum(len(row["chosen"].split()) - 1 for row in rows) / 5
    for name in ("sft", "dpo"):
        for mode in ("greedy", "sampled"):
            stem = f"{name}-{mode}"
            texts = [line["answers"][name][mode] for line in beside]
            alpaca = json.loads((folder / f"{stem}.alpaca_eval.json").read_text())
            assert alpaca == read_lines(folder / f"{stem}.jsonl")
            assert alpaca == [
                {"instruction": row["prompt"], "output": text, "generator": f"trial-{stem}"}
                for row, (text,) in zip(rows, texts, strict=True)
            ]
            judged = read_lines(folder / f"{stem}.mt_bench.jsonl")
            assert [line["choices"] for line in judged] == [[{"index": 0, "turns": turns}] for turns in texts]
            assert {line["model_id"] for line in judged} == {f"trial-{stem}"}
            assert {*judged[0]} == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
            assert len({line["answer_id"] for line in judged}) == 5
            lengths = [len(text.split()) for (text,) in texts]
            found = report["statistics"][name][mode]
            assert found["count"] == 5
            assert found["empty"] == lengths.count(0) / 5
    assert not list(folder.glob("*.tmp"))
    assert any(line["answers"]["sft"] != line["answers"]["dpo"] for line in beside)


def test_the_same_call_again_writes_the_same_bytes_at_any_batch_size_and_another_seed_other_samples(run, refuse):
    assert main([str(run), *SHORT]) == 0
    first = digests(run / "generations")
    assert main([str(run), *SHORT, "--batch-size", "2"]) == 0
    assert digests(run / "generations") == first
    error = refuse(run, *SHORT, "--seed", 7, "--top-p", 0.9)
    assert "answers with other settings: seed, top_p." in error
    assert digests(run / "generations") == first
    assert main([str(run), *SHORT, "--seed", "7", "--overwrite"]) == 0
    second = digests(run / "generations")
    assert {name for name in first if first[name] == second[name]} == {
        f"{name}-greedy{end}" for name in ("sft", "dpo") for end in (".jsonl", ".alpaca_eval.json", ".mt_bench.jsonl")
    }


def test_a_folder_with_other_files_is_refused_without_overwrite(run, tmp_path, refuse):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    assert "contains other files (thesis.txt)" in refuse(run, *SHORT, "--output", folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert main([str(run), *SHORT, "--output", str(folder), "--overwrite"]) == 0
    assert (folder / "thesis.txt").read_text() == "mine"
    assert (folder / "statistics.json").is_file()
    assert "cannot be written" in refuse(run, *SHORT, "--output", folder / "thesis.txt")


@pytest.mark.parametrize(
    ("stages", "models"), [(("dpo",), ["base", "dpo"]), (("sft",), ["base", "sft"])], ids=["no sft", "no dpo"]
)
def test_the_base_model_replaces_a_missing_stage(tmp_path, stages, models):
    report = generate_answers(
        save_run(tmp_path / "run", stages), settings=GenerationSettings(limit=2, max_new_tokens=3), device="cpu"
    )
    assert report["models"] == models == list(report["statistics"])


def test_an_existing_report_is_updated_with_the_answers_unless_told_not_to(run, tmp_path, capfd):
    page = run / "report" / "report.html"
    assert main([str(run), *SHORT]) == 0
    assert not page.exists()
    page.parent.mkdir()
    page.write_text("mine")
    assert main([str(run), *SHORT]) == 0
    assert "The report was not updated" in capfd.readouterr().err
    assert page.read_text() == "mine"
    page.write_text('<meta name="generator" content="dposhift_trl">')
    assert main([str(run), *SHORT, "--no-report"]) == main([str(run), *SHORT, "--output", str(tmp_path / "o")]) == 0
    assert "Greedy answers that differ most" not in page.read_text(encoding="utf-8")
    assert main([str(run), *SHORT]) == 0
    assert capfd.readouterr().out.strip().endswith(f"The report is {page}")
    assert "Greedy answers that differ most" in page.read_text(encoding="utf-8")


def test_an_adapter_answers_as_the_model_it_is_merged_into(run):
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(run / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    shutil.rmtree(run / "dpo")
    adapted.save_pretrained(run / "dpo")
    make_tokenizer().save_pretrained(run / "dpo")
    (run / "dpo" / "finished.json").write_text("{}")
    generate_answers(run, settings=GenerationSettings(limit=4, max_new_tokens=5), device="cpu")
    questions = load_questions(run, None, 4, make_tokenizer())
    merged = answer_questions(
        adapted.merge_and_unload().eval(), make_tokenizer(), questions, GenerationSettings(max_new_tokens=5), "greedy"
    )
    beside = read_lines(run / "generations" / "side_by_side.jsonl")
    assert [line["answers"]["dpo"]["greedy"] for line in beside] == [[turns[0].text] for turns in merged]


def test_a_run_trained_on_conversations_renders_every_prompt_with_its_template(tmp_path):
    rows = [
        {
            "prompt": TALK, "chosen": [{"role": "assistant", "content": "w5"}],
            "rejected": [{"role": "assistant", "content": "w6"}], "row_index": 3,
        }
    ]  # fmt: skip
    folder = save_run(tmp_path / "run", template=PLAIN_CHAT_TEMPLATE, rows=rows)
    tokenizer = AutoTokenizer.from_pretrained(folder / "dpo")
    (row,) = load_questions(folder, None, 4, tokenizer)
    assert (row.prompt, row.chosen, row.instruction) == (TALK, "w5", "User: w1 w2\nAssistant: w3\nUser: w4")
    expected = tokenizer("User: w1 w2\nAssistant: w3<eos>\nUser: w4\nAssistant:")["input_ids"]
    assert prompt_tokens(tokenizer, row.prompt) == expected
    (tmp_path / "p.txt").write_text("w7\n\nw8 ü\n", encoding="utf-8")
    assert [question.prompt for question in load_questions(folder, tmp_path / "p.txt", 4, tokenizer)] == [
        [{"role": "user", "content": "w7"}],
        [{"role": "user", "content": "w8 ü"}],
    ]


def test_every_format_of_prompt_files_is_read(run, tmp_path):
    tokenizer = make_tokenizer()
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "w1"},
        {"instruction": "w2", "output": "theirs", "dataset": "helpful_base"},
        {"question_id": 81, "category": "writing", "turns": ["w3"]},
        {"question_id": 82, "category": "writing", "turns": ["w4", "w5"]},
        {"prompt": TALK},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    questions = load_questions(run, path, 64, tokenizer)
    assert [question.prompt for question in questions] == ["w1", "w2", "w3", [{"role": "user", "content": "w4"}], TALK]
    assert [question.question_id for question in questions] == [0, 1, 81, 82, 4]
    assert questions[3].follow_ups == ("w5",)
    assert questions[3].instruction == "w4"
    listed = tmp_path / "alpaca_eval.json"
    listed.write_text(json.dumps(lines))
    assert load_questions(run, listed, 64, tokenizer) == questions
    assert load_questions(run, listed, 2, tokenizer) == questions[:2]


def test_later_turns_follow_the_models_own_answers(tmp_path):
    folder = save_run(tmp_path / "run", template=PLAIN_CHAT_TEMPLATE)
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps({"question_id": 81, "category": "writing", "turns": ["w1", "w2", "w3 " * 90]}) + "\n")
    settings = GenerationSettings(max_new_tokens=5)
    report = generate_answers(folder, path, settings, device="cpu")
    (line,) = read_lines(folder / "generations" / "side_by_side.jsonl")
    assert (line["question_id"], line["category"]) == (81, "writing")
    model, tokenizer = load(folder / "dpo")
    first, second, third = line["answers"]["dpo"]["greedy"]
    talk = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "w2"},
    ]
    ((expected,),) = answer_questions(model, tokenizer, [Question(81, "", talk)], settings, "greedy")
    assert second == expected.text
    # The third turn fills the positions, so it is neither asked nor counted
    assert third == ""
    assert report["statistics"]["dpo"]["greedy"]["count"] == 2
    (judged,) = read_lines(folder / "generations" / "dpo-greedy.mt_bench.jsonl")
    assert judged["choices"][0]["turns"] == [first, second, ""]


def test_prompts_without_tokens_or_room_are_left_out_and_counted(run, tmp_path, refuse):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in ("w1", "", "w2 " * 64, "w3 " * 63)))
    report = generate_answers(run, path, GenerationSettings(max_new_tokens=4), device="cpu")
    assert report["questions"] == 2
    assert report["left_out"] == {"empty": 1, "too_long": 1}
    assert [line["question_id"] for line in read_lines(run / "generations" / "side_by_side.jsonl")] == [0, 3]
    path.write_text(json.dumps({"prompt": ""}))
    assert "No prompt left" in refuse(run, "--prompts", path, "--output", tmp_path / "other")


def test_text_is_written_as_utf_8_and_not_escaped(run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("w1 größer 你好 \N{LINE SEPARATOR}w2\n", encoding="utf-8")
    generate_answers(run, path, GenerationSettings(max_new_tokens=2), device="cpu")
    written = (run / "generations" / "side_by_side.jsonl").read_text(encoding="utf-8")
    assert "w1 größer 你好 \N{LINE SEPARATOR}w2" in written


def test_a_folder_without_a_finished_run_is_refused_in_one_line(run, tmp_path, refuse):
    assert "which does not exist" in refuse(tmp_path / "nowhere")
    assert "contains no recipe.yaml" in refuse(tmp_path)
    (run / "dpo" / "finished.json").unlink()
    assert "stage `dpo` is not finished" in refuse(run)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[1, 2", "is not valid YAML"),
        (b"- 1", "must contain a mapping, got list"),
        (b"", "is empty"),
        (b" \n# comment\n", "must contain a mapping, got NoneType"),
        (b"\0\1", "is not valid YAML"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (None, "must be a file, got a directory"),
        (b"seed: 1", "has no `model`"),
        (b"model: 3\nrun_name: x", "has no valid section `model`"),
        (b"model: {model_name_or_path: x, other: 1}\nrun_name: x", "has no valid section `model`"),
    ],
)
def test_a_broken_recipe_of_a_run_is_refused_in_one_line(run, refuse, content, says):
    path = run / "recipe.yaml"
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    assert refuse(run).startswith(f"{path} {says}")


def test_evaluation_rows_without_answers_are_refused_in_one_line(run, refuse):
    pq.write_table(pa.table({"prompt": ["w1"]}), run / "eval_rows.parquet")
    assert "must have the columns `chosen` and `rejected`, got prompt." in refuse(run, *SHORT)


def test_a_run_folder_with_broken_parts_is_refused_in_one_line(run, refuse):
    weights = (run / "sft" / "model.safetensors").read_bytes()
    (run / "sft" / "model.safetensors").write_bytes(weights[:100])
    assert "The model `sft`" in refuse(run, *SHORT)
    (run / "eval_rows.parquet").write_bytes(b"PAR1")
    assert "eval_rows.parquet cannot be read" in refuse(run, *SHORT)
    (run / "eval_rows.parquet").unlink()
    assert "has no evaluation rows" in refuse(run, *SHORT)
    (run / "dpo" / "tokenizer.json").write_text("{")
    assert "The tokenizer" in refuse(run, *SHORT)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", "w1", "must be a .jsonl, .json or .txt file"),
        ("p.jsonl", '{"prompt": "w1"}\n{', "line 2 is not valid JSON"),
        ("p.json", '{"prompt": "w1"}', "must be a list of prompts, got dict"),
        ("p.json", "[" * 100_000, "is not valid JSON"),
        ("p.jsonl", '{"question": "w1"}', "prompt 0 must have a `prompt`"),
        ("p.jsonl", "3", "prompt 0 must have a `prompt`"),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}', "`prompt` must be text or messages"),
        ("p.jsonl", '{"instruction": null}', "`instruction` must be text, got None"),
        ("p.jsonl", '{"turns": []}', "`turns` must be a list of texts"),
        ("p.jsonl", '{"prompt": "w1", "question_id": 1.5}', "`question_id` must be a whole number or text"),
        ("p.jsonl", '{"prompt": "a", "question_id": 1}\n{"prompt": "b"}', "`question_id` must be unique, got 1 twice"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "without lone surrogates"),
        ("p.jsonl", '{"turns": ["w1", "w2"]}', "no chat template"),
        ("p.txt", "\n \n", "must contain at least one prompt"),
        ("p.txt", b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_prompt_file_with_a_mistake_is_refused_in_one_line(made, tmp_path, refuse, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refuse(made, *SHORT, "--prompts", path, "--output", tmp_path / "out")
    assert not (tmp_path / "out" / "statistics.json").exists()


def test_a_prompt_file_that_is_not_there_is_refused(made, tmp_path, refuse):
    assert "which does not exist" in refuse(made, "--prompts", tmp_path / "none.jsonl")
    (tmp_path / "folder.txt").mkdir()
    assert "cannot be read" in refuse(made, "--prompts", tmp_path / "folder.txt")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("limit", 0), ("max-new-tokens", 0), ("batch-size", -1), ("temperature", 0), ("temperature", "nan"),
        ("top-p", 0), ("top-p", 1.1), ("device", "abacus"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_with_its_rule(made, refuse, flag, value):
    assert refuse(made, f"--{flag}", value).startswith(f"`{flag.replace('-', '_')}` must be")


def test_settings_are_checked_where_they_are_made():
    with pytest.raises(GenerateError, match=r"^`limit` must be at least 1, got 0\. The default is 64\.$"):
        GenerationSettings(limit=0)


def test_a_real_process_with_invalid_input_ends_with_2_and_one_line(run):
    assert main([str(run), *SHORT]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "dposhift_trl.generate", str(run), *SHORT, "--seed", "3"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "answers with other settings: seed." in done.stderr


def test_answers_to_questions_without_tools_belong_to_the_same_settings_as_before_there_were_tools():
    question = Question(0, "w1", "w1")
    old = {name: value for name, value in dataclasses.asdict(question).items() if name != "template_inputs"}
    digest = hashlib.blake2b(json.dumps([old]).encode(), digest_size=16).hexdigest()
    assert describe_settings(GenerationSettings(), None, [question])["questions"] == digest
    asked = dataclasses.replace(question, template_inputs={"tools": [{"name": "f"}]})
    assert describe_settings(GenerationSettings(), None, [asked])["questions"] != digest
