"""Where a workdir can lie."""

from pathlib import Path

import pytest

from runtime.errors import UserError
from workdir import artifacts


@pytest.mark.parametrize(
  ('name', 'said'),
  [
    ('gs://bucket/run', 'needs gcsfs: pip install gcsfs google-cloud-storage'),
    ('gs:/bucket/run', 'write it as gs://BUCKET/FOLDER'),
    ('gs:///run', 'write it as gs://BUCKET/FOLDER'),
    ('s3://bucket/run', 's3:// cannot hold a workdir; name a folder, or gs://BUCKET/FOLDER'),
    ('S3://bucket/run', 'cannot hold a workdir'),
    ('http://host/run', 'http:// cannot hold a workdir'),
    ('https://host/run', 'https:// cannot hold a workdir'),
    ('file:///tmp/run', 'file:// cannot hold a workdir'),
    ('run\udcff', 'is not UTF-8, as checkpoints need'),
    ('hdfs://host:80/run', 'hdfs:// cannot hold a workdir'),
  ],
)
def test_what_cannot_be_a_workdir_is_refused(name, said, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(artifacts.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=f'--workdir .*{said}'):
    artifacts.root_of(name)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['runs/a', '/runs/a', '~/runs', 'a:b', './s3', 'seed=1', '.'])
def test_a_folder_can(name):
  assert str(artifacts.root_of(name)) == str(Path(name).expanduser())


def test_an_object_store_can_where_what_it_takes_is_there(monkeypatch):
  monkeypatch.setattr(artifacts.importlib.util, 'find_spec', lambda name: name)
  assert artifacts.is_remote(artifacts.root_of('gs://bucket/run'))
