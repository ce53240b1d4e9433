"""The notebooks run from their first cell to the last."""

import configparser
import shutil
import socket

import golden
import pytest
import reciter

pytest.importorskip('nbclient')

import notebooks


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
