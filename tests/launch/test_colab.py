"""The notebooks run from their first cell to the last."""

import configparser
import dataclasses
import shlex
import shutil
import socket

import golden
import pytest
import reciter

pytest.importorskip('nbclient')

import notebooks

from qwenvl_jax.conversion import checkpoint_io


@pytest.fixture(scope='module')
def chat(tmp_path_factory):
  folder = tmp_path_factory.mktemp('chat') / 'chat'
  reciter.save(folder)
  return folder


def test_chat(chat, tmp_path):
  kept = tmp_path / 'kept'
  done = notebooks.execute(
    '1_chat', tmp_path, CHECKPOINT=str(chat), KEEP=str(kept)
  )
  assert reciter.ANSWER in notebooks.output(done)
  # The scene, two answers with boxes, and a second scene.
  assert len(notebooks.pictures(done)) == 4
  assert reciter.ANSWER in (kept / 'conversation.md').read_text()
  assert (kept / 'boxes.png').stat().st_size > 1000


def test_convert(tmp_path):
  source = tmp_path / 'source'
  shutil.copytree(golden.FOLDER, source)
  (source / 'qwen.tiktoken').write_text(golden.vocabulary())
  kept = tmp_path / 'kept'
  done = notebooks.execute(
    '4_convert', tmp_path, CHECKPOINT=str(source), KEEP=str(kept)
  )
  assert notebooks.output(done).count('are equal bit for bit') == 2
  assert (kept / 'release' / 'config.json').exists()


def test_serve(chat, tmp_path):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  done = notebooks.execute(
    '5_serve',
    tmp_path,
    CHECKPOINT=str(chat),
    KEEP=str(tmp_path / 'kept'),
    PORT=port,
  )
  text = notebooks.output(done)
  assert f'Find the apple. -> {reciter.ANSWER}' in text
  assert 'Is there an apple? -> ' in text
  assert len(notebooks.pictures(done)) == 1
  assert reciter.ANSWER in (tmp_path / 'kept' / 'answers.md').read_text()


def test_finetune(tmp_path):
  """By Q-LoRA, on the golden Int4 model."""
  base = tmp_path / 'Int4'
  shutil.copytree(golden.FOLDER.parent / 'int4', base)
  (base / 'qwen.tiktoken').write_text(golden.vocabulary())
  sizes = tmp_path / 'sizes.gin'
  sizes.write_text(_sizes(checkpoint_io.read_config(base)))
  flags = [f'--gin_file={sizes}', '--gin.RANK=4', '--gin.BATCH=4', '--steps=3']
  done = notebooks.execute(
    '3_finetune',
    tmp_path,
    BASE=str(base),
    KEEP=str(tmp_path / 'kept'),
    MORE=shlex.join(flags),
  )
  text = notebooks.output(done)
  assert 'mine: 95 records with 95 pictures' in text
  assert 'before: ' in text and 'after: ' in text
  # Curves, and the picture that was asked about.
  assert len(notebooks.pictures(done)) == 2
  assert (tmp_path / 'kept' / 'peft' / 'adapter_model.safetensors').exists()


def _sizes(config) -> str:
  """A config file that binds a model's sizes."""
  lines = ['from __gin__ import dynamic_registration']
  lines += ['from qwenvl_jax.data import pipeline']
  lines += ['from qwenvl_jax.model import config']
  lines += ['pipeline.Pipeline.sequence_length = 512']
  lines += [f'QUERIES = {config.adapter.queries}']
  lines += [f'IMAGE_SIZE = {config.vision.image_size}']
  lines += [f'config.QwenVLConfig.image_start_id = {config.image_start_id}']
  for part in (config.vision, config.adapter, config.decoder):
    for field in dataclasses.fields(part):
      if isinstance(value := getattr(part, field.name), (int, float)):
        lines.append(f'config.{type(part).__name__}.{field.name} = {value}')
  return '\n'.join(lines) + '\n'


@pytest.mark.slow
def test_quickstart(tmp_path):
  done = notebooks.execute(
    '2_quickstart',
    tmp_path,
    KEEP=str(tmp_path / 'quickstart'),
    PLATFORM='cpu',
    SMOKE=True,
  )
  assert 'report.html' in notebooks.output(done)
  # Curves, and two scenes.
  assert len(notebooks.pictures(done)) == 3


@pytest.mark.parametrize('name', notebooks.NAMES)
def test_all_are_set_up_alike(name):
  book = notebooks.read(name)
  first = notebooks.read(notebooks.NAMES[0])
  setup = [x.cells[notebooks.tagged(x, 'setup')].source for x in (book, first)]
  assert setup[0] == setup[1]


def test_one_address():
  """Notebooks and docs lead to the repository that setup.cfg names."""
  setup = configparser.ConfigParser()
  setup.read(notebooks.FOLDER.parents[1] / 'setup.cfg', encoding='utf-8')
  address = setup['metadata']['url']
  place = address.removeprefix('https://github.com/')
  docs = (notebooks.FOLDER.parents[1] / 'docs' / 'colab.md').read_text()
  for name in notebooks.NAMES:
    book = notebooks.read(name)
    badge = f'/github/{place}/blob/main/launch/colab/{name}.ipynb'
    assert badge in book.cells[0].source
    assert badge in docs
    setup_cell = book.cells[notebooks.tagged(book, 'setup')].source
    assert f"REPOSITORY = '{address}'" in setup_cell


@pytest.mark.parametrize('name', notebooks.NAMES)
def test_outputs_are_kept_and_small(name):
  book = notebooks.read(name)
  assert notebooks.pictures(book)
  assert (notebooks.FOLDER / f'{name}.ipynb').stat().st_size < 500_000
