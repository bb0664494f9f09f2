"""Tensors that wait on first use, and steps that optimizers take later, in one process."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commopt.schedulers.awaited import AwaitedGradient, AwaitedParameter, arrived, await_, can_wait
from commopt.schedulers.optimizer_step import Later, is_per_parameter
from ranks import raised, same

SHAPE = (6, 4)


def awaited(kind: type = nn.Parameter, arrives: float = 3.0):
    """A tensor of ones that becomes all `arrives` when it does, and how often it has been asked to."""
    value, asked = torch.ones(SHAPE), []
    tensor = nn.Parameter(value) if kind is nn.Parameter else value

    def arrive() -> None:
        asked.append(1)
        arrived(tensor)
        with torch.no_grad():
            tensor.fill_(arrives)

    await_(tensor, arrive)
    return tensor, asked


def pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


READS = {
    "operator": lambda t: t + 0, "reflected": lambda t: 0 + t, "in place on another": lambda t: torch.zeros(SHAPE).add_(t), "method": lambda t: t.clone(),
    "data": lambda t: t.data, "detach": lambda t: t.detach(), "item": lambda t: torch.full(SHAPE, t[0, 0].item()), "index": lambda t: t[:], "tolist": lambda t: torch.tensor(t.tolist()),
    "numpy": lambda t: torch.from_numpy(t.detach().numpy()), "array": lambda t: torch.tensor(__import__("numpy").asarray(t.requires_grad_(False))), "iterated": lambda t: torch.stack(list(t)),
    "in a list": lambda t: torch.stack([torch.zeros(SHAPE), t])[1], "in a list by name": lambda t: torch.stack(tensors=[t])[0], "foreach": lambda t: torch._foreach_add([t], 0)[0],
    "out": lambda t: torch.add(t, 0, out=torch.empty(SHAPE)) if not t.requires_grad_(False).requires_grad else None, "copy": lambda t: torch.empty(SHAPE).copy_(t.requires_grad_(False)),
    "transposed": lambda t: t.T.T, "cast": lambda t: t.double().float(), "to": lambda t: t.to(torch.float64).float(), "view": lambda t: t.view(-1).view(SHAPE),
    "linear": lambda t: F.linear(torch.eye(4), t).T, "einsum": lambda t: torch.einsum("ij->ij", t), "where": lambda t: torch.where(torch.ones(SHAPE, dtype=torch.bool), t, t),
    "function": lambda t: Same.apply(t), "copied": lambda t: copy.copy(t), "deeply": lambda t: copy.deepcopy([t])[0], "pickled": lambda t: pickled({"t": t})["t"],
    "a list pickled": lambda t: pickled([t])[0], "functional call": lambda t: torch.func.functional_call(nn.Linear(4, 6, bias=False), {"weight": t}, torch.eye(4)).T,
    "pointer": lambda t: (t.data_ptr(), t)[1] if type(t) in (nn.Parameter, Tensor) else None or t.detach(), "storage": lambda t: torch.tensor(t.untyped_storage().tolist(), dtype=torch.uint8).view(torch.float32).view(SHAPE),
    "dlpack": lambda t: torch.from_dlpack(t.requires_grad_(False)), "without gradients": torch.no_grad()(lambda t: t * 1), "inference": torch.inference_mode()(lambda t: t * 1),
    "vector": lambda t: nn.utils.parameters_to_vector([t]).view(SHAPE), "module": lambda t: _with_weight(t)(torch.eye(4)).T,
}


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        return t * 1

    @staticmethod
    def backward(ctx, grad):
        return grad


def _with_weight(t: Tensor) -> nn.Module:
    module = nn.Linear(4, 6, bias=False)
    if isinstance(t, nn.Parameter):
        module.weight = t
    else:
        del module.weight
        module.weight = t
    return module


@pytest.mark.parametrize("kind", [nn.Parameter, Tensor])
@pytest.mark.parametrize("read", READS)
def test_whatever_reads_a_tensor_has_it_arrive(read, kind):
    tensor, asked = awaited(kind)
    with torch.device("cpu"):
        got = READS[read](tensor)
    same(got.detach().clone(), torch.full(SHAPE, 3.0), read)
    assert asked == [1] and type(tensor) is kind and type(got) in (Tensor, nn.Parameter) and not hasattr(tensor, "_arrive")


WRITES = {
    "fill": lambda t: t.fill_(5.0), "add": lambda t: t.mul_(0).add_(5.0), "data": lambda t: t.data.fill_(5.0), "index": lambda t: t.__setitem__(slice(None), 5.0),
    "copy": lambda t: t.copy_(torch.full(SHAPE, 5.0)), "set data": lambda t: setattr(t, "data", torch.full(SHAPE, 5.0)), "out": lambda t: torch.add(torch.zeros(SHAPE), 5.0, out=t),
    "foreach": lambda t: torch._foreach_copy_([t], [torch.full(SHAPE, 5.0)]), "init": lambda t: nn.init.constant_(t, 5.0), "numpy": lambda t: t.detach().numpy().fill(5.0),
    "load": lambda t: _with_weight(t).load_state_dict({"weight": torch.full(SHAPE, 5.0)}) if isinstance(t, nn.Parameter) else t.fill_(5.0),
}


@pytest.mark.parametrize("kind", [nn.Parameter, Tensor])
@pytest.mark.parametrize("write", WRITES)
def test_what_writes_a_tensor_has_the_last_word(write, kind):
    tensor, asked = awaited(kind)
    with torch.no_grad():
        WRITES[write](tensor)
    same(tensor.detach(), torch.full(SHAPE, 5.0), write)
    assert asked == [1]


@pytest.mark.parametrize("kind", [nn.Parameter, Tensor])
def test_what_needs_no_values_does_not_wait(kind):
    tensor, asked = awaited(kind)
    assert (tensor.shape, tensor.size(), tensor.size(0), tensor.dim(), tensor.ndim, tensor.numel(), len(tensor)) == (SHAPE, SHAPE, 6, 2, 2, 24, 6)
    assert (tensor.dtype, tensor.device.type, tensor.layout, tensor.is_leaf, tensor.grad_fn, tensor.grad) == (torch.float32, "cpu", torch.strided, True, None, None)
    assert (tensor.stride(), tensor.is_contiguous(), tensor.element_size(), tensor.is_sparse, tensor.requires_grad) == ((4, 1), True, 4, False, kind is nn.Parameter)
    assert not torch.is_complex(tensor) and torch.is_floating_point(tensor) and torch.numel(tensor) == 24
    assert isinstance(tensor, kind) and isinstance(tensor, Tensor) and torch.is_tensor(tensor)
    assert {tensor: 1}[tensor] == 1 and tensor in {tensor} and tensor is [tensor][0]
    tensor.grad = torch.zeros(SHAPE)
    tensor.requires_grad = True
    tensor.register_hook(lambda g: None)
    model = nn.Module()
    if kind is nn.Parameter:
        model.weight = tensor
        assert list(model.parameters())[0] is tensor and dict(model.named_parameters())["weight"] is tensor
        torch.optim.AdamW(model.parameters()).zero_grad()
        model.zero_grad()
        assert type(tensor) is AwaitedParameter
    else:
        assert type(tensor) is AwaitedGradient
    assert not asked


def test_of_several_tensors_all_arrive():
    tensors = [awaited(kind, 2.0) for kind in (nn.Parameter, Tensor, nn.Parameter)]
    (a, _), (b, _), (c, _) = tensors
    same(torch.stack([a, torch.ones(SHAPE) * b, c]).detach(), torch.full((3, *SHAPE), 2.0))
    assert [asked for _, asked in tensors] == [[1]] * 3
    a, b, c = (awaited()[0] for _ in range(3))
    same(F.multi_head_attention_forward(torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 4), 4, 1, torch.ones(12, 4), None, None, None, False, 0.0,
                                        nn.Parameter(torch.eye(4)), None, need_weights=False)[0], torch.full((2, 4), 4.0))
    assert raised(lambda: a + torch.ones(3, 3)) is not None and type(a) is nn.Parameter, "an operation that fails has it arrive all the same"


def test_what_arriving_raises_is_raised_by_the_use():
    tensor = nn.Parameter(torch.ones(SHAPE))

    def arrive() -> None:
        arrived(tensor)
        raise RuntimeError("gone")

    await_(tensor, arrive)
    assert str(raised(lambda: tensor + 1)) == "gone"
    same((tensor + 1).detach(), torch.full(SHAPE, 2.0))


def test_only_plain_tensors_wait_and_nothing_is_kept():
    class Other(nn.Parameter):
        pass

    assert can_wait(nn.Parameter(torch.ones(1))) and can_wait(torch.ones(1))
    assert not can_wait(Other(torch.ones(1))) and not can_wait(awaited()[0])
    kept = lambda: None
    tensor, gone = torch.ones(1), weakref.ref(kept)
    await_(tensor, kept)
    arrived(tensor), arrived(tensor)
    del kept
    gc.collect()
    assert gone() is None and type(tensor) is Tensor and tensor.__dict__ == {}


def test_gradients_flow_through_a_parameter_that_has_been_awaited():
    tensor, _ = awaited()
    (tensor * 2).sum().backward()
    same(tensor.grad, torch.full(SHAPE, 2.0))


# --- steps taken later ---


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop", "Rprop", "ASGD", "Adafactor", "Muon"])
def test_a_step_in_two_parts_and_later_is_the_step(name):
    """The settings are those of when it was asked for."""
    if not hasattr(torch.optim, name):
        pytest.skip("not in this version of torch")
    results = []
    for later in (False, True):
        parameters = [nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(i))) for i in range(4)]
        optimizer = getattr(torch.optim, name)([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.02}])
        assert is_per_parameter(optimizer)
        for step in range(4):
            gradients = [torch.randn(5, 7, generator=torch.Generator().manual_seed(100 * step + i)) for i in range(4)]
            if later:
                parts = [Later(optimizer, "cpu"), Later(optimizer, "cpu")]
                for i, p in enumerate(parameters):
                    parts[i % 2].add(i // 2, optimizer.param_groups[i // 2], p)
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
                groups, elsewhere = optimizer.param_groups, torch.zeros(5, 7)
                parameters[0].grad = elsewhere
                for part in reversed(parts):
                    part.take(dict(zip(parameters, gradients)))
                assert optimizer.param_groups is groups and parameters[0].grad is elsewhere and parameters[1].grad is None
            else:
                for p, g in zip(parameters, gradients):
                    p.grad = g
                optimizer.step()
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
        results.append([p.detach() for p in parameters])
    for p, q in zip(*results):
        same(q, p, name)


def test_which_optimizers_step_parameter_by_parameter():
    class Same(torch.optim.Adam):
        def zero_grad(self, set_to_none=True):
            super().zero_grad(set_to_none)

    class Other(torch.optim.Adam):
        def step(self, closure=None):
            return super().step(closure)

    class Grouped(torch.optim.Adam):
        def _init_group(self, *args):
            return super()._init_group(*args)

    p = [nn.Parameter(torch.ones(3))]
    assert is_per_parameter(Same(p))
    for optimizer in (Other(p), Grouped(p), torch.optim.LBFGS(p), torch.optim.SparseAdam(p), torch.optim.Adam(p, differentiable=True)):
        assert not is_per_parameter(optimizer), optimizer
    scheduled = torch.optim.SGD(p, lr=0.1)
    torch.optim.lr_scheduler.StepLR(scheduled, 1)  # wraps the step of the one object
    assert is_per_parameter(scheduled)


def test_modes_of_the_place_where_a_step_is_taken_do_not_matter():
    results = []
    for where in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad):
        p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).clone())
        optimizer = torch.optim.Adafactor([p], lr=0.1)
        for step in range(3):
            later = Later(optimizer, "cpu")
            later.add(0, optimizer.param_groups[0], p)
            with where():
                later.take({p: torch.linspace(0.1, 0.5, 12).view(3, 4)})
        assert not p.is_inference() and not any(v.is_inference() for v in optimizer.state[p].values())
        results.append(p.detach())
    for p in results[1:]:
        same(p, results[0])
