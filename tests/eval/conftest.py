"""A random model that says different things, in this process and served."""

import base64
import dataclasses
import io

import openai  # noqa: F401 (what `Endpoint` needs)
import pytest
import toy
from PIL import Image

from qwenvl_jax.api import QwenVLModel
from qwenvl_jax.eval.engine_model import EngineModel
from qwenvl_jax.eval.task import Decoding, Example, Picture, Prompt, Task
from qwenvl_jax.infer.engine import EngineConfig
from qwenvl_jax.text.tokenizer import Tokenizer

MAX_LEN = 192


@pytest.fixture(scope='session')
def random_handle():
  tokenizer = Tokenizer.from_ranks([bytes([i]) for i in range(256)])
  config = toy.config()
  config = config.replace(
    decoder=dataclasses.replace(
      config.decoder, vocab_size=tokenizer.vocab_size
    ),
    image_start_id=tokenizer.img_start_id,
  )
  return QwenVLModel(config, toy.params(config), tokenizer)


@pytest.fixture(scope='session')
def make_model(random_handle):
  """Makes a model that answers so many examples at a time."""

  def make(slots):
    sizes = EngineConfig(slots=slots, max_len=MAX_LEN, read_rows=min(slots, 8))
    engine = random_handle.engine(sizes)
    return EngineModel(engine, random_handle.tokenizer, {'slots': 'any'})

  return make


@pytest.fixture(scope='session')
def make_png():
  def make(seed):
    data = io.BytesIO()
    Image.fromarray(toy.picture(seed, 40)).save(data, 'png')
    return data.getvalue()

  return make


@pytest.fixture(scope='session')
def data_url(make_png):
  return lambda seed: (
    f'data:image/png;base64,{base64.b64encode(make_png(seed)).decode()}'
  )


@dataclasses.dataclass(frozen=True)
class Varied(Task):
  """Raw and chat prompts, several pictures, choices, and sampling.

  Right is an answer with an even number of characters.
  """

  pictures: tuple[bytes, ...] = ()
  count: int = 12

  def examples(self, data_dir):
    del data_dir
    for number in range(self.count):
      shown = [Picture(self.pictures[number % len(self.pictures)])]
      if number % 4 == 3:
        shown.append(Picture(self.pictures[0], 'second'))
      text = f'Question <ref>{"x" * number}</ref>'
      yield Example(
        key=f'{number:02d}',
        prompt=Prompt(
          (*shown, text), chat=number % 3 == 1, numbered=number % 2 == 0
        ),
        target='even',
        choices=(' A', ' BC', ' 是') if number % 3 == 2 else (),
        group=f'pair {number // 2}',
        category=('first', 'second')[number % 2],
      )

  def score(self, answer, example):
    return {self.metric: float(len(answer) % 2 == 0)}


@pytest.fixture(scope='session')
def varied(make_png):
  pictures = tuple(make_png(seed) for seed in range(3))
  decoding = Decoding(max_tokens=8, min_tokens=2, temperature=0.5, seed=3)
  return Varied('varied', 'Varied', decoding=decoding, pictures=pictures)
