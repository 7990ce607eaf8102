"""The lambda controller: on simulated plants with a known equilibrium, and in training."""

import itertools
import math
import random

import pytest
import torch
from conftest import make_rows

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.training.adaptive import GAIN, LambdaController
from dposhift_trl.training.callbacks import AdaptiveLambdaCallback


ROWS, EVAL_ROWS = make_rows(48), make_rows(8, seed=1)


def controller(target=0.0, **changes):
    values = {"lambda_min": 0.25, "lambda_max": 1.0, "smoothing_steps": 10.0, "integral_steps": 50.0}
    return LambdaController(target, **{**values, **changes})


def simulate(loop, fall, lift, steps=600, noise=0.0, seed=0):
    """
    A log-ratio, in standard deviations, that falls by `fall` and rises by `lift * (1 - lambda)` at each step.

    It is in equilibrium at lambda = 1 - fall / lift.
    """
    rng, chosen, lambdas, chosens = random.Random(seed), 0.0, [], []
    for _ in range(steps):
        shift_lambda = loop.update(loop.target - chosen - noise * rng.gauss(0, 1), 1.0)
        chosen += lift * (1 - shift_lambda) - fall
        lambdas.append(shift_lambda)
        chosens.append(chosen)
    return lambdas, chosens


@pytest.mark.parametrize("target", [0.0, -2.0, 1.0])
@pytest.mark.parametrize(("fall", "lift"), [(0.05, 0.2), (0.02, 0.06), (0.01, 0.02), (0.05, 0.08)])
def test_it_finds_the_lambda_that_holds_the_target(fall, lift, target):
    lambdas, chosens = simulate(controller(target), fall, lift, steps=1500)
    assert lambdas[-1] == pytest.approx(1 - fall / lift, abs=5e-3)
    assert chosens[-1] == pytest.approx(target, abs=2e-2)
    # Damped: after the first approach, the deviation stays below half of its maximum
    assert max(abs(x - target) for x in chosens[400:]) < 0.5 * max(abs(x - target) for x in chosens[:400]) + 1e-6


def test_without_the_proportional_term_the_log_ratio_keeps_oscillating():
    """Pure dual ascent on a log-ratio that integrates lambda does not converge, hence the proportional term."""

    class Integral(LambdaController):
        @property
        def shift_lambda(self):
            return 1 / (1 + self.integral)

    _, chosens = simulate(Integral(0.0, 0.25, 1.0, 10.0, 50.0), 0.05, 0.2)
    assert max(map(abs, chosens[500:])) > 1.0


def test_with_noise_lambda_stays_near_its_equilibrium_and_moves_slowly():
    lambdas, chosens = simulate(controller(), 0.05, 0.2, noise=0.25)
    assert sum(lambdas[200:]) / 400 == pytest.approx(0.75, abs=0.02)
    assert sum(chosens[200:]) / 400 == pytest.approx(0.0, abs=0.1)
    moves = [abs(a - b) for a, b in itertools.pairwise(lambdas)]
    assert max(moves) < 0.2
    assert sum(moves) / len(moves) < 0.04


@pytest.mark.parametrize("shortfall", [-1e9, -3.0, 0.0, 3.0, 1e9])
def test_lambda_stays_within_its_bounds_without_integral_windup(shortfall):
    loop = controller(lambda_min=0.4, lambda_max=0.9)
    for _ in range(500):
        assert 0.4 <= loop.update(shortfall, 1.0) <= 0.9
    bound = 0.4 if shortfall > 0 else 0.9
    assert loop.shift_lambda == pytest.approx(bound)
    # It leaves the bound within the smoothing, however long it was there
    if abs(shortfall) == 3.0:
        for _ in range(20):
            loop.update(-shortfall, 1.0)
        assert loop.shift_lambda != pytest.approx(bound)


def test_the_first_step_has_the_value_computed_by_hand():
    loop = controller()
    assert loop.shift_lambda == 1.0
    assert loop.update(0.2, 2.0) == pytest.approx(1 / (1 + GAIN * 0.01 / 50 + GAIN * 0.01), rel=1e-12)


def test_pairs_with_equal_log_ratios_leave_lambda_unchanged():
    loop = controller()
    assert loop.update(0.0, 0.0) == 1.0
    assert loop.update(0.0, 0.0) == 1.0


