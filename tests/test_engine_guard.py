"""A non-finite loss or gradient never reaches weights, moments or batch statistics, and is told by name."""

import copy

import pytest
import torch
from torch import nn

from engine.guard import FiniteGuard, NonFiniteError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def make(fused=False):
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=fused)
    return net, optimizer, FiniteGuard(net, optimizer, torch.amp.GradScaler("cpu", enabled=False))


def run_step(net, optimizer, guard, step, spoil=None):
    optimizer.zero_grad()
    guard.before_forward()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    if spoil == "input":
        x[0, 0] = float("nan")
    loss = net(x).square().mean()
    if spoil == "loss":
        loss = loss / 0.0
    loss.backward()
    if spoil == "gradient":
        net.last.weight.grad[0, 2] = float("inf")
    return guard.step(step, {"loss": loss, "id/ori": loss.detach()}, guard.gradient_norms())


def everything(net, optimizer):
    moments = [v for state in optimizer.state_dict()["state"].values() for v in state.values()]
    return copy.deepcopy([*net.state_dict().values(), *moments])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("spoil", "told"), [("input", "id/ori"), ("loss", "id/ori"), ("gradient", "last.weight")])
def test_nothing_moves_from_the_bad_step_on(fused, spoil, told):
    net, optimizer, guard = make(fused)
    for step in (1, 2):
        assert not run_step(net, optimizer, guard, step)
    guard.raise_if_bad()
    before = everything(net, optimizer)
    tracked = [i for i, v in enumerate(before) if not v.is_floating_point()]
    assert run_step(net, optimizer, guard, 3, spoil)
    assert run_step(net, optimizer, guard, 4)  # a good one after it
    after = everything(net, optimizer)
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b)]
    assert set(changed) <= set(tracked), "weights, moments or statistics moved"
    with pytest.raises(NonFiniteError, match=rf"in step 3: .*{told}"):
        guard.raise_if_bad()


def test_good_steps_are_plain_adam():
    net, optimizer, guard = make()
    twin = copy.deepcopy(net)
    plain = torch.optim.Adam(twin.parameters(), lr=0.1)
    for step in (1, 2, 3):
        run_step(net, optimizer, guard, step)
        plain.zero_grad()
        twin(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        plain.step()
    for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_gradient_norms_are_those_of_the_parameters():
    net, _, guard = make()
    net(torch.randn(8, 4)).square().mean().backward()
    net.first.bias.grad = None
    expected = [0.0 if p.grad is None else float(p.grad.norm()) for p in net.parameters()]
    assert guard.gradient_norms().tolist() == pytest.approx(expected)
    assert guard.names == tuple(n for n, _ in net.named_parameters())


class CountingScaler:
    """Stands in for the fp16 scaler, which needs a GPU: skips the update where a gradient is not finite."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def is_enabled(self):
        return True

    def step(self, optimizer):
        if all(p.grad.isfinite().all() for p in self.parameters):
            optimizer.step()

    def update(self):
        pass

    def get_scale(self):
        return 1.0


def test_under_the_scaler_skips_are_counted_and_a_streak_stops():
    net, optimizer, _ = make()
    guard = FiniteGuard(net, optimizer, CountingScaler(net.parameters()))
    for step, spoil in enumerate(["gradient", None, "gradient", "gradient"], 1):
        run_step(net, optimizer, guard, step, spoil)
    assert int(guard.skipped) == 3 and int(guard.streak) == 2
    guard.raise_if_bad()
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        guard.raise_if_bad(longest_streak=2)
    assert all(v.isfinite().all() for v in net.state_dict().values())
