import random

from qwenvl_jax.data import wording


def test_inventory_names_and_places_everything(two_apples_and_a_cat):
  lines = {
    wording.inventory(two_apples_and_a_cat, 'en', random.Random(seed))
    for seed in range(20)
  }
  assert len(lines) > 1  # In any order.
  for line in lines:
    assert line.count('<ref>the apple</ref><box>') == 2
    assert line.count('<ref>the cat</ref><box>(536,89),(893,357)</box>') == 1
    assert '<ref>open</ref><quad>' in line
    assert line.endswith('red\n')


def test_inventory_without_places_is_names_and_colour(
  two_apples_and_a_cat,
):
  def line(language):
    rng = random.Random(0)
    return wording.inventory(two_apples_and_a_cat, language, rng, places=False)

  assert sorted(line('en').strip().split(',')) == [
    'red', 'the apple苹果', 'the apple苹果', 'the cat猫',
  ]  # fmt: skip
  assert sorted(line('zh').strip().split('，')) == sorted(
    ['苹果the apple', '苹果the apple', '猫the cat', '红色']
  )
