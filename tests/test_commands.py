"""The list of commands, and the one entry to all of them, as real processes."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from dposhift_trl import __main__ as commands
from dposhift_trl import __version__


ROOT = Path(__file__).parent.parent


def python(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)], ids=["nothing", "long", "short"])
def test_the_package_lists_its_commands(arguments):
    result = python("-m", "dposhift_trl", *arguments)
    assert result.returncode == 0
    assert re.findall(r"^  (\w+) +[A-Z]\w+ .*\.$", result.stdout, re.MULTILINE) == list(commands.COMMANDS)
    assert "dposhift COMMAND --help" in result.stdout
    assert result.stderr == ""


def test_the_version():
    result = python("-m", "dposhift_trl", "--version")
    assert (result.returncode, result.stdout) == (0, f"dposhift_trl {__version__}\n")


def test_listing_imports_nothing_heavy():
    imported = re.findall(r"\| +([\w.]+)$", python("-X", "importtime", "-m", "dposhift_trl").stderr, re.MULTILINE)
    assert "dposhift_trl" in imported
    assert {name.split(".")[0] for name in imported}.isdisjoint(
        {"torch", "transformers", "trl", "datasets", "accelerate", "numpy", "pyarrow", "matplotlib"}
    )
    names = [name for name in imported if name.startswith("dposhift_trl")]
    assert names == ["dposhift_trl", "dposhift_trl.console", "dposhift_trl.command"]


@pytest.mark.parametrize(
    ("name", "nearest"), [("rum", "`run`"), ("sweeps", "`sweep`"), ("--dry-run", None), ("x", None)]
)
def test_an_unknown_command_is_one_line_with_the_nearest(name, nearest):
    result = python("-m", "dposhift_trl", name, "recipe.yaml")
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"The command must be one of {', '.join(commands.COMMANDS)}, got {name!r}.")
    assert ("Did you mean" in line) is (nearest is not None)
    assert nearest is None or line.endswith(f"Did you mean {nearest}?")


def test_a_command_is_the_same_by_either_name():
    arguments = ("recipes/tiny_shift.yaml", "dpo.shift_lambda=0.5", "--dry-run")
    results = [python("-m", "dposhift_trl", "run", *arguments), python("-m", "dposhift_trl.run", *arguments)]
    assert [result.returncode for result in results] == [0, 0]
    # DeepSpeed, where it is installed, prints lines with the time
    printed = [re.sub(r"^\[\d{4}-.*\n", "", result.stdout, flags=re.MULTILINE) for result in results]
    assert printed[0] == printed[1]
    assert "lambda: 0.5 throughout" in results[0].stdout


def test_a_command_passes_on_its_exit_code():
    result = python("-m", "dposhift_trl", "report", "no-such-run")
    assert result.returncode == 2
    assert "no-such-run" in result.stderr


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_shows_its_own_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"python -m dposhift_trl.{name}" in capsys.readouterr().out


def test_every_module_that_runs_is_a_command():
    runnable = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "dposhift_trl").rglob("*.py")
        if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
    }
    assert runnable == {"dposhift_trl.__main__", *map(commands.module_of, commands.COMMANDS)}


def test_the_console_script_is_the_same_function(monkeypatch, capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert list(project["scripts"]) == ["dposhift"]
    script = EntryPoint("dposhift", project["scripts"]["dposhift"], "console_scripts").load()
    monkeypatch.setattr(sys, "argv", ["dposhift"])
    assert script() == 0
    assert capsys.readouterr().out == commands.usage() + "\n"
