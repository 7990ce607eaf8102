"""Models that are there already: scored as `evaluate()` scores them, and refused in one line."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_rows, make_tokenizer, save_tiny_model
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.artifacts import read_mapping
from dposhift_trl.data.config import DataConfig
from dposhift_trl.diagnose import DiagnoseSettings, diagnose, diagnosis
from dposhift_trl.diagnose.__main__ import main
from dposhift_trl.diagnose.settings import load_settings
from dposhift_trl.reference.cache import entries


# Log-probabilities are float32 sums over at most a dozen tokens
CLOSE = {"abs": 2e-5}


def save(model, folder: Path, tokenizer=None) -> None:
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)


def tune(model):
    """A policy that prefers the chosen answers of `make_rows(24)`, so that there is a verdict."""
    rows, tokenizer = make_rows(24), make_tokenizer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(20):
        loss = torch.zeros(())
        for sign, name in ((1, "chosen"), (-0.6, "rejected")):
            texts = [row["prompt"] + row[name] for row in rows]
            batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = loss + sign * model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Path:
    """Two models, an adapter of the first one, and pairs."""
    folder = tmp_path_factory.mktemp("there")
    save_tiny_model(folder / "reference")
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference").eval()
    adapted = get_peft_model(reference, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save(adapted, folder / "adapter")
    save(tune(AutoModelForCausalLM.from_pretrained(folder / "reference").eval()), folder / "policy")
    make_rows(24).to_json(folder / "prefs.jsonl")
    return folder


@pytest.fixture
def work(there, tmp_path, monkeypatch) -> Path:
    """An empty folder from which the models are seen."""
    for path in there.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_page(monkeypatch):
    """Drawing a page takes seconds."""
    monkeypatch.setattr("dposhift_trl.report.page.write_report", lambda folders, destination: destination)


BOTH = ("--policy", "policy", "--reference", "reference", "--data", "prefs.jsonl")


def evaluated(settings, policy, reference, rows) -> dict[str, float]:
    """What `DPOShiftTrainer.evaluate()` logs, without the metrics of lambda and of TRL."""
    args = DPOShiftConfig(**{**settings, "per_device_eval_batch_size": 8})
    trainer = DPOShiftTrainer(
        policy, reference, args, train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer()
    )
    logged = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    return {
        name: value for name, value in logged.items() if "/" in name and not name.startswith(("shift/", "logits/"))
    }


# Numbers


def test_numbers_are_those_that_evaluate_logs(work, settings):
    found = diagnose(DiagnoseSettings("policy", DataConfig("prefs.jsonl"), "reference", "out"))
    reference = AutoModelForCausalLM.from_pretrained("reference", dtype=torch.float32)
    logged = evaluated(settings, "policy", reference, make_rows(24))
    assert {"displacement/chosen_p5", "rewards/margins_low", "perplexity/chosen"} <= set(logged)
    assert {name: found.metrics[name] for name in logged} == logged
    assert set(found.metrics) - set(logged) == {"dpo_loss"}
    assert read_mapping(work / "out" / "diagnosis.json")["metrics"] == found.metrics


def test_an_adapter_is_compared_with_its_base_model(work, settings):
    found = diagnose(DiagnoseSettings("adapter", DataConfig("prefs.jsonl"), output_dir="out"))
    base = AutoModelForCausalLM.from_pretrained("reference", dtype=torch.float32)
    adapter = PeftModel.from_pretrained(base, "adapter")
    reference = AutoModelForCausalLM.from_pretrained("reference", dtype=torch.float32)
    logged = evaluated(settings, adapter, reference, make_rows(24))
    assert abs(logged["displacement/chosen"]) > 0.01
    assert {name: found.metrics[name] for name in logged} == logged
    named = diagnose(DiagnoseSettings("adapter", DataConfig("prefs.jsonl"), "reference", "named"))
    assert named.metrics == found.metrics
    merged = adapter.merge_and_unload()
    save(merged, work / "merged")
    whole = diagnose(DiagnoseSettings("merged", DataConfig("prefs.jsonl"), "reference", "whole"))
    assert whole.metrics == pytest.approx(found.metrics, rel=1e-3, abs=1e-4)


def oracle(folder, prompt, answer) -> float:
    """Log-probability of an answer in float64, token by token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = make_tokenizer()
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + answer)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return sum(logits[place - 1].log_softmax(0)[ids[place]].item() for place in range(start, len(ids)))


