"""Each claim as differences of two figures, paired by seed. estimates.py has the rule."""

from benchmarks.claims.estimates import Claim, Comparison, Side, after, during, versus

REWARD, SHARE = "true reward", "share"
_ALL = (0.0, 0.2, 0.4)
_LOSSES = ("cDPO", "rDPO", "IPO", "SLiC", "SimPO")

CLAIMS = (
    Claim(
        "SeRA trains better policies than plain DPO",
        "main comparison",
        REWARD,
        (
            *versus("SeRA", "DPO, 3 epochs", *_ALL),
            *(
                Comparison(
                    "SeRA - DPO, 1 epoch",
                    noise,
                    Side("SeRA"),
                    Side("iterative DPO", after(1, "true_reward")),
                )
                for noise in _ALL
            ),
        ),
    ),
    Claim(
        "SeRA trains better policies than iterative DPO",
        "main comparison",
        REWARD,
        versus("SeRA", "iterative DPO", *_ALL),
    ),
    Claim(
        "SeRA wins more often against the base model than iterative DPO",
        "main comparison",
        "win rate",
        versus("SeRA", "iterative DPO", *_ALL, figure="win_rate"),
    ),
    Claim(
        "selection alone helps",
        "ablation",
        REWARD,
        versus("SeRA, selection only", "iterative DPO", *_ALL),
    ),
    Claim(
        "sampled pairs help beyond selection",
        "ablation",
        REWARD,
        versus("SeRA", "SeRA, selection only", *_ALL),
    ),
    Claim(
        "offline pairs help beyond sampled ones",
        "ablation",
        REWARD,
        versus("SeRA", "SeRA, bootstrap only", *_ALL),
    ),
    Claim(
        "selection drops swapped labels more often than chance (0.3)",
        "robustness to noise",
        SHARE,
        tuple(
            Comparison(
                f"SeRA, selection only, iteration {t}: recall - 0.3",
                noise,
                Side("SeRA, selection only", during(t, "recall")),
                Side(None, constant=0.3),
            )
            for noise in (0.2, 0.4)
            for t in (2, 3)
        ),
    ),
    Claim(
        "SeRA is robust to noise: better than losses made for it",
        "robustness to noise",
        REWARD,
        (*versus("SeRA", "iterative cDPO", 0.2), *versus("SeRA", "iterative rDPO", 0.2)),
    ),
    Claim(
        "implicit reward margins select better than other criteria",
        "comparison of selections",
        REWARD,
        (
            *versus("SeRA, selection only", "selection by score", 0.0, 0.2),
            *versus("SeRA, selection only", "selection by reference", 0.2),
            *versus("SeRA, selection only", "random selection", 0.2),
        ),
    ),
    Claim(
        "SeRA helps other direct alignment losses",
        "main comparison",
        REWARD,
        tuple(one for loss in _LOSSES for one in versus(f"SeRA, {loss}", f"iterative {loss}", 0.2)),
    ),
    Claim(
        "SeRA is better than other ways to choose pairs",
        "main comparison",
        REWARD,
        (*versus("SeRA", "SPIN", 0.2), *versus("SeRA", "Curri-DPO", 0.2)),
    ),
    Claim(
        "the implicit reward follows length less under SeRA",
        "Fig. 2, Fig. 11, Table 10",
        "R^2 with words, the baseline's less SeRA's",
        versus("iterative DPO", "SeRA", *_ALL, figure="r2_words"),
    ),
    Claim(
        "the implicit reward follows quality more under SeRA",
        "Fig. 2, Fig. 11, Table 10",
        "R^2 with true reward",
        versus("SeRA", "iterative DPO", *_ALL, figure="r2_true"),
    ),
    Claim(
        "the implicit reward ranks the policy's own samples in true order",
        "Table 6",
        SHARE,
        tuple(
            Comparison(
                f"SeRA, iteration {t}: in true order - 0.5",
                noise,
                Side("SeRA", during(t, "order_found")),
                Side(None, constant=0.5),
            )
            for noise in _ALL
            for t in (2, 3)
        ),
    ),
    Claim(
        "every iteration helps",
        "iterations",
        REWARD,
        tuple(
            Comparison(
                f"SeRA, after {t} - after {t - 1}",
                noise,
                Side("SeRA", after(t, "true_reward")),
                Side("SeRA", after(t - 1, "true_reward")),
            )
            for noise in _ALL
            for t in (2, 3)
        ),
    ),
    Claim(
        "the reward ensemble helps",
        "gamma",
        REWARD,
        versus("SeRA", "SeRA, gamma 0", 0.2),
    ),
    Claim(
        "more sampled pairs help (best-SeRA)",
        "ratios",
        REWARD,
        versus("SeRA, k~ = 2 N", "SeRA", 0.2),
    ),
)

#: Not the paper's: what this plugin adds or decides.
OURS = (
    Claim(
        "length control helps",
        "DICE; off by default",
        REWARD,
        versus("SeRA, length control", "SeRA", *_ALL),
    ),
    Claim(
        "with length control SeRA is better than iterative DPO",
        "DICE; off by default",
        REWARD,
        versus("SeRA, length control", "iterative DPO", *_ALL),
    ),
    Claim(
        "a fresh optimizer each iteration is better than one for all",
        "default of `restart_optimizer`",
        REWARD,
        (
            *versus("SeRA", "SeRA, one optimizer", 0.2),
            *versus("iterative DPO", "iterative DPO, one optimizer", 0.2),
        ),
    ),
    Claim(
        "the previous policy as the loss's reference is better than the initial one",
        "default of `reference`",
        REWARD,
        (
            *versus("SeRA", "SeRA, initial reference", 0.2),
            *versus("SeRA, selection only", "SeRA, selection only, initial reference", 0.2),
        ),
    ),
    Claim(
        "0.3 N sampled pairs are better than 0.1 N",
        "default of `bootstrap_ratio`, with 1 N pairs in all",
        REWARD,
        versus("SeRA", "SeRA, 10% sampled", 0.2),
    ),
    Claim(
        "sampling at temperature 0.7 and top_p 0.95 is better than at 1.0 and 1",
        "default of `temperature` and `top_p`",
        REWARD,
        versus("SeRA, temperature 0.7, top_p 0.95", "SeRA", 0.2),
    ),
    Claim(
        "SeRA is ahead of iterative DPO after its first reviewed iteration",
        "`num_epochs: 2`",
        REWARD,
        tuple(
            Comparison(
                "SeRA, after 2 - iterative DPO, after 2",
                noise,
                Side("SeRA", after(2, "true_reward")),
                Side("iterative DPO", after(2, "true_reward")),
            )
            for noise in _ALL
        ),
    ),
)
