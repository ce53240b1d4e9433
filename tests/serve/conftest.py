"""A server on a tiny model, in this process, and the official client."""

import openai
import pytest
import reciter
from serve_support import KEY, encoded, running

import qwenvl_jax
from qwenvl_jax.infer.engine import EngineConfig
from qwenvl_jax.infer.grammar import GrammarCompiler
from qwenvl_jax.infer.scheduler import Scheduler
from qwenvl_jax.serve.limits import Limits
from qwenvl_jax.serve.metrics import Metrics
from qwenvl_jax.serve.server import Server
from qwenvl_jax.serve.web_demo_turns import keep_picture
from qwenvl_jax.serve.worker import Worker


@pytest.fixture(scope='session')
def handle(tmp_path_factory):
  folder = tmp_path_factory.mktemp('chat') / 'checkpoint'
  reciter.save(folder)
  return qwenvl_jax.load(folder)


@pytest.fixture(scope='session')
def make_server(handle):
  """Makes a server whose worker is not started."""

  def make(
    slots=4,
    max_waiting=64,
    key=KEY,
    max_len=768,
    images=None,
    handle=handle,
    **limits,
  ):
    sizes = EngineConfig(slots=slots, max_len=max_len, images=images)
    engine = handle.engine(sizes)
    scheduler = Scheduler(engine, max_waiting=max_waiting)
    return Server(
      name='tiny',
      config=handle.config,
      tokenizer=handle.tokenizer,
      compiler=GrammarCompiler(
        handle.tokenizer, handle.config.decoder.vocab_size
      ),
      worker=Worker(scheduler),
      metrics=Metrics('tiny', scheduler),
      limits=Limits(**limits),
      key=key,
    )

  return make


@pytest.fixture(scope='session')
def server(make_server):
  return make_server()


@pytest.fixture(scope='session')
def address(server):
  with running(server) as found:
    yield found


@pytest.fixture(scope='session')
def client(address):
  with openai.OpenAI(
    base_url=f'{address}/v1', api_key=KEY, max_retries=0
  ) as found:
    yield found


@pytest.fixture
def picture(tmp_path):
  """Makes files of pictures."""

  def make(size=(64, 48), kind='PNG'):
    return keep_picture(encoded(size, kind), tmp_path)

  return make
