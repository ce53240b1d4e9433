"""The steps of cleaning without Beam: a runner of a few lines stands for it."""

import dataclasses
import json
import os
import pathlib
import shutil

import corpus
import pytest

from qwenvl_jax.data import sources
from qwenvl_jax.data.cleaning import (
  cli,
  image_rules,
  inputs,
  pipeline,
  shards,
  unique,
)
from qwenvl_jax.data.cleaning.rule_stats import KEPT, RuleStats
from qwenvl_jax.errors import ConfigError, DataError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  corpus.write(folder)
  return folder


def compare(job):
  """What Beam's graph computes: name of rule -> shard -> kept indices."""
  numbers = range(len(job.shards))
  entries = [x for i in numbers for x in shards.entries(job, i)]
  kept = {}
  for rule in job.unique:
    groups = {}
    for entry in entries:
      groups.setdefault(rule.key(entry), []).append(entry)
    entries = [x for g in groups.values() for x in unique.best(rule, g)]
    kept[rule.name] = {
      i: {x.index for x in entries if x.shard == i} for i in numbers
    }
  return [{name: k[i] for name, k in kept.items()} for i in numbers]


def run(job) -> RuleStats:
  pipeline.begin(job)
  for number in corpus.shuffled(range(len(job.shards))):
    shards.clean_shard(job, number)
  for number, kept in enumerate(compare(job)):
    shards.finish_shard(job, number, kept)
  return pipeline.complete(job)


@pytest.fixture(scope='module')
def finished(folder, tmp_path_factory):
  job = corpus.job(folder, tmp_path_factory.mktemp('data') / 'pairs')
  return job, run(job)


def test_every_record_has_the_fate_that_it_should(finished):
  job, tally = finished
  wanted = {}
  for name, reason in corpus.FATES.items():
    key = name.partition('/')[0], reason
    wanted[key] = wanted.get(key, 0) + 1
  assert dict(tally.outcomes) == wanted
  assert tally.changed == {('web', 'html'): 1, ('web', 'patterns'): 1}


def test_the_result_is_a_data_set_to_train_on(finished):
  job, _ = finished
  output = job.folder.parent
  records = sources.Prepared(
    name='pairs', data_dir=str(output.parent), split='train'
  ).open()
  found = {records[i].id: records[i] for i in range(len(records))}
  assert set(found) == {name for name, x in corpus.FATES.items() if not x}
  mended = found['web/00000.tar/mended']
  assert mended.captions == ('A & B at the sea',)
  # Pictures stay as they came.
  assert mended.images == (corpus.jpeg(2),) and mended.size == (160, 120)
  assert found['sbu/lines.jsonl/zh'].language == 'zh'


def test_report(finished):
  job, _ = finished
  output = job.folder.parent
  page = (output / 'report.html').read_text()
  for reason in set(corpus.FATES.values()) - {KEPT}:
    assert f'<h3>{reason}</h3>' in page
  assert 'src="data:image/jpeg;base64' in page
  assert 'src="http' not in page and 'href' not in page
  assert '&lt;PERSON&gt; at the gala' in page and '<PERSON>' not in page
  figures = json.loads((output / 'report.json').read_text())
  assert figures['web']['records'] == 18 and figures['web']['kept'] == 4
  assert figures['web']['dropped']['size'] == 1
  assert figures['web']['changed'] == {'html': 1, 'patterns': 1}


def test_a_finished_folder_holds_no_leftovers(finished):
  job, _ = finished
  output = job.folder.parent
  left = [x.name for x in pathlib.Path(output).rglob('*') if x.is_file()]
  assert sorted(x for x in left if 'record' not in x) == [
    *(f'candidates-0000{i}.json' for i in range(3)),
    'dataset_info.json',
    'features.json',
    *(f'finished-0000{i}.json' for i in range(3)),
    'report.html',
    'report.json',
    'settings.txt',
  ]
  assert sum('record' in x for x in left) == 3


