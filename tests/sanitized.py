"""A pytest plugin that puts a sanitised build of the native extension in place of the installed one (``make sanitize``)."""

import importlib.util
import os
import sys
from pathlib import Path

_NAME = "loki_attention.kernels._native"

(_path,) = Path(os.environ["LOKI_SANITIZED"]).glob("_native*.so")
_spec = importlib.util.spec_from_file_location(_NAME, _path)
assert _spec is not None and _spec.loader is not None
sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_NAME])
