"""
The architecture of the package: which module may import which, and what is written in one place only.

Every import counts: at module level, inside a function, and under `TYPE_CHECKING`. A module that imports another one
late, or only for its annotations, still cannot be understood without it. The only exception is the package's
`__init__`, which repeats its public names under `TYPE_CHECKING` because it imports them on first use.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from dposhift_trl import artifacts, columns
from dposhift_trl.schedules import ADAPTIVE, LAMBDA_SCHEDULE_ALIASES, LAMBDA_SCHEDULES


PACKAGE = Path(__file__).parent.parent / "dposhift_trl"

# Modules and sub-packages, lowest first. Each may import those below its line, not those beside or above it.
LAYERS = (
    ("console",),
    ("schedules", "losses", "intervals", "columns", "artifacts", "ranges", "choices", "launcher", "command"),
    ("integrity", "identity"),
    ("config", "environment", "hub"),
    ("scoring",),
    ("reference", "data"),
    ("report",),
    ("training",),
    ("recipe",),
    ("generate",),
    ("pipeline",),
    ("run", "sweep", "diagnose"),
    ("__main__",),
)

# Column names that are also everyday words of Hugging Face's libraries, and mean other things elsewhere
EVERYDAY_COLUMNS = {*columns.PREFERENCE_COLUMNS, *columns.TEMPLATE_COLUMNS, *columns.BATCH_KEYS}
# The name of a batch's key and of a setting of `DPOShiftConfig`
SETTING_AND_COLUMN = {columns.SHARED_PROMPT}


def constants(module) -> set[str]:
    """Strings that a module keeps under a name in capitals, alone or in a tuple."""
    values = [value for name, value in vars(module).items() if name.isupper() and isinstance(value, (str, tuple))]
    return {text for value in values for text in ([value] if isinstance(value, str) else value)}


COLUMNS = constants(columns) - EVERYDAY_COLUMNS - SETTING_AND_COLUMN
FILES = constants(artifacts)
SCHEDULE_NAMES = {*LAMBDA_SCHEDULES, *LAMBDA_SCHEDULE_ALIASES, ADAPTIVE}


def sources() -> dict[str, ast.Module]:
    """Syntax tree of each module, by its dotted name inside the package; `""` is the package's `__init__`."""
    trees = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return trees


SOURCES = sources()
PACKAGES = {".".join(path.parent.relative_to(PACKAGE).parts) for path in PACKAGE.rglob("__init__.py")}


