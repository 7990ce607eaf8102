"""SIGKILL at random moments; `kill_and_resume.py` is the long version."""

from kill_and_resume import kill_and_resume


def test_a_run_killed_at_random_moments_ends_like_one_left_alone(tmp_path):
    phases, faults = kill_and_resume(tmp_path, kills=2, seed=3)
    assert not faults
    assert phases.total() == 2
