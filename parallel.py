"""
How pretrain.py is spread over the processes that torchrun starts: parallel = 'ddp', 'fsdp' or 'pipeline'.

    ddp        every process has the whole model and its share of the batch; gradients are averaged
    fsdp       the same, but weights, gradients and optimizer states lie in pieces, one on each process, and a layer is
               put together only while it computes (Rajbhandari et al. 2020; PyTorch's fully_shard): for large models
    pipeline   every process has some of the layers, and micro-batches follow one another through them (Narayanan et al.
               2019, "1F1B"; torch.distributed.pipelining): little traffic, for slow networks

All three give the numbers of one process up to rounding, and write the same checkpoints: whole weights by name, whole
optimizer states by name. What was saved by one goes on in another, and with another number of processes.
"""
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP

from model import all_sum, die

class Engine:
    """
    One process, or ddp, or fsdp. gpt: the model, which fsdp cuts in pieces; loss_fn(logits, y); accumulation:
    micro-batches in a step.
    """
    def __init__(self, gpt, parallel, run, loss_fn, accumulation, scaler):
        self.gpt, self.run, self.loss_fn, self.accumulation, self.scaler = gpt, run, loss_fn, accumulation, scaler
        self.sharded, self.replicated = (run.ddp and parallel == p for p in ('fsdp', 'ddp'))
        if self.sharded:
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
            # autocast casts activations; the policy, the pieces before they travel. Gradients are summed in fp32
            policy = MixedPrecisionPolicy(None if run.dtype == torch.float32 else run.dtype, torch.float32,
                                          cast_forward_inputs=False)
            mesh = dist.init_device_mesh(run.type, (run.world,))
            for block in gpt.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(gpt, mesh=mesh, mp_policy=policy)

    def wrap(self, compiled, optimizers):
        """The model, compiled or not, and the optimizers of its parameters, made after this."""
        self.model, self.optimizers = compiled, optimizers
        if self.replicated:
            self.model = DDP(compiled, device_ids=[self.run.device.index] if self.run.type == 'cuda' else None)

    def forward_backward(self, get_batch):
        """get_batch(micro) -> x, y (B, T). Leaves the mean gradient of the whole batch; returns the mean loss."""
        total = 0.0
        for micro in range(self.accumulation):
            last = micro == self.accumulation - 1 # gradients travel only with the last micro-batch
            if self.sharded:
                self.gpt.set_requires_gradient_sync(last)
            elif self.replicated:
                self.model.require_backward_grad_sync = last
            x, y = get_batch(micro)
            with self.run.autocast():
                logits = self.model(x)                                            # (B, T, V)
            # every batch is full, so the mean of the means is the mean over all tokens
            loss = self.loss_fn(logits, y) / self.accumulation
            self.scaler.scale(loss).backward()
            total += loss.item() # waits for the device
        return all_sum(total)[0] / self.run.world

    def clip(self, longest):
        """Shorten the gradient to `longest` (0: any); returns its length before."""
        for opt in self.optimizers if self.scaler.is_enabled() else ():
            self.scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(self.gpt.parameters(), longest or float('inf'))
        return (norm.full_tensor() if self.sharded else norm).item()

    def update(self, lr):
        for opt in self.optimizers:
            for group in opt.param_groups:
                group['lr'] = lr
            self.scaler.step(opt) # opt.step(), but for fp16

    def logits(self, x):
        """x (B, T) -> (B, T, V) for evaluation; None on processes of a pipeline that are not its end."""
        with self.run.autocast():
            return self.gpt(x)

