"""What checkpoints call the tensors of a model, beside the released names."""

import dataclasses
import re
from collections.abc import Mapping
from typing import TypeVar

from qwenvl_jax.errors import CheckpointError, ConfigError

_T = TypeVar('_T')

# What wrappers (DistributedDataParallel, PEFT, torch.compile, DeepSpeed,
# Lightning) put before the names of the model that they wrap.
_WRAPPERS = re.compile(
  r'(?:(?:module|base_model\.model|_orig_mod|_forward_module|model)\.)+'
  r'(?=transformer\.|lm_head\.|visual\.|token_embedding\.|ln_final\.'
  r'|positional_embedding|text_projection|logit_scale)'
)

# Constants that some programs save: tables of the rotary embedding, masks of
# causal attention, factors of LogN scaling.
CONSTANTS = (
  r'(.+\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)',
  r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',
  r'(.+\.)?(logn_tensor|registered_causal_mask)',
)


@dataclasses.dataclass(frozen=True)
class TensorNames:
  """How the names of a checkpoint's tensors become released ones.

  Attributes:
    rename: (pattern, replacement) of regular expressions; each is applied to
      every name, in this order.
    leave_out: patterns of whole names, after renaming: tensors that are not
      read, as they hold nothing that was trained.
  """

  rename: tuple[tuple[str, str], ...] = ()
  leave_out: tuple[str, ...] = CONSTANTS

  def __post_init__(self):
    try:
      for pattern, replacement in self.rename:
        re.sub(pattern, replacement, '')
      for pattern in self.leave_out:
        re.compile(pattern)
    except (re.error, TypeError, ValueError, IndexError) as error:
      raise ConfigError(
        f'TensorNames: {error}: rename holds pairs of a regular expression and '
        'its replacement, leave_out regular expressions'
      ) from error

  def select(
    self, tensors: Mapping[str, _T], where: str, notes: list[str] | None = None
  ) -> dict[str, _T]:
    """Gives the tensors of the model by their released names.

    Args:
      tensors: by the names that the checkpoint has.
      where: the checkpoint, for messages.
      notes: gets a line about each kind of change.

    Raises:
      CheckpointError: some names have a prefix and others none, or two tensors
        get one name.
    """
    notes = [] if notes is None else notes
    left, renamed = {}, 0
    for name, tensor in without_prefix(tensors, where, notes).items():
      new = name
      for pattern, replacement in self.rename:
        new = re.sub(pattern, replacement, new)
      renamed += new != name
      if new in left:
        raise CheckpointError(f'{where}: two tensors would be called {new}')
      left[new] = tensor
    out = [name for name in left if self._is_left_out(name)]
    if renamed:
      notes.append(f'{renamed} tensors are renamed as TensorNames.rename says')
    if out:
      notes.append(
        f'{len(out)} tensors are left out, constants that follow from the '
        f'config: {", ".join(out[:3])}{" .." if len(out) > 3 else ""}'
      )
    return {name: left[name] for name in left.keys() - out} if out else left

  def _is_left_out(self, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in self.leave_out)


# What is taken unless a config says something else.
RELEASED = TensorNames()


def without_prefix(
  tensors: Mapping[str, _T], where: str, notes: list[str] | None = None
) -> dict[str, _T]:
  """Removes what a wrapper put before the names of all tensors.

  Raises:
    CheckpointError: some names have such a prefix, others none or another.
  """
  prefixes = {}
  for name in tensors:
    match = _WRAPPERS.match(name)
    prefixes.setdefault(match[0] if match else '', name)
  if not prefixes or set(prefixes) == {''}:
    return dict(tensors)
  if len(prefixes) > 1:
    (prefix, one), (other, two), *_ = sorted(prefixes.items(), reverse=True)
    raise CheckpointError(
      f'{where}: {one} has {prefix!r} before its name, but {two} has '
      f'{repr(other) if other else "nothing"}: save the state_dict of the '
      'model itself, without what wraps it'
    )
  (prefix,) = prefixes
  if notes is not None:
    notes.append(f'all {len(tensors)} tensors are read without {prefix!r}')
  return {name.removeprefix(prefix): x for name, x in tensors.items()}
