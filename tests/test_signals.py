"""What stops a run, and what does not: signals, in this process and in the trees that users have, and closed pipes."""

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from kill_and_resume import differences
from test_run import ENVIRONMENT, history, write_recipe

from dposhift_trl import ChosenSFTTrainer, DPOShiftTrainer, command
from dposhift_trl.command import Terminated, handling
from dposhift_trl.pipeline import signals
from dposhift_trl.pipeline.signals import SaveOnSignal
from dposhift_trl.run import main as main


RUN = [sys.executable, "-m", "dposhift_trl.run"]
ENDLESS = ["sft=null", "dpo.max_steps=100000", "dpo.save_steps=100000", "dpo.eval_strategy=no", "dpo.logging_steps=1"]


@pytest.fixture
def recipe(tmp_path, tiny_model):
    return write_recipe(tmp_path, tiny_model)


@pytest.fixture
def no_echo(monkeypatch):
    monkeypatch.setattr(signals, "ECHO", 0.0)


@pytest.fixture
def once(monkeypatch):
    """Raise a signal in this process in the first call of a method for which a condition holds."""

    def arm(owner, method, condition=lambda self: True, number=signal.SIGTERM):
        original, armed = getattr(owner, method), [True]

        def replacement(self, *args, **kwargs):
            if armed and condition(self):
                armed.clear()
                signal.raise_signal(number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, replacement)

    return arm


def logged(folder):
    """Step and kind of each entry of a log, without the summary of `train`."""
    entries = [entry for entry in history(folder) if "train_runtime" not in entry]
    return [(entry["step"], "eval_loss" in entry) for entry in entries]


# When a signal is obeyed


def in_training():
    callback = SaveOnSignal()
    callback.in_training = True
    return callback


def test_outside_of_training_every_signal_stops_at_once():
    for number in command.SIGNALS:
        with pytest.raises(Terminated, match=f"Stopped by {number.name} outside of training. Run the") as stopped:
            SaveOnSignal().receive(number)
        assert stopped.value.code == 128 + number


def test_in_training_only_a_second_ctrl_c_stops_at_once(no_echo, capfd):
    callback = in_training()
    callback.receive(signal.SIGINT)
    assert "Press Ctrl-C again to stop at once." in capfd.readouterr().err
    for number in (signal.SIGTERM, signal.SIGHUP):  # as from a launcher that has ended
        callback.receive(number)
    assert callback.received == signal.SIGINT
    with pytest.raises(Terminated, match="Stopped by SIGINT without saving"):
        callback.receive(signal.SIGINT)


def test_a_signal_that_arrives_twice_counts_once():
    callback = in_training()
    for _ in range(2):
        callback.receive(signal.SIGINT)
    outside = SaveOnSignal()
    with pytest.raises(Terminated):
        outside.receive(signal.SIGINT)
    outside.receive(signal.SIGTERM)  # while the first one is ending the command


@pytest.mark.parametrize("number", command.SIGNALS)
def test_every_other_command_is_stopped_with_one_line(number, capsys):
    def work():
        signal.raise_signal(number)
        pytest.fail("not stopped")

    assert command.call(work) == 128 + number
    assert capsys.readouterr().err == f"Stopped by {number.name}. Run the same command again.\n"