@pytest.mark.parametrize("policy", ["policy", "adapter"])
def test_scores_of_pairs_are_those_of_a_float64_oracle(work, policy):
    diagnose(DiagnoseSettings(policy, DataConfig("prefs.jsonl"), "reference", "out", limit=5))
    table = pq.read_table(work / "out" / "pairs" / "eval-000000.parquet").to_pylist()
    assert [row["row_index"] for row in table] == list(range(5))
    for scores, row in zip(table, make_rows(24), strict=False):
        for name in ("chosen", "rejected"):
            assert scores[f"{name}_logps"] == pytest.approx(oracle(policy, row["prompt"], row[name]), **CLOSE)
            assert scores[f"ref_{name}_logps"] == pytest.approx(oracle("reference", row["prompt"], row[name]), **CLOSE)
            assert scores[f"{name}_tokens"] == len(make_tokenizer()(row[name])["input_ids"])
    assert "shift_lambda" not in table[0]


def test_scores_are_computed_once_and_shared_with_training(work, settings, monkeypatch):
    monkeypatch.setenv("DPOSHIFT_CACHE", str(work / "cache"))
    diagnose(DiagnoseSettings("policy", DataConfig("prefs.jsonl"), "reference", "out"))
    assert len(entries(work / "cache")) == 2
    diagnose(DiagnoseSettings("policy", DataConfig("prefs.jsonl"), "reference", "other", beta=0.5, batch_size=3))
    reference = AutoModelForCausalLM.from_pretrained("reference", dtype=torch.float32)
    evaluated(settings, "policy", reference, make_rows(24))
    assert len(entries(work / "cache")) == 2
    beta = [read_mapping(work / name / "diagnosis.json")["metrics"]["rewards/margins"] for name in ("out", "other")]
    assert beta[1] == pytest.approx(5 * beta[0])


# Pairs


def test_rows_are_audited_and_keep_their_numbers(work, here, no_page):
    rows = make_rows(24).to_list()
    rows[2]["chosen"] = rows[2]["rejected"]
    rows[5]["chosen"] = None
    Dataset.from_list(rows).to_json("rows.jsonl")
    out = here("--policy", "policy", "--reference", "reference", "--data", "rows.jsonl", "--output", "out").out
    assert "pairs: 22 of 24 rows kept: 1 missing (drop), 1 identical (drop)\n" in out
    table = pq.read_table(work / "out" / "pairs" / "eval-000000.parquet")["row_index"].to_pylist()
    assert table == [row for row in range(24) if row not in (2, 5)]
    texts = pq.read_table(work / "out" / "eval_rows.parquet").to_pylist()
    assert [row["chosen"] for row in texts if row["row_index"] == 7] == [rows[7]["chosen"]]
    found = read_mapping(work / "out" / "audit.json")["train"]["findings"]
    assert found["missing"]["examples"][0]["row"] == 5


def test_evaluation_rows_are_scored_if_a_recipe_names_some(work, no_page):
    folder = work / "splits"
    folder.mkdir()
    make_rows(6).to_json(folder / "train.jsonl")
    make_rows(5, seed=1).to_json(folder / "test.jsonl")
    both = ("--policy", "policy", "--reference", "reference", "--data", "splits")

    def scored(*arguments) -> list[str]:
        assert main([*both, *arguments, "--output", "out", "--overwrite"]) == 0
        return [row["chosen"] for row in pq.read_table("out/eval_rows.parquet").to_pylist()]

    assert scored() == make_rows(6)["chosen"][:]
    assert scored("data.eval_split=test") == make_rows(5, seed=1)["chosen"][:]
    assert scored("data.eval_split=test", "--split", "train") == make_rows(6)["chosen"][:]
    assert len(scored("data.eval_size=2")) == 2


def test_a_split_drops_the_seed_that_holds_out_rows_and_not_that_of_a_mixture():
    both = {"policy": "a", "reference": "b", "split": "train"}
    held_out = load_settings(None, ["data.eval_size=2", "data.seed=3"], {**both, "data": "rows.jsonl"})
    mixed = load_settings(None, ["data.mixture=[{path: x}, {path: y}]", "data.seed=3"], both)
    assert (held_out.data.seed, mixed.data.seed) == (None, 3)


# What the user reads


