"""vLLM's engine with the plugin beside ours, on a CPU.

Run by: launch/in_env.sh vllm python -m pytest tests/serve/vllm_plugin
"""

import base64
import io
import shutil

import fake_vllm
import golden
import numpy as np
import pytest
from PIL import Image

import qwenvl_jax
from qwenvl_jax import image as pictures_lib
from qwenvl_jax.conversion import convert
from qwenvl_jax.serve.conversation import build_prompt
from qwenvl_jax.serve.schemas import Message

if not fake_vllm.prepare():
  pytest.skip('run by launch/in_env.sh vllm', allow_module_level=True)

import vllm

NEW = 24


@pytest.fixture(scope='module', params=['released', 'converted', 'int4'])
def folder(request, tmp_path_factory):
  """A golden checkpoint with a vocabulary."""
  golden_folder = golden.FOLDER
  if request.param == 'int4':
    golden_folder = golden.FOLDER.with_name('int4')
  released = tmp_path_factory.mktemp('vllm') / 'released'
  shutil.copytree(golden_folder, released)
  (released / 'qwen.tiktoken').write_text(golden.vocabulary())
  if request.param != 'converted':
    return released
  converted = released.with_name('converted')
  convert.from_hf(released, converted)
  return converted


@pytest.fixture(scope='module')
def engine(folder):
  made = vllm.LLM(str(folder), **fake_vllm.SIZES)
  yield made
  made.llm_engine.engine_core.shutdown()


@pytest.fixture(scope='module')
def ours(folder):
  return qwenvl_jax.load(folder, dtype='float32')


def picture(seed: int) -> Image.Image:
  noise = np.random.default_rng(seed)
  size = noise.integers(40, 200, 2)
  coarse = noise.integers(0, 256, (4, 4, 3), np.uint8)
  return Image.fromarray(coarse).resize(size.tolist(), Image.Resampling.BICUBIC)


def prompts(config):
  """8 prompts with their pictures, 4 of them with one.

  Three of these ask the same about different pictures, two about the same.
  """
  noise = np.random.default_rng(7)
  words = [noise.integers(0, 286, n).tolist() for n in (3, 30, 61, 200)]
  start = config.image_start_id
  span = [start, *[start + 2] * config.adapter.queries, start + 1]
  return [
    *[(ids, []) for ids in words],
    *[
      ([*words[0], *span, *words[1][:length]], [picture(seed)])
      for length, seed in ((17, 1), (17, 2), (17, 3), (30, 1))
    ],
  ]


def test_same_ids_as_our_engine(engine, ours):
  asked = prompts(ours.config)
  side = ours.config.vision.image_size
  pixels = [
    pictures_lib.pixels(one, side) for _, shown in asked for one in shown
  ]
  wanted = ours.generate([ids for ids, _ in asked], pixels, max_new_tokens=NEW)
  settings = vllm.SamplingParams(
    temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False
  )
  found = engine.generate(
    [
      {'prompt_token_ids': ids, 'multi_modal_data': {'image': shown}}
      if shown
      else {'prompt_token_ids': ids}
      for ids, shown in asked
    ],
    settings,
    use_tqdm=False,
  )
  assert [list(one.outputs[0].token_ids) for one in found] == wanted
  # Each picture makes a difference.
  assert len({tuple(ids) for ids in wanted}) == len(wanted)


def test_messages_become_what_our_server_makes_of_them(engine, ours):
  shown = io.BytesIO()
  picture(2).save(shown, 'PNG')
  data = base64.b64encode(shown.getvalue()).decode()
  url = f'data:image/png;base64,{data}'
  content = [
    {'type': 'image_url', 'image_url': {'url': url}},
    {'type': 'text', 'text': 'What <img>is</img> it?'},
  ]
  messages = [{'role': 'user', 'content': content}]
  settings = vllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
  (found,) = engine.chat(messages, settings, use_tqdm=False)
  prompt = build_prompt(
    ours.tokenizer,
    [Message.model_validate(message) for message in messages],
    ours.config.adapter.queries,
  )
  assert found.prompt_token_ids == prompt.tokens
  pixels = pictures_lib.pixels(picture(2), ours.config.vision.image_size)
  (wanted,) = ours.generate([prompt.tokens], [pixels], max_new_tokens=8)
  assert list(found.outputs[0].token_ids) == wanted
  assert found.outputs[0].text
