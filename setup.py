"""The long description: the README with links that work on a package index. All else stands in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "scripts"))

from repository_links import index_description

setup(long_description=index_description(), long_description_content_type="text/markdown")
