"""The travelling core is complete without the package's acceleration, and finds it through one versioned interface."""

import ast
import shutil
import sys
import warnings
from inspect import signature
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, batch, tiny_model
from plain_environment import plain_packages, run_plainly
from test_attention import LAYOUTS, assert_equals_the_plain_loop, backends, packed
from training_runs import make_checkpoint
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import dsvl
from dsvl import acceleration
from dsvl.acceleration.attention.gathered_mask import GatheredMask
from dsvl.masks_dsvl import BranchMasks

CASES = [(family, backend) for family in FAMILIES for backend in backends(family) if backend != "eager"]


@pytest.fixture
def core_alone(monkeypatch):
    """As if the package were not installed."""
    for module in ("masks_dsvl", "generation_dsvl", "modeling_dsvl"):
        monkeypatch.setattr(f"dsvl.{module}.acceleration", lambda: None)
    monkeypatch.setattr(GatheredMask, "attend", None)


@pytest.mark.parametrize(("family", "backend"), CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_core_alone_equals_the_plain_loop(family, backend, side, core_alone, uncompiled):
    assert_equals_the_plain_loop(family, backend, side)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_the_core_alone_has_the_same_gradients(family, core_alone):
    inputs = batch(*LAYOUTS, side="right")
    labels = torch.where(inputs["attention_mask"].bool() & (inputs["mm_token_type_ids"] == 0), inputs["input_ids"], -100)
    models = [tiny_model(family, backend=backend) for backend in ("sdpa", "eager")]
    for model in models:
        model(**inputs, labels=labels).loss.backward()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_the_core_alone_keeps_packed_documents_apart(family, backend, core_alone, uncompiled):
    model = tiny_model(family, backend=backend)
    inputs, lengths = packed("Itttt", "ttIIt", "tttttI")
    with torch.no_grad():
        together = model(**inputs, use_cache=False).logits[0].split(lengths)
        images = inputs["pixel_values"].split([1, 2, 1])
        for logits, ids, pixels in zip(together, inputs["input_ids"][0].split(lengths), images, strict=True):
            alone = model(input_ids=ids[None], pixel_values=pixels).logits[0]
            torch.testing.assert_close(logits, alone, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_core_alone_generates_the_same(family, cache, request):
    model, inputs = tiny_model(family, dtype=torch.float32), batch(*LAYOUTS[:2], dtype=torch.float32)
    options = dict(max_new_tokens=8, do_sample=False, cache_implementation=cache)
    expected = model.generate(**inputs, **options)
    request.getfixturevalue("core_alone")
    assert model.generate(**inputs, **options).equal(expected)


def test_with_the_package_the_faster_masks_are_used(monkeypatch):
    model, inputs = tiny_model(backend="sdpa"), batch("tItt")
    monkeypatch.setattr(BranchMasks, "attend", None)
    model(**inputs)


def own_code(folder, name):
    """The class of a checkpoint's own code, in a module of its own."""
    checkpoint = make_checkpoint(folder, name)
    model_class = get_class_from_dynamic_module("modeling_dsvl.DSVLForConditionalGeneration", str(checkpoint))
    assert model_class.__module__.startswith("transformers_modules.")
    return checkpoint, model_class


FOLDERS = ("attention", "memory", "reuse", "parallel", "decoding")
SHARED = {"decoder_run", "int8", "operators", "recording"}


def test_folders_depend_on_each_other_in_one_direction():
    """On those before them, and on the files that all of them share."""
    root = Path(acceleration.__file__).parent
    assert {path.parent.name for path in root.glob("*/__init__.py")} == set(FOLDERS)
    for number, folder in enumerate(FOLDERS):
        allowed = {*FOLDERS[:number], *SHARED}
        for path in (root / folder).glob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            used = {
                name
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.level == 2
                for name in ([node.module.split(".")[0]] if node.module else [alias.name for alias in node.names])
            }
            assert used <= allowed, f"{folder}/{path.name} imports {used - allowed}"


INPUTS = {"input_ids": torch.tensor([[5, 6, 7]])}


def test_a_checkpoints_own_code_is_accelerated_too(tmp_path, monkeypatch):
    checkpoint, model_class = own_code(tmp_path, "accelerated")
    model = model_class.from_pretrained(checkpoint).eval()
    interface = sys.modules[model_class.__module__.replace("modeling_dsvl", "acceleration_dsvl")]
    assert interface.acceleration() is acceleration
    pixels = torch.zeros(1, 3, model.config.image_size, model.config.image_size)
    assert len(model.encode_images(pixels)) == 1


def test_the_interface_is_called_as_checkpoints_of_all_releases_call_it():
    """Of this version of the interface; see acceleration_dsvl.py."""
    made = acceleration.CompiledDecoderLayers(tiny_model().model.language_model, {})
    made.switch(False)
    assert list(signature(acceleration.CompiledDecoderLayers).parameters) == ["decoder", "options"]


def test_two_versions_of_the_core_work_in_one_process(tmp_path, monkeypatch):
    """A checkpoint whose code has another version of the interface runs without acceleration, and says so once."""
    first, first_class = own_code(tmp_path, "new")
    second = tmp_path / "old"
    shutil.copytree(first, second)
    code = second / "acceleration_dsvl.py"
    code.write_text(code.read_text().replace("INTERFACE_VERSION = 1\n", "INTERFACE_VERSION = 0\n"))
    second_class = get_class_from_dynamic_module("modeling_dsvl.DSVLForConditionalGeneration", str(second))
    models = [dsvl.DSVLForConditionalGeneration.from_pretrained(first), first_class.from_pretrained(first)]
    with pytest.warns(UserWarning, match="has version 1 of the acceleration interface, this model's code version 0"):
        models.append(second_class.from_pretrained(second))
    size, per_image = models[0].config.image_size, models[0].config.image_seq_length
    ids = torch.tensor([[5, *[models[0].config.image_token_id] * per_image, 6, 7]])
    inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 3, size, size)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        logits = [model.eval()(**inputs).logits for model in models]
        answers = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in models]
    for other in (1, 2):
        torch.testing.assert_close(logits[0], logits[other], atol=1e-5, rtol=1e-5)
        assert answers[0].equal(answers[other])
    with pytest.raises(ImportError, match=r"encode_images.* is part of the package dsvl, .* another version"):
        models[2].encode_images(inputs["pixel_values"])


