from qwenvl_jax.data import questions, things, vocabulary, wording
from qwenvl_jax.text.tokenizer import Tokenizer

_TOKENIZER = Tokenizer()


def _tokens(text):
  ids = _TOKENIZER.encode(text)
  return [_TOKENIZER.decode([token]) for token in ids]


def test_names_are_one_token_where_sentences_use_them():
  for thing in things.THINGS:
    for text in (f' {thing.en}', f' {thing.plural}', thing.zh):
      assert len(_TOKENIZER.encode(text)) == 1, text
  for colour in things.COLOURS:
    for text in (f' {colour.en}', colour.zh):
      assert len(_TOKENIZER.encode(text)) == 1, text
  for word, _ in things.WORDS:
    assert len(_TOKENIZER.encode(word)) == 1, word


def test_chinese_names_stay_whole_in_every_sentence():
  # A run of Chinese is split as a whole: neighbours could swallow a name.
  for scene in vocabulary.scenes(len(things.THINGS)):
    if len(scene.objects) > 2 and len(scene.classes) > 1:
      continue
    for language in things.LANGUAGES:
      tokens = _tokens(wording.caption(scene, language))
      for thing in scene.classes:
        entry = things.THINGS[thing]
        names = {f' {entry.en}', f' {entry.plural}', entry.zh}
        assert names & set(tokens), tokens


def test_chinese_names_stay_whole_in_every_question():
  for scene in list(vocabulary.scenes(len(things.THINGS)))[:72]:
    for chat in (False, True):
      for question in questions.enumerate_all(scene, 0, chat):
        if question.language == 'zh' and question.kind != 'translate':
          tokens = _tokens(question.prompt)
          for thing in scene.classes:
            name = things.THINGS[thing].zh
            assert name not in question.prompt or name in tokens, tokens


def test_every_class_has_one_colour_held_out_and_every_colour_classes():
  for thing in range(len(things.THINGS)):
    colours = range(len(things.COLOURS))
    assert sum(things.held_out(thing, colour) for colour in colours) == 1
  for colour in range(len(things.COLOURS)):
    assert sum(things.held_out(thing, colour) for thing in range(16)) == 2
