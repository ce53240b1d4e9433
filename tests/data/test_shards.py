import json

import downloads
import pytest

from qwenvl_jax.data import cli, shards, sources, storage
from qwenvl_jax.data.readers.captions import CocoCaptions
from qwenvl_jax.data.readers.conversations import Conversations
from qwenvl_jax.data.readers.img2dataset import Img2Dataset
from qwenvl_jax.data.readers.release import EvaluationLines
from qwenvl_jax.data.record_errors import ErrorBudget
from qwenvl_jax.errors import DataError


def _archives(root, count=3):
  for number in range(count):
    downloads.tar(
      root / f'{number:05d}.tar',
      {'a.jpg': downloads.picture(), 'a.txt': f'caption {number}'.encode()},
    )


def test_goes_on_with_the_shard_that_is_missing(tmp_path, monkeypatch):
  _archives(tmp_path / 'in')
  written = []

  def interrupted(path, records):
    if len(written) == 2:
      raise KeyboardInterrupt
    written.append(path.name)
    return whole(path, records)

  whole = storage.write_shard
  monkeypatch.setattr(storage, 'write_shard', interrupted)
  arguments = ('pairs', {'train': Img2Dataset()}, tmp_path / 'in', tmp_path)
  with pytest.raises(KeyboardInterrupt):
    shards.prepare(*arguments)
  with pytest.raises(DataError, match='not prepared'):
    sources.Prepared('pairs', data_dir=str(tmp_path)).open()
  monkeypatch.setattr(storage, 'write_shard', whole)
  before = {x: x.stat().st_mtime_ns for x in tmp_path.glob('pairs/*/*-0000?-*')}
  assert len([x for x in before if x.suffix != '.json']) == 2
  report = shards.prepare(*arguments)
  assert report.lengths == {'train': [1, 1, 1]}
  assert report.counts.seen_of('train') == 3
  assert all(x.stat().st_mtime_ns == at for x, at in before.items())
  records = sources.Prepared('pairs', data_dir=str(tmp_path)).open()
  assert [x.captions[0] for x in records] == [
    'caption 0', 'caption 1', 'caption 2',
  ]  # fmt: skip


def test_worker_processes_write_the_same(tmp_path):
  _archives(tmp_path / 'in')
  made = [
    shards.prepare(
      'pairs', {'train': Img2Dataset()}, tmp_path / 'in', tmp_path / str(n),
      workers=n,
    )
    for n in (1, 2)
  ]  # fmt: skip
  names = [sorted(x.name for x in report.folder.iterdir()) for report in made]
  assert names[0] == names[1]
  for name in names[0]:
    if 'array_record' in name:
      one, two = ((x.folder / name).read_bytes() for x in made)
      assert one == two


def test_no_path_leaves_the_folder(tmp_path):
  (tmp_path / 'secret.jpg').write_bytes(downloads.picture())
  root = tmp_path / 'in'
  downloads.write(root, 'ok.jpg', downloads.picture())
  (root / 'link.jpg').symlink_to(tmp_path / 'secret.jpg')
  (root / 'inner.jpg').symlink_to(root / 'ok.jpg')
  names = [
    'ok.jpg', './ok.jpg', 'inner.jpg', '../secret.jpg', 'link.jpg', '',
    str(tmp_path / 'secret.jpg'), 'https://example.org/a.jpg', 'file:ok.jpg',
    'x/../../secret.jpg', 'ok.jpg\0.png', 'gone.jpg',
  ]  # fmt: skip
  lines = [json.dumps({'image': x, 'caption': 'c'}) for x in names]
  (root / 'x.jsonl').write_text('\n'.join(lines))
  report = shards.prepare(
    'paths', {'val': EvaluationLines()}, root, tmp_path / 'data',
    limit=ErrorBudget(share=1.0),
  )  # fmt: skip
  assert report.lengths == {'val': [3]}
  assert report.counts.of('val') == {
    'empty_text': 1, 'missing_image': 1, 'outside_root': 7,
  }  # fmt: skip


