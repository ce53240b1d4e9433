import corpus
import pytest

from qwenvl_jax.data.cleaning import text_rules
from qwenvl_jax.data.cleaning.pair import Drop
from qwenvl_jax.errors import ConfigError


def cleaned(rule, text: str) -> str:
  return rule(corpus.pair(text)).text


def drops(rule, text: str) -> bool:
  return isinstance(rule(corpus.pair(text)), Drop)


@pytest.mark.parametrize(
  ('text', 'wanted'),
  [
    ('<b>Hello</b> world<br/>two &amp; three', 'Hello world two & three'),
    ('&lt;i&gt;hidden&lt;/i&gt; &amp;amp; twice', 'hidden & twice'),
    ('<script>alert(1)</script>a cat<!-- no -->', 'a cat'),
    ('<a href="http://x.y">a link</a>', 'a link'),
    ('<PERSON> on stage', '<PERSON> on stage'),
    ('a < b and c > d', 'a < b and c > d'),
  ],
)
def test_html(text, wanted):
  assert cleaned(text_rules.Html(), text) == wanted


@pytest.mark.parametrize(
  ('text', 'wanted'),
  [
    ('see https://x.org/a?b=1 now', 'see now'),
    ('mail me@x.com today', 'mail today'),
    ('IMG_2034.JPG a dog', 'a dog'),
    ('DSC00231 the sea', 'the sea'),
    ('a cat - Stock Photo #123', 'a cat'),
    ('wow!!!! really ? ? ? ?', 'wow! really ?'),
    ('| a red car () |', 'a red car'),
    ('soft\u200b\u00adly spoken\u3000word', 'softly spoken word'),
    ('好看。。。。真的', '好看。真的'),
    ('version 2.0 of C++', 'version 2.0 of C++'),
  ],
)
def test_patterns(text, wanted):
  assert cleaned(text_rules.Patterns(), text) == wanted


def test_patterns_of_ones_own():
  rule = text_rules.Patterns(patterns=(('brand', r'\bAcme\b', 'X'),))
  assert cleaned(rule, 'an Acme lamp') == 'an X lamp'
  with pytest.raises(ConfigError, match='brand'):
    text_rules.Patterns(patterns=(('brand', '(', ''),))


def test_special_tags_and_model_tags():
  assert drops(text_rules.SpecialTags(), 'a photo of <PERSON> in town')
  assert not drops(text_rules.SpecialTags(), 'a person in town')
  for tag in ('<img>', '</ref>', '<quad>', '<|im_start|>', '<|extra_0|>'):
    assert drops(text_rules.ModelTags(), f'a cat {tag} and more')
  assert not drops(text_rules.ModelTags(), '<img src="a.png"> 3 < 4 |> 2')


@pytest.mark.parametrize(
  ('text', 'always', 'symbols'),
  [
    ('hi \N{GRINNING FACE}', True, True),
    ('flag \U0001f1e8\U0001f1f3', True, True),
    ('1\ufe0f\u20e3 first', True, True),
    ('I \u2764\ufe0f you', True, True),
    ('I \u2764 you', False, True),
    ('© 2020 Acme™ # 1 * 2', False, False),
  ],
)
def test_emoji(text, always, symbols):
  assert drops(text_rules.Emoji(symbols=False), text) == always
  assert drops(text_rules.Emoji(symbols=True), text) == symbols


def test_script():
  rule = text_rules.Script()
  assert not drops(rule, 'café 中文 No. 5')
  assert drops(rule, 'привет')
  assert drops(rule, 'こんにちは')
  assert drops(rule, 'a single ж among many letters')
  lenient = text_rules.Script(tolerance=0.1)
  assert not drops(lenient, 'a single ж among many letters')
  with pytest.raises(ConfigError, match='Elvish'):
    text_rules.Script(scripts=('Latin', 'Elvish'))


def test_length_counts_words_and_chinese_characters():
  rule = text_rules.Length(minimum=3, maximum=6, characters=60)
  assert drops(rule, 'two words') and not drops(rule, 'now three words')
  assert drops(rule, '小猫') and not drops(rule, '小猫睡')
  assert drops(rule, 'one two three four five six seven')
  assert drops(rule, 'a b ' + 60 * 'x')
  assert text_rules.count_units("a dog's 2 bones") == 4
  assert text_rules.count_units('两只狗 dog') == 4


def test_language():
  pytest.importorskip('py3langid')
  rule = text_rules.Language()
  assert drops(rule, 'Ein Hund spielt mit dem Ball im tiefen Schnee')
  assert drops(rule, 'LE CHAT NOIR DORT SUR LE CANAPÉ DU SALON')
  for text in (
    'a dog plays with a red ball in the snow',
    'New York City skyline at night',
    'Nike Air Max 90 Mens Shoes',
    'Canon EOS 5D Mark IV',
    '雪地里的一只狗和一个红色的球',
  ):
    assert not drops(rule, text), text
  assert drops(text_rules.Language(languages=('de',)), 'a dog in the deep snow')


@pytest.mark.parametrize(
  ('text', 'wanted'),
  [
    ('a' + 200_000 * ' ' + 'b', 'a b'),
    ('a boat ' + 100_000 * '- ' + '- stock', 'a boat - stock'),
    ('a ' + 200_000 * '-=' + 'x', 'a ' + 200_000 * '-=' + 'x'),
    (200_000 * 'a.' + '@', 200_000 * 'a.' + '@'),
    ('a ' + 300_000 * '1', 'a ' + 300_000 * '1'),
  ],
)
def test_long_runs_take_no_longer_than_their_length(text, wanted):
  """In quadratic time, this test would not end."""
  assert cleaned(text_rules.Patterns(), text) == wanted
