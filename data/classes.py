"""Classes by name: a model knows them by number, and numbers change where a folder is renamed."""

from collections.abc import Sequence

from runtime.errors import unknown, UserError

_SHOWN = 20  # classes in a line


def describe(names: Sequence[str], counts: Sequence[int] | None = None) -> str:
  """All classes in a line: '2 classes: 0 cat (1200 images), 1 dog (900 images)'."""
  each = [f'{i} {name}' for i, name in enumerate(names)]
  if counts is not None:
    each = [f'{text} ({n} images)' for text, n in zip(each, counts, strict=True)]
  if len(each) > _SHOWN:
    each = [*each[: _SHOWN - 1], '...', each[-1]]
  return f'{len(names)} classes: {", ".join(each)}'


def check_same(trained: Sequence[str], now: Sequence[str], where: object, way_out: str) -> None:
  """Raises UserError if a model at `where` was trained with other classes than those of the data.

  Nothing is known of a model of earlier code, which did not write down names: `trained` is empty.
  """
  if trained and tuple(trained) != tuple(now):
    raise UserError(
      f'{where} was trained with {describe(trained)}; the data have {describe(now)}: its labels '
      f'would stand for other classes. {way_out}'
    )


def numbers_of(labels: Sequence[int | str], names: Sequence[str], known: int) -> list[int]:
  """The numbers of classes that `config.sampling.labels` names, or gives as numbers.

  Args:
    labels: numbers or names.
    names: of the classes, by number; empty if they are not known.
    known: how many classes the model or the classifier knows.

  Raises:
    UserError: if there is no such class.
  """
  return [_number_of(label, names, known) for label in labels]


def _number_of(label: int | str, names: Sequence[str], known: int) -> int:
  if isinstance(label, str):
    if not names and not known:
      raise UserError(f'config.sampling.labels has {label!r}, and there are no classes')
    if not names:
      raise UserError(
        f'config.sampling.labels has {label!r}, and the checkpoint does not say the names of its '
        f'{known} classes, as earlier ones do not; give numbers from 0 to {known - 1}'
      )
    if label not in names:
      raise unknown('config.sampling.labels: class', label, names)
    return list(names).index(label)
  if not 0 <= label < known:
    allowed = f'0 to {known - 1}' if known else 'none, as neither model nor classifier has classes'
    which = f' ({describe(names)})' if names else ''
    raise UserError(f'config.sampling.labels has {label}; allowed: {allowed}{which}')
  return label
