"""
What a run of pretrain.py would need, without running it: `python pretrain.py config/d32.py --estimate=8xH100` prints
parameters by group, FLOPs a token, memory on each GPU, hours and dollars. The model is on PyTorch's meta device: shapes
without numbers, so that any size fits a laptop.
"""
import math, re
from dataclasses import fields

import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, PEAKS, die, print0

# bf16 (or fp16) TFLOP/s of PEAKS in model.py is what the maker says is possible; training reaches a good third of it
MFU = 0.4
MEMORY = dict(B200=192, H200=141, H100=80, A100=80, L40S=48, L4=24, A10=24, T4=16, V100=32, MI300X=192) # GB
MEMORY.update({'RTX 4090': 24, 'RTX 3090': 24})
DOLLARS = dict(B200=5.0, H200=3.5, H100=3.0, A100=1.8, L40S=1.0, L4=0.7, A10=0.75, T4=0.4) # an hour, about, in 2025

class Flash(torch.autograd.Function):
    """Stands in for attention: what a fused kernel keeps for its backward pass, queries, keys, values, result."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, torch.empty(q.shape[:-1], device=q.device)) # and each row's log-sum-exp
        return y

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError

def activations(model_args, batch_size, dtype=torch.bfloat16):
    """Bytes kept between forward and backward of a micro-batch, all layers and the loss: counted, not estimated."""
    with torch.device('meta'):
        gpt = GPT(model_args).to(dtype)
        x = torch.zeros(batch_size, model_args.block_size, dtype=torch.long)
    weights = {p.untyped_storage()._cdata for p in [*gpt.parameters(), *gpt.buffers()]}
    kept, real = {}, F.scaled_dot_product_attention
    def keep(t):
        storage = t.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes(), t # t lives on, or its storage's number would be given again
        return t
    F.scaled_dot_product_attention = lambda q, k, v, **_: Flash.apply(q, k, v)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            F.cross_entropy(gpt(x).float().flatten(0, 1), x.flatten())
    finally:
        F.scaled_dot_product_attention = real
    gradients = x.numel() * model_args.vocab_size * (4 + torch.finfo(dtype).bits // 8) # of the logits, fp32 and dtype
    return sum(n for n, _ in kept.values()) + gradients

def estimate_run(settings, vocab_size):
    """Print all of it for the settings of pretrain.py."""
    names = 'estimate', 'batch_size', 'optimizer', 'parallel'
    hardware, batch_size, optimizer, parallel = (settings[name] for name in names)
    shape = {f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings}
    model_args = GPTConfig(**shape, vocab_size=vocab_size)
    count, _, gpu = hardware.rpartition('x')
    if not re.fullmatch('[1-9][0-9]*', count or '1') or gpu not in MEMORY:
        die(f"estimate is a number of GPUs and their kind, as 8xH100, not {hardware!r}; kinds: {', '.join(MEMORY)}")
    n_gpus = int(count or 1)
    with torch.device('meta'):
        gpt = GPT(model_args)
    kinds = dict(wte='embedding', wpe='positions', smear='embedding', head='output matrix')
    groups = {}
    for name, p in gpt.named_parameters():
        group = kinds.get(name.split('.')[0], 'norms')
        group = 'attention' if '.attn.' in name else 'MLP' if '.mlp.' in name else group
        groups[group] = groups.get(group, 0) + p.numel()
    n, per_token = gpt.n_params(), gpt.flops_per_token(model_args.block_size)
    attention = 12 * model_args.n_layer * model_args.n_embd * model_args.block_size
    per_step = (settings['total_batch_size'] or batch_size * n_gpus) * model_args.block_size
    tokens = (settings['max_iters'] or math.ceil(settings['tokens_per_param'] * n / per_step)) * per_step
    hours = tokens * per_token / (n_gpus * PEAKS[gpu] * 1e12 * MFU) / 3600
    cut = 1 if parallel == 'ddp' else n_gpus
    inner = sum(p.numel() for name, p in gpt.named_parameters() if name.startswith('blocks.') and p.dim() > 1)
    states = 8 * n - (4 * inner if optimizer == 'muon' else 0) # AdamW keeps two fp32 numbers a parameter, Muon one
    parts = {'weights, fp32': 4 * n / cut, 'gradients, fp32': 4 * n / cut, f'states of {optimizer}': states / cut,
             f'activations of {batch_size} x {model_args.block_size} tokens, bf16': activations(model_args, batch_size)}
    if parallel == 'fsdp':
        largest = max(sum(p.numel() for p in part.parameters()) for part in (gpt.blocks[0], gpt.wte))
        parts['two layers put together, bf16, and a gradient'] = (2 * 2 + 4) * largest
    need, room = sum(parts.values()), MEMORY[gpu] * 1e9
    print0(f'parameters: {n:,} = ' + ' + '.join(f'{v:,} {k}' for k, v in groups.items()))
    print0(f'FLOPs a token: {per_token:.3e}, {attention / per_token:.0%} of it attention over {model_args.block_size} '
           'tokens')
    print0(f'memory on each of {n_gpus} {gpu}, {parallel}:')
    for what, size in parts.items():
        print0(f'  {size / 1e9:8.2f} GB  {what}')
    fits = need < 0.92 * room # CUDA itself takes some
    print0(f'  {need / 1e9:8.2f} GB  of {room / 1e9:.0f}: '
           + ('fits' if fits else 'does NOT fit: --parallel=fsdp, a smaller --batch_size, or more GPUs'))
    print0(f'tokens: {tokens:,}, {tokens / n:.1f} a parameter, {per_step:,} a step')
    rate = DOLLARS.get(gpu)
    price = f'; {hours * n_gpus * rate:,.0f} dollars at {rate:.2f} a GPU and hour' if rate else ''
    print0(f'time: {tokens * per_token:.2e} FLOPs at {MFU:.0%} of {PEAKS[gpu]} TFLOP/s: {hours:,.2f} hours{price}')
