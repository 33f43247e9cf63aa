"""Every system, as the lines of YAML that make it (docs/systems.md).

All start from the same base model, pairs and seed; what a system does not say is the world's.
Iteration 1 of most of them is one epoch of plain DPO: its policy is kept, and is DPO's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Seeds of the tables, and others that `MAIN` is run with once more.
SEEDS, FRESH = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
#: By world, seeds of the comparison with held-out pairs. Rules were found on 50 to 59, and changed
#: once after 0 to 2 of letters and fillers and 0 of language had been seen: these are new ones.
COMPARED_SEEDS: Mapping[str, tuple[int, ...]] = {
    "letters": (5, 6, 7, 8, 9),
    "fillers": (5, 6, 7, 8, 9),
    "language": (1, 2, 3, 4, 5),
}
#: Levels of swapped labels; one in the middle where only one is run.
NOISES = (0.0, 0.2, 0.4)
MIDDLE = (0.2,)


@dataclass(frozen=True)
class System:
    """One system.

    Attributes:
        name: what tables call it.
        sera: lines inside `sera:`.
        beside: lines beside it.
        noises: shares of swapped labels it is run at.
        data: the file of pairs it trains on.
    """

    name: str
    sera: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    noises: tuple[float, ...] = MIDDLE
    data: str = "pairs"


_ITERATIVE = {"selection": "all", "bootstrap_ratio": 0}
_DPO = {**_ITERATIVE, "reference": "initial", "restart_optimizer": False}
_LENGTH = {"length_control": "auto", "offline_length_control": "auto"}
#: The paper's Eq. 9 sums over tokens.
_IPO = {"loss": "ipo", "ipo_reduction": "sum"}
_ONLINE = {"selection_ratio": 0, "bootstrap_ratio": 1}


def _loss(name: str, loss: str, **beside: Any) -> tuple[System, System]:
    """A loss by itself (iterative), and with SeRA."""
    return (
        System(f"iterative {name}", {**_ITERATIVE, "loss": loss}, beside),
        System(f"SeRA, {name}", {"loss": loss}, beside),
    )


CORE = (
    System("iterative DPO", _ITERATIVE, noises=NOISES),
    System("SeRA", noises=NOISES),
    System("SeRA, selection only", {"bootstrap_ratio": 0}, noises=NOISES),
    System("SeRA, length control", _LENGTH, noises=NOISES),
    System(
        "DPO, 3 epochs",
        _DPO,
        noises=NOISES,
    ),
    System("SeRA, bootstrap only", {"selection_ratio": 0, "bootstrap_ratio": 1}, noises=NOISES),
    System("selection by score", {"selection": "score", "bootstrap_ratio": 0}, noises=(0.0, 0.2)),
    System("selection by reference", {"selection": "reference_logp", "bootstrap_ratio": 0}),
    System("random selection", {"selection": "random", "bootstrap_ratio": 0}),
    *_loss("cDPO", "dpo", dpo_label_smoothing=0.2),
    *_loss("rDPO", "robust", dpo_label_smoothing=0.2),
    System("iterative IPO", {**_ITERATIVE, **_IPO}, {"rl_beta": 1.0}),
    System("SeRA, IPO", _IPO, {"rl_beta": 1.0}),
    *_loss("SLiC", "slic"),
    *_loss("SimPO", "simpo", rl_beta=2.0),
    System("SPIN", {**_ONLINE, "labeler": "spin", "candidates": 1}),
    System("Curri-DPO", {"selection": "curriculum", "bootstrap_ratio": 0}, data="curriculum"),
)

#: What is compared where labels are swapped by the world, and not by `label_noise`. Each keeps its
#: last policy: the best by a held-out figure is one of those on disk, and needs no run of its own.
COMPARED = (
    System("DPO, 3 epochs", _DPO, noises=(0.0,)),
    System("iterative DPO", _ITERATIVE, noises=(0.0,)),
    System("SeRA", {"reward": "paper", "trust": "warn"}, noises=(0.0,)),
    System("SeRA, fitted", {"reward": "fitted", "trust": "warn"}, noises=(0.0,)),
    System("SeRA, fitted and trusted", {"reward": "fitted", "trust": "act"}, noises=(0.0,)),
)

#: What is run in every world, and shown in every table that has no room for all.
MAIN = ("DPO, 3 epochs", "iterative DPO", "SeRA, selection only", "SeRA", "SeRA, length control")

#: What is varied, by what it is called. The default of each is SeRA itself, and not run again.
SWEEPS: Mapping[str, tuple[System, ...]] = {
    "gamma": tuple(System(f"SeRA, gamma {g:g}", {"gamma": g}) for g in (0.0, 0.1, 0.5, 0.7, 0.9)),
    "bootstrap_ratio": tuple(
        System(f"SeRA, k~ = {ratio:g} N", {"bootstrap_ratio": ratio, "candidates": candidates})
        for ratio, candidates in ((1.0, 4), (2.0, 4), (3.0, 6))
    ),
    "share sampled": tuple(
        System(
            f"SeRA, {share:.0%} sampled", {"selection_ratio": 1 - share, "bootstrap_ratio": share}
        )
        for share in (0.1, 0.5, 0.7, 0.9)
    ),
    "iterations": (
        System("SeRA, 5 iterations", beside={"num_epochs": 5}),
        System("iterative DPO, 5 iterations", _ITERATIVE, {"num_epochs": 5}),
    ),
    "sampling": (
        *(System(f"SeRA, temperature {t:g}", {"temperature": t}) for t in (0.7, 1.3)),
        System("SeRA, temperature 0.7, top_p 0.95", {"temperature": 0.7, "top_p": 0.95}),
    ),
    "reference": tuple(
        System(f"{name}, initial reference", {**lines, "reference": "initial"})
        for name, lines in (("SeRA", {}), ("SeRA, selection only", {"bootstrap_ratio": 0}))
    ),
    "restart_optimizer": tuple(
        System(f"{name}, one optimizer", {**lines, "restart_optimizer": False})
        for name, lines in (("SeRA", {}), ("iterative DPO", _ITERATIVE))
    ),
    "length control": tuple(
        System(f"SeRA, {key}", {key: "auto"})
        for key in ("length_control", "offline_length_control")
    ),
}
