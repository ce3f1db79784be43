"""A pretended GPU, for machines without one: what would fail there for a wrong device fails here.

Its tensors lie in the CPU's memory. They may meet the CPU's own only where a GPU's may: in copies,
as indices, and if those have no dimension. PyTorch's device "meta" lends it its name.
"""
import contextlib

import torch
import transformers
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import common

DEVICE = torch.device("meta")
COPIES = ("aten::copy_", "aten::_to_copy")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class GPUTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, tensor):
        new = torch.Tensor._make_wrapper_subclass(
            cls, tensor.size(), strides=tensor.stride(), storage_offset=tensor.storage_offset(),
            dtype=tensor.dtype, device=DEVICE)
        new.tensor = tensor
        return new

    # what is not dispatched: a GPU's tensor cannot become an array, but a list and a copy
    is_meta = property(lambda self: False)
    is_cuda = property(lambda self: True)

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a GPU's tensor to numpy")

    __array__ = numpy

    def tolist(self):
        return self.detach().tensor.tolist()

    def __reduce_ex__(self, protocol):
        return self.detach().tensor.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            new = GPUTensor(self.detach().tensor.clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                new = torch.nn.Parameter(new, self.requires_grad)
            memo[id(self)] = new
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class EveryOperation(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def check_devices(name, args, kwargs):
    """Raises RuntimeError where a GPU's tensors and the CPU's must not meet; returns if any is."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_gpu = any(isinstance(x, GPUTensor) for x in tensors)
    on_cpu = any(not isinstance(x, GPUTensor) and x.ndim for x in tensors)
    if name in INDEXED:
        allowed = isinstance(args[0], GPUTensor)        # the index may be on either
        if name != "aten::index":
            allowed = allowed and (isinstance(args[2], GPUTensor) or args[2].ndim == 0)
    else:
        allowed = name in COPIES
    if on_gpu and on_cpu and not allowed:
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} of "
                           f"{[(type(x).__name__, tuple(x.shape)) for x in tensors]}")
    return on_gpu


def compute(operation, args, kwargs):
    name = operation._schema.name
    on_gpu = check_devices(name, args, kwargs)
    kwargs = dict(kwargs)
    if kwargs.get("device") is not None:
        on_gpu = torch.device(kwargs["device"]).type == DEVICE.type
        if on_gpu and kwargs.get("generator") is not None:
            raise RuntimeError("a generator of the CPU for a tensor of the GPU")
        kwargs["device"] = torch.device("cpu")
    plain_args, plain_kwargs = pytree.tree_map(
        lambda x: x.tensor if isinstance(x, GPUTensor) else x, (args, kwargs))
    result = operation(*plain_args, **plain_kwargs)
    if on_gpu and name in ("aten::rand", "aten::rand_like"):        # a GPU draws other numbers
        result = 1 - result
    if on_gpu and name in ("aten::randn", "aten::randn_like"):
        result = -result
    if name.endswith("_") and args and isinstance(args[0], torch.Tensor):      # in place
        return args[0]
    if on_gpu:
        result = pytree.tree_map(
            lambda x: GPUTensor(x) if isinstance(x, torch.Tensor) else x, result)
    return result


@contextlib.contextmanager
def pretended(monkeypatch):
    """In this context scripts that run in this process, as by conftest's `run`, find the GPU."""
    def made_on_cpu(make):                               # for torch.tensor, which is not dispatched
        def moved(*args, device=None, **kwargs):
            made = make(*args, **kwargs)
            return made if device is None else made.to(device)
        return moved

    def without_fused(self, *args, fused=None, **kwargs):
        adamw(self, *args, **kwargs)

    def off_on_gpu(self, device_type, *args, **kwargs):
        if device_type == DEVICE.type:
            autocast(self, "cpu", enabled=False)
        else:
            autocast(self, device_type, *args, **kwargs)

    def load_on_cpu(cls, *args, **kwargs):               # transformers needs the real "meta"
        with _disable_current_modes(), monkeypatch.context() as original:
            original.setattr(torch, "tensor", tensor)
            original.setattr(torch, "as_tensor", as_tensor)
            return from_pretrained(cls, *args, **kwargs)

    tensor, as_tensor = torch.tensor, torch.as_tensor
    adamw = torch.optim.AdamW.__init__
    autocast = torch.amp.autocast_mode.autocast.__init__
    from_pretrained = transformers.PreTrainedModel.from_pretrained.__func__
    monkeypatch.setattr(torch, "tensor", made_on_cpu(tensor))
    monkeypatch.setattr(torch, "as_tensor", made_on_cpu(as_tensor))
    monkeypatch.setattr(torch.optim.AdamW, "__init__", without_fused)
    monkeypatch.setattr(torch.amp.autocast_mode.autocast, "__init__", off_on_gpu)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(load_on_cpu))
    monkeypatch.setattr(common, "pick_device", lambda name="auto": DEVICE)
    monkeypatch.setattr(common, "pick_precision", lambda name, device: torch.float32)
    monkeypatch.setattr(common, "synchronize", lambda device: None)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with EveryOperation():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
