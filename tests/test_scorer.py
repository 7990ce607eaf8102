"""The reference's scores of a dataset, which settings they hold for, and the model put away."""

import dataclasses

import pytest
import torch
import transformers
from accelerate import Accelerator, DistributedType
from conftest import jitter
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dposhift_trl.reference.scorer import ReferenceScorer, ScoringSettings, StoredReference, move_model


ROWS = Dataset.from_dict(
    {
        "prompt_ids": [[5, 6], [7], [8, 9, 10], [5], [6, 7]],
        "chosen_ids": [[11, 0], [12, 13, 0], [14, 0], [15, 16, 17, 0], [18, 0]],
        "rejected_ids": [[14, 0], [15, 0], [16, 17, 0], [12, 0], [11, 12, 13, 0]],
    }
)
SETTINGS = ScoringSettings(max_length=32, truncation_mode="keep_start", ld_alpha=None, shares_prompts=False)
COLUMNS = ["ref_chosen_logps", "ref_rejected_logps"]
collate = DataCollatorForPreference(pad_token_id=1)


@torch.no_grad()
def score_batch(model, batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    return (logps * batch["completion_mask"][:, 1:]).sum(dim=1).chunk(2)


class Batches:
    """Scores batches, and remembers in which mode the model was and which prompts it saw."""

    def __init__(self):
        self.training, self.prompts = [], []

    def __call__(self, model, batch):
        self.training.append(model.training)
        self.prompts += batch["input_ids"][: len(batch["input_ids"]) // 2, 0].tolist()
        return score_batch(model, batch)


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPOSHIFT_CACHE", str(tmp_path / "cache"))


def make_scorer(score=score_batch, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return ReferenceScorer(score, collate, Accelerator(cpu=True), settings, show_progress=False)


def scores_of(rows):
    return [torch.tensor(rows[name][:]) for name in COLUMNS]


def test_rows_are_scored_batch_by_batch_bit_for_bit_and_in_order(model):
    batches = Batches()
    scored = make_scorer(batches).score(model.train(), None, ROWS, "train", batch_size=2)
    assert scored.column_names == [*ROWS.column_names, *COLUMNS]
    model.eval()
    parts = [score_batch(model, collate(list(ROWS.select(range(start, min(start + 2, 5)))))) for start in (0, 2, 4)]
    for column, expected in zip(scores_of(scored), zip(*parts, strict=True), strict=True):
        assert torch.equal(column, torch.cat(expected))
    assert batches.prompts == [5, 7, 8, 5, 6]


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_off_while_rows_are_scored_and_then_as_it_was(training, model):
    batches = Batches()
    make_scorer(batches).score(model.train(training), None, ROWS, "train", batch_size=4)
    assert batches.training == [False, False]
    assert model.training is training


def test_scores_that_another_reference_has_left_are_replaced(model):
    scorer = make_scorer()
    first = scorer.score(model, None, ROWS, "train", 4)
    before = scorer.fingerprint
    second = scorer.score(jitter(model, 0.1), None, first, "train", 4)
    assert sorted(second.column_names) == sorted(first.column_names)
    assert scorer.fingerprint != before
    assert all((a != b).all() for a, b in zip(scores_of(first), scores_of(second), strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 16},
        {"truncation_mode": "keep_end"},
        {"ld_alpha": 0.5},
        {"shares_prompts": True},
        pytest.param("high", id="matmul precision"),
        pytest.param("transformers", id="transformers"),
        pytest.param("attention", id="attention"),
        pytest.param("bf16", id="mixed precision"),
        pytest.param("code", id="code of the model"),
    ],
    ids=str,
)
def test_scores_hold_for_what_decides_their_rounding_and_for_nothing_else(change, model, monkeypatch):
    batches = Batches()
    scorer = make_scorer(batches)
    scorer.score(model, None, ROWS, "train", 5)
    scorer.score(model, None, ROWS, "eval", 2)  # by another name, in other batches
    assert len(batches.training) == 3  # all rows in one batch, and in two those that are compared with the cache
    if isinstance(change, dict):
        scorer.settings = dataclasses.replace(SETTINGS, **change)
    elif change == "high":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    elif change == "transformers":
        monkeypatch.setattr(transformers, "__version__", "999.0")
    elif change == "attention":
        model.config._attn_implementation = "eager"
    elif change == "bf16":
        monkeypatch.setattr(Accelerator, "mixed_precision", "bf16")
    else:
        monkeypatch.setattr(type(model), "__module__", "transformers_modules.revision")
    scorer.score(model, None, ROWS, "train", 5)
    assert len(batches.training) == 4


def test_a_reference_that_is_kept_comes_back_as_it_is(model):
    stored = StoredReference(model, torch.device("meta"))
    assert not stored.away
    assert stored.put_away() is model
    assert stored.away
    assert model.device.type == "cpu"
    assert stored.bring_back() is model
    assert model.device.type == "meta"  # which stands for an accelerator
    assert not stored.away


def test_a_reference_that_is_loaded_again_is_not_kept(model):
    loads = []

    def load():
        loads.append(torch.nn.Linear(2, 2))
        return loads[-1]

    stored = StoredReference(model, torch.device("meta"), load)
    assert stored.put_away() is None
    assert not any(value is model for value in vars(stored).values())
    assert stored.away
    assert not loads
    assert stored.bring_back() is loads[0]
    assert loads[0].weight.device.type == "meta"
    assert not stored.away
    assert stored.put_away() is None
    assert stored.bring_back() is loads[1]


@pytest.mark.parametrize("mark", [{"hf_device_map": {"": "cpu"}}, {"is_quantized": True}], ids=str)
def test_a_model_that_is_bound_to_its_devices_is_not_moved(mark, model):
    for name, value in mark.items():
        setattr(model, name, value)
    assert move_model(model, "meta").device.type == "cpu"


def test_a_reference_that_fsdp2_has_placed_is_scored_where_it_is(model, monkeypatch):
    model.__class__ = type("Sharded", (FSDPModule, type(model)), {})
    # An accelerator; with offloaded parameters FSDP2 refuses to run a model that is not on the CPU
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    scorer, devices = make_scorer(), []
    monkeypatch.setattr(scorer, "_score_rows", lambda model, *_: devices.append(model.device) or torch.zeros(2, 5))
    scorer.score(model, None, ROWS, "train", 2)
    assert {device.type for device in devices} == {"cpu"}


@pytest.mark.parametrize(("way", "precision", "again"), [("FSDP", "bf16", True), ("FSDP", "no", False)])
def test_layers_cast_whole_round_otherwise_than_operations_that_autocast(way, precision, again, model, monkeypatch):
    batches = Batches()
    scorer = make_scorer(batches)
    monkeypatch.setattr(Accelerator, "mixed_precision", precision)
    scorer.score(model, None, ROWS, "train", 2)
    all_rows = len(batches.training)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[way])
    scorer.score(model, None, ROWS, "train", 2)
    compared_with_the_cache = 2
    assert len(batches.training) == all_rows + (all_rows if again else compared_with_the_cache)
    assert all_rows > compared_with_the_cache
