import downloads
import pytest

from qwenvl_jax.data import formats, mixture, shards
from qwenvl_jax.data.catalogue import DATA_SETS
from qwenvl_jax.errors import ConfigError, DataError

_CAPTIONS = formats.Captions()
_TABLE = [
  ('caption', 'cc3m', _CAPTIONS, 3.0),
  ('caption', 'sbu', _CAPTIONS, 1.0),
  ('vqa', 'chartqa/train_human', formats.Answers(), 2.0),
]


def _weights(**settings):
  made = mixture.streams(_TABLE, missing='allow', **settings)
  return [round(x.weight, 3) for x in made]


def test_weights():
  assert _weights() == [3, 1, 2]
  assert _weights(totals={'caption': 8, 'vqa': 2}) == [6, 2, 2]
  # 8 and 2 are 2.83 and 1.41 at temperature 2.
  totals = {'caption': 8, 'vqa': 2}
  assert _weights(totals=totals, temperature=2) == [2.121, 0.707, 1.414]


def test_what_is_not_prepared(tmp_path):
  for name in ('cc3m', 'chartqa'):
    manual = downloads.download(name, tmp_path / 'in' / name)
    splits = DATA_SETS[name].splits
    shards.prepare(name, splits, manual, tmp_path)
  with pytest.raises(DataError, match='1 data set of the mixture') as error:
    mixture.streams(_TABLE, data_dir=str(tmp_path))
  command = f'prepare sbu --manual_dir FOLDER --data_dir {tmp_path}\n'
  assert command in str(error.value)
  made = mixture.streams(_TABLE, data_dir=str(tmp_path), missing='skip')
  assert [(x.label, x.group, x.weight) for x in made] == [
    ('caption/cc3m', 'caption', 3), ('vqa/chartqa', 'vqa', 2),
  ]  # fmt: skip
  assert made[1].source.open()[0].questions
  with pytest.raises(DataError, match='3 data sets (.|\n)* nothing else'):
    mixture.streams(_TABLE, data_dir=str(tmp_path / 'x'), missing='skip')


def test_all_that_is_missing_is_said_once_with_its_command(tmp_path, caplog):
  manual = downloads.download('cc3m', tmp_path / 'in')
  shards.prepare('cc3m', DATA_SETS['cc3m'].splits, manual, tmp_path)
  table = [
    *_TABLE,
    ('caption', 'sbu', _CAPTIONS, 1.0),
    ('ocr', 'pdf', formats.Ocr(), 1.0),
    ('text', 'text_en', formats.Text(), 1.0),
  ]
  mixture.streams(table, data_dir=str(tmp_path), missing='skip')
  (warning,) = caplog.messages
  assert [x.strip() for x in warning.splitlines() if x.startswith('  ')] == [
    f'qwenvl-data prepare sbu --manual_dir FOLDER --data_dir {tmp_path}',
    f'qwenvl-data prepare chartqa --manual_dir FOLDER --data_dir {tmp_path}'
    '  # split train_human',
    f'qwenvl-data make-ocr --kind pdf --n N {tmp_path}/pdf',
    'qwenvl-data prepare text_en --manual_dir FOLDER --format text '
    f'--data_dir {tmp_path}',
  ]


@pytest.mark.parametrize(
  ('settings', 'says'),
  [
    ({'temperature': 0}, 'temperature=0'),
    ({'temperature': float('nan')}, 'temperature=nan'),
    ({'missing': 'no'}, "missing='no'"),
    ({'totals': {'caption': 0}}, "totals: 0 of 'caption' is no number above 0"),
    ({'totals': {'caption': '1'}}, "totals: '1' of 'caption'"),
    ({'table': [('caption', 'cc3m', len, '3')]}, 'is not .group'),
    ({'totals': {'vqa': 1}}, 'totals lacks caption'),
    ({'table': [('caption', 'cc3m', 3.0)]}, 'is not .group'),
    ({'table': [('caption', 'cc3m', 'Captions', 3.0)]}, 'is not .group'),
  ],
)
def test_mistakes(settings, says):
  with pytest.raises(ConfigError, match=says):
    mixture.streams(**{'table': _TABLE} | settings)
