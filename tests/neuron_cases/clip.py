# aws-neuron-samples hf_pretrained_clip_base_inference_on_inf2
"""CLIP."""

import torch
from transformers import CLIPConfig, CLIPModel

c = CLIPConfig(
    text_config=dict(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        eos_token_id=199,
        bos_token_id=1,
        pad_token_id=0,
    ),
    vision_config=dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    ),
    projection_dim=16,
)


class Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = CLIPModel(c)

    def forward(self, input_ids, pixel_values, attention_mask):
        out = self.model(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)
        return out.logits_per_image, out.logits_per_text


module = Scores().eval()


def ex(n):
    m = torch.ones(2, 8, dtype=torch.long)
    m[:, n:] = 0
    ids = torch.randint(2, 198, (2, 8))
    ids[:, n - 1] = 199
    return ids, torch.randn(1, 3, 32, 32), m


examples = [ex(5), ex(7), ex(8)]
