"""Each claim as differences of two figures, paired by seed. estimates.py has the rule."""

from benchmarks.claims.estimates import Claim, Comparison, Side, after, during, versus

REWARD, SHARE = "true reward", "share"
_ALL = (0.0, 0.2, 0.4)
_LOSSES = ("cDPO", "rDPO", "IPO", "SLiC", "SimPO")

CLAIMS = (
    Claim(
        "SeRA trains better policies than plain DPO",
        "Table 1: 73.1 to 59.8 %",
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
        "Table 1: 73.1 to 64.4 %; Tables 7, 8: 71.1 to 63.5, 68.3 to 56.2",
        REWARD,
        versus("SeRA", "iterative DPO", *_ALL),
    ),
    Claim(
        "SeRA wins more often against the base model than iterative DPO",
        "the same",
        "win rate",
        versus("SeRA", "iterative DPO", *_ALL, figure="win_rate"),
    ),
    Claim(
        "selection alone helps",
        "Table 3, HH-RLHF: 65.4 to 63.0 %",
        REWARD,
        versus("SeRA, selection only", "iterative DPO", *_ALL),
    ),
    Claim(
        "sampled pairs help beyond selection",
        "Table 3, HH-RLHF: 66.1 to 65.4 %",
        REWARD,
        versus("SeRA", "SeRA, selection only", *_ALL),
    ),
    Claim(
        "offline pairs help beyond sampled ones",
        "no table",
        REWARD,
        versus("SeRA", "SeRA, bootstrap only", *_ALL),
    ),
    Claim(
        "selection drops swapped labels more often than chance (0.3)",
        "no table",
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
        "Table 7: 71.1 to 53.5 (cDPO), 70.6 (rDPO); Table 8: 68.3 to 52.6, 61.0 %",
        REWARD,
        (*versus("SeRA", "iterative cDPO", 0.2), *versus("SeRA", "iterative rDPO", 0.2)),
    ),
    Claim(
        "implicit reward margins select better than other criteria",
        "no table",
        REWARD,
        (
            *versus("SeRA, selection only", "selection by score", 0.0, 0.2),
            *versus("SeRA, selection only", "selection by reference", 0.2),
            *versus("SeRA, selection only", "random selection", 0.2),
        ),
    ),
    Claim(
        "SeRA helps other direct alignment losses",
        "Table 2: IPO 70.5 to 64.7, SLiC 72.8 to 69.1 %; Table 9: SimPO 71.6 to 66.8",
        REWARD,
        tuple(one for loss in _LOSSES for one in versus(f"SeRA, {loss}", f"iterative {loss}", 0.2)),
    ),
    Claim(
        "SeRA is better than other ways to choose pairs",
        "Table 1: Curri-DPO 73.1 to 66.8 %; Mistral, SPIN 84.4 to 61.0",
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
        "Table 6, Mistral: 0.74 with Claude 3",
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
        "Table 13: 70.2, 73.1, 74.5, 74.8 % after iterations 2 to 5",
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
        "Fig. 5",
        REWARD,
        versus("SeRA", "SeRA, gamma 0", 0.2),
    ),
    Claim(
        "more sampled pairs help (best-SeRA)",
        "Table 1: 79.5 to 73.1 %; Fig. 7",
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
