"""`python -m benchmarks`: measure, keep the figures as JSON, and write the pages' tables.

make bench                          all parts on this machine's CPU
make bench ARGS="--only scoring"    one of them
make bench-gpu                      the same on one CUDA GPU
"""

import argparse
import importlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import Setup, provenance
from benchmarks.report import PARTS, RESULTS, update_pages
from benchmarks.workload import SHAPES

#: Fewer rounds, or a toy, are for trying things out: their figures are shown and not kept.
FEWEST_ROUNDS = 5


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="default: all but servers")
    parser.add_argument("--rounds", type=int, default=FEWEST_ROUNDS)
    parser.add_argument("--pairs", type=int, help="default: each part's own number")
    parser.add_argument("--model", type=Path, help="a directory, instead of random weights")
    parser.add_argument("--data", type=Path, help="JSONL with prompt, chosen, rejected")
    parser.add_argument("--save", type=Path, help="a directory for figures, kept or not")
    parser.add_argument("--render", action="store_true", help="only write the pages' tables again")
    options = parser.parse_args(arguments)
    if options.data and not options.model:
        parser.error("--data needs --model: random weights come with a vocabulary of their own")
    if options.render:
        update_pages()
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"this needs a CUDA GPU, and torch {torch.__version__} sees none here. Run `make "
            "bench-gpu` on a machine that has one, with a CUDA build of torch in the environment; "
            "`make bench` measures on the CPU."
        )
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as directory:
            setup = Setup(
                device=options.device,
                shape=shape,
                rounds=options.rounds,
                pairs=options.pairs,
                model=options.model and options.model.resolve(),
                data=options.data and options.data.resolve(),
                directory=Path(directory),
            )
            for part in options.only or [one for one in PARTS if one != "servers"]:
                if setup.device in PARTS[part]:
                    run(part, setup, options.save)


def run(part: str, setup: Setup, save: Path | None = None) -> None:
    """Measure one part, show its table, and keep its figures where they are worth keeping.

    And in the directory `save` in any case.
    """
    module = importlib.import_module(f"benchmarks.{part}")
    about = provenance(setup)
    about["rounds"] = getattr(module, "ROUNDS", setup.rounds)
    result = module.measure(setup)
    print(f"\n{module.TITLE}\n\n{module.table(result)}\n", flush=True)
    name = f"{setup.device}-{setup.model.name if setup.model else setup.shape}.json"
    kept = json.dumps({"about": about, "result": result}, indent=1) + "\n"
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        (save / f"{part}-{name}").write_text(kept, encoding="utf-8")
    if setup.rounds < FEWEST_ROUNDS or (setup.shape == "toy" and setup.model is None):
        print(f"{part}: not kept ({setup.rounds} rounds, shape {setup.shape})", flush=True)
        return
    path = RESULTS / part / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(kept, encoding="utf-8")
    update_pages()


if __name__ == "__main__":
    main()
