import pathlib

import pytest

from qwenvl_jax.plan import collectives, hlo
from qwenvl_jax.plan.estimate import (
  MEMORY_EFFICIENCY,
  estimate,
  seconds_on_links,
)
from qwenvl_jax.plan.topology import CHIPS

GOLDEN = pathlib.Path(__file__).parents[1] / 'goldens/hlo/two_slices.txt'
V5E, V5P = CHIPS['v5e'], CHIPS['v5p']
MIB = 2**20


def program(*lines):
  body = '\n  '.join(lines)
  return hlo.parse(f'ENTRY %main (a: f32[]) -> f32[] {{\n  {body}\n}}\n')


def cycles(number):
  return f'backend_config={{"estimated_cycles":"{number}"}}'


def test_golden_traffic():
  """Four layers of [2048,2048]: gathered twice, their gradients scattered."""
  found = estimate(hlo.parse(GOLDEN.read_text()), V5E).traffic
  weight = 2 * 2048 * 2048
  gathers = found['all-gather']
  assert (gathers.count, gathers.bytes) == (8, 8 * weight)
  # Backward, those of the loop ride along with the products.
  assert gathers.overlapped == 3 * weight
  scatters = found['reduce-scatter']
  # Padded from 2,048 rows to 2,112, as the compiler likes it.
  assert (scatters.count, scatters.bytes) == (4, 4 * 2 * 2112 * 2048)
  assert scatters.overlapped == 0
  between = found['all-reduce between slices']
  assert (between.count, between.bytes) == (4, 4 * weight / 4)
  assert set(found) == {
    'all-gather',
    'reduce-scatter',
    'collective-permute',
    'all-reduce between slices',
  }


def test_golden_cycles():
  """The sum over the program of what the compiler wrote beside it."""
  program = hlo.parse(GOLDEN.read_text())
  total = sum(
    visit.times * int(number)
    for visit in hlo.walk(program)
    if not visit.fused
    and (number := visit.instruction.attribute(r'estimated_cycles":"(\d+)'))
  )
  found = estimate(program, V5E)
  assert found.compute_seconds == pytest.approx(total / 1.5e9)
  assert found.seconds == pytest.approx(
    found.compute_seconds + found.exposed_seconds
  )


def test_a_pair_hides_what_runs_between():
  """A gather of 180 MB takes 1 ms; 0.6 ms of work runs beside it."""
  made = program(
    '%a = bf16[5625000]{0} parameter(0)',
    '%s = (bf16[5625000]{0}, bf16[90000000]{0}) all-gather-start(%a), '
    'replica_groups=[1,16]<=[16], dimensions={0}',
    f'%w = bf16[8]{{0}} fusion(%a), kind=kLoop, {cycles(900_000)}',
    '%d = bf16[90000000]{0} all-gather-done(%s)',
    f'ROOT %r = bf16[8]{{0}} fusion(%d), kind=kLoop, {cycles(1_500_000)}',
  )
  found = estimate(made, V5E)
  assert found.bytes == 180e6
  assert found.overlapped_share == 1
  assert found.compute_seconds == pytest.approx(1.6e-3)
  sending = 15 / 16 * 1e-3
  assert found.exposed_seconds == pytest.approx(sending - 0.6e-3)


def test_what_is_not_asynchronous_is_waited_for():
  made = program(
    '%a = f32[22500000]{0} parameter(0)',
    'ROOT %r = f32[22500000]{0} all-reduce(%a), replica_groups={{0,1},{2,3}}',
  )
  found = estimate(made, V5E)
  # 90 MB go round twice, in halves of a pair.
  assert found.exposed_seconds == pytest.approx(0.5e-3)
  assert found.overlapped_share == 0


def test_one_after_the_other_on_the_links():
  """Two gathers at once take as long as one after the other."""
  start = (
    '(bf16[5625000]{0}, bf16[90000000]{0}) all-gather-start(%a), '
    'replica_groups=[1,16]<=[16], dimensions={0}'
  )
  made = program(
    '%a = bf16[5625000]{0} parameter(0)',
    f'%s = {start}',
    f'%t = {start}',
    '%d = bf16[90000000]{0} all-gather-done(%s)',
    'ROOT %e = bf16[90000000]{0} all-gather-done(%t)',
  )
  assert estimate(made, V5E).exposed_seconds == pytest.approx(2 * 15 / 16e3)


