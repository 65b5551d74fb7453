# optimum-neuron supported architectures: Whisper (decoder without a cache)
"""The decoder of Whisper."""

import torch
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

c = WhisperConfig(
    vocab_size=200,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_source_positions=20,
    max_target_positions=16,
    num_mel_bins=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=3,
)


class D(nn.Module):
    def __init__(self):
        super().__init__()
        m = WhisperForConditionalGeneration(c)
        self.decoder, self.head = m.model.decoder, m.proj_out

    def forward(self, decoder_input_ids, encoder_hidden_states):
        return self.head(
            self.decoder(
                input_ids=decoder_input_ids, encoder_hidden_states=encoder_hidden_states, use_cache=False
            ).last_hidden_state
        )


module = D().eval()
examples = [(torch.randint(4, 200, (1, 16)), torch.randn(1, 20, 32)) for _ in range(2)]
