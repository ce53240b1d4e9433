import dataclasses

import pytest

from qwenvl_jax.errors import DataError
from qwenvl_jax.eval import registry, runner


def mmlu(files, solved=5):
  line = 'What is "{}"?,"one, or two",two,three,four,{}\n'
  dev = ''.join(line.format(i, 'B') for i in range(solved))
  files.write('MMLU/dev/abstract_algebra_dev.csv', dev.encode())
  test = line.format('x', 'A') + line.format('y', 'D')
  files.write('MMLU/test/abstract_algebra_test.csv', test.encode())


def test_mmlu(files, run):
  mmlu(files)
  task = dataclasses.replace(registry.get('mmlu'), subjects=1)
  scores, outcome, _ = run(task, lambda x: 'A', 2)
  assert scores == {'accuracy': 0.5}
  example = outcome.items[0].example
  assert example.choices == (' A', ' B', ' C', ' D')
  [text] = example.prompt.parts
  assert text.startswith(
    'The following are multiple choice questions (with answers) about abstract '
    'algebra.\n\nWhat is "0"?\nA. one, or two\nB. two\nC. three\nD. four\n'
    'Answer: B\n\nWhat is "1"?'
  )
  assert text.endswith('D. four\nAnswer:')


@pytest.mark.parametrize('name', ['ceval', 'cmmlu'])
def test_chinese_exams(files, run, name):
  if name == 'ceval':
    heads = {'dev': 'id,question,A,B,C,D,answer,explanation\n'}
    heads['val'] = 'id,question,A,B,C,D,answer\n'
    for split, head in heads.items():
      end = ',因为' if split == 'dev' else ''
      rows = ''.join(f'{i},问题{i},一,二,三,四,B{end}\n' for i in range(5))
      files.write(
        f'C-Eval/{split}/law_{split}.csv', (head + rows).encode('utf-8-sig')
      )
  else:
    for split in ('dev', 'test'):
      rows = ''.join(f'{i},问题{i},一,二,三,四,B\n' for i in range(5))
      files.write(
        f'CMMLU/{split}/college_law.csv',
        f',Question,A,B,C,D,Answer\n{rows}'.encode(),
      )
  task = dataclasses.replace(registry.get(name), subjects=1)
  scores, outcome, _ = run(task, lambda x: 'BA'[x.key.endswith('/0')], 5)
  assert scores == {'accuracy': 0.8}
  example = outcome.items[0].example
  assert example.choices == tuple('ABCD')
  [text] = example.prompt.parts
  assert text.count('问题') == 6
  heading = {
    'ceval': '以下是中国关于法学考试的单项选择题，请选出其中的正确答案。',
    'cmmlu': '以下是关于大学法律的单项选择题，请直接给出正确答案的选项。',
  }[name]
  assert text.startswith(f'{heading}\n\n')


def test_missing_subjects_are_named(files):
  mmlu(files)
  with pytest.raises(DataError, match='1 subjects in .*MMLU, but there are 57'):
    runner.take(registry.get('mmlu'), files.root)
  mmlu(files, solved=2)
  with pytest.raises(DataError, match='2 solved questions of 5'):
    list(registry.get('mmlu').examples(files.root))
  mmlu(files)
  files.write('MMLU/test/abstract_algebra_test.csv', b'q,a,b,c,d,AB\n')
  with pytest.raises(DataError, match="line 1: 'AB' is none of A, B, C, D"):
    list(registry.get('mmlu').examples(files.root))
