"""Token ids as text, with a tokenizer that is on this machine: nothing is downloaded or run.

`tokenizers` reads `tokenizer.json`, which is data. A tokenizer that exists as Python code alone is
not loaded; its ids are then shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sera_plugin.config.quoting import quoted
from sera_plugin.rundir.checksums import is_whole
from sera_plugin.tools.report.reading import Run

_FILE = "tokenizer.json"


class Texts:
    """Turns a run's token ids into text, with the tokenizer it was trained with if that is here.

    Looked for in the run's policies, in its output_dir, where `base_model` is a directory, and in
    the local hub cache.

    Attributes:
        tokenizer: a `tokenizers.Tokenizer`, or None.
        source: where it is from, or why there is none.
    """

    def __init__(self, run: Run) -> None:
        base_model = run.config.get("base_model")
        self.tokenizer: Any = None
        self.source = (
            f"no {_FILE} in the run's policies, its output_dir, or for base_model "
            f"{quoted(base_model)} on this machine"
        )
        for path in _places(run.root, base_model):
            tokenizer = _load(path)
            if tokenizer is not None:
                self.tokenizer, self.source = tokenizer, str(path)
                break
        self._end_ids = frozenset(run.description.get("end_ids") or ())
        self._added = frozenset(self.tokenizer.encode("").ids if self.tokenizer else ())

    def exact(self, ids: Sequence[int]) -> str:
        """Every token, special ones included; the ids themselves without a tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        text: str = self.tokenizer.decode([int(one) for one in ids], skip_special_tokens=False)
        return text

    def prompt(self, ids: Sequence[int]) -> str:
        """The prompt as text that gives the same ids when it is tokenised again.

        Without the token that the tokenizer puts in front by itself: a trainer that tokenises the
        text would have it twice.
        """
        return self.exact(ids[1:] if len(ids) and int(ids[0]) in self._added else ids)

    def completion(self, ids: Sequence[int]) -> str:
        """The completion without its end token, which trainers add themselves."""
        return self.exact(ids[:-1] if len(ids) and int(ids[-1]) in self._end_ids else ids)


def _places(root: Path, base_model: str | None) -> Iterator[Path]:
    for policy in sorted(root.glob("iteration-*/policy")):
        if is_whole(policy / _FILE):
            yield policy / _FILE
    yield root.parent / _FILE
    if base_model:
        yield Path(base_model) / _FILE
        cached = cached_file(base_model, _FILE)
        if cached is not None:
            yield cached


def _load(path: Path) -> Any:
    from tokenizers import Tokenizer

    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # the library raises plain Exception for whatever it cannot read
        return None


def cached_file(model: str, name: str) -> Path | None:
    """A file of a hub model in the local cache, None where it is not there; asks no server."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, name)
    except ValueError:  # a path is not a name on the hub
        return None
    return Path(found) if isinstance(found, str) else None
