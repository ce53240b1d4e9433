"""`qwenvl-chat`: a conversation about pictures in the terminal."""

import argparse
import os
import sys
from collections.abc import Sequence

from qwenvl_jax import checkpoint_options, entry
from qwenvl_jax.errors import DataError
from qwenvl_jax.infer.chat import Chat, ChatSettings
from qwenvl_jax.infer.terminal import (
  Session,
  check_writable,
  open_picture,
  spinner,
)
from qwenvl_jax.sharding import use_all_devices


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  return entry.run(_run, argv)


def _parser() -> argparse.ArgumentParser:
  parser = entry.parser(
    'qwenvl-chat',
    """
    Chat with a Qwen-VL model about pictures, in the terminal.

    Answers appear as they are written, in words. Ask for a place ("Where is the
    dog? Give its box.") and the boxes of the answer are drawn on the picture,
    in a file whose name is told; --raw prints their numbers instead. Lines that
    come from a file or a pipe are a script: the first that cannot be done ends
    it with status 2. While chatting, /help lists the commands.
    """,
    """
    qwenvl-chat --checkpoint runs/quickstart/stage3 --image dog.jpg
    qwenvl-chat --checkpoint Qwen-VL-Chat --dtype bfloat16
    qwenvl-chat --checkpoint runs/quickstart/stage3 --image dog.jpg \\
        --prompt 'What is this?'
    qwenvl-chat --checkpoint runs/quickstart/stage3 < questions.txt
    """,
    gin_help=False,
  )
  parser.add_argument(
    '--checkpoint',
    required=True,
    metavar='DIR',
    help='a training run, a converted checkpoint, a released Qwen-VL-Chat '
    'folder, or its name on the hub (Qwen/Qwen-VL-Chat)',
  )
  parser.add_argument(
    '--image',
    action='append',
    default=[],
    metavar='PIC',
    help='a picture to talk about; may be repeated',
  )
  parser.add_argument(
    '--prompt',
    metavar='TEXT',
    help='ask this one question, print the answer, and leave',
  )
  parser.add_argument(
    '--save',
    metavar='PATH',
    help="with --prompt: write the last picture with the answer's boxes here",
  )
  parser.add_argument(
    '--raw',
    action='store_true',
    help='print answers as the model writes them, with the tags and numbers of '
    'boxes, rather than in words',
  )
  entry.add_fields(
    parser,
    ChatSettings,
    {
      'system': ('TEXT', 'what the model is told about itself'),
      'temperature': (
        'T',
        '0 always gives the most likely answer; higher varies more, and the '
        'released chat model was meant for 1',
      ),
      'top_p': (
        'P',
        'with a temperature: choose among the most likely words that together '
        'have this probability',
      ),
      'top_k': (
        'K',
        'with a temperature: choose among the K most likely words; 0 for all',
      ),
      'max_new_tokens': ('N', 'longest answer, in tokens'),
    },
  )
  parser.add_argument(
    '--window',
    type=int,
    metavar='N',
    dest='max_window_size',
    default=ChatSettings.max_window_size,
    help='tokens of the conversation that the model still sees; older turns '
    'are forgotten (default: %(default)s)',
  )
  parser.add_argument(
    '--seed',
    type=int,
    metavar='N',
    help='with a temperature: repeat the same choices (default: new ones)',
  )
  checkpoint_options.add_options(parser)
  parser.add_argument(
    '--adapter',
    dest='adapter_folder',
    metavar='DIR',
    help='a low-rank adapter of this checkpoint: a run of finetune/lora.gin or '
    "PEFT's folder (a run as --checkpoint finds its base itself)",
  )
  return parser


def _run(argv: Sequence[str]) -> int:
  args = _parser().parse_args(argv)
  # Names and answers are Unicode whatever the terminal is.
  for stream in (sys.stdin, sys.stdout, sys.stderr):
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='replace')
  settings = entry.from_flags(ChatSettings, args)
  if args.save and args.prompt is None:
    raise DataError('--save needs --prompt; in a conversation, type /save')
  if args.save and not args.image:
    raise DataError('--save needs --image: there is no picture to draw on')
  if args.save:
    check_writable(args.save)
  # Before the model, which takes longer to open.
  pictures = [open_picture(path) for path in args.image]
  with use_all_devices():
    return _converse(args, settings, pictures)


def _converse(args, settings, pictures) -> int:
  with spinner(f'opening {args.checkpoint}'):
    model = checkpoint_options.load(args, adapter=args.adapter_folder)
  seed = args.seed
  if seed is None:
    seed = int.from_bytes(os.urandom(4), 'little')
  session = Session(Chat(model, settings, seed), pictures, args.raw)
  if args.prompt is None:
    return session.converse()
  session.ask(args.prompt, args.save)
  return 0


if __name__ == '__main__':
  sys.exit(main())
