"""`qwenvl-serve`: an HTTP server with OpenAI's API."""

import argparse
import pathlib
import socket
import ssl
import sys
from collections.abc import Sequence
from typing import Any

from qwenvl_jax import checkpoint_options, entry
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.infer.grammar import GrammarCompiler
from qwenvl_jax.infer.scheduler import Scheduler
from qwenvl_jax.infer.terminal import spinner
from qwenvl_jax.serve.fetch import DOMAIN
from qwenvl_jax.serve.limits import Limits
from qwenvl_jax.sharding import use_all_devices

# A key shorter than this is guessed too soon.
_KEY_CHARS = 8


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `qwenvl-serve`; returns the exit status."""
  return entry.run(_run, argv)


def _parser() -> argparse.ArgumentParser:
  parser = entry.parser(
    'qwenvl-serve',
    """
    Serve a Qwen-VL model with OpenAI's API.

    Answers many requests at a time, from any OpenAI client. /docs in a browser
    shows all routes. A first question, once the server says that it is ready:

      curl http://127.0.0.1:8000/v1/chat/completions \\
        -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello!"}]}'
    """,
    """
    qwenvl-serve --checkpoint runs/quickstart/stage3
    qwenvl-serve --checkpoint Qwen-VL-Chat --host 0.0.0.0 \\
        --api_key_file key.txt --slots 32
    """,
    gin_help=False,
  )
  add = parser.add_argument
  add(
    '--checkpoint',
    required=True,
    metavar='DIR',
    help='a training run, a converted checkpoint, a released folder, or its '
    'name on the hub (Qwen/Qwen-VL-Chat)',
  )
  add(
    '--host', default='127.0.0.1', help='address (default: this machine only)'
  )
  add('--port', type=int, default=8000, help='0 takes a free one')
  add(
    '--api_key_file',
    metavar='FILE',
    help='clients must send the key in this file; needed for other hosts than '
    'this machine, unless --no_api_key says otherwise',
  )
  add('--no_api_key', action='store_true', help='serve anybody who can connect')
  add('--served_name', metavar='NAME', help='default: name of the folder')
  add(
    '--adapter',
    action='append',
    default=[],
    metavar='NAME=DIR',
    help='a low-rank adapter of the checkpoint (a run of finetune/lora.gin, or '
    "PEFT's folder), asked as the model NAME; may be repeated",
  )
  checkpoint_options.add_engine_options(parser, slots=8)
  add('--max_waiting', type=int, default=256, help='requests in the queue')
  checkpoint_options.add_options(parser)
  add(
    '--media_folder',
    metavar='DIR',
    help='file: pictures are read from here (default: from nowhere)',
  )
  add(
    '--media_domain',
    action='append',
    default=[],
    metavar='HOST',
    help='http(s) pictures are fetched from here; may be repeated (default: '
    'from nowhere)',
  )
  add('--max_images', type=int, default=16, help='pictures of a request')
  add(
    '--timeout', type=float, default=600, help='seconds after which answers end'
  )
  add(
    '--ssl_certfile', metavar='FILE', help='serve https with this certificate'
  )
  add('--ssl_keyfile', metavar='FILE', help='its private key')
  add(
    '--demo',
    action='store_true',
    help='a page to chat in, at /demo; a browser that is asked for a name and '
    'a password gets in with any name and the key',
  )
  return parser


def _run(argv: Sequence[str]) -> int:
  args = _parser().parse_args(argv)
  try:
    import uvicorn

    from qwenvl_jax.serve import web_demo
    from qwenvl_jax.serve.app import make_app
    from qwenvl_jax.serve.connections import uvicorn_config
  except ImportError as error:
    raise ConfigError(
      f'{error.name} is not installed; pip install "qwenvl_jax[serve]"'
    ) from error
  key, limits = _key(args), _limits(args)
  _check_tls(args)
  if args.demo:
    web_demo.check()
  # Before minutes of loading, that nobody waits for in vain.
  listening = _bind(args)
  with use_all_devices(), spinner(f'opening {args.checkpoint}'):
    server = _open(args, key, limits)
  port = listening.getsockname()[1]
  where = f'http{"s" * bool(args.ssl_certfile)}://{args.host}:{port}'
  print(f'{server.name} will be at {where}/v1 once it is compiled')
  server.worker.when_ready = lambda: print(
    f'ready: {where}{web_demo.PATH if args.demo else "/docs"}', flush=True
  )
  app = make_app(server)
  if args.demo:
    web_demo.add_demo(app, server)
  config = uvicorn_config(
    app,
    log_level='error',
    ssl_certfile=args.ssl_certfile,
    ssl_keyfile=args.ssl_keyfile,
  )
  http = uvicorn.Server(config)
  if args.demo:
    web_demo.let_go(http, app)
  http.run(sockets=[listening])
  return 0


def _bind(args: argparse.Namespace) -> socket.socket:
  """A socket at the address of a command line, which does not listen yet."""
  family = socket.AF_INET6 if ':' in args.host else socket.AF_INET
  bound = socket.socket(family)
  bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    bound.bind((args.host, args.port))
  except (OSError, OverflowError) as error:
    bound.close()
    raise ConfigError(
      f'--host={args.host} --port={args.port} cannot be served at ({error}); '
      'give another one, 0 for any that is free'
    ) from error
  return bound


def _check_tls(args: argparse.Namespace) -> None:
  """ConfigError if there is no certificate where one is named."""
  if not args.ssl_certfile:
    if args.ssl_keyfile:
      raise ConfigError('--ssl_keyfile needs --ssl_certfile')
    return
  context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
  try:
    context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile)
  except OSError as error:
    raise ConfigError(
      f'--ssl_certfile={args.ssl_certfile}: no certificate with its private '
      f'key ({error}); the key may be in --ssl_keyfile'
    ) from error


def _open(args: argparse.Namespace, key: str | None, limits: Limits) -> Any:
  """The `Server` of a command line."""
  from qwenvl_jax.serve.metrics import Metrics
  from qwenvl_jax.serve.server import Server
  from qwenvl_jax.serve.worker import Worker

  name = args.served_name or pathlib.PurePath(str(args.checkpoint)).name
  adapters = _adapters(args.adapter, name)
  handle = checkpoint_options.load(args, adapters=adapters)
  engine = checkpoint_options.make_engine(args, handle)
  scheduler = Scheduler(engine, max_waiting=args.max_waiting)
  vocab_size = handle.config.decoder.vocab_size
  return Server(
    name=name,
    config=handle.config,
    tokenizer=handle.tokenizer,
    compiler=GrammarCompiler(handle.tokenizer, vocab_size),
    worker=Worker(scheduler),
    metrics=Metrics(name, scheduler),
    limits=limits,
    key=key,
  )


def _adapters(given: Sequence[str], model: str) -> dict[str, str]:
  """Folders of adapters by name, of a command line's NAME=DIR."""
  found = {}
  for text in given:
    name, _, folder = text.partition('=')
    if not name or not folder:
      raise ConfigError(f'--adapter={text} is not NAME=DIR')
    if name == model or name in found:
      raise ConfigError(
        f'--adapter={text}: {name!r} is the name of another model here; give '
        'it one of its own'
      )
    found[name] = folder
  return found