class Pipeline(Engine):
    def __init__(self, gpt, run, loss_fn, accumulation, scaler):
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B
        super().__init__(gpt, 'pipeline', run, loss_fn, accumulation, scaler)
        self.first, self.last, L = run.rank == 0, run.rank == run.world - 1, len(gpt.blocks)
        self.tied = gpt.config.tie_embeddings
        if L < run.world or accumulation < run.world:
            die(f'a pipeline of {run.world} processes needs as many layers and micro-batches, not {L} and '
                f'{accumulation}: --nproc_per_node={min(L, run.world)}, --total_batch_size={run.world} x batch_size')
        for i in range(L): # what others have goes; what stays keeps its name
            if not L * run.rank // run.world <= i < L * (run.rank + 1) // run.world:
                gpt.blocks[i] = None
        if not self.first:
            gpt.wte = gpt.wpe = gpt.smear = None
        if not self.last:
            gpt.norm = gpt.head = None
        self.stage = Layers(gpt, self.first, self.last)
        self.ends = dist.new_group([0, run.world - 1])
        self.schedule = Schedule1F1B(PipelineStage(self.stage, run.rank, run.world, run.device), accumulation, loss_fn)

    def forward_backward(self, get_batch):
        x, y = map(torch.cat, zip(*map(get_batch, range(self.accumulation))))
        losses = []
        with self.run.autocast():
            self.schedule.step(*[x] * self.first, **dict(target=y, losses=losses) if self.last else {})
        if self.tied and (self.first or self.last): # one matrix at both ends: its gradient is the sum
            dist.all_reduce((self.gpt.wte if self.first else self.gpt.head).weight.grad, group=self.ends)
        return all_sum(torch.stack(losses).mean().item() if self.last else 0.0)[0]

    def clip(self, longest):
        grads = {n: p.grad for n, p in self.gpt.named_parameters()}
        twice = self.tied and not self.first # the matrix of both ends counts once
        squares = [g.double().square().sum().item() for n, g in grads.items() if not (twice and n == 'head.weight')]
        norm = all_sum(sum(squares))[0] ** 0.5
        for g in grads.values() if longest and norm > longest else ():
            g.mul_(longest / (norm + 1e-6))
        return norm

    def logits(self, x):
        with self.run.autocast():
            if not self.first:
                x = torch.empty(*x.shape, self.gpt.config.n_embd, device=self.run.device)
                dist.recv(x, self.run.rank - 1)
            x = self.stage(x)
        if self.last:
            return x
        dist.send(x.float(), self.run.rank + 1)

class Layers(nn.Module):
    """Those layers of a GPT that this process has; ids go into the first ones, logits come out of the last."""

    def __init__(self, gpt, first, last):
        super().__init__()
        self.gpt, self.first, self.last = gpt, first, last

    def forward(self, x):
        pos = torch.arange(x.size(1), device=x.device)
        x, rope = self.gpt.embed(x, pos) if self.first else x, self.gpt.rope(pos)
        for layer, block in enumerate(self.gpt.blocks):
            x = x if block is None else block(x, pos, rope, None, None, layer)
        return self.gpt.head(self.gpt.norm(x)) if self.last else x

# -----------------------------------------------------------------------------
# whole states, by name, however they lie

def whole(t, keep=True):
    """The whole of a tensor, on the CPU; where it is not kept, only taken part in: nothing."""
    t = t.full_tensor() if hasattr(t, 'full_tensor') else t
    return t.detach().cpu() if keep else None

def lie_as(t, other):
    """A whole tensor, in pieces if `other` is: this process's piece."""
    if not hasattr(other, 'full_tensor') or not t.dim():
        return t.to(other.device)
    return torch.distributed.tensor.distribute_tensor(t.to(other.device), other.device_mesh, other.placements)

class Whole:
    """Weights and optimizer states of the whole model by name: what base.resume.pt holds, however they lie here."""

    def __init__(self, gpt, optimizers, run, parallel):
        self.gpt, self.optimizers, self.run, self.pipeline = gpt, optimizers, run, parallel == 'pipeline' and run.ddp
        self.names, self.saved = {p: name for name, p in gpt.named_parameters()}, None

    def gather(self, optimizers=True):
        """Bring it together on rank 0, in memory of the CPU; all ranks must ask. Returns self."""
        keep = self.run.master or self.pipeline # with fsdp all of it on each process of a machine would not fit
        weights = {k: whole(v, keep) for k, v in self.gpt.state_dict().items()}
        states = {self.names[p]: {k: whole(v, keep) for k, v in state.items()}
                  for o in self.optimizers if optimizers for p, state in o.state.items()}
        if self.pipeline:
            parts = [None] * self.run.world if self.run.master else None
            dist.gather_object((weights, states), parts)
            weights, states = ({k: v for part in parts or () for k, v in part[i].items()} for i in range(2))
        self.saved = dict(weights=weights, states=states)
        return self

    def state_dict(self):
        return self.saved

    def load_state_dict(self, saved):
        weights, states = saved['weights'], saved['states']
        self.gpt.load_state_dict({k: lie_as(weights[k], v) for k, v in self.gpt.state_dict().items()})
        for o in self.optimizers:
            for group in o.param_groups:
                for p in group['params']: # the last process of a pipeline has the tied matrix by its other name
                    other = 'wte.weight' if self.names[p] == 'head.weight' else ''
                    state = states.get(self.names[p]) or states.get(other) or {}
                    o.state[p] = {k: lie_as(v, p) if v.dim() or group.get('fused') else v.clone()
                                  for k, v in state.items()}
