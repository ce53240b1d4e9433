import os

import pytest

from qwenvl_jax.data import cli, formats, sources, storage
from qwenvl_jax.data.making import make, typefaces
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.text import fonts, grounding

SMALL = {'kind': 'pages', 'count': 5, 'per_shard': 2, 'side': (200, 260)}


@pytest.fixture(autouse=True)
def one_font(monkeypatch):
  """So that every machine makes the same, and quickly."""
  path = str(fonts.PACKAGED_FONT)
  face = typefaces.Typeface(path, fonts.characters(path), ('en', 'zh'))
  monkeypatch.setattr(typefaces, 'find', lambda folders=(): (face,))


def contents(folder):
  return {x.name: x.read_bytes() for x in folder.glob('*array_record*')}


def test_interrupted_it_goes_on_to_the_same_result(tmp_path, monkeypatch):
  making = make.OcrSynthConfig(**SMALL)
  seen = []
  whole = make.make(
    making, tmp_path / 'whole', progress=lambda *x: seen.append(x)
  )
  assert whole.lengths == (2, 2, 1) and seen == [(i, 5) for i in range(1, 6)]

  real, calls = make.Maker.record, []

  def killed(self, number):
    calls.append(number)
    if len(calls) == 4:
      raise KeyboardInterrupt
    return real(self, number)

  monkeypatch.setattr(make.Maker, 'record', killed)
  with pytest.raises(KeyboardInterrupt):
    make.make(making, tmp_path / 'cut' / 'whole')
  folder = tmp_path / 'cut' / 'whole' / '1.0.0'
  assert len(list(folder.glob('*-of-00003'))) == 1
  assert not (folder / 'dataset_info.json').exists()
  make.make(making, tmp_path / 'cut' / 'whole')
  # The shard that was finished is not made again.
  assert calls == [0, 1, 2, 3, 2, 3, 4]
  assert contents(folder) == contents(whole.folder)
  with pytest.raises(ConfigError, match='other settings'):
    make.make(make.OcrSynthConfig(**{**SMALL, 'seed': 1}), tmp_path / 'whole')


def test_records_are_read_as_all_others(tmp_path):
  cli.main(
    [
      'make-ocr', '--n', '2', '--chinese', '1', str(tmp_path / 'data' / 'ocr')
    ]
  )  # fmt: skip
  found = sources.Prepared(
    name='ocr', data_dir=str(tmp_path / 'data'), split='train'
  ).open()
  assert len(found) == 2
  record = found[0]
  assert record.id == 'pages/0/00000000' and record.language == 'zh'
  assert record.words and all(len(x.quad) == 4 for x in record.words)
  assert min(record.size) > 0 and record.images[0][:2] == b'\xff\xd8'
  # In the paper's format, all of it learned but the prompt.
  (sample,) = formats.Ocr()(record, None, None)
  answer = sample.prefix[-1]
  places = grounding.parse(answer.text).places
  assert [x.ref for x in places] == [x.word for x in record.words]
  assert all(len(x.quads) == 1 for x in places) and answer.loss


def test_refused_documents_are_counted(tmp_path):
  fpdf = pytest.importorskip('fpdf')
  pytest.importorskip('pypdfium2')
  folder = tmp_path / 'papers'
  folder.mkdir()
  made = fpdf.FPDF()
  made.add_page()
  made.set_font('helvetica', size=20)
  made.text(20, 20, 'a page with text')
  made.add_page()
  made.output(str(folder / 'good.pdf'))
  (folder / 'bad.pdf').write_bytes(b'not a PDF')
  making = make.OcrSynthConfig(kind='pdf', count=9, documents=str(folder))
  result = make.make(making, tmp_path / 'out')
  assert result.lengths == (1,)
  assert result.refused == {'no_text': 1, 'unreadable_file': 1}
  # Again from what is written: the same account.
  assert make.make(making, tmp_path / 'out') == result
  (data,) = result.folder.glob('*-of-00001')
  assert len(list(storage.read_records(data))) == 1
  (folder / 'good.pdf').unlink()
  with pytest.raises(DataError, match='none of'):
    make.make(
      make.OcrSynthConfig(kind='pdf', count=1, documents=str(folder)),
      tmp_path / 'none',
    )


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['--n', '0'], 'count=0'),
    (['--n', '1' + '0' * 12], 'raise --per_shard'),
    (['--chinese', '2'], 'no share'),
    (['--workers', '0'], '--workers'),
    (['--text', 'nowhere.txt'], 'nowhere.txt'),
    (['--kind', 'pdf', '--documents', 'nowhere'], 'holds no .pdf'),
    (['--documents', 'nowhere'], 'takes no documents'),
    (['--kind', 'html'], 'needs --documents'),
    (
      ['--kind', 'html', '--documents', '.', '--chromium', 'nowhere/chrome'],
      '--chromium',
    ),
  ],
)
def test_bad_input_gets_one_line(
  arguments, says, tmp_path, capsys, monkeypatch
):
  (tmp_path / 'a.html').write_text('<p>text')
  monkeypatch.chdir(tmp_path)
  assert cli.main(['make-ocr', *arguments, str(tmp_path / 'out')]) == 2
  error = capsys.readouterr().err
  assert says in error and error.count('\n') == 1


def test_help(capsys):
  with pytest.raises(SystemExit) as stop:
    cli.main(['make-ocr', '--help'])
  assert stop.value.code == 0
  assert '--backgrounds' in capsys.readouterr().out


def test_changed_documents_are_read_again(tmp_path):
  fpdf = pytest.importorskip('fpdf')
  pytest.importorskip('pypdfium2')

  def write(number, text):
    made = fpdf.FPDF()
    made.add_page()
    made.set_font('helvetica', size=20)
    made.text(20, 20, text)
    made.output(str(tmp_path / f'{number}.pdf'))

  def run(**options):
    said = []
    making = make.OcrSynthConfig(
      kind='pdf', count=9, documents=str(tmp_path), per_shard=1
    )
    made = make.make(making, tmp_path / 'out', say=said.append, **options)
    records = sources.Prepared('out', data_dir=str(tmp_path)).open()
    assert len(made.lengths) == len(records) == 2
    return {x.words[0].word for x in records}, said

  write(0, 'one page')
  write(1, 'another page')
  assert run() == ({'one page', 'another page'}, [])
  write(1, 'a corrected page')
  words, (line,) = run()
  assert words == {'one page', 'a corrected page'} and '1 of 2' in line
  assert run(again=True)[1] == ['out, train: all shards are made again']


def test_pipes_are_no_text_and_no_pictures(tmp_path, capsys):
  os.mkfifo(tmp_path / 'a.jpg')
  out = str(tmp_path / 'out')
  assert cli.main(['make-ocr', '--text', str(tmp_path / 'a.jpg'), out]) == 2
  assert 'not a regular file' in capsys.readouterr().err
  assert cli.main(['make-ocr', '--backgrounds', str(tmp_path), out]) == 2
  assert 'holds no picture' in capsys.readouterr().err