def test_lambda_does_not_depend_on_the_unit_of_the_log_ratio():
    nats, tokens = controller(), controller()
    for step in range(50):
        shortfall = math.sin(step / 7)
        assert nats.update(30 * shortfall, 30 * 1.5) == pytest.approx(tokens.update(shortfall, 1.5), rel=1e-9)


def test_the_gradient_is_that_of_the_lagrangian():
    """With lambda = 1 / (1 + nu / c), the gradients of constrained DPO and of DPO-Shift differ only by a factor."""
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, -0.4))
    shift_lambda, beta = 0.6, 0.5
    z = beta * (chosen - shift_lambda * rejected)
    shift = torch.autograd.grad(-torch.nn.functional.logsigmoid(z), (chosen, rejected))
    c = beta * torch.sigmoid(-z).item()
    nu = c * (1 / shift_lambda - 1)
    assert [g.item() / shift_lambda for g in shift] == pytest.approx([-c - nu, c], rel=1e-12)


def train(model, settings, folder, resume=None, callbacks=None, **changes):
    args = DPOShiftConfig(
        **{**settings, "output_dir": str(folder), "max_steps": 12},
        **{"lambda_schedule": "adaptive", "lambda_min": 0.5, "beta": 0.5, "learning_rate": 3e-2, **changes},
    )
    trainer = DPOShiftTrainer(model, args=args, train_dataset=ROWS, eval_dataset=EVAL_ROWS, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def lambdas(trainer):
    return [entry["shift/lambda"] for entry in trainer.state.log_history if "shift/lambda" in entry]


@pytest.mark.parametrize("metric", ["displacement/chosen", "displacement/chosen_fell"])
def test_training_moves_lambda_according_to_its_metric(metric, tiny_model, settings, tmp_path):
    del settings["learning_rate"], settings["max_steps"]
    target = 0.0 if metric == "displacement/chosen" else 0.3
    seen = []
    observe = AdaptiveLambdaCallback.observe

    class Spy(AdaptiveLambdaCallback):
        def observe(self, matrix):
            seen.append((matrix[:, 0] - matrix[:, 2]).double())
            observe(self, matrix)

    callback = Spy(target, metric, 0.5, 1.0)
    trainer = train(tiny_model, settings, tmp_path / "run", lambda_schedule="fixed", callbacks=[callback])
    loop = LambdaController(target, 0.5, 1.0, 5.0, 20.0)
    expected = [loop.shift_lambda]
    for chosen in seen:
        if metric == "displacement/chosen":
            expected.append(loop.update(target - chosen.mean().item(), chosen.std(correction=0).item()))
        else:
            expected.append(loop.update((chosen < 0).double().mean().item() - target, 0.5))
    assert lambdas(trainer) == pytest.approx(expected[:12], rel=1e-9)
    assert min(lambdas(trainer)) < 0.95
    assert len(set(lambdas(trainer))) > 2


def test_a_resumed_run_uses_the_same_lambdas_bit_for_bit(tiny_model, settings, tmp_path):
    del settings["learning_rate"], settings["max_steps"], settings["save_strategy"]
    whole = train(tiny_model, settings, tmp_path / "whole", save_strategy="steps", save_steps=5)
    for restore in (False, True):
        resumed = train(
            tiny_model, settings, tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-5"),
            save_strategy="no", restore_callback_states_from_checkpoint=restore,
        )  # fmt: skip
        assert lambdas(resumed) == lambdas(whole)
        for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(left, right)


def test_accumulated_batches_count_as_one_measurement(tiny_model, settings, tmp_path):
    del settings["learning_rate"], settings["max_steps"]
    found = []
    for batch, steps in ((4, 1), (2, 2)):
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "optim": "sgd"}
        found.append(lambdas(train(tiny_model, {**settings, **changes}, tmp_path / f"{batch}")))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lambda_target": "0"}, TypeError, "`lambda_target` must be a number, got '0'."),
        ({"lambda_target": math.nan}, ValueError, "`lambda_target` must be finite, got nan."),
        ({"lambda_target_metric": "chosen"}, ValueError, "`lambda_target_metric` must be one of displacement/chosen,"),
        (
            {"lambda_target_metric": "displacement/chosen_fell", "lambda_target": -1.0},
            ValueError,
            "`lambda_target` must be in [0, 1] with `lambda_target_metric: displacement/chosen_fell`, which is a",
        ),
    ],
)
def test_an_invalid_target_is_an_error(changes, error, message, settings):
    with pytest.raises(error) as raised:
        DPOShiftConfig(**settings, lambda_schedule="adaptive", **changes)
    assert message in str(raised.value)
