"""What README shows first runs as it stands there."""

import pathlib
import re

import reciter
from PIL import Image

README = pathlib.Path(__file__).parents[1] / 'README.md'


def test_the_python_of_readme_runs(tmp_path, monkeypatch, capsys):
  (code,) = re.findall(
    r'^```python\n(.*?)^```', README.read_text('utf-8'), re.DOTALL | re.M
  )
  monkeypatch.chdir(tmp_path)
  run = tmp_path / 'runs' / 'quickstart'
  run.mkdir(parents=True)
  reciter.save(run / 'stage3')
  Image.new('RGB', (448, 448)).save(run / 'example.png')
  exec(compile(code, 'README.md', 'exec'), {})
  first, places, second = capsys.readouterr().out.splitlines()
  assert first == second == reciter.ANSWER
  assert '(250, 100, 750, 900)' in places
  assert (tmp_path / 'answer.png').exists()
