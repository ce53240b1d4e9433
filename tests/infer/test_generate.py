import pathlib

import pytest
import toy

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.infer.generate import engine_for, generate, room_for, stream
from qwenvl_jax.infer.programs import programs
from qwenvl_jax.infer.request import GenerationError, Request
from qwenvl_jax.infer.sampling import Sampling
from qwenvl_jax.infer.scheduler import Scheduler

CASES = ('text', 'one_image', 'cross', 'two_images')


@pytest.fixture(scope='module')
def scheduler(golden_engine):
  return Scheduler(golden_engine)


@pytest.fixture(scope='module')
def one(golden, golden_engine):
  """Continues the golden `text` prompt."""
  ids, _ = golden.prompt('text')

  def run(**settings):
    settings = {'max_new_tokens': 36} | settings
    return generate(golden_engine, [ids], **settings)[0]

  return run


def ask(golden, case, **settings):
  """A golden request for 48 tokens."""
  ids, images = golden.prompt(case)
  return Request.create(
    golden.config,
    ids,
    images,
    max_new_tokens=48,
    sampling=Sampling(**settings),
  )


def test_rows_of_one_batch_match_pytorch_alone(golden, golden_engine):
  """The goldens are made one by one: neighbours change nothing.

  The rows differ in length, number of images, NTK frequencies and LogN.
  """
  prompts, images = zip(*map(golden.prompt, CASES), strict=True)
  told = []
  answers = generate(
    golden_engine, prompts, images, max_new_tokens=48, progress=told.append
  )
  for case, ids in zip(CASES, answers, strict=True):
    expected = golden.new(case)
    assert ids[: len(expected)] == expected, case
  assert told == sorted(told)
  assert told[-1] == len(CASES)


@pytest.mark.parametrize('case', ['text', 'one_image'])
def test_streaming_gives_the_same_ids(golden, scheduler, case):
  if case == 'text':
    assert list(stream(scheduler, ask(golden, case))) == golden.new(case)
  else:
    # As soon as it is known, one id after the other.
    pieces = stream(scheduler, ask(golden, case))
    for told, expected in enumerate(golden.new(case), start=1):
      assert next(pieces) == expected
      assert scheduler.load.running == (told < 48)
    assert next(pieces, None) is None


def test_a_stream_that_is_left_frees_its_slot(golden, scheduler):
  free = scheduler.load.free
  pieces = stream(scheduler, ask(golden, 'text'))
  assert [next(pieces), next(pieces)] == golden.new('text')[:2]
  assert scheduler.load.free == free - 1
  pieces.close()
  assert scheduler.load.free == free
  # One that nobody asked anything of leaves nothing behind either.
  stream(scheduler, ask(golden, 'text'))
  assert scheduler.load.waiting == 0
  with pytest.raises(DataError, match='tokens are more than'):
    stream(scheduler, Request.create(golden.config, [1] * 1024))


def test_answers_end_before_a_stop_id(golden, scheduler, one):
  free = one()
  stop = free[5]
  cut = free[: free.index(stop)]
  assert one(stop_ids=(stop,)) == cut
  assert one(stop_ids=(400, 401, stop)) == cut
  streamed = stream(scheduler, ask(golden, 'text', stop_ids=(stop,)))
  assert list(streamed) == cut


def test_min_new_tokens_hold_the_stop_back(one):
  free = one()
  longer = one(stop_ids=(free[0],), min_new_tokens=4)
  assert len(longer) >= 4
  assert free[0] not in longer[:4]


def test_sampling_is_repeatable_and_independent_of_the_batch(
  golden, golden_engine, scheduler, one
):
  drawn = one(temperature=1.5, seed=1)
  assert drawn == one(temperature=1.5, seed=1)
  assert drawn != one(temperature=1.5, seed=2) != one()
  # A tiny top_p leaves only the best token.
  assert one(temperature=1.5, top_p=1e-6) == one()
  assert one(temperature=1.5, top_k=1) == one()

  ids, _ = golden.prompt('text')
  rows = generate(
    golden_engine,
    [ids, ids[:3], ids],
    max_new_tokens=36,
    temperature=1.5,
    seed=1,
  )
  assert rows[0] == drawn
  assert rows[2] != drawn
  request = ask(golden, 'text', temperature=1.5, seed=(1, 0))
  assert list(stream(scheduler, request))[:36] == drawn


def test_penalties_work_on_prompt_and_answer(golden, one):
  ids, _ = golden.prompt('text')
  free = one()
  assert len(set(free)) < len(free)
  assert len(set(one(frequency_penalty=2.0))) > len(set(free))
  # What is very unlikely once it was seen never comes.
  fresh = one(repetition_penalty=1000.0)
  assert len(set(fresh)) == len(fresh)
  assert not set(fresh) & set(ids)
  assert one(logit_bias={77: 100.0}) == [77] * 36
  banned = dict.fromkeys(free[:3], -100.0)
  assert not set(one(logit_bias=banned)) & set(free[:3])


