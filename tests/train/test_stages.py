"""The stages' configs say what Table 8 of the paper says."""

import jax
import pytest

from qwenvl_jax import configuration
from qwenvl_jax.sharding import MESH_AXES
from qwenvl_jax.train.loop import TrainConfig
from qwenvl_jax.train.step import check_batch

# Stage: trained, resolution, length, peak, end, layer decay, steps, warm-up,
# global batch, accumulation, model parallel.
TABLE_8 = {
  'stage1': (
    ('vision/.*', 'adapter/.*'),
    *(224, 512, 2e-4, 1e-6, 0.95, 50_000, 500, 30_720, 6, 1),
  ),
  'stage2_unpacked': (
    ('.*',),
    *(448, 2048, 5e-5, 1e-5, 0.95, 19_000, 400, 4_096, 8, 2),
  ),
  'stage3': (
    ('adapter/.*', 'decoder/.*'),
    *(448, 2048, 1e-5, 1e-6, None, 8_000, 3_000, 128, 8, 2),
  ),
}


TOPOLOGY_FILES = sorted(
  path
  for path in (configuration.CONFIGS / 'topology').glob('*/*.gin')
  if path.name != 'mesh.gin'
)


def stage(name, *more):
  given = ['INIT="i"']
  if name.startswith('stage1'):
    given = ['VISION="v"', 'DECODER="d"']
  elif name.startswith('finetune/'):
    given = ['BASE="b"', 'RECORDS=100']
  configuration.load([f'{name}.gin', *more], ['STREAMS=[]', *given])
  return configuration.build(TrainConfig)


@pytest.mark.parametrize('name', TABLE_8)
def test_table_8(name):
  c = stage(name)
  o, data = c.optimizer, c.data
  assert TABLE_8[name] == (
    o.trainable,
    data.image_size,
    data.sequence_length,
    o.peak,
    o.end,
    o.vision_layer_decay,
    o.steps,
    o.warmup,
    data.batch_size,
    c.accumulation,
    c.mesh.tensor,
  )
  assert (o.b1, o.b2, o.eps) == (0.9, 0.98, 1e-6)
  assert (o.weight_decay, o.clip) == (0.05, 1.0)
  model = c.objective.config
  assert (model.dtype, model.param_dtype) == ('bfloat16', 'float32')
  assert model.adapter.queries == data.image_tokens == 256
  assert model.vision.image_size == data.image_size
  assert model.remat == 'none'


@pytest.mark.parametrize(
  ('packed', 'unpacked', 'samples_a_row'),
  [('stage1_packed', 'stage1', 6.9), ('stage2', 'stage2_unpacked', 3.7)],
)
def test_packing_changes_rows_only(packed, unpacked, samples_a_row):
  packed, unpacked = stage(packed), stage(unpacked)
  assert packed.optimizer == unpacked.optimizer
  assert packed.accumulation == unpacked.accumulation
  assert packed.mesh == unpacked.mesh
  assert packed.data.packer and not unpacked.data.packer
  # As many samples in a step, to a tenth.
  samples = packed.data.batch_size * samples_a_row
  assert samples == pytest.approx(unpacked.data.batch_size, rel=0.1)
  # As many images as a row has room for.
  length = packed.data.sequence_length
  assert packed.data.image_slots == length // (packed.data.image_tokens + 2)


@pytest.mark.parametrize(
  'file', TOPOLOGY_FILES, ids=lambda file: '/'.join(file.parts[-2:])
)
def test_batches_split_over_their_pods(file):
  """configs/topology/GENERATION_CHIPS/STAGE.gin, after STAGE.gin."""
  folder, name = file.parts[-2:]
  of_stage = (configuration.CONFIGS / name).is_file()
  prefix = '' if of_stage else 'finetune/'
  c = stage(prefix + file.stem, f'topology/{folder}/{name}')
  data, fsdp, tensor = c.mesh.sizes(int(folder.split('_')[1]))
  inner = c.mesh.inner
  sizes = (data, fsdp // inner, inner, tensor)
  mesh = jax.sharding.AbstractMesh(sizes, MESH_AXES)
  check_batch(c.data.batch_size, c.accumulation, mesh)


def test_where_stages_start():
  first, second = stage('stage1').init, stage('stage2').init
  assert (first.vision, first.decoder, first.folder('adapter')) == (
    'v',
    'd',
    None,
  )
  assert {second.folder(x) for x in ('vision', 'adapter', 'decoder')} == {'i'}
