import pathlib

import pytest

from qwenvl_jax.plan import hlo

GOLDEN = pathlib.Path(__file__).parents[1] / 'goldens/hlo/two_slices.txt'

# Cut from a program that splits a product into a ring of smaller ones: the loop
# advances by two shards at a time, and a kernel's metadata breaks its line.
RING = """HloModule ring, is_scheduled=true

%body (p: (u32[], bf16[64,64])) -> (u32[], bf16[64,64]) {
  %two.sunk = u32[]{:T(128)} constant(2)
  %p = (u32[]{:T(128)}, bf16[64,64]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %n = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %next = u32[]{:T(128)} add(%n, %two.sunk)
  %kernel.1 = bf16[64,64]{1,0} custom-call(%x, /*index=1*/%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/while/body/kernel"}, backend_config={}
  ROOT %t = (u32[]{:T(128)}, bf16[64,64]{1,0}) tuple(%next, %kernel.1)
}

%condition (q: (u32[], bf16[64,64])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %q = (u32[]{:T(128)}, bf16[64,64]{1,0}) parameter(0)
  %m = u32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%m, %limit), direction=LT
}

ENTRY %main (a: bf16[64,64]) -> bf16[64,64] {
  %zero = u32[]{:T(128)} constant(START)
  %start = u32[]{:T(128)} copy(%zero)
  %a = bf16[64,64]{1,0} parameter(0)
  %init = (u32[]{:T(128)}, bf16[64,64]{1,0}) tuple(%start, %a)
  %loop = (u32[]{:T(128)}, bf16[64,64]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %out = bf16[64,64]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_computations_of_other_cores_end_too():
  text = RING.replace('}\n\n%cond', '}, execution_thread="sparsecore"\n\n%cond')
  assert set(hlo.parse(text).computations) == {'body', 'condition', 'main'}


def visits(program, name):
  return [v for v in hlo.walk(program) if v.instruction.name == name]


def test_instructions_are_read_whole():
  program = hlo.parse(RING.replace('START', '0'))
  kernel = program.computations['body'].instructions['kernel.1']
  assert kernel.opcode == 'custom-call'
  assert kernel.shapes == (hlo.Shape('bf16', (64, 64)),)
  assert kernel.operands == ('x', 'x')
  assert kernel.op_name == 'jit(f)/while/body/kernel'
  assert 'block_q' in kernel.rest
  parameter = program.computations['body'].instructions['p']
  assert [s.dims for s in parameter.shapes] == [(), (64, 64)]
  assert [s.on_chip for s in parameter.shapes] == [False, True]
  assert parameter.bytes == 4 + 64 * 64 * 2
  assert program.computations['condition'].root.name == 'less'


@pytest.mark.parametrize(('start', 'trips'), [(0, 4), (1, 4), (2, 3), (8, 0)])
def test_trips_follow_from_start_step_and_limit(start, trips):
  program = hlo.parse(RING.replace('START', str(start)))
  (visit,) = visits(program, 'kernel.1')
  assert visit.times == trips


def test_noted_trips_are_believed():
  text = RING.replace('START', '0').replace(
    'body=%body',
    'body=%body, backend_config={"known_trip_count":{"n":"7"}}',
  )
  (visit,) = visits(hlo.parse(text), 'kernel.1')
  assert visit.times == 7


def test_loops_of_unknown_length_count_once():
  text = RING.replace('START', '0').replace('direction=LT', 'direction=NE')
  (visit,) = visits(hlo.parse(text), 'kernel.1')
  assert visit.times == 1


def test_golden_loops():
  """Four layers forward; backward, the compiler peels the first."""
  program = hlo.parse(GOLDEN.read_text())
  loops = {
    v.instruction.name: hlo.trips(program, v.instruction, v.computation)
    for v in hlo.walk(program)
    if v.instruction.opcode == 'while'
  }
  assert loops == {'while.32': 4, 'while.33': 3}


def test_what_is_no_program_is_said():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('HloModule empty\n')
