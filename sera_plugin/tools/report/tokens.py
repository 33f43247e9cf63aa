"""Token ids as text, with a tokenizer that is on this machine: nothing is downloaded or run.

`tokenizers` reads `tokenizer.json`, which is data. A tokenizer that exists as Python code alone is
not loaded; its ids are then shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sera_plugin.config.quoting import quoted
from sera_plugin.rundir.checksums import is_whole
from sera_plugin.tools.report.reading import Run

_FILE = "tokenizer.json"


class Texts:
    """Turns a run's token ids into text, with the tokenizer it was trained with if that is here.

    `tokenizer` may be None; `source` says where it is from, or why there is none.
    """

    def __init__(self, run: Run) -> None:
        from tokenizers import Tokenizer

        base_model = run.config.get("base_model")
        self.tokenizer: Any = None
        self.source = (
            f"no {_FILE} in the run's policies, its output_dir, or for base_model "
            f"{quoted(base_model)} on this machine"
        )
        places = [run.root.parent / _FILE]
        if base_model:
            places += [Path(base_model) / _FILE, cached_file(base_model, _FILE) or Path()]
        policies = [policy / _FILE for policy in sorted(run.root.glob("iteration-*/policy"))]
        for path in [*filter(is_whole, policies), *filter(Path.is_file, places)]:
            with suppress(Exception):  # the library raises it for whatever it cannot read
                self.tokenizer, self.source = Tokenizer.from_file(str(path)), str(path)
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
        """The prompt without the token that tokenising it again puts in front."""
        return self.exact(ids[1:] if len(ids) and int(ids[0]) in self._added else ids)

    def completion(self, ids: Sequence[int]) -> str:
        """The completion without its end token, which trainers add themselves."""
        return self.exact(ids[:-1] if len(ids) and int(ids[-1]) in self._end_ids else ids)


def cached_file(model: str, name: str) -> Path | None:
    """A file of a hub model in the local cache, None where it is not there; asks no server."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, name)
    except ValueError:  # a path is not a name on the hub
        return None
    return Path(found) if isinstance(found, str) else None
