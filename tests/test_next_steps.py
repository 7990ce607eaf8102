"""The commands in `next_steps.md`: with the run's paths, quoted, and accepted by the tools' own parsers."""

import argparse
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import click
import pytest
import torch
import typer
from conftest import make_rows, make_tokenizer, save_tiny_model
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, HfArgumentParser

from dposhift_trl.__main__ import module_of
from dposhift_trl.data.chat_template import PLAIN_CHAT_TEMPLATE
from dposhift_trl.pipeline.next_steps import write_next_steps
from dposhift_trl.pipeline.run_folder import save_evaluated_rows
from dposhift_trl.recipe import load_recipe


NAME = "it's, a run"  # a shell and lm_eval read it otherwise than it stands
TURN = [{"role": "user", "content": "w1"}]


def finished_run(tmp_path: Path, *, lora=False, merged=False, chat=False, remote=False, stages=("sft", "dpo")) -> Path:
    """A folder as a finished run leaves it, and its `next_steps.md`."""
    folder = tmp_path / NAME
    save_tiny_model(folder / "base")
    for stage in stages:
        save_tiny_model(folder / stage)
        if lora:
            (folder / stage / "config.json").unlink()
            model = AutoModelForCausalLM.from_pretrained(folder / "base")
            config = LoraConfig(r=20, target_modules=["c_attn"], fan_in_fan_out=True)
            get_peft_model(model, config).save_pretrained(folder / stage)
        if merged:
            (folder / stage / "merged").mkdir()
    rows = make_rows(3).to_list()
    if chat:
        rows = [{"prompt": TURN, "chosen": [{"role": "assistant", "content": row["chosen"]}],
                 "rejected": [{"role": "assistant", "content": row["rejected"]}]} for row in rows]  # fmt: skip
    save_evaluated_rows(Dataset.from_list(rows), folder / "eval_rows.parquet")
    (tmp_path / "x.yaml").write_text(
        f'output_dir: "{folder}"\ndata: {{path: demo, eval_split: test}}\n'
        f"model: {{model_name_or_path: demo, trust_remote_code: {str(remote).lower()}}}\n"
        + "".join(f"{stage}: {{bf16: false, use_cpu: true, report_to: none}}\n" for stage in stages)
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE if chat else None
    return write_next_steps(load_recipe(str(tmp_path / "x.yaml")), str(folder / "base"), tokenizer)


def commands(path: Path) -> list[list[str]]:
    """The commands, as a shell splits them."""
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def of(path: Path, *words: str) -> list[list[str]]:
    """The arguments of the commands that begin with some words."""
    return [line[len(words) :] for line in commands(path) if tuple(line[: len(words)]) == words]


KINDS = [
    {}, {"chat": True, "remote": True}, {"chat": True}, {"lora": True, "chat": True}, {"lora": True, "merged": True},
    {"stages": ("sft",)},
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(kind) or "plain")
def test_every_command_of_a_tool_that_is_here_is_one(tmp_path, kind, monkeypatch):
    parsed = []
    for program, *arguments in commands(finished_run(tmp_path, **kind)):
        if program == "python" and arguments[0] == "-m":
            parse_own(*arguments[1:], monkeypatch=monkeypatch)
        elif program in TOOLS:
            parse_click(TOOLS[program], *arguments, monkeypatch=monkeypatch)
        else:
            continue
        parsed.append(program)
    assert parsed.count("hf") == 1
    assert parsed.count("transformers") == (2 if "chat" in kind else 0)
    assert parsed.count("python") == (0 if "stages" in kind else 3)


TOOLS = {"hf": "huggingface_hub.cli.hf", "transformers": "transformers.cli.transformers"}


class Parsed(Exception):
    """Ends a command once its arguments are parsed."""


def parse_own(module: str, *arguments: str, monkeypatch) -> None:
    original = argparse.ArgumentParser.parse_known_args

    def parse(parser, args=None, namespace=None):
        assert original(parser, args, namespace)[1] == []
        raise Parsed

    main = importlib.import_module(module_of(module.removeprefix("dposhift_trl."))).main
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(argparse.ArgumentParser, "parse_known_intermixed_args", parse)
        with pytest.raises(Parsed):
            main(arguments)


def parse_click(tool: str, *arguments: str, monkeypatch) -> None:
    def invoke(context, callback, *args, **kwargs):
        if not isinstance(context.command, click.Group):
            assert context.args == []
            raise Parsed

    app = importlib.import_module(tool).app
    group = app if isinstance(app, click.Group) else typer.main.get_command(app)
    with monkeypatch.context() as patch:
        patch.setattr(click.Context, "invoke", invoke)
        with pytest.raises(Parsed):
            group.main(list(arguments), standalone_mode=False)


def test_lm_eval_reads_the_paths(tmp_path):
    harness = pytest.importorskip("lm_eval._cli.harness", exc_type=ImportError)
    for kind in ({}, {"lora": True, "chat": True}):
        found = of(finished_run(tmp_path / "-".join(["x", *kind]), **kind), "lm_eval")
        assert len(found) == 2
        for arguments, stage in zip(found, ("dpo", "sft"), strict=True):
            read = harness.HarnessCLI()._parser.parse_args(arguments)
            folder = (tmp_path / "-".join(["x", *kind]) / NAME).resolve()
            model = {"pretrained": str(folder / "base"), "peft": str(folder / stage)}
            assert read.model_args == (model if kind else {"pretrained": str(folder / stage)})
            assert getattr(read, "apply_chat_template", False) is bool(kind)


def test_rewardbench_reads_the_pairs(tmp_path):
    path = finished_run(tmp_path, chat=True)
    ((*arguments,),) = of(path, "rewardbench")
    pairs = [json.loads(line) for line in Path(arguments[arguments.index("--dataset") + 1]).read_text().splitlines()]
    assert len(pairs) == 3
    for pair, row in zip(pairs, make_rows(3), strict=True):
        assert pair == {name: [*TURN, {"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    rewardbench = pytest.importorskip("rewardbench.rewardbench", exc_type=ImportError)
    (read,) = HfArgumentParser(rewardbench.Args).parse_args_into_dataclasses(arguments)
    assert (read.model, read.ref_model) == tuple(str(path.parent / stage) for stage in ("dpo", "sft"))


def test_vllm_serves_an_adapter_merged_or_on_its_base_model(tmp_path):
    path = finished_run(tmp_path, lora=True)
    whole, adapter = of(path, "vllm", "serve")
    assert whole == [str(path.parent / "dpo" / "merged"), "--served-model-name", "it-s-a-run-dpo-" + whole[2][-8:]]
    assert adapter[:4] == [str(path.parent / "base"), "--enable-lora", "--max-lora-rank", "32"]
    assert json.loads(adapter[5]) == {"name": whole[2], "path": str(path.parent / "dpo")}


def test_an_adapter_is_merged_by_the_command(tmp_path, monkeypatch):
    path = finished_run(tmp_path, lora=True)
    ((code, adapter, merged), reference) = of(path, "python", "-c")
    assert reference[1:] == [str(path.parent / "sft"), str(path.parent / "sft" / "merged")]
    make_tokenizer().save_pretrained(adapter)
    monkeypatch.setattr(sys, "argv", ["-c", adapter, merged])
    exec(code, {})
    wanted = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not of(finished_run(tmp_path / "other", lora=True, merged=True), "python", "-c")


# They read the run's own recipe, or no model
READ_BY_THEMSELVES = ("dposhift_trl.generate", "dposhift_trl.report")


def test_code_that_comes_with_a_model_may_run_in_every_command_if_it_might_in_the_run(tmp_path):
    for kind in ({"chat": True}, {"chat": True, "lora": True}):
        for remote in (True, False):
            lines = commands(finished_run(tmp_path / f"{remote}-{len(kind)}", remote=remote, **kind))
            loading = [
                line for line in lines if line[0] != "hf" and line[1] != "chat" and not {*line} & {*READ_BY_THEMSELVES}
            ]
            assert len(loading) == 6 + 3 * ("lora" in kind)
            for line in loading:
                assert any("trust-remote-code" in word.replace("_", "-") for word in line[3:]) is remote, line


def test_what_does_not_fit_a_run_is_left_out(tmp_path):
    text = finished_run(tmp_path / "text").read_text()
    assert "Chat" not in text
    assert "RewardBench" not in text
    assert "--apply_chat_template" not in text
    assert "Diagnose" not in finished_run(tmp_path / "sft", stages=("sft",)).read_text()
