import dataclasses
import io
import json

import pytest
from rich.console import Console

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.plan import jobs, main, report, search, topology
from qwenvl_jax.plan.plan import Plan, advice

STAGE = '--gin_file=stage2.gin'


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--topology=v5e:16x16'], 'no --gin_file given'),
    ([STAGE, '--topology=v5e:3x3'], 'v5e:16x16'),
    ([STAGE, '--topology=v5e:16x16', '--slices=0'], '--slices=0'),
    (
      [STAGE, '--topology=v5e:2x2', '--search', '--what=decode'],
      'leave out --what',
    ),
    ([STAGE, '--topology=v5e:2x2', '--search', '--budget=0'], '--budget=0'),
    (
      [STAGE, '--topology=v5e:2x2', '--gin.MeshConfig.fsdp=3'],
      'multiply to 4',
    ),
    (
      # 1,024 rows in 8 microbatches, for 3 x 128 shards.
      [STAGE, '--topology=v5e:16x16', '--gin.TrainConfig.accumulation=3'],
      'accumulation may be one of',
    ),
  ],
)
def test_mistakes_are_said_before_anything_is_compiled(libtpu, flags, message):
  with pytest.raises(ConfigError, match=message):
    main.command(flags)


@pytest.mark.parametrize(
  ('files', 'chips', 'slices', 'how', 'read', 'bindings'),
  [
    (['x/stage2.gin'], 'v5e:16x16', 1, {}, 'v5e_256/stage2.gin', []),
    (
      ['stage2.gin', 'mine.gin'],
      *('v5p:4x4x4', 2, {'what': 'eval'}),
      *('v5p_64/stage2.gin', ['MeshConfig.data=2']),
    ),
    # How a stage without settings of its own lies on the chips.
    (['mine.gin'], 'v5e:4x4', 1, {}, 'v5e_16/mesh.gin', []),
    (['stage3.gin'], 'v5e:4x4', 1, {'what': 'decode'}, None, []),
    (['stage2.gin'], 'v5e:16x16', 2, {'plain': True}, None, []),
    (['stage2.gin'], 'v5e:8x8', 2, {}, None, []),
    (['stage2.gin', 'topology/my.gin'], 'v5e:16x16', 1, {}, None, []),
  ],
)
def test_what_the_project_says_of_a_pod_is_read(
  files, chips, slices, how, read, bindings
):
  wanted = topology.parse(chips, slices)
  more = [f'topology/{read}'] if read else []
  assert main.pod_settings(files, wanted, **how) == (
    [files[0], *more, *files[1:]],
    bindings,
  )


@pytest.mark.parametrize(
  ('chips', 'slices', 'sizes'),
  [
    ('v5e:2x4', 1, (1, 1, 8)),
    ('v5p:2x2x1', 1, (1, 1, 4)),
    # A head is not split.
    ('v5e:8x8', 1, (2, 1, 32)),
    ('v5e:2x4', 2, (2, 1, 8)),
  ],
)
def test_inference_uses_all_chips_for_each_row(chips, slices, sizes):
  wanted = topology.parse(chips, slices)
  mesh = main.inference_mesh(32, wanted)
  assert mesh.sizes(wanted.chips) == sizes


def plan(**changes) -> Plan:
  figures = {field.name: 0 for field in dataclasses.fields(Plan)}
  figures |= {
    'topology': 'v5e:2x2',
    'what': 'train',
    'mesh': {'data': 1, 'fsdp': 4, 'tensor': 1},
    'fits': True,
    'hbm_limit_bytes': 2**34,
    'peak_hbm_bytes': 3 * 2**32,
    'ideal_argument_bytes': 1.0,
    'kept_bytes': {'frozen': 2**33, 'optimizer': 2**30},
    'hbm_read_bytes': None,
    'hbm_share': None,
    'estimated_step_seconds': 1.25,
    'estimated_mfu': 0.5,
    'overlapped_share': 0.75,
    'collectives': {
      'all-gather': {
        'count': 3,
        'bytes': 2e9,
        'overlapped_bytes': 1.5e9,
        'exposed_seconds': 0.125,
      }
    },
    'unknown_kernels': ['my_kernel.1'],
    'advice': ['more chips'],
  }
  return Plan(**figures | changes)


def printed(show, *arguments) -> str:
  out = io.StringIO()
  show(*arguments, Console(file=out, width=200))
  return out.getvalue()


def test_the_table_tells_estimates_from_facts():
  text = printed(report.show, plan())
  assert '12.00 GiB' in text and '75% of 16.00 GiB' in text
  assert '8.00 GiB' in text and '1.00 GiB' in text  # What is kept, by kind,
  assert '3.00 GiB' in text  # and the rest.
  assert '2.0 GB' in text and '3 times, 75% beside computation' in text
  assert 'estimated step' in text and '1.250 s' in text
  assert 'nothing ran on a TPU' in text
  assert 'Not counted: my_kernel.1' in text


def test_a_step_of_decoding_is_held_against_the_memory():
  text = printed(
    report.show,
    plan(
      hbm_read_bytes=8.19e9,
      hbm_bytes_per_second=819e9,
      hbm_share=0.8,
      estimated_step_seconds=0.0125,
    ),
  )
  assert '8.2 GB' in text and '10.00 ms at 819 GB/s' in text
  assert '12.50 ms' in text and '80%' in text
  assert '1.25 times what reading does' in text


def test_flops_of_a_token_are_not_nothing():
  text = printed(report.show, plan(program_flops=14.2e9, model_flops=8e14))
  assert '14.2 G' in text and '800.0 T' in text


def test_what_does_not_fit_is_told_what_would_help():
  text = printed(report.show, plan(fits=False))
  assert 'memory needed' in text and 'It does not fit' in text
  assert '1. more chips' in text and 'estimated step' not in text


def test_no_times_without_a_schedule():
  text = printed(
    report.show, plan(estimated_step_seconds=None, overlapped_share=None)
  )
  assert 'Compiled with little effort: no times.' in text
  assert 'estimated' not in text


def test_the_ranking_says_how_to_take_the_first():
  one = search.Candidate(1, 4, 1, 2, 2, 'full')
  ranked = [(one, plan(topology='v5e:2x2', flops_ratio=1.1))]
  text = printed(report.show_ranking, ranked, 3)
  assert '1 of 3 tried fit' in text
  assert '--gin.TrainConfig.accumulation=2' in text
  assert 'None of the 3 programs tried fits' in printed(
    report.show_ranking, [], 3
  )


def test_advice_divides(configured, pod):
  wanted, devices = pod('v5e:2x4')
  config = configured(
    'stage2.gin',
    'MeshConfig.data=2',
    'Pipeline.batch_size=48',
    "QwenVLConfig.remat='none'",
  )
  found = advice(jobs.make('train', config, devices), wanted)
  # Three rows a shard: no half of them.
  assert found[0].startswith(
    'smaller microbatches: TrainConfig.accumulation=6 leaves 1 of 3 rows'
  )
  assert "QwenVLConfig.remat='full' instead of 'none'" in found[1]
  assert 'MeshConfig.data=1 and fsdp=8 instead of data=2' in found[2]
  assert json.dumps(found)
