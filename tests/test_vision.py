"""Rows with images, which the trainer takes with a vision-language model: at lambda 1 it is DPOTrainer."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer

from dposhift_trl import DPOShiftConfig, DPOShiftTrainer


WORDS = ["<eos>", "<pad>", "<image>", "user", "assistant", *(f"w{index}" for index in range(40))]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' }}{% for part in message['content'] %}"
    "{{ ('<image>' if part['type'] == 'image' else part['text']) + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def vision_model(tmp_path):
    """A LLaVA with two layers of random weights and images of 2 x 2 patches, and its processor."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LlavaProcessor(
        pixels, tokenizer, patch_size=4, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**layers, image_size=8, patch_size=4, projection_dim=16),
        text_config=LlamaConfig(**layers, vocab_size=len(WORDS), pad_token_id=1, bos_token_id=0, eos_token_id=0),
        image_token_index=2,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model"), processor


def message(role, content):
    return [{"role": role, "content": content}]


def rows(seed):
    rng = np.random.default_rng(seed)
    return Dataset.from_list(
        [
            {
                "prompt": message("user", f"w{index}"),
                "chosen": message("assistant", f"w{index + 1} w2"),
                "rejected": message("assistant", f"w{index + 3}"),
                "images": [Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))],
            }
            for index in range(4)
        ]
    )


def test_rows_with_images_train_as_with_dpo_trainer_and_with_a_shift(vision_model, settings):
    folder, processor = vision_model

    def train(trainer_class, config, seed=0, **options):
        args = config(**{**settings, "max_steps": 2, "per_device_train_batch_size": 2, "max_length": None}, **options)
        trainer = trainer_class(folder, args=args, train_dataset=rows(seed), processing_class=processor)
        trainer.train()
        return trainer.model.state_dict()

    def equal(some, others):
        return all(torch.equal(some[name], others[name]) for name in some)

    expected = train(DPOTrainer, DPOConfig)
    fixed = {"lambda_schedule": "fixed"}
    assert equal(train(DPOShiftTrainer, DPOShiftConfig, shift_lambda=1.0, **fixed), expected)
    assert not equal(train(DPOShiftTrainer, DPOShiftConfig, shift_lambda=0.5, **fixed), expected)
    assert not equal(train(DPOTrainer, DPOConfig, seed=1), expected)  # the images are read
