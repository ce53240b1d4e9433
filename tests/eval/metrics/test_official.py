"""Metrics beside what the official scorers gave (`goldens/metrics.json`)."""

import gc
import json
import pathlib
import tempfile

import numpy as np
import pytest

from qwenvl_jax.errors import DataError
from qwenvl_jax.eval import metrics
from qwenvl_jax.eval.metrics import answers, vqa
from qwenvl_jax.eval.metrics.captions import score_captions, tokenized

GOLDENS = json.loads(
  (pathlib.Path(__file__).parents[2] / 'goldens/metrics.json').read_text()
)


def test_vqa_accuracy():
  golden = GOLDENS['vqa_score']
  scores = [
    metrics.vqa_accuracy(item['prediction'], item['answers'])
    for item in golden['items']
  ]
  assert [round(100 * x, 2) for x in scores] == [
    item['score'] for item in golden['items']
  ]
  assert round(100 * float(np.mean(scores)), 2) == golden['mean']


@pytest.mark.parametrize(
  ('text', 'normal'),
  [
    ('1,000', '1000'),
    ('left-hand side', 'left hand side'),
    ('yes - no', 'yes no'),
    ('5.30 p.m.', '5.30 pm'),
    ('.5', '.5'),
    ("y'allll couldntve", "y'all'll couldntve"),
    ("somebody'd", 'somebodyd'),
    ('None\tof the Ten', '0 of 10'),
  ],
)
def test_vqa_normalization(text, normal):
  assert vqa.normalize(text) == normal


def test_vqa_answers_that_all_agree_keep_their_punctuation():
  assert metrics.vqa_accuracy('a.m.', ['a.m.'] * 10) == 0
  assert metrics.vqa_accuracy('a.m.', ['a.m.'] * 9 + ['noon']) == 1


@pytest.mark.parametrize('item', GOLDENS['relaxed_accuracy'])
def test_relaxed_accuracy(item):
  score = metrics.relaxed_accuracy(item['prediction'], item['target'])
  assert score == item['correct']


@pytest.mark.parametrize('item', GOLDENS['exact_match'])
def test_exact_match(item):
  score = metrics.exact_match(item['prediction'], item['target'])
  assert score == item['score']


def test_anls():
  golden = GOLDENS['anls']
  scores = [
    metrics.anls(item['prediction'], item['answers'], golden['threshold'])
    for item in golden['items']
  ]
  assert float(np.mean(scores)) == pytest.approx(golden['mean'], abs=1e-15)


def test_levenshtein_equals_its_definition():
  def slow(a, b):
    if not a or not b:
      return len(a) + len(b)
    return min(
      slow(a[1:], b) + 1,
      slow(a, b[1:]) + 1,
      slow(a[1:], b[1:]) + (a[0] != b[0]),
    )

  random = np.random.default_rng(0)
  for _ in range(60):
    first, second = (
      ''.join(random.choice(list('abc'), random.integers(0, 6)))
      for _ in range(2)
    )
    assert answers.levenshtein(first, second) == slow(first, second)


@pytest.mark.parametrize('item', GOLDENS['grounding']['items'])
def test_grounding(item):
  height, width = item['hw']
  score = metrics.grounding_hit(item['answer'], item['gt_bbox'], width, height)
  assert score == item['correct']


@pytest.mark.parametrize(
  ('said', 'ours', 'release'),
  [
    ('It is a pizza slice.', 'pizza slice', 'pizz'),
    ('The color is red, I think', 'red', 'red'),
    ('the top of a table', 'table', 'table'),
    ('piece of cake', 'piece', 'piece'),
    ('this one', 'this one', 'one'),
    ('a cat and a dog', 'cat and a dog', 'cat and'),
  ],
)
def test_gqa_answers(said, ours, release):
  assert answers.gqa_answer(said) == ours
  assert answers.gqa_answer_release(said) == release


def test_captions():
  pytest.importorskip('pycocoevalcap')
  golden = GOLDENS['caption']
  scores = score_captions(golden['predictions'], golden['references'])
  for name in ('cider', 'bleu4', 'rouge_l'):
    assert scores.corpus[name] == pytest.approx(golden[name], rel=1e-12)
  assert list(scores.cider.values()) == pytest.approx(
    golden['cider_each'], rel=1e-12
  )
  # Of meteor-1.5.jar, `-l en -norm -r 5` on files of these captions' tokens.
  assert scores.corpus['meteor'] == pytest.approx(0.4801396007879833, rel=1e-12)


def test_meteor_where_the_path_has_a_blank(tmp_path, monkeypatch):
  meteor = pytest.importorskip('pycocoevalcap.meteor.meteor')
  installed = pathlib.Path(meteor.__file__).parent
  place = tmp_path / 'my environment'
  place.mkdir()
  for name in (meteor.METEOR_JAR, 'data'):
    (place / name).symlink_to(installed / name)
  golden = GOLDENS['caption']
  with monkeypatch.context() as patch:
    patch.setattr(meteor, '__file__', str(place / 'meteor.py'))
    scores = score_captions(golden['predictions'], golden['references'])
  assert scores.corpus['meteor'] == pytest.approx(0.4801396007879833, rel=1e-12)
  # Where it cannot run, it says so and ends.
  monkeypatch.setattr(tempfile, 'tempdir', str(place))
  with pytest.raises(DataError, match='METEOR failed: .*TMPDIR'):
    score_captions(golden['predictions'], golden['references'])
  gc.collect()


def test_a_caption_of_several_lines_stays_one():
  """The tokenizer reads lines: a stray one would shift all that follow."""
  pytest.importorskip('pycocoevalcap')
  found = tokenized(
    [['A dog\r\nruns\u2028\x85fast.\n', ''], ['\n'], ['a red\rcar']]
  )
  assert found == {0: ['a dog runs fast', ''], 1: [''], 2: ['a red car']}


def test_captions_of_other_pictures_are_refused():
  with pytest.raises(DataError, match="none for 'b'"):
    metrics.caption_scores({'a': 'x'}, {'a': ['x'], 'b': ['y']})
