"""pretrain.py on two gloo processes, however they share the model, is pretrain.py on one."""
import signal

import pytest
import torch.distributed.run

from conftest import ROOT, distance, kill_at, load, make_mid, read_log, stocked

SHAPES = dict(llama=[], gpt2=['--arch=gpt2', '--n_kv_head=0', '--key_shift=true'],
              untied=['--tie_embeddings=false', '--qk_norm=true', '--n_layer=3'])

@pytest.fixture(scope='module')
def command(world):
    """Six steps of 8 windows, in micro-batches of 2."""
    return lambda out, *flags: ('pretrain.py', world.short, f'--data_dir={world.data}', f'--out_dir={out}', *flags,
                                '--total_batch_size=8', '--batch_size=2', '--max_iters=6', '--learning_rate=1e-3',
                                '--eval_interval=2', '--eval_iters=9', '--save_interval=100')

@pytest.fixture(scope='module')
def one(command, scripts, tmp_path_factory):
    """A shape and an optimizer -> out_dir of the run on one process."""
    made = {}
    def get(shape, optimizer):
        if (shape, optimizer) not in made:
            out = made[shape, optimizer] = tmp_path_factory.mktemp('one')
            scripts.ok(*command(out, *SHAPES[shape], f'--optimizer={optimizer}'))
        return made[shape, optimizer]
    return get

def same(a, b, tolerance=1e-5, stage='base'):
    assert distance(a / f'{stage}.pt', b / f'{stage}.pt') < tolerance
    for r, s in zip(read_log(a / f'{stage}.jsonl'), read_log(b / f'{stage}.jsonl'), strict=True):
        assert r.keys() == s.keys() and r['step'] == s['step']
        assert all(abs(r[k] - s[k]) < tolerance for k in ('loss', 'val_loss', 'val_bpb') if k in r), (r, s)
        assert r.get('norm', 0) == pytest.approx(s.get('norm', 0), rel=1e-4)

@pytest.mark.parametrize('parallel,shape,optimizer', [
    ('ddp', 'untied', 'muon'), ('fsdp', 'llama', 'adamw'), ('fsdp', 'gpt2', 'adamw'), ('pipeline', 'llama', 'adamw'),
    ('pipeline', 'gpt2', 'muon'), ('pipeline', 'untied', 'adamw')])
def test_two_processes_are_one(parallel, shape, optimizer, command, one, scripts, tmp_path):
    said = scripts.two(*command(tmp_path, *SHAPES[shape], f'--optimizer={optimizer}', f'--parallel={parallel}'))
    assert said[1].out == '' and 'saved' in said[0].out
    same(tmp_path, one(shape, optimizer))
    assert load(tmp_path / 'base.pt')['step'] == 6

def test_a_checkpoint_of_any_continues_in_any_other(command, one, scripts, tmp_path):
    """fsdp, stopped; pipeline, stopped; two processes with ddp, stopped; one process to the end."""
    shape = 'gpt2' # the hardest one: both ends of its pipeline hold the tied embeddings
    for parallel, at in (('fsdp', 1), ('pipeline', 2), ('ddp', 3)):
        with pytest.raises(AssertionError, match=f'stopped at step {at + 1} and saved'):
            scripts.two(*command(tmp_path, *SHAPES[shape], f'--parallel={parallel}'),
                        before=kill_at(at, signal.SIGTERM))
        saved = load(tmp_path / 'base.resume.pt')
        assert saved['step'] == at + 1
        weights, moments = saved['state']['weights'], saved['state']['optimizers']['state']
        assert all(moments[name]['exp_avg'].shape == weights[name].shape for name in moments)
        assert {'wte.weight', 'norm.weight', 'blocks.0.mlp.up.weight', 'blocks.1.mlp.up.weight'} <= set(moments)
    said = scripts.ok(*command(tmp_path, *SHAPES[shape], '--batch_size=8')).out
    assert 'at step 4' in said
    same(tmp_path, one(shape, 'adamw'))

def test_mid_training_moves_to_other_numbers_of_processes(chain, scripts, tmp_path):
    """Two processes with fsdp, stopped; two with ddp, stopped; one to the end: as one from the beginning."""
    data = make_mid(chain.data, tmp_path / 'data')
    def command(out, *flags):
        return ('pretrain.py', chain.short, '--stage=mid', f'--data_dir={data}', f'--out_dir={out}', *flags,
                '--total_batch_size=8', '--eval_interval=2', '--eval_iters=99')
    moved, whole = (stocked(tmp_path / name, chain, 'base') for name in ('moved', 'whole'))
    for parallel, at in (('fsdp', 1), ('ddp', 3)):
        with pytest.raises(AssertionError, match=f'stopped at step {at + 1} and saved'):
            scripts.two(*command(moved, f'--parallel={parallel}', '--batch_size=2'),
                        before=kill_at(at, signal.SIGTERM))
    assert 'at step 4' in scripts.ok(*command(moved, '--batch_size=4')).out
    scripts.ok(*command(whole, '--batch_size=8'))
    same(moved, whole, stage='mid')

def test_muon_continues_from_a_pipeline(command, one, scripts, tmp_path):
    flags = (*SHAPES['gpt2'], '--optimizer=muon')
    with pytest.raises(AssertionError, match='stopped at step 3'):
        scripts.two(*command(tmp_path, *flags, '--parallel=pipeline'), before=kill_at(2, signal.SIGTERM))
    with pytest.raises(AssertionError, match='stopped at step 5'):
        scripts.ok(*command(tmp_path, *flags), before=kill_at(4, signal.SIGTERM))
    scripts.two(*command(tmp_path, *flags, '--parallel=pipeline'))
    same(tmp_path, one('gpt2', 'muon'))

def test_ddp_resumes_bit_for_bit(command, scripts, tmp_path):
    flags = ('--dropout=0.2', '--optimizer=muon')
    scripts.two(*command(tmp_path / 'whole', *flags))
    with pytest.raises(AssertionError, match='stopped at step 4'):
        scripts.two(*command(tmp_path / 'cut', *flags), before=kill_at(3, signal.SIGTERM))
    scripts.two(*command(tmp_path / 'cut', *flags))
    assert distance(tmp_path / 'cut' / 'base.pt', tmp_path / 'whole' / 'base.pt') == 0
    assert read_log(tmp_path / 'cut' / 'base.jsonl') == read_log(tmp_path / 'whole' / 'base.jsonl')

def test_under_torchrun(command, one, scripts, tmp_path):
    """The launcher of the docstring: only rank 0 speaks. The launcher is warm, the processes that it starts are not."""
    script, *flags = command(tmp_path)
    said = scripts.ok(torch.distributed.run.__file__, '--standalone', '--nproc_per_node=2', ROOT / script, *flags).out
    assert said.count('saved ') == said.count('device: ') == 1
    same(tmp_path, one('llama', 'adamw'))

def test_what_does_not_go_together(command, scripts, tmp_path):
    env = dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0)
    alone = 'import torch.distributed as d; d.init_process_group = d.destroy_process_group = lambda *a: 0'
    for flags, words in ((('--parallel=fsdp', '--optimizer=muon'), 'muon needs whole ones: use adamw'),
                         (('--parallel=pipeline', '--n_layer=1'), 'as many layers and micro-batches, not 1 and 4'),
                         (('--batch_size=3',), r'total_batch_size 8 is not .* 3 x 2 processes: --total_batch_size=6')):
        scripts.fails(words, *command(tmp_path)[:4], '--total_batch_size=8', '--batch_size=2', *flags,
                      env=env, before=alone)
