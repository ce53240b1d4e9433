"""Several low-rank adapters in one batch, against each of them alone."""

import dataclasses
import functools

import golden
import lora_golden
import numpy as np
import pytest

import qwenvl_jax
from qwenvl_jax.conversion import low_rank
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.infer.engine import EngineConfig
from qwenvl_jax.infer.request import Request
from qwenvl_jax.infer.scheduler import Scheduler
from qwenvl_jax.model.lora import LoraConfig

_NEW = 6


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Adapters of different rank, scale and targets; 'chat' is PEFT's."""
  folder = tmp_path_factory.mktemp('adapters') / 'other'
  folder.mkdir()
  chat = lora_golden.adapter('chat')
  lora = LoraConfig(
    rank=4,
    alpha=20,
    targets=('decoder/blocks/mlp/(gate|down)', 'decoder/blocks/attn/qkv'),
    rslora=True,
  )
  rng = np.random.default_rng(0)
  shapes = low_rank.factor_shapes(golden.config().replace(lora=lora))
  values = {
    path: rng.normal(0, 0.04, shape).astype(np.float32)
    for path, shape in shapes.items()
  }
  low_rank.write_ours(
    folder, dataclasses.replace(chat, lora=lora, values=values)
  )
  return {'chat': lora_golden.FOLDER / 'chat', 'other': folder}


@pytest.fixture(scope='module')
def mixed(folders):
  return qwenvl_jax.load(golden.FOLDER, 'float32', adapters=folders)


def _requests(names):
  ids = golden.expected()
  picture = golden.expected()['pixels/wide.png'].transpose(1, 2, 0)
  for name in names:
    yield ids['generate/text/ids'], None, name
    yield ids['generate/one_image/ids'], picture[None], name


def _answers(handle, names, read_rows=1):
  sizes = EngineConfig(slots=4, max_len=512, read_rows=read_rows)
  scheduler = Scheduler(handle.engine(sizes))
  answers = [
    scheduler.submit(
      Request.create(
        handle.config,
        tokens,
        pixels,
        max_new_tokens=_NEW,
        adapter=name,
        top_logprobs=5,
      )
    )
    for tokens, pixels, name in _requests(names)
  ]
  while scheduler.step():
    pass
  assert all(answer.error is None for answer in answers)
  return answers


@pytest.fixture(scope='module')
def alone(folders):
  @functools.cache
  def answers(name):
    adapter = name and folders[name]
    handle = qwenvl_jax.load(golden.FOLDER, 'float32', adapter=adapter)
    return _answers(handle, [None])

  return answers


def test_each_row_of_a_batch_has_its_adapter(mixed, alone):
  names = ['chat', None, 'other', 'chat']
  found = _answers(mixed, names, read_rows=2)
  wanted = [answer for name in names for answer in alone(name)]
  assert [answer.ids for answer in found] == [answer.ids for answer in wanted]
  for one, other in zip(found, wanted, strict=True):
    np.testing.assert_allclose(
      [token.logprob for token in one.tokens],
      [token.logprob for token in other.tokens],
      atol=golden.ATOL,
    )
  # Of one prompt the three models say different things.
  first = [answer.tokens[0].logprob for answer in found[1:6:2]]
  assert np.min(np.abs(np.diff([*first, first[0]]))) > 10 * golden.ATOL


def test_generate_and_score_ask_an_adapter_by_name(mixed, alone):
  tokens = golden.expected()['generate/text/ids']
  ids = mixed.generate([tokens], max_new_tokens=_NEW, adapter='other')
  answer = alone('other')[0]
  assert ids == [answer.ids]
  (scored,) = mixed.score([tokens], [answer.ids[:3]], adapter='other')
  np.testing.assert_allclose(
    scored.logprobs,
    [token.logprob for token in answer.tokens[:3]],
    atol=golden.ATOL,
  )


def test_an_unknown_name_is_refused_with_near_ones(mixed):
  with pytest.raises(ConfigError, match="'chta'; did you mean chat"):
    mixed.generate([[1, 2]], max_new_tokens=1, adapter='chta')
  with pytest.raises(ConfigError, match="no adapter is called 'x'"):
    mixed.score([[1, 2]], [[3]], adapter='x')


def test_what_all_requests_share_cannot_be_of_one_adapter(folders):
  both = folders | {'base': lora_golden.FOLDER / 'base'}
  with pytest.raises(CheckpointError, match="'base'.*decoder/embed"):
    qwenvl_jax.load(golden.FOLDER, adapters=both)
  with pytest.raises(ConfigError, match='give one of them'):
    qwenvl_jax.load(golden.FOLDER, adapter=folders['chat'], adapters=folders)
