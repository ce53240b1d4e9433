"""What the bar of a run says."""

import io

from rich.console import Console

from qwenvl_jax.train import reporting


def test_the_bar_says_compiling_while_it_does(tmp_path, monkeypatch):
  shown = io.StringIO()
  monkeypatch.setattr(
    reporting,
    'Console',
    lambda **_: Console(file=shown, force_terminal=True, width=200),
  )
  monkeypatch.setattr(reporting._Columns, 'max_refresh', None)
  run = tmp_path / 'run'
  run.mkdir()
  reporter = reporting.Reporter(run, 0, 30)
  reporter._bar.refresh()
  assert '0/30' in shown.getvalue() and 'compiling' not in shown.getvalue()
  reporter.compiling()
  reporter._bar.refresh()
  last = shown.getvalue().rsplit('\x1b[2K', 1)[1]
  assert 'compiling the training step, 0:00:0' in last and '0/30' not in last
  reporter.compiled(81.0)
  reporter.step(1)
  reporter.close()
  assert 'compiled the training step in 81.0 s' in shown.getvalue()
  last = shown.getvalue().rsplit('\x1b[2K', 1)[1]
  assert '1/30' in last and 'compiling' not in last
