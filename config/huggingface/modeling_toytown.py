"""
A model of this project with `key_shift` (see Attention in model.py), for Hugging Face's transformers.
None of its own classes has this, so convert.py copies this file into the folder that it writes:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The rest is Qwen3: RMSNorm, rotary positions, normed queries and keys, gated MLP. Without qk_norm it
is Llama, which is Qwen3 without the norms of queries and keys.
"""
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

class ToytownConfig(Qwen3Config):
    model_type = 'toytown'
    qk_norm: bool = True    # norm queries and keys
    key_shift: bool = True  # half of the key heads use the key of the token before

class ToytownForCausalLM(Qwen3ForCausalLM):
    config_class = ToytownConfig

    def __init__(self, config):
        super().__init__(config)
        self.has_previous = None # (B, T): 1 where a token stands before this one
        for layer in self.model.layers:
            attention = layer.self_attn
            if not config.qk_norm:
                attention.q_norm = nn.Identity()
                attention.k_norm = nn.Identity()
            # what the hook returns takes the place of the normed keys
            attention.k_norm.register_forward_hook(self.shift_keys)
        self.post_init()

    def shift_keys(self, module, inputs, keys):
        """Keys (B, T, H_kv, D): the second half of the heads gets the key of the token before."""
        half = keys.size(2) // 2
        shifted = F.pad(keys[:, :-1, half:], (0, 0, 0, 0, 1, 0)) # a row of zeros comes first
        shifted = shifted * self.has_previous[:, :, None, None]
        return torch.cat((keys[:, :, :half], shifted), dim=2)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        for name in ('past_key_values', 'cache', 'inputs_embeds'):
            if kwargs.get(name) is not None:
                raise ValueError(f'{name} is not supported: give all ids, use_cache=False')
        kwargs['use_cache'] = False
        is_real = torch.ones_like(input_ids)
        if attention_mask is not None and attention_mask.dim() == 2:
            is_real = attention_mask # 0 at padding, which is nothing that stands before a token
        self.has_previous = F.pad(is_real[:, :-1], (1, 0))
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        # No cache: a new token needs the key of the one before it, which a cache keeps shifted.
        return dict(input_ids=input_ids, attention_mask=attention_mask)
