"""Carry a folder of packages to a machine without a network, in files of a bounded size.

python -m benchmarks.gpu.parts cut SITE-PACKAGES PARTS --without 'vllm/vllm-rs'
python -m benchmarks.gpu.parts join PARTS SITE-PACKAGES

Kernels of many GPUs resemble each other from afar: a long window halves what a wheel takes.
"""

import argparse
import tarfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import zstandard

_MIB = 2**20
_WINDOW = 27  # of 128 MiB


class _Parts:
    """A file to write to that is cut into parts."""

    def __init__(self, directory: Path, size: int) -> None:
        self.directory, self.size, self.count, self.left = directory, size, 0, 0
        self.file: IO[bytes] | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            if self.left == 0:
                self.close()
                self.file = (self.directory / f"part-{self.count:03d}").open("wb")
                self.count, self.left = self.count + 1, self.size
            assert self.file is not None
            taken = self.file.write(view[: self.left])
            self.left, view = self.left - taken, view[taken:]
        return len(data)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def cut(site: Path, parts: Path, without: Sequence[str] = (), size: int = 50 * _MIB) -> int:
    """Write `site` into files of `size` bytes, but what matches a pattern; how many there are."""
    parts.mkdir(parents=True, exist_ok=True)

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        patterns = (*without, "*/__pycache__", "*.pyc")
        return None if any(fnmatch(member.name, f"./{p}") for p in patterns) else member

    how = zstandard.ZstdCompressionParameters.from_level(9, window_log=_WINDOW, enable_ldm=True)
    target = _Parts(parts, size)
    sink: Any = target
    with (
        zstandard.ZstdCompressor(compression_params=how).stream_writer(sink) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as tar,
    ):
        tar.add(site, ".", filter=kept)
    target.close()
    return target.count


def join(parts: Path, site: Path) -> None:
    """Put what `cut` has written back together."""
    command = zstandard.ZstdDecompressor(max_window_size=2**_WINDOW).decompressobj()
    whole = site.with_suffix(".tar")
    with whole.open("wb") as file:
        for part in sorted(parts.glob("part-*")):
            file.write(command.decompress(part.read_bytes()))
    with tarfile.open(whole) as tar:
        # Known from Python 3.11.4 on.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(site)
    whole.unlink()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.parts")
    parser.add_argument("what", choices=("cut", "join"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--without", nargs="*", default=[], metavar="PATTERN")
    options = parser.parse_args(arguments)
    if options.what == "cut":
        print(f"{cut(options.source, options.target, options.without)} parts")
    else:
        join(options.source, options.target)


if __name__ == "__main__":
    main()