def test_the_verdict_names_no_lambda_and_the_report_is_written(work, here):
    out = here(*BOTH).out
    lines = out.splitlines()
    assert "policy: policy" in lines
    assert "reference: reference" in lines
    assert lines[-1] == "The report is diagnosis/policy/report/report.html"
    assert "Lambda was" not in out
    assert "The preference was learned" in out
    page = (work / "diagnosis" / "policy" / "report" / "report.html").read_text(encoding="utf-8")
    body = page[page.index("<body") :]
    assert "Diagnosis of policy against reference" in body
    assert "Log-probability now" in body
    assert 'class="tokens"' in body
    for training in (
        "Curves",
        "Optimizer step",
        "λ unknown",
        "SFT",
        "no curves",
        "trainer_state",
        "generated answers",
    ):
        assert training not in body, training


def test_a_recipe_says_the_same_as_the_options(work, here, no_page):
    text = "policy: policy\nreference: reference\ndata: {path: prefs.jsonl}\noutput_dir: from_recipe\nbeta: 0.2\n"
    (work / "x.yaml").write_text(text)
    here("x.yaml")
    here(*BOTH, "--output", "from_flags", "--beta", "0.2")
    first, second = (read_mapping(work / name / "diagnosis.json") for name in ("from_recipe", "from_flags"))
    assert first["metrics"] == second["metrics"]
    here("from_flags/recipe.yaml", "output_dir=again", "--limit", "9")
    assert read_mapping(work / "again" / "diagnosis.json")["pairs"] == 9
    found = load_settings("x.yaml", ["beta=0.3", "limit=4"], {"beta": 0.4, "data": "y"})
    assert (found.policy, found.beta, found.limit, found.data.path) == ("policy", 0.4, 4, "y")


def test_an_earlier_diagnosis_is_kept(work, here, no_page):
    here(*BOTH)
    here(*BOTH)
    here(*BOTH, "--beta", "0.2")
    assert sorted(path.name for path in (work / "diagnosis").iterdir()) == ["policy", "policy-2"]
    before = (work / "diagnosis" / "policy" / "diagnosis.json").read_bytes()
    into = ("--output", "diagnosis/policy")
    error = here(*BOTH, *into, "--beta", "0.3", code=2).err
    assert "contains another diagnosis: beta changed. Choose a new folder, or pass --overwrite." in error
    shutil.copy(work / "prefs.jsonl", work / "more.jsonl")
    with open(work / "more.jsonl", "a") as file:
        file.write(json.dumps(make_rows(1, seed=5)[0]) + "\n")
    assert "data, tokens changed" in here(*BOTH[:-1], "more.jsonl", *into, code=2).err
    assert (work / "diagnosis" / "policy" / "diagnosis.json").read_bytes() == before
    here(*BOTH, *into, "--beta", "0.3", "--overwrite")
    assert read_mapping(work / "diagnosis" / "policy" / "diagnosis.json")["settings"]["beta"] == 0.3
    (work / "run").mkdir()
    (work / "run" / "recipe.yaml").write_text("a run\n")
    (work / "run" / ".lock").touch()
    printed = here(*BOTH, "--output", "run", "--overwrite", code=2)
    assert "contains other files (recipe.yaml). Choose a new folder." in printed.err
    assert "pairs:" not in printed.out  # known before anything is read
    assert (work / "run" / "recipe.yaml").read_text() == "a run\n"


