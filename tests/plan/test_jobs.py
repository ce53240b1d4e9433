import dataclasses

import numpy as np
import pytest

from qwenvl_jax.data.formats import Text
from qwenvl_jax.data.pipeline import Pipeline, Stream
from qwenvl_jax.data.records import Record
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.plan import jobs
from qwenvl_jax.sharding import MeshConfig, make_mesh


class Documents:
  """A source of a few texts."""

  name = 'documents'

  def open(self):
    return [Record(id=str(n), text='all work and no play ') for n in range(4)]


def test_abstract_batches_are_those_of_the_data():
  made = Pipeline(
    streams=[Stream(Documents(), Text())],
    sequence_length=64,
    image_size=28,
    image_tokens=4,
    image_slots=3,
    batch_size=2,
  )
  batch = next(made.iterator())
  abstract = jobs.abstract_batch(made, make_mesh(MeshConfig()))
  assert {name: (x.shape, x.dtype) for name, x in abstract.items()} == {
    name: (np.asarray(x).shape, np.asarray(x).dtype)
    for name, x in batch.items()
  }


def test_a_job_of_training(configured, pod):
  wanted, devices = pod('v5e:2x4')
  job = jobs.make('train', configured('stage1.gin'), devices)
  assert (job.accumulation, job.steps) == (2, 50_000)
  assert job.work.rows == 16 and job.work.images == 1
  assert {path.split('/')[0] for path in job.trained} == {'vision', 'adapter'}


def test_ideal_arguments_are_split_by_all_chips_but_copies(configured, pod):
  _, devices = pod('v5e:2x4')
  ideal = {
    data: jobs.make(
      'train',
      configured(
        'stage2.gin', f'MeshConfig.data={data}', 'Pipeline.image_slots=0'
      ),
      devices,
    ).ideal_argument_bytes
    for data in (1, 2)
  }
  # Six fields of 256 int32 or float32 a row; the state is all but that.
  batch = 16 * (6 * 256 * 4) / 8
  assert ideal[2] - batch == 2 * (ideal[1] - batch)


def test_inference_takes_the_parameters_as_they_are_loaded(configured, pod):
  _, devices = pod('v5e:2x4')
  config = configured('stage3.gin', 'MeshConfig.tensor=2')
  job = jobs.make('decode', config, devices, rows=8, length=128)
  assert job.work.length == 1 and job.work.keys == 128
  kernel = job.params['decoder']['blocks_1']['mlp']['up']['kernel']
  assert kernel.dtype == 'bfloat16'
  job = jobs.make('prefill', config, devices)
  assert (job.work.rows, job.work.length, job.work.logits) == (4, 256, 1)


@pytest.mark.parametrize(
  ('fsdp', 'cache_dtype', 'cache'),
  [
    (4, None, 2 * 256 * 2),
    # Chips that split parameters read each other's parts as well.
    (1, None, 2 * 256 * 2),
    (1, 'int8', 2 * (256 + 2 * 4)),
  ],
)
def test_what_a_step_of_decoding_reads(
  configured, pod, fsdp, cache_dtype, cache
):
  """By hand: 2 layers of width 256 and 2 heads, 512 hidden units and tokens."""
  _, devices = pod('v5e:2x4')
  config = configured(
    'stage3.gin',
    'MeshConfig.tensor=2',
    f'MeshConfig.data={4 // fsdp}',
    f'MeshConfig.fsdp={fsdp}',
  )
  job = jobs.make(
    'decode', config, devices, rows=8, length=128, cache_dtype=cache_dtype
  )
  matrices = 2 * (4 * 256 * 256 + 3 * 256 * 512) + 256 * 512
  vectors = 2 * 3 * 256 / 2 + (2 * 2 + 1) * 256
  cache *= 2 * 8 * 128 / 8
  assert job.hbm_read_bytes == 2 * (matrices / 2 + vectors) + cache


@pytest.mark.parametrize(
  ('what', 'bindings', 'settings', 'message'),
  [
    ('train', ['TrainConfig.accumulation=3'], {}, 'accumulation may be one of'),
    ('train', ['MeshConfig.fsdp=3'], {}, 'multiply to 8'),
    ('train', [], {'rows': 4}, '--rows=4: the configuration says'),
    ('decode', [], {'rows': 3}, 'batch must be a multiple of 8'),
    ('decode', [], {'length': 0}, '--length=0: must be at least 1'),
  ],
)
def test_what_does_not_divide(
  configured, pod, what, bindings, settings, message
):
  _, devices = pod('v5e:2x4')
  with pytest.raises(ConfigError, match=message):
    jobs.make(what, configured('stage2.gin', *bindings), devices, **settings)


def test_other_objectives_are_no_plan(configured, pod):
  _, devices = pod('v5e:2x4')
  config = configured('stage2.gin')
  other = dataclasses.replace(config, objective=object())
  with pytest.raises(ConfigError, match=r'objective\.NextToken'):
    jobs.make('train', other, devices)