def test_pictures_of_conversations_obey_the_same_rule(tmp_path):
  turns = [
    {'from': 'user', 'value': '<img>../../etc/passwd</img>What is this?'},
    {'from': 'assistant', 'value': 'Secrets.'},
  ]
  downloads.write(tmp_path / 'in', 'a.json', [{'conversations': turns}])
  with pytest.raises(DataError, match='no record.*outside_root'):
    shards.prepare('x', {'train': Conversations()}, tmp_path / 'in', tmp_path)


def test_too_many_bad_records_stop_it(tmp_path):
  images = [{'id': i, 'file_name': f'{i}.jpg'} for i in range(20)]
  notes = [{'image_id': i, 'caption': 'x'} for i in range(20)]
  downloads.write(tmp_path, 'c.json', {'images': images, 'annotations': notes})
  for number in range(10):
    downloads.write(tmp_path, f'{number}.jpg', downloads.picture())
  arguments = ('c', {'val': CocoCaptions('c.json')}, tmp_path, tmp_path / 'd')
  with pytest.raises(DataError, match='source val: 10 of 20.*missing_image'):
    shards.prepare(*arguments, limit=ErrorBudget(share=0.4, after=10))
  said = []
  report = shards.prepare(
    *arguments, limit=ErrorBudget(share=0.5, after=10), say=said.append
  )
  assert sum('dropped: missing_image: ' in line for line in said) == 5
  assert '10.jpg' in said[0] and 'and 5 more; ' in said[-1]
  example = json.loads(next(report.folder.glob('*.report.json')).read_text())
  assert '10.jpg' in example['examples'][0]


def test_missing_shards_are_named(tmp_path):
  _archives(tmp_path / 'in')
  report = shards.prepare(
    'pairs', {'train': Img2Dataset()}, tmp_path / 'in', tmp_path
  )
  next(report.folder.glob('*-00001-of-00003')).unlink()
  with pytest.raises(DataError, match='1 of 3 shards.*00001-of-00003'):
    sources.Prepared('pairs', data_dir=str(tmp_path)).open()


def test_command_prepares_and_lists(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '200')
  downloads.vqav2(tmp_path / 'in')
  options = ['--manual_dir', str(tmp_path / 'in'), '--data_dir', str(tmp_path)]
  cli.main(['prepare', 'vqav2', *options])
  _archives(tmp_path / 'pairs')
  options = ['--format', 'img2dataset', '--data_dir', str(tmp_path)]
  cli.main(
    ['prepare', 'mine', *options, '--manual_dir', str(tmp_path / 'pairs')]
  )
  capsys.readouterr()
  cli.main(['list', '--data_dir', str(tmp_path)])
  shown = capsys.readouterr().out
  row, address = [x for x in shown.splitlines() if 'vqav2' in x]
  assert 'train: 1' in row and 'visualqa.org' in address
  (line,) = [x for x in shown.splitlines() if 'mine' in x]
  assert 'train: 3' in line


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['prepare', 'vqa2', '--manual_dir', '.'], 'did you mean vqav2'),
    (['prepare', 'vqav2'], 'list --name vqav2'),
    (['prepare', 'vqav2', '--manual_dir', 'nowhere'], 'nowhere is no folder'),
    (['prepare', 'gqa', '--manual_dir', '.'], 'lacks files of gqa'),
    (['prepare', 'A-b', '--format', 'text', '--manual_dir', '.'], 'letters'),
    (
      [
        'prepare',
        'x',
        '--format',
        'text',
        '--manual_dir',
        '.',
        '--split',
        '../x',
      ],
      "'../x' cannot name a split",
    ),
    (
      [
        'prepare',
        'x',
        '--format',
        'text',
        '--manual_dir',
        '.',
        '--max_bad=nan',
      ],
      'nan is no share',
    ),
    (['list', '--name', 'captions'], 'coco_captions'),
  ],
)
def test_command_says_what_is_wrong(
  arguments, says, capsys, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  assert cli.main(arguments) == 2
  error = capsys.readouterr().err
  assert says in error and error.count('\n') == 1