@pytest.mark.slow
def test_prompts_that_are_read_together_get_what_they_get_alone():
  """Four at a time where lengths allow; what ends one leaves the others."""
  sizes = {'slots': 4, 'max_len': 128, 'chunk': 128}
  lengths = [40, 41, 48, 33, 33, 45, 47, 90, 39]
  prompts = [toy.prompt(n, x, int(n % 3 == 0)) for n, x in enumerate(lengths)]
  images = [
    [toy.picture(n)] if n % 3 == 0 else None for n in range(len(lengths))
  ]
  answers = [
    generate(
      toy.engine(read_rows=rows, **sizes),
      prompts,
      images,
      max_new_tokens=9,
      temperature=0.7,
    )
    for rows in (1, 4)
  ]
  assert answers[0] == answers[1]

  together = Scheduler(toy.engine(read_rows=4, **sizes), read_tokens=1)
  asked = [
    together.submit(
      Request.create(
        toy.config(),
        prompt,
        shown,
        max_new_tokens=9,
        sampling=Sampling(0.7, seed=(0, row)),
      )
    )
    for row, (prompt, shown) in enumerate(zip(prompts[:4], images[:4]))
  ]
  # Pictures are encoded first; then one of the four is taken back.
  together.step()
  assert together.load.running == 4
  together.cancel(asked[1])
  while together.step():
    pass
  assert asked[1].finish_reason == 'cancelled'
  for row in (0, 2, 3):
    assert asked[row].ids == answers[0][row]
  assert together.load.free == 4


def test_few_programs_are_compiled():
  """Lengths, rows and settings change; shapes do not."""

  def run(lengths, max_new_tokens, **settings):
    prompts = [[3] * n for n in lengths]
    found = toy.config()
    engine = engine_for(found, toy.params(found), prompts, max_new_tokens)
    generate(engine, prompts, max_new_tokens=max_new_tokens, **settings)
    return programs(engine.config, None).compiled()

  before = run([5, 9, 30], 40)
  assert run([7, 20, 1], 45, stop_ids=(3,), min_new_tokens=1) == before


def test_engines_have_few_sizes(golden):
  rooms = {room_for(golden.config, n) for n in range(1, 8193)}
  assert len(rooms) == 15
  assert max(rooms) == 8192
  assert all(room_for(golden.config, n) >= n for n in range(1, 8193))


def test_no_prompts_no_answers(golden_engine):
  assert generate(golden_engine, [], max_new_tokens=3) == []


def test_bad_input_names_the_row(golden, golden_engine):
  def run(prompts, images=None, max_new_tokens=3, **settings):
    return generate(
      golden_engine,
      prompts,
      images,
      max_new_tokens=max_new_tokens,
      **settings,
    )

  ids, pixels = golden.prompt('one_image')
  with pytest.raises(DataError, match='row 1: 1 <img> spans .* 0 images'):
    run([[1, 2], ids], None)
  with pytest.raises(DataError, match='row 0: the span of image 1'):
    run([ids[:200]], [pixels])
  with pytest.raises(DataError, match='2 prompts, but images for 1'):
    run([[1], [2]], [None])
  with pytest.raises(DataError, match='row 1: 3 prompt tokens'):
    run([[1], [1, 2, 3]], max_new_tokens=1022)
  with pytest.raises(ConfigError, match='max_new_tokens=0'):
    run([[1]], max_new_tokens=0)
  with pytest.raises(ConfigError, match='temperature=-1'):
    run([[1]], temperature=-1)


def test_an_answer_that_fails_names_the_row(golden, golden_engine, monkeypatch):
  damaged = toy.damaged(golden_engine.params, token=77)
  monkeypatch.setattr(golden_engine, 'params', damaged)
  with pytest.raises(GenerationError, match='row 1: the logits after 0 new'):
    generate(golden_engine, [[1, 2], [77, 2]], max_new_tokens=3)


SPLIT = """
import sys
sys.path.insert(0, {tests!r})
import golden
import jax, numpy as np
import qwenvl_jax
from qwenvl_jax.sharding import (
  MeshConfig,
  make_mesh,
  rows_over_tensor,
  splits_rows_over_tensor,
  use_mesh,
)

found = golden.expected()
row = found['generate/one_image/ids'].reshape(-1)
ids, pixels = row.tolist(), golden.spans(row)[1]
whole = qwenvl_jax.load(golden.FOLDER, dtype='float32')
alone = whole.logits([ids], pixels)
# Read together; on a mesh, whole rows are then read by a chip each.
many = [ids, *([7 + n, *range(20, 20 + len(ids) - n)] for n in range(7))]
answers = whole.generate(many, pixels, max_new_tokens=8)
# One row on a mesh that splits a batch four ways, and on one that splits heads.
for mesh in MeshConfig(fsdp=4), MeshConfig(fsdp=1, tensor=4):
  with use_mesh(make_mesh(mesh)):
    qwen = qwenvl_jax.load(golden.FOLDER, dtype='float32')
    for path, kernel in jax.tree_util.tree_leaves_with_path(qwen.params):
      if [key.key for key in path[-2:]] == ['down', 'kernel']:
        assert not kernel.sharding.is_fully_replicated, path
    (new,) = qwen.generate([ids], pixels, max_new_tokens=48)
    assert new == found['generate/one_image/new'].reshape(-1).tolist(), mesh
    assert qwen.generate(many, pixels, max_new_tokens=8) == answers, mesh
    for rows in 8, 6:
      with rows_over_tensor(rows):
        even = rows == 8 and mesh.tensor == 4
        assert splits_rows_over_tensor() == even
    logits = qwen.logits([ids], pixels)
    np.testing.assert_allclose(logits, alone, atol=golden.ATOL)
"""


@pytest.mark.slow
def test_a_row_may_run_on_several_devices(run_on_devices):
  tests = str(pathlib.Path(__file__).parents[1])
  run_on_devices(4, SPLIT.format(tests=tests))