def test_killed_at_any_write_it_goes_on_to_the_same_result(
  folder, finished, tmp_path, monkeypatch
):
  whole, _ = finished
  job = corpus.job(folder, tmp_path / 'pairs')
  writes = []
  limit = [0]
  real = shards.storage.write_records

  class KilledError(BaseException):
    """As a signal would, it passes every `except Exception`."""

  def write(path, records):
    writes.append(path.name)
    if len(writes) > limit[0]:
      # Dies in the middle: after one record.
      real(path, _then(records, KilledError))
    return real(path, records)

  monkeypatch.setattr(shards.storage, 'write_records', write)
  for stop in range(1, 6):
    limit[0] = len(writes) + 1
    with pytest.raises(KilledError):
      run(job)
    assert not job.is_complete, stop
  limit[0] = 1000
  run(job)
  # Six shards' files in all, each attempt finished one and broke one.
  assert len(writes) == 6 + 5
  for number in range(len(job.shards)):
    assert (
      job.finished.path(number).read_bytes()
      == whole.finished.path(number).read_bytes()
    )


def _then(records, error):
  for record in records:
    yield record
    break
  raise error


def test_a_finished_shard_is_not_read_again(folder, tmp_path, monkeypatch):
  job = corpus.job(folder, tmp_path / 'pairs')
  pipeline.begin(job)
  for number in range(len(job.shards)):
    shards.clean_shard(job, number)
  monkeypatch.setattr(inputs.Shard, 'read', None)
  assert run(job).outcomes['web', KEPT] == 4


def test_other_settings_do_not_mix(folder, tmp_path):
  job = corpus.job(folder, tmp_path / 'pairs')
  pipeline.begin(job)
  pipeline.begin(job)
  other = corpus.job(folder, tmp_path / 'pairs', rules=corpus.RULES[1:])
  with pytest.raises(ConfigError, match=r'begun with other settings \(Model'):
    pipeline.begin(other)


def test_a_damaged_candidate_is_named(folder, tmp_path):
  job = corpus.job(folder, tmp_path / 'pairs')
  pipeline.begin(job)
  shards.clean_shard(job, 0)
  path = job.candidates.path(0)
  path.write_bytes(path.read_bytes()[:100])
  kept = {rule.name: range(99) for rule in job.unique}
  with pytest.raises(DataError, match='candidates-00000.array_record'):
    shards.finish_shard(job, 0, kept)


def test_what_a_configuration_may_not_say(folder, tmp_path):
  def cleaning(**changes):
    settings = {
      'sources': corpus.sources(folder),
      'output': str(tmp_path / 'x'),
      'rules': corpus.RULES,
    }
    return pipeline.Cleaning(**{**settings, **changes})

  assert len(cleaning().job().shards) == 3
  with pytest.raises(ConfigError, match='html occurs more than once'):
    cleaning(rules=(*corpus.RULES, corpus.RULES[1])).job()
  with pytest.raises(ConfigError, match='empty'):
    cleaning(sources=()).job()
  with pytest.raises(ConfigError, match="'a/b'"):
    cleaning(sources=(inputs.Source(name='a/b', files='x'),)).job()


def test_tallies_add_up_and_survive_json(finished):
  _, tally = finished
  again = RuleStats.from_json(tally.to_json())
  assert again == tally
  assert (tally + again).outcomes['web', KEPT] == 8
  assert len((tally + again).thinned(1).altered) == 2


