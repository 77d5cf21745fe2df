"""Where the bundled reference model and sample text lie. Knows paths only: it opens, parses and loads nothing."""

from importlib.resources import files
from pathlib import Path

__all__ = ["haystack_text", "recorded_selections", "reference_model_path", "sample_texts"]

_HAYSTACK = "haystack.txt"


def reference_model_path() -> Path:
    """The folder of the reference model and its tokenizer, for ``from_pretrained``.

    >>> sorted(path.name for path in reference_model_path().glob("*.safetensors"))
    ['model.safetensors']
    """
    return _folder("reference_model")


def sample_texts() -> tuple[Path, ...]:
    """The bundled calibration texts in name order: prose of six novels, about 45 KB each, UTF-8.

    >>> [path.stem for path in sample_texts()][:3]
    ['frankenstein', 'great_expectations', 'hound_of_the_baskervilles']
    """
    return tuple(sorted(path for path in _folder("text").glob("*.txt") if path.name != _HAYSTACK))


def haystack_text() -> Path:
    """Prose of a seventh novel, about 40 KB, UTF-8, to hide a fact in: no part of ``sample_texts``.

    >>> haystack_text() in sample_texts()
    False
    """
    return _folder("text") / _HAYSTACK


def recorded_selections() -> Path:
    """The tokens that the bundled model selected, as benchmarks/record_selections.py wrote them: a NumPy archive.

    >>> recorded_selections().name
    'selections.npz'
    """
    return _folder("selections.npz")


def _folder(name: str) -> Path:
    return Path(str(files(__name__) / name))
