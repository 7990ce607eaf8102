"""The environment variables of launchers and Accelerate, checked before anything reads them, or waits for others."""

import os


NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
# Without one of these, a process waits for the others for ever, or cannot say which of them it is
RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEBUG_MODE")
FLAG_VALUES = {"1", "0", "true", "false", "yes", "no", "on", "off", "t", "f", "y", "n"}


def launcher_mistakes() -> list[str]:
    """Environment variables that cannot be meant, one line for each; none in a process that a launcher started."""
    mistakes = [
        f"The environment variable {name} must be an integer, got {value!r}. Unset it; the launcher sets it."
        for name in NUMBERS
        if (value := os.environ.get(name)) and not value.removeprefix("-").isdecimal()
    ]
    mistakes += [
        f"The environment variable {name} must be true or false, got {value!r}. Unset it."
        for name in FLAGS
        if (value := os.environ.get(name)) and value.lower() not in FLAG_VALUES
    ]
    if mistakes:
        return mistakes
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    missing = [name for name in RENDEZVOUS if not os.environ.get(name)]
    if processes > 1 and missing:
        return [
            f"The environment variable WORLD_SIZE is {processes} without {', '.join(missing)}, so this process would "
            "wait for others that do not come. Start them with `accelerate launch`, or unset WORLD_SIZE."
        ]
    if processes > 1 and not 0 <= int(os.environ["RANK"]) < processes:
        return [
            f"The environment variable RANK must be less than WORLD_SIZE ({processes}), got {os.environ['RANK']}. "
            "Unset both; the launcher sets them."
        ]
    return []


def lone_process() -> str | None:
    """What to do if `accelerate launch` was asked for several processes and has started one; `None` otherwise."""
    asked_for_several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if not asked_for_several or os.environ.get("WORLD_SIZE"):
        return None
    return (
        "`accelerate launch` was asked for several processes, and has started one: without several GPUs it starts no "
        "more. For two processes on this machine's CPU, write `torchrun --standalone --nproc_per_node 2 -m` instead."
    )
