"""Vision towers of every type: composed, saved, loaded anywhere, trained."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import REFERENCE, save_tiny_llama, tiny_tower_config
from PIL import Image
from reference_data import migrated
from transformers import AutoModel, AutoTokenizer, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_torchvision_available

import dsvl
from dsvl.cli import main
from dsvl.composition.towers import count_prefix_tokens
from dsvl.training import lora_config
from dsvl.training.model_loading import load_checkpoint_tower
from dsvl.vision_dsvl import run_tower

SIZE, PATCH = 28, 14
WIDTHS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=PATCH)
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=100)


def siglip() -> transformers.PreTrainedModel:
    vision = transformers.SiglipVisionConfig(**WIDTHS, intermediate_size=48, image_size=SIZE)
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision.to_dict(), text_config=TEXT))


TOWERS = {
    "clip": lambda: transformers.CLIPVisionModel(tiny_tower_config()),
    "siglip": siglip,  # a whole SigLIP or SigLIP 2, whose tower is taken
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**WIDTHS, image_size=42)),  # as DINOv2: larger
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**WIDTHS, image_size=SIZE, num_register_tokens=4)
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**WIDTHS, intermediate_size=48, image_size=SIZE, num_register_tokens=4)
    ),
    "qwen": lambda: dsvl.DSVLQwenVisionModel(
        dsvl.DSVLQwenVisionConfig(
            **WIDTHS, intermediate_size=48, image_size=SIZE, num_positions=16, output_dim=64, num_queries=9
        )
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**WIDTHS, intermediate_size=48, image_size=SIZE)),
}
PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_with_registers": 5, "dinov3": 5, "qwen": 0, "vit": 1}
PER_IMAGE = {name: 4 + prefix for name, prefix in PREFIX.items()} | {"qwen": 9}
every_tower = pytest.mark.parametrize("name", TOWERS)


def image_processor(name: str) -> object:
    squares = dict(size={"height": SIZE, "width": SIZE})
    if name == "siglip":
        return transformers.SiglipImageProcessor(**squares)
    if name.startswith("dinov2"):
        return transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size=squares["size"])
    if name == "dinov3":  # its own has one form alone, which needs torchvision
        kind = transformers.DINOv3ViTImageProcessor if is_torchvision_available() else transformers.SiglipImageProcessor
        return kind(**squares)
    if name == "vit":
        return transformers.ViTImageProcessor(**squares)
    return transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=squares["size"])


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    for name, make in TOWERS.items():
        make().save_pretrained(root / name)
        image_processor(name).save_pretrained(root / name)
    save_tiny_llama(root / "llama")
    return root


@pytest.fixture(scope="module")
def composed(parts) -> Path:
    for name in TOWERS:
        command = ["compose", "--vision", str(parts / name), "--language", str(parts / "llama")]
        assert main([*command, "--out", str(parts / "composed" / name)]) == 0
    return parts / "composed"


@every_tower
def test_its_features_are_its_own(parts, composed, name):
    model = dsvl.DSVLForConditionalGeneration.from_pretrained(composed / name)
    processor = dsvl.DSVLProcessor.from_pretrained(composed / name)
    config = model.config
    assert type(processor.image_processor) is type(image_processor(name))
    assert (config.image_size, config.num_prefix_tokens, config.image_seq_length) == (SIZE, PREFIX[name], PER_IMAGE[name])
    assert processor.image_seq_length == PER_IMAGE[name]
    pixels = processor.image_processor(Image.radial_gradient("L").convert("RGB"), return_tensors="pt")["pixel_values"]
    tower = getattr(AutoModel.from_pretrained(parts / name), "vision_model", AutoModel.from_pretrained(parts / name))
    with torch.no_grad():
        features = model.get_image_features(pixels)
        assert features.last_hidden_state.equal(tower(pixels).last_hidden_state)
    assert features.pooler_output[0].shape == (PER_IMAGE[name], 64)


@every_tower
def test_it_loads_without_the_rest(composed, name):
    """As `--cache-image-features` does."""
    model = dsvl.DSVLForConditionalGeneration.from_pretrained(composed / name)
    tower = load_checkpoint_tower(str(composed / name), model.config, torch.float32)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        features = run_tower(tower, model.config, pixels).last_hidden_state
        assert features.equal(model.get_image_features(pixels).last_hidden_state)


@pytest.mark.parametrize("name", [name for name in TOWERS if name != "qwen"])
def test_class_tokens_and_registers_are_dropped_on_request(parts, name):
    full, _ = dsvl.compose(parts / name, parts / "llama")
    grid, processor = dsvl.compose(parts / name, parts / "llama", vision_feature_select_strategy="default")
    perceiver, _ = dsvl.compose(parts / name, parts / "llama", projector_type="perceiver")
    vit, _ = dsvl.compose(parts / name, parts / "llama", projector_type="vit", vision_feature_layer=-2)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert grid.get_image_features(pixels).last_hidden_state.equal(
            full.get_image_features(pixels).last_hidden_state[:, PREFIX[name] :]
        )
        assert processor.image_seq_length == 4 == len(grid.get_image_features(pixels).pooler_output[0])
        assert len(perceiver.get_image_features(pixels).pooler_output[0]) == 256
        assert len(vit.get_image_features(pixels).pooler_output[0]) == PER_IMAGE[name]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("name", "layer"), [(name, layer) for name in TOWERS for layer in (-1, -2, [1, -3]) if name != "qwen"] + [("qwen", -1)]
)
def test_a_step_reaches_all_that_learns(parts, name, trained, layer):
    model, processor = dsvl.compose(parts / name, parts / "llama", vision_feature_layer=layer)
    model.train()
    model.set_trainable(vision_tower=trained)
    tower = model.model.vision_tower
    assert tower.training == trained  # frozen, it neither drops layers nor moves its positions
    inputs = processor(text="<image> hello", images=torch.zeros(3, SIZE, SIZE, dtype=torch.uint8), return_tensors="pt")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # or DDP would wait for some
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if n in before and not p.equal(before[n])}
    assert any(n.startswith("model.multi_modal_projector") for n in changed)
    assert any(n.startswith("model.vision_tower") for n in changed) == trained


@every_tower
def test_adapters_of_the_tower_all_learn(parts, name):
    model, processor = dsvl.compose(parts / name, parts / "llama", vision_feature_layer=-1 if name == "qwen" else -2)
    adapted = peft.get_peft_model(model, lora_config(model, rank=2, vision=True)).train()
    inputs = processor(text="<image> hello", images=torch.zeros(3, SIZE, SIZE, dtype=torch.uint8), return_tensors="pt")
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []
    assert any("vision_tower" in n and "lora_A" in n for n, _ in adapted.named_parameters())


FRESH = """
import json, sys
class NotInstalled:  # however the package is installed, and whatever the folders are called
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "dsvl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotInstalled)
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

