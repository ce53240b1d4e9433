import re

import downloads
import pytest

from qwenvl_jax.data import cli, shards
from qwenvl_jax.data.catalogue import DATA_SETS, FORMATS


@pytest.fixture(scope='module')
def stage2_data(tmp_path_factory):
  """A few data sets of stage 2, small."""
  base = tmp_path_factory.mktemp('stage2')
  for name in ('cc3m', 'vqav2', 'grit', 'refcoco'):
    manual = downloads.download(name, base / 'in' / name)
    shards.prepare(name, DATA_SETS[name].splits, manual, base / 'data')
  downloads.write(base / 'in/text', 'a.txt', b'A document.\n\nAnother one.\n')
  shards.prepare(
    'text_en', {'train': FORMATS['text']}, base / 'in/text', base / 'data'
  )
  return str(base / 'data')


def _show(data_dir, page, *options):
  cli.main(
    ['show', '--gin_file=stage2.gin', "--gin.MISSING='skip'", '--data_dir',
     data_dir, '--gin.IMAGE_SIZE=56', '--output', str(page), *options]
  )  # fmt: skip
  return page.read_text(encoding='utf-8')


def test_the_rows_of_stage_2(stage2_data, tmp_path):
  content = _show(stage2_data, tmp_path / 'rows.html', '--n', '6')
  sections = content.split('<section>')[1:]
  assert len(sections) == 6
  tasks = {re.search(r'row \d+: (\w+)', x)[1] for x in sections}
  assert 'caption' in tasks and len(tasks) >= 2
  for section in sections:
    pictures = section.count('data:image/png')
    # Grounded captions are long: six and their pictures fill a row.
    text = re.search(r'row \d+: text', section)
    assert pictures in ((0,) if text else (6, 7))
  assert '<span class="loss"> a red bus&lt;|endoftext|&gt;</span>' in content
  # The table adds up.
  (line,) = re.findall(r'<td>all</td>(.*?)</tr>', content)
  rows, samples, used, padded, learned, _ = re.findall('<td>(.*?)</td>', line)
  assert rows == '6' and int(samples) >= 36
  used, padded, learned = (float(x[:-1]) for x in (used, padded, learned))
  assert used > padded > 0 and used > learned > 0


def test_the_same_rows_every_time(stage2_data, tmp_path):
  pages = [
    _show(stage2_data, tmp_path / 'rows.html', '--n', '2') for _ in range(2)
  ]
  assert pages[0] == pages[1]


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['show'], '--gin_file'),
    (['show', '--gin_file=stage2.gin', '--n', '0'], 'at least one row'),
    (
      ['show', '--gin_file=stage2.gin', '--data_dir', 'nowhere'],
      'prepare laion_en --manual_dir FOLDER --data_dir nowhere\n',
    ),
    (['show', '--gin_file=stage9.gin'], 'stage9.gin'),
    (['show', '--gin_file=stage2.gin', '--gin.MISING=1'], 'MISSING'),
  ],
)
def test_mistakes(arguments, says, capsys):
  assert cli.main(arguments) == 2
  error = capsys.readouterr().err
  assert says in error and error.startswith('error: ')
