"""Every block of every page is run or parsed, and every number that a page repeats is the number of its source."""

import importlib.util
import json
import math
import re
import shlex
from importlib import import_module

import pytest
import yaml
from test_docs import PAGES, ROOT, section

import dposhift_trl
from dposhift_trl.__main__ import COMMANDS, module_of
from dposhift_trl.diagnose.settings import load_settings
from dposhift_trl.recipe import load_recipe
from dposhift_trl.recipe.keys import recipe_keys
from dposhift_trl.schedules import ADAPTIVE, LAMBDA_SCHEDULES


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MEASUREMENTS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
NUMBERS = json.loads((ROOT / "docs" / "images" / "demo.json").read_text(encoding="utf-8"))
NAMES = {page: page.relative_to(ROOT).as_posix() for page in PAGES}


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(language, pages=PAGES):
    found = [
        (NAMES[path], block)
        for path in pages
        for block in re.findall(
            rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
    ]
    return [pytest.param(block, id=f"{name}-{index}") for index, (name, block) in enumerate(found)]


def command_lines():
    """Each line of each shell block, and the command in the header of each recipe."""
    lines = [line for block in blocks("bash") for line in block.values[0].replace(" && ", "\n").splitlines()]
    lines += [
        line.lstrip("# ")
        for recipe in RECIPES
        for line in recipe.read_text(encoding="utf-8").splitlines()
        if re.match(r"#\s+(accelerate|python)", line)
    ]
    return sorted({line.split(" #")[0].strip() for line in lines} - {""})


COMMAND = re.compile(r"-m dposhift_trl\.(\w+)")
RUNS = [line for line in command_lines() if re.search(r"-m dposhift_trl\.run (?!--)", line)]
OTHERS = [line for line in command_lines() if COMMAND.search(line) and line not in RUNS]
# Commands of other programs, and scripts of the repository, which are there
PROGRAMS = "pip|pytest|ruff|mypy|nox|mkdocs|source|pre-commit|python -m venv|sbatch"
KNOWN = rf"([A-Z_]+=\S+ )*({PROGRAMS}|(bash|python) (benchmarks|tests|docs|examples)/)"


def on_cpu(recipe, text):
    return [f"{stage}.bf16=false" for stage in ("sft", "dpo") if re.search(rf"^{stage}:", text, re.MULTILINE)]


def test_every_line_of_a_shell_block_is_of_a_kind_that_is_checked():
    strangers = [line for line in command_lines() if line not in RUNS + OTHERS and not re.match(KNOWN, line)]
    assert strangers == []
    files = {
        file for line in command_lines() for file in re.findall(r"(?<![\w/.-])(?:\w+/)+\w+\.(?:py|sh|yaml)\b", line)
    }
    assert {"benchmarks/gpu.sh", "recipes/tiny_shift.yaml"} <= files
    assert [file for file in files if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("line", RUNS)
def test_every_run_names_a_recipe_that_exists_and_keys_that_are_valid(line, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    recipe, *arguments = words[words.index("dposhift_trl.run") + 1 :]
    if recipe == "RECIPE":  # any
        return
    if recipe == "mine.yaml":
        (text,) = (block.values[0] for block in blocks("yaml") if "runs/mine" in block.values[0])
        recipe = str(tmp_path / recipe)
        (tmp_path / "mine.yaml").write_text(text)
    overrides = [word for word in arguments if not word.startswith("--")]
    with open(recipe, encoding="utf-8") as file:
        assert load_recipe(recipe, [*overrides, *on_cpu(recipe, file.read())]).stages


@pytest.mark.parametrize("line", OTHERS)
def test_every_other_command_takes_the_options_it_is_given(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    name, *arguments = words[words.index("-m") + 1 :]
    module = import_module(module_of(name.removeprefix("dposhift_trl.")))
    if name == "dposhift_trl.sweep":
        recipe, *overrides = [word for word in arguments if "=" in word or word.endswith(".yaml")]
        assert len(module.plan(recipe, overrides).points) > 1
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {word for word in arguments if word.startswith("--")} <= options


def test_some_page_shows_every_command():
    shown = {match[1] for line in command_lines() if (match := COMMAND.search(line))}
    assert shown == set(COMMANDS)


@pytest.mark.parametrize("block", blocks("python", [path for path in PAGES if path.name != "README.md"]))
def test_every_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block, {})


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_recipe_and_every_part_of_one_has_valid_keys(block, tmp_path):
    values = yaml.safe_load(block)
    if "policy" in values:
        (tmp_path / "diagnosis.yaml").write_text(block)
        assert load_settings(str(tmp_path / "diagnosis.yaml")).limit == 500
        return
    if "model" not in values:
        values = {"output_dir": "runs/x", "model": {"model_name_or_path": "demo"}, "data": {"path": "demo"}} | values
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert load_recipe(str(path), on_cpu(path, path.read_text())).stages


@pytest.mark.parametrize("block", blocks("json"))
def test_every_json_block_is_json(block):
    assert json.loads(block)


def flat(pages):
    return [name for entry in pages for name in entry.values()]


def test_the_site_has_every_page_and_no_other():
    """`mkdocs build --strict`, which `.ci/run` calls, then fails for links that lead nowhere."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = [pages for group in yaml.safe_load(config)["nav"] for pages in group.values()]
    listed = [name for pages in nav for name in ([pages] if isinstance(pages, str) else flat(pages))]
    outside = {"index.md", "benchmarks.md", "contributing.md", "security.md", "changelog.md", "recipe_reference.md"}
    assert len(listed) == len(set(listed))
    assert set(listed) - outside == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_schedules_are_all_on_their_page():
    table = section(page("docs/schedules.md").replace("# Lambda", "## Lambda"), "Lambda schedules")
    assert [name for name in (*LAMBDA_SCHEDULES, ADAPTIVE) if f"`{name}`" not in table] == []


def test_the_python_api_has_every_public_name():
    documented = re.findall(r"^::: [\w.]+\.(\w+)$", page("docs/api.md"), re.MULTILINE)
    assert sorted(documented) == sorted(set(dposhift_trl.__all__) - {"__version__"})
    for path in re.findall(r"^::: ([\w.]+)$", page("docs/api.md"), re.MULTILINE):
        module, _, name = path.rpartition(".")
        assert getattr(import_module(module), name) is getattr(dposhift_trl, name)


def test_the_recipe_reference_has_every_key():
    text = script("recipe_keys").recipe_page()
    assert [key.dotted for key in recipe_keys() if f"| `{key.name}` |" not in text] == []
    assert [line for line in text.splitlines() if line.strip().startswith("|") and line.count(" | ") < 3] == []
    assert "<" not in re.sub(r"`[^`]*`", "", text)  # nothing that a browser would read as HTML


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures():
    return script("pictures")


def test_every_picture_is_what_its_numbers_give(pictures):
    """If this fails, `python docs/pictures.py` draws them again."""
    drawn = pictures.pictures()
    assert {path.name for path in pictures.IMAGES.glob("*.svg")} == set(drawn)
    assert [name for name, svg in drawn.items() if (pictures.IMAGES / name).read_text(encoding="utf-8") != svg] == []


def test_the_numbers_of_the_demo_are_those_of_its_picture():
    dpo, shift = NUMBERS["1"], NUMBERS["0.75"]
    (numbers,) = re.findall(
        r"end ([\d.]+) nats below the SFT model, at a margin of ([\d.]+); "
        r"with plain DPO \(`dpo.shift_lambda=1.0`\) they end ([\d.]+) nats below it, at ([\d.]+)\.",
        page("README.md").replace("\n", " "),
    )
    assert numbers == tuple(
        f"{number:.2f}"
        for run in (shift, dpo)
        for number in (-run["displacement/chosen"][-1], run["rewards/margins"][-1])
    )
    told = [
        text for path in PAGES for text in re.findall(r"!\[[^]]*falls by ([\d.]+) nats with DPO", path.read_text())
    ]
    assert set(told) == {f"{-dpo['displacement/chosen'][-1]:.1f}"}


def test_the_factors_on_the_perplexity_are_right():
    rows = re.findall(
        r"^\| (-[\d.]+) \| (-[\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page("docs/negative_rewards.md"), re.MULTILINE
    )
    assert len(rows) == 5
    for reward, nats, short, long in rows:
        assert float(nats) == pytest.approx(float(reward) / 0.1)
        for factor, tokens in ((short, 20), (long, 200)):
            assert float(factor) == pytest.approx(math.exp(-float(nats) / tokens), rel=5e-3)
