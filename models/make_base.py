"""Make a checkpoint of the size of ``Salesforce/blip-vqa-base``: ``python models/make_base.py build/blip-base-random``.

The architecture is that checkpoint's, 361 M parameters; the weights are random, from a fixed seed. Its answers make no
sense, but they depend on the picture and on the question, which is what it takes to compare compiled with eager.
"""

import argparse

import torch
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipProcessor,
)

from blip_helpers import MODELS

SEED = 0
IMAGE_SIZE = 384
VOCABULARY = 30524
SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 30522: "[DEC]", 30523: "[ENC]"}


def make_tokenizer():
    """The bundled model's words in a vocabulary of full size, special tokens where blip-vqa-base has them."""
    bundled = AutoTokenizer.from_pretrained(MODELS / "tiny-blip-vqa").get_vocab()
    words = iter(word for word in sorted(bundled, key=bundled.get) if word not in SPECIAL.values())
    vocabulary = {}
    for number in range(VOCABULARY):
        word = SPECIAL.get(number) or (number > 103 and next(words, None)) or f"[unused{number}]"
        vocabulary[word] = number
    return BertTokenizer(vocabulary, bos_token="[DEC]", extra_special_tokens=["[ENC]"], model_max_length=512)


def make_model():
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = BlipConfig(
        text_config={
            **size,
            "vocab_size": VOCABULARY,
            "bos_token_id": 30522,
            "eos_token_id": 102,
            "sep_token_id": 102,
            "pad_token_id": 0,
        },
        # The default range, 1e-10, would make all pictures alike.
        vision_config={**size, "image_size": IMAGE_SIZE, "patch_size": 16, "initializer_range": 0.02},
    )
    torch.manual_seed(SEED)
    model = BlipForQuestionAnswering(config)
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding, std=0.1)
    return model


def main():
    parser = argparse.ArgumentParser(description="Make a BLIP of full size with random weights.")
    parser.add_argument("directory", help="where to, for example build/blip-base-random (1.4 GB)")
    directory = parser.parse_args().directory
    image_processor = BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    BlipProcessor(image_processor, make_tokenizer()).save_pretrained(directory)
    model = make_model()
    model.save_pretrained(directory)
    print(f"{directory}: {model.num_parameters() / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
