import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_MODES, make_ode_block
from torch.utils._python_dispatch import TorchDispatchMode

from anode_exp.build import autocast_for
from anode_exp.data import WHOLE, Augmentation, EpochBatches, Normalisation, Split
from anode_exp.models import MODELS
from anode_exp.ode import TABLEAUX
from anode_exp.tasks.classification import Classification
from anode_exp.training.step import evaluate, train_step

CPU = torch.device("cpu")


class NoHostRead(TorchDispatchMode):
    """Raises at the operator behind item(), bool() and float() of a tensor, which waits for the device on CUDA."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a tensor's value was read on the host")
        return func(*args, **(kwargs or {}))


def batches(n=8, batch_size=4):
    split = Split(torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8), torch.arange(n) % 10)
    return EpochBatches(split, batch_size, Augmentation(4, True), Normalisation([0.5] * 3, [0.25] * 3, CPU), 0, 1)


def network(mode="dto_checkpoint", tableau="rk2", model="squeezenext"):
    torch.manual_seed(0)
    kwargs = {"width": 0.5} if model == "squeezenext" else {}
    return MODELS[model](10, make_ode_block(mode, tableau), **kwargs)


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def test_the_guard_works():
    with NoHostRead(), pytest.raises(AssertionError, match="read on the host"):
        bool(torch.ones(1) > 0)


@pytest.mark.parametrize(
    ("mode", "tableau", "precision"),
    [*itertools.product(IMAGE_MODES, ("rk2", "dopri5"), ["fp32"]), *((m, "rk2", "bf16") for m in IMAGE_MODES),
     *(("dto_checkpoint", t, "fp32") for t in TABLEAUX if t not in ("rk2", "dopri5"))],
)  # fmt: skip
def test_nothing_is_read_on_the_host(mode, tableau, precision):
    """Batch, forward, backward and optimiser, two steps: the optimiser's state is made in the first."""
    net = network(mode, tableau, "resnet4")
    optimizer, epoch = sgd(net), batches(n=4, batch_size=2)
    with NoHostRead():
        for images, labels in epoch:
            train_step(net, optimizer, autocast_for(precision, CPU), Classification(), (images, labels))


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_a_whole_step_runs_on_the_meta_device(mode):
    """It holds no values: a read on the host, or a tensor left on the CPU, is an error."""
    meta = torch.device("meta")
    net = network(mode, model="resnet4").to(meta)
    optimizer = sgd(net)
    split = Split(torch.empty(8, 32, 32, 3, dtype=torch.uint8, device=meta), torch.empty(8, dtype=int, device=meta))
    epoch = EpochBatches.__new__(EpochBatches)  # the meta device has no generator: its draws are given
    epoch.split, epoch.batch_size, epoch.flip, epoch.part = split, 4, True, WHOLE
    epoch.normalise = Normalisation([0.5] * 3, [0.25] * 3, meta)
    epoch.order, epoch.offsets = torch.empty(8, dtype=int, device=meta), torch.empty(2, 8, 1, dtype=int, device=meta)
    epoch.flips = torch.empty(8, 1, dtype=bool, device=meta)
    before = [p._version for p in net.parameters()]
    for images, labels in epoch:
        loss, sums = train_step(
            net, optimizer, lambda: torch.autocast("cpu", enabled=False), Classification(), (images, labels)
        )
        correct = sums["correct"]
        assert loss.is_meta and correct.is_meta and loss.shape == correct.shape == ()
    everything = [*net.parameters(), *(p.grad for p in net.parameters()), *net.buffers()]
    everything += [x for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
    assert all(x.is_meta for x in everything)
    assert all(p._version > v for p, v in zip(net.parameters(), before, strict=True)), "it trained"
    with pytest.raises(RuntimeError, match=r"(?i)meta"):
        float(loss)


@pytest.mark.parametrize("model", ["resnet10", "alexnet", "squeezenext"])
def test_nothing_is_read_on_the_host_of_other_networks(model):
    net = network("dto_checkpoint", "euler", model)
    with NoHostRead():
        train_step(
            net, sgd(net), autocast_for("fp32", CPU), Classification(), (torch.randn(2, 3, 32, 32), torch.arange(2))
        )


def test_one_step_is_sgd_written_out():
    net = network("full_backprop")
    twin = copy.deepcopy(net)
    images, labels = next(iter(batches()))
    optimizer = sgd(net)
    loss, sums = train_step(net, optimizer, autocast_for("fp32", CPU), Classification(), (images, labels))
    out = twin(images)
    expected = F.cross_entropy(out, labels)
    expected.backward()
    assert torch.equal(loss, expected.detach()) and not loss.requires_grad
    assert int(sums["correct"]) == int((out.argmax(1) == labels).sum())
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * (q.grad + 5e-4 * q), rtol=1e-6, atol=1e-7)


def test_bf16_trains_float32_weights():
    net = network()
    images, labels = next(iter(batches()))
    loss, _ = train_step(net, sgd(net), autocast_for("bf16", CPU), Classification(), (images, labels))
    exact, _ = train_step(network(), sgd(net), autocast_for("fp32", CPU), Classification(), (images, labels))
    assert loss.dtype == torch.float32 and all(p.dtype == torch.float32 for p in net.parameters())
    assert loss != exact and abs(loss - exact) < 0.1


def test_evaluation_uses_running_statistics_and_changes_nothing():
    net = network()
    data = list(batches(n=10))
    net(data[0][0])  # running statistics of one batch
    before = {k: v.clone() for k, v in net.state_dict().items()}
    loss, accuracy = evaluate(net, autocast_for("fp32", CPU), Classification(), data).values()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training
    net.eval()
    with torch.no_grad():
        logits, labels = torch.cat([net(x) for x, _ in data]), torch.cat([y for _, y in data])
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