def test_attention_kernels_take_half_of_the_peak():
  made = program(
    '%q = bf16[1,2,512,128]{3,2,1,0} parameter(0)',
    'ROOT %splash_mha_fwd.1 = bf16[1,2,512,128]{3,2,1,0} custom-call('
    '%q, %q, %q), custom_call_target="tpu_custom_call", '
    'metadata={op_name="vision"}',
  )
  work = 2 * 2 * 2 * 512 * 512 * 128
  assert estimate(made, V5E).kernel_seconds == pytest.approx(work / 98.5e12)


def decoding(*lines):
  """A step that copies a kernel of 8.19 MB ahead: 10 us of memory."""
  return program(
    '%w = bf16[1000,4095]{1,0:T(8,128)(2,1)} parameter(0)',
    '%x = bf16[8]{0:T(128)S(1)} parameter(1)',
    '%c = (bf16[1000,4095]{1,0:T(8,128)(2,1)S(1)}, bf16[1000,4095]{1,0}, '
    'u32[]{:S(2)}) copy-start(%w)',
    *lines,
    '%d = bf16[1000,4095]{1,0:T(8,128)(2,1)S(1)} copy-done(%c)',
    'ROOT %r = bf16[8]{0:T(128)S(1)} fusion(%d), kind=kLoop, '
    f'{cycles(3_000)}',
  )


COPY = 2 * 1000 * 4095 / 819e9


def test_copies_ahead_cost_nothing_unless_asked_for():
  found = estimate(decoding(), V5E)
  assert found.seconds == pytest.approx(2e-6)
  found = estimate(decoding(), V5E, memory=True)
  assert found.memory_seconds == pytest.approx(COPY)
  assert found.seconds == pytest.approx(COPY + 2e-6)


def test_work_on_chip_hides_a_copy():
  work = '%f = bf16[8]{0:T(128)S(1)} fusion(%x), kind=kLoop, ' + cycles(6_000)
  found = estimate(decoding(work), V5E, memory=True)
  assert found.memory_seconds == pytest.approx(COPY - 4e-6)


def test_memory_serves_one_after_the_other():
  """A kernel that reads a cache comes after the copy, as long as both take."""
  kernel = (
    '%k = bf16[8,4,512,128]{3,2,1,0} parameter(2)',
    '%decode_attention.1 = bf16[8,4,128]{2,1,0} custom-call(%k, %k), '
    'custom_call_target="tpu_custom_call"',
  )
  found = estimate(decoding(*kernel), V5E, memory=True)
  reading = 2 * 2 * 8 * 4 * 512 * 128 / 819e9
  assert found.kernel_seconds == pytest.approx(reading / MEMORY_EFFICIENCY)
  assert found.memory_seconds == pytest.approx(COPY)


@pytest.mark.parametrize(
  ('chip', 'kind', 'colors', 'bandwidth'),
  [
    (V5E, 'all-gather', 0, 180e9),
    (V5E, 'reduce-scatter', 2, 180e9),
    (V5E, 'reduce-scatter', 1, 90e9),
    (V5P, 'reduce-scatter', 1, 540e9),
    (V5E, 'collective-permute', 0, 45e9),
    (V5P, 'collective-permute', 0, 90e9),
  ],
)
def test_bandwidths(chip, kind, colors, bandwidth):
  one = collectives.Collective(kind, 180e6, 'bf16', 10**9, colors, '')
  assert seconds_on_links(one, chip) == pytest.approx(180e6 / bandwidth)


@pytest.mark.parametrize(
  ('groups', 'members'),
  [
    ('{{0,1,2,3},{4,5,6,7}}', 4),
    ('[2,128]<=[256]', 128),
    ('[32,8]<=[8,32]T(1,0)', 8),
    ("mesh['axis_0'=128,'axis_1'=2] {'axis_0'}", 128),
    (
      "mesh['axis_0'=128,'axis_1'=1,'axis_2'=2], "
      "device_ids=([2,128]T(1,0)) {'axis_0','axis_2'}",
      256,
    ),
  ],
)
def test_groups(groups, members):
  made = program(
    '%a = bf16[8]{0} parameter(0)',
    f'ROOT %r = bf16[8]{{0}} all-reduce(%a), channel_id=1, '
    f'replica_groups={groups}, use_global_device_ids=true, to_apply=%add',
  )
  ((one, _, _),) = estimate(made, V5E).collectives
  assert one.group == members
