import io
import threading

import pytest
from rich.console import Console

from qwenvl_jax.errors import DataError
from qwenvl_jax.progress import bars, print_table


def console():
  return Console(file=io.StringIO(), force_terminal=True, width=80)


def test_an_error_in_the_input_comes_before_any_bar():
  shown = console()
  with pytest.raises(DataError), bars(shown):
    raise DataError('no such file')
  assert not shown.file.getvalue()


def test_a_bar_for_each_work_drawn_by_no_other_thread():
  shown, threads = console(), threading.active_count()
  with bars(shown) as progress:
    progress('reading', 1, 2)
    assert 'reading' in shown.file.getvalue()
    assert threading.active_count() == threads
    progress('reading', 2, 2)
    progress('writing', 5, 5)
  last = shown.file.getvalue().rsplit('reading', 1)[1]
  assert '2/2' in last and 'writing' in last and '5/5' in last


def test_a_table_in_a_file_is_whole(capsys):
  cells = [letter * 40 for letter in 'abcd']
  print_table(cells, [cells])
  lines = capsys.readouterr().out.splitlines()
  assert sum(all(cell in line for cell in cells) for line in lines) == 2
