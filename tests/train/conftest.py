import pathlib
import sys

# `fake` is shared by the tests here and by the programs that they start.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
