import openai
from serve_support import KEY, running

from qwenvl_jax.infer.programs import programs


def test_nothing_compiles_once_it_is_ready(make_server, handle):
  # Sizes of its own, so that no other test has compiled for them.
  server = make_server(slots=3, max_len=200, images=7)
  known = programs(server.worker.scheduler.engine.config, None)
  before = known.compiled()
  with running(server, warm_up=True) as address:
    ready = known.compiled()
    assert ready > before
    with openai.OpenAI(base_url=f'{address}/v1', api_key=KEY) as client:
      for length in 1, 20, 40, 100, 190:
        for settings in (
          {'max_tokens': 2, 'n': 3, 'temperature': 1, 'logprobs': 3},
          {'max_tokens': 0, 'echo': True, 'logprobs': 0},
          {'max_tokens': 1, 'echo': True, 'logprobs': 20},
        ):
          client.completions.create(
            model='tiny', prompt=[5] * length, **settings
          )
    assert known.compiled() == ready
