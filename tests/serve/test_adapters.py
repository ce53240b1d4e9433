"""Low-rank adapters as models of one server."""

import numpy as np
import openai
import pytest
import reciter
from serve_support import KEY, running

import qwenvl_jax
from qwenvl_jax.conversion import low_rank
from qwenvl_jax.model.lora import LoraConfig
from qwenvl_jax.serve import main


@pytest.fixture(scope='module')
def client(make_server, tmp_path_factory):
  folder = tmp_path_factory.mktemp('adapters')
  reciter.save(folder / 'base')
  config = qwenvl_jax.load(folder / 'base').config
  lora = LoraConfig(rank=2, alpha=2, targets=('decoder/blocks/mlp/.*',))
  rng = np.random.default_rng(0)
  values = {
    path: rng.normal(0, 3, shape).astype(np.float32)
    for path, shape in low_rank.factor_shapes(config.replace(lora=lora)).items()
  }
  (folder / 'loud').mkdir()
  low_rank.write_ours(
    folder / 'loud', low_rank.LowRank(lora, low_rank.Base(''), values, 'loud')
  )
  handle = qwenvl_jax.load(folder / 'base', adapters={'loud': folder / 'loud'})
  with (
    running(make_server(handle=handle)) as address,
    openai.OpenAI(
      base_url=f'{address}/v1', api_key=KEY, max_retries=0
    ) as found,
  ):
    yield found


def _ask(client, **more):
  answer = client.chat.completions.create(
    messages=[{'role': 'user', 'content': 'Hello'}], max_tokens=12, **more
  )
  return answer.model, answer.choices[0].message.content


def test_a_request_names_the_adapter_that_answers(client):
  models = {model.id: model for model in client.models.list()}
  assert list(models) == ['tiny', 'loud']
  assert models['loud'].parent == 'tiny'
  assert _ask(client, model='tiny') == ('tiny', reciter.ANSWER)
  name, said = _ask(client, model='loud')
  assert name == 'loud' and said != reciter.ANSWER
  assert _ask(client, model='tiny') == ('tiny', reciter.ANSWER)
  text = client.completions.create(
    model='loud', prompt='Hello', max_tokens=4, temperature=0
  )
  plain = client.completions.create(
    model='tiny', prompt='Hello', max_tokens=4, temperature=0
  )
  assert text.choices[0].text != plain.choices[0].text


def test_an_unknown_model_is_told_which_there_are(client):
  with pytest.raises(openai.NotFoundError, match="'tiny', 'loud'") as error:
    _ask(client, model='quiet')
  assert error.value.code == 'model_not_found'
  assert client.models.retrieve('loud').parent == 'tiny'
  with pytest.raises(openai.NotFoundError, match="'tiny', 'loud'"):
    client.models.retrieve('quiet')


@pytest.mark.parametrize(
  'given, reason',
  [
    (['loud'], 'is not NAME=DIR'),
    (['a=x', 'a=y'], 'is the name of another'),
    (['base=x'], 'is the name of another'),
  ],
)
def test_names_of_adapters_are_checked_before_anything_is_opened(
  given, reason, tmp_path, capsys
):
  arguments = [f'--adapter={text}' for text in given]
  assert main.main([f'--checkpoint={tmp_path / "base"}', *arguments]) == 2
  assert reason in capsys.readouterr().err