def test_nothing_is_written_if_scoring_is_interrupted(work, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnosis, "_scored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        diagnose(DiagnoseSettings("policy", DataConfig("prefs.jsonl"), "reference", "out"))
    assert not (work / "out").exists()


# Mistakes


def words(count: int) -> PreTrainedTokenizerFast:
    vocabulary = {
        word: index for index, word in enumerate(["<eos>", "<pad>", *(f"v{index}" for index in range(count))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def broken(work, there, monkeypatch) -> Path:
    """Folders that are no models, beside those that are; loading any weights fails the test."""
    (work / "run" / "dpo").mkdir(parents=True)
    shutil.copy(there / "policy" / "config.json", work / "run" / "dpo")
    (work / "empty").mkdir()
    shutil.copytree(there / "policy", work / "cut")
    weights = work / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(there / "adapter", work / "lost")
    config = work / "lost" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/gone/base"}))
    shutil.copytree(there / "policy", work / "other")
    words(40).save_pretrained(work / "other")
    small = GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    save(AutoModelForCausalLM.from_config(small), work / "small")
    short = GPT2Config(vocab_size=42, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    save(AutoModelForCausalLM.from_config(short), work / "short")
    reward = GPT2Config(vocab_size=42, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    save(GPT2ForSequenceClassification(reward), work / "reward")
    (work / "text.jsonl").write_text('{"text": "w1"}\n')
    (work / "bad.yaml").write_text("polcy: policy\ndata: {path: prefs.jsonl}\n")
    monkeypatch.setattr(diagnosis, "load_model", lambda *args: pytest.fail("a model was loaded"))
    return work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "diagnose: `policy` is missing. Pass --policy, or write it in a recipe."),
        (("--policy", "policy"), "diagnose: `data` is missing. Pass --data, or write it in a recipe."),
        (("bad.yaml",), "bad.yaml: unknown key `polcy`. Did you mean `policy`?"),
        (("x=", *BOTH), "diagnose: unknown key `x`."),
        (("data.colums=1", *BOTH), "diagnose: unknown key `data.colums`. Did you mean `columns`?"),
        ((*BOTH, "--limit", "0"), "diagnose: `limit` must be at least 1, got 0. Write for example `limit: 500`."),
        ((*BOTH, "--batch-size", "-1"), "diagnose: `batch_size` must be at least 1, got -1."),
        ((*BOTH, "--max-length", "0"), "diagnose: `max_length` must be at least 1, got 0."),
        ((*BOTH, "--beta", "nan"), "diagnose: `beta` must be"),
        ((*BOTH, "--dtype", "int8"), "`dtype` must be one of float32, bfloat16, float16, auto, got 'int8'."),
        ((*BOTH, "data.streaming=true"), "`data.streaming` is not supported in a diagnosis, got True."),
        ((*BOTH, "--reference", "./nowhere"), "`reference` must be a Hub name or a folder, got './nowhere', which"),
        (("--policy", "policy", "--data", "prefs.jsonl"), "`reference` must be set unless `policy` is an adapter"),
        ((*BOTH, "--policy", "run"), "got 'run'. Did you mean `run/dpo`?"),
        ((*BOTH, "--policy", "empty"), "got 'empty'. Pass the folder that the model was saved to."),
        ((*BOTH, "--policy", "prefs.jsonl"), "got 'prefs.jsonl', a file. Pass its folder."),
        ((*BOTH, "--policy", "run/dpo"), "hold weights that transformers reads, got 'run/dpo' without"),
        ((*BOTH, "--policy", "cut"), "`policy` 'cut' is not whole: model.safetensors is cut or broken."),
        ((*BOTH, "--policy", "lost"), "must be the base model of the adapter, got '/gone/base', which"),
        ((*BOTH, "--policy", "reward"), "a causal language model, got 'reward' (GPT2ForSequenceClassification)."),
        ((*BOTH, "--policy", "no-org/no-model"), "`policy` 'no-org/no-model' cannot be loaded:"),
        ((*BOTH, "--reference", "other"), "must have the same vocabulary"),
        ((*BOTH, "--reference", "small"), "every token of the pairs, got small with 7 and the token 41."),
        ((*BOTH, "--reference", "short"), "`max_length` must be at most 8, the positions of `reference`, got 1024:"),
        ((*BOTH, "--data", "nowhere.jsonl"), "`data.path` 'nowhere.jsonl', split 'train', cannot be read: the file"),
        ((*BOTH, "--data", "text.jsonl"), "chosen"),
        ((*BOTH, "--split", "test"), "a file has only the split 'train'"),
        ((*BOTH, "--max-length", "2"), "The row audit leaves 0 of 24"),
    ],
    ids=lambda value: " ".join(word for word in value if word not in BOTH) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_mistakes_are_one_line_before_a_model_is_loaded(broken, here, arguments, message):
    result = here(*arguments, code=2)
    assert message in result.err
    lines = [line for line in result.err.splitlines() if "it/s" not in line and "examples" not in line]
    mistakes = 2 if arguments in ((), ("bad.yaml",)) else 1
    assert len([line for line in lines if line]) == mistakes, lines
    assert not (broken / "diagnosis").exists()


def test_several_processes_are_refused(work, here, monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert here(*BOTH, code=2).err == "A diagnosis runs in one process, got 2. Start it with `python -m` alone.\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert here(*BOTH, code=2).err == ""
