"""Averaged weights against NumPy, and that they come and go without a trace."""

import numpy as np
import pytest
import torch
from torch import nn

from alexnet.optim import Ema


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def changed(model: nn.Module, seed: int) -> None:
    """Every parameter and buffer gets a new value, as a training step gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator))
            else:
                value.add_(1)


def test_average_is_the_formula_in_numpy_with_its_ramp():
    model = small_model()
    ema = Ema(model, 0.5)
    expected = {name: value.double().numpy() for name, value in model.state_dict().items()}
    for n in range(1, 21):
        changed(model, seed=n)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))  # 2/11, 3/12 … and 1/2 from n = 8 on
        for name, value in model.state_dict().items():
            now = value.double().numpy()
            expected[name] = decay * expected[name] + (1 - decay) * now
    counts = {name for name, value in ema.state.items() if not value.is_floating_point()}
    assert counts == {"1.num_batches_tracked"}
    for name in ema.state.keys() - counts:
        np.testing.assert_allclose(ema.state[name].numpy(), expected[name], rtol=1e-5)
    assert int(ema.state["1.num_batches_tracked"]) == 20
    assert ema.updates == 20


def test_applied_weights_are_the_averaged_ones_and_the_models_own_come_back():
    model = small_model().eval()
    ema = Ema(model, 0.9)
    changed(model, seed=1)
    ema.update()
    averaged = small_model().eval()
    averaged.load_state_dict(ema.state)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    places = [parameter.data_ptr() for parameter in model.parameters()]
    x = torch.rand(5, 3)
    with ema.applied():
        assert torch.equal(model(x), averaged(x))
    assert not torch.equal(model(x), averaged(x))
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())
    assert places == [parameter.data_ptr() for parameter in model.parameters()]


def test_the_models_own_weights_come_back_after_an_error():
    model = small_model()
    ema = Ema(model, 0.9)
    changed(model, seed=1)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())


def test_going_on_from_what_was_saved_is_bit_equal():
    model, other = small_model(), small_model()
    whole, second = Ema(model, 0.99), Ema(other, 0.99)
    for seed in (1, 2, 3):
        changed(model, seed)
        whole.update()
    second.load({name: value.clone() for name, value in whole.state.items()}, whole.updates)
    for seed in (4, 5):
        changed(model, seed)
        whole.update()
        changed(other, seed)
        second.update()
    floats = [name for name, value in whole.state.items() if value.is_floating_point()]
    assert all(torch.equal(whole.state[name], second.state[name]) for name in floats)


def test_average_has_the_layout_of_the_model_and_is_not_its_memory():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    ema = Ema(model, 0.9)
    assert ema.state["weight"].stride() == model.weight.stride()
    assert ema.state["weight"].data_ptr() != model.weight.data_ptr()
    assert not any(value.requires_grad for value in ema.state.values())
