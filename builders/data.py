"""From the section `data` of a config to sources of data, and to what a network sees of them."""

import dataclasses
from pathlib import Path

from ml_collections import FrozenConfigDict

from data import check, conditions, packing, points
from data.augmentation import Augmentation
from data.codec import Codec, ImageCodec, PointCodec
from data.conditions import Conditions, Gray, LowResolution, PairedFolder
from data.decoding import Decoder
from data.deep import Span
from data.folder import fingerprint
from data.images import Images, Source
from data.packed import Packed
from data.records import Reader
from data.sources import Dataset, refuse_one_value
from runtime.errors import UserError
from workdir import artifacts


def make_codec(config: FrozenConfigDict) -> Codec:
  """What the data of a config are, stored and seen by a network."""
  data, label_dropout = config.data, config.training.label_dropout
  if data.dim:
    return PointCodec((data.dim,), label_dropout=label_dropout)
  return ImageCodec(
    (data.image_size, data.image_size, data.num_channels),
    centered=data.centered,
    random_flip=data.random_flip,
    uniform_dequantization=data.uniform_dequantization,
    nearest_level=config.sampling.uint8 == 'round',
    label_dropout=label_dropout,
  )


def make_augmentation(config: FrozenConfigDict) -> Augmentation | None:
  """What is done to training images, of which the network is told."""
  probability = config.data.augment_probability
  return Augmentation(probability) if probability else None


def make_decoder(config: FrozenConfigDict) -> Decoder:
  """How files become the images of a config.

  Raises:
    UserError: if a field of it has no such value.
  """
  data = config.data
  given = data.black != 0 or data.white != 0
  if given and data.white <= data.black:
    raise UserError(
      f'config.data.white = {data.white:g} must be above config.data.black = {data.black:g}; with '
      'both 0 the files say them'
    )
  return Decoder(
    data.num_channels,
    fit=data.fit,
    background=data.background,
    span=Span(data.black, data.white) if given else None,
    max_pixels=data.max_pixels,
  )


def make_conditions(config: FrozenConfigDict) -> Conditions | None:
  """What the images of a config go with, if they go with anything; no folder is looked at yet.

  Raises:
    UserError: if a field of the decoder has no such value.
  """
  data = config.data
  if not data.condition:
    return None
  decoder, size = make_decoder(config), data.image_size
  if data.condition == conditions.GRAY:
    return Gray(decoder, size)
  if found := conditions.LOW_RESOLUTION.fullmatch(data.condition):
    return LowResolution(decoder, size, int(found[1]))
  decoder = dataclasses.replace(decoder, num_channels=condition_channels(config))
  return PairedFolder(data.condition, data.path, decoder, size, data.skip_damaged)


def condition_channels(config: FrozenConfigDict) -> int:
  """Of what the network is told beside the noisy images; 0 if it is told none."""
  data = config.data
  if not data.condition:
    return 0
  return 1 if data.condition == conditions.GRAY else data.condition_channels or data.num_channels


def load_source(config: FrozenConfigDict, split: str, section: str = 'model') -> Source:
  """The data of a split with all that a network is told of them; see `load_images`.

  Raises:
    UserError: the same, and if some have no condition where they should, or it cannot be read.
  """
  source = load_images(config, split, section)
  of_images = make_conditions(config) if section == 'model' else None  # classifiers see none
  if of_images is None:
    return source
  assert isinstance(source, Images)  # points have none: rules_of_training
  return of_images.beside(source, of_training=split == 'train')


def load_images(config: FrozenConfigDict, split: str, section: str = 'model') -> Source:
  """The data of a split, for the network that a section of the config describes.

  Raises:
    UserError: if they cannot be read, show nothing, or have other classes than the network.
  """
  data, num_classes = config.data, config[section].num_classes
  takes_labels = num_classes > 0 or section == 'classifier'
  source: Source
  if data.dim:
    source = points.load(data.dataset, split, data.dim)
  else:
    source = images = make_dataset(config, takes_labels).images(split)
    if split == 'train':
      refuse_one_value(images)
  if takes_labels and not num_classes == source.num_classes > 0:
    n = source.num_classes
    there = f'{n} classes; set it to that' if n else 'no labels; choose another dataset'
    raise UserError(
      f'config.{section}.num_classes is {num_classes}, and dataset {data.dataset!r}, split {split},'
      f' has {there}'
    )
  return source


def make_dataset(config: FrozenConfigDict, labelled: bool) -> Dataset:
  """The images of a config, with their classes if they are wanted.

  Raises:
    UserError: if a field of the decoder has no such value.
  """
  data = config.data
  return Dataset(
    name=data.dataset,
    image_size=data.image_size,
    decoder=make_decoder(config),
    path=data.path,
    data_dir=data.tfds_dir,
    category=data.category,
    held_out=data.held_out,
    labelled=labelled,
    skip_damaged=data.skip_damaged,
  )


def pack(config: FrozenConfigDict, name: str) -> Packed:
  """Writes the images of a config to a folder, as `dataset=packed` reads them.

  They are those, in that order, that training sees.

  Raises:
    UserError: if the data are no images, or one cannot be read, or the folder holds something else.
    Failure: if the disk is full.
  """
  data, folder = config.data, artifacts.root_of(name, '--packed')
  if data.dim:
    raise UserError(f'--mode pack is for images, and config.data.dim = {data.dim}')
  if artifacts.is_remote(folder):
    raise UserError(f'--packed {name}: pack to a folder here, and copy that')
  told = make_conditions(config)
  if told and not told.computed:
    raise UserError(
      f'--mode pack packs images alone, and config.data.condition = {data.condition} gives each '
      'another: train on the folders as they are, or pack with lowres:N or gray'
    )
  labelled = config.model.num_classes > 0 or config.classifier.num_classes > 0
  dataset, splits = make_dataset(config, labelled), dict[str, Reader]()
  for split in ('train', 'test'):
    read = dataset.reader(split)
    if not read.records.of_training:
      splits[split] = read
  prints = {split: fingerprint(data.path, read.records.files) for split, read in splits.items()}
  fields = (
    'dataset',
    'category',
    'fit',
    'background',
    'black',
    'white',
    'held_out',
    'skip_damaged',
  )
  made_of = {field: data[field] for field in fields} | {'fingerprints': prints}
  return packing.pack(Path(folder), splits, made_of)


def check_data(config: FrozenConfigDict) -> list[check.SplitReport]:
  """Reads all images of a config, and says what they are.

  Raises:
    UserError: if the data are no images, or some cannot be read, or none shows anything.
  """
  data = config.data
  if data.dim:
    raise UserError(f'--mode check_data is for images, and config.data.dim = {data.dim}')
  dataset, told = make_dataset(config, labelled=True), make_conditions(config)
  decoder, reports, of_conditions = dataset.decoder, [], list[check.SplitReport]()
  for split in ('train', 'test'):
    records = dataset.records(split)
    if not records.of_training:
      reports.append(check.check_split(split, records, decoder, data.image_size))
      if told and records.file and (paired := told.files_of(records.files)):
        their = dataclasses.replace(decoder, num_channels=told.channels)
        of_conditions.append(
          check.check_split(f'conditions of {split}', paired, their, data.image_size)
        )
  check.tell(reports, data.path or data.dataset, data.skip_damaged)
  if of_conditions:
    check.tell(of_conditions, data.condition, data.skip_damaged)
  return [*reports, *of_conditions]
