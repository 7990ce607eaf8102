#!/usr/bin/env bash
# Simulates two machines with two connected network namespaces and trains the demo on both with the launch file in
# recipes/accelerate, without GPUs. Checks that two machines log what one process logs, and the same with FSDP2; that
# the other machine stops if one fails, and the same command resumes from the last complete checkpoint and ends with the
# same weights; that a run survives ten seconds without network; and that machines without a shared run folder are
# refused. Takes about eight minutes on two cores.
#
#   sudo env PATH="$PATH" tests/two_machines.sh
set -euo pipefail
cd "$(dirname "$0")/.."

skip() { echo "skipped: $*"; exit 77; }
fail() { echo "FAILED: $*" >&2; grep -h "Error" "$work"/*.log >&2; exit 1; }
[ "$(id -u)" = 0 ] || skip "making network namespaces needs root"
command -v ip >/dev/null || skip "ip is missing: apt-get install iproute2"

work=$(mktemp -d)
spaces=("dposhift-$$-0" "dposhift-$$-1")
cables=("ds0-$$" "ds1-$$")
clean_up() {
    for space in "${spaces[@]}"; do
        ip netns pids "$space" 2>/dev/null | xargs --no-run-if-empty kill -KILL 2>/dev/null || true
        ip netns delete "$space" 2>/dev/null || true # also removes its end of the cable
    done
    rm -rf "$work"
}
trap clean_up EXIT

ip netns add "${spaces[0]}" 2>/dev/null || skip "network namespaces are not permitted here"
ip netns add "${spaces[1]}"
ip link add "${cables[0]}" netns "${spaces[0]}" type veth peer name "${cables[1]}" netns "${spaces[1]}" ||
    skip "veth pairs are not permitted here"
for rank in 0 1; do
    ip -n "${spaces[rank]}" address add "10.77.0.$((rank + 1))/24" dev "${cables[rank]}"
    ip -n "${spaces[rank]}" link set lo up
    ip -n "${spaces[rank]}" link set "${cables[rank]}" up
done

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
# SGD, since Adam amplifies rounding differences from the order of summation to whole steps
settings=(recipes/tiny_shift.yaml {sft,dpo}.{optim=sgd,report_to=none,logging_steps=1,disable_tqdm=true}
    sft.max_steps=6 sft.eval_steps=3 sft.save_steps=3
    dpo.learning_rate=1e-2 dpo.max_steps=24 dpo.eval_steps=12 dpo.save_steps=6)
halves=(sft.per_device_train_batch_size=16 dpo.per_device_train_batch_size=8)
launch=(--config_file recipes/accelerate/two_machines.yaml)
program=(-m dposhift_trl.run)

start() { # RUN [COMMAND...]: run the command on both machines, on the second through COMMAND; sets $machines
    machines=()
    for rank in 0 1; do
        local by_way_of=(env GLOO_SOCKET_IFNAME="${cables[rank]}")
        [ "$rank" = 0 ] || by_way_of+=("${@:2}")
        ip netns exec "${spaces[rank]}" "${by_way_of[@]}" accelerate launch \
            "${launch[@]}" --num_processes 2 --machine_rank "$rank" --main_process_ip 10.77.0.1 \
            "${program[@]}" "${settings[@]}" "${halves[@]}" output_dir="$work/$1" >"$work/$1-$rank.log" 2>&1 &
        machines+=($!)
    done
}
finish() { # RUN: both machines succeed
    for rank in 0 1; do wait "${machines[rank]}" || fail "$1: machine $rank ended with $?"; done
}
await() { # FILE: wait until it exists
    for _ in {1..1200}; do [ -e "$1" ] && return; sleep 0.1; done
    fail "$1 was not written"
}
ends_badly() { # RANK: the machine stops by itself within two minutes, with an error
    local since=$SECONDS
    while kill -0 "${machines[$1]}" 2>/dev/null; do
        ((SECONDS - since < 120)) || fail "machine $1 still runs two minutes after the fault"
        sleep 0.2
    done
    ! wait "${machines[$1]}" || fail "machine $1 succeeded"
    [ -z "$(ip netns pids "${spaces[$1]}")" ] || fail "machine $1 left processes behind"
    echo "  machine $1 ended by itself after $((SECONDS - since)) s"
}
compare() { # RUN RUN TOLERANCE: logs agree within it; with 0, weights are also equal bit for bit
    python - "$work/$1" "$work/$2" "$3" <<'PYTHON' || fail "$1 and $2 differ"
import json, re, sys
from pathlib import Path
import torch
from safetensors.torch import load_file

CLOCKS = "_runtime|_per_second|num_tokens"
# Means of batch means in TRL, which depend on the number of batches, and shares of pairs, which depend on the sign of
# rounding errors near the reference
INEXACT = "entropy|mean_token_accuracy|logits/|accuracies|chosen_fell"
*runs, tolerance = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
worst = count = 0
for stage in ("sft", "dpo"):
    logs = [json.loads((run / stage / "trainer_state.json").read_text())["log_history"] for run in runs]
    logs = [[entry for entry in log if "train_runtime" not in entry] for log in logs]
    assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]], stage
    for left, right in zip(*logs):
        for name in left.keys() & right.keys():
            if not re.search(f"{CLOCKS}|{INEXACT}" if tolerance else CLOCKS, name):
                count += 1
                # A log-ratio is as exact as the log-probabilities whose difference it is
                nats = max((abs(right[key]) for key in right if "logps/" in key), default=1)
                error = abs(left[name] - right[name]) / max(1, abs(right[name]), nats * ("displacement" in name))
                assert error <= tolerance, (stage, left["step"], name, left[name], right[name])
                worst = max(worst, error)
    if not tolerance:
        weights = [load_file(run / stage / "model.safetensors") for run in runs]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), f"weights of {stage}"
print(f"  {count} logged values compared, largest relative difference {worst:.1e}")
PYTHON
}

echo "two machines, and one process with the same global batch"
start two
finish two
python -m dposhift_trl.run "${settings[@]}" output_dir="$work/one" >"$work/one.log" 2>&1 || fail "one process"
compare two one 1e-6

echo "two machines with FSDP2"
one_model_each=("${launch[@]}") as_usual=("${program[@]}")
launch=(--config_file recipes/accelerate/fsdp2.yaml --num_machines 2 --main_process_port 29500 --rdzv_backend static)
program=(tests/sharded.py launched -m dposhift_trl.run)
start fsdp
finish fsdp
compare fsdp two 1e-5 # FSDP2 sums the norm of the gradients shard by shard
launch=("${one_model_each[@]}") program=("${as_usual[@]}")

for dies in 0 1; do
    echo "machine $dies is killed during training, and the same command is run again"
    run=killed-$dies
    start "$run"
    await "$work/$run/dpo/checkpoint-12/trainer_state.json"
    disown "${machines[dies]}"
    ip netns pids "${spaces[dies]}" | xargs kill -KILL
    ends_badly "$((1 - dies))"
    [ ! -e "$work/$run/dpo/finished.json" ] || fail "$run: finished before it was killed"
    start "$run"
    finish "$run"
    grep -q "^dpo: resuming from .*/checkpoint-[1-9]" "$work/$run-0.log" || fail "$run: did not resume"
    compare "$run" two 0
done

echo "no network for ten seconds"
start cut
await "$work/cut/dpo/checkpoint-12/trainer_state.json"
ip -n "${spaces[0]}" link set "${cables[0]}" down
sleep 10
ip -n "${spaces[0]}" link set "${cables[0]}" up
finish cut
compare cut two 0

echo "the run folder is not shared"
mkdir "$work/apart"
start apart unshare --mount bash -c "mount -t tmpfs none '$work/apart' && exec \"\$@\"" bash
ends_badly 0
ends_badly 1
grep -h "must be the same folder on every machine" "$work/apart-0.log" | sed "s|$work/||g; s/^/  /" || fail "apart: not refused"
echo "passed"
