"""Names and texts of users and strangers are printed as text, and do not act on a terminal."""

import doctest
import json
import warnings

import pytest
from test_report import make_run
from test_report import undrawn as undrawn
from torch.utils.data import DataLoader

from dposhift_trl import console
from dposhift_trl.artifacts import ArtifactError
from dposhift_trl.console import complain, ignore_warnings, one_line, printable, rewrite, say
from dposhift_trl.generate.__main__ import main as generate
from dposhift_trl.pipeline import processes
from dposhift_trl.pipeline.errors import RunError, WriteError
from dposhift_trl.report.__main__ import main as report
from dposhift_trl.report.run_folder import ReportError
from dposhift_trl.run import main as run


ESCAPES = "\x1b[31mred\x1b]0;title\x07\x9b2J\r\u202egnp.exe\u2028\x00"
SHOWN = r"\x1b[31mred\x1b]0;title\x07\x9b2J\r\u202egnp.exe\u2028\x00"
NAME = ESCAPES.replace("\x00", "")  # which a file can have
NAME_SHOWN = SHOWN.replace(r"\x00", "")


def test_the_examples_are_right():
    assert doctest.testmod(console) == (0, 1)


@pytest.mark.parametrize("text", ["größer", "你好", "🙂", "e\u0301", "a  b", "c:\\x", "'\"", ""])
def test_what_can_be_read_stays_as_it_is(text):
    assert printable(text) == text


def test_everything_else_is_escaped():
    assert printable(ESCAPES) == SHOWN
    assert printable("a\nb\tc") == r"a\nb\tc"
    assert one_line(" a\nb\tc " + ESCAPES) == "a b c " + SHOWN.replace(r"\r", " ").replace(r"\u2028", " ")


def test_lines_are_printed_each_on_its_own(capsys):
    say("a", 1, ESCAPES), complain(ValueError("x\x1b")), rewrite("y\x1b"), rewrite("")
    streams = capsys.readouterr()
    assert streams.out == f"a\n1\n{SHOWN}\n\r\033[Ky\\x1b\r\033[K"
    assert streams.err == "x\\x1b\n"


@pytest.mark.parametrize("speak", [say, complain])
def test_a_line_closes_the_open_one(speak, capsys):
    rewrite("27/60"), speak("done")
    streams = capsys.readouterr()
    assert streams.out + streams.err == "\r\033[K27/60\r\033[Kdone\n"
    speak("again")
    streams = capsys.readouterr()
    assert streams.out + streams.err == "again\n"


@pytest.mark.parametrize("error", [RunError, WriteError, ReportError], ids=lambda error: error.__name__)
def test_errors_are_one_line(error):
    assert str(error(f"a\n{ESCAPES}b")).isprintable()


def test_the_name_of_a_broken_file_is_escaped(tmp_path):
    assert str(ArtifactError(tmp_path / NAME, "x\x1b")) == f"{tmp_path}/{NAME_SHOWN} x\\x1b."


def test_a_run_speaks_on_its_main_process_only(capsys, monkeypatch):
    processes.say(NAME), processes.complain(RunError(NAME))
    spoken = capsys.readouterr()
    assert spoken.out == NAME_SHOWN + "\n"
    assert spoken.err.count("\n") == 1
    monkeypatch.setattr(processes.PartialState, "is_main_process", False)
    processes.say("a"), processes.complain(RunError("a"))
    assert capsys.readouterr() == ("", "")


def quiet(capfd):
    streams = capfd.readouterr()
    assert not set("\x1b\x9b\x07\u202e\u2028") & set(streams.out + streams.err)
    return streams


def test_a_folder_with_escapes_in_its_name_is_reported_on(tmp_path, capfd, undrawn):
    folder = make_run(tmp_path / NAME, pairs=3)
    (folder / "recipe.yaml").write_text(json.dumps({"run_name": NAME, NAME: 1}))
    assert report([str(folder)]) == 0
    assert f"The report is {tmp_path}/{NAME_SHOWN}/report/report.html" in quiet(capfd).out
    assert report([str(tmp_path / "a" / NAME)]) == 2
    assert NAME_SHOWN.split(r"\r")[0] in quiet(capfd).err


@pytest.mark.parametrize("key", ["output_dir", "run_name"])
@pytest.mark.parametrize("name", [*filter(None, NAME.split("red")), "a\tb", "a\nb"], ids=ascii)
def test_a_run_has_no_name_that_acts_on_a_terminal(key, name, tmp_path, capfd):
    recipe = {"output_dir": "a", "model": {"model_name_or_path": "demo"}, "data": {"path": "demo"}, "dpo": {}}
    (tmp_path / "x.yaml").write_text(json.dumps({**recipe, key: name}))
    assert run([str(tmp_path / "x.yaml")]) == 2
    error = quiet(capfd).err
    assert error == f"{tmp_path}/x.yaml: `{key}` must not contain control characters, got {name!r}. Remove them.\n"


def test_names_of_strangers_do_not_act_on_a_terminal(tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / NAME).write_text("")
    recipe = {
        "output_dir": str(tmp_path / "out"), "run_name": "größer", "model": {"model_name_or_path": NAME},
        "data": {"path": "demo"}, "dpo": {"bf16": False, "use_cpu": True, "report_to": "none"},
    }  # fmt: skip
    (tmp_path / "x.yaml").write_text(json.dumps(recipe))
    assert run([str(tmp_path / "x.yaml")]) == 2
    assert quiet(capfd).err.splitlines()[-1].startswith("`output_dir` must be empty or a run folder, got ")
    assert run([str(tmp_path / "x.yaml"), "--dry-run"]) == 0
    assert "The rows cannot be counted" in quiet(capfd).out
    assert generate([str(tmp_path / NAME)]) == 2
    assert "which does not exist" in quiet(capfd).err


def test_a_warning_that_no_setting_caused_is_not_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        ignore_warnings()
        list(DataLoader([1, 2], pin_memory=True))
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["another"]