def imported(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of each module of this package that a module imports."""
    package = (PACKAGE.name, *filter(None, module.split(".")))
    package = package if module in PACKAGES else package[:-1]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*above, *filter(None, [node.module])))
            # `from package import name` takes a module where there is one of this name, else what the package holds
            names = [f"{origin}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "import_module":
            words = [word.value for word in node.args if isinstance(word, ast.Constant)]
            names = [".".join((*package, word[1:])) if word.startswith(".") else word for word in words]
        for name in names:
            first, *inner = name.split(".")
            if first == PACKAGE.name:
                found = ".".join(inner)
                yield node.lineno, found if found in SOURCES else ".".join(inner[:-1])


def import_graph() -> dict[str, dict[str, int]]:
    """Modules that each module imports, with the line."""
    graph = {}
    for module, tree in SOURCES.items():
        if module == "":
            tree = ast.Module([node for node in tree.body if ast.unparse(node)[:17] != "if TYPE_CHECKING:"], [])
        graph[module] = {name: line for line, name in imported(module, tree)}
    return graph


GRAPH = import_graph()
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def room(module: str) -> str:
    return module.split(".")[0]


def upward(module: str, target: str) -> bool:
    """Whether an import leaves its sub-package for a layer that is not below. Every module may read `__version__`."""
    return target != "" and room(module) != room(target) and RANKS[room(module)] <= RANKS[room(target)]


def test_the_graph_sees_every_way_to_import():
    text = """
from .. import __version__
from ..losses import dpo_shift_loss
from . import seam
import dposhift_trl.config as config
if TYPE_CHECKING:
    from .trainer import DPOShiftTrainer
def late():
    from ..report.page import write_report
    import_module("..run", "dposhift_trl.training"), import_module("dposhift_trl.sweep")
"""
    found = {name for _, name in imported("training.metrics", ast.parse(text))}
    assert found >= {"", "losses", "training.seam", "config", "training.trainer", "report.page", "sweep"}
    assert {name for _, name in imported("report", ast.parse("from .page import write_report"))} == {"report.page"}
    assert GRAPH["training.callbacks"].keys() >= {"schedules", "training.adaptive", "training.metrics"}


def test_every_module_has_a_layer():
    assert {room(module) for module in SOURCES} - {""} == set(RANKS), "add a new module to LAYERS where it belongs"


def test_no_import_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_imports_go_to_lower_layers_only():
    arrows = [
        f"{module}:{line} imports {target}"
        for module, targets in GRAPH.items()
        for target, line in targets.items()
        if module == "" or upward(module, target)
    ]
    assert arrows == []


def test_an_upward_import_is_seen():
    assert upward("scoring.head", "training.trainer")
    assert upward("losses", "schedules")
    assert upward("report.page", "training.metrics")
    assert upward("data.audit", "reference.cache")
    assert not upward("training.trainer", "scoring.head")
    assert not upward("training.seam", "training.metrics")
    assert not upward("losses", "")


@pytest.mark.parametrize("name", ["schedules", "losses", "columns", "artifacts", "scoring", "report"])
def test_what_is_below_training_knows_no_trainer(name):
    names = [
        f"{module}:{node.lineno} {alias.name}"
        for module, tree in SOURCES.items()
        if room(module) == name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if alias.name.startswith("Trainer") or alias.name.endswith(("Trainer", "TrainingArguments", "DPOConfig"))
    ]
    assert names == []


HEAVY = {"torch", "transformers", "trl", "accelerate", "datasets", "peft", "scipy", "matplotlib", "pyarrow", "numpy"}


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("dposhift_trl", set()),
        ("dposhift_trl.__main__", set()),
        ("dposhift_trl.command", set()),
        ("dposhift_trl.schedules", set()),
        ("dposhift_trl.columns", set()),
        ("dposhift_trl.console", set()),
        ("dposhift_trl.losses", {"torch", "numpy"}),
        ("dposhift_trl.artifacts", {"pyarrow", "numpy"}),
        ("dposhift_trl.integrity", {"pyarrow", "numpy"}),
        ("dposhift_trl.report.__main__", {"matplotlib", "pyarrow", "numpy", "scipy"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_needs_no_torch_does_not_import_it(name, allowed):
    code = f"import sys, {name}; print(*sorted({{module.split('.')[0] for module in sys.modules}}))"
    modules = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "dposhift_trl" in modules
    assert modules & HEAVY <= allowed


# What is written in one place


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes except docstrings and the text of f-strings, which is a name only at the end of a path."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        piece = isinstance(tree, ast.JoinedStr) and isinstance(child, ast.Constant) and "/" not in child.value
        if not (docstring or piece):
            yield from nodes(child)


def literals(tree: ast.Module) -> Iterator[ast.Constant]:
    return (node for node in nodes(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def column_literals(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names of columns as literals; `shared_prompt` only as the key of a batch, since it is a setting's name too."""
    yield from ((node.lineno, node.value) for node in literals(tree) if node.value in COLUMNS)
    for node in nodes(tree):
        keys: list[ast.AST] = []
        if isinstance(node, ast.Subscript):
            keys = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            keys = list(node.args[:1])
        for key in keys:
            if isinstance(key, ast.Constant) and key.value in SETTING_AND_COLUMN:
                yield node.lineno, key.value


def file_literals(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names of files as literals or at the end of a path; plain words, such as `report`, only as part of a path."""
    for node in literals(tree):
        if node.value.rsplit("/", 1)[-1] in {name for name in FILES if "." in name}:
            yield node.lineno, node.value
    words = {name for name in FILES if "." not in name}
    for node in nodes(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [node.right]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "joinpath":
            parts = list(node.args)
        for part in parts:
            if isinstance(part, ast.Constant) and part.value in words:
                yield node.lineno, part.value


def replaced_files(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Files moved into place: `path.replace(target)`, `rename`, `move`. The `replace` of a string takes two words."""
    for node in nodes(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        called, place = node.func.attr, ast.unparse(node.func.value)
        if (
            (called == "replace" and (place == "os" or (len(node.args) == 1 and not node.keywords)))
            or called in ("rename", "renames")
            or (called == "move" and place == "shutil")
        ):
            yield node.lineno, ast.unparse(node)


def lambda_readings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Comparisons of the schedule's setting: by its field, by a schedule's name, or by its type."""
    for node in nodes(tree):
        sides: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            sides = list(node.args[:1])
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        for side in sides:
            schedule = isinstance(side, ast.Attribute) and side.attr == "lambda_schedule"
            schedule |= isinstance(side, ast.Subscript) and ast.unparse(side.slice) == "'lambda_schedule'"
            names = ast.unparse(side).split(".")[-1] == "ADAPTIVE"
            names |= isinstance(side, ast.Constant) and side.value in SCHEDULE_NAMES
            if schedule or names:
                yield node.lineno, ast.unparse(node)
                break


def printed_lines(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines printed past `console`, which escapes what would act on a terminal."""
    for node in nodes(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
            yield node.lineno, ast.unparse(node)


ONE_PLACE = {
    "column names": (column_literals, {"columns"}),
    "names of a run's files": (file_literals, {"artifacts"}),
    "writing whole files": (replaced_files, {"artifacts"}),
    "reading lambda's schedule": (lambda_readings, {"schedules", "config"}),
    "printing": (printed_lines, {"console"}),
}


@pytest.mark.parametrize(("find", "home"), ONE_PLACE.values(), ids=ONE_PLACE)
def test_is_written_in_one_place(find, home):
    found = [
        f"{module}:{line} {text}"
        for module, tree in sorted(SOURCES.items())
        if module not in home
        for line, text in find(tree)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("find", "violations", "fine"),
    [
        (
            column_literals,
            ['rows["ref_chosen_logps"]', '("dposhift_row_index",)', 'f"{x[\'row_index\']}"', 'x.pop("shared_prompt")'],
            ['def f():\n    """row_index"""', 'row["chosen"]', '{"shared_prompt": bool}', 'print("no `row_index`")'],
        ),
        (
            file_literals,
            ['folder / "finished.json"', 'x.glob("*/recipe.yaml")', 'x / "report"', 'f"{x}/audit.json"'],
            ['"""recipe.yaml"""', 'recipe["report"]', 'print("see report.html there")', 'f"{key}.lock"'],
        ),
        (
            replaced_files,
            ["temporary.replace(path)", "os.replace(a, b)", "path.rename(other)", "shutil.move(a, b)"],
            ['text.replace("a", "b")', "dataclasses.replace(scores, rows=rows)", "replace(self, rows=rows)"],
        ),
        (
            lambda_readings,
            [
                'args.lambda_schedule == "fixed"',
                "schedule == ADAPTIVE",
                'schedule in ("a",) or name != "linear_increase"',
                "isinstance(dpo.lambda_schedule, str)",
                'settings["lambda_schedule"] is None',
                'match s:\n    case "adaptive":\n        pass',
            ],
            ["plan.adaptive == True", 'strategy == "epoch"', "LambdaPlan.of(vars(args))", "isinstance(args, Config)"],
        ),
        (
            printed_lines,
            ["print(error, file=sys.stderr)", "sys.stdout.write(line)"],
            ["say(line)", "complain(error)", '"""print(line)"""'],
        ),
    ],
    ids=ONE_PLACE,
)  # fmt: skip
def test_a_second_place_is_seen(find, violations, fine):
    assert [len(list(find(ast.parse(text)))) for text in violations] == [1] * len(violations)
    assert [list(find(ast.parse(text))) for text in fine] == [[]] * len(fine)
