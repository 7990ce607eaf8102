"""The tokens of the pairs that changed most are saved, add up to the scores of their pairs, and are the answer."""

import logging
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_rows
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.training import token_scores
from dposhift_trl.training.references import References
from dposhift_trl.training.token_scores import changed_most, token_texts


def make(model, settings, peft_config=None, **changes):
    args = DPOShiftConfig(**{**settings, "eval_strategy": "steps", "eval_steps": 2, **changes})
    rows, evaluated = make_rows(12), make_rows(30, seed=1)
    return DPOShiftTrainer(model, args=args, train_dataset=rows, eval_dataset=evaluated, peft_config=peft_config)


def answers(path: Path) -> dict[tuple[int, str], list[dict]]:
    found = defaultdict(list)
    for row in pq.read_table(path).to_pylist():
        found[row["row_index"], row["answer"]].append(row)
    return found


@pytest.mark.parametrize(
    ("changes", "adapter"),
    [
        pytest.param({"precompute_ref_log_probs": None}, None, id="brought-back"),
        pytest.param({"precompute_ref_log_probs": False, "shared_prompt": False}, None, id="online"),
        pytest.param({"precompute_ref_log_probs": True}, LoraConfig(r=2, lora_alpha=64), id="lora"),
    ],
)
def test_the_tokens_of_the_pairs_that_changed_most_add_up_to_their_scores(changes, adapter, tiny_model, settings):
    trainer = make(tiny_model, settings, adapter, **changes)
    reference = trainer.ref_model
    assert (trainer._references.stored is not None) == (changes["precompute_ref_log_probs"] is None)
    trainer.train()
    pairs = Path(settings["output_dir"]) / "pairs"
    assert [path.name for path in (pairs / "tokens").iterdir()] == ["eval-000004.parquet"]  # the last evaluation
    table = pq.read_table(pairs / "eval-000004.parquet")
    scores = {row["row_index"]: row for row in table.to_pylist()}
    found = answers(pairs / "tokens" / "eval-000004.parquet")
    order = sorted(scores.values(), key=lambda row: row["chosen_logratios"])
    ends = [*(row for row in order[:10] if row["chosen_logratios"] < 0)]
    ends += [row for row in order[-10:] if row["chosen_logratios"] > 0]
    assert {row for row, _ in found} == {row["row_index"] for row in ends}
    assert len(found) == 2 * len(ends) >= 20
    for (row, answer), tokens in found.items():
        assert sum(token["logps"] for token in tokens) == pytest.approx(scores[row][f"{answer}_logps"], rel=1e-5)
        before = sum(token["ref_logps"] for token in tokens)
        assert before == pytest.approx(scores[row][f"ref_{answer}_logps"], rel=1e-5)
        assert "".join(token["text"] for token in tokens) == trainer.eval_dataset[row][answer].strip()
    assert trainer.ref_model is reference


def test_nothing_is_saved_where_scores_of_pairs_are_not(tiny_model, settings):
    trainer = make(tiny_model, settings, save_pair_scores=False, max_steps=2)
    trainer.train()
    assert not (Path(settings["output_dir"]) / "pairs").exists()


def test_a_policy_that_is_its_reference_has_no_tokens_and_one_that_is_not_has_them_without_training(
    tiny_model, settings
):
    trainer = make(tiny_model, settings)
    tokens = Path(settings["output_dir"]) / "pairs" / "tokens" / "eval-000000.parquet"
    trainer.evaluate()
    assert not tokens.exists()
    trainer.model.transformer.wte.weight.data.mul_(1.5)
    trainer.evaluate()
    assert len(answers(tokens)) >= 20


def test_a_run_does_not_end_by_a_reference_that_does_not_come_back(tiny_model, settings, monkeypatch, caplog):
    def no_memory(self, needed):
        raise RuntimeError("out of\nmemory")

    trainer = make(tiny_model, settings, max_steps=2)
    trainer.train()
    monkeypatch.setattr(References, "model", lambda self: no_memory(self, True))
    with caplog.at_level(logging.WARNING):
        metrics = trainer.evaluate()
    assert metrics["eval_displacement/chosen"] != 0
    assert "The log-probabilities of tokens are not saved: out of memory" in caplog.text
    # Nor is what an earlier evaluation of this step has left taken for this one's
    assert not list((Path(settings["output_dir"]) / "pairs" / "tokens").iterdir())


def test_a_run_does_not_end_by_scores_that_cannot_be_read_back(tiny_model, settings, monkeypatch, caplog):
    def unreadable(table):
        raise OSError("disk is gone")

    trainer = make(tiny_model, settings)
    trainer.model.transformer.wte.weight.data.mul_(1.5)
    monkeypatch.setattr(token_scores, "changed_most", unreadable)
    with caplog.at_level(logging.WARNING):
        assert trainer.evaluate()["eval_displacement/chosen"] != 0
    assert "The log-probabilities of tokens are not saved: disk is gone" in caplog.text


def test_the_pairs_at_each_end_are_those_that_changed(tmp_path):
    changes = [0.0, -3.0, 2.0, -1e-5, *[-2.0 - index / 100 for index in range(12)], 1.0, 1e-5]
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"row_index": range(100, 100 + len(changes)), "chosen_logratios": changes}), path)
    found = changed_most(path)
    assert found == [101, *range(115, 106, -1), 102, 116]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", ["plain words\n\n and  spaces ", "é漢😀", "\ufffd", "a\ufffdb", ""])
def test_the_texts_of_tokens_are_the_answer_also_where_characters_take_several(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    texts = list(token_texts(tokenizer, ids))
    assert "".join(piece for piece, _ in texts) == text
    assert sum(count for _, count in texts) == len(ids) == len(text.encode())
    if "\ufffd" not in text:
        assert [count for _, count in texts] == [len(letter.encode()) for letter in text]


def test_a_tokenizer_that_drops_the_first_space_keeps_the_others():
    vocabulary = {"▁one": 0, "▁two": 1, "s": 2}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Metaspace()
    found = list(token_texts(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [0, 2, 1, 2]))
    assert found == [("one", 1), ("s", 1), (" two", 1), ("s", 1)]
