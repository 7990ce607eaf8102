"""One gather per step, and fewer reads from the device than in stock TRL."""

import pytest
import torch
from accelerate import Accelerator
from conftest import make_rows
from torch.utils._python_dispatch import TorchDispatchMode
from trl import DPOConfig, DPOTrainer

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer
from dposhift_trl.training.deferred import Deferred, GatherLater, read_from_device
from dposhift_trl.training.metrics import PairScores


class Counter(TorchDispatchMode):
    """Counts operations that synchronize with the device: reading a number, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        by_mask = name == "aten::index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += by_mask or name in {"aten::_local_scalar_dense", "aten::nonzero"}
        return function(*args, **(kwargs or {}))


def reads_and_gathers_of_a_loss(trainer_class, config_class, model, settings, monkeypatch, **changes):
    """Counts for the second batch, because the checks of the first batch run once."""
    trainer = trainer_class(model, args=config_class(**settings, **changes), train_dataset=make_rows(8))
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]
    trainer.model.train()
    trainer.compute_loss(trainer.model, batches[0])
    gathers = []
    gather = Accelerator.gather  # which `gather_for_metrics` calls too
    monkeypatch.setattr(Accelerator, "gather", lambda self, x: gathers.append(x) or gather(self, x))
    # As on a GPU, where non-finite values are looked for only before a log or a checkpoint
    monkeypatch.setattr(DPOShiftTrainer, "_stop_on_non_finite", lambda self, mode, newest=False: None)
    with Counter() as counter:
        trainer.compute_loss(trainer.model, batches[1])
    return counter.count, len(gathers)


def test_a_loss_waits_3_times_and_gathers_once_where_trls_does_21_and_15_times(tiny_model, settings, monkeypatch):
    """TRL indexes the logits by a mask twice, and the CPU's fused head reads one number."""
    with monkeypatch.context() as patch:
        stock = reads_and_gathers_of_a_loss(DPOTrainer, DPOConfig, tiny_model, settings, patch)
    with monkeypatch.context() as patch:
        ours = reads_and_gathers_of_a_loss(DPOShiftTrainer, DPOShiftConfig, tiny_model, settings, patch)
    assert stock == (21, 15)
    assert ours == (3, 1)


def test_all_recorded_tensors_are_gathered_at_once_with_their_dtypes():
    later = GatherLater(Accelerator(cpu=True))
    count = later.gather_for_metrics(torch.tensor(7)).sum()
    total = later.gather(torch.tensor([0.1, 0.2], dtype=torch.float32)).sum()
    flags = later.gather(torch.tensor([True, False])).sum()
    assert count > 0
    mean = (total / count).item()
    tokens = 5 + count.item() // 2
    assert isinstance(mean, Deferred)
    matrix = torch.arange(6.0).view(3, 2)
    (gathered,), value_of = later.resolve(matrix)
    assert torch.equal(gathered, matrix)
    # Divided in float32 as in TRL, then converted to a Python number
    assert value_of(mean).item() == (torch.tensor([0.1, 0.2]).sum() / torch.tensor(7)).item()
    assert value_of(mean).dtype == torch.float64
    assert (value_of(tokens).item(), value_of(flags).item(), value_of("kept")) == (8, 1, "kept")


def test_a_mean_over_zero_tokens_is_zero_as_in_trl():
    later = GatherLater(Accelerator(cpu=True))
    total, count = later.gather(torch.tensor(0.0)).sum(), later.gather(torch.tensor(0)).sum()
    value = (total / count).item()
    assert later.resolve(torch.zeros(1))[1](value).item() == 0.0


def test_a_comparison_that_would_synchronize_is_an_error():
    with pytest.raises(NotImplementedError, match="can only be compared with 0, got a comparison with 1"):
        _ = GatherLater(Accelerator(cpu=True)).gather(torch.ones(1)) > 1


class WithoutFloat64(torch.Tensor):
    """A CPU tensor that behaves like a tensor on Apple's GPU, which has no float64."""

    device = torch.device("mps")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(function, types, args, kwargs or {})
        if torch.is_tensor(result) and result.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
            )
        return result


def on_mps(values):
    return torch.tensor(values).as_subclass(WithoutFloat64)


def test_metrics_are_read_from_a_device_without_float64():
    metrics = {"loss": [on_mps(0.5), 2.0, on_mps(0.25)], "num_tokens": [on_mps(7)], "empty": []}
    read_from_device(metrics)
    assert metrics == {"loss": [0.5, 2.0, 0.25], "num_tokens": [7.0], "empty": []}
    with pytest.raises(TypeError, match="doesn't support float64"):
        on_mps(0.5).double()


def test_gathers_and_scores_are_read_from_a_device_without_float64():
    later = GatherLater(Accelerator(cpu=True))
    mean = (later.gather(on_mps([3.0])).sum() / later.gather(on_mps([2])).sum()).item()
    (gathered,), value_of = later.resolve(on_mps([[1.0, 2.0]]))
    assert (gathered.tolist(), value_of(mean).tolist()) == ([[1.0, 2.0]], 1.5)
    fields = [on_mps([float(place)]) for place in range(9)]
    scores = PairScores.from_matrices([PairScores(*fields).as_matrix()])
    assert (scores.rejected_logps.tolist(), scores.row_index.dtype) == ([1.0], torch.float64)