root, *names = sys.argv[1:]
answers = {}
for name in names:
    model = AutoModelForImageTextToText.from_pretrained(f"{root}/composed/{name}", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(f"{root}/composed/{name}", trust_remote_code=True)
    image = Image.radial_gradient("L").convert("RGB")
    inputs = processor(text="<image> What is it?", images=image, return_tensors="pt")
    answers[name] = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()
tower = AutoModel.from_pretrained(f"{root}/qwen", trust_remote_code=True)
assert tower(torch.zeros(1, 3, 28, 28)).last_hidden_state.shape == (1, 9, 64)
print(json.dumps(answers))
"""


def test_a_fresh_process_without_the_package_gives_the_same_answers(parts, composed, tmp_path):
    script = tmp_path / "fresh.py"
    script.write_text(FRESH)
    shutil.copytree(migrated("E_qwen_mmca_on", mmca=True), composed / "migrated")
    names = [*TOWERS, "migrated"]
    command = [sys.executable, script, parts, *names]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.strip().splitlines()[-1])
    for name in names:
        model = dsvl.DSVLForConditionalGeneration.from_pretrained(composed / name)
        processor = dsvl.DSVLProcessor.from_pretrained(composed / name)
        image = Image.radial_gradient("L").convert("RGB")
        inputs = processor(text="<image> What is it?", images=image, return_tensors="pt")
        assert answers[name] == model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist(), name
    files = {path.name for path in (composed / "qwen").iterdir()}
    assert files >= {"vision_dsvl.py", "projectors_dsvl.py"}


# -- Qwen-VL's tower ---------------------------------------------------------------------------------------------------


def test_qwens_attention_backends_agree(parts, uncompiled):
    calls = []

    def recorded(*args, **kwargs):
        calls.append(args[0].is_causal)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    transformers.AttentionInterface.register("recorded", recorded)
    tower = dsvl.DSVLQwenVisionModel.from_pretrained(parts / "qwen", attn_implementation="eager").double()
    pixels = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    with torch.no_grad():
        eager = tower(pixels, output_attentions=True, output_hidden_states=True)
        for backend in ("sdpa", "flex_attention", "recorded"):
            tower.set_attn_implementation(backend)
            torch.testing.assert_close(tower(pixels).last_hidden_state, eager.last_hidden_state, atol=1e-6, rtol=1e-6)
    assert calls == [False, False]
    assert [a.shape for a in eager.attentions] == [(2, 4, 4, 4)] * 2
    assert [h.shape for h in eager.hidden_states] == [(2, 4, 32)] * 3


def test_qwens_tower_checkpoints_its_layers(parts):
    pixels = torch.randn(1, 3, SIZE, SIZE)
    gradients = []
    for recompute in (False, True):
        tower = dsvl.DSVLQwenVisionModel.from_pretrained(parts / "qwen").train()
        calls = []
        tower.layers[0].mlp.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        if recompute:
            tower.activation_checkpointing_enable({"use_reentrant": False})
        tower(pixels).last_hidden_state.square().sum().backward()
        assert len(calls) == 1 + recompute
        gradients.append(tower.embeddings.patch_embedding.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("side", [14, 28, 56, 70])
def test_qwens_tower_takes_squares_of_any_size(parts, side):
    tower = dsvl.DSVLQwenVisionModel.from_pretrained(parts / "qwen")
    assert tower(torch.randn(1, 3, side, side)).last_hidden_state.shape == (1, 9, 64)
    with pytest.raises(ValueError, match=rf"Images of {side} x 84 pixels; this tower takes squares"):
        tower(torch.randn(1, 3, side, 84))


def test_qwens_tower_is_as_large_as_published():
    with torch.device("meta"):
        tower = dsvl.DSVLQwenVisionModel(dsvl.DSVLQwenVisionConfig())
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in tower.named_children()}
    # 1.9 billion and 0.08 billion (arXiv 2308.12966, table 1)
    assert sum(sizes.values()) - sizes["resampler"] == 1_842_778_880 and sizes["resampler"] == 76_054_528
    assert count_prefix_tokens(tower, 448) == 0


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_towers_that_do_not_fit_are_refused_by_name(parts):
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "tokenizer")
    decoder = transformers.LlamaForCausalLM(LlamaConfig(**TEXT))

    def compose(vision, size=SIZE, **kwargs):
        squares = transformers.SiglipImageProcessor(size={"height": size, "width": size})
        return dsvl.compose(vision, decoder, tokenizer=tokenizer, **{"image_processor": squares} | kwargs)

    naflex = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**WIDTHS, intermediate_size=48))
    with pytest.raises(ValueError, match=r"SiglipImageProcessor\w* makes no patches of 14 pixels"):
        compose(naflex)
    with pytest.raises(ValueError, match="returns images of 56 pixels, which CLIPVisionModel does not support.*size, 28"):
        compose(parts / "clip", size=56)
    with pytest.raises(ValueError, match="expected one square for both"):
        compose(parts / "clip", image_processor=transformers.CLIPImageProcessor(do_center_crop=False))
    swin = transformers.SwinModel(
        transformers.SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2])
    )
    with pytest.raises(
        ValueError, match="SwinModel returns features of shape .* Use a tower that returns a feature for every"
    ):
        compose(swin, size=64)
    with pytest.raises(ValueError, match="projector_type='perceiver' with Qwen-VL's tower.*choose projector_type='linear'"):
        compose(parts / "qwen", projector_type="perceiver")
    with pytest.raises(ValueError, match="vision_feature_layer=-2 with Qwen-VL's tower.*leave it at -1"):
        compose(parts / "qwen", vision_feature_layer=-2)
    with pytest.raises(ValueError, match=r"vision_feature_layer=\[-1, -2\] with Qwen-VL's tower.*leave it at -1"):
        compose(parts / "qwen", vision_feature_layer=[-1, -2])