def test_what_is_ignored_stays_ignored_and_handlers_are_restored():
    received = []
    earlier = [signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGINT)]
    try:
        with handling(received.append):
            for number in command.SIGNALS:
                signal.raise_signal(number)
        assert received == [signal.SIGINT, signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == earlier[1]
    finally:
        signal.signal(signal.SIGHUP, earlier[0])


def test_a_forked_worker_leaves_ctrl_c_to_its_parent_and_can_be_ended():
    script = """
        import os, signal, time
        from dposhift_trl.command import handling
        with handling(lambda number: print("parent", number)):
            worker = os.fork()
            if worker == 0:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
                print("not ended")
                os._exit(0)
            print(os.waitpid(worker, 0)[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(int(signal.SIGTERM))]


def test_a_signal_during_an_evaluation_saves_after_it_without_another_step(recipe, tmp_path, here, once):
    options = ["sft.save_steps=100", "dpo.save_steps=100"]
    here(recipe, *options, f"output_dir={tmp_path / 'whole'}")
    for stage, trainer_class in (("sft", ChosenSFTTrainer), ("dpo", DPOShiftTrainer)):
        once(trainer_class, "prediction_step", lambda self: self.state.global_step == 4, signal.SIGHUP)
        done = here(recipe, *options, code=129)
        assert done.err.splitlines()[-1] == (
            f"{stage}: stopped by SIGHUP, saved at step 4. Run the same command again to continue."
        )
    here(recipe, *options)
    assert differences(tmp_path / "run", tmp_path / "whole") == []


def test_a_signal_while_a_checkpoint_is_saved_stops_after_it(recipe, tmp_path, here, once):
    once(DPOShiftTrainer, "_save_checkpoint")
    done = here(recipe, "sft=null", code=143)
    assert "dpo: stopped by SIGTERM, saved at step 2." in done.err


def test_a_signal_during_the_evaluation_before_the_first_step_stops_at_once(recipe, tmp_path, here, once):
    once(DPOShiftTrainer, "prediction_step")
    done = here(recipe, "sft=null", code=143)
    assert done.err.splitlines()[-1].startswith("Stopped by SIGTERM outside of training.")
    assert not [*(tmp_path / "run" / "dpo").glob("checkpoint-*")]


EPOCHS = ["dpo.max_steps=-1", "dpo.num_train_epochs=2", "dpo.eval_strategy=epoch"]  # 5 steps per epoch
BEST = ["dpo.save_strategy=best", "dpo.metric_for_best_model=shift/lambda", "dpo.greater_is_better=true"]  # the first


@pytest.mark.parametrize(
    ("options", "method", "step", "saved"),
    [
        pytest.param([*EPOCHS, "dpo.save_strategy=epoch"], "training_step", 2, 3, id="within an epoch"),
        pytest.param([*EPOCHS, "dpo.save_strategy=epoch"], "training_step", 4, 5, id="at the end of an epoch"),
        pytest.param([*EPOCHS, *BEST], "prediction_step", 5, 6, id="evaluating an epoch, without a new best"),
        pytest.param(
            ["dpo.eval_steps=1", "dpo.logging_strategy=epoch", *BEST], "training_step", 2, 3, id="without a new best"
        ),
    ],
)
def test_a_stopped_run_logs_and_evaluates_at_the_same_steps(
    options, method, step, saved, recipe, tmp_path, here, once
):
    here(recipe, "sft=null", *options, f"output_dir={tmp_path / 'whole'}")
    once(DPOShiftTrainer, method, lambda self: self.state.global_step == step)
    done = here(recipe, "sft=null", *options, code=143)
    assert f"dpo: stopped by SIGTERM, saved at step {saved}." in done.err
    again = here(recipe, "sft=null", *options)
    assert f"resuming from {tmp_path / 'run' / 'dpo' / f'checkpoint-{saved}'}" in again.out
    assert logged(tmp_path / "run" / "dpo") == logged(tmp_path / "whole" / "dpo")


def test_a_signal_while_the_checkpoint_is_loaded_stops_at_once(recipe, here, once):
    once(DPOShiftTrainer, "training_step", lambda self: self.state.global_step == 3)
    here(recipe, "sft=null", code=143)
    once(DPOShiftTrainer, "_load_from_checkpoint")
    assert "Stopped by SIGTERM outside of training." in here(recipe, "sft=null", code=143).err
    assert "The model is in" in here(recipe, "sft=null").out


def test_a_signal_while_stage_1_saves_its_model_stops_before_stage_2(recipe, tmp_path, here, once):
    once(ChosenSFTTrainer, "save_state", number=signal.SIGINT)
    done = here(recipe, code=130)
    assert done.err.splitlines()[-1].startswith("Stopped by SIGINT outside of training.")
    assert not (tmp_path / "run" / "dpo").exists()
    assert "The model is in" in here(recipe).out


# Streams


def test_a_console_that_goes_away_costs_nothing(tmp_path):
    script = f"""
        import os, sys
        from dposhift_trl.command import begin
        begin()
        for stream in (sys.stdout, sys.stderr):
            print("é" * 100000, file=stream, flush=True)
        own = open({str(tmp_path / "own")!r}, "w")
        own.write("kept")
        print("more")
        sys.exit(7 if own.fileno() > 2 else "a standard stream's number was taken")
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    python = f"{sys.executable} {tmp_path / 'script.py'}"
    for ends in ("2>&1 | true", "<&- >&- 2>&-", "> /dev/full 2>&1", ">&- 2> /dev/full"):
        line = f"{python} {ends}; exit ${{PIPESTATUS[0]}}"
        assert subprocess.run(["bash", "-c", line], env=ENVIRONMENT, timeout=60).returncode == 7, ends
        assert (tmp_path / "own").read_text() == "kept"


def test_run_goes_on_when_the_reader_of_its_output_has_gone(recipe, tmp_path):
    line = f"{' '.join(RUN)} {recipe} sft=null 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert json.loads((tmp_path / "run" / "dpo" / "finished.json").read_text())["step"] == 6


# Trees of processes


def wait_for(condition, process=None):
    deadline = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None, "the command has ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_launcher_is_known_by_its_command_line(tmp_path):
    sleep = "import sys, time; time.sleep(60)"
    (tmp_path / "accelerate").write_text(sleep)
    (tmp_path / "train.py").write_text(sleep)
    script, other = str(tmp_path / "accelerate"), str(tmp_path / "train.py")
    cases = {
        (sys.executable, script, "launch", "-m", "dposhift_trl.run"): True,
        (sys.executable, "-u", script, "launch"): True,
        (sys.executable, other, "-m", "dposhift_trl.run", "output_dir=runs/accelerate"): False,
        ("bash", "-c", "sleep 60; true", "accelerate"): False,
    }
    for words, expected in cases.items():
        with subprocess.Popen(words, stdin=subprocess.DEVNULL) as process:
            wait_for(lambda pid=process.pid, name=words[0]: name in Path(f"/proc/{pid}/cmdline").read_text())
            assert command._is_launcher(process.pid) is expected, words
            process.kill()


def test_sigterm_to_the_launcher_alone_saves_the_run_that_it_has_launched(recipe, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", *RUN[2:], str(recipe), *ENDLESS]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        launcher = subprocess.Popen(launch, env=ENVIRONMENT, stdout=stream, stderr=subprocess.STDOUT)
    wait_for(lambda: "\nstep " in log.read_text(), launcher)
    launcher.terminate()
    assert launcher.wait() == -signal.SIGTERM
    wait_for(lambda: "dpo: stopped by SIGTERM, saved at step" in log.read_text())
    assert [*(tmp_path / "run" / "dpo").glob("checkpoint-*/trainer_state.json")]


def test_a_closed_terminal_does_not_stop_a_run_under_nohup_and_ctrl_c_saves(recipe, tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["nohup", *RUN, str(recipe), *ENDLESS], env=ENVIRONMENT, stdout=stream, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    wait_for(lambda: "\nstep " in log.read_text(), process)
    process.send_signal(signal.SIGHUP)
    steps = log.read_text().count("\nstep ")
    wait_for(lambda: log.read_text().count("\nstep ") > steps + 2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    assert re.search(r"dpo: stopped by SIGINT, saved at step \d+. Run the same", log.read_text().splitlines()[-1])
    assert "Traceback" not in log.read_text()


def test_a_launcher_gets_sigterm_when_its_sweep_is_killed(recipe, tmp_path):
    """What it has launched then saves, as the test of the launcher shows."""
    stand_in = f"""
        import signal, sys, time
        from pathlib import Path
        def end(number, frame):
            Path({str(tmp_path / "ended")!r}).touch()
            sys.exit()
        signal.signal(signal.SIGTERM, end)
        Path({str(tmp_path / "ready")!r}).touch()
        time.sleep(300)
    """
    package = tmp_path / "stand_in" / "accelerate" / "commands"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "launch.py").write_text(textwrap.dedent(stand_in))
    script = (
        "import os, sys; from dposhift_trl.sweep import __main__ as sweep; "
        f"os.environ['PYTHONPATH'] = {str(tmp_path / 'stand_in')!r}; sweep.main(sys.argv[1:])"
    )
    sweep = subprocess.Popen(
        [sys.executable, "-c", script, str(recipe), "dpo.shift_lambda=1.0,0.5"], env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for((tmp_path / "ready").exists, sweep)
    sweep.kill()
    sweep.wait()
    wait_for((tmp_path / "ended").exists)
