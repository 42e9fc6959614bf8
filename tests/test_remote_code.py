"""The code that travels with a checkpoint, wherever the checkpoint lies."""

import pytest
import torch
from training_runs import make_checkpoint
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import dsvl


@pytest.mark.parametrize("name", ["模型", "modèle", "with space", "dsvl"])
def test_a_directory_may_have_any_name(name, tmp_path):
    checkpoint = make_checkpoint(tmp_path, name)
    model_class = get_class_from_dynamic_module("modeling_dsvl.DSVLForConditionalGeneration", str(checkpoint))
    assert model_class is not dsvl.DSVLForConditionalGeneration
    model = model_class.from_pretrained(checkpoint)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    expected = dsvl.DSVLForConditionalGeneration.from_pretrained(checkpoint)(input_ids=torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(logits, expected)


def test_the_auto_class_of_multimodal_models_knows_it(tmp_path):
    checkpoint = make_checkpoint(tmp_path)
    model = AutoModelForMultimodalLM.from_pretrained(checkpoint)
    assert type(model) is dsvl.DSVLForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(checkpoint)) is dsvl.DSVLProcessor


def test_the_tables_that_other_libraries_ask_know_it():
    """TRL tells by this table whether a model sees images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["dsvl"] == "DSVLForConditionalGeneration"
