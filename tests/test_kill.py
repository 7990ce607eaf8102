"""SIGKILL at random moments; `kill_and_resume.py` is the long version."""

from kill_and_resume import kill_and_resume


def test_a_run_killed_at_random_moments_ends_like_one_left_alone(tmp_path):
    phases, wrong = kill_and_resume(tmp_path, tmp_path, kills=2, seed=3, faults=("kill",), subjects=("full",))
    assert not wrong
    assert phases.total() == 2
