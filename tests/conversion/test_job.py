"""Conversions by config: the same as by flags, and told what is wrong."""

import json

import golden
import pytest

from qwenvl_jax.conversion import cli, job
from qwenvl_jax.conversion.verify import verify
from qwenvl_jax.errors import ConfigError

INT4, OPENCLIP = (golden.FOLDER.parent / name for name in ('int4', 'openclip'))


def run(*arguments):
  return cli.main([str(argument) for argument in arguments])


def gin(**values):
  return [f'--gin.{name}={str(x)!r}' for name, x in values.items()]


def test_from_hf_and_again_from_what_was_saved(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(golden.FOLDER.parent)
  ours, again = tmp_path / 'ours', tmp_path / 'again'
  config = '--gin_file=convert/base.gin'
  assert run(config, *gin(SOURCE='tiny', DESTINATION=ours)) == 0
  captured = capsys.readouterr()
  assert captured.out == f'wrote {ours}\n'
  assert 'note: tiny has no qwen.tiktoken' in captured.err
  monkeypatch.chdir(tmp_path)
  saved = f'--gin_file={ours / "convert.gin"}'
  assert run(saved, *gin(**{'Conversion.destination': again})) == 0
  assert verify(golden.FOLDER, again).same
  flags = tmp_path / 'flags'
  assert run('from-hf', golden.FOLDER, flags) == 0
  assert verify(flags, ours).same
  names = {p.relative_to(ours).as_posix() for p in ours.rglob('*')}
  wanted = {p.relative_to(flags).as_posix() for p in flags.rglob('*')}
  assert names == wanted | {'convert.gin'}
  for name in wanted:
    if (flags / name).is_file() and not name.startswith('params/'):
      assert (ours / name).read_bytes() == (flags / name).read_bytes(), name


def test_to_hf(tmp_path):
  ours, back = tmp_path / 'ours', tmp_path / 'back'
  assert run('from-hf', golden.FOLDER, ours) == 0
  config = tmp_path / 'back.gin'
  config.write_text("""
from __gin__ import dynamic_registration
from qwenvl_jax.conversion import job
include 'convert/base.gin'
job.Conversion.kind = 'to-hf'
job.Conversion.max_shard_size = '1MB'
""")
  where = gin(SOURCE=ours, DESTINATION=back)
  assert run(f'--gin_file={config}', *where) == 0
  assert len(list(back.glob('*.safetensors'))) > 3
  assert "max_shard_size = '1MB'" in (back / 'convert.gin').read_text()
  assert verify(golden.FOLDER, back).same


@pytest.mark.parametrize(('kept', 'group'), [(True, 128), (False, None)])
def test_int4(tmp_path, kept, group):
  where = gin(SOURCE=INT4, DESTINATION=tmp_path / 'ours')
  keep = f'--gin.Conversion.keep_int4={kept}'
  assert run('--gin_file=convert/int4.gin', *where, keep) == 0
  raw = json.loads((tmp_path / 'ours' / 'config.json').read_text())
  assert raw.get('quantization_config', {}).get('group_size') == group


def test_stage1_with_a_larger_vocabulary(tmp_path, capsys):
  """What init-stage1 makes with the same seed, but for its new rows."""
  start, flags = tmp_path / 'start', tmp_path / 'flags'
  where = gin(SOURCE=golden.FOLDER, VISION=OPENCLIP, DESTINATION=start)
  more = ('--gin.Conversion.seed=3', '--gin.Conversion.vocab_size=640')
  assert run('--gin_file=convert/stage1.gin', *where, *more) == 0
  out = capsys.readouterr().out
  assert 'the adapter is new (seed 3)' in out
  assert 'grew by 128 rows to 640' in out
  parts = ('--vision', OPENCLIP, '--decoder', golden.FOLDER, '--seed', 3)
  assert run('init-stage1', flags, *parts) == 0
  found = verify(flags, start)
  assert set(found.missing) == {'lm_head.weight', 'transformer.wte.weight'}
  assert not found.differing


def test_names_are_bound(tmp_path, capsys):
  """A pattern that leaves out too much is told of as a tensor missing."""
  where = gin(SOURCE=golden.FOLDER, DESTINATION=tmp_path / 'ours')
  left = "--gin.TensorNames.leave_out=(r'lm_head.*',)"
  assert run('--gin_file=convert/chat.gin', *where, left) == 2
  assert '1 missing: lm_head.weight' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    (['--gin.SOURCE="x"'], 'no --gin_file given'),
    (['--gin_file=convert/chatt.gin'], 'did you mean convert/chat.gin'),
    (['--gin_file=convert/chat.gin'], 'leave open: SOURCE, DESTINATION'),
    (['--gin_file=convert/chat.gin', 'from-hf'], 'unknown argument from-hf'),
    (
      [
        '--gin_file=convert/chat.gin',
        *gin(SOURCE=golden.FOLDER, DESTINATION='x'),
        '--gin.Conversion.dtype="float8"',
      ],
      "dtype 'float8' is none of bfloat16, float16, float32",
    ),
  ],
)
def test_one_line_and_status_2(arguments, told, capsys):
  assert run(*arguments) == 2
  (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
  assert line.startswith('error: ')
  assert told in line


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    ({'kind': 'from_hf'}, 'kind is none of from-hf, to-hf, init-stage1'),
    ({'kind': 'init-stage1'}, 'vision is what init-stage1 needs'),
    ({'vision': 'x'}, 'vision is what init-stage1 needs'),
    ({'source': ''}, 'a folder has no name'),
    ({'vocab_size': -1}, 'vocab_size is beyond'),
    ({'vocab_size': 10**10}, 'vocab_size is beyond'),
    ({'seed': 2**64}, 'seed is not within'),
    ({'max_shard_size': 'big'}, 'big is no size'),
    ({'max_shard_size': None}, 'None is no size'),
    ({'kind': 'to-hf', 'vocab_size': 640}, 'to-hf keeps the vocabulary'),
  ],
)
def test_values_of_other_types_and_sizes(changes, told):
  with pytest.raises(ConfigError, match=told):
    job.Conversion(**({'source': 'a', 'destination': 'b'} | changes))


def test_hub_ids_are_saved_as_such(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  made = job.Conversion('Qwen/Qwen-VL', 'ours')
  resolved = f"SOURCE = '{tmp_path}/Qwen/Qwen-VL'\nD = '{tmp_path}/ours'"
  assert made.saved(resolved) == (
    f"SOURCE = 'Qwen/Qwen-VL'\nD = '{tmp_path}/ours'"
  )
