"""The graph on Beam's local runner gives what the plain steps give."""

import sys

import corpus
import pytest

from qwenvl_jax.data import cleaning, cli
from qwenvl_jax.data.cleaning import shards

BEAM = 'qwenvl_jax.data.cleaning.beam'


def clean(folder, output, *options):
  return cli.main(
    [
      'clean',
      '--gin_file=clean.gin',
      '--input',
      f'web={folder}/*.tar',
      '--input',
      f'sbu={folder}/sbu/*.jsonl',
      '--output',
      str(output),
      '--gin.ClipScore.minimum={"web": 0.3}',
      '--gin.DuplicateTexts.keep=2',
      *options,
    ]
  )


def test_command(tmp_path, capsys, monkeypatch):
  pytest.importorskip('apache_beam')
  corpus.write(tmp_path / 'corpus')
  output = tmp_path / 'data' / 'pairs'
  # Killed once: one worker dies in its second shard.
  real, calls = shards.clean_shard, []

  def dies(job, shard):
    calls.append(shard)
    if len(calls) == 2:
      raise OSError(28, 'No space left on device')
    return real(job, shard)

  monkeypatch.setattr(shards, 'clean_shard', dies)
  with pytest.raises((OSError, RuntimeError)):
    clean(tmp_path / 'corpus', output)
  assert not (output / 'report.html').exists()
  monkeypatch.setattr(shards, 'clean_shard', real)
  clean(tmp_path / 'corpus', output)
  shown = capsys.readouterr().out
  for reason in set(corpus.FATES.values()) - {''}:
    assert reason in shown
  found = set()
  for path in sorted((output / '1.0.0').glob('*array_record*')):
    for data in shards.storage.read_records(path):
      pair = shards.decode(data)
      found.add(f'{pair.source}/{pair.id}')
  assert found == {name for name, x in corpus.FATES.items() if not x}
  # Once more: nothing to do, the same report.
  clean(tmp_path / 'corpus', output)


def test_without_beam_it_says_what_to_do(tmp_path, capsys, monkeypatch):
  corpus.write(tmp_path / 'corpus')
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  monkeypatch.delitem(sys.modules, BEAM, raising=False)
  monkeypatch.delattr(cleaning, 'beam', raising=False)
  assert clean(tmp_path / 'corpus', tmp_path / 'pairs') == 2
  assert 'launch/in_env.sh beam' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['--input', 'web', '--output', 'x'], 'NAME=FILES'),
    (['--input', 'web=nowhere/*.tar', '--output', 'x'], 'no file matches'),
    (['--output', 'x'], '--input'),
    (['--input', 'web=a.tar'], '--output'),
    (['--output', 'x', '--workers', '0'], '--workers'),
    (['--output', 'x', '--gin.Size.minimun=3'], 'minimum'),
  ],
)
def test_bad_input_gets_one_line(arguments, says, capsys):
  assert cli.main(['clean', '--gin_file=clean.gin', *arguments]) == 2
  error = capsys.readouterr().err
  assert says in error and error.count('\n') == 1


def test_help(capsys):
  with pytest.raises(SystemExit) as stop:
    cli.main(['clean', '--help'])
  assert stop.value.code == 0
  shown = capsys.readouterr().out
  assert 'laion_en' in shown and '--gin_file' in shown