ALONE = """
import sys
import torch
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
print(model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().item() != 0)
for call in (
    lambda: model.encode_images(torch.zeros(1, 3, 8, 8)),
    lambda: model.compile_decoder_layers(),
    lambda: model.compile_text_prefill(),
):
    try:
        call()
    except ImportError as error:
        print(error)
"""


def test_without_the_package_what_is_missing_is_said(tmp_path):
    checkpoint = make_checkpoint(tmp_path)
    (tmp_path / "alone.py").write_text(ALONE)
    packages = [plain_packages(tmp_path / "packages", "torch", "transformers", "pillow")]
    run = run_plainly(tmp_path / "alone.py", checkpoint, packages=packages, home=tmp_path)
    assert run.returncode == 0, run.stderr
    works, *messages = run.stdout.splitlines()
    assert works == "True" and len(messages) == 3 and all("pip install" in message for message in messages)


def test_a_package_that_cannot_be_imported_does_not_keep_a_checkpoint_from_loading(tmp_path):
    checkpoint = make_checkpoint(tmp_path)
    (tmp_path / "alone.py").write_text(ALONE)
    (tmp_path / "broken" / "dsvl").mkdir(parents=True)
    (tmp_path / "broken" / "dsvl" / "__init__.py").write_text("from transformers import NoSuchName\n")
    packages = [tmp_path / "broken", plain_packages(tmp_path / "packages", "torch", "transformers", "pillow")]
    run = run_plainly(tmp_path / "alone.py", checkpoint, packages=packages, home=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("True\n")
    assert run.stderr.count("The installed package dsvl cannot be imported (cannot import name 'NoSuchName'") == 1
