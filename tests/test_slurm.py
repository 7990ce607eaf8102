"""recipes/accelerate/slurm.sh, with SLURM's environment and programs that stand in for its commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[1]
SCRIPT = "recipes/accelerate/slurm.sh"
PROGRAMS = {
    # Starts the command once for each node
    "srun": """
        for SLURM_NODEID in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
            export SLURM_NODEID
            "$@" &
        done
        code=0
        for job in $(jobs -p); do wait "$job" || code=$?; done
        exit "$code"
    """,
    "scontrol": """
        if [ "$1" = show ]; then printf 'node%s\\n' 7 8; else echo "$@" >"$OUT/queued"; fi
    """,
    "scancel": """
        echo "$@" >"$OUT/signaled"
        kill -TERM $(cat "$OUT"/pid-*)
    """,
    "accelerate": """
        printf '%s\\n' "$@" >"$OUT/accelerate-$SLURM_NODEID"
        echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >"$OUT/timeout"
        [ -z "${WAITS:-}" ] || { echo $$ >"$OUT/pid-$SLURM_NODEID"; exec sleep 60; }
    """,
}


@pytest.fixture
def cluster(tmp_path):
    """Environment of a job on two nodes of four GPUs."""
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    return {
        **os.environ,
        **job,
        "SLURM_GPUS_ON_NODE": "4",
        "OUT": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }


def start(environment, *arguments):
    command = ["bash", SCRIPT, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_each_node_launches_its_part_of_the_processes(cluster, tmp_path):
    job = start({**cluster, "LAUNCH_FILE": "recipes/accelerate/fsdp2.yaml"}, "my recipe.yaml", "seed=7")
    assert job.communicate(timeout=30) == ("", "")
    assert job.returncode == 0
    for rank in range(2):
        assert (tmp_path / f"accelerate-{rank}").read_text().splitlines() == [
            "launch", "--config_file", "recipes/accelerate/fsdp2.yaml", "--num_machines", "2", "--num_processes", "8",
            "--machine_rank", str(rank), "--main_process_ip", "node7", "--main_process_port", "23456",
            "--rdzv_backend", "static", "-m", "dposhift_trl.run", "my recipe.yaml", "seed=7",
        ]  # fmt: skip
    # The launcher gives up before SLURM does, which sends its signal 180 seconds before it kills
    assert int((tmp_path / "timeout").read_text()) < 180
    assert "--signal=B:TERM@180" in (REPOSITORY / SCRIPT).read_text()
    assert not (tmp_path / "queued").exists()


def test_a_job_that_has_to_stop_saves_and_is_queued_again(cluster, tmp_path):
    job = start({**cluster, "WAITS": "yes"}, "recipe.yaml")
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("pid-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.returncode != 0
    assert (tmp_path / "signaled").read_text() == "--signal=TERM 123456\n"
    assert (tmp_path / "queued").read_text() == "requeue 123456\n"


@pytest.mark.parametrize(
    ("arguments", "launch_file", "message"),
    [([], None, "usage: sbatch"), (["recipe.yaml"], "nowhere.yaml", "LAUNCH_FILE must be a file, got nowhere.yaml")],
)
def test_mistakes_are_told_before_anything_starts(arguments, launch_file, message, cluster, tmp_path):
    job = start(cluster | ({"LAUNCH_FILE": launch_file} if launch_file else {}), *arguments)
    assert message in job.communicate(timeout=30)[1]
    assert job.returncode == 2
    assert not list(tmp_path.glob("accelerate-*"))