def test_changed_input_is_cleaned_again(folder, tmp_path):
  """Before the folder is complete only what has changed, then everything."""
  for name in ('00000.tar', '00001.tar', 'sbu'):
    copy = shutil.copytree if name == 'sbu' else shutil.copy
    copy(folder / name, tmp_path / name)
  output = tmp_path / 'data' / 'pairs'
  job = corpus.job(tmp_path, output)
  assert pipeline.begin(job) == []
  for number in range(3):
    shards.clean_shard(job, number)
  corpus.write_tar(
    tmp_path / '00001.tar', [('new', 'a new tower', corpus.jpeg(30), 0.4)]
  )
  job = corpus.job(tmp_path, output)
  (line,) = pipeline.begin(job)
  assert '1 of 3 shards' in line and '00001.tar' in line
  assert [job.candidates.is_finished(x) for x in range(3)] == [
    True,
    False,
    True,
  ]
  before = run(job)
  assert before.outcomes['web', KEPT] == 3 and job.is_complete
  assert pipeline.begin(job) == [] and job.is_complete

  corpus.write_tar(
    tmp_path / '00001.tar', [('cut', 'a third text', corpus.jpeg(30)[:90], 0.4)]
  )
  job = corpus.job(tmp_path, output)
  said = pipeline.begin(job)
  assert '1 of 3 shards' in said[0] and '2 further shards' in said[1]
  assert not job.is_complete
  after = run(job)
  assert after.outcomes['web', KEPT] == 2
  assert after.outcomes['web', 'unreadable_image'] == 2
  names = sources.Prepared('pairs', data_dir=str(output.parent)).open()
  assert 'web/00001.tar/new' not in {x.id for x in names}


def test_again_takes_other_settings(folder, tmp_path):
  job = corpus.job(folder, tmp_path / 'pairs')
  run(job)
  other = corpus.job(folder, tmp_path / 'pairs', rules=corpus.RULES[:-1])
  with pytest.raises(ConfigError, match='--again'):
    pipeline.begin(other)
  assert job.is_complete
  (line,) = pipeline.begin(other, again=True)
  assert 'everything is cleaned again' in line
  assert not any(other.candidates.is_finished(x) for x in range(3))
  assert not other.is_complete


def test_sources_without_a_limit_are_named(folder):
  made = pipeline.Cleaning(
    sources=[
      inputs.Source(name=x, files='x') for x in ('laion_em', 'web', 'sbu')
    ],
    output='x',
    rules=[image_rules.ClipScore(minimum={'laion_en': 0.3, 'web': 0.3})],
  )
  first, second = cli._without_limit(made)
  assert first.startswith('source laion_em: clip_score has no limit')
  assert 'did you mean laion_en?' in first and 'sbu' in second
  no_limits = dataclasses.replace(made, rules=[image_rules.Size()])
  assert not list(cli._without_limit(no_limits))


def test_names_that_are_no_text_end_nothing(tmp_path):
  odd = tmp_path / os.fsdecode(b'caf\xe9.tar')
  corpus.write_tar(odd, [('cut', 'a red boat', b'no picture', 0.4)])
  lines = [{'id': '\ud800', 'text': '\ud801 is odd', 'image': 'x'}, {'id': []}]
  (tmp_path / 'sbu').mkdir()
  (tmp_path / 'sbu' / 'a.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  job = corpus.job(tmp_path, tmp_path / 'data' / 'pairs')
  tally = run(job)
  assert sum(tally.outcomes.values()) == 3
  assert 'caf' in (tmp_path / 'data/pairs/report.html').read_text()
  assert pipeline.begin(job) == []


def test_from_bucket_to_bucket(folder, finished, bucket, tmp_path):
  """The same as on a disk, and again when an object is replaced."""
  bucket.put_folder(folder, 'in')
  found = [
    inputs.Source(name='web', files=f'{bucket.url}/in/*.tar'),
    inputs.Source(name='sbu', files=f'{bucket.url}/in/sbu/lines.jsonl'),
  ]

  def made():
    shards_ = tuple(shard for source in found for shard in source.shards())
    return corpus.job(folder, f'{bucket.url}/data/pairs', shards=shards_)

  job, (whole, _) = made(), finished
  tally = run(job)
  # Pictures that JSONL names are read from a disk only.
  assert tally.outcomes['web', KEPT] == 4
  assert tally.outcomes['sbu', 'missing_image'] == 3
  assert (
    job.finished.path(0).read_bytes() == whole.finished.path(0).read_bytes()
  )
  assert not any('candidates-00000.array' in x for x in bucket.objects)
  assert pipeline.begin(made()) == []
  corpus.write_tar(tmp_path / 'new.tar', [('new', 'a red boat', b'x', 0.4)])
  bucket.put('in/00001.tar', (tmp_path / 'new.tar').read_bytes())
  assert '1 of 3 shards' in pipeline.begin(made())[0]
