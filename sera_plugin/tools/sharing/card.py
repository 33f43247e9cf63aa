"""The card of a model: what SeRA did, from the run directory, and how to load what it left.

Whoever reads it has neither the run nor the machine, so of paths the last name alone is said. What
comes from elsewhere (names, texts of a dataset or a model) is shown and never obeyed. No date is in
it: the same run has the same card.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sera_plugin.algorithm.best import FIGURE
from sera_plugin.config.kinds import SELECTIONS, labeler_kind, labeler_name
from sera_plugin.config.quoting import in_markdown, plain
from sera_plugin.rundir.writing import COMMAND, write_text
from sera_plugin.tools.report.figures import figures
from sera_plugin.tools.report.output import NOTHING, number
from sera_plugin.tools.report.pairs import examples
from sera_plugin.tools.report.reading import Run, Texts, find_run
from sera_plugin.tools.sharing.messages import Chat
from sera_plugin.tools.sharing.names import NAMED, datasets_of, hub_base, run_id, shown_base

CITATION = """\
@inproceedings{ko2025sera,
  title     = {{SeRA}: Self-Reviewing and Alignment of Large Language Models using Implicit
               Reward Margins},
  author    = {Ko, Jongwoo and Dingliwal, Saket and Ganesh, Bhavana and Sengupta, Sailik and
               Bodapati, Sravan and Galstyan, Aram},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2410.09362}
}"""
TAGS = ("sera", "dpo", "axolotl")
#: Whose run a repository holds, in the metadata of its card.
RUN_KEY = "sera_run"
#: Sampled pairs of either end that are shown, and characters of each of their texts.
_SHOWN_PAIRS, _SHOWN_TEXT = 2, 400
_TRAINED_WITH = ("adapter", "lora_r", "lora_alpha", "learning_rate", "lr_scheduler", "optimizer",
                 "sequence_len", "seed")  # fmt: skip

Figures = Mapping[str, Any]


def write_card(output_dir: Path) -> Path:
    """Write README.md of the policy in `output_dir`, from the run there.

    A ValueError if no run is there, an OSError if the file cannot be written.
    """
    run, path = Run(find_run(output_dir)), output_dir / "README.md"
    write_text(path, str(model_card(run)), COMMAND)
    return path


def policies_of(run: Run) -> tuple[int, int]:
    """The policy that is kept, and the last one; of an unfinished run the newest, twice."""
    if run.state != "finished":
        newest = max((t for t, one in run.begun.items() if _trained(one.summary)), default=0)
        return newest, newest
    last = int(run.ending.get("policies", len(run.iterations)))
    return int(run.ending.get("kept", last)), last


def _trained(summary: Figures) -> bool:
    return "train" in summary.get("seconds", {})


def model_card(
    run: Run,
    policy: int | None = None,
    name: str | None = None,
    pairs: str | None = None,
    revision: str = "main",
) -> ModelCard:
    """The card of a run's policy: the one that is kept, or theta_policy.

    Args:
        name: of its repository, for the code that loads it.
        pairs: the repository of the pairs, if there is one.
        revision: of `name`.
    """
    found, (kept, last) = figures(run), policies_of(run)
    hub, _ = datasets_of(run)
    base, adapter = hub_base(run), bool(run.config.get("adapter"))
    more: dict[str, Any] = {RUN_KEY: run_id(run)}
    if base:
        more["base_model_relation"] = "adapter" if adapter else "finetune"
    data = ModelCardData(
        base_model=base,
        datasets=[*hub, *([pairs] if pairs else ())] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, *(["lora"] if adapter else ())],
        **more,
    )
    title = name.split("/")[-1] if name else run.root.parent.resolve().name
    policy = kept if policy is None else policy
    sections = [
        f"# {in_markdown(title, 120)}",
        _introduction(run, policy, kept, last),
        *_section("How it was trained", _training(run, pairs)),
        *_section("Iterations", _iterations(found)),
        *_section("Alarms", _alarms(found)),
        *_section("Pairs that it made", _samples(run)),
        *_section("Use", _use(run, name, revision, adapter)),
        *_section("Versions", _versions(run)),
        *_section("Citation", f"```bibtex\n{CITATION}\n```"),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}", text] if text else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _introduction(run: Run, policy: int, kept: int, last: int) -> str:
    base = f"`{_code(shown_base(run))}`"
    if link := hub_base(run):
        base = f"[`{link}`](https://huggingface.co/{link})"
    settings = run.settings
    labeler = labeler_kind(run.labeler)
    what = "in iterations, each an epoch on the pairs that the policy of that time calls for"
    selects = settings.get("selection", "irm") == "irm" and settings.get("selection_ratio")
    if selects and settings.get("bootstrap_ratio") and not labeler.adds_dataset_answer:
        by = "the same reward" if labeler.implicit and not labeler.mixed else labeler.ranks_by
        what = (
            "between epochs it keeps the pairs with the largest implicit reward margin under the "
            f"current policy, and adds pairs that it samples from that policy, ranked by {by}"
        )
    lines = [
        f"{base}, tuned on preference pairs with SeRA ([Ko et al., ICLR "
        f"2025](https://arxiv.org/abs/2410.09362)): {what}."
    ]
    if run.state != "finished":
        planned = int(run.config.get("num_epochs") or 0)
        lines.append(
            f"**Training has not finished**: {last} of {planned} iterations are done, and this is "
            f"the policy after iteration {policy}, or one on its way to the next."
        )
        return "\n\n".join(lines)
    lines.append(f"This is theta_{policy}, the policy after iteration {policy} of {last}.")
    if policy != kept:
        lines[-1] += f" Training kept theta_{kept}, which is in the revision `main`."
    elif losses := run.ending.get("held_out_losses"):
        shown = ", ".join(f"theta_{p} {number(loss, '.4g')}" for p, loss in enumerate(losses))
        why = "no earlier policy is clearly better"
        if kept != last:
            why = "every later policy is clearly worse than an earlier one"
        lines[-1] += f" It is kept because {why}, by {FIGURE}: {shown}."
        if None not in (losses[0], losses[kept]) and losses[kept] >= losses[0]:
            lines[-1] += " That is no lower than where the run started (theta_0)."
    else:
        why = "no held-out pairs compared them"
        if run.settings.get("keep") == "last":
            why = "`sera.keep: last`"
        lines[-1] += f" It is kept because it is the last one ({why})."
    return "\n\n".join(lines)


def _training(run: Run, pairs: str | None) -> str:
    settings, described, config = run.settings, run.description, run.config
    hub, local = datasets_of(run)
    names = [f"[`{one}`](https://huggingface.co/datasets/{one})" for one in hub]
    names += [f"`{_code(one)}` (local)" for one in local]
    selection = SELECTIONS[str(settings.get("selection", "irm"))]
    keeps = selection.keeps.format(ratio=settings.get("selection_ratio"))
    labeler = labeler_kind(run.labeler)
    ranked = labeler.ranks_by if labeler.implicit else f"`{_code(labeler_name(run.labeler))}`"
    if call := (settings.get("function") or {}).get("call"):
        place, _, function = str(call).rpartition(":")
        ranked += f" (`{_code(function)}` of `{_code(Path(place).name)}`)"
    if model := settings.get("reward_model"):
        ranked += f" (`{_code(Path(str(model)).name)}`)"
    if judge := settings.get("judge"):  # vLLM serves a local model under its path
        model = str(judge.get("model", ""))
        ranked += f" (`{_code(model if NAMED.fullmatch(model) else Path(model).name)}`)"
    reward = f"reward `{_code(settings.get('reward', 'paper'))}`"
    if settings.get("gamma") is not None:
        reward += f", gamma {settings['gamma']:g}"
    lines = [f"data: {', '.join(names) or 'unknown'}"]
    if run.total is not None:
        held_out = described.get("evaluation_pairs") or 0
        lines[0] += f"; N = {run.total:,} pairs, and {held_out:,} held out"
    if prompts := described.get("prompts"):
        lines[0] += f"; {prompts:,} more prompts, which have no pair, were sampled"
    if run.with_margins is not None:
        lines.append(
            f"from iteration 2 on it keeps {keeps}; {reward}, trust "
            f"`{_code(settings.get('trust', 'warn'))}`"
        )
    refused = [one.number for one in run.iterations
               if (one.summary.get("reward") or {}).get("followed") is False]  # fmt: skip
    if refused:
        what = "it dropped no pair"
        what += "" if labeler.mixed else ", and was trained on no sample"
        lines.append(
            f"in iteration {', '.join(map(str, refused))} the reward was not trusted: {what}"
        )
    counted = [one for one in run.iterations if one.summary.get("samples")]
    if counted:
        sampled = sum(one.summary["samples"]["sampled"] for one in counted)
        by = sorted({str((one.summary.get("sampler") or {}).get("name")) for one in counted})
        kept = sum(one.summary["pairs"]["bootstrapped_kept"] for one in counted)
        lines.append(
            f"sampled by {', '.join(f'`{_code(one)}`' for one in by)}: {sampled:,} answers "
            f"({settings.get('candidates')} a prompt, temperature "
            f"{settings.get('temperature')}, top_p {settings.get('top_p')}, up to "
            f"{settings.get('max_new_tokens')} tokens), ranked by {ranked}; {kept:,} pairs of them "
            "were trained on"
        )
    else:
        lines.append("nothing was sampled")
    if pairs:
        link = f"https://huggingface.co/datasets/{pairs}"
        lines.append(f"all pairs with their rewards: [`{pairs}`]({link})")
    loss = f"loss `{_code(described.get('loss', 'unknown'))}`"
    if described.get("beta") is not None:
        loss += f", beta {described['beta']:g}"
    if described.get("micro_batch") and described.get("accumulation"):
        loss += f", {described['micro_batch'] * described['accumulation']} pairs a step"
    told = [f"{key} `{_code(config[key])}`" for key in _TRAINED_WITH if config.get(key) is not None]
    lines.append(", ".join([loss, *told]))
    return "\n".join(f"- {line}" for line in lines)


def _iterations(found: Figures) -> str:
    rows = []
    for one in found["iterations"]:
        counts, lengths, drift = one["pairs"] or {}, one["lengths"], one["drift"] or {}
        held_out = one["held_out"] or {}
        # What ranked the samples, where several labelers' scores are mixed with the reward.
        followed = (one.get("mixed") or one.get("reward") or {}).get("followed")
        rows.append([
            str(one["iteration"]),
            number(counts.get("trained"), ",d"),
            number(counts.get("kept"), ",d"),
            number(counts.get("bootstrapped_kept"), ",d"),
            {True: "yes", False: "no", None: NOTHING}[followed],
            *(number(lengths.get(name), ".1f") for name in ("chosen", "rejected", "sampled")),
            number(drift.get("chosen"), "+.2f"),
            number(held_out.get("accuracy"), ".0%"),
        ])  # fmt: skip
    if not rows:
        return ""
    mixed = any("mixed" in one for one in found["iterations"])
    alone = ", the scores of others left out" if mixed else ""
    head = ["iteration", "pairs trained", "kept", "sampled", "reward followed"]
    head += [f"tokens of {name}" for name in ("chosen", "rejected", "samples")]
    head += ["drift", "held-out accuracy"]
    return (
        f"{_table(head, rows)}\n\nIteration t trains theta_t; drift, accuracy and samples are of "
        "theta_{t-1}, the policy that it starts from. Drift is the mean log-probability of the "
        "chosen answers less that under theta_0, in nats per answer; accuracy is how often the "
        f"reward prefers the chosen answer of a held-out pair{alone}."
    )


def _alarms(found: Figures) -> str:
    raised = [one for one in found["alarms"] if one["raised"]]
    return "\n".join(f"- iteration {a['iteration']}, {a['name']}: {a['text']}" for a in raised)


def _samples(run: Run) -> str:
    """A few sampled pairs of the newest iteration that has some: the best and the worst."""
    texts = Texts(run)
    if texts.tokenizer is None:
        return ""
    chat, parts = Chat(run, texts), []
    for group in examples(run):
        if "bootstrapped" not in group["name"]:
            continue
        for pair in group["pairs"][:_SHOWN_PAIRS]:
            messages = chat.prompt(pair["prompt"])
            prompt = messages[-1]["content"] if messages else texts.prompt(pair["prompt"])
            answers = [texts.completion(pair[side]) for side in ("chosen", "rejected")]
            cells = [in_markdown(text, _SHOWN_TEXT) for text in (prompt, *answers)]
            parts.append([*cells, number(pair["margins"][group["t"]], "+.3g")])
            made = group["t"]
    if not parts:
        return ""
    labeler = labeler_kind(run.labeler)
    unit = run.unit if labeler.implicit else "in what ranked them"
    words = f"They are the model's own words, ranked by {labeler.ranks_by}."
    if labeler.adds_dataset_answer:
        words = "The rejected answers are the model's own words, the chosen ones the dataset's."
    return (
        f"Those that were kept in iteration {made} with the largest and the smallest margin "
        f"({unit}). {words}\n\n" + _table(["prompt", "chosen", "rejected", "margin"], parts)
    )


def _use(run: Run, name: str | None, revision: str, adapter: bool) -> str:
    here = f'"{name or "path/to/this/directory"}"'
    here += "" if revision == "main" else f', revision="{revision}"'
    base = hub_base(run)
    weights = f'"{base or f"path/to/{_code(shown_base(run))}"}"'
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if adapter:
        lines.insert(0, "from peft import PeftModel")
        lines += ["", f"base = AutoModelForCausalLM.from_pretrained({weights})"]
        lines += [f"model = PeftModel.from_pretrained(base, {here})"]
    else:
        lines += ["", f"model = AutoModelForCausalLM.from_pretrained({here})"]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({here})"]
    note = "" if base or not adapter else (
        "\n\nThe base model was a directory on the machine that trained. Give its place there."
    )  # fmt: skip
    return "```python\n" + "\n".join(lines) + f"\n```{note}"


def _versions(run: Run) -> str:
    versions = run.description.get("versions", {})
    return ", ".join(f"{plain(name)} {plain(value)}" for name, value in versions.items())


def _code(value: object) -> str:
    """A name as it can stand between backticks or in a line of code."""
    return re.sub(r"[^\w./+ -]", "_", plain(str(value), 120))