def _key(args: argparse.Namespace) -> str | None:
  """The API key; ConfigError if there should be one."""
  if args.api_key_file is None:
    local = args.host in ('127.0.0.1', 'localhost', '::1')
    if not local and not args.no_api_key:
      raise ConfigError(
        f'--host={args.host} is reached from other machines: give '
        '--api_key_file, or --no_api_key if anybody may ask'
      )
    return None
  key = entry.read_key(args.api_key_file)
  if len(key) < _KEY_CHARS or not key.isprintable() or ' ' in key:
    raise ConfigError(
      f'{args.api_key_file}: a key has at least {_KEY_CHARS} characters and no '
      'spaces; make one: openssl rand -hex 24'
    )
  return key


def _limits(args: argparse.Namespace) -> Limits:
  folder = args.media_folder and pathlib.Path(args.media_folder)
  if folder and not folder.is_dir():
    raise ConfigError(f'--media_folder={folder} is no folder')
  for domain in args.media_domain:
    if not DOMAIN.fullmatch(domain):
      raise ConfigError(
        f'--media_domain={domain} is no host, as example.org or '
        'example.org:8080'
      )
  for name in ('max_images', 'max_waiting'):
    if getattr(args, name) < 1:
      raise ConfigError(f'--{name}={getattr(args, name)}: must be at least 1')
  if not args.timeout > 0:
    raise ConfigError(f'--timeout={args.timeout}: must be above 0 seconds')
  return Limits(
    images=args.max_images,
    media_folder=folder,
    media_domains=tuple(args.media_domain),
    seconds=args.timeout,
  )


if __name__ == '__main__':
  sys.exit(main())
