"""Nothing in a training step waits for the device: told without one.

The model lies on "meta", where tensors have shapes and no values, so that whatever must know a value raises. The fused
kernels are operators there, which know the shapes of what they give.
"""

import pytest
import torch
from conftest import IMAGE_ID, batch, tiny_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsvl import modeling_dsvl
from dsvl.acceleration import build_mask
from dsvl.acceleration.attention import fused_mask, gathered_mask, kernels
from dsvl.masks_dsvl import visibilities

LAYOUTS = ("ttItttItttt", "tItttttItttt", "IttIttt")


class NoLists(TorchFunctionMode):
    """Refuses tensors of Python's numbers, which are copied to their device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor) and torch.device((kwargs or {}).get("device") or "cpu").type != "cpu":
            raise RuntimeError(f"{func} copies from the host to the device")
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Refuses what "meta" lets pass, but makes the host wait for a GPU: copies between the two, indexing by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []
        self.lists = NoLists()

    def __enter__(self):
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.lists.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.done.append(str(func))
        made = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # A number in a CPU tensor is an argument of a kernel.
        devices = {tensor.device.type for tensor in given if tensor.ndim > 0}
        devices |= {tensor.device.type for tensor in tree_leaves(made) if isinstance(tensor, torch.Tensor)}
        if devices > {"cpu"}:
            raise RuntimeError(f"{func} copies between host and device")
        if "index_put" in str(func) and any(tensor.dtype == torch.bool for tensor in given[1:]):
            raise RuntimeError(f"{func} asks how many a mask names")
        return made


class LateCopy:
    """An `AsyncHostCopy` of values that nobody has: what the host is told is `told`, by the shape of what it asks for."""

    is_complete = False
    told: dict[tuple[int, ...], object] = {}

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape = tuple(tensor.shape)

    def tolist(self) -> object:
        self.read()
        return self.told[self.shape]

    @staticmethod
    def read() -> None:
        raise NotImplementedError


@pytest.fixture
def device(monkeypatch):
    """Takes "meta" for an NVIDIA GPU of the Hopper generation."""

    def fused_attention(query, key, value, lists, scaling, softcap=None):
        save = torch.is_grad_enabled() and query.requires_grad
        options = float(scaling), float(softcap or 0.0), save
        return kernels.mmca(query, key, value, lists.tensors, lists.windowed, *options)[0]

    monkeypatch.setattr(fused_mask, "can_fuse", lambda *args: True)
    monkeypatch.setattr(fused_mask, "fused_attention", fused_attention)
    monkeypatch.setattr(modeling_dsvl, "AsyncHostCopy", LateCopy)
    return torch.device("meta")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.equal(x),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), x[:1]),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_what_waits_is_noticed(wait):
    states = torch.empty(3, device="meta")
    with NoWaiting(), pytest.raises((RuntimeError, NotImplementedError)):
        wait(states)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("rows", ["padded", "packed"])
@pytest.mark.parametrize(
    ("family", "positions"),
    [("llama", "token"), ("llama", "image"), ("mistral", "token"), ("gemma3_text", "image"), ("qwen2", "token")],
)
def test_a_step_waits_for_nothing(family, positions, rows, checkpointing, device, monkeypatch):
    """Images in every sample, padding, a label here and there; and what the host does ask for comes when it is done."""
    numbered = 2 if positions == "image" else 0  # as composed models have them
    model = tiny_model(family, dtype=torch.bfloat16, image_positions=positions, numbered_images=numbered)
    model = model.set_trainable().train().to(device)
    if checkpointing:
        model.activation_checkpointing_enable(checkpointing)
    inputs = batch(*LAYOUTS, side="right", dtype=torch.bfloat16)
    ids = inputs["input_ids"]
    labels = torch.where((ids != IMAGE_ID) & (ids % 3 > 0) & inputs["attention_mask"].bool(), ids, -100)
    if rows == "packed":
        index = torch.arange(ids.shape[1]).expand_as(ids)
        inputs |= {"position_ids": index % 7} if positions == "token" else {"document_ids": index // 7}
        del inputs["attention_mask"]
    supervised = int((labels[:, 1:] != -100).sum())
    counts = (ids == IMAGE_ID).sum(-1).tolist()
    # What is checked of each sample: its image tokens, how many are marked, where the two differ, least and largest mark.
    told = [counts, counts, [0] * 3, [0] * 3, [1] * 3]
    monkeypatch.setattr(LateCopy, "told", {(): supervised, (5, 3): told})
    on_device = {key: tensor.to(device) for key, tensor in (inputs | {"labels": labels}).items()}
    with NoWaiting() as step:
        queued: list[int] = []
        monkeypatch.setattr(LateCopy, "read", lambda copy: queued.append(sum("mmca" in name for name in step.done)))
        model(**on_device, use_cache=False).loss.backward()
    layers = model.config.text_config.num_hidden_layers
    assert queued == [layers, layers]  # the whole decoder was given to the device before the first was read
    assert sum(name.endswith("mmca_backward.default") for name in step.done) == layers
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}


class Questions(TorchFunctionMode):
    """Counts what the host asks of tensors, for which it would wait where these are a device's."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        if name in ("tolist", "item", "__bool__", "__int__", "__index__", "__float__", "nonzero"):
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows", "questions"), [("padded", ["tolist"]), ("packed", ["__bool__", "tolist"])])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_gathering_asks_once_how_many_there_are(backend, rows, questions, monkeypatch):
    """Where the fused kernels do not apply, a mask's lengths are those of the batch; and whether there are packs at all."""
    monkeypatch.setattr(gathered_mask, "split_image_branch", lambda mask: None)  # for a CPU alone
    config = tiny_model(backend=backend).config.text_config
    inputs = batch(*LAYOUTS, side="right")
    ids, documents = inputs["input_ids"], None
    if rows == "packed":
        documents = (torch.arange(ids.shape[1]) // 7).expand_as(ids)
        del inputs["attention_mask"]
    embeds = torch.zeros(*ids.shape, 0)
    with Questions() as host:
        visible = visibilities(config, embeds, inputs.get("attention_mask"), None, documents)
        host.asked.clear()
        build_mask(visible[None], (ids == IMAGE_ID).long(), config, torch.float32)
    assert host.asked == questions
