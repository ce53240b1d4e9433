"""Small programs with known figures, and the command, through the compiler."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.plan import compiling, estimate, flops, hlo, main
from qwenvl_jax.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def layers(pod):
  """The gradient of four layers on four chips that split the weights.

  Each chip has 256 rows of a width of 512.
  """
  wanted, devices = pod('v5e:2x2')
  mesh = make_mesh(MeshConfig(), devices)

  def struct(shape, *axes):
    place = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

  def loss(w, x):
    x, _ = jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, w)
    return jnp.sum(x.astype(jnp.float32) ** 2)

  w, x = struct((4, 512, 512), None, 'fsdp'), struct((1024, 512), 'fsdp')
  with jax.set_mesh(mesh):
    program = jax.jit(jax.grad(loss), out_shardings=w.sharding)
    compiled = compiling.compile_program(program.lower(w, x), quick=True)
  return wanted, compiled


def test_flops_of_a_small_program(layers):
  """Three products of [256,512] and [512,512] a layer, or two in the first."""
  _, compiled = layers
  one = 2 * 256 * 512 * 512
  found = flops.product_flops(hlo.parse(compiled.text))
  assert found in (11 * one, 12 * one)


def test_traffic_of_a_small_program(layers):
  """Weights gathered for each use and their gradients summed, nothing else."""
  wanted, compiled = layers
  found = estimate.estimate(hlo.parse(compiled.text), wanted.chip)
  weight = 2 * 512 * 512
  sent = {}
  for one, times, _ in found.collectives:
    if one.bytes >= weight / 4:
      sent[one.kind] = sent.get(one.kind, 0) + times * one.bytes
  # A ring of permutes may stand for a gather: three of four quarters travel.
  ring = sent.pop('collective-permute', 0) * 4 / 3
  reduced = sent.pop('reduce-scatter', 0) + sent.pop('all-reduce', 0)
  gathered = sent.pop('all-gather', 0)
  assert not sent
  assert 11 * weight <= gathered + reduced + ring <= 13 * weight


def test_memory_of_a_small_program(layers):
  _, compiled = layers
  assert compiled.fits
  assert compiled.argument_bytes == 2 * (4 * 512 * 512 + 1024 * 512) / 4
  assert compiled.peak_bytes > compiled.argument_bytes


def arguments(small, *more):
  changes = [f'--gin.{binding}' for binding in small]
  return ['--gin_file=stage2.gin', '--quick', '--json', *changes, *more]


def test_the_command_prints_what_is_promised(libtpu, small, capsys):
  flags = arguments(small, '--topology=v5e:2x2')
  assert main.command(flags) == 0
  plan = json.loads(capsys.readouterr().out)
  assert plan['fits'] and plan['mesh']['fsdp'] == 4
  for name in (
    'peak_hbm_bytes',
    'hbm_limit_bytes',
    'argument_bytes',
    'program_flops',
    'model_flops',
    'collective_bytes',
  ):
    assert plan[name] > 0, name
  assert plan['argument_bytes'] < plan['peak_hbm_bytes']
  assert 1 <= plan['flops_ratio'] < 2
  # Without a schedule that anybody would run, no times.
  for name in (
    'estimated_step_seconds',
    'estimated_mfu',
    'overlapped_share',
  ):
    assert plan[name] is None, name


def test_a_program_that_does_not_fit_is_an_answer(libtpu, small, capsys):
  """Keys and values of 2 layers of width 256, for 8 rows of 2**21 tokens."""
  flags = arguments(
    small, '--topology=v5e:1x1', '--what=decode', '--rows=8', '--length=2097152'
  )
  assert main.command(flags) == 1
  plan = json.loads(capsys.readouterr().out)
  assert not plan['fits']
  assert plan['peak_hbm_bytes'] >= 2 * 2 * 8 * 2**21 * 256 * 2
  assert any('--rows' in line for line in plan['advice'])


@pytest.mark.parametrize('what', ['eval', 'prefill', 'decode'])
def test_other_programs(libtpu, small, capsys, what):
  # The mesh is the stage's own in training, and found for inference.
  small = [change for change in small if 'MeshConfig' not in change]
  flags = arguments(small, '--topology=v5e:2x2', f'--what={what}')
  if what == 'decode':
    flags += ['--rows=8', '--length=4096']
  assert main.command(flags) == 0
  plan = json.loads(capsys.readouterr().out)
  assert plan['what'] == what and plan['trained_parameters'] == 0
  if what == 'decode':
    # Keys and values of 2 layers, a quarter on each chip.
    cache = 2 * 2 * 8 * 4096 * 256 * 2 / 4
    assert plan['argument_bytes'] > cache
    assert cache < plan['hbm_read_bytes'] < 1.2 * cache
    assert plan['peak_hbm_bytes'] - plan['argument_bytes'] < 0.1 * cache
    # All chips for each row, but not more than heads.
    assert (plan['mesh']['data'], plan['mesh']['tensor']) == (2, 2)
