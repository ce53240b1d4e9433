"""What the web demo says, in English and Chinese."""

import dataclasses
import pathlib

_ASSETS = pathlib.Path(__file__).parent / 'assets'

LANGUAGES = {'English': 'en', '中文': 'zh'}


@dataclasses.dataclass(frozen=True)
class Words:
  """The interface in one language; `errors` by `ApiError.code`."""

  lead: str
  ask: str
  new: str
  share: str
  open: str
  settings: str
  temperature: str
  temperature_info: str
  picture: str
  marked: str
  lacking: str
  stopped: str
  errors: dict[str, str]


WORDS = {
  'en': Words(
    lead='Ask about one picture or several. Places that the answer names are '
    'drawn on the picture.',
    ask='Ask something; add, drop or paste pictures',
    new='New conversation',
    share='Save',
    open='Open',
    settings='Settings',
    temperature='Temperature',
    temperature_info='0 gives the same answer each time',
    picture='Picture {}',
    marked='Marked on picture {}:',
    lacking='No font here shows these characters of labels: {}',
    stopped='Stopped.',
    errors={},
  ),
  'zh': Words(
    lead='就一张或多张图片提问，回答中的位置会框在图上。',
    ask='输入问题，可添加、拖入或粘贴图片',
    new='新对话',
    share='保存',
    open='打开',
    settings='设置',
    temperature='温度',
    temperature_info='为 0 时每次回答相同',
    picture='图 {}',
    marked='已在图 {} 上标出：',
    lacking='没有字体能显示标签中的这些字符：{}',
    stopped='已停止。',
    errors={
      'rate_limit_exceeded': '服务器繁忙，请稍后再试。',
      'context_length_exceeded': '对话过长，请撤销几轮或开始新对话。',
      'picture_gone': '对话中的图片已被清除，请开始新对话。',
      'not_shared': '这不是在此保存的对话文件。',
      'generation_failed': '模型无法回答这个问题。',
    },
  ),
}


@dataclasses.dataclass(frozen=True)
class Example:
  """A question with its pictures, and the same in Chinese."""

  en: str
  zh: str
  pictures: tuple[pathlib.Path, ...]

  def text(self, language: str) -> str:
    return getattr(self, language)


def _files(*names: str) -> tuple[pathlib.Path, ...]:
  return tuple(_ASSETS / f'{name}.webp' for name in names)


EXAMPLES = (
  Example(
    'Describe the picture with boxes.', '描述图片并框出物体。', _files('house')
  ),
  Example('Find the apple.', '框出苹果。', _files('apple')),
  Example(
    'Which picture has a rabbit?', '哪张图里有兔子？', _files('house', 'rabbit')
  ),
  Example(
    'Read the text and show where it is.',
    '读出文字并标出位置。',
    _files('home'),
  ),
)
