"""Runs the notebooks of launch/colab, with parameters of a test."""

import re
from pathlib import Path

import nbclient
import nbformat

FOLDER = Path(__file__).parents[1] / 'launch' / 'colab'
NAMES = sorted(path.stem for path in FOLDER.glob('*.ipynb'))


def read(name: str) -> nbformat.NotebookNode:
  return nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)


def tagged(notebook: nbformat.NotebookNode, tag: str) -> int:
  """The number of the one cell with a tag."""
  cells = enumerate(notebook.cells)
  (found,) = (i for i, x in cells if tag in x.metadata.get('tags', ()))
  return found


def execute(name: str, folder: Path, **parameters) -> nbformat.NotebookNode:
  """Runs all cells in a kernel of its own.

  Args:
    name: of the notebook.
    folder: where the kernel runs.
    **parameters: values for names of the cell with parameters, which a cell
      after it sets.

  Returns:
    The notebook with its outputs, without that cell.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed.
  """
  notebook = read(name)
  at = tagged(notebook, 'parameters')
  known = re.findall(r'^(\w+) = ', notebook.cells[at].source, re.MULTILINE)
  assert parameters.keys() <= set(known)
  lines = [f'{name} = {value!r}' for name, value in parameters.items()]
  notebook.cells.insert(at + 1, nbformat.v4.new_code_cell('\n'.join(lines)))
  nbclient.NotebookClient(
    notebook,
    timeout=1200,
    kernel_name='python3',
    coalesce_streams=True,
    resources={'metadata': {'path': str(folder)}},
  ).execute()
  del notebook.cells[at + 1]
  return notebook


def output(notebook: nbformat.NotebookNode) -> str:
  """All text that cells printed."""
  outputs = [x for cell in notebook.cells for x in cell.get('outputs', ())]
  return '\n'.join(x['text'] for x in outputs if 'text' in x)


def pictures(notebook: nbformat.NotebookNode) -> list[str]:
  """All pictures that cells showed, PNG in base64."""
  outputs = [x for cell in notebook.cells for x in cell.get('outputs', ())]
  found = [x.get('data', {}).get('image/png') for x in outputs]
  return list(filter(None, found))
