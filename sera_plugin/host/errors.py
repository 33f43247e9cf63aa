"""How a command of the host ends where SeRA refuses or stops: with its sentence alone.

The host leaves errors to Python, which prints all the calls that led there before it.
"""

import dis
import os
import sys
from pathlib import Path
from types import TracebackType

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
#: What is raised with a sentence for the reader. Any other kind is a fault of the program.
_SAID = (ValueError, RuntimeError, OSError)
_RAISES = dis.opmap["RAISE_VARARGS"]


def is_said(error: BaseException) -> bool:
    """Whether a `raise` statement of this package gave the error, with a sentence of ours.

    One that comes out of a call (`int("x")`), of a library's or of ours, is not.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not isinstance(error, _SAID) or isinstance(error, NotImplementedError):
        return False
    code = last.tb_frame.f_code
    return code.co_filename.startswith(_PACKAGE) and code.co_code[last.tb_lasti] == _RAISES


def end_with_sentences() -> None:
    """Have this process end with the sentence alone; SERA_TRACEBACK=1 shows the calls as well.

    May be called again. Errors of others are printed as before.
    """
    earlier = sys.excepthook
    if hasattr(earlier, "_sera"):
        return

    def hook(kind: type[BaseException], error: BaseException, calls: TracebackType | None) -> None:
        if is_said(error) and os.environ.get("SERA_TRACEBACK", "0") in ("", "0"):
            print(f"Error: {error}", file=sys.stderr)
        else:
            earlier(kind, error, calls)

    hook._sera = True  # type: ignore[attr-defined]
    sys.excepthook = hook
