"""SECURITY.md: each promise has tests, and they are there."""

import ast
import re
from pathlib import Path

import pytest


TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "SECURITY.md").read_text(encoding="utf-8")
PROMISES = re.findall(r"^\| ([^|]*) \|[^|]*\| ([^|]*) \|$", PAGE, re.MULTILINE)[2:]  # after the heading


def named(cell: str) -> list[tuple[str, str]]:
    return re.findall(r"`(test_\w+\.py)::(test_\w+)`", cell)


def test_the_page_has_its_promises():
    assert len(PROMISES) >= 10
    assert len(PAGE.splitlines()) < 60, "one page"


@pytest.mark.parametrize(("what", "cell"), PROMISES, ids=[what for what, _ in PROMISES])
def test_each_promise_is_held_by_tests_that_are_there(what, cell):
    assert named(cell)
    for file, name in named(cell):
        functions = {node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if hasattr(node, "name")}
        assert name in functions, f"{file}::{name}"


def test_every_test_that_the_page_names_belongs_to_a_promise():
    assert sum(len(named(cell)) for _, cell in PROMISES) == len(re.findall("`test_[^`]*`", PAGE))
